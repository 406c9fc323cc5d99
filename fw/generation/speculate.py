"""Speculative decoding: a small model guesses ahead, the large one checks all guesses at once.

The large model chooses every token as it would have alone, greedily or with its seed; a guess only
tells what to compute before it is known. So the output does not change, whatever the draft says.
The draft draws with the same seeds, and so guesses right more often than an independent draw
(Leviathan et al. 2023, arXiv:2211.17192, compare two independent draws).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fw.errors import FwError
from fw.generation.decode import Decoder, Programs, check, prepare, tell
from fw.generation.sampling import Sampling, choose
from fw.models.cache import EMPTY

AHEAD = 4
"""Tokens that are guessed at a time."""


def speculate(
    decoder: Decoder,
    draft: Decoder,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[Sampling],
    *,
    most: int,
    stops: Sequence[int] = (),
    ahead: int = AHEAD,
) -> Iterator[list[int | None]]:
    """As `decode`, in fewer steps of the large model.

    A batch goes at the pace of the text whose guesses are worst.

    Args:
      decoder: of the model.
      draft: of the model that guesses, which has the same vocabulary.
      prompts, settings, most, stops: as in `decode`.
      ahead: tokens that are guessed at a time.

    Raises:
      FwError: as `decode`, or models of different vocabularies.
    """
    sizes = [d.model.config.vocab_size for d in (decoder, draft)]
    if sizes[0] != sizes[1]:
        raise FwError(f"draft: has {sizes[1]} words, the model {sizes[0]}; expected the same")
    if decoder.mesh != draft.mesh:
        raise FwError("draft: lies on another mesh than the model; load both on one")
    check(draft.model.config, prompts, most + ahead)
    if not prompts or most < 1:
        return
    given = prepare(decoder, prompts, settings, most + ahead, stops)
    control, _ = given.shared
    random = given.options["random"]
    verify, guess = _verify(decoder.programs, ahead, random), _guess(draft.programs, ahead, random)
    prompt = (given.ids, given.positions, *given.shared)
    state, chosen = decoder.run(decoder.programs.first, *prompt, **given.options)
    drafts, _ = draft.run(draft.programs.first, *prompt, **given.options)
    cache = drafts["cache"]
    yield tell(chosen, len(prompts))
    count = 1
    while count < most:
        begin = {k: state[k] for k in ("token", "position", "done", "seen")}
        guesses, cache = draft.run(guess, cache, begin, control)
        state, tokens, dones, used = decoder.run(verify, state, guesses, *given.shared)
        cache = replace(cache, filled=state["cache"].filled)
        for i in range(min(int(used), most - count)):
            told = tell((tokens[i], dones[i]), len(prompts))
            if all(token is None for token in told):
                return
            yield told
        count += int(used)


def _noted(seen: Any, token: jax.Array) -> Any:
    return None if seen is None else seen.at[jnp.arange(len(token)), token].set(True)


@lru_cache(maxsize=16)
def _guess(programs: Programs, ahead: int, random: bool) -> Any:
    @jax.jit
    def guess(variables, cache, state, control):
        """`ahead` tokens of each row; the last is read, too, in case that all are right."""
        filled = cache.filled

        def one(carry, _):
            cache, token, position, seen = carry
            where = jnp.where(state["done"], EMPTY, position)
            logits, cache = programs.extend(variables, token[:, None], where[:, None], cache, 1)
            position = position + jnp.int32(1)
            token = choose(logits[:, -1], position, control, seen, random=random)
            return (cache, token, position, _noted(seen, token)), token

        begin = (cache, state["token"], state["position"], state["seen"])
        (cache, *_), tokens = lax.scan(one, begin, length=ahead + 1)
        return tokens[:-1], replace(cache, filled=filled)

    return guess


@lru_cache(maxsize=16)
def _verify(programs: Programs, ahead: int, random: bool) -> Any:
    @partial(jax.jit, donate_argnames="state")
    def verify(variables, state, guesses, control, stops):
        """The model's own tokens [ahead + 1, B], and how many of them every row may keep."""
        ids = jnp.concatenate([state["token"][None], guesses]).T
        places = state["position"][:, None] + jnp.arange(ahead + 1, dtype=jnp.int32)
        where = jnp.where(state["done"][:, None], EMPTY, places)
        logits, cache = programs.extend(variables, ids, where, state["cache"], ahead + 1)

        def one(carry, entry):
            done, seen = carry
            logits, place = entry
            token = choose(logits, place + jnp.int32(1), control, seen, random=random)
            after = done | jnp.any(token[:, None] == stops, axis=-1), _noted(seen, token)
            return after, (token, done, after)

        begin = (state["done"], state["seen"])
        _, (tokens, dones, after) = lax.scan(one, begin, (jnp.swapaxes(logits, 0, 1), places.T))
        # A row that is done agrees with everything.
        right = (tokens[:-1] == guesses) | after[0][:-1]
        used = jnp.min(jnp.sum(jnp.cumprod(right.astype(jnp.int32), 0), 0)) + jnp.int32(1)
        last = used - jnp.int32(1)
        (done, seen), token = jax.tree.map(
            lambda x: lax.dynamic_index_in_dim(x, last, 0, keepdims=False), (after, tokens)
        )
        filled = state["cache"].filled + used
        state = {
            "cache": replace(cache, filled=filled), "token": token, "done": done, "seen": seen,
            "position": state["position"] + used,
        }  # fmt: skip
        return state, tokens, dones, used

    return verify
