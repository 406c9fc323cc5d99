"""The golden batch: what the function answered when it was saved, and must answer wherever it runs.

Hashes say that the files are whole; only running them says that this machine's compiler makes the
same function of them. `save` makes the batch and records the model's own logits, `load` runs it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from fw.data.tokenizer import Tokenizer
from fw.errors import FwError
from fw.export import manifest as files
from fw.export.predict import inputs, pack_items, read_items, row_length
from fw.labels import PROBLEMS
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

GOLDEN_ROWS = 4


def tolerance(kind: str, logits: np.ndarray) -> float:
    """The largest error allowed, recorded in the manifest.

    >>> tolerance("bf16", np.array([[3.0, -5.0]]))
    0.3001
    """
    absolute, relative = TOLERANCES[kind]
    return absolute + relative * float(np.abs(logits).max())


def golden_batch(
    tokenizer: Tokenizer, task: str, length: int, examples: Sequence[str] | None
) -> dict[str, np.ndarray]:
    """A small batch of the examples, or of random ids if there are none.

    Raises:
        FwError: none of the examples has a word, or the task takes no texts.
    """
    if examples is not None and task in ("question_answering", "masked_lm", "causal_lm"):
        raise FwError(f"examples: expected None for {task}")
    if examples is not None:
        items = read_items(tokenizer, examples)
        items = [i for i in items if i.spans]
        if not items:
            raise FwError("examples: expected a text with a word at least; got none")
        row = row_length(max(item.pieces for item in items), length)
        rows = inputs(pack_items(tokenizer, items, task, row))
        return {name: np.ascontiguousarray(x[:GOLDEN_ROWS]) for name, x in rows.items()}
    # Two texts a row and padding after them, which is what the function will meet.
    row = row_length(0, length)
    half = row // 2
    positions = np.arange(row, dtype=np.int32)
    segments = np.where(positions < half, 1, np.where(positions < row - row // 8, 2, 0))
    ids = np.random.default_rng(0).integers(0, largest_id(tokenizer) + 1, (GOLDEN_ROWS, row))
    batch = {
        "input_ids": np.where(segments > 0, ids, tokenizer.pad),
        "segment_ids": np.tile(segments, (GOLDEN_ROWS, 1)),
        "position_ids": np.tile(
            np.where(segments == 2, positions - half, positions), (GOLDEN_ROWS, 1)
        ),
    }
    if task in PROBLEMS:
        batch["first"] = np.tile([0, half], (GOLDEN_ROWS, 1))
    if task == "question_answering":
        batch["token_type_ids"] = np.zeros_like(ids)
    return {name: x.astype(np.int32) for name, x in batch.items()}


def largest_id(tokenizer: Tokenizer) -> int:
    """The largest id that text can become; the empty piece, a file's last line, never comes up."""
    return max(i for piece, i in tokenizer.fast.get_vocab().items() if piece)


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
