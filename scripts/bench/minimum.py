"""The fewest bytes that a device sends in a training step, from shapes alone.

Nothing here looks at a program: `collectives.py` compares. A layout says where parameters and rows
lie before and after a step; what then has to travel follows. Below, n is the length of a mesh axis,
t the tokens of a device, d the size of a token, and sums are of float32.

**Collectives** (Thakur, Rabenseifner, Gropp 2005, IJHPCA 19(1)). Of m bytes on each of n devices, a
sum that all receive takes 2 m (n - 1)/n from each; one that is scattered, or a gathering of m bytes
in all, m (n - 1)/n; an exchange m (n - 1)/n.

**data.** Every device sums other tokens' gradients of the parameters it holds: 2 (n - 1)/n of them,
over all axes together that cut tokens and not the parameter. Gradients count as dense. Those of
tables are not in a batch of few tokens, where rows alone would do: choose more than 2 · vocabulary.

**fsdp** (ZeRO, Rajbhandari et al. 2020, arXiv:1910.02054). (n - 1)/n of each kernel comes, in the
dtype of its products, and stays for the backward pass: that ZeRO-3 fetches it twice is a choice of
memory. (n - 1)/n of its gradient leaves in float32, for only the sum is stored; what `data` adds is
a sum of the stored part. A vector is like a kernel, always in float32. Of tables either all comes
and goes in this way, or of each token's row the (n - 1)/n that lie elsewhere, and their gradient,
t d float32 each, and the int32 ids by which they are asked for; the cheaper counts.

**tensor** (Megatron-LM, Shoeybi et al. 2019, arXiv:1909.08053). Attention and MLP each take x whole
and leave a sum of n parts, twice in the forward pass and twice in the backward pass: four sums of
t d float32 a layer. Parts are not rounded, whatever the precision: sums would no longer be those of
one device. To scatter sums and gather x instead takes as many bytes.

**sequence** (Ring Attention, Liu et al. 2023, arXiv:2310.01889). No device holds more than its part
of the length at once, and each computes its own tokens' outputs. Forward, every device's keys and
values visit n - 1 others, 2 t d. Backward either they visit again and their gradients come home,
4 t d, or queries and the gradient of the output do, 2 t d, with two numbers a token and head, and
the gradient of queries comes home, t d: the cheaper counts. So do the ids of texts, once a step.
What visits goes in the dtype of the products, which on a TPU is bfloat16 where precision is left to
it; what comes home in float32.
Not counted is what only some models can have: if heads divide by n, exchanging q, k, v and outputs
(Ulysses, Jacobs et al. 2023, arXiv:2309.14509) moves 8 (n - 1)/n t d a layer, not 5 (n - 1) t d.

**expert** (GShard, Lepikhin et al. 2020, arXiv:2006.16668). Each of a token's k experts gets its
row and returns one, and so do gradients: four exchanges of k t d a layer, if choices are even and
a device has one expert. What goes to an expert, or its gradient, goes in the dtype of its products;
what comes from one in float32. Experts' gradients are at home.

Not in it: scalars (loss, norm, counts of tokens and of choices), a few bytes each.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fw.errors import FwError

FLOAT = INT = 4
TABLES = ("vocab", "positions", "types")
ROWS = ("data", "fsdp", "expert", "sequence")
"""The axes that cut tokens. Parameters are cut by fsdp along embed, by tensor, by expert."""


@dataclass(frozen=True)
class Parameter:
    """Axis names and shape of a parameter."""

    names: tuple[str | None, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """What of a training step communicates.

    Attributes:
      parameters: all of them.
      tokens: of the whole batch.
      size: of a token.
      heads: of attention.
      layers: of attention, each followed by an MLP or by experts.
      chosen: experts a token; 0 for an MLP.
      ids: integers by which a token's rows are looked up.
      kernel_bytes: of an element of a kernel in products.
      visitor_bytes: of an element of queries, keys and values in products.
    """

    parameters: tuple[Parameter, ...]
    tokens: int
    size: int
    heads: int
    layers: int
    chosen: int = 0
    ids: int = 2
    kernel_bytes: int = FLOAT
    visitor_bytes: int = FLOAT


def minimum(step: Step, mesh: Mapping[str, int]) -> dict[str, float]:
    """Bytes that a device sends at least in a step, by mesh axes, as "data" or "data,fsdp".

    Args:
      step: the step.
      mesh: sizes by axis.

    Raises:
      FwError: experts on a mesh with a tensor axis.

    >>> step = Step((Parameter(("embed", "mlp"), (8, 16)),), tokens=64, size=8, heads=1, layers=0)
    >>> minimum(step, {"data": 4})  # 2 · 3/4 · 8 · 16 · 4
    {'data': 768.0}
    >>> minimum(step, {"fsdp": 4})  # the same: it is gathered, and its gradient scattered
    {'fsdp': 768.0}
    """
    found: dict[str, float] = {}

    def add(axes: tuple[str, ...], size: float) -> None:
        if axes and size:
            key = ",".join(axes)
            found[key] = found.get(key, 0.0) + size

    n = {axis: mesh.get(axis, 1) for axis in (*ROWS, "tensor")}
    tokens = step.tokens / math.prod(n[axis] for axis in ROWS)
    row = tokens * step.size * FLOAT
    f, t, s, e = (n[axis] for axis in ("fsdp", "tensor", "sequence", "expert"))
    if step.chosen and t > 1:
        raise FwError(f"tensor={t} with experts: their sums over tensor are not derived here")

    tables = 0.0
    for parameter in step.parameters:
        names, part = parameter.names, float(math.prod(parameter.shape))
        if "heads" in names or "mlp" in names:
            part /= t
        if "experts" in names:
            part /= e
        stored = f if "embed" in names else 1
        if names[0] in TABLES:
            tables += part * FLOAT
        else:
            matrix = "experts" in names or (len(names) == 2 and None not in names)
            comes = step.kernel_bytes if matrix else FLOAT
            add(("fsdp",), (stored - 1) / stored * part * (comes + FLOAT))
        others = tuple(
            axis
            for axis in ROWS
            if n[axis] > 1
            and not (axis == "fsdp" and stored > 1)
            and not (axis == "expert" and "experts" in names)
        )
        count = math.prod(n[axis] for axis in others)
        add(others, 2 * (count - 1) / count * part / stored * FLOAT)
    asked = 2 * (f - 1) / f * row + (f - 1) * tokens * step.ids * INT
    add(("fsdp",), min(asked, 2 * (f - 1) / f * tables))

    products = 1 if step.chosen else 2  # what tensor cuts: attention, and the MLP
    add(("tensor",), step.layers * products * 2 * 2 * (t - 1) / t * row)

    own = row / t
    visits = 2 * own * step.visitor_bytes / FLOAT
    queries = visits + own + 2 * tokens * step.heads / t * FLOAT
    add(("sequence",), step.layers * (s - 1) * (visits + min(visits + 2 * own, queries)))
    add(("sequence",), (s - 1) * tokens * INT)

    both = (FLOAT + step.kernel_bytes) / FLOAT  # to an expert and from it
    add(("expert",), step.layers * 2 * both * (e - 1) / e * step.chosen * row)
    return found
