"""Tokens from tokens: a prompt is read at once, then each token makes the next.

The prompts of a batch end in the same slot of the cache, so shorter ones begin with empty slots.
Programs run ahead of the host by a token: while it looks at one, the next is being computed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import compress
from compress.arrays import is_compressed
from fw import precision
from fw.errors import FwError
from fw.generation.sampling import Sampling, choose, controls
from fw.hub import FAMILIES
from fw.model import Model, Variables
from fw.models.cache import EMPTY
from fw.models.stack import apart
from sharding import Rules, put, scope

SLOTS = 64
"""Prompts and caches are as long as multiples of this, so that few programs are compiled."""

CACHES = ("f32", "int8")
"""What keys and values are kept as; of int8, every head of every token has its scale."""


@dataclass(frozen=True, eq=False)
class Decoder:
    """A model as the two programs that generation takes.

    Attributes:
      model: one with a cache.
      variables: its parameters, compressed or not.
      mesh, rules: where they lie; None for wherever.
      policy: of the dots, as in `fw.precision`.
      cache: what keys and values are kept as: "f32", or "int8", which takes about a quarter of the
        memory, (1 + 4 / head_dim) / 4, and rounds them.
    """

    model: Model
    variables: Variables
    mesh: Mesh | None = None
    rules: Rules | None = None
    policy: str = "f32"
    cache: str = "f32"

    def __post_init__(self):
        """Refuses what cannot generate."""
        if self.cache not in CACHES:
            raise FwError(f"cache {self.cache!r} is unknown; choose one of {', '.join(CACHES)}")
        if self.model.cache is None:
            raise FwError(
                f"a {type(self.model.config).__name__} does not generate; expected a decoder, such "
                "as Llama"
            )
        for axis in ("pipe", "sequence"):
            if self.mesh is not None and self.mesh.shape.get(axis, 1) > 1:
                raise FwError(
                    f"mesh axis {axis!r}: tokens come one after another, through all layers; load "
                    "the model on data, fsdp, tensor or expert"
                )

    def scope(self) -> Any:
        """Where programs are traced."""
        if self.mesh is None or self.rules is None:
            return nullcontext()
        return scope(self.mesh, self.rules)

    def run(self, program: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Calls a program of the model's variables where it is traced rightly."""
        with self.scope():
            return program(self.variables, *args, **options)

    def placed(self, tree: Any) -> Any:
        """Arrays with rows, on the mesh."""
        if self.mesh is None or self.rules is None:
            return jax.tree.map(jnp.asarray, tree)
        return put(tree, self.mesh, self.rules)

    @cached_property
    def rows(self) -> int:
        """A batch has a multiple of this many rows."""
        if self.mesh is None or self.rules is None:
            return 1
        cut = self.rules.spec(("batch",), activation=True)[0] or ()
        axes = (cut,) if isinstance(cut, str) else cut
        return int(np.prod([self.mesh.shape.get(axis, 1) for axis in axes]))

    def apart(self) -> "Decoder":
        """The same with its layers apart, which generates faster on a CPU, and compiles longer."""
        params = dict(self.variables["params"])
        stack = dict(params["stack"])
        stack["layers"] = jax.jit(apart, static_argnums=1)(
            stack["layers"], self.model.config.num_hidden_layers
        )
        variables = {**self.variables, "params": {**params, "stack": stack}}
        return replace(self, model=_apart(self.model), variables=variables)

    @cached_property
    def programs(self) -> "Programs":
        """Compiled once for a model, however many decoders have it."""
        leaves = jax.tree.leaves(self.variables, is_leaf=is_compressed)
        return _programs(self.model, self.policy, self.cache, any(map(is_compressed, leaves)))


@lru_cache(maxsize=8)
def _apart(model: Model) -> Model:
    return FAMILIES[model.config.model_type].model(replace(model.config, scan=False))


@dataclass(frozen=True)
class Programs:
    """What a model does to generate.

    Attributes:
      begin: `(batch, slots) -> cache`, which holds nothing.
      extend: `(variables, ids [B, L], positions [B, L], cache, last) -> (logits, cache)`, of the
        `last` tokens, [B, last, V].
      first: reads the prompts and chooses a token for each; compiled.
      next: reads each text's last token and chooses the next; compiled.
    """

    begin: Callable[[int, int], Any]
    extend: Callable[..., tuple[jax.Array, Any]]
    first: Callable[..., tuple[Any, Any]]
    next: Callable[..., tuple[Any, Any]]


@lru_cache(maxsize=16)
def _programs(model: Model, policy: str, kept: str, small: bool) -> Programs:
    small |= kept == "int8"
    apply = precision.apply(compress.apply(model.apply) if small else model.apply, policy)

    def begin(batch: int, slots: int):
        assert model.cache is not None
        cache = model.cache(batch, slots)
        return cache if kept == "f32" else jax.tree.map(_int8, cache)

    def extend(variables, ids, positions, cache, last: int):
        batch = {"input_ids": ids, "position_ids": positions, "cache": cache, "last": last}
        outputs, _ = apply(variables, batch)
        return outputs["logits"], outputs["cache"]

    @partial(jax.jit, static_argnames=("slots", "random", "penalised"))
    def first(variables, ids, positions, control, stops, *, slots, random, penalised):
        logits, cache = extend(variables, ids, positions, begin(len(ids), slots), 1)
        seen = None
        if penalised:
            rows = jnp.arange(len(ids))[:, None]
            seen = jnp.zeros((len(ids), logits.shape[-1]), bool)
            seen = seen.at[rows, ids].max(positions != EMPTY)
        state = {"cache": cache, "seen": seen, "position": positions[:, -1]}
        return _chosen(state, logits[:, -1], positions[:, -1] == EMPTY, control, stops, random)

    @partial(jax.jit, static_argnames="random", donate_argnames="state")
    def following(variables, state, control, stops, *, random):
        where = jnp.where(state["done"], EMPTY, state["position"])[:, None]
        logits, cache = extend(variables, state["token"][:, None], where, state["cache"], 1)
        state = {**state, "cache": cache}
        return _chosen(state, logits[:, -1], state["done"], control, stops, random)

    return Programs(begin, extend, first, following)


def _int8(zeros: jax.Array) -> Any:
    """Zeros of a cache as int8 with a scale for each row; numbers of positions as they are.

    Quantising zeros would do the same, but while compiling, for minutes.
    """
    if not jnp.issubdtype(zeros.dtype, jnp.floating):
        return zeros
    scale = zeros[..., :1].astype(jnp.float32) + np.float32(1)
    return compress.Quantized(zeros.astype(jnp.int8), scale, as_dtype=np.dtype(zeros.dtype))


def _chosen(state, logits, done, control, stops, random):
    """The state with the next token of each row that is not done."""
    position = state["position"] + jnp.int32(1)
    token = choose(logits, position, control, state["seen"], random=random)
    seen = state["seen"]
    if seen is not None:
        seen = seen.at[jnp.arange(len(token)), token].set(True)
    state = {**state, "token": token, "position": position, "seen": seen}
    return {**state, "done": done | jnp.any(token[:, None] == stops, axis=-1)}, (token, done)


def decode(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[Sampling],
    *,
    most: int,
    stops: Sequence[int] = (),
) -> Iterator[list[int | None]]:
    """Generates token by token.

    Args:
      decoder: of the model.
      prompts: the ids of each text, one at least.
      settings: of each text.
      most: tokens to generate for each.
      stops: a text ends with any of these, which is given, too.

    Yields:
      The next token of each text, None for those that have ended.

    Raises:
      FwError: a text without tokens, or one that is too long for the model's positions, or ids that
        it has no row for.
    """
    if not prompts or most < 1:
        return
    given = prepare(decoder, prompts, settings, most, stops)
    state, chosen = decoder.run(
        decoder.programs.first, given.ids, given.positions, *given.shared, **given.options
    )
    for number in range(most):
        ahead = chosen
        if number + 1 < most:  # before the host waits for this token
            state, chosen = decoder.run(
                decoder.programs.next, state, *given.shared, random=given.options["random"]
            )
        told = tell(ahead, len(prompts))
        if all(token is None for token in told):
            return
        yield told


class Given(NamedTuple):
    """What the programs of a batch take.

    Attributes:
      ids, positions: int32 [B, L]: prompts that end in the same column, and rows that are of no
        text, for the mesh.
      shared: of all programs: the settings of the rows, and the tokens that end a text.
      options: of the first: what is compiled in.
    """

    ids: Any
    positions: Any
    shared: tuple[dict[str, Any], jax.Array]
    options: dict[str, Any]


def prepare(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[Sampling],
    most: int,
    stops: Sequence[int],
) -> Given:
    """Checks prompts and lays them out on the decoder's mesh, with room for `most` more tokens."""
    check(decoder.model.config, prompts, most)
    length = -(-max(map(len, prompts)) // SLOTS) * SLOTS
    count = -(-len(prompts) // decoder.rows) * decoder.rows
    ids = np.zeros((count, length), np.int32)
    positions = np.full((count, length), EMPTY, np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = prompt
        positions[row, length - len(prompt) :] = np.arange(len(prompt))
    control = controls([*settings, *[Sampling()] * (count - len(prompts))])
    ids, positions, control = decoder.placed((ids, positions, control))
    options = {
        "slots": -(-(length + most) // SLOTS) * SLOTS,
        "random": any(s.temperature > 0 for s in settings),
        "penalised": any(s.repetition_penalty != 1 for s in settings),
    }
    return Given(ids, positions, (control, jnp.asarray([*stops] or [EMPTY], jnp.int32)), options)


def tell(chosen: tuple[Any, Any], count: int) -> list[int | None]:
    """The tokens of the first `count` rows, None for those that had ended before."""
    token, done = map(np.asarray, chosen)
    pairs = zip(token[:count], done[:count], strict=True)
    return [None if d else int(t) for t, d in pairs]


def check(config: Any, prompts: Sequence[Sequence[int]], most: int) -> None:
    """Refuses prompts that the model has no room or no rows for."""
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise FwError(f"text {number}: expected a token at least, got none")
        if len(prompt) + most > config.positions:
            raise FwError(
                f"text {number} has {len(prompt)} tokens, and {most} more are asked for; the model "
                f"has {config.positions} positions"
            )
        if wrong := [token for token in prompt if not 0 <= token < config.vocab_size]:
            raise FwError(
                f"text {number} has the id {wrong[0]}, but the vocabulary ends at "
                f"{config.vocab_size - 1}; is it another model's tokenizer?"
            )
