"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) in folders of PEFT, in and out.

W' = W + s·A·B with A [in, r], B [r, out] and s = alpha / r, or alpha / sqrt(r) where the config
says use_rslora (Kalajdzievski 2023, arXiv:2312.03732). Where it says use_dora (Liu et al. 2024,
arXiv:2402.09353), the columns of W' have the lengths m [out]. The files have A and B transposed,
and one pair for each layer of transformers' model; here a parameter has one pair: those of stacked
layers are stacked, and parts of a joint tensor share their A. `fw.hub.attached` puts it on a model.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from reprlib import repr as shown
from typing import Any, TypeGuard

import jax
import numpy as np
from jax.typing import DTypeLike

from fw.errors import FwError
from fw.hub.families import FAMILIES, Family
from fw.hub.files import AnyTensor, Tensors, new_folder, open_tensors, read_json
from fw.hub.folder import FLOATS, Loaded, on_first_process
from fw.hub.header import check_file, shown_name
from fw.models.names import Name
from fw.tensors import write_tensors
from sharding import build, gather, paths
from sharding.layout import fit

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE = "base_model.model."
"""What PEFT puts before the names of transformers."""

SIDES = (".lora_A.weight", ".lora_B.weight")
MAGNITUDE = ".lora_magnitude_vector"

ONLY: Mapping[str, Sequence[Any]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # The others change the weights below the adapter: pissa, olora, corda, loftq …
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
"""Keys of the config with the values that are understood."""

PLAIN = (
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_alpha", "lora_dropout", "megatron_core", "modules_to_save",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_dora", "use_rslora",
)  # fmt: skip
"""Keys that are read here, or that change nothing once an adapter is trained. `fan_in_fan_out` is
for layers of another kind: PEFT ignores it for those that these models have."""


@dataclass(frozen=True)
class Target:
    """A dense layer of transformers' model that is adapted.

    Attributes:
      module: its name in the adapter's files, without `BASE`.
      names: our parameters, several where theirs is a joint one.
      rank: of its A and B.
      scale: s.
    """

    module: str
    names: tuple[Name, ...]
    rank: int
    scale: float


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("pairs", "heads", "magnitudes"),
    meta_fields=("targets", "config"),
)
@dataclass(frozen=True)
class Adapter:
    """A low-rank change of a model: a pytree of its arrays.

    Attributes:
      pairs: by the path of a parameter, A [..., in, r] and B [..., r, out], with the leading axes
        of a stack; r is the largest rank in it, and beyond a smaller one, A and B are zero.
      heads: by path, parameters that take the place of the model's.
      targets: what the pairs are in the files.
      config: `adapter_config.json`, as text.
      magnitudes: by path, m [..., 1, out], if the adapter has them. As A and B are, they are zero
        for layers of a stack that are not adapted, which keep the lengths that they have.
    """

    pairs: dict[str, tuple[jax.Array, jax.Array]] = field(repr=False)
    heads: dict[str, jax.Array] = field(repr=False)
    targets: tuple[Target, ...]
    config: str = field(repr=False)
    magnitudes: dict[str, jax.Array] = field(default_factory=dict, repr=False)


def load_adapter(folder: str | Path, loaded: Loaded, *, dtype: DTypeLike = np.float32) -> Adapter:
    """Reads a folder of PEFT for a model, onto its mesh.

    A takes the placement of its kernel's input axis, B that of the output axis. A `target_modules`
    that is a pattern is not run, for it may be one that never ends: the tensors say which layers
    are adapted. Where it is a list, they must be the layers of the list.

    Args:
      folder: holds `adapter_config.json` and `adapter_model.safetensors`.
      loaded: the model that the adapter is for.
      dtype: of the arrays, whatever the file has.

    Raises:
      FwError: a broken folder; another method than LoRA or DoRA, or a variant of it (biases,
        embeddings …); a layer that the model lacks, or tensors that are missing, too many, of
        another shape or of another rank than the config says.
    """
    folder, dtype = Path(folder), np.dtype(dtype)
    config = read_json(folder / CONFIG)
    _check_config(config, folder / CONFIG)
    check_file(folder / WEIGHTS)
    model, family = loaded.model, family_of(loaded)
    shapes = by_path(jax.eval_shape(model.init, jax.random.key(0)))
    with open_tensors(folder, WEIGHTS) as tensors:
        bare = _bare(tensors, family, folder / WEIGHTS)
        layers, heads = modules(family, model.config, shapes, joined=not bare)
        targets = _targets(config, tensors, layers, folder)
        kept = _kept(config, tensors, layers, heads, folder)
        axes = by_path(model.axes, is_leaf=lambda node: type(node) is tuple)
        pairs, magnitudes = {}, {}
        for path, own in by_parameter(targets).items():
            a, b, *m = _sides(config, path, own, tensors, shapes[path].shape, axes[path], dtype,
                              loaded)  # fmt: skip
            pairs[path] = a, b
            magnitudes |= dict.fromkeys([path], *m) if m else {}
        found = {}
        for module, name in kept.items():
            tensor, shape = tensors[BASE + module], shapes[name.path].shape
            _check_tensor(tensor, shape[::-1] if name.transposed else shape)
            read = partial(_head, tensor, name, dtype)
            found[name.path] = _place(name.path, shape, axes[name.path], read, dtype, loaded)
    return Adapter(pairs, found, targets, json.dumps(config, sort_keys=True), magnitudes)


def save_adapter(folder: str | Path, loaded: Loaded, adapter: Adapter) -> None:
    """Writes a folder that PEFT, and `load_adapter`, can read.

    Args:
      folder: new, or empty; its parents are made.
      loaded: the model that the adapter is for.
      adapter: trained or as it was loaded.

    Raises:
      FwError: the folder exists, or cannot be written; parts of a joint tensor with different A,
        for which the files have one.
    """
    folder, family = Path(folder), family_of(loaded)
    host = gather(
        {"pairs": adapter.pairs, "heads": adapter.heads, "magnitudes": adapter.magnitudes}
    )
    found: dict[str, np.ndarray] = {}
    for target in adapter.targets:
        sides = [
            (a[name.entry][:, : target.rank], b[name.entry][: target.rank])
            for name in target.names
            for a, b in [host["pairs"][name.path]]
        ]
        if any(a.tobytes() != sides[0][0].tobytes() for a, _ in sides):
            own = ", ".join(name.path for name in target.names)
            raise FwError(f"{own}: have different A, but {target.module} is one layer in the files")
        found[BASE + target.module + SIDES[0]] = sides[0][0].T
        found[BASE + target.module + SIDES[1]] = np.concatenate([b for _, b in sides], axis=1).T
        if lengths := [
            host["magnitudes"][name.path][name.entry][0]
            for name in target.names
            if name.path in host["magnitudes"]
        ]:
            found[BASE + target.module + MAGNITUDE] = np.concatenate(lengths)
    for name in family.stored(loaded.model.config):
        if name.path in host["heads"]:
            head = host["heads"][name.path]
            found[BASE + name.tensor] = head.T if name.transposed else head

    def write() -> None:
        with new_folder(folder) as part:
            write_tensors(part / WEIGHTS, found)
            text = json.dumps(json.loads(adapter.config), indent=2, sort_keys=True)
            (part / CONFIG).write_text(text, encoding="utf-8")

    on_first_process(write, folder)


def family_of(loaded: Loaded) -> Family:
    """The row of the table for a model."""
    config = loaded.model.config
    family = FAMILIES.get(getattr(config, "model_type", ""))
    if family is None:
        raise FwError(f"a {type(config).__name__} is of no family with a folder format")
    return family


def by_path(tree: Any, is_leaf: Any = None) -> dict[str, Any]:
    """The parameters of a tree by their paths below "params"."""
    own = tree["params"]
    return dict(zip(paths(own, is_leaf), jax.tree.leaves(own, is_leaf=is_leaf), strict=True))


def _check_config(config: Mapping[str, Any], where: Path) -> None:
    """Refuses what is not understood: another method, a variant, or values of other types."""

    def refuse(key: str, expected: str) -> None:
        name = shown_name(key)[1:-1]
        raise FwError(f"{where}: {name} is {shown(config.get(key))}; expected {expected}")

    for key, known in ONLY.items():
        value = config.get(key, known[0] if key != "peft_type" else None)
        if not any(value is one or (isinstance(one, str) and value == one) for one in known):
            refuse(key, " or ".join(map(repr, known)))
    for key in sorted(config.keys() - ONLY.keys() - set(PLAIN)):
        if config[key]:
            refuse(key, "none: it is not supported")
    for key in ("r", "lora_alpha"):
        _check_number(config.get(key, 8), f"{where}: {key}", whole=key == "r")
    for key in ("rank_pattern", "alpha_pattern"):
        table = config.get(key) or {}
        if not isinstance(table, dict):
            refuse(key, "an object from names to numbers")
        for name, value in table.items():
            place = f"{where}: {key}: {shown_name(name)}"
            _check_number(value, place, whole=key == "rank_pattern")
            # Patterns are not run: they may be ones that never end.
            if not re.fullmatch(r"\^?\w+(\\?\.\w+)*\$?", name):
                raise FwError(f"{place}: expected the name of a layer, or the end of one")
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        value = config.get(key)
        text = isinstance(value, str) and key != "modules_to_save"
        if value is not None and not text and not _texts(value):
            refuse(key, "a list of names")
    flags = ("use_rslora", "use_dora")
    if odd := [key for key in flags if not isinstance(config.get(key) or False, bool)]:
        refuse(odd[0], "true or false")


def _check_number(value: Any, where: str, *, whole: bool) -> None:
    fits = type(value) is int or (type(value) is float and not whole)
    if not fits or not 0 < value < 2**31:
        kind = "an integer" if whole else "a number"
        raise FwError(f"{where} is {shown(value)}; expected {kind} of more than 0")


def _texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _bare(tensors: Tensors, family: Family, where: Path) -> bool:
    """Whether the adapter was made for the encoder alone, whose names lack the family's prefix.

    Raises:
      FwError: a tensor of no transformers model.
    """
    for name in tensors:
        if not name.startswith(BASE):
            raise FwError(f"{where}: tensor {shown_name(name)}: expected a name after {BASE}")
    return not any(name.startswith(BASE + family.prefix) for name in tensors)


def modules(
    family: Family, config: Any, shapes: Mapping[str, Any], *, joined: bool
) -> tuple[dict[str, tuple[Name, ...]], dict[str, Name]]:
    """The dense layers of a model and the tensors of its head, by transformers' names.

    Args:
      family: of the model.
      config: of the model.
      shapes: of the parameters, by path.
      joined: whether names have the family's prefix.
    """
    layers: dict[str, tuple[Name, ...]] = {}
    heads: dict[str, Name] = {}
    for name in family.names(config):
        if name.kind != "params":
            continue
        tensor = name.tensor if joined else name.tensor.removeprefix(family.prefix)
        head = family.may_lack(name.tensor)
        if head:
            heads[tensor] = name
        # A decoder's last layer is a table of words to us, but no other table is a layer.
        flat = len(shapes[name.path].shape) - len(name.entry) == 2
        if tensor.endswith(".weight") and flat and (name.transposed or head):
            module = tensor.removesuffix(".weight")
            layers[module] = (*layers.get(module, ()), name)
    return layers, heads


def _targets(
    config: Mapping[str, Any],
    tensors: Tensors,
    layers: Mapping[str, tuple[Name, ...]],
    folder: Path,
) -> tuple[Target, ...]:
    """The adapted layers, each with both of its tensors, as the config describes them."""
    where, pattern = folder / WEIGHTS, config.get("target_modules")
    sides = _endings(config)
    adapted = {
        name.removesuffix(side)[len(BASE) :]
        for name in tensors
        for side in sides
        if name.endswith(side)
    }
    listed = {module for module in layers if _ends(module, pattern)} if _texts(pattern) else None
    # A choice among the listed: which are left out, the tensors say.
    some = config.get("exclude_modules") or config.get("layers_to_transform") is not None
    saved = config.get("modules_to_save") or []
    due = {module for module in listed or () if not some and not inside(module, saved)}
    for module in sorted(adapted | due):
        for side in sides:
            name = f"{BASE}{module}{side}"
            if name not in tensors:
                raise FwError(f"{where}: tensor {shown_name(name)} is missing")
            if module not in layers:
                raise FwError(
                    f"{where}: tensor {shown_name(name)}: the model has no dense layer of this "
                    "name that can be adapted alone"
                )
            if listed is not None and module not in listed:
                raise FwError(
                    f"{where}: tensor {shown_name(name)} is there, but target_modules of {CONFIG} "
                    "do not name its layer"
                )
    if not adapted:
        raise FwError(f"{where}: expected tensors that end with {' and '.join(SIDES)}, found none")
    found = []
    for module in sorted(adapted):
        rank = _matched(config, "rank_pattern", module, config.get("r", 8))
        alpha = _matched(config, "alpha_pattern", module, config.get("lora_alpha", 8))
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        found.append(Target(module, layers[module], rank, scale))
    return tuple(found)


def _kept(
    config: Mapping[str, Any],
    tensors: Tensors,
    layers: Mapping[str, tuple[Name, ...]],
    heads: Mapping[str, Name],
    folder: Path,
) -> dict[str, Name]:
    """The parameters of the head that come whole, by the names of their tensors without `BASE`."""
    modules, where = config.get("modules_to_save") or [], folder / WEIGHTS
    for module in layers:
        if inside(module, modules) and f"{module}.weight" not in heads:
            raise FwError(
                f"{folder / CONFIG}: modules_to_save is {shown(modules)}; only a head can be "
                f"replaced, not {module}"
            )
    expected = {tensor: name for tensor, name in heads.items() if inside(tensor, modules)}
    for tensor in expected:
        if BASE + tensor not in tensors:
            raise FwError(f"{where}: tensor {BASE + tensor!r} is missing; modules_to_save names it")
    for name in tensors:
        if not name.endswith(_endings(config)) and name[len(BASE) :] not in expected:
            raise FwError(
                f"{where}: tensor {shown_name(name)} is there, but it is neither A nor B of a "
                f"dense layer, nor in a head that modules_to_save of {CONFIG} name"
            )
    return expected


def _endings(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What the names of an adapted layer's tensors end with."""
    return (*SIDES, MAGNITUDE) if config.get("use_dora") else SIDES


def _ends(module: str, names: Iterable[str]) -> bool:
    """Whether a module has one of these names, or ends with one."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def inside(tensor: str, modules: Sequence[str]) -> bool:
    """Whether a name lies in a module that ends with one of these, as PEFT has it, or is one.

    >>> inside("pre_classifier.bias", ["classifier"])
    True
    """
    return any(f"{module}." in f"{tensor}." for module in modules)


def _matched(config: Mapping[str, Any], key: str, module: str, otherwise: Any) -> Any:
    """The number of the first name that fits a module, as PEFT takes it."""
    for name, number in (config.get(key) or {}).items():
        plain = name.replace("\\.", ".").removesuffix("$")
        if module == plain.removeprefix("^") or (
            not plain.startswith("^") and module.endswith(f".{plain}")
        ):
            return number
    return otherwise


def by_parameter(targets: Iterable[Target]) -> dict[str, list[tuple[Target, Name]]]:
    """What is adapted of each parameter, by its path."""
    found: dict[str, list[tuple[Target, Name]]] = {}
    for target in targets:
        for name in target.names:
            found.setdefault(name.path, []).append((target, name))
    return found


def _sides(
    config: Mapping[str, Any],
    path: str,
    own: Sequence[tuple[Target, Name]],
    tensors: Tensors,
    shape: tuple[int, ...],
    axes: tuple[Any, ...],
    dtype: np.dtype,
    loaded: Loaded,
) -> list[jax.Array]:
    """A and B of a parameter, and the magnitudes if there are any."""
    lead = len(shape) - 2
    ends, names = shape[lead:], axes[lead:]
    if not own[0][1].transposed:  # the parameter is [out, in], as in the files
        ends, names = ends[::-1], names[::-1]
    rank = max(target.rank for target, _ in own)
    of = {name.entry: (target, name) for target, name in own}
    for target, name in own:
        parts = name.part[1]
        sizes = ((target.rank, ends[0]), (parts * ends[1], target.rank), (parts * ends[1],))
        for side, size in zip(_endings(config), sizes, strict=False):
            _check_tensor(tensors[BASE + target.module + side], size)

    def read(side: str, index: tuple[slice, ...]) -> np.ndarray:
        *front, rows, columns = index
        found = np.zeros([s.stop - s.start for s in index], dtype)
        entries = [range(s.start, s.stop) for s in front]
        for place, entry in zip(np.ndindex(*map(len, entries)), product(*entries), strict=True):
            if entry not in of:  # a layer that is not adapted
                continue
            target, name = of[entry]
            ranks, tensor = slice(0, target.rank), tensors[BASE + target.module + side]
            skip = name.part[0] * ends[1]
            part = slice(skip + columns.start, skip + columns.stop)
            if side == SIDES[0]:
                found[place][:, ranks] = tensor.read((ranks, rows)).T
            elif side == SIDES[1]:
                found[place][ranks] = tensor.read((part, ranks)).T
            else:
                found[place][0] = tensor.read((part,))
        return found

    front, stack = shape[:lead], axes[:lead]
    each = (
        ((ends[0], rank), (names[0], None)),
        ((rank, ends[1]), (None, names[1])),
        ((1, ends[1]), (None, names[1])),
    )
    return [
        _place(path, (*front, *size), (*stack, *own), partial(read, side), dtype, loaded)
        for side, (size, own) in zip(_endings(config), each, strict=False)
    ]


def _head(tensor: AnyTensor, name: Name, dtype: np.dtype, index: tuple[slice, ...]) -> np.ndarray:
    part = tensor.read(index[::-1] if name.transposed else index)
    return np.array(part.T if name.transposed else part, dtype, order="C")


def _place(
    path: str,
    shape: tuple[int, ...],
    axes: tuple[Any, ...],
    read: Callable[[tuple[slice, ...]], np.ndarray],
    dtype: np.dtype,
    loaded: Loaded,
) -> jax.Array:
    """An array read onto the model's mesh, or onto one device where it has none."""
    abstract = jax.ShapeDtypeStruct(shape, dtype)
    where: Any = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if loaded.mesh is not None and loaded.rules is not None:
        where = fit(axes, shape, loaded.mesh, loaded.rules, path=path)
    return build(abstract, where, read, path=path)


def _check_tensor(tensor: AnyTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape or tensor.dtype not in FLOATS:
        raise FwError(
            f"{tensor.file}: tensor {shown_name(tensor.name)}: expected shape {shape}, as the "
            f"model and {CONFIG} say, and one of {', '.join(FLOATS)}; found {tensor.shape} and "
            f"{tensor.dtype}"
        )
