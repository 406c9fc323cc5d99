"""A Hugging Face model folder becomes a model on a mesh, and a model becomes such a folder.

Each device's part of each parameter is read straight from the file: no device, and no host, ever
holds the whole model. What the folder lacks, a new head, is computed where it belongs. `files`
knows the files, `config` what to make of them, `families` the names, `sharding` the places.
"""

import dataclasses
import gc
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.typing import DTypeLike

from compress.adapters import LoRA
from compress.arrays import is_compressed
from compress.scheme import core, role_of
from compress.transform import named_leaves
from fw.errors import FwError
from fw.hub.config import choose_head, read_config, read_pooling, write_config, write_pooling
from fw.hub.families import Family, family_of
from fw.hub.files import (
    CONFIG,
    INDEX,
    WEIGHTS,
    AnyTensor,
    Tensors,
    copy_tokenizer,
    largest,
    new_folder,
)
from fw.hub.header import shown_name
from fw.hub.reader import reader
from fw.hub.source import open_model
from fw.model import Model, Variables
from fw.models.names import Name
from fw.models.stack_layout import scans
from fw.tensors import PLAIN, tensor_file
from sharding import Rules, create, fill, gather, paths, shardings

COUNTS = ("I64", "I32")
"""The dtypes of what a model counts, such as the batches that a norm has seen; written as the
first."""

FLOATS = {n: np.dtype(d).name for n, d in PLAIN.items() if jnp.issubdtype(d, jnp.floating)}
"""The dtypes of parameters, by safetensors' names."""

LACKING = 1000
"""Tensors that a folder may lack before the search for more ends."""


@dataclass(frozen=True)
class Loaded:
    """A model with its parameters, and what its folder said besides.

    Attributes:
      model: the functions.
      variables: on the mesh.
      labels: the names of the classes, by id.
      fresh: paths of the parameters that the folder lacks and that were made anew.
      unused: the folder's tensors that the model has no place for.
      folder: where it came from, None for a model made here.
      config: that folder's `config.json`.
      mesh, rules: where the variables are; None for one device.
    """

    model: Model
    variables: Variables = field(repr=False)
    labels: tuple[str, ...]
    fresh: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    folder: Path | None = None
    config: Mapping[str, Any] = field(default=MappingProxyType({}), repr=False)
    mesh: Mesh | None = field(default=None, repr=False)
    rules: Rules | None = field(default=None, repr=False)


def load(
    folder: str | Path,
    *,
    mesh: Mesh,
    rules: Rules,
    key: jax.Array | None = None,
    task: str | None = None,
    labels: Sequence[str] | None = None,
    dtype: DTypeLike = np.float32,
    microbatches: int = 1,
    remat: str | None = None,
    scan: bool | None = None,
    become: Callable[[str, jax.Array], Any] | None = None,
) -> Loaded:
    """Reads a model folder of Hugging Face transformers onto a mesh.

    The folder's classifier is kept if it is one for the task, and its labels are those asked for
    or unnamed (LABEL_0, LABEL_1 …) and as many; otherwise it gets a new one.

    Args:
      folder: holds `config.json` and `model.safetensors`, or an index and several such files; or
        a GGUF file, or its path; or a state dict of EfficientNet-Lite, `.pth`, or its path.
      mesh, rules: where the parameters go.
      key: for parameters that the folder lacks; each gets what `model.init(key)` gives it. None
        requires a complete folder.
      task: a task of the family; None takes the one that the folder was made for.
      labels: names of the classes by id; None takes the folder's.
      dtype: of the parameters, whatever the files have; what a model counts stays integer.
      microbatches, remat: of the model's config, as in `sharding.pipeline`; a model without layers
        of one kind has no microbatches.
      scan: of the config, as in `Stack`: whether layers are stacked. None: an encoder's are apart
        on CPUs, which copy each layer out of a stack, unless the mesh has stages; others are.
      become: what a parameter of the folder becomes, by its path and array; applied as soon as it
        is read, before the next one is.

    Returns:
      The model and its parameters.

    Raises:
      FwError: a folder that is broken, of an unknown kind, or does not fit its own `config.json`;
        tensors of the encoder that are missing, too many or of another shape.
      sharding.ShardingError: parameters that do not fit the mesh and rules.

    >>> import tempfile
    >>> from fw.models.bert import BertConfig, bert
    >>> from sharding import make_mesh, rules
    >>> model = bert(BertConfig(30, 8, 1, 2, 16, num_labels=2, task="token_classification"))
    >>> made = Loaded(model, model.init(jax.random.key(0)), ("O", "B-x"))
    >>> where = {"mesh": make_mesh("data=1"), "rules": rules()}
    >>> with tempfile.TemporaryDirectory() as root:
    ...     save(f"{root}/tagger", made)
    ...     tagger = load(f"{root}/tagger", **where)
    ...     other = load(f"{root}/tagger", **where, labels=("O", "a", "b"), key=jax.random.key(1))
    >>> tagger.labels, other.fresh
    (('O', 'B-x'), ('classifier/bias', 'classifier/kernel'))
    """
    folder, dtype = Path(folder), np.dtype(dtype)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise FwError(f"dtype {dtype} needs jax.config.update('jax_enable_x64', True)")
    with open_model(folder) as (where, source, tensors):
        family = family_of(source, where)
        limit = largest(tensors.values())
        head = choose_head(family, source, where, task=task, labels=labels, limit=limit)
        extra = read_pooling(folder) if head.task == "embedding" else {}
        stacked = family.stacked or scans(mesh) if scan is None else scan
        extra |= computed(family, microbatches=microbatches, remat=remat, scan=stacked)
        config = read_config(family, source, where, head, limit, extra)
        named = family.by_name(tensors)
        wanted: dict[str, list[Name]] = {}
        lacking = 0
        for name in family.names(config):
            wanted.setdefault(name.place, []).append(name)
            lacking += name.tensor not in named and not family.may_lack(name.tensor)
            if lacking == LACKING:  # a config may ask for more names than memory holds
                break
        _check_names(family, folder, named, {n.tensor for own in wanted.values() for n in own})

        model = family.model(config)
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        places = shardings(model.axes, shapes, mesh, rules)
        axes = jax.tree.leaves(model.axes, is_leaf=lambda node: type(node) is tuple)
        used, fresh, leaves = set(), {}, {}
        for path, leaf, names, place in zip(
            paths(shapes), jax.tree.leaves(shapes), axes, jax.tree.leaves(places), strict=True
        ):
            lacks = any(name.tensor not in named for name in wanted[path])
            if lacks or ("labels" in names and not head.kept):
                fresh[path] = place
                continue
            used |= {name.tensor for name in wanted[path]}
            for name in wanted[path]:
                _check_tensor(named[name.tensor], name, leaf)
            like = jax.ShapeDtypeStruct(leaf.shape, _stored(leaf.dtype, dtype))
            # One after another: until a part is on its device, the host holds it as well.
            array = jax.block_until_ready(fill(like, place, reader(wanted[path], named)))
            leaves[path] = become(_short(path), array) if become else array
            del array
    if fresh:
        leaves |= _init(model, key, fresh, dtype, folder)
    return Loaded(
        model,
        jax.tree.unflatten(jax.tree.structure(shapes), [leaves[path] for path in paths(shapes)]),
        head.labels,
        tuple(_short(path) for path in fresh),
        tuple(sorted(tensor.name for name, tensor in named.items() if name not in used)),
        folder,
        MappingProxyType(dict(source)),
        mesh,
        rules,
    )


def save(
    folder: str | Path,
    loaded: Loaded,
    *,
    tokenizer_from: str | Path | None = None,
    more: Callable[[Path], None] | None = None,
) -> None:
    """Writes a model folder that transformers, and `load`, can read.

    For trained parameters: `save(folder, dataclasses.replace(loaded, variables=trained))`.
    Compressed ones, and kernels with adapters, are written as the floats that they stand for, made
    one after another. With several processes, all must call it; the first one writes.

    Args:
      folder: new, or empty; its parents are made.
      loaded: what to write; of `config`, the keys that fw does not know are kept.
      tokenizer_from: a folder whose tokenizer is copied; None takes `loaded.folder`'s, if any.
      more: writes further files into the folder before it gets its name.

    Raises:
      FwError: the folder exists, or cannot be written; parameters that are not the model's; labels
        that do not fit.
    """
    model, folder = loaded.model, Path(folder)
    leaves, dtype = _checked(model, loaded.variables)
    config = write_config(model.config, loaded.labels, dtype.name, loaded.config)
    names: dict[str, list[Name]] = {}
    for name in family_of(config, folder).stored(model.config):
        names.setdefault(name.place, []).append(name)
    like = {
        name.tensor: jax.ShapeDtypeStruct(
            name.stored(leaves[path].shape), _stored(leaves[path].dtype, dtype, np.int64)
        )
        for path, own in names.items()
        for name in own
    }
    tokenizer = loaded.folder if tokenizer_from is None else Path(tokenizer_from)

    def gathered() -> Iterator[tuple[str, np.ndarray]]:
        for path in names:
            yield path, _floats(path, leaves[path])
            gc.collect(0)  # only then does jaxlib let go of a host's copy

    host = gathered()

    def write() -> None:
        with new_folder(folder) as part:
            with tensor_file(part / WEIGHTS, like) as put:
                for path, array in host:
                    for name in names[path]:
                        own = array[name.index]
                        own = own.transpose(name.order(own.ndim))
                        put(name.tensor, own.astype(like[name.tensor].dtype), name.part[0])
                    del array, own  # before the next one comes
            text = json.dumps(config, indent=2, sort_keys=True)
            (part / CONFIG).write_text(f"{text}\n", encoding="utf-8")
            if model.config.task == "embedding":
                write_pooling(part, model.config)
            if tokenizer is not None:
                copy_tokenizer(tokenizer, part)
            if more is not None:
                more(part)

    on_first_process(write, folder, host)


def _check_names(family: Family, folder: Path, named: Tensors, wanted: set[str]) -> None:
    """Refuses a folder with another encoder than its config describes."""
    missing = sorted(n for n in wanted - named.keys() if not family.may_lack(n))
    if missing:
        files = {tensor.file for tensor in named.values()}
        where = files.pop() if len(files) == 1 else folder / (INDEX if files else WEIGHTS)
        raise FwError(f"{where}: {_list(missing)} missing, which {CONFIG} calls for")
    extra = sorted(t.name for n, t in named.items() if n not in wanted and not family.may_ignore(n))
    if extra:
        where = next(t.file for t in named.values() if t.name == extra[0])
        raise FwError(f"{where}: {_list(extra)} there, which {CONFIG} does not describe")


def _list(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(shown_name(name)[1:-1] for name in names[:most])
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"tensor {shown} is" if len(names) == 1 else f"tensors {shown}{more} are"


def computed(family: Family, **how: Any) -> dict[str, Any]:
    """Those of the settings that the family's configs have a field for.

    Raises:
      FwError: a `remat` that they have not.
    """
    fields = {field.name for field in dataclasses.fields(family.config)}  # type: ignore[arg-type]
    if how["remat"] is not None and "remat" not in fields:
        raise FwError(f"remat: {family.config.model_type} has no layers to compute again")
    return {name: value for name, value in how.items() if name in fields}


def _stored(own: np.dtype, floating: np.dtype, integer: DTypeLike | None = None) -> np.dtype:
    """The dtype in which a variable is read or written: parameters all in one, counts in theirs."""
    if jnp.issubdtype(own, jnp.floating):
        return floating
    return np.dtype(own if integer is None else integer)


def _check_tensor(tensor: AnyTensor, name: Name, like: jax.ShapeDtypeStruct) -> None:
    """Refuses a tensor of another shape than the model's, or of a dtype that it cannot be."""
    expected = name.stored(like.shape)
    if tensor.shape != expected:
        raise FwError(
            f"{tensor.file}: tensor {tensor.name!r}: expected shape {expected}, as {CONFIG} says, "
            f"found {tensor.shape}"
        )
    if jnp.issubdtype(like.dtype, jnp.integer):
        if tensor.dtype not in COUNTS:
            wanted = " or ".join(COUNTS)
            where = f"{tensor.file}: tensor {tensor.name!r}"
            raise FwError(f"{where}: expected {wanted}, found {tensor.dtype}")
    elif tensor.dtype not in FLOATS:
        raise FwError(
            f"{tensor.file}: tensor {tensor.name!r}: expected one of {', '.join(FLOATS)}, found "
            f"{tensor.dtype}; a quantised model must be saved in one of these first"
        )


def _init(
    model: Model,
    key: jax.Array | None,
    places: Mapping[str, jax.sharding.Sharding],
    dtype: np.dtype,
    folder: Path,
) -> dict[str, jax.Array]:
    """Some of the parameters of `model.init(key)`; the compiler drops the work for the others."""
    if key is None:
        names = ", ".join(map(_short, places))
        raise FwError(f"{folder}: lacks the parameters {names}; train it first, or give a key")

    def init(key: jax.Array) -> dict[str, jax.Array]:
        variables = model.init(key)
        every = dict(zip(paths(variables), jax.tree.leaves(variables), strict=True))
        return {path: every[path].astype(_stored(every[path].dtype, dtype)) for path in places}

    return create(init, key, shardings=dict(places))


def _floats(path: str, leaf: Any) -> np.ndarray:
    """A variable on the host, floats of codes by one layer after another where they are stacked."""
    if not is_compressed(leaf):
        return gather(leaf)
    role = role_of(path, leaf.shape)
    if role is None or leaf.ndim == core(role):
        return gather(_dense(leaf))
    whole = np.empty(leaf.shape, leaf.dtype)
    for i in range(len(whole)):
        whole[i] = gather(_layer(leaf, i))
    return whole


_dense = jax.jit(lambda leaf: leaf.dense())
_layer = jax.jit(lambda leaf, i: jax.tree.map(lambda part: part[i], leaf).dense())


def _checked(model: Model, variables: Variables) -> tuple[dict[str, Any], np.dtype]:
    """The variables by path, those that the model has, and the one dtype of parameters."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    every = dict(named_leaves(variables)[0])
    like = dict(named_leaves(shapes)[0])
    expected = {path: leaf.shape for path, leaf in like.items()}
    found = {path: np.shape(leaf) for path, leaf in every.items()}
    for path in sorted(expected.keys() | found.keys()):
        if expected.get(path) != found.get(path):
            raise FwError(
                f"{_short(path)}: expected {expected.get(path, 'no parameter')}, got "
                f"{found.get(path, 'none')}"
            )
        leaf = every[path]
        if isinstance(leaf, LoRA) and (leaf.adapters > 1 or leaf.ids is not None):
            raise FwError(f"{_short(path)}: has several adapters; detach all but one")
    counts = {path for path, leaf in like.items() if jnp.issubdtype(leaf.dtype, jnp.integer)}
    for path in sorted(counts):
        if not jnp.issubdtype(every[path].dtype, jnp.integer):
            raise FwError(f"{_short(path)}: expected integers, got {every[path].dtype}")
    own = [path for path in every if path not in counts]
    dtypes = sorted({str(every[path].dtype) for path in own})
    if len(dtypes) != 1 or dtypes[0] not in FLOATS.values():
        raise FwError(f"expected parameters of one floating dtype, got {', '.join(dtypes)}")
    return every, np.dtype(dtypes[0])


def on_first_process(write: Callable[[], None], folder: Path, host: Iterable = ()) -> None:
    """Runs `write` there; the others wait, and fail if it failed, for none may hang or go on.

    All go through `host`, if it is what `write` reads: its items are gathered from all.
    """
    error = None
    if jax.process_index() == 0:
        try:
            write()
        except Exception as caught:  # raised below, when the others know
            error = caught
    deque(host, maxlen=0)
    if jax.process_count() > 1:
        failed = multihost_utils.broadcast_one_to_all(np.int32(error is not None))
        if failed and error is None:
            raise FwError(f"{folder}: was not written; process 0 says why")
    if error is not None:
        raise error


def _short(path: str) -> str:
    return path.removeprefix("params/")
