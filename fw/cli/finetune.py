"""`fw finetune`: its options are the fields of the recipe."""

import argparse
from typing import Any

from fw.finetune import finetune
from fw.options import add_options, read_options
from fw.recipe import Finetune
from fw.run import config
from fw.stages import evaluate_run

_HELP = """\
Train a model: a pretrained one, or a new one of images, tables, users and items. RUN gets
config.json (every option, resolved), metrics.jsonl, checkpoints/, model/ (the best parameters, as
transformers reads those it knows), with --lora adapter/ (as PEFT reads it), and report.html.

  fw finetune --task ner --data wnut17/ --run runs/wnut --epochs 5 --learning-rate 3e-4
  fw finetune --task classify --data reviews.csv --columns text,stars --run runs/reviews
  fw finetune --task qa --data squad/ --length 384 --batch 16 --run runs/squad
  fw finetune --task regress --data vader-sentiment --run runs/valence
  fw finetune --task lm --model SmolLM2-135M-Instruct --data talks.jsonl --run runs/talks
  fw finetune --task image --data fashion_mnist/ --augment flip --smoothing 0.1 --run runs/fashion
  fw finetune --task segment --data cells/ --config width=32 --augment flip,turn --run runs/cells
  fw finetune --task tabular --data german-credit --target creditability --run runs/credit
  fw finetune --task retrieve --data movielens-100k --batch 512 --run runs/films
  fw finetune ... --lora 8                          train adapters; --lora-base nf4: over codes
  fw finetune ... --teacher runs/large              learn from a finished run, too
  fw finetune ... --mesh data=2,fsdp=2,tensor=2     the same numbers on 8 devices
  fw finetune ... --plan plan.json                  on the layout that fw plan found best
  mpirun -n 2 fw finetune ... --mesh data=2         the same in two processes, also with srun
  fw finetune ... --resume                          go on where it stopped, on any mesh
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "finetune", aliases=["train"], help="train on a data set", description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    add_options(parser, Finetune)
    parser.set_defaults(command=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Trains, then reports on the test split where the data has one."""
    recipe = read_options(arguments, Finetune)
    folder = finetune(recipe, resume=arguments.resume)
    if "test" in config(folder)["records"]:
        print(f"test\n{evaluate_run(folder, 'test', mesh=config(folder)['mesh']).text}")
    print(f"{folder}/report.html")
    return 0
