"""Which expert takes which token, as pure functions of arrays.

A router gives every token one logit an expert. `route` turns logits into choices and weights,
`balance_loss` and `z_loss` keep the choices spread and the logits small, and `queue` lines tokens
up before their experts. Nothing here knows a mesh; `experts` moves the tokens.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sharding.errors import ShardingError

Priority = Literal["order", "weight"]
"""Who comes first in an expert's queue: first choices before second ones and earlier tokens before
later ones (GShard, Lepikhin et al. 2020, arXiv:2006.16668), or the choices with the largest weights
(batch prioritized routing, Riquelme et al. 2021, arXiv:2106.05974)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """The choices of all tokens; made by `route`.

    Attributes:
        logits: [..., experts], in float32 or wider.
        probabilities: [..., experts], their softmax.
        experts: int32 [..., k], the experts of each token, best first; the number of experts,
            which is no expert, for a token that is masked out.
        weights: [..., k], what each expert's output is multiplied by; 0 for a masked token.
    """

    logits: jax.Array
    probabilities: jax.Array
    experts: jax.Array
    weights: jax.Array

    @property
    def number(self) -> int:
        """How many experts there are to choose from."""
        return self.logits.shape[-1]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Load:
    """What came of the choices, over the whole batch: the same on every mesh.

    Attributes:
        tokens: int32 [experts], the tokens that each expert computed.
        dropped: the share of choices that found their expert full.
        kept: bool [..., k], whether each choice was computed.
    """

    tokens: jax.Array
    dropped: jax.Array
    kept: jax.Array


def route(
    logits: jax.Array, k: int, *, renormalize: bool = True, mask: jax.Array | None = None
) -> Routing:
    """Choose the `k` most probable experts of each token.

    p = softmax(logits); the weights are the k largest p, divided by their sum if `renormalize`
    (Mixtral, arXiv:2401.04088) and as they are otherwise (Switch Transformer, arXiv:2101.03961,
    with k = 1: the router learns by the weight alone). Of equal logits the lower expert is chosen.

    Args:
        logits: [..., experts], floating; computed on in float32 at least.
        k: experts a token, from 1 to all.
        renormalize: whether each token's weights sum to 1.
        mask: bool [...], False for padding: it goes to no expert and takes nobody's place.

    Returns:
        The routing. Gradients flow to the logits through weights and probabilities.

    Raises:
        ShardingError: a `k` that is not from 1 to the number of experts.

    >>> routing = route(jnp.array([[0.0, 2.0, 1.0], [5.0, 5.0, 5.0]]), 2)
    >>> routing.experts
    Array([[1, 2],
           [0, 1]], dtype=int32)
    >>> routing.weights[1]
    Array([0.5, 0.5], dtype=float32)
    """
    number = logits.shape[-1]
    if not 1 <= k <= number:
        raise ShardingError(f"route: k={k} of {number} experts; expected from 1 to {number}")
    logits = logits.astype(np.promote_types(logits.dtype, np.float32))
    probabilities = jax.nn.softmax(logits, axis=-1)
    # A sort is cut over tokens like any other operation; lax.top_k makes every device gather all.
    index = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    order = lax.sort((-lax.stop_gradient(logits), index), num_keys=1, is_stable=True)[1]
    chosen = order[..., :k]
    # Not by take_along_axis: its gradient is a scatter, which the partitioner may not keep local.
    zero = jnp.zeros((), probabilities.dtype)
    weights = jnp.sum(jnp.where(_is(chosen, number), probabilities[..., None, :], zero), -1)
    if renormalize:
        weights = weights / jnp.sum(weights, -1, keepdims=True)
    if mask is not None:
        chosen = jnp.where(mask[..., None], chosen, number)
        weights = jnp.where(mask[..., None], weights, jnp.zeros((), weights.dtype))
    return Routing(logits, probabilities, chosen, weights)


def _is(chosen: jax.Array, number: int) -> jax.Array:
    """bool [..., k, experts]: one True for each choice, none for no expert."""
    return chosen[..., None] == lax.broadcasted_iota(jnp.int32, (number,), 0)


def counts(experts: jax.Array, number: int, where: jax.Array | None = None) -> jax.Array:
    """How many choices fell on each expert.

    Args:
        experts: int32 [..., k].
        number: of experts.
        where: bool [..., k], which choices to count; all by default.

    Returns:
        int32 [number].

    >>> counts(jnp.array([[0, 1], [1, 3]]), 3)
    Array([1, 2, 0], dtype=int32)
    """
    hit = _is(experts, number)
    if where is not None:
        hit = hit & where[..., None]
    return jnp.sum(hit, tuple(range(experts.ndim)), dtype=jnp.int32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Usage:
    """How often each expert was chosen, and how likely it was; adds up over layers and batches.

    Attributes:
        choices: [experts], how many tokens chose each; no gradient.
        probabilities: [experts], the sum over tokens of the probability of each.
        tokens: scalar, how many there were, masked ones not counted.
    """

    choices: jax.Array
    probabilities: jax.Array
    tokens: jax.Array


def usage(routing: Routing) -> Usage:
    """What `balance_loss` looks at, of all tokens of all devices.

    >>> usage(route(jnp.zeros((6, 3)), 1))
    Usage(choices=Array([6., 0., 0.], dtype=float32), \
probabilities=Array([2., 2., 2.], dtype=float32), tokens=Array(6., dtype=float32))
    """
    real = _real(routing)
    choices = counts(routing.experts, routing.number).astype(real.dtype)
    rows = tuple(range(real.ndim))
    return Usage(choices, jnp.sum(routing.probabilities * real[..., None], rows), jnp.sum(real))


def balance_loss(used: Routing | Usage) -> jax.Array:
    """The loss that is 1 where experts are used evenly (Switch Transformer, eq. 4–6).

    E Σₑ fₑ Pₑ with fₑ the share of choices that fell on e, which has no gradient, and Pₑ the mean
    probability of e, over all tokens that are not masked. For k > 1, as in Mixtral but divided by
    k. Add it to the loss of the task with a small factor, such as 0.01.

    Args:
        used: of `route`; all tokens of all devices count as one batch. Or the sum of several
            layers' `usage`, which counts them as one layer: where one uses much what another uses
            little, the mean of their own losses is larger.

    Returns:
        A scalar: 1 if balanced, up to the number of experts if all tokens choose one.

    >>> balance_loss(route(jnp.eye(4) * 9, 1))
    Array(1., dtype=float32)
    """
    used = usage(used) if isinstance(used, Routing) else used
    one = jnp.ones((), used.tokens.dtype)
    share = used.choices / jnp.maximum(jnp.sum(used.choices), one)
    mean = used.probabilities / jnp.maximum(used.tokens, one)
    return used.choices.size * jnp.sum(share * mean)


def z_loss(routing: Routing) -> jax.Array:
    """The mean of log²(Σ exp(logits)) (ST-MoE, Zoph et al. 2022, arXiv:2202.08906, eq. 5).

    It keeps logits small, where float32 still tells them apart. A usual factor is 0.001.

    Args:
        routing: of `route`.

    Returns:
        A scalar, 0 or more.

    >>> z_loss(route(jnp.log(jnp.full((5, 2), 0.5)), 1))
    Array(0., dtype=float32)
    """
    real = _real(routing)
    squares = jnp.square(jax.nn.logsumexp(routing.logits, axis=-1))
    return jnp.sum(squares * real) / jnp.maximum(jnp.sum(real), 1)


def _real(routing: Routing) -> jax.Array:
    """1 for each token that goes somewhere, 0 for masked ones."""
    return (routing.experts[..., 0] < routing.number).astype(routing.logits.dtype)


def queue(experts: jax.Array, weights: jax.Array, priority: Priority = "order") -> jax.Array:
    """The place of each choice in the queue before its expert; every group has its own queues.

    Args:
        experts: int32 [groups, tokens, k].
        weights: [groups, tokens, k], looked at if `priority` is "weight".
        priority: who comes first.

    Returns:
        int32 [groups, tokens, k], 0 for the first.

    >>> queue(jnp.array([[[0, 1], [1, 0], [0, 2]]]), jnp.zeros((1, 3, 2)))
    Array([[[0, 1],
            [0, 2],
            [1, 0]]], dtype=int32)
    """
    groups, tokens, k = experts.shape
    line = (groups, k * tokens)  # first choices of all tokens, then second ones
    flat = jnp.swapaxes(experts, 1, 2).reshape(line)
    index = lax.broadcasted_iota(jnp.int32, line, 1)
    keys = [flat]
    if priority == "weight":
        keys.append(-lax.stop_gradient(jnp.swapaxes(weights, 1, 2).reshape(line)))
    elif priority != "order":
        raise ShardingError(f"priority {priority!r}: expected 'order' or 'weight'")
    ordered, *_, source = lax.sort((*keys, index), num_keys=len(keys), is_stable=True)
    new = jnp.concatenate([jnp.ones((groups, 1), bool), ordered[:, 1:] != ordered[:, :-1]], axis=1)
    place = index - lax.cummax(jnp.where(new, index, 0), axis=1)
    back = lax.sort((source, place), num_keys=1)[1]
    return jnp.swapaxes(back.reshape(groups, k, tokens), 1, 2)
