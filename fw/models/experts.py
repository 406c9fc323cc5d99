"""A mixture-of-experts layer: a router, and in place of one MLP as many as there are experts.

With SwiGLU and weights that sum to 1 it is Mixtral's (Jiang et al. 2024, arXiv:2401.04088); with
GELU, `chosen=1`, a capacity and `renormalize=False` it is the Switch Transformer's (Fedus et al.
2021, arXiv:2101.03961). `sharding.experts` moves the tokens, wherever the experts lie.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from fw import precision
from fw.errors import FwError
from fw.models.layers import gelu
from sharding.parallel.experts import experts
from sharding.parallel.routing import Load, Usage, balance_loss, route, usage, z_loss

ACTIVATIONS = ("swiglu", "gelu")
AXES = {"up": ("experts", "embed", None, "mlp"), "down": ("experts", "mlp", "embed")}


@dataclass(frozen=True)
class ExpertsConfig:
    """What a layer of experts is.

    Attributes:
      number: of experts.
      chosen: experts a token.
      size: of a token, in and out.
      inner_size: of an expert's hidden activations.
      activation: "swiglu", (silu(x · gate) * (x · up)) · down, or "gelu", gelu(x · up) · down.
      capacity: how many times its even share of a group an expert takes; None drops no token.
      group: tokens a group, which share the capacity; None for a whole row.
      renormalize: whether each token's weights sum to 1.
      std: of the initial parameters.
    """

    number: int
    chosen: int
    size: int
    inner_size: int
    activation: str = "swiglu"
    capacity: float | None = None
    group: int | None = None
    renormalize: bool = True
    std: float = 0.02

    def __post_init__(self):
        """Checks what the arithmetic relies on."""
        if self.activation not in ACTIVATIONS:
            raise FwError(f"activation {self.activation!r} is unknown; choose one of {ACTIVATIONS}")
        if not 1 <= self.chosen <= self.number:
            raise FwError(f"chosen {self.chosen} of {self.number} experts; expected 1 to all")
        if self.capacity is not None and not self.capacity > 0:
            raise FwError(f"capacity {self.capacity}; expected more than 0, or None")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertsAux:
    """What a layer of experts tells besides its output.

    Attributes:
      balance: scalar, 1 if the experts are used evenly; to be added to the loss, times 0.01 or so.
      z: scalar, the mean squared log of the router's normaliser; times 0.001 or so.
      load: what each expert computed and what was dropped, for the log.
      usage: what `balance` is made of, for a loss of several layers together.
    """

    balance: jax.Array
    z: jax.Array
    load: Load
    usage: Usage


class Experts(nnx.Module):
    """y = Σ weight · expert(x) over the chosen experts of each token; x [batch, length, size].

    `mask`, bool [batch, length], is False for padding, which goes to no expert and comes out as 0.

    >>> config = ExpertsConfig(number=4, chosen=2, size=8, inner_size=16)
    >>> y, aux = Experts(config, nnx.Rngs(0))(jnp.ones((2, 3, 8)))
    >>> y.shape, aux.load.tokens.sum()
    ((2, 3, 8), Array(12, dtype=int32))
    """

    def __init__(self, config: ExpertsConfig, rngs: nnx.Rngs):
        number, size, inner = config.number, config.size, config.inner_size
        parts = 2 if config.activation == "swiglu" else 1
        self.config = config

        def parameter(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
            return nnx.Param(jax.random.normal(rngs.params(), shape) * config.std, axes=axes)

        # Its second axis is never cut: every device routes its own tokens among all experts.
        self.router = parameter((size, number), ("embed", None))
        # The gate and what it lets through are one product: one sum over `tensor`, not two.
        self.up = parameter((number, size, parts, inner), AXES["up"])
        self.down = parameter((number, inner, size), AXES["down"])

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, ExpertsAux]:
        config = self.config
        logits = router_logits(x, self.router[...])
        routing = route(logits, config.chosen, renormalize=config.renormalize, mask=mask)
        y, load = experts(
            precision.here(mlp),
            {"up": self.up[...], "down": self.down[...]},
            x,
            routing,
            axes=AXES,  # not the parameters' metadata: in a stack, that has "layers" before
            capacity=config.capacity,
            group=config.group,
            operands=precision.operands(),
            together=precision.here(mlps),
        )
        used = usage(routing)
        return y, ExpertsAux(balance_loss(used), z_loss(routing), load, used)


def mlp(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """One expert: SwiGLU (Shazeer 2020, arXiv:2002.05202) if `up` has two parts, else GELU.

    Args:
      params: up [size, parts, inner], the gate first; down [inner, size].
      x: [n, size].
    """
    hidden = jnp.einsum("nd,dpf->npf", x, params["up"])
    return jnp.matmul(_activated(hidden), params["down"])


def mlps(params: dict[str, jax.Array], x: jax.Array, sizes: jax.Array) -> jax.Array:
    """All experts at once: `mlp` of each on its own rows.

    Args:
      params: up [experts, size, parts, inner], down [experts, inner, size].
      x: [n, size], the rows of the first expert first.
      sizes: int32 [experts], how many rows each has.
    """
    up = params["up"]
    hidden = lax.ragged_dot(x, up.reshape(*up.shape[:2], -1), sizes)
    return lax.ragged_dot(_activated(hidden.reshape(-1, *up.shape[2:])), params["down"], sizes)


def _activated(hidden: jax.Array) -> jax.Array:
    """[n, parts, inner] → [n, inner]."""
    gated = hidden.shape[1] == 2
    return jax.nn.silu(hidden[:, 0]) * hidden[:, 1] if gated else gelu(hidden[:, 0])


@jax.custom_vjp
def router_logits(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x · kernel, exact: operands, products and sums in float32, or in float64 if they are.

    A precision policy leaves it alone, for it brings its own derivative: a rounded logit sends a
    token to another expert (Fedus et al. 2021, arXiv:2101.03961, section 2.4).

    Args:
      x: [..., size].
      kernel: [size, experts].

    Returns:
      [..., experts], in the wider dtype of the two, float32 at least.

    >>> router_logits(jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4))).dtype
    dtype('float32')
    """
    wide = np.result_type(x.dtype, kernel.dtype, np.float32)
    return _exact("...d,de->...e", x.astype(wide), kernel.astype(wide))


def _exact(pattern: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(pattern, *operands, precision=lax.Precision.HIGHEST)


def _router_bwd(saved: Any, g: jax.Array):
    x, kernel = saved
    dx = _exact("...e,de->...d", g, kernel.astype(g.dtype))
    dk = _exact("...d,...e->de", x.astype(g.dtype), g)
    return dx.astype(x.dtype), dk.astype(kernel.dtype)


router_logits.defvjp(lambda x, kernel: (router_logits(x, kernel), (x, kernel)), _router_bwd)
