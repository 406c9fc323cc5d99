"""Records by split, as every reader of texts gives them: none empty, a dev split in any case."""

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
    if "dev" not in records:
        records["train"], records["dev"] = data.hold_out(records["train"])
    return {split: items for split, items in records.items() if items}, tuple(skipped)
