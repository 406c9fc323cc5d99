"""Recipes by name, and what they are calibrated on: the library's side of `compress`.

`fw compress RUN --recipe int8` takes a recipe of `RECIPES`, or a file that `compress.recipe` reads.
What it was is saved with what it made, and in the artifact's manifest.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

import compress
from compress.nearest import USUAL, Quantize
from compress.scheme import Scheme, inputs, role_of
from compress.transform import named_leaves
from fw.errors import FwError

LIMIT = 1 << 20
"""Bytes of a recipe's file, checked before it is read."""

GROUP = 128
"""Elements that share a scale of 4-bit codes, at most."""


def grouped(params: Any, scheme: Callable[[str | int], Scheme]) -> dict[str, Scheme]:
    """Rules for every usual kernel: groups of `GROUP`, or of the largest number that divides it.

    Args:
      params: the tree, or its `jax.eval_shape`.
      scheme: of what shares a scale, a group's size or "channel".

    >>> tree = {"up": {"kernel": jax.ShapeDtypeStruct((576, 8), "float32")}}
    >>> grouped(tree, lambda per: Scheme("int4", per=per))["up/kernel"].per
    96
    """
    rules = {}
    for path, leaf in named_leaves(params)[0]:
        role = role_of(path, leaf.shape)
        if path.rpartition("/")[2] != "kernel" or role is None:
            continue
        size = leaf.shape[inputs(role)[-1]]
        group = next(n for n in range(min(GROUP, size), 0, -1) if size % n == 0)
        if size % 2 == 0:
            rules[path] = scheme(group if group >= 16 else "channel")
    return rules


def tables(params: Any, scheme: Scheme) -> dict[str, Scheme]:
    """Rules for every table of embeddings, each of whose rows has a scale.

    Args:
      params: the tree, or its `jax.eval_shape`.
      scheme: of all of them.

    >>> tree = {"word": {"embedding": jax.ShapeDtypeStruct((576, 8), "float32")}}
    >>> list(tables(tree, Scheme("int8")))
    ['word/embedding']
    """
    leaves = named_leaves(params)[0]
    return {path: scheme for path, leaf in leaves if role_of(path, leaf.shape) == "table"}


def _int8(params: Any, **kernels: Any) -> Quantize:
    """Tables and usual kernels; those that no code fits stay as they are.

    >>> towers = {"items": {"table": jax.ShapeDtypeStruct((576, 8), "float32")}}
    >>> [path for path, _ in _int8(towers).rules]
    ['items/table']
    """
    activations = kernels.get("activations", "dynamic")
    # What is looked up meets no activations, so that a static scale is never found for it.
    own = "dynamic" if activations == "static" else activations
    rules = tables(params, Scheme("int8", activations=own))
    names = {path.rpartition("/")[2] for path, _ in named_leaves(params)[0]}
    if not rules or "kernel" in names:  # a rule that matches nothing is an error
        rules[USUAL] = Scheme("int8", **kernels)
    return Quantize(tuple(rules.items()), strict=False)


def _int4(
    params: Any, transform: Callable[[dict[str, Scheme]], compress.Transform]
) -> compress.Transform:
    """Kernels in int4, by one transform; tables, of which rows are all that is read, in int8."""
    kernels = transform(grouped(params, lambda per: Scheme("int4", per=per)))
    others = tables(params, Scheme("int8", activations="float"))
    return compress.chain(kernels, compress.quantize(others)) if others else kernels


RECIPES: Mapping[str, tuple[str, Callable[[Any], compress.Transform]]] = {
    "int8": (
        "tables in int8, and weights and activations of products, these row by row",
        _int8,
    ),
    "int8-weights": (
        "tables and weights in int8, activations as they are",
        lambda params: _int8(params, activations="float"),
    ),
    "int8-static": (
        "int8, with the scales of activations that lose least in calibration",
        lambda params: _int8(params, activations="static", calibration="mse"),
    ),
    "int4": (
        "weights in int4 by GPTQ, a scale for at most 128 neighbours; tables in int8",
        lambda params: _int4(params, compress.gptq),
    ),
    "int4-nearest": (
        "the same, rounded to nearest",
        lambda params: _int4(params, compress.quantize),
    ),
}
"""Name -> what it is, and the transform for some parameters."""


TAKEN = ("f32", "bf16", *RECIPES)
"""Names of variants that no file of a recipe may have."""

LEARNED = "-learned"
"""What the names of variants end with that were learnt through the rounding (`fw.qat`)."""


def recipe(name: str, params: Any) -> tuple[str, compress.Transform]:
    """A recipe by its name or file, and what to call what it makes.

    Args:
      name: of `RECIPES`, or a path to a TOML or JSON file.
      params: what it will be applied to.

    Raises:
      FwError: there is no such name or file, or the file is no recipe.
    """
    if name in RECIPES:
        return name, RECIPES[name][1](params)
    path = Path(name)
    if path.suffix not in (".toml", ".json"):
        raise FwError(
            f"recipe {name!r}: expected one of {', '.join(RECIPES)}, or a .toml or .json file"
        )
    named = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", path.stem)
    if not named or path.stem in TAKEN or path.stem.endswith(LEARNED):
        raise FwError(
            f"{path}: its stem {path.stem!r} is to name what it makes: letters, digits and, after "
            f"the first, '_', '-' and '.', but none of {', '.join(TAKEN)}, nor with {LEARNED} at "
            "its end; rename it"
        )
    try:
        if path.stat().st_size > LIMIT:
            raise FwError(f"{path}: has more than {LIMIT} bytes; expected a recipe")
        return path.stem, compress.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise FwError(f"{path}: cannot be read: {error}") from error
    except ValueError as error:
        raise FwError(f"{path}: {error}") from error


def calibrated(
    transform: compress.Transform,
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
) -> Any:
    """The statistics that a transform needs, of some batches, or None if it needs none.

    Args:
      transform: says what it needs.
      apply: `(params, batch) -> outputs`.
      params: uncompressed.
      batches: to run it on.
    """
    patterns = transform.hessians()
    if not transform.observes() and not patterns:
        return None
    call = jax.jit(compress.observe(apply, hessians=patterns))
    stats: Any = None
    for batch in batches:
        _, seen = call(params, batch)
        stats = seen if stats is None else compress.merge_stats(stats, seen)
    return stats
