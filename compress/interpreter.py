"""One interpreter makes any pure function understand compressed leaves.

`apply` runs a function under quax, which asks for every JAX primitive whether a rule exists for
the array types it meets; the rules are in `compress.rules`. Primitives that take functions and are
missing from quax are added here: `jax.checkpoint`, `jax.custom_vjp` and `jax.shard_map`; its
`lax.scan` is replaced.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import quax
from jax import lax
from jax.core import eval_jaxpr
from jax.extend.core import jaxpr_as_fun, set_current_trace
from jax.extend.core.primitives import remat_p
from jax.sharding import NamedSharding
from quax import _compat, _primitives
from quax._trace import _QuaxTrace

from compress import parted_rules, rules  # noqa: F401  # register what each primitive does
from compress.adapters import bare
from compress.arrays import Compressed, describe, is_compressed


def apply[**P, R](fn: Callable[P, R]) -> Callable[P, R]:
    """Make a pure function understand compressed arrays among its arguments.

    Products with quantised weights run as `compress.products` says, lookups give floats, and
    everything else runs unchanged. Composes with `jit`,
    `grad` (with respect to floating arguments), `vmap`, `scan` and `checkpoint`, inside `fn` and
    around it; wrap the result in `jax.jit`, for the interpreter costs time on every untraced call.

    Args:
        fn: any function of pytrees of arrays; it never needs to know.

    Returns:
        The same function for trees with compressed leaves. A compressed leaf that `fn` returns
        untouched is still compressed.

    Raises:
        NotImplementedError: when called, `fn` applies a primitive to a compressed leaf that has no
            rule; nothing is turned into floats silently.

    Source: quax, https://github.com/patrick-kidger/quax.

    >>> import jax.numpy as jnp
    >>> from compress import quantize
    >>> params, _ = quantize("int8")({"kernel": jnp.eye(3), "bias": jnp.ones(3)})
    >>> jax.jit(apply(lambda p, x: x @ p["kernel"] + p["bias"]))(params, jnp.ones((2, 3)))
    Array([[2., 2., 2.],
           [2., 2., 2.]], dtype=float32)
    """
    interpreted = quax.quaxify(fn)

    @functools.wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        args, kwargs = bare((args, kwargs))
        return interpreted(*args, **kwargs)

    return wrapper


@quax.register(remat_p)
def _checkpoint(
    *args: jax.typing.ArrayLike | quax.ArrayValue,
    jaxpr: Any,
    prevent_cse: Any,
    differentiated: bool,
    policy: Any,
) -> Any:
    body = quax.quaxify(functools.partial(eval_jaxpr, jaxpr, ()))
    if differentiated:
        # `grad` ran inside `apply`: this is the recomputation, and without a barrier the compiler
        # would merge it with the first computation and keep what should be forgotten.
        each = prevent_cse if isinstance(prevent_cse, tuple) else (prevent_cse,) * len(args)
        args = tuple(
            lax.optimization_barrier(x) if keep else x for x, keep in zip(args, each, strict=True)
        )
    return jax.checkpoint(body, prevent_cse=prevent_cse, policy=policy)(*args)


def _custom_vjp(self: Any, primitive: Any, fun: Any, *fwd_bwd_tracers: Any, **params: Any) -> Any:
    """`custom_vjp` under quax: kept whole where all operands are plain arrays.

    With a compressed operand the function's body is interpreted instead, and differentiated by
    JAX: its own backward pass would have to return a cotangent for int8 values, which none exists.
    """
    fwd, bwd, tracers = fwd_bwd_tracers
    values = [self.to_value(t) for t in tracers]
    if any(map(is_compressed, values)):
        with set_current_trace(self):
            return fun.call_wrapped(*tracers)
    arrays = tuple(v.materialise() for v in values)
    out = primitive.bind_with_trace(
        self.parent_trace,
        arrays,
        tuple(map(jax.typeof, arrays)),
        {"subfuns": (fun, fwd, bwd), **params},
    )
    return [self.stage_value(x) for x in out]


_plain_custom_jvp = _QuaxTrace.process_custom_jvp_call


def _custom_jvp(self: Any, primitive: Any, fun: Any, jvp: Any, tracers: Any, **params: Any) -> Any:
    """`custom_jvp` under quax: with a compressed operand interpreted, as `custom_vjp` is.

    Its own derivative would be asked for that of codes.
    """
    if any(is_compressed(self.to_value(t)) for t in tracers):
        with set_current_trace(self):
            return fun.call_wrapped(*tracers)
    return _plain_custom_jvp(self, primitive, fun, jvp, tracers, **params)


cast(Any, _QuaxTrace).process_custom_jvp_call = _custom_jvp

# quax (0.4.6) raises NotImplementedError here; a later version may bring its own.
if "process_custom_vjp_call" not in vars(_QuaxTrace):
    cast(Any, _QuaxTrace).process_custom_vjp_call = _custom_vjp


def _shard_map(self: Any, primitive: Any, fun: Any, tracers: Any, **params: Any) -> Any:
    """`shard_map` under quax: a compressed operand is cut as its array would be, part by part.

    Its own devices' part is a compressed array again, which the body is interpreted with.

    Raises:
        NotImplementedError: a cut that parts what shares a scale, or a compressed result.
    """
    values = [self.to_value(t) for t in tracers]
    arrays, specs, treedefs = [], [], []
    for value, spec in zip(values, params.pop("in_specs"), strict=True):
        if is_compressed(value):
            found, treedef = jax.tree.flatten(value)
            # With the mesh, a part that it does not divide stays whole, and `_local` tells.
            lie = jax.tree.leaves(value.place(NamedSharding(params["mesh"], spec)))
            specs += [where.spec for where in lie]
        else:
            found, treedef = [value.materialise()], None
            specs.append(spec)
        arrays += found
        treedefs.append(treedef)

    def body(*parts: Any) -> Any:
        rest, operands, made = list(parts), [], []
        for value, treedef in zip(values, treedefs, strict=True):
            count = 1 if treedef is None else treedef.num_leaves
            own, rest = rest[:count], rest[count:]
            operands.append(own[0] if treedef is None else _local(value, own))

        def inner(*operands: Any) -> list[Any]:
            made.append(fun(*operands).unpack_aux())
            return list(made[-1][0].vals)

        out = quax.quaxify(inner)(*operands)
        if any(map(is_compressed, out)):
            raise NotImplementedError("shard_map: its function returns a compressed array")
        tree, where = made[-1]
        return tree.update(out).with_aux(where)

    # JAX has a name for each operand in it.
    names = params["debug_info"]._replace(arg_names=None)
    out = primitive.bind_with_trace(
        self.parent_trace,
        tuple(arrays),
        tuple(map(jax.typeof, arrays)),
        {**params, "subfuns": (body,), "in_specs": tuple(specs), "debug_info": names},
    )
    return out.map(self.stage_value)


def _local(value: Compressed, own: list[Any]) -> Compressed:
    """A device's part of a compressed array, of the parts of its arrays.

    Raises:
        NotImplementedError: its blocks are not those of the whole.
    """
    arrays, treedef = jax.tree.flatten(value)
    cuts = [n // m for n, m in zip(arrays[0].shape, own[0].shape, strict=True)]
    for array, part in zip(arrays, own, strict=True):
        expected = tuple(
            n if n == 1 else n // cut for n, cut in zip(array.shape, cuts, strict=True)
        )
        if part.shape != expected:
            raise NotImplementedError(
                f"shard_map of {describe(value)}: cut by {cuts}, devices would part what shares a "
                "scale; choose smaller blocks, or dequantise it before"
            )
    return jax.tree.unflatten(treedef, own)


if "process_shard_map" not in vars(_QuaxTrace):
    cast(Any, _QuaxTrace).process_shard_map = _shard_map


@quax.register(lax.scan_p)
def _scan(*args: jax.typing.ArrayLike | Compressed, jaxpr: Any, **params: Any) -> Any:
    """A scan, whose body is interpreted for one slice of what it goes through.

    quax's own (0.4.6) forgets the axes of a `shard_map` along which slices differ, and keys
    programs by the structure of what they are given but not by its shapes.
    """
    groups = _compat.unpack_scan_args(args, params)
    consts, carry, xs = (jax.tree.leaves(group) for group in groups)
    tree, made = jax.tree.structure(groups), []

    def body(*flat: jax.Array) -> list[jax.Array]:
        operands = (x for group in jax.tree.unflatten(tree, flat) for x in group)
        out = quax.quaxify(jaxpr_as_fun(jaxpr))(*operands)
        _primitives._check_carry_stable(groups[1], out[: len(groups[1])], "lax.scan")
        made.append(jax.tree.structure(out))
        return jax.tree.leaves(out)

    inner = jax.make_jaxpr(body)(*consts, *carry, *map(_slice_of, xs))
    sizes = {"num_consts": len(consts), "num_carry": len(carry), "num_xs": len(xs)}
    sizes["num_ys"] = len(inner.out_avals) - len(carry)
    bound = _compat.scan_bind_params(params, **sizes)
    return jax.tree.unflatten(made[-1], lax.scan_p.bind(*consts, *carry, *xs, jaxpr=inner, **bound))


def _slice_of(x: jax.Array) -> Any:
    """What JAX knows of one, in a `shard_map` where it differs, too."""
    seen = []
    jax.eval_shape(jax.vmap(lambda one: seen.append(jax.typeof(one))), x)
    return seen[0]


class _Forgetful(dict):
    """A cache that keeps nothing."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


# quax keys the programs of loops by the structure of what they are given, but not by the shapes in
# it: kernels with other groups, or other ranks, would meet the program of those before.
_primitives._while_quax_cache = _Forgetful()
