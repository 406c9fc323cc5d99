"""Why not: what stands against a layout that somebody has in mind, and the nearest that works."""

import math
from collections.abc import Mapping
from typing import Any

from sharding.errors import ShardingError
from sharding.mesh import AXES, sizes_of
from sharding.plan.analytic import estimate
from sharding.plan.compiler import compile_all
from sharding.plan.layouts import Layout, Plan, judged, program_of, rough_prediction
from sharding.plan.search import Candidate, against, divided, spec_of


def why(found: Plan, mesh: str, choices: Mapping[str, str] | None = None, **options: Any) -> str:
    """What stands against a layout, and the nearest that works.

    Args:
        found: a plan of the step.
        mesh: the layout's mesh.
        choices: of the variant; the first that has them is taken.
        **options: of `compile_all`.

    Raises:
        ShardingError: no mesh of the machine, or choices of none of the plan's variants.
    """
    machine = found.machine
    sizes = sizes_of(mesh, machine.devices)
    wanted = dict(choices or {})
    alike = [
        (variant, one) for variant, one in found.surveys
        if all(variant.choices.get(key) == value for key, value in wanted.items())
    ]  # fmt: skip
    if not alike:
        raise ShardingError(f"why: no variant of the plan has the choices {wanted}")
    variant, one = alike[0]
    if (reason := against(divided(one), sizes)) is not None:
        return f"{mesh}: {reason}; {_nearest(found, sizes)}"
    took = estimate(one, sizes, machine, microbatches=variant.staged * sizes["pipe"])
    candidate = Candidate(spec_of(sizes, machine), sizes, variant, took)
    layout = Layout(candidate, rough_prediction(candidate, machine, found.tokens, found.flops))
    if found.lacking is None:
        try:
            traced = program_of(candidate, machine)
            for _, result in compile_all([traced], **options):
                layout = judged(candidate, result, machine, found.tokens, found.flops)
        except ShardingError as error:
            return f"{candidate}: {error}; {_nearest(found, sizes)}"
    prediction = layout.prediction
    if prediction.memory.over > 0:
        what = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in took.largest[:3])
        return (
            f"{candidate}: {prediction.memory.over / 2**30:.2f} GiB too much of a device's "
            f"{prediction.memory.capacity / 2**30:.2f}; the largest are {what}; "
            f"{_nearest(found, sizes)}"
        )
    if layout.refused:
        return f"{candidate}: {layout.refused}; {_nearest(found, sizes)}"
    slow = prediction.seconds / found.best.prediction.seconds
    worst = max(prediction.sent.items(), key=lambda item: item[1], default=("no collective", 0.0))
    waits = prediction.waited.get(worst[0], prediction.exposed)
    return (
        f"{candidate} works: {prediction.seconds:.4g} s a step, {slow:.2f} times the best's "
        f"({found.best}); its largest collective is {worst[0]}, {worst[1]:.3g} s, of which "
        f"{waits:.3g} s nothing hides"
    )


def _nearest(found: Plan, sizes: Mapping[str, int]) -> str:
    works = [one for one in found.layouts if one.works]
    if not works:
        return "no layout that was tried works"

    def far(one: Layout) -> float:
        return sum(abs(math.log2(one.candidate.sizes.get(a, 1) / sizes.get(a, 1))) for a in AXES)

    best = min(works, key=lambda one: (far(one), one.prediction.seconds))
    return f"the nearest that works is {best}, {best.prediction.seconds:.4g} s a step"
