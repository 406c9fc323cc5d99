"""Adapters of PEFT on a model that stays as it is, floats or codes, and off again.

    loaded = attach(loaded, load_adapter(folder, loaded))    # kernels become LoRA leaves
    base, adapter = detach(loaded)                           # also of what `compress.lora` made
    save_adapter(folder, base, adapter)

Attached, the function is that of the adapted model under `compress.apply`, and `compress.partition`
says what trains. `merge` makes plain parameters of it.
"""

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress import adapter_trees
from compress.adapters import LoRA
from compress.merging import merge as merged
from compress.parted import floats
from compress.transform import named_leaves
from fw.errors import FwError
from fw.hub.adapter import (
    Adapter,
    Target,
    by_parameter,
    by_path,
    family_of,
    inside,
    modules,
)
from fw.hub.folder import Loaded
from fw.models.names import Name
from sharding import gather

PARAMS = "params/"


def attach(loaded: Loaded, adapter: Adapter) -> Loaded:
    """The model with an adapter on its parameters, which are not copied.

    Args:
      loaded: its parameters may be quantised; it is not changed.
      adapter: for this model.

    Returns:
      The same with `LoRA` leaves, and the adapter's heads as `Trained` ones; heads that it brings
      are no longer `fresh`. Its `apply` needs `compress.apply` around it.

    Raises:
      FwError: the adapter is for another model, or the model has one already.

    >>> from fw.models.llama import LlamaConfig, llama
    >>> model = llama(LlamaConfig(30, 8, 2, 2, 16, num_key_value_heads=1))
    >>> shapes = jax.eval_shape(model.init, jax.random.key(0))
    >>> loaded = Loaded(model, jax.tree.map(lambda x: jnp.zeros(x.shape), shapes), labels=())
    >>> path = "stack/layers/attention/key/kernel"
    >>> name = Name(path, "model.layers.1.self_attn.k_proj.weight", True, (1,))
    >>> targets = (Target("model.layers.1.self_attn.k_proj", (name,), rank=1, scale=2.0),)
    >>> pair = jnp.ones((2, 8, 1)), jnp.ones((2, 1, 4))
    >>> tree = attach(loaded, Adapter({path: pair}, {}, targets, "{}")).variables["params"]
    >>> leaf = tree["stack"]["layers"]["attention"]["key"]["kernel"]
    >>> [float(jnp.mean(layer)) for layer in leaf.dense()]  # the first is not adapted
    [0.0, 2.0]
    """
    leaves = dict(named_leaves(loaded.variables)[0])
    found: dict[str, Any] = {}
    for path, own in by_parameter(adapter.targets).items():
        a, b = adapter.pairs[path]
        scaling = np.zeros((*a.shape[:-2], 1, 1), np.float32)
        for target, name in own:
            scaling[name.entry] = target.scale
        turned, leaf = not own[0][1].transposed, leaves.get(PARAMS + path)
        ends = (a.shape[-2], b.shape[-1])
        expected = (*a.shape[:-2], *(ends[::-1] if turned else ends))
        if isinstance(leaf, LoRA) or _shape(leaf) != expected:
            raise FwError(
                f"{path}: the adapter is for {expected}, got {_shape(leaf)} of "
                f"{type(leaf).__name__}; it goes with the model that it was loaded for, which has "
                "no other on it"
            )
        lengths = adapter.magnitudes.get(path)
        found[PARAMS + path] = adapter_trees.Adapter(a, b, scaling, lengths, turned)
    for path, head in adapter.heads.items():
        if (shape := _shape(leaves.get(PARAMS + path))) != head.shape:
            raise FwError(f"{path}: the adapter's is {head.shape}, the model's {shape}")
        found[PARAMS + path] = head
    try:
        variables = adapter_trees.attach(loaded.variables, found)
    except ValueError as error:
        raise FwError(str(error)) from None
    fresh = tuple(path for path in loaded.fresh if path not in adapter.heads)
    return dataclasses.replace(loaded, variables=variables, fresh=fresh)


def _shape(leaf: Any) -> tuple[int, ...]:
    return () if leaf is None else tuple(leaf.shape)


def merge(loaded: Loaded, adapter: Adapter | None = None) -> Loaded:
    """The model with an adapter's changes in its parameters, which stay where they are.

    Args:
      loaded: it is not changed. Kernels that are quantised become floats, with the adapter added to
        what the codes stand for.
      adapter: for this model; None if it is attached already.

    Raises:
      FwError: as `attach` does.
    """
    loaded = loaded if adapter is None else attach(loaded, adapter)
    return dataclasses.replace(loaded, variables=merged(loaded.variables))


def detach(loaded: Loaded, *, base: str | None = None) -> tuple[Loaded, Adapter]:
    """Take off what was trained: the model without it, and an adapter for `save_adapter`.

    Several parameters may be one layer in the files, whose parts have one A. Where theirs differ,
    the layer's A is all of them, side by side, and its B has a block for each. Layers of a stack
    whose scale is 0 are not adapted: the adapter lacks them.

    Args:
      loaded: with `LoRA` and `Trained` leaves, of `attach` or of `compress.lora`.
      base: the name of the model on the hub, for the config; PEFT does not need it.

    Raises:
      FwError: a leaf that is trained is no layer that the files have, nor in a head; or nothing is.
    """
    try:
        variables, adapters = adapter_trees.detach(loaded.variables)
    except ValueError as error:
        raise FwError(str(error)) from None
    plain = dataclasses.replace(loaded, variables=variables)
    own = {path.removeprefix(PARAMS): adapter for path, adapter in adapters.items()}
    low = {path: x for path, x in own.items() if isinstance(x, adapter_trees.Adapter)}
    whole = {path: x for path, x in own.items() if path not in low}
    if not low:
        raise FwError("no kernel of the model has an adapter; compress.lora gives it some")
    model, family = loaded.model, family_of(loaded)
    shapes = by_path(jax.eval_shape(model.init, jax.random.key(0)))
    layers, heads = modules(family, model.config, shapes, joined=model.config.task != "embedding")
    known = {name.path for names in layers.values() for name in names}
    if strange := sorted(low.keys() - known):
        raise FwError(f"{strange[0]}: is no layer that transformers' model has by itself")
    leaves = {p.removeprefix(PARAMS): x for p, x in named_leaves(variables)[0]}
    sides = _sides(layers, low, leaves)
    scales = gather({path: side.scaling for path, side in sides.items()})
    targets = []
    for module, names in sorted(layers.items()):
        if names[0].path in sides:
            rank = sides[names[0].path].a.shape[-1]
            # One for all names, as `_sides` leaves it.
            scale = float(scales[names[0].path][names[0].entry].reshape(()))
            if scale != 0:
                targets.append(Target(module, names, rank, scale))
    if not targets:
        raise FwError(
            f"{min(low)}: the scale of its adapter is 0, as that of all others, and the files have "
            "no such layers; the model is its base"
        )
    sides = {path: sides[path] for path in by_parameter(targets)}
    saved = {tensor.rpartition(".")[0] for tensor, name in heads.items() if name.path in whole}
    kept = {name.path for tensor, name in heads.items() if inside(tensor, sorted(saved))}
    if strange := sorted(whole.keys() - kept):
        raise FwError(f"{strange[0]}: is trained whole, but PEFT keeps heads only in that way")
    magnitudes = {p: side.magnitude for p, side in sides.items() if side.magnitude is not None}
    config = _config(targets, sorted(saved), base, dora=bool(magnitudes))
    adapter = Adapter(
        {path: (side.a, side.b) for path, side in sides.items()},  # type: ignore[misc]
        {path: _plain(leaves[path]) for path in sorted(kept)},
        tuple(targets),
        json.dumps(config, sort_keys=True),
        magnitudes,  # type: ignore[arg-type]
    )
    return plain, adapter


def _plain(leaf: Any) -> Any:
    return floats(leaf) if hasattr(leaf, "dense") else leaf


def _sides(
    layers: Mapping[str, tuple[Name, ...]],
    low: Mapping[str, adapter_trees.Adapter],
    leaves: Mapping[str, Any],
) -> dict[str, adapter_trees.Adapter]:
    """Adapters by path, those of parameters that are one layer in the files with one A."""
    found: dict[str, adapter_trees.Adapter] = {}
    for names in layers.values():
        paths = [name.path for name in names]
        if paths[0] in found or not any(path in low for path in paths):
            continue
        parts = [low.get(path) for path in paths]
        first = parts[0]
        if first is not None and all(part is not None and _alike(first, part) for part in parts):
            found |= {path: low[path] for path in paths}
        else:
            found |= zip(paths, _joined(parts, [leaves[path] for path in paths]), strict=True)
    return found


def _alike(x: adapter_trees.Adapter, y: adapter_trees.Adapter) -> bool:
    """Whether two have one A and one scale."""
    same = x is y or (
        x.a.shape == y.a.shape
        and jnp.array_equal(x.a, y.a)
        and jnp.array_equal(jnp.asarray(x.scaling), jnp.asarray(y.scaling))
    )
    return bool(same) and (x.magnitude is None) == (y.magnitude is None)


def _joined(
    parts: list[adapter_trees.Adapter | None], leaves: list[Any]
) -> list[adapter_trees.Adapter]:
    """A is the parts' A side by side; B of each has its rows at its own place, and zeros."""
    there = [part for part in parts if part is not None]
    wide = jnp.concatenate([jnp.asarray(part.a) for part in there], -1)
    lengths = any(part.magnitude is not None for part in there)
    # The scales are in B; 0 stays for layers of a stack that no part adapts.
    adapted = functools.reduce(jnp.logical_or, [jnp.asarray(part.scaling) != 0 for part in there])
    scaling = jnp.broadcast_to(adapted, (*wide.shape[:-2], 1, 1)).astype(jnp.float32)
    found, start = [], 0
    for part, leaf in zip(parts, leaves, strict=True):
        rank, rows = (0, None) if part is None else (part.a.shape[-1], part)
        b = jnp.zeros((*wide.shape[:-2], wide.shape[-1], leaf.shape[-1]), wide.dtype)
        magnitude = None
        if rows is not None:
            b = b.at[..., start : start + rank, :].set(jnp.asarray(rows.b) * rows.scaling)
        if lengths:
            own = b if rows is None else jnp.matmul(wide, b, precision=jax.lax.Precision.HIGHEST)
            changed = floats(leaf) if rows is None else floats(leaf) + own
            magnitude = jnp.linalg.norm(changed, axis=-2, keepdims=True)
            if rows is not None and rows.magnitude is not None:
                moved = jnp.asarray(rows.scaling) != 0
                magnitude = jnp.where(moved, rows.magnitude, magnitude)
        found.append(adapter_trees.Adapter(wide, b, scaling, magnitude))
        start += rank
    return found


def _config(
    targets: list[Target], saved: list[str], base: str | None, *, dora: bool
) -> dict[str, Any]:
    """`adapter_config.json`: the commonest rank and alpha, and patterns for the others."""
    ranks = {target.module: target.rank for target in targets}
    alphas = {target.module: _number(target.scale * target.rank) for target in targets}
    rank, alpha = (Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
    return {
        "alpha_pattern": {module: x for module, x in alphas.items() if x != alpha},
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": saved or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {module: x for module, x in ranks.items() if x != rank},
        "target_modules": [target.module for target in targets],
        "task_type": None,
        "use_dora": dora,
        "use_rslora": False,
    }


def _number(alpha: float) -> float:
    """A whole number where it is one but for the rounding of a float32."""
    return round(alpha) if abs(alpha - round(alpha)) < 1e-6 * alpha else alpha
