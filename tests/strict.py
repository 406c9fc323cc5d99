"""The stricter world of the tests: 8 virtual CPU devices, strict dtype promotion.

A pytest plugin that pyproject.toml loads before anything can import jax; the third part, warnings
as errors, stands there. Processes that a test starts inherit it all. A program that was compiled
once in a run of the tests, by any of its processes, is not compiled again: many tests resume.
"""

import os
import shutil
import tempfile

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
_DEVICES = "--xla_force_host_platform_device_count=8"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):  # a worker of pytest-xdist inherits it
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()

_own = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # a worker of pytest-xdist inherits it, too
    _own = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="fw-tests-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def pytest_unconfigure():
    """Leaves nothing behind."""
    if _own is not None:
        shutil.rmtree(_own, ignore_errors=True)


@pytest.fixture
def newly_compiled():
    """Programs are compiled, though they were before: for what a compiler prints."""
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.fixture
def quickly_compiled(monkeypatch):
    """The partitioner's program all the same, but machine code made in half the time."""
    import jax  # nothing may import it before the lines above

    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # of processes that it starts
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
