"""How a model says where its activations go without mentioning a mesh.

A model calls `constrain(x, "batch", "length", "embed")`. Inside a `scope`, that becomes a sharding
constraint by the scope's mesh and rules (see `layout`); outside, it does nothing, so the same
function runs on one device, is exported, or is used by people who never heard of a mesh.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from sharding.layout import check_rank, fit
from sharding.rules import Rules, mesh_axes


class _Scope(NamedTuple):
    mesh: Mesh
    rules: Rules
    differentiate: bool
    mapped: tuple[str, ...]


# A ContextVar would not do: jax.jit would not see it, and would reuse a trace made in another
# scope, or in none. This is JAX's own context variable, part of the key of its caches.
_scope = jax.make_user_context(None)


@contextmanager
def scope(
    mesh: Mesh, rules: Rules, *, differentiate: bool = False, mapped: Sequence[str] = ()
) -> Iterator[None]:
    """Within it, `constrain` shards by this mesh and these rules.

    It must surround the call that traces: `with scope(mesh, rules): step(state, batch)`. A jitted
    function is traced again when it is called in another scope. Threads have scopes of their own.

    Args:
        mesh: where activations go.
        rules: where their axes' names go.
        differentiate: what is traced is a step of training: `linear` writes its communication out.
        mapped: mesh axes that a `jax.vmap(spmd_axis_name=...)` around the trace has taken.

    Yields:
        Nothing.

    >>> from sharding import make_mesh, rules
    >>> with scope(make_mesh("data=1"), rules("data")):
    ...     y = constrain(jax.numpy.ones((2, 3)), "batch", "embed")
    >>> tuple(y.sharding.spec)
    (('data', 'expert'), None)
    """
    with _scope(_Scope(mesh, rules, differentiate, tuple(mapped))):
        yield


@contextmanager
def undifferentiated() -> Iterator[None]:
    """Within a scope, where kernels are not trained as they are: frozen, or made of what is.

    These have no gradients whose communication `linear` would write out.

    >>> from sharding import make_mesh, rules
    >>> with scope(make_mesh("data=1"), rules(), differentiate=True), undifferentiated():
    ...     print(differentiated())
    None
    """
    if _scope.value is None:
        yield
        return
    with _scope(_scope.value._replace(differentiate=False)):
        yield


def current() -> tuple[Mesh, Rules] | None:
    """The mesh and rules of the scope that surrounds the trace; None outside.

    For operations that move data on purpose, such as `ring_attention`; models need it not.

    >>> current() is None
    True
    """
    return None if _scope.value is None else _scope.value[:2]


def differentiated() -> tuple[Mesh, Rules] | None:
    """`current()` within a scope for differentiation, None elsewhere.

    >>> differentiated() is None
    True
    """
    return current() if _scope.value is not None and _scope.value.differentiate else None


def mapped() -> tuple[str, ...]:
    """The mesh axes that a map around the trace has taken, such as a pipeline's `pipe`.

    A `jax.shard_map` with `axis_names` must have them among those: JAX 0.12 takes the mapped axis
    for one of its own.

    >>> mapped()
    ()
    """
    return () if _scope.value is None else _scope.value.mapped


# Apart from the scope: there is a map outside of any, too.
_batched = jax.make_user_context(False)


@contextmanager
def batching() -> Iterator[None]:
    """Within it, what is traced is mapped by a `jax.vmap`, over microbatches or stages.

    >>> batching()(jax.vmap(lambda x: (x, batched())[0]))(jax.numpy.ones(2)).shape
    (2,)
    """
    with _batched(True):
        yield


def batched() -> bool:
    """Whether `batching` is around the trace: not every kernel can be mapped.

    >>> with batching():
    ...     batched()
    True
    """
    return _batched.value


def cutting(name: str) -> tuple[str, ...]:
    """The mesh axes, longer than 1, that cut the axis `name` of activations in this scope.

    Args:
        name: a logical axis.

    Returns:
        Outermost first; () if nothing cuts it, or outside a scope.

    >>> cutting("length")
    ()
    """
    here = current()
    if here is None:
        return ()
    mesh, rules = here
    found = rules.spec((name,), activation=True, path="cutting")[0]
    return tuple(axis for axis in mesh_axes(found) if mesh.shape[axis] > 1)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Shard `x` by the names of its axes inside a `scope`; give it back as it is outside.

    Args:
        x: any array; in a `jax.vmap`, the axes that the function sees.
        *names: one name an axis, None for an axis that is never cut.

    Returns:
        `x`, with the same values.

    Raises:
        ShardingError: as `fit` does, inside a scope; a wrong number of names raises everywhere.

    >>> constrain(jax.numpy.ones((2, 3)), "batch", "embed").shape
    (2, 3)
    """
    check_rank(names, x.shape, "constrain")
    here = current()
    if here is None:
        return x
    mesh, rules = here
    where = fit(names, x.shape, mesh, rules, activation=True, path="constrain")
    return jax.lax.with_sharding_constraint(x, where)
