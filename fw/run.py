"""A run is a folder that explains itself, and these are its pen and its reader.

    config.json     every option as resolved, and where and when the run was started and resumed
    metrics.jsonl   one JSON object a line, in the order of the steps
    checkpoints/    from `fw.checkpoint`
    result.json     what came out: scores, sizes, seconds
    report.html     all of the above for the eye, from `fw.report`
    artifact/       from `fw.export`

A reader sees whole JSON files or none, and whole lines: a line counts once its newline is there.
With several processes all call these functions and only process 0 writes, so
`jax.distributed.initialize` comes before. How a file stays whole is in `fw.json_files`.
"""

import contextlib
import math
import platform
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fw.errors import FwError
from fw.json_files import (
    dumps,
    is_writer,
    loads,
    plain,
    read_bytes,
    read_json,
    replace,
    write_json,
    write_text,
)

__all__ = [
    "ADAPTER",
    "ARTIFACT",
    "CHECKPOINTS",
    "CONFIG",
    "METRICS",
    "REPORT",
    "RESULT",
    "config",
    "create",
    "log",
    "metrics",
    "read_json",
    "starts",
    "trim",
    "write_json",
    "write_text",
]

CONFIG = "config.json"
METRICS = "metrics.jsonl"
RESULT = "result.json"
REPORT = "report.html"
MODEL = "model"
"""The folder in a run with its best parameters, as transformers reads those it knows."""

ADAPTER = "adapter"
"""The folder with the adapter alone, as PEFT reads it, of a run that trained one."""

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
            left half-written is removed; `trim` removes what will be written again.
        may_change: names of the options that need not be as they were when the run was started,
            such as the mesh. The new values are kept, the old ones noted.

    Returns:
        The folder.

    Raises:
        FwError: the folder holds a run and `resume` is false, or parts of one without its
            `config.json`; another option has changed; the folder cannot be written to.
        TypeError: an option that JSON cannot hold.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as parent:
    ...     folder = create(f"{parent}/run", {"task": "ner", "seed": 1})
    ...     log(folder, {"kind": "train", "step": 10, "loss": 0.5})
    ...     config(folder), metrics(folder)
    ({'task': 'ner', 'seed': 1}, [{'kind': 'train', 'step': 10, 'loss': 0.5}])
    """
    folder = Path(folder)
    options = plain(config, "config")
    refusal = ""
    if is_writer():
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
    line = dumps(plain(record, METRICS)) + b"\n"
    if not is_writer():
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
    return _trim(Path(folder), step) if is_writer() else 0


def _start(folder: Path, options: dict, resume: bool, may_change: Collection[str]) -> None:
    """Write `config.json` for a new start, as the one process that does."""
    now = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **_environment()}
    if resume and (folder / CONFIG).exists():
        record = _read_config(folder)
        changed = _changes(folder, record["config"], options, may_change)
        before, now = record["starts"], {**now, "changed": changed}
        for left in folder.glob(".*.part"):
            left.unlink(missing_ok=True)
        if (folder / METRICS).exists():
            _trim(folder, math.inf)
    else:
        before = []
        _claim(folder, resume)
    replace(folder / CONFIG, dumps({"config": options, "starts": [*before, now]}, 1) + b"\n")


def _claim(folder: Path, resume: bool) -> None:
    """Make the folder of a new run, where there is none; one of two at once succeeds."""
    checkpoints = folder / CHECKPOINTS
    remedy = "resume the run, or choose another folder"
    held = [n for n in (CONFIG, METRICS, RESULT, REPORT, ARTIFACT) if (folder / n).exists()]
    if checkpoints.is_dir() and (not resume or any(checkpoints.iterdir())):
        held.append(CHECKPOINTS)
    if held and resume:
        raise FwError(
            f"{folder}: has {', '.join(held)} of a run but not its {CONFIG}, so there is nothing "
            "to resume; restore that file, or choose another folder"
        )
    if held:
        raise FwError(f"{folder}: holds a run already ({', '.join(held)}); {remedy}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.mkdir(exist_ok=resume)
    except FileExistsError as error:
        raise FwError(f"{folder}: is a file or another process's run; {remedy}") from error
    except OSError as error:
        raise FwError(f"{folder}: cannot be made: {error.strerror}") from error


def _changes(folder: Path, old: dict, new: dict, may_change: Collection[str]) -> dict[str, list]:
    """The options that differ as [old, new]; raise for those that may not."""
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    changed = {name: [old.get(name), new.get(name)] for name in names}
    if fixed := [
        f"{name} was {was!r}, is {now!r}"
        for name, (was, now) in changed.items()
        if name not in may_change
    ]:
        raise FwError(
            f"{folder / CONFIG}: cannot resume with other options: {', '.join(fixed)}; "
            "give the old ones, or start a new run in another folder"
        )
    return changed


def _environment() -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        # A source tree on the path has no installed version to tell.
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    devices = jax.devices()
    return {
        "versions": versions,
        "platform": platform.platform(),
        "devices": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
        },
    }


def _from_first(message: str) -> str:
    """Send process 0's message to every process; the others' are not looked at."""
    sent = message.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
    got = multihost_utils.broadcast_one_to_all(np.frombuffer(sent, np.uint8))
    return np.asarray(got).tobytes().rstrip(b"\0").decode(errors="replace")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.exists():
        raise FwError(f"{folder}: holds no run: there is no {CONFIG} in it; give a run's folder")
    record = read_json(path)
    kinds = {"config": dict, "starts": list}
    if not isinstance(record, dict) or any(
        not isinstance(record.get(name), kind) for name, kind in kinds.items()
    ):
        raise FwError(f"{path}: expected an object with 'config' and 'starts'; restore the file")
    return record


def _lines(folder: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """The lines of `metrics.jsonl` that have their newline, with what they say."""
    path = folder / METRICS
    if folder.is_dir() and not path.exists():
        return []
    *whole, _ = read_bytes(path).split(b"\n")
    records = [loads(line, f"{path}:{n}") for n, line in enumerate(whole, start=1)]
    for n, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise FwError(f"{path}:{n}: expected a JSON object; got {type(record).__name__}")
    return [(line + b"\n", record) for line, record in zip(whole, records, strict=True)]


def _trim(folder: Path, step: float) -> int:
    lines = _lines(folder)
    kept = [
        line for line, record in lines if not isinstance(at := record.get("step"), int) or at < step
    ]
    path, data = folder / METRICS, b"".join(kept)
    if path.exists() and path.stat().st_size != len(data):
        replace(path, data)
    return len(lines) - len(kept)
