"""A run is a folder that explains itself, and these are its pen and its reader.

    config.json     every option as resolved, and where and when the run was started and resumed
    metrics.jsonl   one JSON object a line, in the order of the steps
    checkpoints/    from `fw.checkpoint`
    result.json     what came out: scores, sizes, seconds
    report.html     all of the above for the eye, from `fw.report`
    artifact/       from `fw.export`

A reader sees whole JSON files or none, and whole lines: a line counts once its newline is there.
With several processes all call these functions and only process 0 writes, so
`jax.distributed.initialize` comes before. JSON has no NaN: what is not finite is written as null.
"""

import contextlib
import dataclasses
import json
import math
import os
import platform
import secrets
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fw.errors import FwError

CONFIG = "config.json"
METRICS = "metrics.jsonl"
RESULT = "result.json"
REPORT = "report.html"
CHECKPOINTS = "checkpoints"
ARTIFACT = "artifact"

_PACKAGES = ("fw", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "quax", "numpy")
_MESSAGE_BYTES = 2048  # process 0 tells the others why it refused in a buffer of fixed size


def create(
    folder: str | Path,
    config: Mapping[str, Any],
    *,
    resume: bool = False,
    may_change: Collection[str] = (),
) -> Path:
    """Start a run in a folder, or go on with the one that is there.

    Writes `config.json`: the options and, once for every start, the time, the versions, the
    platform and the devices. Called by every process; all return or all raise.

    Args:
        folder: made if it is not there. Files in it that are not of a run stay as they are.
        config: every option, resolved, as JSON can hold it; paths, NumPy and JAX values and
            dataclasses are converted.
        resume: go on with the run in `folder`, or start it there if none was begun, so that a job
            which is started again by its scheduler can always ask to resume. What a killed process
            left half-written is removed.
        may_change: names of the options that need not be as they were when the run was started,
            such as the mesh. The new values are kept, the old ones noted.

    Returns:
        The folder.

    Raises:
        FwError: the folder holds a run and `resume` is false; another option has changed; the
            folder cannot be written to.
        TypeError: an option that JSON cannot hold.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as parent:
    ...     folder = create(f"{parent}/run", {"task": "ner", "seed": 1})
    ...     log(folder, {"kind": "train", "step": 10, "loss": 0.5})
    ...     config(folder), metrics(folder)
    ({'task': 'ner', 'seed': 1}, [{'kind': 'train', 'step': 10, 'loss': 0.5}])
    """
    folder = Path(folder)
    options = _plain(config, "config")
    refusal = ""
    if _writes():
        try:
            _start(folder, options, resume, may_change)
        except FwError as error:
            if jax.process_count() == 1:
                raise
            refusal = str(error)
    if jax.process_count() > 1 and (refusal := _from_first(refusal)):
        raise FwError(refusal)
    return folder


def config(folder: str | Path) -> dict[str, Any]:
    """Read the options of a run.

    Args:
        folder: a run.

    Returns:
        What `create` was given, as JSON has it: tuples are lists, paths are strings.

    Raises:
        FwError: the folder holds no run, or its `config.json` is damaged.
    """
    return _read_config(Path(folder))["config"]


def starts(folder: str | Path) -> list[dict[str, Any]]:
    """Read when and where a run was started and resumed.

    Args:
        folder: a run.

    Returns:
        One object a start: "time" (ISO 8601, UTC), "versions" by package, "platform", "devices"
        ("platform", "kind", "count", "processes") and "changed", the options that differ from the
        start before as [old, new].

    Raises:
        FwError: as `config`.
    """
    return _read_config(Path(folder))["starts"]


def log(folder: str | Path, record: Mapping[str, Any]) -> None:
    """Append one record to `metrics.jsonl` in one write.

    Args:
        folder: a run.
        record: "kind" ("train" or "eval"), "step" and the figures.

    Raises:
        FwError: the file cannot be written to.
        TypeError: a value that JSON cannot hold.
    """
    line = _dumps(_plain(record, METRICS)) + b"\n"
    if not _writes():
        return
    path = Path(folder) / METRICS
    try:
        with path.open("ab", buffering=0) as file:
            written = file.write(line)
    except OSError as error:
        raise FwError(f"{path}: cannot be written: {error.strerror}") from error
    if written != len(line):
        raise FwError(f"{path}: {written} of {len(line)} bytes were written; is the disk full?")


def metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Read the records of a run; a last line without its newline is not one yet.

    Args:
        folder: a run.

    Returns:
        The records in the order of the file; none if nothing was logged so far.

    Raises:
        FwError: the folder is not there, or a line is not a JSON object (with its number).
    """
    return [record for _, record in _lines(Path(folder))]


def trim(folder: str | Path, step: int) -> int:
    """Remove the records that a resumed run writes again, and a half-written last line.

    Args:
        folder: a run.
        step: the first step that will be logged again; all records at or after it go. A record
            without an integer "step" stays.

    Returns:
        The number of records removed.

    Raises:
        FwError: as `metrics`, or the file cannot be written.
    """
    if not _writes():
        return 0
    path = Path(folder) / METRICS
    lines = _lines(path.parent)
    kept = [line for line, record in lines if not _at_or_after(record, step)]
    data = b"".join(kept)
    if path.exists() and path.stat().st_size != len(data):
        _replace(path, data)
    return len(lines) - len(kept)


def write_text(path: str | Path, text: str) -> None:
    """Write a file whole or not at all: beside its place, to the disk, then renamed.

    Args:
        path: replaced if it is there. Only process 0 writes.
        text: written as UTF-8.

    Raises:
        FwError: it cannot be written.
    """
    if _writes():
        _replace(Path(path), text.encode("utf-8", "backslashreplace"))


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all (see `write_text`).

    Args:
        path: replaced if it is there. Only process 0 writes.
        value: mappings with string keys, sequences, strings, numbers; also NumPy and JAX values,
            paths and dataclasses. A number that is not finite becomes null.

    Raises:
        FwError: it cannot be written.
        TypeError: a value that JSON cannot hold, with its place.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_json(f"{folder}/a.json", {"f1": np.float32(0.5), "loss": math.nan})
    ...     read_json(f"{folder}/a.json")
    {'f1': 0.5, 'loss': None}
    """
    path = Path(path)
    data = _dumps(_plain(value, path.name), indent=1) + b"\n"
    if _writes():
        _replace(path, data)


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Args:
        path: the file.

    Returns:
        Its value.

    Raises:
        FwError: it is not there or not JSON (with the line).
    """
    path = Path(path)
    return _loads(_read(path), path)


def _start(folder: Path, options: dict, resume: bool, may_change: Collection[str]) -> None:
    """Write `config.json` for a new start, as the one process that does."""
    start = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **_environment()}
    if resume and (folder / CONFIG).exists():
        record = _read_config(folder)
        old, earlier = record["config"], record["starts"]
        differ = sorted(k for k in {*old, *options} if old.get(k) != options.get(k))
        if fixed := [key for key in differ if key not in may_change]:
            changes = ", ".join(f"{k} was {old.get(k)!r}, is {options.get(k)!r}" for k in fixed)
            raise FwError(
                f"{folder / CONFIG}: cannot resume with other options: {changes}; "
                "give the old ones, or start a new run in another folder"
            )
        start["changed"] = {key: [old.get(key), options.get(key)] for key in differ}
        for left in folder.glob(".*.part"):
            left.unlink(missing_ok=True)
    else:
        earlier = []
        names = (CONFIG, METRICS, RESULT, REPORT, CHECKPOINTS, ARTIFACT)
        if not resume and (held := [name for name in names if (folder / name).exists()]):
            raise FwError(f"{folder}: holds a run already ({', '.join(held)}); {_ELSEWHERE}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Of two processes that start a run here at once, one makes this folder.
            (folder / CHECKPOINTS).mkdir(exist_ok=resume)
        except FileExistsError as error:
            raise FwError(f"{folder}: is in use; {_ELSEWHERE}") from error
        except OSError as error:
            raise FwError(f"{folder}: cannot be made: {error.strerror}") from error
    _replace(folder / CONFIG, _dumps({"config": options, "starts": [*earlier, start]}, 1) + b"\n")
    trim(folder, sys_maxsize) if resume else None


_ELSEWHERE = "resume it, or choose another folder"


def _environment() -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        # A source tree on the path has no installed version to tell.
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    first, *_ = devices = jax.devices()
    return {
        "versions": versions,
        "platform": platform.platform(),
        "devices": {
            "platform": first.platform,
            "kind": first.device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
        },
    }
