"""The smaller variants of a run: codes by the paths of its parameters, in RUN/compressed/NAME/."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from compress.transform import Report, Transform
from fw import run
from fw.hub.files import WEIGHTS
from fw.tensors import write_tensors

COMPRESSED, REPORT, RECIPE = "compressed", "report.json", "recipe.json"
"""The folder in a run with a folder of parameters for each variant; in that, what compressing each
leaf cost, and the recipe."""


def fill(
    part: Path, arrays: Mapping[str, np.ndarray], report: Report, transform: Transform
) -> None:
    """Writes a variant's files.

    Args:
      part: the folder that becomes RUN/compressed/NAME.
      arrays: of `compress.to_arrays`.
      report: of every leaf.
      transform: that made them.

    Raises:
      FwError: they cannot be written.
    """
    write_tensors(part / WEIGHTS, arrays)
    run.write_json(part / RECIPE, transform.data())
    cost = [{**dataclasses.asdict(leaf), "error": float(leaf.error)} for leaf in report]
    run.write_json(part / REPORT, {"leaves": cost})
