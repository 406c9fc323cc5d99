"""What each primitive does to the numbers of entries: which it carries on, which it makes one.

A value has for each of its axes an array of numbers (`compress.classes`), or None where every
entry is the same because it was broadcast: nothing depends on how many there are.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from compress.classes import FIXED, Classes, Numbers

Axes = tuple[Numbers | None, ...]


class Book(Protocol):
    """What a rule may ask and say of numbers."""

    classes: Classes

    def use(self, numbers: Numbers | None) -> None:
        """They were multiplied, summed or compared: their entries matter."""

    def product(self, *axes: tuple[Numbers | None, int]) -> None:
        """Multiplications: one for every entry of all of these axes, numbers and sizes."""

    def cut(self, numbers: Numbers, part: Numbers) -> None:
        """Some of these were taken, by places that may be written in the function."""

    def choice(self, eqn: Any, options: Sequence[int]) -> int:
        """Which of several axes has the numbers, where one becomes several."""
        ...

    def chosen(self, eqn: Any, numbers: Numbers) -> None:
        """The numbers that a choice came to."""


def fixed(size: int) -> Numbers:
    """Numbers of entries that stay."""
    return np.full(size, FIXED)


def fix(book: Book, *many: Axes) -> None:
    """Every entry of some values stays."""
    for axes in many:
        for numbers in axes:
            if numbers is not None:
                book.classes.fix(numbers)


def same(book: Book, *many: Numbers | None) -> Numbers | None:
    """Axes that run along each other, made one."""
    have = [numbers for numbers in many if numbers is not None]
    for other in have[1:]:
        book.classes.join(have[0], other)
    return have[0] if have else None


def elementwise(book: Book, eqn: Any, values: Sequence[Axes]) -> list[Axes]:
    """Entry by entry; scalars are alike for all."""
    out = []
    for result in eqn.outvars:
        rank = len(result.aval.shape)
        whole = [axes for axes in values if len(axes) == rank]
        out.append(tuple(same(book, *column) for column in zip(*whole, strict=True)))
        if len(whole) > 1:
            for numbers in out[-1]:
                book.use(numbers)
    return out


def identity(book: Book, eqn: Any, values: Sequence[Axes]) -> list[Axes]:
    """Each result is an operand."""
    return list(values)


def transpose(book: Book, eqn: Any, values: Sequence[Axes]) -> list[Axes]:
    """See the primitive."""
    return [tuple(values[0][i] for i in eqn.params["permutation"])]


def squeeze(book: Book, eqn: Any, values: Sequence[Axes]) -> list[Axes]:
    """See the primitive; the one entry that is left of an axis stays."""
    gone = {i % len(values[0]) for i in eqn.params["dimensions"]}
    fix(book, tuple(n for i, n in enumerate(values[0]) if i in gone))
    return [tuple(n for i, n in enumerate(values[0]) if i not in gone)]


def reverse(book: Book, eqn: Any, values: Sequence[Axes]) -> list[Axes]:
    """See the primitive."""
    turned = set(eqn.params["dimensions"])
    return [tuple(n if n is None or i not in turned else n[::-1] for i, n in enumerate(values[0]))]


def broadcast(book: Book, eqn: Any, values: Sequence[Axes]) -> list[Axes]:
    """New axes, and those that had one entry, have numbers of none."""
    out: list[Numbers | None] = [None] * len(eqn.outvars[0].aval.shape)
    old = eqn.invars[0].aval.shape
    for i, place in enumerate(eqn.params["broadcast_dimensions"]):
        if old[i] == eqn.outvars[0].aval.shape[place]:
            out[place] = values[0][i]
        else:
            fix(book, (values[0][i],))
    return [tuple(out)]


def cut(book: Book, eqn: Any, values: Sequence[Axes]) -> list[Axes]:
    """`slice`: of an axis that one entry is taken of by its place, all stay."""
    p, out = eqn.params, []
    strides = p["strides"] or [1] * len(values[0])
    for numbers, start, stop, stride in zip(
        values[0], p["start_indices"], p["limit_indices"], strides, strict=True
    ):
        part = None if numbers is None else numbers[start:stop:stride]
        if numbers is not None and part is not None and len(part) < len(numbers):
            if len(part) == 1:
                book.classes.fix(numbers)
            book.cut(numbers, part)
        out.append(part)
    return [tuple(out)]


def split(book: Book, eqn: Any, values: Sequence[Axes]) -> list[Axes]:
    """See the primitive."""
    axis, ends = eqn.params["axis"], np.cumsum(eqn.params["sizes"])[:-1]
    own = values[0][axis]
    parts = [None] * (len(ends) + 1) if own is None else np.split(own, ends)
    for each in parts:
        if own is not None and each is not None:
            book.cut(own, each)
    return [(*values[0][:axis], part, *values[0][axis + 1 :]) for part in parts]


def unstack(book: Book, eqn: Any, values: Sequence[Axes]) -> list[Axes]:
    """See the primitive: one result for each entry of an axis, which all stay."""
    axis, own = eqn.params["axis"], values[0]
    fix(book, (own[axis],))
    return [(*own[:axis], *own[axis + 1 :])] * len(eqn.outvars)


def stack(book: Book, eqn: Any, values: Sequence[Axes]) -> list[Axes]:
    """See the primitive: the new axis has as many entries as the function says."""
    axis = eqn.params["axis"] % (len(values[0]) + 1)
    whole = [same(book, *column) for column in zip(*values, strict=True)]
    return [(*whole[:axis], fixed(len(values)), *whole[axis:])]


def concatenate(book: Book, eqn: Any, values: Sequence[Axes]) -> list[Axes]:
    """What has no numbers along the axis stays, for its size is written in the function."""
    axis, out = eqn.params["dimension"], []
    for i, column in enumerate(zip(*values, strict=True)):
        if i != axis:
            out.append(same(book, *column))
            continue
        sizes = [v.aval.shape[axis] for v in eqn.invars]
        parts = [fixed(n) if c is None else c for c, n in zip(column, sizes, strict=True)]
        out.append(np.concatenate(parts))
    return [tuple(out)]


def pad(book: Book, eqn: Any, values: Sequence[Axes]) -> list[Axes]:
    """What is added stays."""
    out = []
    for numbers, size, (low, high, inside) in zip(
        values[0], eqn.outvars[0].aval.shape, eqn.params["padding_config"], strict=True
    ):
        if (low, high, inside) == (0, 0, 0) or numbers is None:
            out.append(numbers if (low, high, inside) == (0, 0, 0) else fixed(size))
            continue
        spread = fixed(len(numbers) + max(len(numbers) - 1, 0) * inside)
        spread[:: inside + 1] = numbers
        spread = np.concatenate([fixed(max(low, 0)), spread, fixed(max(high, 0))])
        out.append(spread[max(-low, 0) : len(spread) - max(-high, 0)])
    return [tuple(out)]


def part(book: Book, eqn: Any, values: Sequence[Axes]) -> list[Axes]:
    """`dynamic_slice`: an axis that is cut where data say stays."""
    out = []
    for numbers, old, new in zip(
        values[0], eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape, strict=True
    ):
        if old != new and numbers is not None:
            book.classes.fix(numbers)
        out.append(numbers if old == new else fixed(new))
    return [tuple(out)]


def update(book: Book, eqn: Any, values: Sequence[Axes]) -> list[Axes]:
    """`dynamic_update_slice`."""
    whole, new = values[0], values[1]
    sizes = zip(eqn.invars[0].aval.shape, eqn.invars[1].aval.shape, strict=True)
    out = []
    for a, b, (old, size) in zip(whole, new, sizes, strict=True):
        if old != size:
            fix(book, (a, b))
        out.append(same(book, a, b) if old == size else fixed(old))
    return [tuple(out)]


def gather(book: Book, eqn: Any, values: Sequence[Axes]) -> list[Axes]:
    """Axes that are taken whole go on; what is looked up stays."""
    d, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    operand, indices = values
    shape, result = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    whole = []
    for i, numbers in enumerate(operand):
        gone = i in d.collapsed_slice_dims or i in d.operand_batching_dims
        if gone or sizes[i] != shape[i]:
            fix(book, (numbers,))
        if not gone:
            whole.append(numbers if sizes[i] == shape[i] else fixed(sizes[i]))
    batch = list(indices[:-1])
    return [tuple(whole.pop(0) if i in d.offset_dims else batch.pop(0) for i in range(len(result)))]


def reduce(book: Book, eqn: Any, values: Sequence[Axes]) -> list[Axes]:
    """Sums and maxima over axes, of which entries may go."""
    gone = {i % len(values[0]) for i in eqn.params["axes"]}
    for i in gone:
        book.use(values[0][i])
    kept = tuple(n for i, n in enumerate(values[0]) if i not in gone)
    return [kept] * len(eqn.outvars)


def index(book: Book, eqn: Any, values: Sequence[Axes]) -> list[Axes]:
    """`argmax` and the like: places along an axis, whose entries stay."""
    fix(book, tuple(values[0][i] for i in eqn.params["axes"]))
    return reduce(book, eqn, values)


def along(name: str) -> Callable[..., list[Axes]]:
    """Shapes stay, and one axis is mixed: its entries stay."""

    def rule(book: Book, eqn: Any, values: Sequence[Axes]) -> list[Axes]:
        out, axis = elementwise(book, eqn, values), eqn.params[name]
        fix(book, *((axes[axis],) for axes in out))
        stays = fixed(eqn.outvars[0].aval.shape[axis])
        return [(*axes[:axis], stays, *axes[axis + 1 :]) for axes in out]

    return rule


def top(book: Book, eqn: Any, values: Sequence[Axes]) -> list[Axes]:
    """`top_k`."""
    axis = eqn.params.get("axis", -1) % len(values[0])
    fix(book, (values[0][axis],))
    size = eqn.outvars[0].aval.shape[axis]
    out = (*values[0][:axis], fixed(size), *values[0][axis + 1 :])
    return [out, out]


def window(book: Book, eqn: Any, values: Sequence[Axes]) -> list[Axes]:
    """Pooling: the axes that it is over stay."""
    p, out = eqn.params, []
    sizes = (p["window_dimensions"], p["window_strides"], p["base_dilation"], p["window_dilation"])
    whole = [same(book, *column) for column in zip(*filter(None, values), strict=True)]
    for i, result in enumerate(eqn.outvars[0].aval.shape):
        idle = all(each[i] == 1 for each in sizes) and tuple(p["padding"][i]) == (0, 0)
        if not idle:
            fix(book, (whole[i],))
        out.append(whole[i] if idle else fixed(result))
    return [tuple(out)] * len(eqn.outvars)


def dot(book: Book, eqn: Any, values: Sequence[Axes]) -> list[Axes]:
    """What is summed over runs along the same."""
    return [_dot(book, eqn, eqn.params["dimension_numbers"], values, ())]


def ragged_dot(book: Book, eqn: Any, values: Sequence[Axes]) -> list[Axes]:
    """Groups of rows, each with an array of its own: rows and arrays stay."""
    d = eqn.params["ragged_dot_dimension_numbers"]
    groups, rows = tuple(d.rhs_group_dimensions), tuple(d.lhs_ragged_dimensions)
    (left, _), (batch, _) = d.dot_dimension_numbers
    if not groups or any(i in (*left, *batch) for i in rows):  # its derivatives are others
        fix(book, *values)
        return [tuple(map(fixed, eqn.outvars[0].aval.shape))]
    fix(book, tuple(values[1][i] for i in groups), tuple(values[0][i] for i in rows), values[2])
    return [_dot(book, eqn, d.dot_dimension_numbers, values, groups)]


def _dot(
    book: Book, eqn: Any, dimensions: Any, values: Sequence[Axes], groups: tuple[int, ...]
) -> Axes:
    (left, right), (left_batch, right_batch) = dimensions
    a, b = values[:2]
    sizes = eqn.invars[0].aval.shape
    summed = [(same(book, a[i], b[j]), sizes[i]) for i, j in zip(left, right, strict=True)]
    for numbers, _ in summed:
        book.use(numbers)
    batch = [same(book, a[i], b[j]) for i, j in zip(left_batch, right_batch, strict=True)]
    for numbers in batch:
        book.use(numbers)
    rows = [n for i, n in enumerate(a) if i not in (*left, *left_batch)]
    columns = [n for i, n in enumerate(b) if i not in (*right, *right_batch, *groups)]
    out = (*batch, *rows, *columns)
    book.product(*zip(out, eqn.outvars[0].aval.shape, strict=True), *summed)
    return out


def convolution(book: Book, eqn: Any, values: Sequence[Axes]) -> list[Axes]:
    """Features as in a dot; places of windows stay; groups go as a whole."""
    d, (x, w) = eqn.params["dimension_numbers"], values
    fix(book, tuple(x[i] for i in d.lhs_spec[2:]), tuple(w[i] for i in d.rhs_spec[2:]))
    taken, put, reads = x[d.lhs_spec[1]], w[d.rhs_spec[0]], w[d.rhs_spec[1]]
    groups = eqn.params["feature_group_count"]
    if eqn.params["batch_group_count"] > 1:
        fix(book, x, w)
    elif groups == 1:
        book.use(same(book, taken, reads))
    else:
        size = eqn.outvars[0].aval.shape[d.out_spec[1]]
        put = fixed(size) if put is None else put
        fix(book, (reads,) if eqn.invars[1].aval.shape[d.rhs_spec[1]] > 1 else ())
        each = put.reshape(groups, -1)
        book.classes.join(each, each[:, :1])
        if taken is not None:
            book.classes.join(taken.reshape(groups, -1), each[:, :1])
        book.use(put)
    out: list[Numbers | None] = [fixed(n) for n in eqn.outvars[0].aval.shape]
    out[d.out_spec[0]], out[d.out_spec[1]] = x[d.lhs_spec[0]], put
    kernel = zip(w, eqn.invars[1].aval.shape, strict=True)
    window = [pair for i, pair in enumerate(kernel) if i != d.rhs_spec[0]]
    book.product(*zip(out, eqn.outvars[0].aval.shape, strict=True), *window)
    return [tuple(out)]


def reshape(book: Book, eqn: Any, values: Sequence[Axes]) -> list[Axes]:
    """Axes that become others are taken by segments of the same product."""
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if eqn.params.get("dimensions") is not None or 0 in old:
        fix(book, values[0])
        return [tuple(map(fixed, new))]
    out: list[Numbers | None] = [None] * len(new)
    fix(book, tuple(values[0][i] for i, n in enumerate(old) if n == 1))
    before = [i for i, n in enumerate(old) if n != 1]
    after = [i for i, n in enumerate(new) if n != 1]
    while before:
        mine, theirs = [before.pop(0)], [after.pop(0)]
        while True:
            a, b = (math.prod(s[i] for i in at) for s, at in ((old, mine), (new, theirs)))
            if a == b:
                break
            (mine if a < b else theirs).append((before if a < b else after).pop(0))
        flat = _merged(book, [values[0][i] for i in mine], [old[i] for i in mine])
        for i, numbers in zip(
            theirs, _parted(book, eqn, flat, [new[i] for i in theirs]), strict=True
        ):
            out[i] = numbers
    return [tuple(out)]


def _live(book: Book, numbers: Numbers | None) -> bool:
    return numbers is not None and bool((book.classes.of(numbers) != FIXED).any())


def _merged(book: Book, axes: list[Numbers | None], sizes: list[int]) -> Numbers | None:
    """Several axes as one: it has the numbers of the outermost that has any, the others stay."""
    if len(axes) == 1:
        return axes[0]
    if all(numbers is None for numbers in axes):
        return None
    live = [i for i, numbers in enumerate(axes) if _live(book, numbers)]
    if not live:
        return fixed(math.prod(sizes))
    fix(book, tuple(axes[i] for i in live[1:]))
    shape = [n if i == live[0] else 1 for i, n in enumerate(sizes)]
    chosen = axes[live[0]]
    assert chosen is not None
    return np.broadcast_to(chosen.reshape(shape), sizes).reshape(-1)


def _parted(
    book: Book, eqn: Any, flat: Numbers | None, sizes: list[int]
) -> Sequence[Numbers | None]:
    """One axis as several: one of them has its numbers, of which those beside it become one."""
    if len(sizes) == 1:
        return [flat]
    if flat is None or not _live(book, flat):
        return [None if flat is None else fixed(n) for n in sizes]
    grid = flat.reshape(sizes)
    classes = book.classes.of(grid)

    def first(axis: int, of: Numbers) -> Numbers:
        return np.moveaxis(of, axis, 0).reshape(sizes[axis], -1)[:, 0]

    def along(axis: int, numbers: Numbers) -> Numbers:
        return numbers.reshape([n if i == axis else 1 for i, n in enumerate(sizes)])

    ready = [
        i for i in range(len(sizes)) if np.all(classes == along(i, first(i, classes)))
    ]  # what was one axis is that again
    axis = ready[0] if ready else book.choice(eqn, [i for i, n in enumerate(sizes) if n > 1])
    numbers = first(axis, grid)
    book.classes.join(grid, along(axis, numbers))
    if not ready:
        book.chosen(eqn, numbers)
    return [numbers if i == axis else fixed(n) for i, n in enumerate(sizes)]


ELEMENTWISE = (
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "cbrt", "ceil", "clamp", "convert_element_type", "copy", "copy_p", "cos", "cosh", "device_put",
    "digamma", "div", "eq", "eq_to", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor",
    "ge", "gt", "integer_pow", "is_finite", "layout_constraint", "le", "le_to", "lgamma", "log",
    "log1p", "logistic", "lt", "lt_to", "max", "mesh_cast", "min", "mul", "name", "ne", "neg",
    "nextafter", "not", "or", "pcast", "population_count", "pow", "pvary", "real",
    "reduce_precision", "rem", "reshard", "round", "rsqrt", "select_n", "sharding_constraint",
    "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt",
    "square", "stop_gradient", "sub", "tan", "tanh", "xor",
)  # fmt: skip

RULES: dict[str, Callable[..., list[Axes]]] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(
        ("reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum"), reduce
    ),
    **dict.fromkeys(("argmax", "argmin"), index),
    **dict.fromkeys(("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum"), along("axis")),
    **dict.fromkeys(
        ("reduce_window", "reduce_window_max", "reduce_window_min", "reduce_window_sum"), window
    ),
    "broadcast_in_dim": broadcast,
    "concatenate": concatenate,
    "conv_general_dilated": convolution,
    "dot_general": dot,
    "dynamic_slice": part,
    "dynamic_update_slice": update,
    "gather": gather,
    "optimization_barrier": identity,
    "pad": pad,
    "ragged_dot_general": ragged_dot,
    "reshape": reshape,
    "rev": reverse,
    "slice": cut,
    "sort": along("dimension"),
    "split": split,
    "squeeze": squeeze,
    "stack": stack,
    "top_k": top,
    "transpose": transpose,
    "unstack": unstack,
}
"""What is not in it makes all entries of its operands and results stay."""
