"""The optimiser of fine-tuning, as one optax chain of data the run's config holds."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import compress
from fw.errors import FwError

SCHEDULES = ("linear", "cosine", "constant")

MOMENTS = ("float32", "8bit", "factored")


@dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101) with warm-up, decay and clipping.

    Attributes:
      learning_rate: at its peak, after the warm-up.
      schedule: what follows the warm-up: "linear" or "cosine" down to 0, or "constant".
      warmup: the fraction of all steps in which the rate rises from 0 to its peak.
      weight_decay: applied to matrices only: biases and norms are left alone.
      clip: the largest global norm of the gradient; 0 for no clipping.
      b1: decay of Adam's mean of the gradients, a step.
      b2: decay of Adam's mean of their squares, a step.
      epsilon: the term in Adam's denominator.
      moments: what is kept of the gradients: "float32", two numbers a parameter; "8bit", two bytes
        (`compress.scale_by_adam_8bit`); "factored", what rows and columns have of the squares
        (`compress.scale_by_adafactor`, which has decays of its own).
    """

    learning_rate: float = 5e-5
    schedule: str = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8
    moments: str = "float32"

    def __post_init__(self):
        """Checks the ranges."""
        if self.schedule not in SCHEDULES:
            raise FwError(f"schedule {self.schedule!r} is unknown; choose one of {SCHEDULES}")
        if self.moments not in MOMENTS:
            raise FwError(f"moments {self.moments!r} are unknown; choose one of {MOMENTS}")
        if not 0 <= self.warmup < 1:
            raise FwError(f"warmup is {self.warmup}; expected a fraction of all steps in [0, 1)")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise FwError(f"{name} is {getattr(self, name)}; expected 0 or more, less than 1")
        for name in ("learning_rate", "weight_decay", "clip", "epsilon"):
            if getattr(self, name) < 0:
                raise FwError(f"{name} is {getattr(self, name)}; expected 0 or more")


def learning_rate(config: AdamW, steps: int) -> optax.Schedule:
    """The learning rate by step, for a run of `steps` steps.

    >>> rate = learning_rate(AdamW(learning_rate=1.0, warmup=0.2), steps=10)
    >>> [round(float(rate(step)), 3) for step in (0, 1, 2, 6, 10)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    peak, rising = config.learning_rate, round(config.warmup * steps)
    falling = max(steps - rising, 1)
    after = {
        "linear": optax.linear_schedule(peak, 0.0, falling),
        "cosine": optax.cosine_decay_schedule(peak, falling),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, rising), after], [rising])


def optimizer(config: AdamW, steps: int) -> optax.GradientTransformation:
    """Clip, then AdamW on the schedule of `learning_rate`, with moments as the config has them."""
    clip = clip_by_norm(config.clip) if config.clip else optax.identity()
    decays: Any = (config.b1, config.b2, config.epsilon)
    scale: Any = {
        "float32": partial(optax.scale_by_adam, *decays),
        "8bit": partial(compress.scale_by_adam_8bit, *decays),
        "factored": compress.scale_by_adafactor,
    }[config.moments]
    decayed = partial(jax.tree_util.tree_map_with_path, _is_matrix)
    adamw = optax.chain(
        scale(),
        optax.add_decayed_weights(config.weight_decay, decayed),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )
    return optax.chain(clip, adamw)


def _is_matrix(path: Any, x: Any) -> bool:
    """A stack's biases and norms have an axis of layers, too: they are told by their name."""
    return x.ndim > 1 and _name(path) not in ("bias", "scale", "magnitude", "log_scale")


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path[-1:], simple=True)


def gradient_norm(updates: Any) -> jax.Array:
    """The global norm of gradients, but for those of the logarithms of scales.

    These are no slopes of a loss (`compress.learned.fake_quantise`), and many times as large.

    >>> gradient_norm({"weight": jnp.array([3.0, 4.0]), "log_scale": jnp.array([99.0])})
    Array(5., dtype=float32)
    """
    pairs, _ = jax.tree_util.tree_flatten_with_path(updates)
    return optax.tree.norm([x for path, x in pairs if _name(path) != "log_scale"])


def clip_by_norm(largest: float) -> optax.GradientTransformation:
    """Scales all gradients by min(1, largest / their global norm) (Pascanu et al. 2013).

    `optax.clip_by_global_norm` divides each element, which the compiler keeps as a pass over all
    gradients of its own; a factor is multiplied in where they are used (scripts/bench/LOG.md).

    >>> clipped, _ = clip_by_norm(1.0).update({"w": jnp.array([3.0, 4.0])}, optax.EmptyState())
    >>> clipped["w"]
    Array([0.6, 0.8], dtype=float32)
    """

    def scale(updates: Any, _: Any) -> Any:
        norm = gradient_norm(updates)
        factor = jnp.minimum(1, largest / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates)

    return optax.stateless(scale)


def state_shardings(
    tx: optax.GradientTransformation, params: Any, shardings: Any, mesh: Mesh
) -> Any:
    """Where the optimiser's state lies: moments with their parameter, counters everywhere.

    Args:
      tx: the transformation.
      params: the parameters, or their shapes.
      shardings: a `NamedSharding` for each.
      mesh: of the counters.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(x: Any, sharding: Any, param: Any) -> Any:
        if compress.is_compressed(x):
            return x.place(sharding)
        return sharding if x.shape == param.shape else everywhere

    return optax.tree.map_params(
        tx,
        place,
        jax.eval_shape(tx.init, params),
        shardings,
        params,
        transform_non_params=lambda _: everywhere,
        is_leaf=compress.is_compressed,
    )
