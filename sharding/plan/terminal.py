"""A plan for people who read: the ranked table, and the table of chips."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sharding.plan.chips import CHIPS
from sharding.plan.hardware import legal

if TYPE_CHECKING:  # it prints them, they are printed by it
    from sharding.plan.layouts import Layout, Plan

_ROWS = 12


def table(found: "Plan", rows: int = _ROWS) -> str:
    """The layouts, the best first, and where the numbers come from.

    Args:
        found: the plan.
        rows: how many layouts at most.
    """
    cells: list[tuple[str, ...]] = [
        (
            "",
            "layout",
            "s a step",
            f"{found.unit}/s",
            "MFU",
            "GiB of a device",
            "waits",
            f"$/M {found.unit}",
            "says",
        )
    ]
    for number, one in enumerate(found.layouts[:rows], 1):
        cells.append(_row(number, one))
    lines = aligned(cells)
    lines.append("")
    shown = min(rows, len(found.layouts))
    lines.append(
        f"{found.considered:,} layouts were estimated for {found.machine}, {shown} are shown."
    )
    if found.lacking:
        lines.append(
            f"No compiler was asked: {found.lacking} is not installed (pip install 'fw[plan]'). "
            "These are estimates, whose memory may be a third off."
        )
    lines += found.notes
    best = next((one for one in found.layouts if one.works), None)
    if best is not None:
        lines += [f"  {key}: {text}" for key, text in best.prediction.sources.items() if text]
    return "\n".join(lines)


def _row(number: int, one: "Layout") -> tuple[str, ...]:
    own = one.prediction
    memory = f"{own.memory.peak / 2**30:.2f} of {own.memory.capacity / 2**30:.2f}"
    if not own.fits:
        memory += f", {own.memory.over / 2**30:.2f} over"
    dollars = "–" if own.dollars is None else f"{own.dollars:.3g}"
    says = "compiler" if one.compiled else "estimate"
    if one.refused and own.fits:
        says = one.refused[:40]
    if own.disagree and one.compiled:
        says += f" (roofline {own.roofline:.3g} s!)"
    return (
        str(number), str(one), f"{own.seconds:.4g}", f"{own.rate:,.0f}" if own.tokens else "–",
        f"{own.mfu:.1%}", memory, f"{own.exposed / own.seconds:.0%}" if own.seconds else "–",
        dollars, says,
    )  # fmt: skip


def hardware_table() -> str:
    """Every chip: figures, shapes of slices, and the source of each figure."""
    cells = [("chip", "TFLOP/s bf16", "GiB", "HBM GB/s", "link GB/s", "out GB/s", "$/h", "shapes")]
    for chip in CHIPS.values():
        shapes = ["x".join(map(str, s)) for s in legal(chip)]
        some = ", ".join(shapes[:4] + (["…", shapes[-1]] if len(shapes) > 4 else shapes[4:]))
        cells.append(
            (
                chip.name, f"{chip.flops['bfloat16'] / 1e12:.0f}", f"{chip.memory / 2**30:.2f}",
                f"{chip.hbm / 1e9:.0f}", f"{chip.link / 1e9:.0f}", f"{chip.dcn / 1e9:.3g}",
                "–" if chip.price is None else f"{chip.price:.2f}", some,
            )
        )  # fmt: skip
    lines = aligned(cells)
    lines.append("")
    for chip in CHIPS.values():
        lines.append(f"{chip.name}: " + "; ".join(f"{k}: {v}" for k, v in chip.sources.items()))
    return "\n".join(lines)


def aligned(cells: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows whose columns stand below each other; the last is as long as it is."""
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]) - 1)]
    return [
        "  ".join(
            [*(text.ljust(w) for text, w in zip(row, widths, strict=False)), row[-1]]
        ).rstrip()
        for row in cells
    ]
