"""Functions as programs: what transforms of functions have in common.

Such a transform traces a function (`traced`), goes through its equations, does what it is for with
some, and leaves the others to JAX (`run`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.core import eval_jaxpr
from jax.extend import core

# Since jax 0.12 the same as core.Jaxpr, which 0.11 still tells apart.
ClosedJaxpr = core.ClosedJaxpr  # pyright: ignore[reportPrivateImportUsage]


@dataclass(frozen=True)
class Program:
    """A function that was traced with its arguments; what is no array is static.

    Attributes:
        closed: the program.
        arrays: what it is given: the arrays among the leaves of the arguments.
        dynamic: of every leaf of the arguments, whether it is an array.
        out: the structure of the function's result.
    """

    closed: Any
    arrays: list[Any]
    dynamic: list[bool]
    out: Any

    def result(self, values: Sequence[Any]) -> Any:
        """The function's result, from the program's."""
        return jax.tree.unflatten(self.out, values)


def traced(fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Program:
    """The program of a call.

    >>> program = traced(lambda x, double: x * 2 if double else x, (np.ones(3),), {"double": True})
    >>> [eqn.primitive.name for eqn in program.closed.jaxpr.eqns], program.dynamic
    (['mul'], [True, False])
    """
    leaves, tree = jax.tree.flatten((tuple(args), dict(kwargs)))
    dynamic = [isinstance(x, jax.Array | np.ndarray) for x in leaves]
    arrays = [x for x, is_array in zip(leaves, dynamic, strict=True) if is_array]

    def of_arrays(*arrays: Any) -> Any:
        given = iter(arrays)
        own = [next(given) if is_array else x for x, is_array in zip(leaves, dynamic, strict=True)]
        a, k = jax.tree.unflatten(tree, own)
        return fn(*a, **k)

    closed, shape = jax.make_jaxpr(of_arrays, return_shape=True)(*arrays)
    return Program(closed, arrays, dynamic, jax.tree.structure(shape))


def as_closed(program: Any) -> Any:
    """A program that an equation holds, with its constants, of which it may have none."""
    return program if hasattr(program, "consts") else ClosedJaxpr(program, ())


def is_program(value: Any) -> bool:
    """Whether a parameter of an equation is a program.

    >>> is_program(jax.make_jaxpr(jax.numpy.sin)(1.0))
    True
    """
    return isinstance(value, ClosedJaxpr | core.Jaxpr)


class Values:
    """What the variables of a program hold while it is run.

    >>> program = traced(lambda x: x * 2, (np.ones(3),), {})
    >>> values = Values(program.closed, program.arrays)
    >>> for eqn in program.closed.jaxpr.eqns:
    ...     values.write(eqn, run(eqn, values))
    >>> values.results()
    [Array([2., 2., 2.], dtype=float32)]
    """

    def __init__(self, closed: Any, args: Sequence[Any]):
        self.jaxpr = closed.jaxpr
        self._held = dict(zip(self.jaxpr.constvars, closed.consts, strict=True))
        self._held.update(zip(self.jaxpr.invars, args, strict=True))

    def read(self, atoms: Sequence[Any]) -> list[Any]:
        """Of variables and literals."""
        return [a.val if isinstance(a, core.Literal) else self._held[a] for a in atoms]

    def write(self, eqn: Any, results: Sequence[Any]) -> None:
        """What an equation has made."""
        self._held.update(zip(eqn.outvars, results, strict=True))

    def results(self) -> list[Any]:
        """The program's."""
        return self.read(self.jaxpr.outvars)


def run(eqn: Any, values: Values) -> list[Any]:
    """An equation's results: as a program of one, JAX itself binds it, with its source line."""
    used = list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, core.Literal)))
    names = values.jaxpr.debug_info.with_unknown_names()
    one = core.Jaxpr((), used, eqn.outvars, [eqn], eqn.effects, names)
    return eval_jaxpr(one, (), *values.read(used))


def scan_sizes(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carried."""
    if "num_consts" in params:  # jax 0.11
        return params["num_consts"], params["num_carry"]
    consts, carried, _ = params["ft_in"].unpack()
    return len(consts), len(carried)
