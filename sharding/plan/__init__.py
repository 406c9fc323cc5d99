"""Layouts for machines that need not be here: estimated by the thousand, compiled, ranked."""

from sharding.plan.chips import CHIPS, Chip
from sharding.plan.hardware import Hardware, hardware, legal
from sharding.plan.plan import Layout, Plan, load, plan, plan_variants, why
from sharding.plan.prediction import Prediction
from sharding.plan.search import Candidate, Variant

__all__ = [
    "CHIPS",
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
    "plan",
    "plan_variants",
    "why",
]
