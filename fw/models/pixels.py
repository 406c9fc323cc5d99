"""Normalised pixels, from outside: a model of `pixel_values` becomes one of uint8 `images`.

What the host sends and an artifact takes are the bytes of `fw.data.preprocess`, a quarter of
float32's; the device divides. The model does not know.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fw import precision
from fw.model import Batch, Model, Variables


def normalised(
    model: Model, mean: Sequence[float], std: Sequence[float], scale: float = 1 / 255
) -> Model:
    """Give a model `pixel_values`, (x·scale - mean) / std, for the `images` x of a batch.

    Args:
        model: takes `pixel_values`, float32 [B, H, W, C].
        mean, std: C numbers each, or one for all; of the scaled pixels.
        scale: of the pixels.

    Returns:
        A model that takes `images`, uint8 [B, H, W, C]. A batch without them goes through as it is.

    >>> def look(variables, batch, *, key=None, train=False):
    ...     return batch["pixel_values"], variables
    >>> model = normalised(Model(None, dict, look, {}), mean=[0.5], std=[0.5])
    >>> model.apply({}, {"images": jnp.array([[[[0], [255]]]], jnp.uint8)})[0].ravel().tolist()
    [-1.0, 1.0]
    """
    middle, spread = (np.asarray(numbers, np.float32) for numbers in (mean, std))

    def apply(
        variables: Variables, batch: Batch, *, key: jax.Array | None = None, train: bool = False
    ) -> tuple[Any, Variables]:
        others = dict(batch)
        if (images := others.pop("images", None)) is not None:
            scaled = images.astype(jnp.float32) * jnp.float32(scale)
            pixels = (scaled - middle) / spread
            others["pixel_values"] = pixels.astype(precision.activations() or pixels.dtype)
        return model.apply(variables, others, key=key, train=train)

    return replace(model, apply=apply)
