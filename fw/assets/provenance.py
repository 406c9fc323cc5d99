"""What a kept asset says of itself, and whether its files are still what it says.

`fw.assets.cache` writes PROVENANCE.json into each folder before the folder gets its final name, and
calls `check` whenever a kept folder is asked for.

What `check` looks at: every file's size; the SHA-256 of every file below `ALWAYS_HASHED` bytes;
that of a larger one only if its modification time is not the recorded one. `verify` hashes all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from fw.assets.entries import PROVENANCE, Asset, File
from fw.errors import FwError

ALWAYS_HASHED = 64 << 20
"""Bytes below which a file is hashed on every fetch, which takes a tenth of a second."""


def verify(folder: Path, asset: Asset | None = None) -> None:
    """Hash every file of a fetched asset and compare.

    Args:
        folder: what `fw.assets.fetch` returned.
        asset: what it should be; if None, what its own PROVENANCE.json says.

    Raises:
        FwError: a file is missing or altered, or there is no record to compare with.
    """
    _compare_all(folder, asset.files if asset else _read(folder)[0], {})


def check(folder: Path, asset: Asset | None = None) -> None:
    """Do as `verify`, but trust a large file whose size and modification time are as recorded.

    Raises:
        FwError: as `verify`.
    """
    files, times = _read(folder)
    _compare_all(folder, asset.files if asset else files, times)


def compare(path: Path, file: File, origin: str) -> None:
    """Compare size and SHA-256 of a file that has just arrived with what is pinned.

    Args:
        path: the file.
        file: what is pinned.
        origin: where it came from, for the message.

    Raises:
        FwError: they differ.
    """
    size = path.stat().st_size
    if size < file.size:
        raise FwError(f"{origin}: {file.name} ended after {size} of {file.size} bytes; try again")
    digest = sha256(path)
    if size > file.size or digest != file.sha256:
        raise FwError(
            f"{origin}: {file.name} is not the file that was pinned, and is not kept: {size} bytes "
            f"with SHA-256 {digest}, expected {file.size} with {file.sha256}"
        )


def sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(folder: Path, asset: Asset) -> None:
    """Write PROVENANCE.json: name, source, licence, date (UTC), and each file's size and digest."""
    files = {
        f.name: {
            "size": f.size,
            "sha256": f.sha256,
            "mtime_ns": (folder / f.name).stat().st_mtime_ns,
        }
        for f in asset.files
    }
    record = {
        "name": asset.name,
        "what": asset.what,
        "licence": asset.licence,
        "source": {"kind": type(asset.source).__name__.lower()} | asdict(asset.source),
        "fetched": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": files,
    }
    (folder / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _read(folder: Path) -> tuple[tuple[File, ...], dict[str, int]]:
    """Return the recorded files and their modification times."""
    path = folder / PROVENANCE
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        return (
            tuple(File(name, f["size"], f["sha256"]) for name, f in files.items()),
            {name: f["mtime_ns"] for name, f in files.items()},
        )
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise FwError(f"{path}: no usable record ({why}); {_again(folder)}") from error


def _compare_all(folder: Path, files: tuple[File, ...], times: Mapping[str, int]) -> None:
    for file in files:
        path = folder / file.name
        try:
            stat = path.stat(follow_symlinks=False)
            trusted = file.size >= ALWAYS_HASHED and stat.st_mtime_ns == times.get(file.name)
            whole = stat.st_size == file.size and (trusted or sha256(path) == file.sha256)
        except OSError as error:
            raise FwError(f"{path}: {error.strerror}; {_again(folder)}") from error
        if not whole:
            raise FwError(f"{path} is not what was fetched: altered since; {_again(folder)}")


def _again(folder: Path) -> str:
    return f"delete the folder {folder} and fetch again"
