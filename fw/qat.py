"""Training through the rounding: kernels learn to be codes, and their scales how far to step.

    learning = learned(loaded.model, loaded.variables["params"], "int4")
    state = initial_state({**loaded.variables, "params": learning.params}, tx, mesh)
    step = make_step(learning.model, loss, tx, mesh=mesh, rules=rules)
    small, report = learning.harden(state.variables["params"])

The parameters of `learning.model` are plain floats, of a kernel its weight and the logarithms of
its scales, so that gradients, optimisers, checkpoints and meshes need not know. Its function is
that of the codes (`compress.qat`), activations included where these are rounded, too.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax

import compress
from compress.learned import Learned
from compress.scheme import Scheme
from compress.transform import Report, Transform, named_leaves
from fw.compression import grouped, tables
from fw.errors import FwError
from fw.model import Model, Variables
from fw.table_optimizer import at, nest
from sharding import undifferentiated

WEIGHT, SCALE = "weight", "log_scale"

FORMATS: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {
        "int8": lambda params: Scheme("int8"),
        "int8-weights": lambda params: Scheme("int8", activations="float"),
        "int4": lambda params: grouped(params, lambda per: Scheme("int4", per=per)),
    }
)
"""Rules of `compress.qat` for some parameters, as the recipes of these names have it."""


@dataclass(frozen=True)
class QatOptions:
    """The option of a run that trains through the rounding.

    Attributes:
      qat: train kernels as what they are to be rounded to, "int8" (activations, too),
        "int8-weights" or "int4"; the codes go to compressed/ in the run.
    """

    qat: str = ""

    def __post_init__(self):
        """Checks it."""
        if self.qat and self.qat not in FORMATS:
            raise FwError(f"qat {self.qat!r} is unknown; choose one of {', '.join(FORMATS)}")


@dataclass(frozen=True)
class Learning:
    """A model that learns to be rounded.

    Attributes:
      model: its parameters are floats.
      params: with which it begins, where the mesh had the model's.
      harder: the transform that makes codes of what was learned, tables in int8 with it.
    """

    model: Model
    params: Any
    harder: Transform
    _schemes: Mapping[str, Scheme]

    def harden(self, params: Any) -> tuple[Any, Report]:
        """What was learned, as codes under the model's own paths, and a record of every leaf."""
        return self.harder(_join(params, self._schemes))


def learned(model: Model, params: Any, format: str) -> Learning:
    """A model whose kernels learn to be rounded.

    Args:
      model: any; its kernels are those that `fw compress --recipe FORMAT` would round.
      params: of it.
      format: of `FORMATS`.

    Raises:
      FwError: it has no kernel that the format fits, or tables that are trained by rows.

    Source: Esser et al. 2020, arXiv:1902.08153.

    >>> from fw.models.bert import BertConfig, bert
    >>> model = bert(BertConfig(30, 8, 1, 2, 16, num_labels=2, task="token_classification"))
    >>> learning = learned(model, model.init(jax.random.key(0))["params"], "int8")
    >>> sorted(learning.params["classifier"]["kernel"])
    ['log_scale', 'weight']
    """
    if model.tables:
        raise FwError(
            f"qat: tables that are trained by rows, {sorted(model.tables)}, are not for it"
        )
    try:
        small, _ = compress.qat(FORMATS[format](params))(params)
        found = {path: x for path, x in named_leaves(small)[0] if isinstance(x, Learned)}
        if not found:
            raise ValueError(f"the model has no kernel that {format} fits")
        own = "float" if format != "int8" else "dynamic"
        coded = tables(params, Scheme("int8", activations=own))
        harder = compress.harden()
        if coded:
            harder = compress.chain(harder, compress.quantize(coded))
    except ValueError as error:
        raise FwError(f"qat: {error}") from error
    schemes = {path: x.scheme for path, x in found.items()}
    shapes = {path: (x.weight.shape, x.log_scale.shape) for path, x in found.items()}

    def apply(
        variables: Variables, batch: Any, *, key: jax.Array | None = None, train: bool = False
    ) -> tuple[Any, Variables]:
        own = {**variables, "params": _join(variables["params"], schemes)}

        def inner(own: Variables, batch: Any, key: Any) -> Any:
            return model.apply(own, batch, key=key, train=train)

        with undifferentiated():
            outputs, new = compress.apply(inner)(own, batch, key)
        return outputs, {**variables, **new, "params": variables["params"]}

    def init(key: jax.Array) -> Variables:
        variables = model.init(key)
        new, _ = compress.qat(FORMATS[format](variables["params"]))(variables["params"])
        return {**variables, "params": _split(new)}

    def axes_of(path: str) -> Any:
        names = at(model.axes["params"], path)
        if path not in shapes:
            return names
        whole, scale = shapes[path]
        cut = (name if n == m else None for name, n, m in zip(names, whole, scale, strict=True))
        return {WEIGHT: names, SCALE: tuple(cut)}

    paths = [path for path, _ in named_leaves(params)[0]]
    axes = {**model.axes, "params": nest({path: axes_of(path) for path in paths})}
    trained = dataclasses.replace(model, init=init, apply=apply, axes=axes)
    return Learning(trained, _split(small), harder, schemes)


def _split(params: Any) -> Any:
    """Floats, of `Learned` leaves two by name."""
    found = {
        path: {WEIGHT: x.weight, SCALE: x.log_scale} if isinstance(x, Learned) else x
        for path, x in named_leaves(params)[0]
    }
    return nest(found)


def _join(params: Any, schemes: Mapping[str, Scheme]) -> Any:
    """The inverse of `_split`."""
    found = {}
    for path, leaf in named_leaves(params)[0]:
        parent, _, name = path.rpartition("/")
        if parent not in schemes:
            found[path] = leaf
        elif name == WEIGHT:
            found[parent] = Learned(leaf, at(params, f"{parent}/{SCALE}"), schemes[parent])
    return nest(found)
