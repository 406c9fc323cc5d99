"""Named host arrays in safetensors files, bfloat16 included, which its NumPy reader lacks.

Runs, artifacts and model folders keep their weights with these functions.
"""

from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from fw.errors import FwError

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
"""safetensors' names of the dtypes that such a file may hold; its NumPy reader lacks bfloat16."""


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read a safetensors file, bfloat16 included, into host arrays.

    Args:
        path: the file.

    Raises:
        FwError: it is no such file, or holds a dtype that is not in `DTYPES`.
    """
    try:
        tensors = safetensors.deserialize(path.read_bytes())
        return {
            name: np.frombuffer(t["data"], DTYPES[t["dtype"]]).reshape(t["shape"])
            for name, t in tensors
        }
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise FwError(f"{path}: not tensors that can be read: {error!r}") from error


def write_tensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as one safetensors file that transformers accepts.

    Args:
        path: the file.
        arrays: by name; their strides do not matter.

    Raises:
        FwError: the file cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "model.safetensors")
    ...     write_tensors(path, {"x": np.ones((2, 3), jnp.bfloat16).T})
    ...     read_tensors(path)["x"].shape
    (3, 2)
    """
    # The library writes an array's buffer whatever its strides are.
    flat = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    try:
        path.touch()
        usual = path.stat().st_mode
        # transformers refuses files without the format
        safetensors.numpy.save_file(flat, path, metadata={"format": "pt"})
        path.chmod(usual)  # the library leaves files that only their owner can read
    except (safetensors.SafetensorError, OSError) as error:
        raise FwError(f"{path}: cannot be written: {error}") from error
