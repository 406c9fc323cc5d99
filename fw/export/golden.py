"""The golden batch: what the function answered when it was saved, and must answer wherever it runs.

Hashes say that the files are whole; only running them says that this machine's compiler makes the
same function of them. `save` records the model's own logits for the processor's batch, `load` runs
it.
"""

from typing import TYPE_CHECKING

import jax
import numpy as np

from fw.errors import FwError
from fw.export import manifest as files
from fw.tensors import read_tensors

if TYPE_CHECKING:
    from fw.export.load import Artifact

TOLERANCES = {"f32": (1e-4, 0.0), "bf16": (1e-4, 0.06), "int8": (1e-4, 0.2)}
"""How far golden logits may be off on another platform: absolute + relative · max |logit|.

On one platform they agree to the bit. Elsewhere sums round differently, and where activations are
rounded again, to bfloat16 or int8, a last bit decides between two neighbours. Noise of 1e-6 on the
embeddings of 6 and 12 random layers of 384 moved the worst of 2,304 logits by 3e-6, 0.016 and
0.074 of the largest one. A wrong dot product is off by more than the largest.
"""


def tolerance(kind: str, logits: np.ndarray) -> float:
    """The largest error allowed, recorded in the manifest.

    >>> tolerance("bf16", np.array([[3.0, -5.0]]))
    0.3001
    """
    absolute, relative = TOLERANCES[kind]
    return absolute + relative * float(np.abs(logits).max())


def check_golden(artifact: "Artifact") -> None:
    """Run the golden batch of an artifact and compare its logits with the recorded ones.

    Raises:
        FwError: they differ by more than the manifest's tolerance, or the file is no such batch.
    """
    path = artifact.folder / files.GOLDEN
    golden = read_tensors(path)
    want = golden.pop("logits", None)
    if want is None:
        raise FwError(f"{path}: expected a tensor 'logits'; found {', '.join(golden) or 'none'}")
    try:
        got = artifact.logits(golden)
    except FwError as error:
        raise FwError(f"{path}: {error}") from error
    tolerance = artifact.manifest["golden"]["tolerance"]
    error = np.abs(got - want).max() if got.shape == want.shape else np.inf
    if not error <= tolerance:
        raise FwError(
            f"{path}: the golden inputs give logits that are off by {error:.3g}, at most "
            f"{tolerance:.3g} expected; jax {jax.__version__} on {jax.default_backend()} computes "
            f"something else than jax {artifact.manifest['versions']['jax']} did"
        )
