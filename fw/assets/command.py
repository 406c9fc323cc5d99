"""`fw fetch`: the catalogue as a table, and an asset's folder on standard output.

`fw.cli` hangs this into the `fw` command with `add_parser`; `cli` is the same alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fw.assets.cache import asset_folder, cache_folder, fetch
from fw.assets.entries import Asset, catalogue, read_catalogue
from fw.assets.provenance import verify
from fw.errors import FwError


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add `fetch` to the object that `ArgumentParser.add_subparsers` returned.

    The parsed arguments carry `run`, a function from them to an exit status.
    """
    parser = subparsers.add_parser(
        "fetch",
        help="download an asset once and print its folder",
        description="Download pinned weights or data once, check them, and print their folder.",
    )
    parser.add_argument(
        "name", nargs="?", help="a name of the catalogue, hf:owner/name@revision, or a folder"
    )
    parser.add_argument("--list", action="store_true", help="print the catalogue and end")
    parser.add_argument("--verify", action="store_true", help="hash every file, large ones too")
    parser.add_argument("--cache", type=Path, help="where to keep assets (default: $FW_CACHE)")
    parser.add_argument("--catalogue", type=Path, help="a catalogue of your own (TOML)")
    parser.set_defaults(command=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Do what the parsed arguments of `fetch` ask for.

    Raises:
        FwError: as `fetch` and `verify` do.
    """
    path = arguments.catalogue
    known = catalogue() if path is None else read_catalogue(path)
    if arguments.list:
        print(table(known, arguments.cache or cache_folder()))
        return 0
    if arguments.name is None:
        raise FwError("fetch: which asset? `fw fetch --list` prints their names")
    folder = fetch(arguments.name, cache=arguments.cache, known=known)
    if arguments.verify:
        verify(folder, known.get(arguments.name))
    print(folder)
    return 0


def table(known: Mapping[str, Asset], cache: Path) -> str:
    """Return the catalogue as aligned text: name, size, whether it is cached, licence, source.

    >>> print(table(catalogue(), Path("nowhere")).splitlines()[0].split())
    ['name', 'size', 'cached', 'licence', 'source', 'what']
    """
    rows = [("name", "size", "cached", "licence", "source", "what")]
    for asset in known.values():
        cached = "yes" if asset_folder(asset, cache).is_dir() else "no"
        size = f"{asset.size / 1e6:.1f} MB"
        rows.append((asset.name, size, cached, asset.licence, str(asset.source), asset.what))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def cli(argv: Sequence[str] | None = None) -> int:
    """Run `fetch` as a program of its own; an error of the user's is one line and status 1.

    >>> cli(["no-such-thing"])
    1
    """
    parser = argparse.ArgumentParser(prog="fw")
    add_parser(parser.add_subparsers(required=True))
    arguments = parser.parse_args(["fetch", *(sys.argv[1:] if argv is None else argv)])
    try:
        return arguments.command(arguments)
    except FwError as error:
        print(f"fw: {error}", file=sys.stderr)
        return 1
