"""What all kinds have in common: a few rows at a time through an artifact, and lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fw.data.batches import eval_batches
from fw.errors import FwError

if TYPE_CHECKING:
    from fw.export.load import Artifact


def outputs(
    artifact: Artifact,
    arrays: Mapping[str, np.ndarray],
    batch_size: int,
    empty: Mapping[str, float] | None = None,
) -> np.ndarray:
    """The outputs of an artifact for some rows.

    Args:
        artifact: has the function.
        arrays: [R, ...] each, with at least one row.
        batch_size: the most rows computed at once.
        empty: what fills an empty row; zeros if nothing is said.

    Returns:
        [R, ...].
    """
    rows = len(next(iter(arrays.values())))
    # A power of two: things that come one by one share a few compiled programs.
    size = min(batch_size, 1 << (rows - 1).bit_length())
    batches = eval_batches(arrays, size, empty=dict.fromkeys(arrays, 0.0) | dict(empty or {}))
    return np.concatenate([artifact.logits(batch) for batch in batches])[:rows]


def parse_json(line: str, where: str) -> Any:
    """The value that a line spells.

    Raises:
        FwError: it is no JSON.
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FwError(f"{where}: expected a JSON object; {error}") from error
