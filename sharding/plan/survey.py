"""What a function computes, keeps and reads, counted from its jaxpr with the turns of its loops.

One trace on a mesh of one device serves all layouts: where arrays are cut is in the specs of its
arguments and of its `constrain`s, which name mesh axes and not their sizes. `analytic` makes
seconds and bytes of it.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jax.sharding import NamedSharding

from sharding.layout import paths
from sharding.rules import mesh_axes

Cuts = tuple[tuple[str, ...], ...]
"""The mesh axes that cut each axis of an array."""
NONE: Mapping[int, str] = MappingProxyType({})

SEES = re.compile(r"sees_(\d+(?:\.\d+)?)")
"""The share of its products that a kernel of attention does, in the name of its scope."""
PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated")
# What passes an argument on as it is, for who asks which product reads which parameter.
_SAME = {
    *("convert_element_type", "reshape", "transpose", "squeeze", "copy", "copy_p", "slice"),
    *("dynamic_slice", "expand_dims", "name", "sharding_constraint", "optimization_barrier"),
    *("broadcast_in_dim", "pvary", "reduce_precision", "layout_constraint", "stop_gradient"),
}


@dataclass(frozen=True)
class Argument:
    """One array that goes in.

    Attributes:
        path: where it stands in the arguments.
        shape, dtype: of the whole.
        cuts: the mesh axes that cut each of its axes.
        kind: what it is to the step; see `kind_of`.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    cuts: Cuts
    kind: str

    @property
    def bytes(self) -> int:
        """Of the whole."""
        return int(math.prod(self.shape) * _itemsize(self.dtype))


@dataclass(frozen=True)
class Kept:
    """An array that a loop keeps of each turn, or that its body makes.

    Attributes:
        bytes: of the whole.
        cuts: the mesh axes that cut it.
        shape: of the whole.
        dtype: of its elements.
    """

    bytes: int
    cuts: frozenset[str]
    shape: tuple[int, ...] = ()
    dtype: str = ""


@dataclass
class Survey:
    """What a function does in one call.

    Attributes:
        arguments: what goes in.
        dense: products and sums of its products without batch axes; `batched` of those with, and
            of kernels.
        moved: bytes that its products read and write.
        uses: by argument's number, how often a product reads it, loops' turns not multiplied.
        rows: by argument's number, bytes of what is looked up in it, at most at once; `looked` of
            all that is read and written so.
        summed: products whose sum runs over an axis that a mesh axis cuts: (mesh axis, bytes of the
            result, cuts of the result, turns).
        kept: what loops keep of their turns.
        body: what is alive at once within the hungriest loop body.
        turns: of the longest loop that has products of parameters.
        batch: the mesh axes that cut rows.
        said: shapes that the function says how to cut, with the cuts.
    """

    arguments: list[Argument] = field(default_factory=list)
    dense: float = 0.0
    batched: float = 0.0
    moved: float = 0.0
    uses: dict[int, int] = field(default_factory=dict)
    rows: dict[int, int] = field(default_factory=dict)
    looked: float = 0.0
    summed: list[tuple[str, int, frozenset[str], int]] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    body: list[Kept] = field(default_factory=list)
    turns: int = 1
    batch: tuple[str, ...] = ()
    said: dict[tuple[int, ...], Cuts] = field(default_factory=dict)

    @property
    def flops(self) -> float:
        """All of them."""
        return self.dense + self.batched


def kind_of(path: str, kinds: Mapping[int, str] = NONE) -> str:
    """What an array that goes into a training step is, by its path.

    Args:
        path: the number of its argument, and where it stands in that.
        kinds: of all arrays of an argument, by its number; they need not be guessed.

    >>> kind_of("0/variables/params/norm/scale"), kind_of("0/optimizer/0/mu/norm/scale")
    ('parameters', 'optimizer')
    >>> kind_of("2/norm/scale", {2: "frozen"})
    'frozen'
    """
    number = path.partition("/")[0]
    if number.isdecimal() and int(number) in kinds:
        return kinds[int(number)]
    if "optimizer" in path or "opt_state" in path or "/mu/" in path or "/nu/" in path:
        return "optimizer"
    if "params" in path or "variables" in path or path.startswith("0/"):
        return "parameters"
    return "batch"


def survey(fn: Callable[..., Any], args: Sequence[Any], kinds: Mapping[int, str] = NONE) -> Survey:
    """Trace a function and count.

    Args:
        fn: any function; its model says what its activations are with `constrain`, within a scope.
        args: `jax.ShapeDtypeStruct`s with shardings.
        kinds: of arguments, as `kind_of` takes them.

    >>> x = jax.ShapeDtypeStruct((8, 16), "float32")
    >>> w = jax.ShapeDtypeStruct((3, 16, 16), "float32")
    >>> layers = lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]
    >>> survey(layers, (x, w)).dense == 3 * 2 * 8 * 16 * 16
    True
    """
    args = tuple(args)
    closed = jax.make_jaxpr(fn)(*args)
    leaves = jax.tree.leaves(args)
    found = Survey()
    for path, leaf in zip(paths(args), leaves, strict=True):
        kind = kind_of(path, kinds)
        found.arguments.append(
            Argument(path, tuple(leaf.shape), str(leaf.dtype), _cuts(leaf), kind)
        )
    # Rows are what most mesh axes cut, until the function says more.
    found.batch = max((a.cuts[0] for a in found.arguments if a.cuts), key=len, default=())
    walk = _Walk(found)
    walk.notice(closed.jaxpr)
    origins = {v: k for k, v in enumerate(closed.jaxpr.invars)}
    walk.run(closed.jaxpr, origins, 1)
    return found


def _cuts(leaf: Any) -> Cuts:
    sharding = getattr(leaf, "sharding", None)
    spec = tuple(sharding.spec) if isinstance(sharding, NamedSharding) else ()
    return tuple(map(mesh_axes, spec)) + ((),) * (len(leaf.shape) - len(spec))


class _Walk:
    def __init__(self, found: Survey):
        self.found = found
        self.specs: dict[tuple[int, ...], frozenset[str]] = {}
        self._seen: set[Any] = set()

    def notice(self, jaxpr: Any) -> None:
        """Remembers how arrays of a shape are cut, wherever the function says so."""
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "sharding_constraint":
                sharding = eqn.params["sharding"]
                if isinstance(sharding, NamedSharding):
                    cuts = tuple(map(mesh_axes, sharding.spec))
                    axes = frozenset(a for entry in cuts for a in entry)
                    shape = tuple(eqn.invars[0].aval.shape)
                    self.specs.setdefault(shape, axes)
                    self.found.said.setdefault(shape, cuts)
                    if cuts and len(cuts[0]) > len(self.found.batch):
                        self.found.batch = cuts[0]
            for inner in _inner(eqn):
                self.notice(inner)

    def cuts(self, shape: tuple[int, ...]) -> frozenset[str]:
        """Of an array of this shape, the layers' axis before it or not; rows, where it is new."""
        for skip in (0, 1, 2):
            if shape[skip:] in self.specs:
                return self.specs[shape[skip:]]
        merged = {math.prod(s): c for s, c in self.specs.items()}
        for skip in (0, 1):
            if (size := math.prod(shape[skip:])) in merged:
                return merged[size]
        return frozenset(self.found.batch)

    def run(self, jaxpr: Any, origins: dict[Any, int], times: int) -> dict[Any, int]:
        """Counts a program's equations; who the variables are goes along."""
        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            into = [origins.get(v) if isinstance(v, core.Var) else None for v in eqn.invars]
            if name in PRODUCTS:
                self._product(eqn, into, times)
            elif name in ("gather", "scatter") and into[0] is not None and _is_table(eqn):
                self._rows(eqn, into[0], times)
            elif name == "pallas_call" or "fmha" in name or name == "dot_product_attention_fwd":
                self._kernel(eqn, times)
            elif name == "scan":
                self._scan(eqn, into, times)
            elif name == "cond":
                branches = [_open(b) for b in eqn.params["branches"]]
                flops = [_flops(b) for b in branches]
                self._call(eqn, branches[int(np.argmax(flops))], into[1:], origins, times)
            elif name == "while":
                body = _open(eqn.params["body_jaxpr"])
                skip = eqn.params["cond_nconsts"]
                self._call(eqn, body, into[skip:], origins, times)
            elif inner := [*_inner(eqn)]:
                own = into if len(inner[0].invars) == len(into) else into[-len(inner[0].invars) :]
                self._call(eqn, inner[0], own, origins, times)
            elif name in _SAME and into and into[0] is not None:
                origins[eqn.outvars[0]] = into[0]
            elif name == "gather" and into[0] is not None and eqn.invars[0].aval.ndim > 2:
                origins[eqn.outvars[0]] = into[0]  # kernels of experts, picked for their rows
        return origins

    def _call(self, eqn: Any, inner: Any, into: list, origins: dict, times: int) -> None:
        given = {v: o for v, o in zip(inner.invars, into, strict=False) if o is not None}
        after = self.run(inner, given, times)
        for mine, theirs in zip(eqn.outvars, inner.outvars, strict=False):
            if isinstance(theirs, core.Var) and theirs in after:
                origins[mine] = after[theirs]

    def _scan(self, eqn: Any, into: list, times: int) -> None:
        inner, length = _open(eqn.params["jaxpr"]), eqn.params["length"]
        given = {v: o for v, o in zip(inner.invars, into, strict=True) if o is not None}
        self.run(inner, given, times * length)
        # Which are stacked is told by their shapes: how JAX counts what is carried has changed.
        pairs = zip(eqn.outvars, inner.outvars, strict=True)
        stacked = [o.aval for o, i in pairs if o.aval.shape == (length, *i.aval.shape)]
        known = {a.shape for a in self.found.arguments}
        for aval in stacked:  # a gradient or a parameter's copy is counted with its parameter
            if aval.shape not in known and math.prod(aval.shape) > 1:
                self.found.kept.append(self._kept(aval))
        body = self._alive(inner)
        if sum(k.bytes for k in body) > sum(k.bytes for k in self.found.body):
            self.found.body, self.found.turns = body, length

    def _kept(self, aval: Any) -> Kept:
        size = int(math.prod(aval.shape) * _itemsize(str(aval.dtype)))
        return Kept(size, self.cuts(tuple(aval.shape)), tuple(aval.shape), str(aval.dtype))

    def _alive(self, jaxpr: Any) -> list[Kept]:
        """The arrays of a loop's body that are alive when most bytes are, what goes in left out."""
        last: dict[Any, int] = {}
        for number, eqn in enumerate(jaxpr.eqns):
            for v in eqn.invars:
                if isinstance(v, core.Var):
                    last[v] = number
        alive: dict[Any, int] = {}
        most, best = 0, []
        total = 0
        for number, eqn in enumerate(jaxpr.eqns):
            for v in eqn.outvars:
                if v in last:
                    alive[v] = int(math.prod(v.aval.shape) * _itemsize(str(v.aval.dtype)))
                    total += alive[v]
            if total > most:
                most, best = total, [*alive]
            for v in {v for v in eqn.invars if isinstance(v, core.Var)}:
                if last.get(v) == number and v in alive:
                    total -= alive.pop(v)
        found = []
        for v in best:
            found.append(self._kept(v.aval))
        return found

    def _product(self, eqn: Any, into: list, times: int) -> None:
        lhs, rhs = (v.aval for v in eqn.invars[:2])
        out = eqn.outvars[0].aval
        flops, batched = _one(eqn)
        # Attention has no kernels; experts have, one for each entry of a batch axis.
        if batched and all(origin is None for origin in into[:2]):
            self.found.batched += times * flops
        else:
            self.found.dense += times * flops
        sizes = sum(math.prod(a.shape) * min(2, _itemsize(str(a.dtype))) for a in (lhs, rhs, out))
        self.found.moved += times * sizes
        for origin in into[:2]:
            if origin is not None:
                self.found.uses[origin] = self.found.uses.get(origin, 0) + 1
        if eqn.primitive.name == "ragged_dot_general":
            return
        contract = _summed_axes(eqn)
        for side, origin in enumerate(into[:2]):
            if origin is None:
                continue
            argument = self.found.arguments[origin]
            shape = (lhs, rhs)[side].shape
            lead = len(argument.shape) - len(shape)
            for axis in contract[side]:
                size = shape[axis]
                ends = zip(argument.cuts[lead:], argument.shape[lead:], strict=False)
                for place, (cut, whole) in enumerate(ends):
                    if whole == size and "tensor" in cut:
                        result = math.prod(out.shape) * 2
                        one = ("tensor", result, self.cuts(tuple(out.shape)) - {"tensor"}, times)
                        # Products that share what they are summed into are summed once.
                        key = (*one, size, place)
                        if key not in self._seen:
                            self._seen.add(key)
                            self.found.summed.append(one)

    def _rows(self, eqn: Any, origin: int, times: int) -> None:
        """Rows of a table, read or written: those alone are moved."""
        aval = (eqn.outvars[0] if eqn.primitive.name == "gather" else eqn.invars[2]).aval
        size = math.prod(aval.shape) * _itemsize(str(aval.dtype))
        self.found.looked += 2 * times * size
        self.found.rows[origin] = max(self.found.rows.get(origin, 0), int(size))

    def _kernel(self, eqn: Any, times: int) -> None:
        seen = SEES.search(str(eqn.source_info.name_stack))
        share = float(seen[1]) if seen else 1.0
        shapes = [v.aval.shape for v in eqn.invars if len(getattr(v.aval, "shape", ())) >= 3]
        large = max(shapes, key=math.prod, default=())
        if len(large) < 3:
            return
        heads = math.prod(large[:-2])
        length, size = max(large[-2:]), min(large[-2:])
        name = str(eqn.params.get("name_and_src_info", eqn.params.get("name", "")))
        products = 3 if "dq" in name else 4 if "dkv" in name else 2
        self.found.batched += times * 2 * products * heads * length**2 * size * share


def _summed_axes(eqn: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    numbers = eqn.params["dimension_numbers"]
    if eqn.primitive.name == "dot_general":
        return numbers[0]
    return numbers.lhs_spec[1:2], numbers.rhs_spec[1:2]  # the channels that come in


def _is_table(eqn: Any) -> bool:
    return eqn.invars[0].aval.ndim == 2


def _one(eqn: Any) -> tuple[int, bool]:
    """Products and sums of one equation, and whether it has batch axes."""
    lhs, rhs = (v.aval for v in eqn.invars[:2])
    out = math.prod(eqn.outvars[0].aval.shape)
    if eqn.primitive.name == "conv_general_dilated":
        numbers = eqn.params["dimension_numbers"]
        features = rhs.shape[numbers.rhs_spec[0]]
        return 2 * out * math.prod(rhs.shape) // max(features, 1), False
    if eqn.primitive.name == "ragged_dot_general":
        return ragged_flops(lhs.shape, rhs.shape, eqn.outvars[0].aval.shape), False
    (contract, _), (batch, _) = eqn.params["dimension_numbers"]
    return 2 * out * math.prod(lhs.shape[axis] for axis in contract), bool(batch)


def ragged_flops(*shapes: tuple[int, ...]) -> int:
    """Products and sums of uneven groups: of [m, k], [groups, k, n], [m, n] two make the third.

    >>> ragged_flops((8, 4), (2, 4, 3), (8, 3)) == 2 * 8 * 4 * 3
    True
    """
    groups = next((shape[0] for shape in shapes if len(shape) == 3), 1)
    return 2 * math.isqrt(math.prod(map(math.prod, shapes)) // groups)


def _flops(jaxpr: Any) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in PRODUCTS:
            total += _one(eqn)[0]
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        total += sum(times * _flops(inner) for inner in _inner(eqn))
    return total


def _inner(eqn: Any) -> Iterator[Any]:
    """The programs that an equation holds."""
    if eqn.primitive.name == "pallas_call":
        return
    for key, value in eqn.params.items():
        if key in ("fwd_jaxpr_thunk", "jvp_jaxpr_thunk", "bwd", "fwd"):
            continue
        for one in value if isinstance(value, tuple | list) else (value,):
            if hasattr(one, "eqns") or hasattr(one, "jaxpr"):
                yield _open(one)


def _open(program: Any) -> Any:
    return program.jaxpr if hasattr(program, "jaxpr") else program


def _itemsize(dtype: str) -> float:
    if dtype.startswith("key"):
        return 8
    if dtype in ("int4", "uint4", "float4_e2m1fn"):
        return 0.5
    return jax.numpy.dtype(dtype).itemsize
