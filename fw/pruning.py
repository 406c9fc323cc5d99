"""Smaller models: what `compress.shrink` leaves of one, with a config that says so.

    found = compress.couplings(outputs(loaded.model), loaded.variables, batch)
    scores = compress.magnitude_scores(found, loaded.variables)
    kept = compress.choose_units(found, scores, parameters=0.5, among="**/layers/**")
    small = shrunk(loaded, compress.shrink(found, kept))

The result is a model like any other: it trains, exports, quantises, and is saved in the layout of
transformers, which reads it where its config can say the sizes.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

import compress
from compress.transform import named_leaves
from fw.errors import FwError, UnfitError
from fw.hub.families import FAMILIES
from fw.hub.folder import Loaded
from fw.lessons import partner
from fw.model import Model, Variables
from fw.models.modernbert import ModernBertConfig
from fw.models.resnet import REDUCTION

Shapes = Mapping[str, tuple[int, ...]]

UNREAD = "params/mask"
"""What a DINOv2 learns with and nothing reads, so that no function tells how wide it is."""

POOLED = ("params/pooler/kernel", "params/head/kernel", "params/words/dense/kernel")
"""Kernels between the states and a head, as wide as these on both sides by their configs."""

ROUNDS = 15
"""How often what is timed runs."""

TRIES = 7
"""Choices of units that are timed to meet a latency."""

SCORES = ("taylor", "activation", "magnitude")
"""What units can be judged by."""

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
      UnfitError: the transform is for another model, or no config of the family has such sizes.
    """
    try:
        variables, _ = transform(loaded.variables)
    except ValueError as error:
        raise UnfitError(str(error)) from error
    shapes = {path: tuple(leaf.shape) for path, leaf in named_leaves(variables)[0]}
    config = resized(loaded.model.config, shapes)
    model = FAMILIES[config.model_type].model(config)
    wanted = named_leaves(jax.eval_shape(model.init, jax.random.key(0)))[0]
    if UNREAD in shapes and not any(path == UNREAD for path, _ in wanted):
        params = {name: x for name, x in variables["params"].items() if f"params/{name}" != UNREAD}
        variables = {**variables, "params": params}
        del shapes[UNREAD]
    if more := sorted({*shapes} - {path for path, _ in wanted}):
        raise UnfitError(
            f"{more[0]}: is left, and no model of this family with these sizes has it, such as a "
            "projection between as many channels; take other units out"
        )
    for path, leaf in wanted:
        if shapes.get(path) != tuple(leaf.shape):
            raise UnfitError(
                f"{path}: {list(shapes.get(path, ()))} is left, and a model of this family whose "
                f"other sizes are these has {list(leaf.shape)}; shrink both alike, or neither"
            )
    return dataclasses.replace(loaded, model=model, variables=variables)


def check_budget(
    *,
    parameters: float | None = None,
    flops: float | None = None,
    latency: float | None = None,
    layers: int | None = None,
    by: str = SCORES[0],
    among: str = "",
    multiple: int = 1,
) -> None:
    """Refuses what `fw.stages.prune_run` cannot be asked for, before any model is read."""
    parts = {"parameters": parameters, "flops": flops, "latency": latency}
    given = {name: part for name, part in parts.items() if part is not None}
    if len(given) + (layers is not None) != 1:
        raise FwError("give parameters, flops or latency, the part that may stay, or layers")
    for name, part in given.items():
        if not 0 < part <= 1:
            raise FwError(f"{name} is {part}; expected the part that may stay, 0 to 1")
    if layers is not None and layers < 1:
        raise FwError(f"layers is {layers}; expected 1 or more")
    if by not in SCORES:
        raise FwError(f"by is {by!r}; expected one of {', '.join(SCORES)}")
    if multiple < 1:
        raise FwError(f"multiple is {multiple}; expected 1 or more")
    if layers is not None and (by != SCORES[0] or among or multiple != 1):
        raise FwError("layers stay evenly: by, among and multiple are for the other budgets")


def usual(found: compress.Couplings) -> str:
    """The pattern of dimensions that may shrink where nothing is said."""
    stacked = any(path.startswith(LAYERS) for path in found.shapes)
    return "**/layers/**" if stacked else "**"


def fewer_layers(found: compress.Couplings, count: int) -> dict[str, np.ndarray]:
    """Layers that stay, evenly, the last one among them: those that `fw.lessons.partner` says.

    A student so begun learns of the states of the very layers that it has
    (Sanh et al. 2019, arXiv:1910.01108).

    Args:
      found: of a model with a stack of layers.
      count: how many stay.

    Raises:
      ValueError: the model has no layers that can go, or not so many.
    """
    for name, d in found.dimensions.items():
        if d.layers is None and all(axis == 0 and p.startswith(LAYERS) for p, axis in d.members):
            if not 0 < count <= d.units:
                raise ValueError(f"layers is {count}; expected 1 to {d.units}")
            return {name: np.array([[partner(i, count, d.units) for i in range(count)]])}
    raise ValueError("layers: the model has no stack of equal layers; give parameters or flops")


def tied(
    found: compress.Couplings, scores: Mapping[str, np.ndarray], kept: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Units that stay, with what a pooler puts out as wide as what it takes in.

    The program need not have both alike; configs have one number for them.

    Args:
      found: of `compress.couplings`.
      scores: by dimension.
      kept: of `compress.choose_units`.
    """
    of = {place: name for name, d in found.dimensions.items() for place in d.members}
    new = dict(kept)
    for path in POOLED:
        both = {of[path, axis] for axis in (0, 1) if (path, axis) in of}
        if len(both) < 2 or not both & {*kept}:
            continue
        units = {name: found.dimensions[name].units for name in both}
        least = min(kept[name].shape[1] if name in kept else units[name] for name in both)
        for name in both:
            order = np.argsort(scores[name], axis=1, kind="stable")
            new[name] = np.sort(order[:, units[name] - least :], axis=1)
    return new


def part_of_time(
    loaded: Loaded, adapt: Callable[[Model], Model], found: compress.Couplings, batch: Any,
    kept: Mapping[str, np.ndarray],
) -> float:  # fmt: skip
    """How long a batch takes with fewer units, of the time that it takes with all.

    `adapt` makes of a model the one that takes such a batch.

    The median of `ROUNDS` pairs in turns, on the device that is there.
    """
    small = shrunk(loaded, compress.shrink(found, kept))

    def ready(own: Loaded) -> Callable[[], None]:
        call = jax.jit(outputs(adapt(own.model))).lower(own.variables, batch).compile()
        return lambda: jax.block_until_ready(call(own.variables, batch))

    runs, pairs = (ready(loaded), ready(small)), []
    for _ in range(ROUNDS + 1):  # the first one warms up
        marks = [time.perf_counter()]
        for run in runs:
            run()
            marks.append(time.perf_counter())
        pairs.append((marks[2] - marks[1]) / (marks[1] - marks[0]))
    return statistics.median(pairs[1:])


def within_time(
    part: float,
    choose: Callable[..., dict[str, np.ndarray]],
    time_of: Callable[[Mapping[str, np.ndarray]], float],
) -> dict[str, np.ndarray]:
    """The most units by FLOPs that take no more than a part of the time.

    Args:
      part: of the time, in (0, 1).
      choose: `choose(flops=part)`, of `compress.choose_units`.
      time_of: the part of the time that a choice takes.

    Raises:
      ValueError: not even the fewest units take so little.

    >>> few = lambda flops: {"w": np.arange(round(100 * flops))[None]}
    >>> within_time(0.5, few, lambda kept: 0.1 + 0.9 * kept["w"].shape[1] / 100)["w"].shape[1]
    44
    """
    if not 0 < part < 1:
        raise ValueError(f"latency is {part}; expected the part that may stay, in (0, 1)")
    low, high, flops, best, least, few = 0.0, 1.0, part, None, math.inf, ""
    for _ in range(TRIES):
        try:
            kept = choose(flops=flops)
        except ValueError as error:  # so few cannot stay
            low, few = flops, str(error)
        else:
            took = time_of(kept)
            least = min(least, took)
            if took <= part:
                low, best = flops, kept
            else:
                high = flops
        flops = (low + high) / 2
    if best is None and least == math.inf:
        raise ValueError(f"latency is {part}, but {few}")
    if best is None:
        raise ValueError(f"latency is {part}, but the least that was measured is {least:.3f}")
    return best


def resized(config: Any, shapes: Shapes) -> Any:
    """The config of a model whose variables have these shapes.

    Args:
      config: of the model as it was.
      shapes: by path.

    Raises:
      UnfitError: of this family no config can say other sizes.

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
        raise UnfitError(
            f"a {type(config).__name__} has no fields for what is left; expected a model of "
            f"{', '.join(_SIZES)}"
        )
    if any(path.startswith(f"{LAYERS}/0/") for path in shapes):
        raise UnfitError("layers are apart, and each could have its own sizes; load with scan=True")
    return dataclasses.replace(config, **_SIZES[kind](config, shapes))


def _encoder(
    size: str, layers: str, heads: str, inner: str, up: str = "up"
) -> Callable[[Any, Shapes], Any]:
    """Of encoders, whose configs name these four; `up` is the first kernel of an MLP."""

    def sizes(config: Any, shapes: Shapes) -> dict[str, Any]:
        count, width, wide = shapes[f"{LAYERS}/attention/query/kernel"]
        head = config.head if isinstance(config, ModernBertConfig) else config.shape.head
        return {
            size: width,
            layers: count,
            heads: wide // head,
            inner: shapes[f"{LAYERS}/{up}/kernel"][-1],
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


def _dinov2(config: Any, shapes: Shapes) -> dict[str, Any]:
    sizes = _BERT(config, shapes)
    inner = sizes.pop("intermediate_size")
    usual = inner == sizes["hidden_size"] * config.mlp_ratio
    mask = config.use_mask_token and shapes[UNREAD][-1] == sizes["hidden_size"]
    return {**sizes, "inner_size": None if usual else inner, "use_mask_token": mask}


def _resnet(config: Any, shapes: Shapes) -> dict[str, Any]:
    def out(path: str) -> int:
        return shapes[f"params/{path}/conv/kernel"][-1]

    blocks = [(stage, number) for stage, number, *_ in config.blocks()]
    units = 1 if config.layer_type == "basic" else 2
    inner = tuple(
        tuple(out(f"stages/{stage}/{number}/units/{i}") for i in range(units))
        for stage, number in blocks
    )
    stages = tuple(out(f"stages/{stage}/0/units/{units}") for stage in range(len(config.depths)))
    sizes = {"embedding_size": out("stem"), "hidden_sizes": stages}
    even = all(size % REDUCTION == 0 for size in stages) or units == 1
    usual = dataclasses.replace(config, **sizes, inner_sizes=None) if even else None
    same = usual is not None and inner == tuple(usual.inner(*block) for block in blocks)
    return {**sizes, "inner_sizes": None if same else inner}


def _unet(config: Any, shapes: Shapes) -> dict[str, Any]:
    def out(block: str) -> tuple[int, ...]:
        return tuple(shapes[f"params/{block}/convs/{i}/kernel"][-1] for i in range(2))

    above = range(config.depth)
    levels = tuple(
        (*out(f"downs/{i}"), shapes[f"params/rises/{i}/kernel"][-1], *out(f"ups/{i}"))
        for i in above
    )
    return {"channels": (*levels, out(f"downs/{config.depth}"))}


_BERT = _encoder("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_SIZES: Mapping[str, Callable[[Any, Shapes], dict[str, Any]]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "vit", "deit"), _BERT),
    "distilbert": _encoder("dim", "n_layers", "n_heads", "hidden_dim"),
    "dinov2": _dinov2,
    "modernbert": _encoder(
        "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "mlp/up"
    ),
    "resnet": _resnet,
    "unet": _unet,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _decoder),
}
