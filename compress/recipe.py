"""A recipe is data: a chain of transforms in TOML or JSON, to keep beside what it made.

    [[transforms]]
    transform = "smooth"
    rules = {"**/query/kernel" = 0.5}

    [[transforms]]
    transform = "quantize"
    rules = {"**/head/**" = "keep", "**/kernel" = {format = "int8", activations = "static"}}

The same recipe, parameters and statistics give the same arrays, bit for bit. A recipe for another
model is refused by the first rule that matches nothing.
"""

import json
import tomllib
from collections.abc import Mapping
from typing import Any

from compress.transform import Chain, Transform


def kinds() -> dict[str, type[Transform]]:
    """Transforms by the name that recipes know them by."""
    from compress.awq_scales import Awq
    from compress.gptq_solver import Gptq
    from compress.learned import Harden, Qat
    from compress.lowrank import Lowrank
    from compress.nearest import Quantize
    from compress.prepare import Rotate, Smooth
    from compress.prune import Prune
    from compress.shrink import Shrink
    from compress.trainable import Lora

    every = (Chain, Quantize, Smooth, Rotate, Awq, Gptq, Qat, Harden, Lora, Lowrank, Prune, Shrink)
    return {kind.name: kind for kind in every}


def dumps(transform: Transform) -> str:
    """A transform as JSON.

    >>> from compress import quantize
    >>> print(dumps(quantize({"**/kernel": "int4"})))  # doctest: +ELLIPSIS
    {
      "transform": "quantize",
      "rules": {
        "**/kernel": {
    ...
    """
    return json.dumps(transform.data(), indent=2)


def loads(text: str) -> Transform:
    """Read a recipe of TOML or JSON.

    Args:
        text: a transform's fields with its name as "transform", or a list of such as "transforms".

    Raises:
        ValueError: it is neither, or a transform, field or value is unknown.

    >>> t = loads('transforms = [{transform = "quantize", rules = {"**/kernel" = "int8"}}]')
    >>> loads(dumps(t)) == t
    True
    """
    try:
        data = json.loads(text) if text.lstrip().startswith("{") else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"recipe: neither TOML nor JSON: {error}") from None
    return of_data(data)


def of_data(data: Any) -> Transform:
    """The transform of such fields as `Transform.data` gives.

    Raises:
        ValueError: as `loads`.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"recipe: expected a transform's fields, got {type(data).__name__}")
    fields = dict(data)
    if "transforms" in fields:
        name, inner = fields.pop("transform", Chain.name), fields.pop("transforms")
        if name != Chain.name or fields or not isinstance(inner, list) or not inner:
            raise ValueError("recipe: 'transforms' is a list of one transform or more, alone")
        return Chain(tuple(map(of_data, inner)))
    name = fields.pop("transform", None)
    kind = kinds().get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"recipe: transform {name!r}: expected one of {', '.join(kinds())}")
    try:
        return kind.of_data(fields)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"recipe: {name}: {error}") from None
