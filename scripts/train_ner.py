"""Fine-tunes a pretrained encoder for named entities; a tutorial that runs.

It reads from top to bottom, each stage a call of the library that returns before the next begins.
The `fw` command does the same, a subcommand for each: finetune, eval, compress, export, predict.
`scripts/quickstart` makes the environment.
"""

import argparse
import sys
from collections.abc import Sequence

import jax

from fw import export, host, report, run, stages
from fw.errors import FwError
from fw.finetune import finetune
from fw.options import add_options, read_options
from fw.recipe import Finetune
from sharding import ShardingError

HELP = """\
Fine-tune a pretrained encoder for named entities, from data to an int8 artifact that answers.

DATA is a folder with a file for train and, if there are, dev and test in their names, or one file,
which is then split. The files are CoNLL columns (a word and its tag a line, a blank line between
sentences; tags in BIO or IOB1) or JSON lines: {"tokens": [...], "tags": [...]}.

  .venv/bin/python scripts/train_ner.py --data wnut17/ --run runs/wnut --learning-rate 2e-4
  ... --mesh data=2             two devices (on a CPU, virtual ones); the same numbers
  mpirun -n 2 ... --mesh data=2   two processes, on one machine or several
  ... --steps 20                a quick look
  ... --resume                  go on where it was interrupted, on any mesh

RUN gets config.json, metrics.jsonl, checkpoints/, model/ (for transformers, too), int8/, artifact/,
artifact-f32/, result.json and report.html.
"""
TEXTS = (
    "Ada Lovelace wrote to Charles Babbage from London.",
    "Samsung opens a new store next to the Empire State Building on Friday.",
    "i can't believe they cancelled Firefly",
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument(
        "--ask", metavar="TEXT", action="append", help="answer this text at the end; repeatable"
    )
    # A recipe is a frozen record; its fields are the options, its docstring is their help.
    add_options(parser, Finetune, without=("task",))
    arguments = parser.parse_args()

    try:
        # Memory, other processes and devices, which have to be settled before JAX starts.
        cluster = host.prepare(getattr(arguments, "mesh", ""))
        recipe = read_options(arguments, Finetune, task="ner")
        with cluster.guard():
            train(recipe, resume=arguments.resume, texts=arguments.ask or TEXTS)
    except (FwError, ShardingError) as error:  # what the user can mend, in one line
        print(f"train_ner: {error}", file=sys.stderr)
        return 1
    return 0


def train(recipe: Finetune, *, resume: bool, texts: Sequence[str]) -> None:
    # Fine-tune. The model is downloaded if need be, read onto the mesh in parts, given a new head
    # for the tags in the data, and trained on packed rows; the checkpoint with the best entity F1
    # on dev becomes RUN/model. Other data, losses or loops: copy the body of `finetune`, every
    # line of which is a function of the library.
    folder = finetune(recipe, resume=resume)

    # Evaluate. Whole entities count, as in seqeval; below them, every tag.
    split = "test" if "test" in run.config(folder)["records"] else "dev"
    print(f"\n{split}\n{stages.evaluate_run(folder, split, mesh=recipe.mesh).text}\n")

    if jax.process_count() > 1:  # the rest is work for one machine
        print(f"{folder}: go on with fw compress and fw export, in one process")
        return

    # Compress. The kernels become int8 with a scale for each output; activations follow row by row
    # as they come, so the products are int8 × int8, and nothing needs to be calibrated.
    print(stages.compress_run(folder, split=split, mesh=recipe.mesh))

    # Export. An artifact needs none of this library's models: StableHLO with a symbolic batch,
    # weights, tokenizer, labels, and golden outputs that are computed again wherever it is loaded.
    artifacts = {
        "f32": stages.export_run(folder, name="f32", output=folder / "artifact-f32"),
        "int8": stages.export_run(folder, name="int8"),
    }

    # Answer.
    print()
    for answer in export.load(artifacts["int8"]).predict(texts):
        print(answer["text"])
        for entity in answer["entities"]:
            print(f"  {entity['type']} {entity['score']:.2f}  {entity['text']}")

    # Compare: the same rows through both artifacts in turn, and the quality again.
    rows = [
        (
            row["name"],
            f"{row['f1']:.4f}",
            report.size(row["bytes"]),
            report.size(row["encoder_bytes"]),
            f"{row['latency_ms']:.1f} ms",
        )
        for row in stages.summary_rows(folder, artifacts, split=split)
    ]
    print()
    print(report.table(rows, ("variant", f"{split} F1", "weights", "encoder", "16 × 64 tokens")))
    print(f"\n{folder / run.REPORT}\n{folder / run.ARTIFACT}")


if __name__ == "__main__":
    sys.exit(main())
