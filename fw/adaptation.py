"""Fine-tuning of which little is trained: thin changes of frozen kernels, and what is new.

    options = LoraOptions(lora=8, lora_base="nf4")
    loaded = hub.load(folder, mesh=mesh, rules=rules, become=coded(options))
    adapted = adapt(loaded, options)
    step = make_step(adapted.trained.model, loss, tx, mesh=mesh, rules=rules)
    state = initial_state(adapted.trained.variables, tx, mesh)
    state, metrics = step(state, batch, adapted.frozen)
    plain = hub.merge(adapted.tuned(state.variables))

The parameters of `adapted.trained` are the adapters (`compress.lora`) and the new head, so that
gradients, the optimiser's state and checkpoints are of these alone; all else is its third
collection of variables, "frozen", floats or codes.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

import compress
from compress import adapter_trees
from compress.arrays import sharding_of
from compress.formats import FORMATS
from compress.nearest import USUAL, with_role
from compress.scheme import Scheme, core, fit, role_of, unfit
from compress.trainable import INITS, Lora
from compress.transform import Report, match, named_leaves
from fw.errors import FwError
from fw.hub.folder import Loaded
from fw.model import FROZEN, Model, Variables
from fw.options import parted
from fw.precision import policy
from fw.table_optimizer import at, nest
from sharding import shardings, undifferentiated
from sharding.parallel.pipeline import PIPE

LEARNING_RATE = 1e-3
"""Of adapters where nothing is said, at its peak."""

SCALE = {"uniform": 8.0, "eva": 2.0}
"""alpha / rank where nothing is said, by how A begins. Uniform numbers are small, within 1/√in:
with a smaller scale B has to grow by a rate that tears A (scripts/bench/LOG.md)."""


TABLE = "int8"
"""The format of frozen tables where kernels are codes; each row has a scale."""


@dataclass(frozen=True)
class LoraOptions:
    """The options of a run that trains adapters.

    Attributes:
      lora: rank of the change of every dense kernel; kernels and all else but new heads are frozen.
        0 trains everything.
      lora_alpha: the change is scaled by this / rank; 0 for eight times the rank, with eva twice.
      lora_on: patterns of the kernels that are changed, as in "**/query/kernel,**/value/kernel";
        nothing: every dense one.
      lora_whole: patterns of what is trained whole beside new heads, such as "pooler/*".
      lora_init: of A: "uniform", or "eva", the directions in which a kernel's inputs are largest.
      dora: the lengths of a kernel's columns are trained apart from their directions.
      lora_base: format of the frozen kernels, such as nf4 or int8, beside which tables of words are
        int8; nothing: floats as they are.
    """

    lora: int = 0
    lora_alpha: float = 0.0
    lora_on: str = ""
    lora_whole: str = ""
    lora_init: str = "uniform"
    dora: bool = False
    lora_base: str = ""

    def __post_init__(self):
        """Checks them."""
        if self.lora < 0:
            raise FwError(f"lora is {self.lora}; expected a rank, or 0 to train everything")
        if not self.lora_alpha >= 0:
            raise FwError(f"lora_alpha is {self.lora_alpha}; expected 0 or more")
        if self.lora_init not in INITS:
            known = ", ".join(INITS)
            raise FwError(f"lora_init {self.lora_init!r} is unknown; choose one of {known}")
        for field in dataclasses.fields(LoraOptions):
            name, given = field.name, getattr(self, field.name)
            if not self.lora and name != "lora" and given != field.default:
                raise FwError(f"{name} is for adapters; give --lora a rank, such as 8, too")
        if both := sorted({*parted(self.lora_on)} & {*parted(self.lora_whole)}):
            raise FwError(f"{both[0]!r} is in lora_on and in lora_whole; expected it in one")
        if self.lora_base and self.lora_init == "eva":
            raise FwError("lora_init eva is of what meets floats; leave lora_base or it away")
        if self.lora_base and self.lora_base not in FORMATS:
            known = ", ".join(FORMATS)
            raise FwError(f"lora_base {self.lora_base!r} is unknown; choose one of {known}")


@dataclass(frozen=True)
class Adapted:
    """A model of which adapters and new heads are trained.

    Attributes:
      trained: what trains, as a model: its parameters are A and B by name under the path of each
        kernel, and arrays that are trained whole; its `apply` takes variables with a third
        collection, `frozen`.
      frozen: that collection: the other parameters, kernels among them.
      share: of all numbers, those that are trained.
      left: kernels that the rank or the format does not fit, and what they stay, in words.
    """

    trained: Loaded
    frozen: Any
    share: float
    left: tuple[str, ...]
    _base: Loaded
    _parts: "_Parts"

    def whole(self, variables: Variables) -> Variables:
        """Variables of training with the frozen collection, as `trained.model.apply` takes them."""
        return {**variables, FROZEN: self.frozen}

    def tuned(self, variables: Variables) -> Loaded:
        """The model that was adapted, with `LoRA` and `Trained` leaves in its parameters.

        Args:
          variables: of training.

        Returns:
          What `fw.hub.merge` and `fw.hub.detach` take.
        """
        params = self._parts.join(variables["params"], self.frozen)
        return dataclasses.replace(self._base, variables={**variables, "params": params})


@dataclass(frozen=True)
class _Parts:
    """What is known of adapters beside their arrays: how to take them off and put them on."""

    transform: Lora
    scaling: float
    trained: frozenset[str]

    def split(self, params: Any, stats: Any = None) -> tuple[Any, Any]:
        """Parameters of the model to (what is trained, what is frozen)."""
        base, adapters = adapter_trees.detach(self.transform(params, stats)[0])
        return nest({path: _arrays(adapter) for path, adapter in adapters.items()}), base

    def join(self, trained: Any, frozen: Any) -> Any:
        """The parameters, with `LoRA` and `Trained` leaves."""
        adapters = {}
        for path, _ in named_leaves(frozen)[0]:
            if path in self.trained:
                found = at(trained, path)
                low = isinstance(found, Mapping)
                adapters[path] = (
                    adapter_trees.Adapter(**found, scaling=self.scaling) if low else found
                )
        return adapter_trees.attach(frozen, adapters)


def _arrays(adapter: Any) -> Any:
    if not isinstance(adapter, adapter_trees.Adapter):
        return adapter
    found = {"a": adapter.a, "b": adapter.b}
    return found if adapter.magnitude is None else {**found, "magnitude": adapter.magnitude}


def coded(options: LoraOptions) -> Callable[[str, jax.Array], Any]:
    """What a parameter of the base becomes, by its path: kernels `lora_base`, tables int8.

    `fw.hub.load` takes it, so that floats are never there of more than one parameter. A stack's
    layers are coded one after another: what is computed on the way has the size of one.

    >>> become = coded(LoraOptions(lora=2, lora_base="int8"))
    >>> become("dense/kernel", jnp.eye(4)).values.dtype.name, become("dense/bias", jnp.ones(4)).ndim
    ('int8', 1)
    """

    whole = parted(options.lora_whole)

    def become(path: str, leaf: jax.Array) -> Any:
        kernel = match(USUAL, path)
        if any(match(pattern, path) for pattern in whole):
            return leaf
        if not options.lora_base or (not kernel and role_of(path, leaf.shape) != "table"):
            return leaf
        format = options.lora_base if kernel else TABLE
        scheme = with_role(path, leaf, Scheme(format, activations="float"))
        if unfit(leaf, scheme, scheme.role):
            return leaf
        where = sharding_of(leaf)
        new, finite = by_layer(leaf, scheme)
        # Of shapes alone, in a trace, nothing is known of numbers.
        if not isinstance(finite, Tracer) and not finite:
            raise FwError(f"{path}: holds NaN or infinity; expected the weights of a model")
        return new if where is None else jax.device_put(new, new.place(where))

    return become


@functools.partial(jax.jit, static_argnames="scheme")
def by_layer(leaf: jax.Array, scheme: Scheme) -> tuple[compress.Quantized, jax.Array]:
    """An array as codes, and whether it was finite; a stack's layers one after another."""
    assert scheme.role is not None
    stack = leaf.shape[: -core(scheme.role)]
    layers = leaf.reshape(-1, *leaf.shape[len(stack) :])
    role = scheme.role
    new, finite = jax.lax.map(lambda w: (fit(w, scheme, role), jnp.isfinite(w).all()), layers)
    return jax.tree.map(lambda x: x.reshape(*stack, *x.shape[1:]), new), finite.all()


def transform(loaded: Loaded, options: LoraOptions, *, seed: int = 0) -> Lora:
    """What `adapt` does to parameters, which says whether it needs statistics of what meets them.

    Args:
      loaded, options, seed: as in `adapt`.
    """
    alpha = options.lora_alpha or SCALE[options.lora_init] * options.lora
    whole, on = parted(options.lora_whole), parted(options.lora_on) or (USUAL,)
    # What a pattern names already has no rule of its own: one that comes too late is an error.
    fresh = [path for path in loaded.fresh if not any(match(p, path) for p in whole)]
    rules = {**dict.fromkeys((*whole, *fresh), "train"), **dict.fromkeys(on, options.lora)}
    # Not strict: kernels of convolutions, or thinner than the rank, stay as they are: `left`.
    return Lora(
        tuple(rules.items()), strict=False, alpha=alpha, dora=options.dora, seed=seed,
        init=options.lora_init,
    )  # fmt: skip


def check_images(precision: str) -> None:
    """Refuses narrow activations beside what is frozen of a model of images, which stays float32.

    Raises:
      FwError: a precision whose activations are narrow.

    >>> check_images("bf16")
    """
    if policy(precision).activations:
        raise FwError(
            f"precision {precision}: adapters of image models train beside what is float32; choose "
            "bf16 or f32"
        )


def adapt(
    loaded: Loaded, options: LoraOptions, *, seed: int = 0, stats: compress.Stats | None = None
) -> Adapted:
    """Freezes a model but for low-rank changes of its dense kernels, and for what is new in it.

    Args:
      loaded: of `fw.hub.load`, with or without `coded(options)`; parameters that are `fresh` are
        trained whole, too.
      options: rank, scale, and what the frozen kernels become.
      seed: of A.
      stats: of `fw.compression.calibrated(transform(loaded, options), ...)`; for eva.

    Returns:
      The model to train. Its function is at first that of the base, in the format it is kept in.

    Raises:
      FwError: no kernel takes the rank or the format, or the mesh lays layers in stages.

    Source: Hu et al. 2021, arXiv:2106.09685; over codes, Dettmers et al. 2023, arXiv:2305.14314.

    >>> from fw.models.bert import BertConfig, bert
    >>> model = bert(BertConfig(30, 8, 1, 2, 16, num_labels=2, task="token_classification"))
    >>> loaded = Loaded(model, model.init(jax.random.key(0)), labels=("O", "B-x"),
    ...                 fresh=("classifier/kernel", "classifier/bias"))
    >>> adapted = adapt(loaded, LoraOptions(lora=2))
    >>> sorted(adapted.trained.variables["params"]), f"{adapted.share:.2f}"
    (['classifier', 'stack'], '0.05')
    """
    mesh = loaded.mesh
    if mesh is not None and mesh.shape.get(PIPE, 1) > 1:
        raise FwError(f"lora: layers in stages are not adapted; give a mesh without {PIPE}")
    leaves, tree = named_leaves(loaded.variables["params"])
    become = coded(options)
    ready = [compress.is_compressed(x) or path in loaded.fresh for path, x in leaves]
    kept = [x if done else become(path, x) for done, (path, x) in zip(ready, leaves, strict=True)]
    params = jax.tree.unflatten(tree, kept)
    codes = [path for (path, _), x in zip(leaves, kept, strict=True) if compress.is_compressed(x)]
    if options.lora_base and not any(match(USUAL, path) for path in codes):
        raise FwError(f"lora: the model has no kernel that {options.lora_base} is for")
    chosen = transform(loaded, options, seed=seed)
    try:
        small, report = jax.eval_shape(chosen, params, stats)
        adapters = jax.eval_shape(lambda params: adapter_trees.detach(params)[1], small)
        if not any(isinstance(x, adapter_trees.Adapter) for x in adapters.values()):
            raise FwError("lora: the model has no dense kernel; train it whole")
        assert chosen.alpha is not None
        parts = _Parts(chosen, chosen.alpha / options.lora, frozenset(adapters))
        trained, base = parts.split(params, stats)
    except ValueError as error:
        raise FwError(f"lora: {str(error).removeprefix('lora: ')}") from error
    # What the model's own `init` makes has no statistics.
    bare_parts = dataclasses.replace(parts, transform=dataclasses.replace(chosen, init="uniform"))
    model = _adapted(loaded.model, bare_parts)
    # Copies: a step is donated its state, and the frozen tree has the heads as they were.
    variables = {**loaded.variables, "params": jax.tree.map(jnp.copy, trained)}
    if mesh is not None and loaded.rules is not None:
        lie = shardings(model.axes, variables, mesh, loaded.rules)
        variables = jax.device_put(variables, lie)
    share = compress.trainable_share(small)
    learnt = dataclasses.replace(loaded, model=model, variables=variables)
    bare = dataclasses.replace(loaded, variables={})  # keeps no floats that became codes
    return Adapted(learnt, base, share, _left(base, report, options), bare, parts)


def _left(base: Any, report: Report, options: LoraOptions) -> tuple[str, ...]:
    found = []
    for (path, leaf), record in zip(named_leaves(base)[0], report, strict=True):
        kernel, (kept, _, why) = match(USUAL, path), record.applied.partition(": ")
        if kernel and kept == "kept" and not (options.lora_on and why == "no rule"):
            found.append(f"{path}: not adapted: {why}")
        # Norms and biases are of no account; experts, say, are.
        matrix = role_of(path, leaf.shape) is not None or leaf.ndim > 2
        coded = compress.is_compressed(leaf) or record.applied == "trained"
        if options.lora_base and matrix and not coded:
            why = f"{options.lora_base} is not for its shape" if kernel else "it is no dense kernel"
            found.append(f"{path}: stays floats: {why}")
    return tuple(found)


def _adapted(model: Model, parts: _Parts) -> Model:
    def init(key: jax.Array) -> Variables:
        variables = model.init(key)
        return {**variables, "params": parts.split(variables["params"])[0]}

    def apply(
        variables: Variables, batch: Any, *, key: jax.Array | None = None, train: bool = False
    ) -> tuple[Any, Variables]:
        params = parts.join(variables["params"], variables[FROZEN])
        inner = compress.apply(functools.partial(model.apply, train=train))
        with undifferentiated():
            outputs, new = inner({"params": params, "state": variables["state"]}, batch, key=key)
        return outputs, {**variables, "state": new["state"]}

    def names(path: str) -> Any:
        of, arrays = at(model.axes["params"], path), at(shapes, path)
        if not isinstance(arrays, Mapping):
            return of
        *stack, n_in, n_out = of
        each = {"a": (n_in, None), "b": (None, n_out), "magnitude": (None, n_out)}
        return {name: (*stack, *each[name]) for name in arrays}

    shapes = jax.eval_shape(init, jax.random.key(0))["params"]
    axes = {**model.axes, "params": nest({path: names(path) for path in sorted(parts.trained)})}
    return dataclasses.replace(model, init=init, apply=apply, axes=axes)
