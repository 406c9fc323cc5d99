"""A trained model becomes a folder that runs anywhere jax does, and is not written if it does not.

The forward pass, as precision and compression left it, is traced once with symbolic sizes and
lowered for every platform; the weights stay its arguments, in a file of their own. Golden outputs
come from the model itself, and the new folder is loaded and compared with them before it gets its
name. StableHLO is guaranteed to be readable for six months only: the manifest also has the model's
configuration, and `load_variables` gives the parameters back, so that it can be exported again.
"""

import dataclasses
import importlib.metadata
import math
import platform
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from fw.errors import FwError
from fw.export import manifest as files
from fw.export.function import check_function, form, functional, trace
from fw.export.golden import tolerance
from fw.export.load import load
from fw.labels import LABELLED
from fw.metrics.entities import entity_types
from fw.processors import Processor, processor_of
from fw.tensors import read_tensors, write_tensors

if TYPE_CHECKING:
    from compress import Record
    from fw.model import Model


def save(
    folder: str | Path,
    *,
    model: "Model",
    variables: Mapping[str, Any],
    task: str,
    labels: Sequence[str],
    processor: Processor,
    precision: str = "f32",
    report: Sequence["Record"] = (),
    recipe: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    examples: Sequence[Any] | None = None,
) -> Path:
    """Write an artifact.

    The bytes are a function of the arguments and of the versions of jax, fw and Python. Under
    "bf16", kernels are stored as the bfloat16 that their products round them to anyway.

    Args:
        folder: where to; an artifact that is there is replaced, anything else is not.
        model: the record; its config is a dataclass or a mapping, or None.
        variables: {"params", "state"}, whose leaves may be compressed.
        task: one of `fw.processors.TASKS`.
        labels: names of the classes or numbers, in the order of the logits; empty where there
            are none.
        processor: of the task: for texts `Text(tokenizer, length)`, or `Text.of(folder, length)`.
        precision: policy of the products that are not compressed, see `fw.precision`.
        report: what compressing said of every leaf, for the manifest.
        recipe: what compressed them, as `compress.Transform.data` has it, for the manifest.
        provenance: where the model came from.
        examples: things for the golden batch; None for random values.

    Returns:
        The folder.

    Raises:
        FwError: arguments that do not fit each other, a folder that is something else or cannot
            be written, or a function that does not give the model's own outputs once exported.

    >>> import tempfile
    >>> from fw.export import Text
    >>> from fw.models.bert import BertConfig, bert
    >>> model = bert(BertConfig(5, 8, 1, 2, 8, num_labels=2, task="sequence_classification"))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "vocab.txt").write_text("[PAD]\\n[UNK]\\n[CLS]\\n[SEP]\\nhello\\n")
    ...     path = save(Path(folder, "artifact"), model=model, processor=Text.of(folder, 16),
    ...                 variables=model.init(jax.random.key(0)),
    ...                 task="sequence_classification", labels=("bad", "good"))
    ...     sorted(next(load(path).predict(["hello"]))["scores"])
    ['bad', 'good']
    """
    folder = Path(folder)
    _check_arguments(model, task, labels, processor)
    with replacing(folder) as part:
        _check_target(folder)
        variables = jax.device_get(dict(variables))
        weights, function, forward, kind = functional(model, variables, precision)
        specs = processor.specs(task)
        exported = trace(function, weights, specs)
        check_function(exported, "the model")
        classes = exported.out_avals[0].shape[-1]
        if labels and classes != len(labels):
            raise FwError(f"labels: the model has {classes} classes; got {len(labels)}")
        batch = processor.golden(task, examples)
        logits = np.asarray(jax.jit(forward)(variables, batch))
        if not np.isfinite(logits).all():
            raise FwError("variables: the model gives NaN or infinity; not exported")
        manifest = {
            "task": task,
            "labels": list(labels),
            "precision": precision,
            "run": _how_to_run(folder.name),
            "platforms": list(exported.platforms),
            "versions": {
                "fw": _version(),
                "jax": jax.__version__,
                "python": platform.python_version(),
                "calling_convention": exported.calling_convention_version,
            },
            "provenance": dict(provenance or {}),
            "model": _describe(model),
            "compression": {**_compression(weights, report), "recipe": dict(recipe or {})},
            "processor": processor.notes(),
            "golden": {"tolerance": tolerance(kind, logits)},
            "signature": {
                "function": "logits = call(weights, batch)",
                "batch": form(specs),
                "logits": form({"": exported.out_avals[0]})[""],
                "weights": form(weights),
            },
        }
        (part / files.STABLEHLO).write_bytes(exported.serialize())
        write_tensors(part / files.WEIGHTS, weights)
        processor.save(part)
        write_tensors(part / files.GOLDEN, batch | {"logits": logits})
        files.write(part, manifest)
        load(part)
    return folder


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A folder to fill, beside the final one, whose place it takes if the body succeeds.

    Raises:
        FwError: it cannot be written, which shows at once.
    """
    folder = folder.resolve()
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        part.mkdir(parents=True)
        yield part
        old = None
        if folder.exists():  # goes away after it has a successor, not before
            old = folder.rename(folder.with_name(f"{part.name}.old"))
        part.rename(folder)
        if old is not None:
            shutil.rmtree(old)
    except OSError as error:
        raise FwError(f"{folder}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def load_variables(folder: str | Path) -> dict[str, Any]:
    """Read the variables of an artifact back, to export it again or to go on with it.

    Args:
        folder: the artifact; its StableHLO need not be readable any more.

    Returns:
        {"params", "state"} for the `apply` of a model made from the manifest's "model"; compressed
        leaves are still compressed, and bfloat16 kernels are widened.

    Raises:
        FwError: a file is damaged, missing or unknown.

    >>> load_variables("nowhere")
    Traceback (most recent call last):
    ...
    fw.errors.FwError: nowhere: there is no such folder; expected an artifact, made by fw export
    """
    import compress

    folder = Path(folder)
    manifest = files.read(folder)
    files.check_files(folder, manifest)
    arrays = read_tensors(folder / files.WEIGHTS)
    narrowed = manifest["compression"]["bfloat16"]
    arrays = {n: x.astype(np.float32) if n in narrowed else x for n, x in arrays.items()}
    return {"params": {}, "state": {}} | compress.from_arrays(arrays)


def _check_arguments(
    model: "Model", task: str, labels: Sequence[str], processor: Processor
) -> None:
    if not isinstance(processor, kind := processor_of(task)):
        raise FwError(f"processor: expected {kind.__name__} for {task}; got {processor!r}")
    named = not isinstance(labels, str) and len(set(labels)) == len(labels)
    if not named or bool(labels) != (task in LABELLED):
        expected = "names, each once" if task in LABELLED else f"none for {task}"
        raise FwError(f"labels: expected {expected}; got {labels!r}")
    if task == "token_classification":
        entity_types(labels)
    processor.fits(model.config, task)


def _check_target(folder: Path) -> None:
    if folder.exists() and not (
        folder.is_dir() and ((folder / files.NAME).is_file() or not any(folder.iterdir()))
    ):
        raise FwError(f"{folder}: is there and no artifact, so it is not replaced; give another")


def _describe(model: "Model") -> dict[str, Any]:
    config = model.config
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        kind = type(config)
        return {
            "config_class": f"{kind.__module__}.{kind.__qualname__}",
            "config": dataclasses.asdict(config),
        }
    if config is None or isinstance(config, Mapping):
        return {"config_class": None, "config": None if config is None else dict(config)}
    raise FwError(f"model.config: expected a dataclass or a mapping; got {type(config).__name__}")


def _compression(weights: Mapping[str, np.ndarray], report: Sequence["Record"]) -> dict[str, Any]:
    import compress
    from compress.transform import named_leaves

    leaves = dict(named_leaves(compress.from_arrays(weights))[0])
    forms = dict(n.split(":", 1) for n in weights if n.count(":") > 1)
    return {
        "bytes": sum(x.nbytes for x in weights.values()),
        "bytes_as_float32": sum(4 * math.prod(x.shape) for x in leaves.values()),
        "formats": forms,
        "bfloat16": [n for n, x in weights.items() if ":" not in n and x.dtype == jnp.bfloat16],
        "report": [
            dataclasses.asdict(r) | {"error": float(r.error)}
            for r in report
            if not r.applied.startswith("kept")
        ],
    }


def _how_to_run(name: str) -> dict[str, str]:
    return {
        "shell": f"fw predict {name} ITEM, as in fw predict --help",
        "python": f'list(fw.export.load("{name}").predict([item]))',
        "without fw": "import jax, jax.export, safetensors.flax; call = jax.jit(jax.export."
        "deserialize(bytearray(open('model.stablehlo', 'rb').read())).call); logits = call("
        "safetensors.flax.load_file('model.safetensors'), batch)",
    }


def _version() -> str:
    try:
        return importlib.metadata.version("fw")
    except importlib.metadata.PackageNotFoundError:
        return "a source tree"
