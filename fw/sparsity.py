"""Pruning while fine-tuning: options of a run, and optax's transformation for them.

    fw finetune --model runs/dense/model --sparsity 0.8 --teacher runs/dense …

Entries of kernels go from the first tenth of the steps on, most of them early, and have all gone
before the last part, in which what stays learns. The best model is chosen of that part alone.
"""

from dataclasses import dataclass, fields
from typing import Any

import compress
from compress.gradual import CURVES, WORTHS
from compress.nearest import USUAL
from compress.patterns import Pattern
from compress.prune import Sparsity
from fw.errors import FwError
from fw.options import check_choices, parted

BEGIN = 0.1
"""The part of all steps after which the first entries go."""

TIMES = 100
"""In how many steps of a run entries may go."""


@dataclass(frozen=True)
class Sparse:
    """What becomes zero while a run trains.

    Attributes:
      sparsity: part of the kernels' entries that goes; 0 for none.
      sparsity_pattern: where they may be: anywhere; "2:4", two of four neighbours stay, whose part
        is known; "16x16", blocks of inputs and outputs.
      sparsity_by: what is of least worth: magnitude, movement or gradient; see `compress.sparsify`.
      sparsity_on: patterns of the kernels, as in "**/layers/**/kernel"; nothing: all of them.
      sparsity_curve: cubic, from a tenth of the steps on, much at first; or constant, all at once.
      sparsity_until: part of the steps after which all have gone.
    """

    sparsity: float = 0.0
    sparsity_pattern: str = ""
    sparsity_by: str = "magnitude"
    sparsity_on: str = ""
    sparsity_curve: str = "cubic"
    sparsity_until: float = 0.6

    def __post_init__(self):
        """Checks them."""
        check_choices(self, {"sparsity_by": WORTHS, "sparsity_curve": CURVES})
        try:
            group = Pattern(self.sparsity_pattern).group
        except ValueError as error:
            raise FwError(f"sparsity_pattern: {error}") from error
        if not self.sparsity and not group:
            for field in fields(Sparse):
                if getattr(self, field.name) != field.default:
                    raise FwError(f"{field.name} is for pruning; give --sparsity a part, too")
        if self.sparsity and (group or not 0 < self.sparsity < 1):
            why = "no part where the pattern has one" if group else "a part between 0 and 1"
            raise FwError(f"sparsity is {self.sparsity}; expected {why}")
        if not BEGIN <= self.sparsity_until <= 1:
            raise FwError(f"sparsity_until is {self.sparsity_until}; expected {BEGIN} to 1")

    @property
    def sparse(self) -> bool:
        """Whether anything goes."""
        return bool(self.sparsity or self.sparsity_pattern)


def schedule(options: Sparse, steps: int) -> compress.Schedule:
    """When how much goes, of a run of so many steps.

    >>> schedule(Sparse(sparsity=0.8), 1000)
    Schedule(begin=100, end=600, every=10, curve='cubic')
    """
    end = max(1, round(options.sparsity_until * steps))
    begin = min(end, max(1, round(BEGIN * steps)))
    return compress.Schedule(begin, end, max(1, steps // TIMES), options.sparsity_curve)


def sparsified(options: Sparse, steps: int) -> Any:
    """Optax's transformation for a run's options, the last of its chain."""
    rule = Sparsity(options.sparsity or None, options.sparsity_pattern)
    rules = dict.fromkeys(parted(options.sparsity_on) or (USUAL,), rule)
    return compress.sparsify(rules, schedule(options, steps), by=options.sparsity_by)


def all_gone(options: Sparse, steps: int) -> int:
    """The step after which all have gone; 0 if nothing does."""
    return schedule(options, steps).end if options.sparse else 0
