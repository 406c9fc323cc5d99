"""`fw predict`: an artifact answers things, a file of them, or what comes through a pipe.

`fw.cli` hangs this into the `fw` command with `add_parser`. All rows are read and checked before
the first is answered, so that a bad one costs no compute; images are decoded as they are answered.
"""

import argparse
import json
import secrets
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from fw.data.files import read_text
from fw.errors import FwError
from fw.export.load import load
from fw.processors import Processor
from fw.processors.outputs import parse_json

JSON_LINES = (".jsonl", ".ndjson")

EXAMPLES = """examples:
  fw predict runs/fashion/artifact a.png b.jpg
  fw predict runs/credit/artifact --file applicants.csv --output answers.jsonl
  fw predict runs/films/artifact 42 '{"user": "new", "history": ["50", "181"]}'
  fw predict runs/quickstart/artifact "I would buy it again." "Never again."
  fw predict artifact --file texts.txt --output answers.jsonl
  echo '{"text": "Ada Lovelace wrote to Charles Babbage."}' | fw predict artifact -f - --read jsonl

JSON lines are {"text": "…"}, or for token classification also {"tokens": ["…", …]}, which are
taken for words as they are; for question answering {"question": "…", "context": "…"}; for images
{"image": path}; for rows of tables and for users and items values by column. Each answer is a
line, in the order of what was asked; offsets count characters."""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add `predict` to the object that `ArgumentParser.add_subparsers` returned.

    The parsed arguments carry `command`, a function from them to an exit status.
    """
    parser = subparsers.add_parser(
        "predict",
        help="answer with an artifact",
        description="Check an artifact (hashes, then its golden inputs) and answer texts, images, "
        "rows of tables, or users and items with it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("artifact", type=Path, help="a folder written by `fw export`")
    parser.add_argument("item", nargs="*", help="texts to answer, or images, rows, ids")
    parser.add_argument(
        "-f",
        "--file",
        help="a text, path or id a line, a table for tables, or JSON lines if it ends in .jsonl; "
        "- is standard input",
    )
    parser.add_argument(
        "--read", choices=("text", "jsonl"), help="form of the file (default: by its ending)"
    )
    parser.add_argument(
        "--jsonl", action="store_true", help="answer in JSON lines, as is done off a terminal"
    )
    parser.add_argument("-o", "--output", type=Path, help="write JSON lines to this file")
    parser.add_argument(
        "--batch-size", type=int, default=32, help="rows computed at once (default: %(default)s)"
    )
    parser.set_defaults(command=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Do what the parsed arguments of `predict` ask for.

    Raises:
        FwError: as `fw.export.load` does; a bad row, with file and line; no texts; an output that
            cannot be written.
    """
    if bool(arguments.item) == bool(arguments.file):
        raise FwError("predict: give either things to answer or --file (- for standard input)")
    if arguments.output and (not arguments.output.name or arguments.output.is_dir()):
        raise FwError(f"{arguments.output}: is a folder; give --output the file to write")
    artifact = load(arguments.artifact)
    if arguments.file:
        items = read_items(artifact.processor, arguments.file, artifact.task, arguments.read)
    else:
        items = [
            artifact.processor.parse(word, "command line", artifact.task) for word in arguments.item
        ]
    people = sys.stdout.isatty() and not (arguments.jsonl or arguments.output)
    answers = artifact.predict(items, arguments.batch_size)
    with _open(arguments.output) as out:
        for answer in _progress(answers, len(items), artifact.processor.item, quiet=people):
            print(artifact.processor.say(answer) if people else json.dumps(answer), file=out)
    return 0


def read_items(processor: Processor, file: str, task: str, form: str | None = None) -> list[Any]:
    """Read the things of a file and check every row.

    Args:
        processor: of the artifact.
        file: its path, or "-" for standard input.
        task: of the artifact.
        form: "text", a thing a line, or "jsonl"; None for the latter if the ending says so. Blank
            lines are left out.

    Returns:
        The things in the order of the file.

    Raises:
        FwError: it cannot be read, has a bad row (with its line), or no row.
    """
    name = "standard input" if file == "-" else file
    own = processor.from_file(Path(file)) if file != "-" and form is None else None
    items: list[Any] = []
    for where, item in _lines(processor, file, name, task, form) if own is None else own:
        if why := processor.problem(item, task):
            raise FwError(f"{where}: {why}")
        items.append(item)
    if not items:
        raise FwError(f"{name}: expected a {processor.item} a line; found none")
    return items


def _lines(
    processor: Processor, file: str, name: str, task: str, form: str | None
) -> Iterator[tuple[str, Any]]:
    """Of each line that is not blank, where it stands and the thing that it spells."""
    lines = (_standard_input() if file == "-" else read_text(file)).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        if form == "jsonl" or (form is None and Path(file).suffix in JSON_LINES):
            yield where, processor.from_json(parse_json(line, where), where, task)
        else:
            yield where, processor.parse(line.rstrip("\r"), where, task)


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise FwError(f"standard input:{line}: expected UTF-8; {error.reason}") from error


@contextmanager
def _open(path: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file that is there only once it is whole."""
    if path is None:
        yield sys.stdout
        return
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with _errors(path):
        file = part.open("x", encoding="utf-8")
    try:
        with file:
            yield file
        with _errors(path):
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FwError(f"{path}: cannot be written: {error.strerror}") from error


def _progress(answers: Iterable[Any], total: int, item: str, *, quiet: bool) -> Iterable[Any]:
    from tqdm import tqdm

    # tqdm takes disable=None as "unless standard error is a terminal".
    return tqdm(answers, total=total, unit=item, leave=False, disable=True if quiet else None)
