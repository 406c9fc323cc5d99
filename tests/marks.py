"""Marks: most families of tests have a few fast members, and the rest run under `--all`."""

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """Parameters of a test that only `scripts/test --all` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


def fast_are(fast: Any, values: Any) -> list[Any]:
    """The values, one or a tuple for each test, all but some of them slow."""
    return [v if v in fast else slow(*v) if isinstance(v, tuple) else slow(v) for v in values]
