"""Numerical precision as a transform of a function, applied from outside the model.

A model is written in plain `jnp` and runs in the dtype of its parameters. `apply(fn, "bf16")`
traces it and replaces each dot product by a mixed-precision one: operands rounded to bfloat16,
products accumulated in float32, result in float32; gradients likewise. Convolutions of images
become those of `fw.convolve`, under the policy of dense layers. Parameters stay float32 (master
weights), as do norms, softmax and everything else that is neither.

The file also knows, and is the only one that does, which dots are fast on a CPU: XLA sends them to
YNNPACK, which wants row-major operands. A weight gradient contracts the leading axis of both, falls
off that path and runs 5x slower, so the smaller operand is transposed first.

Functions that bring their own derivative (`custom_vjp`, `custom_jvp`) are kept as they are: whoever
writes a derivative by hand has decided on its numerics.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend import core, source_info_util

from compress.programs import Values, as_closed, is_program, run, traced
from fw.convolve import How, convolve
from fw.errors import FwError
from sharding import current
from sharding.mesh import platform
from sharding.parallel.travel import moved


@dataclass(frozen=True)
class Policy:
    """What the dots of a function compute in.

    Attributes:
      name: the name users give (`--precision`).
      weights: dtype of the operands of dots without batch axes (dense layers), and of
        convolutions; None leaves them.
      batched: the same for dots with batch axes (attention). Left alone by default: on a CPU some
        batched bfloat16 dots do not run at all, and TPUs and GPUs already multiply float32
        operands of these in one reduced-precision pass.
      precision: `jax.lax.Precision` of dots and convolutions that keep their dtype.
      activations: dtype of all that flows between operations; None leaves it. Parameters and
        batches are rounded to it before they are used, their gradients come back as they are.
        Models keep what they sum over (norms, softmax, losses) in float32.
    """

    name: str
    weights: str | None = None
    batched: str | None = None
    precision: lax.Precision | None = None
    activations: str | None = None


POLICIES = {
    # HIGHEST: an f32 dot is f32 on every backend. TPUs and GPUs default to less (jax#7010).
    "f32": Policy("f32", precision=lax.Precision.HIGHEST),
    "bf16": Policy("bf16", weights="bfloat16"),
    "bf16_activations": Policy(
        "bf16_activations", weights="bfloat16", batched="bfloat16", activations="bfloat16"
    ),
}


def policy(name: str | Policy) -> Policy:
    """Returns the policy of that name, or the policy itself.

    >>> policy("bf16").weights
    'bfloat16'
    """
    if isinstance(name, Policy):
        return name
    if name not in POLICIES:
        raise FwError(f"precision {name!r} is unknown; choose one of {', '.join(POLICIES)}")
    return POLICIES[name]


def apply[R](fn: Callable[..., R], precision: str | Policy) -> Callable[..., R]:
    """Returns `fn` with every dot product and convolution computed under a precision policy.

    Args:
      fn: any function of pytrees of arrays that JAX can trace. May hold `jit`, `scan`, `cond`,
        `while_loop` and `checkpoint`; may be jitted and differentiated in reverse afterwards.
      precision: "f32", "bf16", or a `Policy`.

    Returns:
      A function with the signature, shapes and dtypes of `fn`.

    >>> dense = lambda x, w: x @ w
    >>> x, w = jnp.full((2, 3), 1 / 3), jnp.ones((3, 4))
    >>> float(apply(dense, "bf16")(x, w)[0, 0])  # 1/3 has 8 significant bits now
    1.001953125
    >>> apply(dense, "bf16")(x, w).dtype
    dtype('float32')
    """
    chosen = policy(precision)
    inner = _apply(fn, chosen)
    if not chosen.activations:
        return inner

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> R:
        def widened(y: Any) -> Any:
            return y.astype(np.float32) if getattr(y, "dtype", None) == chosen.activations else y

        return jax.tree.map(widened, inner(*args, **kwargs))

    return wrapped


def _apply[R](fn: Callable[..., R], chosen: Policy) -> Callable[..., R]:
    """`apply`, but that activations come out in the dtype in which they flow."""

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> R:
        # For functions that bring their own derivative and ask JAX, such as ring attention.
        others = "highest" if chosen.precision == lax.Precision.HIGHEST else "default"
        if chosen.activations:
            args, kwargs = _narrowed((args, kwargs), chosen.activations)
        with _applied(chosen), jax.default_matmul_precision(others):
            program = traced(fn, args, kwargs)
        return program.result(_evaluate(program.closed, chosen, program.arrays))

    return wrapped


def _narrowed(args: Any, dtype: str) -> Any:
    """Floats in float32, rounded; of a model's variables its parameters alone.

    A state, such as a batch norm's averages, changes by less each step than rounding would.
    """

    def round_(x: Any) -> Any:
        return x.astype(dtype) if getattr(x, "dtype", None) == np.float32 else x

    def is_variables(x: Any) -> bool:
        return isinstance(x, Mapping) and {*x} >= {"params", "state"}

    def one(x: Any) -> Any:
        if is_variables(x):
            return {**x, "params": jax.tree.map(round_, x["params"])}
        return round_(x)

    return jax.tree.map(one, args, is_leaf=is_variables)


# JAX's own context variable, part of the key of its caches.
_applied = jax.make_user_context(None)


def here[R](fn: Callable[..., R]) -> Callable[..., R]:
    """Returns `fn` under the policy that is being applied to the function which calls this.

    For a function that is about to be mapped over an axis of weights, such as experts or stages:
    mapped, its dense layers look like attention, which policies leave alone. And for one that is
    given to a function with its own derivative. Outside `apply`, `fn` itself.

    Args:
      fn: as for `apply`.

    >>> here(len) is len
    True
    """
    return fn if _applied.value is None else _apply(fn, _applied.value)


def operands() -> str | None:
    """The dtype of dense layers' operands, under the policy that is being applied to the caller.

    None: as they are.

    >>> apply(lambda x: print(operands()) or x, "bf16")(jnp.ones(1))
    bfloat16
    Array([1.], dtype=float32)
    """
    return None if _applied.value is None else _applied.value.weights


def activations() -> str | None:
    """The dtype of what flows between operations, under the policy that is applied to the caller.

    None: as it is. For a model that makes floats of what is none, such as images of bytes.

    >>> apply(lambda x: print(activations()) or x, "bf16_activations")(jnp.ones(1))
    bfloat16
    Array([1.], dtype=float32)
    """
    return None if _applied.value is None else _applied.value.activations


def _evaluate(closed: Any, chosen: Policy, args) -> list:
    """Runs a jaxpr equation by equation, with the dots replaced."""
    values = Values(closed, args)
    for eqn in closed.jaxpr.eqns:
        name = eqn.primitive.name
        # Replayed where it was written: tracebacks and compiled programs name the model's lines.
        stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
        with source_info_util.user_context(eqn.source_info.traceback, name_stack=stack):
            if name == "dot_general":
                lhs, rhs = values.read(eqn.invars)
                out = [_dot(lhs, rhs, eqn.params, chosen)]
            elif name == "ragged_dot_general":
                lhs, rhs, sizes = values.read(eqn.invars)
                out = [_ragged(lhs, rhs, sizes, chosen)]
            elif name == "conv_general_dilated":
                lhs, rhs = values.read(eqn.invars)
                out = [_convolution(lhs, rhs, eqn.params, chosen)]
            elif name == "all_gather" and _rounded_afterwards(eqn, closed.jaxpr, chosen):
                (x,) = values.read(eqn.invars)
                out = [_gather(x, tuple(eqn.params.items()), chosen.weights)]
            elif name in ("jit", "pjit"):
                out = _evaluate(eqn.params["jaxpr"], chosen, values.read(eqn.invars))
            elif name == "shard_map":
                out = _shard_map(eqn.params, chosen)(*values.read(eqn.invars))
            elif name in _CONTROL:
                out = run(eqn.replace(params=_rebuild(eqn.params, chosen)), values)
            else:
                out = run(eqn, values)
        values.write(eqn, out)
    return values.results()


# The equations that hold programs of their own, and are rebuilt around the transformed program.
_CONTROL = ("scan", "while", "cond", "checkpoint", "remat2")


def _shard_map(params: Any, chosen: Policy) -> Callable:
    """The same `shard_map` of the transformed function: only there are its axes bound."""
    manual = "newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"  # jax 0.11
    return jax.shard_map(
        lambda *args: _evaluate(as_closed(params["jaxpr"]), chosen, args),
        mesh=params["mesh"],
        in_specs=tuple(params["in_specs"]),
        out_specs=list(params["out_specs"]),
        axis_names=set(params[manual]),
        check_vma=params["check_vma"],
    )


def _rounded_afterwards(eqn: Any, jaxpr: Any, chosen: Policy) -> bool:
    """Whether a gathered operand goes into dense layers' dots alone, which round it."""
    (x,) = eqn.invars
    gathered = set(eqn.outvars)
    used = [e for e in jaxpr.eqns if gathered & {v for v in e.invars if isinstance(v, core.Var)}]
    return bool(
        chosen.weights
        and jnp.issubdtype(x.aval.dtype, jnp.floating)
        and not gathered & set(jaxpr.outvars)
        and all(e.primitive.name == "dot_general" for e in used)
        and not any(any(e.params["dimension_numbers"][1]) for e in used)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x, params, dtype):
    """Rounded before it travels, not after: half the bytes. Gradients come back as they are."""

    return moved(lambda x: lax.all_gather_p.bind(x, **dict(params)), x, dtype)


def _gather_bwd(params, dtype, like, g):
    (back,) = jax.linear_transpose(lambda x: lax.all_gather_p.bind(x, **dict(params)), like)(g)
    return (back,)


_gather.defvjp(lambda x, params, dtype: (_gather(x, params, dtype), x), _gather_bwd)


def _rebuild(value: Any, chosen: Policy) -> Any:
    """The parameters of an equation, or one of them, with the jaxprs in it transformed."""
    if isinstance(value, dict):
        return {k: _rebuild(v, chosen) for k, v in value.items()}
    if isinstance(value, tuple | list) and any(map(is_program, value)):
        return type(value)(_rebuild(v, chosen) for v in value)
    if not is_program(value):
        return value
    closed = as_closed(value)
    new = jax.make_jaxpr(lambda *a: _evaluate(closed, chosen, a))(*closed.in_avals)
    return new if closed is value else new.jaxpr


def _dot(lhs, rhs, params, chosen: Policy):
    (lc, rc), (lb, rb) = params["dimension_numbers"]
    target = chosen.batched if lb else chosen.weights
    floating = all(jnp.issubdtype(x.dtype, jnp.floating) for x in (lhs, rhs))
    if floating and lhs.dtype == rhs.dtype == target:
        # Nothing to round, nor to lay out; but of wide results, the gradients that come back, which
        # a TPU rounds as it multiplies and a GPU does not.
        here, wide = _platform(), _result(lhs, rhs, params) != target
        if here == "tpu" or (here not in (None, "cpu") and not wide):
            return lax.dot_general_p.bind(lhs, rhs, **params)
    if floating and not lb and target:
        out = (*_rest(lhs.shape, lc), *_rest(rhs.shape, rc))
        rows, columns = (math.prod(_rest(y.shape, c)) for y, c in ((lhs, lc), (rhs, rc)))
        size = math.prod(lhs.shape[i] for i in lc)
        # A transpose is pinned: folded into a dot, of its gradient too, it would take that off the
        # fast path, where a bfloat16 dot fails at run time.
        x = _moved(lhs, lc, range(lhs.ndim - len(lc), lhs.ndim)).reshape(rows, size)
        if tuple(rc) == tuple(range(rhs.ndim - len(rc), rhs.ndim)):  # an embedding's, tied
            product = _batched(x, rhs.reshape(columns, size), True, target, None)
        else:
            product = _matmul(x, _moved(rhs, rc, range(len(rc))).reshape(size, columns), target)
        return product.reshape(out).astype(_result(lhs, rhs, params))
    regular = lb == rb == tuple(range(len(lb))) and lb and len(lc) == 1 == lhs.ndim - len(lb) - 1
    if floating and regular and rhs.ndim == lhs.ndim and lc[0] == lhs.ndim - 1:
        dtype = _result(lhs, rhs, params)
        across = rc[0] == rhs.ndim - 1
        return _batched(lhs, rhs, across, target or str(dtype), chosen.precision).astype(dtype)
    if floating and target:
        lhs, rhs = lhs.astype(target), rhs.astype(target)
    params = {**params, "preferred_element_type": _result(lhs, rhs, params)}
    if floating and chosen.precision is not None:
        params["precision"] = (chosen.precision, chosen.precision)
    return lax.dot_general_p.bind(lhs, rhs, **params)


_TILES = {"ragged_dot_tiling": "512,1024,1024"}
_TILES_OF_SUMS = {"ragged_dot_tiling": "512,512,1024"}
"""What a TPU's kernel for products of uneven groups takes at a time: rows, sum and columns. Its own
choice reads the experts again for each 128 rows, which the memory is too slow for; larger tiles do
not fit a v5e's fast memory."""


def _ragged(lhs, rhs, sizes, chosen: Policy):
    """`lax.ragged_dot`, which has rows in groups and a matrix for each group, under a policy."""
    return _of_groups(lhs, rhs, sizes, chosen.weights or str(lhs.dtype), chosen.precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _of_groups(lhs, rhs, sizes, dtype, precision):
    with set_xla_metadata(**_TILES):
        return lax.ragged_dot(
            lhs.astype(dtype), rhs.astype(dtype), sizes, precision=precision,
            preferred_element_type=lhs.dtype,
        )  # fmt: skip


def _of_groups_bwd(dtype, precision, saved, g):
    lhs, rhs, sizes = saved
    of_rows = _of_groups(g, jnp.swapaxes(rhs, 1, 2), sizes, dtype, precision).astype(lhs.dtype)
    sums = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())  # aᵀ · b of each group
    with set_xla_metadata(**_TILES_OF_SUMS):
        of_kernels = lax.ragged_dot_general(
            lhs.astype(dtype), g.astype(dtype), sizes, sums, precision=precision,
            preferred_element_type=rhs.dtype,
        )  # fmt: skip
    return of_rows, of_kernels, None


_of_groups.defvjp(lambda *args: (_of_groups(*args), args[:3]), _of_groups_bwd)


def _platform() -> str | None:
    """What the program is for, if that is known."""
    here = current()
    return None if here is None else platform(here[0])


# Of images [B, H, W, C] and kernels [H, W, in, out].
_IMAGES = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def _convolution(x, kernel, params, chosen: Policy):
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return lax.conv_general_dilated_p.bind(x, kernel, **params)
    spread = {*params["lhs_dilation"], *params["rhs_dilation"], params["batch_group_count"]}
    if params["dimension_numbers"] == _IMAGES and spread == {1}:
        how = How(
            params["window_strides"], tuple(params["padding"]), params["feature_group_count"],
            chosen.weights, chosen.precision,
        )  # fmt: skip
        return convolve(x, kernel, how).astype(_result(x, kernel, params))
    if chosen.weights:
        x, kernel = (a.astype(chosen.weights).astype(a.dtype) for a in (x, kernel))
    if chosen.precision is not None:
        params = {**params, "precision": (chosen.precision, chosen.precision)}
    return lax.conv_general_dilated_p.bind(x, kernel, **params)


def _moved(x, source, to):
    return x if tuple(source) == tuple(to) else _row_major(jnp.moveaxis(x, source, to))


def _rest(shape, axes):
    return tuple(n for i, n in enumerate(shape) if i not in axes)


def _result(lhs, rhs, params):
    return params["preferred_element_type"] or jnp.result_type(lhs.dtype, rhs.dtype)


# jax 0.11 compiles bfloat16 dots for a CPU that then fail as they run (DotThunk: UNIMPLEMENTED).
_BF16_DOTS_ON_CPU = jax.__version_info__ >= (0, 12)


def _accumulate(a, b, contract, batch=((), ()), precision=None):
    wide = np.promote_types(a.dtype, np.float32)

    def dot(a, b):
        return lax.dot_general(
            a, b, (contract, batch), precision=precision, preferred_element_type=wide
        )

    if a.dtype == wide or _BF16_DOTS_ON_CPU:
        return dot(a, b)
    # The same numbers: products of two bfloat16 are exact in float32.
    return lax.platform_dependent(
        a, b, cpu=lambda a, b: dot(a.astype(wide), b.astype(wide)), default=dot
    )


def _row_major(x):
    """On a CPU, pins x's last axis as the fastest in memory; a no-op elsewhere.

    A transpose before it becomes a copy. `optimization_barrier` would not do: the compiler turns
    the transpose into a layout.
    """
    if not isinstance(x, Tracer):  # of an array that is there, nothing is folded
        return x
    order = Layout(major_to_minor=tuple(range(x.ndim)))
    return lax.platform_dependent(
        x, cpu=lambda a: with_layout_constraint(a, order), default=lambda a: a
    )


def _contract_leading(a, b, precision=None):
    """aᵀ b for a [..., K, M], b [..., K, N] → [..., M, N], the smaller operand transposed."""
    if math.prod(a.shape) > math.prod(b.shape):
        # Pinned before and after: folded into the dot, this transpose would take it off the fast
        # path again, where it fails at run time (DotThunk: BF16 x BF16 = F32 UNIMPLEMENTED).
        return _row_major(jnp.swapaxes(_row_major(_contract_leading(b, a, precision)), -1, -2))
    n = a.ndim - 2
    batch = (tuple(range(n)),) * 2
    return _accumulate(_row_major(jnp.swapaxes(a, -1, -2)), b, ((n + 1,), (n,)), batch, precision)


def _rounded(x, dtype):
    """Pinned: a transpose or gather that made x may be folded into the dot, and that then fails."""
    return _row_major(x.astype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x, w, dtype):
    """x [M, K] · w [K, N] → float32 [M, N] from operands rounded to `dtype`."""
    # Not pinned: an artifact holds no layouts.
    return _accumulate(x.astype(dtype), w.astype(dtype), ((1,), (0,)))


def _matmul_fwd(x, w, dtype):
    like = (jnp.zeros((), x.dtype), jnp.zeros((), w.dtype))
    x, w = _rounded(x, dtype), w.astype(dtype)
    return _accumulate(x, w, ((1,), (0,))), (x, w, like)


def _matmul_bwd(dtype, saved, g):
    x, w, like = saved
    g = _rounded(g, dtype)
    dx = _accumulate(g, w, ((1,), (1,)))
    return dx.astype(like[0].dtype), _contract_leading(x, g).astype(like[1].dtype)


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _batched(a, b, across, dtype, precision):
    """Batched a [..., M, K] · b, which is [..., N, K] if `across`, else [..., K, N]."""
    n = a.ndim - 2
    contract = ((n + 1,), (n + 1,)) if across else ((n + 1,), (n,))
    batch = (tuple(range(n)),) * 2
    return _accumulate(a.astype(dtype), b.astype(dtype), contract, batch, precision)


def _batched_fwd(a, b, across, dtype, precision):
    return _batched(a, b, across, dtype, precision), (a, b)


def _batched_bwd(across, dtype, precision, saved, g):
    a, b = saved
    g, x, y = (v.astype(dtype) for v in (g, a, b))
    da = _batched(g, y, not across, dtype, precision)
    db = _contract_leading(g, x, precision) if across else _contract_leading(x, g, precision)
    return da.astype(a.dtype), db.astype(b.dtype)


_batched.defvjp(_batched_fwd, _batched_bwd)
