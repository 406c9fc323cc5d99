"""A folder becomes a function again, with no code of the model: hashes, golden outputs, then use.

`load` checks that the folder is what its manifest says (`fw.export.manifest`), that this machine
can run it, and that the function still gives what it gave when it was saved. The signature comes
from the StableHLO itself and must agree with the manifest and the weights.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export

from fw.data.tokenizer import Tokenizer, load_tokenizer
from fw.errors import FwError
from fw.export import manifest as files
from fw.export.function import batch_specs, check_function, form
from fw.export.golden import check_golden
from fw.export.predict import Text, predict
from fw.tensors import read_tensors


@dataclass(frozen=True, eq=False)
class Artifact:
    """A loaded artifact; make it with `load`.

    Attributes:
        folder: where it came from.
        manifest: what it says of itself.
        tokenizer: text to ids.
        weights: name to array, on the default device.
        call: `call(weights, batch) -> logits`, jitted; compiles once for each shape of batch.
    """

    folder: Path
    manifest: Mapping[str, Any]
    tokenizer: Tokenizer
    weights: Mapping[str, jax.Array]
    call: Callable[[Mapping[str, jax.Array], Mapping[str, Any]], jax.Array]

    @property
    def task(self) -> str:
        """One of `fw.data.TASKS`."""
        return self.manifest["task"]

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        return tuple(self.manifest["labels"])

    @property
    def length(self) -> int:
        """The most tokens in a row, special tokens included."""
        return self.manifest["length"]

    def logits(self, batch: Mapping[str, Any]) -> np.ndarray:
        """Run the function on one batch.

        Args:
            batch: int32 `input_ids`, `segment_ids`, `position_ids` [b, t] with t ≤ `length`; for
                whole texts also `first` [b, s], for questions `token_type_ids`. See `fw.data.pack`.

        Returns:
            float32 [b, t, labels] or [b, s, labels].

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
            if array.dtype != want[name]["dtype"] or array.ndim != len(dims) or not array.size:
                raise FwError(
                    f"batch: {name}: expected {want[name]['dtype']}[{', '.join(dims)}], not empty; "
                    f"got {array.dtype}{list(array.shape)}"
                )
            for dim, size in zip(dims, array.shape, strict=True):
                if sizes.setdefault(dim, size) != size:
                    raise FwError(f"batch: {name}: {dim} is {size}, but {sizes[dim]} before")
        if sizes["t"] > self.length:
            raise FwError(f"batch: rows of {sizes['t']} tokens; expected at most {self.length}")
        return np.asarray(self.call(self.weights, arrays))

    def predict(self, texts: Iterable[Text], batch_size: int = 32) -> Iterator[dict[str, Any]]:
        """Answer texts in their order; see `fw.export.predict.predict`.

        Args:
            texts: a text each, or for token classification the words of one; for question answering
                {"question", "context"}.
            batch_size: the most rows computed at once; a row holds several short texts.

        Yields:
            For token classification `{"text", "entities": [{"type", "text", "start", "end",
            "score"}, …]}` with offsets in characters; for sequence classification `{"text",
            "label", "score", "scores", "truncated"}`; for several labels `{"text", "labels",
            "scores", "truncated"}`; for regression `{"text", "numbers", "truncated"}`; for question
            answering what `fw.export.ask.ask` says, for hidden words `fw.export.fill.fill`.

        Raises:
            FwError: an item is no text, or `batch_size` is below 1.
        """
        return predict(self, texts, batch_size)


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
    exported = _function(folder, manifest)
    weights = read_tensors(folder / files.WEIGHTS)
    if form(weights) != manifest["signature"]["weights"]:
        raise FwError(f"{folder / files.WEIGHTS}: its tensors are not those of the signature")
    artifact = Artifact(
        folder,
        manifest,
        replace(load_tokenizer(folder), **_tokenizer_ids(folder, manifest)),
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


def _function(folder: Path, manifest: Mapping[str, Any]) -> export.Exported:
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
    want = form(batch_specs(manifest["task"], manifest["length"]))
    if found["batch"] != want or any(manifest["signature"][k] != v for k, v in found.items()):
        raise FwError(f"{path}: takes and gives something else than the manifest says")
    if manifest["labels"] and found["logits"]["shape"][-1] != len(manifest["labels"]):
        raise FwError(f"{path}: gives {found['logits']['shape'][-1]} classes, not one a label")
    check_function(exported, str(path))
    return exported


def _tokenizer_ids(folder: Path, manifest: Mapping[str, Any]) -> dict[str, int | None]:
    ids = {name: manifest["tokenizer"].get(name) for name in ("pad", "unknown")}
    if type(ids["pad"]) is not int or type(ids["unknown"]) not in (int, type(None)):
        raise FwError(f"{folder / files.NAME}: 'tokenizer': expected ids of 'pad' and 'unknown'")
    return ids
