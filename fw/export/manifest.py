"""The manifest says what an artifact holds; a folder that says or holds anything else is refused.

    manifest.json          this file's business: what, for whom, from what, and every file's SHA-256
    model.stablehlo        the function, `logits = call(weights, batch)`, of `jax.export`
    model.safetensors      the weights, its first argument
    …                      the processor's, such as tokenizer.json
    golden.safetensors     a batch, and the logits that it gave

The manifest carries its own digest and has one spelling, so that no byte of the folder can change
unnoticed. Hashes protect from damage, not from forgery: take artifacts from people you trust.
`save` writes with `write`, `load` reads with `read` and `check_files`.
"""

import hashlib
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fw.errors import FwError
from fw.json_files import dumps, plain
from fw.labels import LABELLED
from fw.processors import TASKS, processor_of

FORMAT = 3
"""Version of the folder's layout; another one is refused."""

NAME = "manifest.json"
GOLDEN, STABLEHLO = "golden.safetensors", "model.stablehlo"
WEIGHTS = "model.safetensors"

LIMIT = 16 << 20
"""Bytes of a manifest, checked before it is read."""

_FIELDS: Mapping[str, type] = {
    "task": str,
    "labels": list,
    "compression": dict,
    "platforms": list,
    "signature": dict,
    "versions": dict,
    "processor": dict,
    "golden": dict,
    "files": dict,
}
"""What `load` relies on; the rest is for people."""


def file_names(task: str) -> tuple[str, ...]:
    """Every file but the manifest. A closed list: a manifest cannot name a path.

    >>> file_names("causal_lm")
    ('golden.safetensors', 'model.safetensors', 'model.stablehlo', 'tokenizer.json')
    """
    return tuple(sorted((GOLDEN, STABLEHLO, WEIGHTS, *processor_of(task).files)))


def write(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write `manifest.json`, with the size and SHA-256 of every other file and its own digest.

    Args:
        folder: holds all of `file_names`.
        manifest: everything else to record; what `fw.json_files` can write.

    Raises:
        TypeError: a value that JSON cannot hold, with its place.
    """
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        for name in file_names(manifest["task"])
    }
    whole = plain({"format": FORMAT, **manifest, "files": files}, NAME)
    whole["sha256"] = hashlib.sha256(_render(whole)).hexdigest()
    (folder / NAME).write_bytes(_render(whole))


def read(folder: Path) -> dict[str, Any]:
    """Read and check `manifest.json`; the files that it names are not opened.

    Args:
        folder: the artifact.

    Returns:
        The manifest.

    Raises:
        FwError: there is none, it was altered, is of another format, or names unknown files.

    >>> read(Path("nowhere"))
    Traceback (most recent call last):
    ...
    fw.errors.FwError: nowhere: there is no such folder; expected an artifact, made by fw export
    """
    path = folder / NAME
    if not folder.is_dir():
        raise FwError(f"{folder}: there is no such folder; expected an artifact, made by fw export")
    if not path.exists() and (folder / "artifact" / NAME).exists():
        raise FwError(f"{folder}: is a run, not an artifact; give {folder / 'artifact'}")
    if _size(path) > LIMIT:
        raise FwError(f"{path}: has {_size(path)} bytes; expected at most {LIMIT}")
    text = path.read_bytes()
    try:
        manifest = json.loads(text)
        unsigned = {k: v for k, v in manifest.items() if k != "sha256"}
        found = manifest.get("format")
        intact = _render(manifest) == text
        intact &= manifest.get("sha256") == hashlib.sha256(_render(unsigned)).hexdigest()
    except (ValueError, AttributeError, RecursionError) as error:
        raise FwError(f"{path}: damaged, no manifest can be read: {error}") from error
    if found != FORMAT:
        raise FwError(
            f"{path}: format {found!r}; this fw reads {FORMAT}; export again with this "
            "fw, or install the one that wrote it"
        )
    if not intact:
        raise FwError(f"{path}: altered since it was written; export again or copy it again")
    _check_fields(path, manifest)
    return manifest


def check_files(folder: Path, manifest: Mapping[str, Any], *, hashes: bool = True) -> None:
    """Compare the folder with its manifest: nothing missing, nothing more, nothing changed.

    Args:
        folder: the artifact.
        manifest: what `read` returned.
        hashes: False to compare sizes only.

    Raises:
        FwError: it names the file.
    """
    names = file_names(manifest["task"])
    for path in sorted(folder.iterdir()):
        if path.name not in (*names, NAME):
            raise FwError(f"{path}: is not part of the artifact; remove it")
    for name in names:
        path, want = folder / name, manifest["files"][name]
        if _size(path) != want["bytes"]:
            raise FwError(f"{path}: has {_size(path)} bytes, expected {want['bytes']}; {_AGAIN}")
        if hashes and (got := sha256(path)) != want["sha256"]:
            raise FwError(f"{path}: SHA-256 is {got}, expected {want['sha256']}; {_AGAIN}")


def sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_AGAIN = "damaged or replaced: copy the artifact again, or export it again"


def _render(manifest: Mapping[str, Any]) -> bytes:
    """The one spelling of a manifest."""
    return dumps(manifest, indent=1) + b"\n"


def _size(path: Path) -> int:
    try:
        found = path.lstat()
    except OSError as error:
        raise FwError(f"{path}: {error.strerror}; {_AGAIN}") from error
    if not stat.S_ISREG(found.st_mode):
        raise FwError(f"{path}: expected a regular file, not a link, folder or device")
    return found.st_size


def _check_fields(path: Path, manifest: Mapping[str, Any]) -> None:
    for name, kind in _FIELDS.items():
        if type(manifest.get(name)) is not kind:
            raise FwError(f"{path}: {name!r}: expected a JSON {kind.__name__}")
    if manifest["task"] not in TASKS:
        raise FwError(f"{path}: expected a task of {', '.join(TASKS)}")
    if bool(manifest["labels"]) != (manifest["task"] in LABELLED) or not all(
        isinstance(label, str) for label in manifest["labels"]
    ):
        raise FwError(f"{path}: 'labels': expected a list of names, one at least for classes")
    files, names = manifest["files"], file_names(manifest["task"])
    if strange := sorted(set(files) ^ set(names)):
        raise FwError(
            f"{path}: 'files': {strange[0]!r} is unexpected or missing; expected {', '.join(names)}"
        )
    for name, entry in files.items():
        if not (
            isinstance(entry, dict)
            and type(entry.get("bytes")) is int
            and isinstance(entry.get("sha256"), str)
        ):
            raise FwError(f"{path}: files: {name}: expected 'bytes' and 'sha256'")
    for group, name, kind in (
        ("compression", "bfloat16", list),
        ("compression", "formats", dict),
        ("compression", "recipe", dict),
        ("golden", "tolerance", float),
        ("versions", "jax", str),
        ("versions", "calling_convention", int),
        ("signature", "weights", dict),
        ("signature", "batch", dict),
        ("signature", "logits", dict),
    ):
        if type(manifest[group].get(name)) is not kind:
            raise FwError(f"{path}: {group}: {name!r}: expected a JSON {kind.__name__}")
