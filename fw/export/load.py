"""A folder becomes a function again, with no code of the model: hashes, golden outputs, then use.

`load` checks that the folder is what its manifest says (`fw.export.manifest`), that this machine
can run it, and that the function still gives what it gave when it was saved. The signature comes
from the StableHLO itself and must agree with the manifest and the weights.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax import export

from fw.data.tokenizer import Tokenizer, load_tokenizer
from fw.errors import FwError
from fw.export import manifest as files
from fw.export.predict import predict

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

CUSTOM_CALLS = {"shape_assertion"}
"""The only calls out of StableHLO that are let through: the check of t against its maximum. Others
would run whatever code jaxlib has under that name."""


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
        """Either "token_classification" or "sequence_classification"."""
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
                sequence classification also `first` [b, s]. See `fw.data.pack`.

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

    def predict(
        self, texts: Iterable[str | Sequence[str]], batch_size: int = 32
    ) -> Iterator[dict[str, Any]]:
        """Answer texts in their order; see `fw.export.predict.predict`.

        Args:
            texts: a text each, or for token classification the words of one.
            batch_size: the most rows computed at once; a row holds several short texts.

        Yields:
            For token classification `{"text", "entities": [{"type", "text", "start", "end",
            "score"}, …]}` with offsets in characters; for sequence classification `{"text",
            "label", "score", "scores", "truncated"}`.

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
        _run_golden(artifact)
    return artifact


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


def form(arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Dtypes and shapes as the manifest spells them; a symbolic size is its name.

    >>> form({"ids": np.zeros((2, 3), np.int32)})
    {'ids': {'dtype': 'int32', 'shape': [2, 3]}}
    """
    return {
        name: {
            "dtype": str(x.dtype),
            "shape": [str(n) if export.is_symbolic_dim(n) else n for n in x.shape],
        }
        for name, x in sorted(arrays.items())
    }


def check_function(exported: export.Exported, where: str) -> None:
    """Refuse a function that reaches out of StableHLO or wants more than one device.

    Raises:
        FwError: it does.
    """
    text = exported.mlir_module()
    found = re.findall(r'custom_call @(?:"([^"]*)"|([\w.$]+))', text)
    names = {quoted or plain for quoted, plain in found}
    if len(found) != text.count("custom_call") or names - CUSTOM_CALLS:
        strange = ", ".join(sorted(names - CUSTOM_CALLS)) or "an unnamed one"
        raise FwError(f"{where}: calls {strange}, which is outside StableHLO")
    if exported.disabled_safety_checks or exported.nr_devices != 1:
        raise FwError(
            f"{where}: expected a function of one device with all safety checks; it has "
            f"{exported.nr_devices} and lacks {list(exported.disabled_safety_checks)}"
        )


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
    if any(manifest["signature"][part] != found[part] for part in found):
        raise FwError(f"{path}: its arguments are not those of the manifest's signature")
    check_function(exported, str(path))
    return exported


def _tokenizer_ids(folder: Path, manifest: Mapping[str, Any]) -> dict[str, int | None]:
    ids = {name: manifest["tokenizer"].get(name) for name in ("pad", "unknown")}
    if type(ids["pad"]) is not int or type(ids["unknown"]) not in (int, type(None)):
        raise FwError(f"{folder / files.NAME}: 'tokenizer': expected ids of 'pad' and 'unknown'")
    return ids


def _run_golden(artifact: Artifact) -> None:
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
