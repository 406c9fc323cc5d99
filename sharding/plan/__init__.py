"""Layouts for machines that need not be here: estimated by the thousand, compiled, ranked."""

from sharding.plan.chips import CHIPS, Chip
from sharding.plan.hardware import Hardware, hardware, legal
from sharding.plan.layouts import Layout, Plan, load
from sharding.plan.options import OPTIONS, options_of
from sharding.plan.plan import plan, plan_variants
from sharding.plan.prediction import Prediction
from sharding.plan.search import Candidate, Variant
from sharding.plan.why import why

__all__ = [
    "CHIPS",
    "OPTIONS",
    "Candidate",
    "Chip",
    "Hardware",
    "Layout",
    "Plan",
    "Prediction",
    "Variant",
    "hardware",
    "legal",
    "load",
    "options_of",
    "plan",
    "plan_variants",
    "why",
]
