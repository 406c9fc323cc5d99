"""Named host arrays in safetensors files, bfloat16 included, which its NumPy reader lacks."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors

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
"""safetensors' names of the dtypes that an artifact may hold; its NumPy reader lacks bfloat16."""


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read a safetensors file, bfloat16 included, into host arrays.

    Raises:
        FwError: it is no such file, or holds a dtype that artifacts do not use.
    """
    try:
        tensors = safetensors.deserialize(path.read_bytes())
        return {
            name: np.frombuffer(t["data"], DTYPES[t["dtype"]]).reshape(t["shape"])
            for name, t in tensors
        }
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise FwError(f"{path}: not tensors that can be read: {error!r}") from error
