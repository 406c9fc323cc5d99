"""Parses, calls one public function, prints. Anything a user can cause ends in one line."""

import argparse
import logging
import sys
from collections.abc import Sequence

from fw import host
from fw.errors import FwError
from sharding import ShardingError

_HELP = """\
From a pretrained checkpoint to a small, verified artifact:

  fw fetch all-MiniLM-L6-v2                      a pinned model or data set, verified
  fw finetune --task ner --data DIR --run RUN    train on any mesh; --resume goes on
  fw eval RUN                                    the report on the test split
  fw compress RUN                                int8 weights, and what they cost
  fw export RUN --variant int8                   a folder that answers, RUN/artifact
  fw predict RUN/artifact "some text"            answers

A run is a folder: config.json, metrics.jsonl, checkpoints/, model/ (for transformers, too),
result.json, report.html, artifact/.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns the exit status: 0, 1 for bad input, 130 if interrupted."""
    arguments = _parser().parse_args(argv)
    if argv is None:  # the command itself, not a test or a notebook
        host.prepare(getattr(arguments, "mesh", ""))
    logging.getLogger("absl").setLevel(logging.WARNING)  # orbax tells every step of a save
    try:
        return arguments.command(arguments)
    except (FwError, ShardingError) as error:
        print(f"fw: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fw: interrupted; fw finetune --resume goes on from the last checkpoint", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    from fw import assets
    from fw.cli import finetune, stages
    from fw.export import command

    parser = argparse.ArgumentParser(
        prog="fw", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (
        assets.add_parser,
        finetune.add_parser,
        stages.add_eval,
        stages.add_compress,
        stages.add_export,
        command.add_parser,
    ):
        add(commands)
    return parser
