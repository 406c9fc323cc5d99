"""A Hugging Face repository at one commit: what it holds, and the files of it that are data.

`huggingface_hub` does the work, with the user's own endpoint, token and proxy settings, and is
imported only when a repository is asked for. What the hub states of each file (SHA-256, or the
git object id of a small one) is compared with what arrived.
"""

from __future__ import annotations

import glob
import hashlib
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fw.assets.entries import Hub, check_path
from fw.errors import FwError

SUFFIXES = (".safetensors", ".json", ".txt", ".model")
"""What is taken of a repository: no pickles and no code."""

POLL = 0.2
"""Seconds between two looks at a growing folder."""


@dataclass(frozen=True)
class Listing:
    """What a repository holds at one commit.

    Attributes:
        source: repository and commit.
        licence: as the model card says.
        sizes: bytes by path, of the files with one of `SUFFIXES`.
        digests: `sha256:…` or `git:…` (the object id) by path.
    """

    source: Hub
    licence: str
    sizes: Mapping[str, int] = field(repr=False)
    digests: Mapping[str, str] = field(repr=False)


def listing(repo: str, revision: str) -> Listing:
    """Ask the hub what a repository holds, and which commit a branch or a tag means now.

    Args:
        repo: `owner/name`.
        revision: a commit, a tag or a branch.

    Raises:
        FwError: no such repository or revision, no access, no network, nothing usable in it.
    """
    from huggingface_hub import HfApi

    where = f"hf:{repo}@{revision}"
    with _errors(where):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    files = [f for f in info.siblings or () if f.rfilename.endswith(SUFFIXES)]
    if not files:
        raise FwError(
            f"{where} has no {' or '.join(SUFFIXES)} file; weights in pickles (.bin, .pt) are not "
            "read: convert them to safetensors first"
        )
    for file in files:
        check_path(file.rfilename)
    return Listing(
        Hub(repo, info.sha or ""),
        str((info.card_data or {}).get("license") or "see the model card"),
        {f.rfilename: f.size or 0 for f in files},
        {f.rfilename: f"sha256:{f.lfs.sha256}" if f.lfs else f"git:{f.blob_id}" for f in files},
    )


def download(source: Hub, names: Sequence[str], into: Path, report: Callable[[int], None]) -> None:
    """Download files of a repository into an existing folder, under the names they have there.

    Raises:
        FwError: no access, no network, or a file is missing.
        OSError: the folder cannot be written to.
    """
    from huggingface_hub import snapshot_download
    from tqdm.asyncio import tqdm_asyncio

    class Silent(tqdm_asyncio):  # the hub's own bars would be drawn over fw's
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"disable": True})

    with _errors(str(source)), _watching(into, report):
        snapshot_download(
            source.repo,
            revision=source.revision,
            allow_patterns=[glob.escape(name) for name in names],
            local_dir=into,
            tqdm_class=Silent,
        )
    shutil.rmtree(into / ".cache", ignore_errors=True)  # the hub's notes on what it downloaded
    if missing := [name for name in names if not (into / name).is_file()]:
        raise FwError(f"{source} did not deliver {', '.join(missing)}")


def compare(path: Path, digest: str, origin: str) -> None:
    """Compare a file with the digest that the hub states.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     compare(Path(file.name), "git:e69de29bb2d1d6434b8b29ae775ad8c2e48c5391", "here")

    Raises:
        FwError: they differ.
    """
    kind, _, expected = digest.partition(":")
    with path.open("rb") as file:
        if kind == "sha256":
            found = hashlib.file_digest(file, "sha256").hexdigest()
        else:
            head = b"blob %d\0" % path.stat().st_size
            found = hashlib.sha1(head + file.read(), usedforsecurity=False).hexdigest()
    if found != expected:
        raise FwError(
            f"{origin}: {path.name} has {kind} digest {found}, and the hub states {expected}; it "
            "is not kept"
        )


@contextmanager
def _errors(where: str) -> Iterator[None]:
    """Turn what the hub's client raises into FwError, but let a full disk through."""
    try:
        yield
    except Exception as error:
        # A plain OSError is the disk's. The rest cannot be listed: the client lets its HTTP
        # library's errors through, and which library that is has changed from release to release.
        if type(error) in (OSError, PermissionError):
            raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FwError(
            f"{where}: the hub did not answer as hoped: {type(error).__name__}: {first}. Check the "
            "name, the network, and for a private or gated repository the login (hf auth login)"
        ) from error


@contextmanager
def _watching(folder: Path, report: Callable[[int], None]) -> Iterator[None]:
    """Report the bytes in a folder while the body fills it."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(POLL):
            with suppress(OSError):  # files move while they are counted
                report(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()))

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
