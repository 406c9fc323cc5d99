"""Fetch an asset once and keep it whole or not at all.

    <cache>/<name>/<key>/            the files and PROVENANCE.json
    <cache>/<name>/<key>.lock        held by the process that downloads
    <cache>/<name>/<key>.part-*/     what it has so far; renamed to <key>/ when everything agrees

`fw.assets.entries` says what is wanted, `fw.assets.sources` and `fw.assets.hub` download it,
`fw.assets.provenance` checks it. A process that dies leaves its lock free and a `.part-*` folder,
which the next fetch of the asset removes.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fw.assets import hub, provenance, sources
from fw.assets.entries import OWNER, Asset, File, Hub, catalogue, find, is_commit
from fw.errors import FwError

logger = logging.getLogger(__name__)


def fetch(
    name: str | os.PathLike[str],
    *,
    cache: str | os.PathLike[str] | None = None,
    known: Mapping[str, Asset] | None = None,
    progress: bool | None = None,
) -> Path:
    """Return a folder with the files of an asset, downloading them if they are not there yet.

    Args:
        name: a name of the catalogue, `hf:owner/name@revision`, or an existing folder, which is
            returned as it is. A catalogue name goes before a folder of the same name: write
            `./name` for the folder. A revision that is a full commit needs no network once it is
            in the cache; a branch or a tag is asked for each time.
        cache: folder to keep assets in; `cache_folder()` if None.
        known: the catalogue to look names up in; fw's own if None.
        progress: draw a line on stderr while downloading; if None, when stderr is a terminal.

    Returns:
        The folder. It is fw's: read from it, do not write to it.

    Raises:
        FwError: unknown name, no network, another digest than the pinned one, a cached file that
            was altered, no room, a cache that cannot be written to. Nothing half is kept.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fetch(folder) == Path(folder)
    True
    """
    root = Path(cache) if cache is not None else cache_folder()
    known = catalogue() if known is None else known
    if isinstance(name, str):
        if name.startswith("hf:"):
            return _fetch_hub(name, root, progress)
        if name in known:
            return _fetch_asset(known[name], root, progress)
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise FwError(f"{path} is a file; give the folder that holds it")
    if not isinstance(name, str) or len(path.parts) > 1 or name.startswith((".", "~")):
        raise FwError(
            f"there is no folder {path}; a repository of the hub is hf:owner/name@revision"
        )
    return _fetch_asset(find(name, known), root, progress)


def cache_folder() -> Path:
    """Return where assets are kept: $FW_CACHE, or `fw` in the user's own cache folder."""
    if own := os.environ.get("FW_CACHE"):
        return Path(own).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fw"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "fw"
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification: a relative path is invalid and to be ignored.
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "fw"


def asset_folder(asset: Asset, cache: Path | None = None) -> Path:
    """Return where an asset is, or would be, kept."""
    return (cache or cache_folder()) / asset.name / asset.key


@dataclass(frozen=True)
class _Job:
    """A download to be done: where to, how large, and the function that fills a folder."""

    label: str
    folder: Path
    travels: int
    on_disk: int
    fill: Callable[[Path, sources.Report], Asset]


def _fetch_asset(asset: Asset, root: Path, progress: bool | None) -> Path:
    def fill(part: Path, report: sources.Report) -> Asset:
        sources.download(asset, part, report)
        for file in asset.files:
            provenance.compare(part / file.name, file, str(asset.source))
        return asset

    folder = asset_folder(asset, root)
    travels, on_disk = sources.bytes_to_download(asset), sources.bytes_on_disk(asset)
    if not _install(_Job(asset.name, folder, travels, on_disk, fill), progress):
        provenance.check(folder, asset)
    return folder


def _fetch_hub(name: str, root: Path, progress: bool | None) -> Path:
    repo, _, revision = name.removeprefix("hf:").partition("@")
    if repo.count("/") != 1 or not revision:
        raise FwError(f"{name!r} is not of the form hf:owner/name@revision, best a full commit")
    listing = None if is_commit(revision) else hub.listing(repo, revision)
    source = listing.source if listing else Hub(repo, revision)
    folder = root / f"hf--{repo.replace('/', '--')}" / source.revision[:12]
    if folder.is_dir():
        provenance.check(folder)
        return folder
    found = listing or hub.listing(repo, revision)

    def fill(part: Path, report: sources.Report) -> Asset:
        hub.download(source, list(found.sizes), part, report)
        files = []
        for path, digest in found.digests.items():
            hub.compare(part / path, digest, str(source))
            files.append(File(path, (part / path).stat().st_size, provenance.sha256(part / path)))
        return Asset(folder.parent.name, f"{repo} at {revision}", found.licence, source, (*files,))

    total = sum(found.sizes.values())
    if not _install(_Job(name, folder, total, total, fill), progress):
        provenance.check(folder)
    return folder


def _install(job: _Job, progress: bool | None) -> bool:
    """Fill a folder beside the final one and rename it; return False if it was there already."""
    if job.folder.is_dir():  # before anything is written: a shared cache may be read-only
        return False
    parent = job.folder.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with _locked(job):
            if job.folder.is_dir():
                return False
            for left in _parts(job):
                shutil.rmtree(left)
            free = shutil.disk_usage(parent).free
            if free < job.on_disk:
                raise FwError(_no_room(job, free))
            # A name that never comes again: the child of a killed process may still write to one.
            part = job.folder.with_name(f"{job.folder.name}.part-{secrets.token_hex(4)}")
            try:
                part.mkdir()
                (part / OWNER).write_text(f"process {os.getpid()} on {socket.gethostname()}")
                with _progress(job, progress) as report:
                    asset = job.fill(part, report)
                (part / OWNER).unlink()
                provenance.write(part, asset)
                part.rename(job.folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        if error.errno in sources.DISK_FULL:
            why = f"{_no_room(job, shutil.disk_usage(parent).free)} ({error.strerror})"
            raise FwError(why) from error
        raise FwError(
            f"{job.label}: cannot write to the cache {parent}: {error}. Set FW_CACHE to a folder "
            "that you can write to"
        ) from error
    return True


def _parts(job: _Job) -> list[Path]:
    return list(job.folder.parent.glob(f"{job.folder.name}.part-*"))


def _no_room(job: _Job, free: int) -> str:
    return (
        f"{job.label}: needs {job.on_disk} bytes in {job.folder.parent}, where {free} are free; "
        "make room, or set FW_CACHE to a folder on another disk"
    )


@contextmanager
def _locked(job: _Job) -> Iterator[None]:
    """Hold the asset's lock; say for whom one waits."""
    from filelock import FileLock, Timeout

    lock = FileLock(job.folder.with_name(f"{job.folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        owner = "another process"
        for part in _parts(job):
            with suppress(OSError):  # it may be renamed in this very moment
                owner = (part / OWNER).read_text()
        logger.warning("waiting for %s, which is fetching %s", owner, job.label)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _progress(job: _Job, progress: bool | None) -> Iterator[sources.Report]:
    """Draw one line with the rate and the time left, and remove it at the end."""
    from tqdm import tqdm

    # tqdm takes disable=None as "unless it is a terminal".
    disable = None if progress is None else not progress
    with tqdm(
        total=job.travels, desc=job.label, unit="B", unit_scale=True, leave=False, disable=disable
    ) as bar:

        def report(done: int) -> None:
            bar.update(min(done, job.travels) - bar.n)

        yield report
