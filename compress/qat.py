"""Quantisation-aware training: weights learn to be rounded, and scales how far to step.

    ŵ = s · round(clip(w / s)),   s = exp(log_scale)

`qat` makes a `Learned` of each chosen leaf: the floats w, and a scale for each tensor, channel or
group of them. Under `compress.apply` functions see ŵ, and `jax.grad` trains both: rounding counts as
the identity for w, and s has the gradient of LSQ. `harden` then keeps the codes alone. What trains
also runs hardened: a `Learned` takes the primitives that a `Quantized` takes, by the same rules.
"""

import dataclasses
import functools
import math
from dataclasses import field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import quax
from jax import lax
from jax.extend.core import jaxpr_as_fun
from jax.extend.core.primitives import sharding_constraint_p, stop_gradient_p
from jax.typing import ArrayLike

from compress.arrays import Compressed, Quantized, is_compressed, place_part
from compress.blocks import spread
from compress.formats import FLOAT
from compress.products import rounded
from compress.quantize import Quantize
from compress.scheme import TINY, Grid, Scheme, as_scheme, assemble, coded, grid
from compress.transform import Leafwise, Rules
