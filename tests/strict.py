"""The stricter world of the tests: 8 virtual CPU devices, strict dtype promotion.

A pytest plugin that pyproject.toml loads before anything can import jax; the third part, warnings
as errors, stands there. Processes that a test starts inherit it all.
"""

import os

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
_DEVICES = "--xla_force_host_platform_device_count=8"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):  # a worker of pytest-xdist inherits it
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()


@pytest.fixture
def quickly_compiled(monkeypatch):
    """The partitioner's program all the same, but machine code made in half the time."""
    import jax  # nothing may import it before the lines above

    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # of processes that it starts
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
