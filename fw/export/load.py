"""A folder becomes a function again, with no code of the model: hashes, golden outputs, then use.

`load` checks that the folder is what its manifest says (`fw.export.manifest`), that this machine
can run it, and that the function still gives what it gave when it was saved. The signature comes
from the StableHLO itself and must agree with the manifest and the weights.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export

from fw.errors import FwError
from fw.export import manifest as files
from fw.export.function import check_function, form
from fw.export.golden import check_golden
from fw.processors import Processor, processor_of
from fw.tensors import read_tensors

CHUNK = 1024
"""Things that a processor is given together: enough to fill rows, and few to hold."""


@dataclass(frozen=True, eq=False)
class Artifact:
    """A loaded artifact; make it with `load`.

    Attributes:
        folder: where it came from.
        manifest: what it says of itself.
        processor: things to arrays, and logits to answers.
        weights: name to array, on the default device.
        call: `call(weights, batch) -> logits`, jitted; compiles once for each shape of batch.
    """

    folder: Path
    manifest: Mapping[str, Any]
    processor: Processor
    weights: Mapping[str, jax.Array]
    call: Callable[[Mapping[str, jax.Array], Mapping[str, Any]], jax.Array]

    @property
    def task(self) -> str:
        """One of `fw.processors.TASKS`."""
        return self.manifest["task"]

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        return tuple(self.manifest["labels"])

    def logits(self, batch: Mapping[str, Any]) -> np.ndarray:
        """Run the function on one batch.

        Args:
            batch: what the manifest's signature says: of texts, int32 `input_ids`, `segment_ids`,
                `position_ids` [b, t] with t at most the length of a row; for whole texts also
                `first` [b, s], for questions `token_type_ids`. See `fw.data.pack`.

        Returns:
            float32, for texts [b, t, labels] or [b, s, labels].

        Raises:
            FwError: an array is missing, unknown, or of another dtype or shape.
        """
        want = self.manifest["signature"]["batch"]
        if set(batch) != set(want):
            raise FwError(f"batch: expected {', '.join(want)}; got {', '.join(batch) or 'nothing'}")
        arrays = {name: np.asarray(batch[name]) for name in want}
        sizes: dict[Any, int] = {}
        for name, array in arrays.items():
            dims = want[name]["shape"]
            fixed = [(i, n) for i, n in enumerate(dims) if isinstance(n, int)]
            if (
                array.dtype != want[name]["dtype"]
                or array.ndim != len(dims)
                or not array.size
                or any(array.shape[i] != n for i, n in fixed)
            ):
                spelled = ", ".join(map(str, dims))
                raise FwError(
                    f"batch: {name}: expected {want[name]['dtype']}[{spelled}], not empty; "
                    f"got {array.dtype}{list(array.shape)}"
                )
            for dim, size in zip(dims, array.shape, strict=True):
                if sizes.setdefault(dim, size) != size:
                    raise FwError(f"batch: {name}: {dim} is {size}, but {sizes[dim]} before")
        most = self.manifest["processor"].get("length", 0)
        if sizes.get("t", 0) > most:
            raise FwError(f"batch: rows of {sizes['t']} tokens; expected at most {most}")
        return np.asarray(self.call(self.weights, arrays))

    def predict(self, items: Iterable[Any], batch_size: int = 32) -> Iterator[dict[str, Any]]:
        """Answer things in their order.

        Args:
            items: what the task is about. Texts: a text each, or for token classification the words
                of one, which make a text with a space between them; for question answering
                {"question", "context"}. Images: paths, files' bytes, or pixels. Rows of tables and
                users and items: values by column.
            batch_size: the most rows computed at once; a row holds several short texts.

        Yields:
            For token classification `{"text", "entities": [{"type", "text", "start", "end",
            "score"}, …]}` with offsets in characters; for sequence classification `{"text",
            "label", "score", "scores", "truncated"}`; for several labels `{"text", "labels",
            "scores", "truncated"}`; for regression `{"text", "numbers", "truncated"}`; for question
            answering what `fw.processors.ask.ask` says, for language models
            `fw.processors.words.say_words`; for the others what the `answer` of their processor
            says.

        Raises:
            FwError: an item is no such thing, with its number from 1; `batch_size` is below 1.
        """
        kind = self.processor.item
        if isinstance(items, str):
            raise FwError(f"items: expected several {kind}s, got one; write predict([{kind}])")
        if batch_size < 1:
            raise FwError(f"batch_size: expected at least one row; got {batch_size}")
        number = 0
        for chunk in batched(items, CHUNK):
            for item in chunk:
                number += 1
                if why := self.processor.problem(item, self.task):
                    raise FwError(f"{kind} {number}: {why}")
            yield from self.processor.answer(self, chunk, batch_size)


def load(folder: str | Path, *, verify: bool = True) -> Artifact:
    """Open an artifact.

    Args:
        folder: what `save` wrote.
        verify: False skips the hashes and the golden run; sizes, names, dtypes, shapes, format,
            platform and version are checked all the same.

    Returns:
        The artifact, its weights on the default device.

    Raises:
        FwError: a file is damaged, missing or unknown; this platform or jax cannot run it; the
            golden outputs are missed by more than the manifest's tolerance.

    >>> load("nowhere")
    Traceback (most recent call last):
    ...
    fw.errors.FwError: nowhere: there is no such folder; expected an artifact, made by fw export
    """
    folder = Path(folder)
    manifest = files.read(folder)
    _check_runs_here(folder, manifest)
    files.check_files(folder, manifest, hashes=verify)
    processor = processor_of(manifest["task"]).load(folder, manifest["processor"])
    exported = _function(folder, manifest, processor)
    weights = read_tensors(folder / files.WEIGHTS)
    if form(weights) != manifest["signature"]["weights"]:
        raise FwError(f"{folder / files.WEIGHTS}: its tensors are not those of the signature")
    artifact = Artifact(
        folder,
        manifest,
        processor,
        jax.device_put(weights),
        jax.jit(exported.call),
    )
    if verify:
        check_golden(artifact)
    return artifact


def _check_runs_here(folder: Path, manifest: Mapping[str, Any]) -> None:
    where, versions = folder / files.NAME, manifest["versions"]
    here = export.default_export_platform()
    if here not in manifest["platforms"]:
        raise FwError(f"{where}: made for {', '.join(manifest['platforms'])}; this is {here}")
    low = export.minimum_supported_calling_convention_version
    high = export.maximum_supported_calling_convention_version
    if not low <= versions["calling_convention"] <= high:
        raise FwError(
            f"{where}: written by jax {versions['jax']} with calling convention "
            f"{versions['calling_convention']}; jax {jax.__version__} runs {low} to {high}; "
            "install the former, or export again (fw.export.load_variables gives the weights)"
        )


def _function(folder: Path, manifest: Mapping[str, Any], processor: Processor) -> export.Exported:
    path = folder / files.STABLEHLO
    try:
        exported = export.deserialize(bytearray(path.read_bytes()))
        ((weights, batch), _) = jax.tree.unflatten(exported.in_tree, exported.in_avals)
        (logits,) = exported.out_avals
        found = {"weights": form(weights), "batch": form(batch), "logits": form({"": logits})[""]}
    except Exception as error:  # flatbuffers and MLIR raise whatever the bytes lead them to
        raise FwError(
            f"{path}: jax {jax.__version__} cannot read it, jax {manifest['versions']['jax']} "
            f"wrote it: {error}"
        ) from error
    want = form(processor.specs(manifest["task"]))
    if found["batch"] != want or any(manifest["signature"][k] != v for k, v in found.items()):
        raise FwError(f"{path}: takes and gives something else than the manifest says")
    if manifest["labels"] and found["logits"]["shape"][-1] != len(manifest["labels"]):
        raise FwError(f"{path}: gives {found['logits']['shape'][-1]} classes, not one a label")
    check_function(exported, str(path))
    return exported
