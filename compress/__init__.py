"""Smaller arrays, same function: compressed parameter trees and the interpreter that reads them.

Transforms such as `quantize` replace chosen leaves of a parameter tree by compressed arrays, and
`chain` joins them; `apply` makes any pure function understand the result. The guide is `README.md`.
"""

from compress.adafactor import scale_by_adafactor
from compress.adam import scale_by_adam_8bit
from compress.adapter_trees import Adapter, attach, choose, detach, stack_adapters
from compress.adapters import LoRA, Trained
from compress.arrays import Compressed, Quantized, dequantize, is_compressed, specs
from compress.awq_scales import awq
from compress.calibrated import stats_specs
from compress.choice import Choice, search
from compress.coupling import Couplings, Dimension, couplings
from compress.damage import Sensitivity, sensitivity
from compress.factored import Factored
from compress.gptq_solver import gptq
from compress.gradual import Schedule, sparsify
from compress.histogram import threshold
from compress.importance import activation_scores, choose_units, magnitude_scores, taylor_scores
from compress.interpreter import apply
from compress.latency import Times, measure
from compress.learned import Learned, harden, qat
from compress.lowrank import Lowrank, lowrank
from compress.merging import merge, unmerge
from compress.nearest import quantize
from compress.observed import Observed
from compress.observed import check as check_stats
from compress.observed import merge as merge_stats
from compress.observing import Stats, observe
from compress.packed import Packed
from compress.prepare import rotate, smooth
from compress.prune import Prune, gradient_scores, prune
from compress.recipe import dumps, loads
from compress.scheme import Scheme, fit
from compress.serialize import from_arrays, to_arrays
from compress.shrink import Cut, Shrink, check_shrunk, shrink
from compress.trainable import combine, lora, partition, trainable_share
from compress.transform import Record, Transform, chain, match
from compress.verified import Verified, verify

__all__ = [
    "Adapter",
    "Choice",
    "Compressed",
    "Couplings",
    "Cut",
    "Dimension",
    "Factored",
    "Learned",
    "LoRA",
    "Lowrank",
    "Observed",
    "Packed",
    "Prune",
    "Quantized",
    "Record",
    "Schedule",
    "Scheme",
    "Sensitivity",
    "Shrink",
    "Stats",
    "Times",
    "Trained",
    "Transform",
    "Verified",
    "activation_scores",
    "apply",
    "attach",
    "awq",
    "chain",
    "check_shrunk",
    "check_stats",
    "choose",
    "choose_units",
    "combine",
    "couplings",
    "dequantize",
    "detach",
    "dumps",
    "fit",
    "from_arrays",
    "gptq",
    "gradient_scores",
    "harden",
    "is_compressed",
    "loads",
    "lora",
    "lowrank",
    "magnitude_scores",
    "match",
    "measure",
    "merge",
    "merge_stats",
    "observe",
    "partition",
    "prune",
    "qat",
    "quantize",
    "rotate",
    "scale_by_adafactor",
    "scale_by_adam_8bit",
    "search",
    "sensitivity",
    "shrink",
    "smooth",
    "sparsify",
    "specs",
    "stack_adapters",
    "stats_specs",
    "taylor_scores",
    "threshold",
    "to_arrays",
    "trainable_share",
    "unmerge",
    "verify",
]
