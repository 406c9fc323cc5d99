"""Records by split: none empty, and a dev split in any case."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fw import data


def read_splits(
    dataset: Path, task: str, *, skip: bool, **options: Any
) -> tuple[dict[str, list], tuple[str, ...]]:
    """The records of a data set, and the messages of rows left out.

    Args:
        dataset: a file or folder; where it has no dev split, a part of train becomes that.
        task: one of `fw.data.FORMATS`.
        skip: leave bad rows out.
        options: fields of `fw.data.formats.Options`.

    Raises:
        FwError: nothing there, or a bad row.
    """
    skipped: list[str] = []
    records = data.load_splits(
        dataset, task, **options, on_bad_row=skipped.append if skip else None
    )
    return with_dev(records), tuple(skipped)


def with_dev(records: Mapping[str, list]) -> dict[str, list]:
    """Records by split with a part of train as dev, where there was none; no split is empty."""
    found = dict(records)
    if "dev" not in found:
        found["train"], found["dev"] = data.hold_out(found["train"])
    return {split: items for split, items in found.items() if items}
