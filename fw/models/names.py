"""How the parameters of a model are called in the files of Hugging Face transformers.

A family lists its pairs of names, and `fw.hub` reads and writes by them. A tensor is one parameter,
or one entry of a stacked one, or one of several that the files keep in one piece.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any


@dataclass(frozen=True)
class Name:
    """A parameter, or an entry of it, and where it lies in the files.

    Attributes:
      path: of our parameter, below `kind`.
      tensor: their name.
      transposed: torch keeps a linear layer's weight as [out, in], a convolution's as [out, in,
        height, width]; ours are [in, out] and [height, width, in, out].
      entry: indices into axes of ours that the tensor lacks: a layer's, say. None for an axis
        before them that it has: (3, 5, None, 0) of [layers, experts, in, 2, out] is [in, out].
      part: (i, n) if theirs is n equal parts, one after another along its first axis, and this is
        the i-th.
      kind: "params", or "state" for what is not trained.
    """

    path: str
    tensor: str
    transposed: bool = False
    entry: tuple[int | None, ...] = ()
    part: tuple[int, int] = (0, 1)
    kind: str = "params"

    @property
    def place(self) -> str:
        """The path in a model's variables.

        >>> Name("norm/mean", "bn1.running_mean", kind="state").place
        'state/norm/mean'
        """
        return f"{self.kind}/{self.path}"

    def order(self, rank: int) -> tuple[int, ...]:
        """Axes of ours, without those of `entry`, in the order of theirs.

        >>> name = Name("conv/kernel", "conv1.weight", transposed=True)
        >>> name.order(2), name.order(4)
        ((1, 0), (3, 2, 0, 1))
        """
        if not self.transposed:
            return tuple(range(rank))
        return (rank - 1, rank - 2, *range(rank - 2))

    @property
    def index(self) -> tuple[int | slice, ...]:
        """`entry` as numpy takes it."""
        return tuple(slice(None) if i is None else i for i in self.entry)

    def stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape, from the parameter's.

        >>> Name("up/kernel", "up.weight", transposed=True, entry=(1,)).stored((4, 8, 32))
        (32, 8)
        """
        own = [n for n, i in zip_longest(shape, self.entry) if i is None]
        if not own:
            return ()
        first, *rest = (own[i] for i in self.order(len(own)))
        return (first * self.part[1], *rest)


def dense(path: str, tensor: str, *, bias: bool = True, **more) -> Iterator[Name]:
    """The names of a dense layer.

    >>> [(n.path, n.tensor, n.transposed) for n in dense("up", "lin1")]
    [('up/kernel', 'lin1.weight', True), ('up/bias', 'lin1.bias', False)]
    """
    yield Name(f"{path}/kernel", f"{tensor}.weight", True, **more)
    if bias:
        yield Name(f"{path}/bias", f"{tensor}.bias", **more)


def norm(path: str, tensor: str, *, bias: bool = True, **more) -> Iterator[Name]:
    """The names of a normalisation.

    >>> [(n.path, n.tensor) for n in norm("norm", "LayerNorm", bias=False)]
    [('norm/scale', 'LayerNorm.weight')]
    """
    yield Name(f"{path}/scale", f"{tensor}.weight", **more)
    if bias:
        yield Name(f"{path}/bias", f"{tensor}.bias", **more)


def conv(path: str, tensor: str, *, bias: bool = True) -> Iterator[Name]:
    """The names of a convolution.

    >>> [(n.path, n.tensor, n.transposed) for n in conv("stem", "conv1", bias=False)]
    [('stem/kernel', 'conv1.weight', True)]
    """
    return dense(path, tensor, bias=bias)


def batch_norm(path: str, tensor: str) -> Iterator[Name]:
    """The names of a batch norm, its running averages included.

    >>> [n.tensor for n in batch_norm("norm", "bn1") if n.kind == "state"]
    ['bn1.running_mean', 'bn1.running_var', 'bn1.num_batches_tracked']
    """
    yield from norm(path, tensor)
    for ours, theirs in (
        ("mean", "running_mean"),
        ("var", "running_var"),
        ("count", "num_batches_tracked"),
    ):
        yield Name(f"{path}/{ours}", f"{tensor}.{theirs}", kind="state")


def of_layer(number: int, *, scan: bool) -> tuple[str, dict[str, Any]]:
    """Where a layer of the `Stack` that a model calls `stack` lies: its path, and `entry`.

    >>> of_layer(3, scan=True), of_layer(3, scan=False)
    (('stack/layers', {'entry': (3,)}), ('stack/layers/3', {}))
    """
    return ("stack/layers", {"entry": (number,)}) if scan else (f"stack/layers/{number}", {})


def table(path: str, tensor: str) -> Iterator[Name]:
    """The name of an embedding.

    >>> [(n.path, n.tensor) for n in table("word", "embed_tokens")]
    [('word/embedding', 'embed_tokens.weight')]
    """
    yield Name(f"{path}/embedding", f"{tensor}.weight")
