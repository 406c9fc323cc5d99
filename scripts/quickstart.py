"""The main job, the library's whole line in one page: fine-tune, evaluate, compress, export, ask.

all-MiniLM-L6-v2 learns the sentiment of human-rated sentences (tweets, product and film reviews,
newspaper editorials) on a mesh of two CPU devices, becomes int8, is exported and answers.
`scripts/quickstart` makes the environment and runs this; everything lands in runs/quickstart.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

from fw import host
from fw.errors import FwError

RUN = Path(__file__).resolve().parents[1] / "runs" / "quickstart"
SENTENCES = (
    "The battery died after two days and nobody answers my mails.",
    "I could watch this film every evening, it is a delight!",
    "The committee will meet again on Thursday.",
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", type=Path, default=RUN, help="the run's folder (default: %(default)s)"
    )
    parser.add_argument("--mesh", default="fsdp=2", help="devices by axis (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=0, help="stop early, for a quick look (default: 1 epoch)"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="delete the run that is there and start again"
    )
    arguments = parser.parse_args()
    host.prepare(arguments.mesh)

    # Imported here because `prepare` settles devices and memory before JAX starts.
    from fw import assets, export, report, stages
    from fw.finetune import Finetune, finetune, record

    run, mesh = arguments.run, arguments.mesh
    seconds: dict[str, float] = {}
    began = time.perf_counter()

    def done(stage: str) -> None:
        nonlocal began
        seconds[stage], began = time.perf_counter() - began, time.perf_counter()
        print(f"— {stage}: {report.seconds(seconds[stage])}", flush=True)

    if arguments.fresh:
        shutil.rmtree(run, ignore_errors=True)
    for name in ("all-MiniLM-L6-v2", "vader-sentiment"):
        print(f"{name}: {assets.fetch(name)}")
    done("fetch")

    recipe = Finetune(
        task="classify", model="all-MiniLM-L6-v2", data="vader-sentiment", run=str(run),
        mesh=mesh, epochs=1, steps=arguments.steps, batch=16, length=64, learning_rate=2e-4,
    )  # fmt: skip
    finetune(recipe, resume=run.exists())  # a run that was interrupted goes on
    done("fine-tune")

    print(stages.evaluate_run(run, "test", mesh=mesh).text)
    done("evaluate")

    print(stages.compress_run(run, split="test", mesh=mesh))
    done("compress")

    artifacts = {
        name: stages.export_run(run, name=name, output=run / folder)
        for name, folder in (
            ("f32", "artifact-f32"),
            ("bf16", "artifact-bf16"),
            ("int8", "artifact"),
        )
    }
    done("export")

    for answer in export.load(artifacts["int8"]).predict(SENTENCES):
        print(f"{answer['label']:>9} {answer['score']:.2f}  {answer['text']}")
    done("answer")

    rows = stages.summary_rows(run, artifacts)
    done("measure")
    record(run, {"stages": seconds})

    print()
    print(
        report.table(
            [
                (
                    row["name"],
                    f"{row['accuracy']:.4f}",
                    f"{row['macro_f1']:.4f}",
                    f"{row['bytes'] / 1e6:.1f}",
                    f"{row['encoder_bytes'] / 1e6:.1f}",
                    f"{row['latency_ms']:.1f}",
                )
                for row in rows
            ],
            ("variant", "accuracy", "macro-F1", "MB", "encoder MB", "ms, 16 × 64 tokens"),
        )
    )
    print()
    print(report.table([(k, report.seconds(v)) for k, v in seconds.items()], ("stage", "time")))
    print(f"\n{run}/report.html\n{run}/artifact")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FwError as error:  # what the user can mend, in one line
        sys.exit(f"quickstart: {error}")
