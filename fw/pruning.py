"""Smaller models: what `compress.shrink` leaves of one, with a config that says so.

    found = compress.couplings(outputs(loaded.model), loaded.variables, batch)
    scores = compress.magnitude_scores(found, loaded.variables)
    kept = compress.choose_units(found, scores, parameters=0.5, among="**/layers/**")
    small = shrunk(loaded, compress.shrink(found, kept))

The result is a model like any other: it trains, exports, quantises, and is saved in the layout of
transformers, which reads it where its config can say the sizes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

import compress
from compress.transform import named_leaves
from fw.errors import FwError
from fw.hub.families import FAMILIES
from fw.hub.folder import Loaded
from fw.model import Model, Variables

Shapes = Mapping[str, tuple[int, ...]]

LAYERS = "params/stack/layers"
"""Where the layers of a stack are."""


def outputs(model: Model) -> Callable[[Variables, Any], Any]:
    """The function of variables and a batch whose dimensions may shrink.

    >>> from fw.models.bert import BertConfig, bert
    >>> model = bert(BertConfig(30, 8, 3, 2, 16, num_labels=2, task="token_classification"))
    >>> variables = jax.eval_shape(model.init, jax.random.key(0))
    >>> ids = jax.ShapeDtypeStruct((2, 6), "int32")
    >>> batch = {name: ids for name in ("input_ids", "segment_ids", "position_ids")}
    >>> found = compress.couplings(outputs(model), variables, batch)
    >>> found.units["params/stack/layers/down/kernel:1"]
    16
    """
    return lambda variables, batch: model.apply(variables, batch)[0]


def shrunk(loaded: Loaded, transform: compress.Shrink) -> Loaded:
    """The model that a transform leaves of one.

    Args:
      loaded: with its layers in a stack, as `fw.hub.load(scan=True)` reads them.
      transform: of `compress.shrink`, for `loaded.variables`.

    Returns:
      A model of a config with its own sizes, and its parameters where the larger ones lay.

    Raises:
      FwError: the transform is for another model, or no config of the family has such sizes.
    """
    try:
        variables, _ = transform(loaded.variables)
    except ValueError as error:
        raise FwError(str(error)) from error
    shapes = {path: tuple(leaf.shape) for path, leaf in named_leaves(variables)[0]}
    config = resized(loaded.model.config, shapes)
    model = FAMILIES[config.model_type].model(config)
    wanted = jax.eval_shape(model.init, jax.random.key(0))
    for path, leaf in named_leaves(wanted)[0]:
        if shapes.get(path) != tuple(leaf.shape):
            raise FwError(
                f"{path}: {list(shapes.get(path, ()))} is left, and a model of this family whose "
                f"other sizes are these has {list(leaf.shape)}; shrink both alike, or neither"
            )
    return dataclasses.replace(loaded, model=model, variables=variables)


def resized(config: Any, shapes: Shapes) -> Any:
    """The config of a model whose variables have these shapes.

    Args:
      config: of the model as it was.
      shapes: by path.

    Raises:
      FwError: of this family no config can say other sizes.

    >>> from fw.models.bert import BertConfig, bert
    >>> config = BertConfig(30, 8, 3, 2, 16, num_labels=2, task="token_classification")
    >>> model = bert(dataclasses.replace(config, num_hidden_layers=2, intermediate_size=12))
    >>> leaves = named_leaves(jax.eval_shape(model.init, jax.random.key(0)))[0]
    >>> small = resized(config, {path: leaf.shape for path, leaf in leaves})
    >>> small.num_hidden_layers, small.intermediate_size
    (2, 12)
    """
    kind = getattr(config, "model_type", "")
    if kind not in _SIZES:
        raise FwError(
            f"a {type(config).__name__} has no fields for what is left; expected a model of "
            f"{', '.join(_SIZES)}"
        )
    if f"{LAYERS}/attention/query/kernel" not in shapes:
        raise FwError("layers are apart, and each could have its own sizes; load with scan=True")
    return dataclasses.replace(config, **_SIZES[kind](config, shapes))


def _encoder(size: str, layers: str, heads: str, inner: str) -> Callable[[Any, Shapes], Any]:
    """Of encoders, whose configs name these four."""

    def sizes(config: Any, shapes: Shapes) -> dict[str, Any]:
        count, width, wide = shapes[f"{LAYERS}/attention/query/kernel"]
        head = config.shape.head
        return {
            size: width,
            layers: count,
            heads: wide // head,
            inner: shapes[f"{LAYERS}/up/kernel"][-1],
            "head_size": None if wide == width and width % head == 0 else head,
        }

    return sizes


def _decoder(config: Any, shapes: Shapes) -> dict[str, Any]:
    count, width, wide = shapes[f"{LAYERS}/attention/query/kernel"]
    return {
        "hidden_size": width,
        "num_hidden_layers": count,
        "num_attention_heads": wide // config.size,
        "num_key_value_heads": shapes[f"{LAYERS}/attention/key/kernel"][-1] // config.size,
        "head_dim": config.size,
        "intermediate_size": shapes[f"{LAYERS}/mlp/up/kernel"][-1],
    }


_BERT = _encoder("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_SIZES: Mapping[str, Callable[[Any, Shapes], dict[str, Any]]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "vit", "deit"), _BERT),
    "distilbert": _encoder("dim", "n_layers", "n_heads", "hidden_dim"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _decoder),
}
