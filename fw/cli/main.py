"""Parses, calls one public function, prints. Anything a user can cause ends in one line."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from fw import host
from fw.errors import FwError

_HELP = """\
From a pretrained checkpoint to a small, verified artifact:

  fw fetch all-MiniLM-L6-v2                      a pinned model or data set, verified
  fw plan --model NAME --hardware v5e:16x16 ...  the best layout for a machine that is not here
  fw finetune --task ner --data DIR --run RUN    train on any mesh; --resume goes on
  fw eval RUN                                    the report on the test split
  fw prune RUN SMALL --parameters 0.7            fewer heads, neurons and layers; SMALL learns again
  fw compress RUN                                int8 weights, and what they cost
  fw export RUN --variant int8                   a folder that answers, RUN/artifact
  fw predict RUN/artifact "some text"            answers
  fw generate MODEL "some text"                  goes on with it

A run is a folder: config.json, metrics.jsonl, checkpoints/, model/ (as transformers reads those it
knows), result.json, report.html, artifact/.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
      argv: its words; None for the command line, for which the process is prepared (`fw.host`).

    Returns:
      The exit status: 0; 1 for bad input, 130 if interrupted, 141 if nobody reads the output.
      Argparse itself ends the process with 2 on an unknown option.
    """
    if argv is None:  # the command itself, not a test or a notebook
        host.restart()
    arguments = _parser().parse_args(argv)
    from sharding import ShardingError

    logging.getLogger("absl").setLevel(logging.WARNING)  # orbax tells every step of a save
    try:
        guard = host.join(getattr(arguments, "mesh", "")).guard() if argv is None else nullcontext()
        with guard:
            status = arguments.command(arguments)
        sys.stdout.flush()
        return status
    except (FwError, ShardingError) as error:
        print(f"fw: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fw: interrupted; fw finetune goes on with --resume", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has seen enough, as in `fw predict ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141


def _parser() -> argparse.ArgumentParser:
    # Here for the same reason as in `main`.
    from fw import assets
    from fw.cli import finetune, generate, plan, stages
    from fw.export import command

    parser = argparse.ArgumentParser(
        prog="fw", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (
        assets.add_parser,
        plan.add_parser,
        finetune.add_parser,
        stages.add_eval,
        stages.add_prune,
        stages.add_compress,
        stages.add_export,
        command.add_parser,
        generate.add_parser,
    ):
        add(commands)
    return parser
