"""Artifacts side by side: how large they are, and how fast on the same rows, turn by turn.

Interleaved, so that a machine that slows down for a while slows all of them.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fw import export
from fw.processors import Processor


def compare(
    artifacts: Mapping[str, str | Path], *, batch: int = 16, length: int = 64, repeats: int = 20
) -> list[dict[str, Any]]:
    """Size and latency of artifacts side by side: interleaved, medians.

    Args:
      artifacts: folders by name.
      batch: rows timed at a time.
      length: of rows of text: full, one text each. Where an artifact takes shorter rows only, all
        get those.
      repeats: timed calls of each.

    Returns:
      One row each: name, bytes (all weights), encoder_bytes (the layers' kernels), latency_ms,
      the batch that was timed and, of texts, their length.

    Raises:
      FwError: as `fw.export.load` does.
    """
    loaded = {name: export.load(folder) for name, folder in artifacts.items()}
    kinds = [(artifact.processor, artifact.task) for artifact in loaded.values()]
    rows = rows_to_time(kinds, batch, length)
    seconds: dict[str, list[float]] = {name: [] for name in loaded}
    for repeat in range(repeats + 2):  # the first two warm up
        for name, artifact in loaded.items():
            given = {name: rows[name] for name in artifact.manifest["signature"]["batch"]}
            began = time.perf_counter()
            artifact.logits(given)
            if repeat >= 2:
                seconds[name].append(time.perf_counter() - began)
    return [
        {
            "name": name,
            **sizes(artifact.weights),
            "latency_ms": 1e3 * statistics.median(seconds[name]),
            "batch": batch,
            **({"length": rows["input_ids"].shape[1]} if "input_ids" in rows else {}),
        }
        for name, artifact in loaded.items()
    ]


def rows_to_time(
    kinds: Sequence[tuple[Processor, str]], batch: int = 16, length: int = 64
) -> dict[str, np.ndarray]:
    """Full rows of text that all of some processors' models take, or golden rows over and over.

    Args:
      kinds: processors and tasks.
      batch: how many rows.
      length: of rows of text, or the most that all take.
    """
    processors = [processor for processor, _ in kinds if isinstance(processor, export.Text)]
    if not processors:
        golden = kinds[0][0].golden(kinds[0][1], None)
        return {name: np.resize(x, (batch, *x.shape[1:])) for name, x in golden.items()}
    length = min(length, *(p.length for p in processors))
    ids = min(p.tokenizer.fast.get_vocab_size() for p in processors)
    return {
        "input_ids": np.random.default_rng(0).integers(0, ids, (batch, length), np.int32),
        "segment_ids": np.ones((batch, length), np.int32),
        "position_ids": np.tile(np.arange(length, dtype=np.int32), (batch, 1)),
        "first": np.zeros((batch, 1), np.int32),
        "token_type_ids": np.zeros((batch, length), np.int32),
    }


def sizes(arrays: Mapping[str, Any]) -> dict[str, int]:
    """The bytes of some weights, in all and of the encoder's kernels.

    Args:
      arrays: by path, as `compress.to_arrays` names them.

    >>> sizes({"params/layers/up/kernel": np.zeros((2, 3), np.int8), "params/bias": np.zeros(2)})
    {'bytes': 22, 'encoder_bytes': 6}
    """
    kernels = [x.nbytes for n, x in arrays.items() if "/layers/" in f"/{n}" and "kernel" in n]
    return {"bytes": sum(x.nbytes for x in arrays.values()), "encoder_bytes": sum(kernels)}
