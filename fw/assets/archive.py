"""Members out of an archive, by name and of known size; nothing else of it is touched.

Wheels and zip archives, and tar archives with gzip. The destination never comes from the archive:
`fw.assets.entries.File` names it, and has checked it. `fw.assets.sources` calls this on an archive
whose SHA-256 it has compared already; what came out is hashed again by `fw.assets.cache`.
"""

from __future__ import annotations

import io
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO

from fw.assets.entries import File
from fw.errors import FwError

NESTED_LIMIT = 64 << 20
"""Bytes of an archive inside an archive, which is held in memory."""

CHUNK = 1 << 20


def extract(archive: Path, files: Iterable[File], into: Path) -> None:
    """Write the members `file.member` of an archive to `into / file.name`.

    Args:
        archive: a .zip, .whl or .tar.gz file.
        files: which members, of which size in bytes.
        into: an existing folder.

    Raises:
        FwError: a member is missing, is there twice, is no regular file, has another size, or the
            archive is damaged.

    >>> import tempfile, zipfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "a.zip"
    ...     with zipfile.ZipFile(path, "w") as z:
    ...         z.writestr("a/config.json", "{}")
    ...     extract(path, [File("config.json", 2, "0" * 64, "a/config.json")], Path(folder))
    ...     (Path(folder) / "config.json").read_text()
    '{}'
    """
    try:
        with archive.open("rb") as raw:
            _extract(raw, archive.name, tuple(files), into)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError) as error:
        raise FwError(f"{archive.name}: damaged, or of a kind fw does not read: {error}") from error


def _extract(raw: IO[bytes], label: str, files: Iterable[File], into: Path) -> None:
    nested: dict[str, list[File]] = defaultdict(list)
    with ExitStack() as stack:
        member = _reader(raw, label, stack)
        for file in files:
            outer, bang, inner = file.member.partition("!")
            if bang:
                nested[outer].append(replace(file, member=inner))
                continue
            stream, size = member(file.member)
            if size != file.size:
                raise FwError(f"{label}: {file.member} has {size} bytes, expected {file.size}")
            target = into / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            with stream, target.open("xb") as out:
                shutil.copyfileobj(stream, out, CHUNK)
        for outer, inside in nested.items():
            stream, size = member(outer)
            if size > NESTED_LIMIT:
                raise FwError(f"{label}: {outer} has {size} bytes, at most {NESTED_LIMIT} expected")
            with stream:
                held = io.BytesIO(stream.read(size))
            _extract(held, f"{label}!{outer}", inside, into)


type Member = Callable[[str], tuple[IO[bytes], int]]


def _reader(raw: IO[bytes], label: str, stack: ExitStack) -> Member:
    """Return a function from a member's name to its stream and declared size."""
    if label.endswith((".whl", ".zip")):
        return _zip_reader(stack.enter_context(zipfile.ZipFile(raw)), label)
    # Named, because "r:*" would try compressions one after the other on a damaged file.
    return _tar_reader(stack.enter_context(tarfile.open(fileobj=raw, mode="r:gz")), label)


def _zip_reader(archive: zipfile.ZipFile, label: str) -> Member:
    infos = archive.infolist()

    def member(name: str) -> tuple[IO[bytes], int]:
        info = _only([i for i in infos if i.filename == name], name, label)
        # The upper half holds the Unix mode; archives made elsewhere leave it zero.
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
            raise FwError(f"{label}: {name} is no regular file")
        return archive.open(info), info.file_size

    return member


def _tar_reader(archive: tarfile.TarFile, label: str) -> Member:
    infos = archive.getmembers()

    def member(name: str) -> tuple[IO[bytes], int]:
        info = _only([i for i in infos if i.name == name], name, label)
        stream = archive.extractfile(info) if info.isreg() else None
        if stream is None:
            raise FwError(f"{label}: {name} is no regular file")
        return stream, info.size

    return member


def _only[T](found: list[T], name: str, label: str) -> T:
    if len(found) != 1:
        raise FwError(f"{label}: {name} is there {len(found)} times, expected once")
    return found[0]
