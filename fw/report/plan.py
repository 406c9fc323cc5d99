"""The page of a plan: what fits, how a step passes, where parameters lie, what speed costs.

One file without a network, as a run's report is.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np

from fw.json_files import write_text
from fw.report.markup import Child, table, tag
from fw.report.page import document
from fw.report.svg import CHARACTER, WIDTH, canvas, columns, shorten, title_of
from fw.report.text import seconds, size
from sharding.plan import Layout, Plan
from sharding.plan.analytic import placed
from sharding.plan.network import DIE, NETWORK
from sharding.plan.schedule import SEND, Event

_COLOURS = {
    "parameters": "#4c78a8", "frozen": "#b279a2", "optimizer": "#9ecae9", "batch": "#bab0ac",
    "activations and temporaries": "#f58518", "compute": "#4c78a8", "kernel": "#72b7b2",
    "hidden": "#eeca3b", "exposed": "#e45756",
}  # fmt: skip
_SHOWN = 10


def page(found: Plan, path: str | Path, *, title: str) -> Path:
    """Write a plan's page.

    Args:
        found: the plan.
        path: of the HTML file.
        title: what was planned.

    Returns:
        The path.
    """
    path = Path(path)
    best = found.best
    blocks = [
        _section("The best layouts", _layouts(found.layouts[:_SHOWN])),
        _section("Memory of a device", _memory(found.layouts[:_SHOWN])),
    ]
    if best.table is not None:
        blocks.append(_section("One step of the best", *_timeline(best)))
        blocks.append(_section("What travels in it", _travel(best)))
    blocks.append(_section("Where parameters lie", *_slice(found, best)))
    blocks.append(_section("Speed and memory", _pareto(found.layouts)))
    blocks.append(_section("Who says so", _sources(best)))
    note = f"{found.considered:,} layouts were estimated"
    if found.lacking:
        note += f"; no compiler was asked: {found.lacking} is not installed"
    body = tag(
        "main",
        tag("header", tag("p", "fw plan", class_="kicker"), tag("h1", title), tag("p", note)),
        _tiles(best, found.unit),
        *blocks,
    )
    write_text(path, document(title, body))
    return path


def _section(title: str, *blocks: Child) -> Element:
    return tag("section", tag("h2", title), *blocks)


def _tiles(best: Layout, unit: str) -> Element:
    own = best.prediction
    items = [
        ("a step", seconds(own.seconds), str(best)),
        ("MFU", f"{own.mfu:.1%}", "of the chips' peak"),
        (f"{unit} a second", f"{own.rate:,.0f}" if own.tokens else "–", ""),
        ("memory", size(own.memory.peak), f"of {size(own.memory.capacity)}"),
    ]
    if own.dollars is not None:
        items.append((f"a million {unit}", f"${own.dollars:.3g}", "at list price"))
    tiles = (tag("div", tag("span", a), tag("b", b), tag("small", c)) for a, b, c in items)
    return tag("div", *tiles, class_="tiles")


def _layouts(layouts: Sequence[Layout]) -> Element:
    rows = []
    for one in layouts:
        own = one.prediction
        verdict = one.refused or ("fits" if own.fits else f"{size(own.memory.over)} too much")
        if own.disagree and one.compiled:
            verdict += f"; a roofline says {seconds(own.roofline)}"
        rows.append(
            (
                str(one), seconds(own.seconds), f"{own.mfu:.1%}", size(own.memory.peak),
                f"{own.exposed / max(own.seconds, 1e-12):.0%}",
                "compiler" if one.compiled else "estimate", verdict,
            )
        )  # fmt: skip
    head = ("layout", "a step", "MFU", "memory", "waits", "by", "verdict")
    return table(head, rows)


def _memory(layouts: Sequence[Layout]) -> Element:
    """Stacked bars; a line where a device is full."""
    most = max(max(one.prediction.memory.peak, one.prediction.memory.capacity) for one in layouts)
    names = [shorten(str(one)) for one in layouts]
    left = 10 + CHARACTER * max(map(len, names))
    room, height = WIDTH - left - 70, 24
    marks: list[Child] = []
    for row, (one, name) in enumerate(zip(layouts, names, strict=True)):
        top, across = 24.0 + row * height, float(left)
        held = one.prediction.memory
        parts = [*held.kinds.items(), ("activations and temporaries", held.activations)]
        marks.append(
            tag("text", title_of(str(one)), name, x=left - 8, y=top + 15, text_anchor="end")
        )
        for kind, amount in parts:
            width = room * amount / most
            marks.append(
                tag("rect", title_of(f"{kind}: {size(amount)}"), x=across, y=top + 3, width=width,
                    height=16, fill=_COLOURS.get(kind, "#bab0ac"))
            )  # fmt: skip
            across += width
        marks.append(tag("text", size(held.peak), x=across + 5, y=top + 15, class_="value"))
    full = left + room * layouts[0].prediction.memory.capacity / most
    end = 24.0 + height * len(layouts)
    line = tag("line", x1=full, x2=full, y1=16, y2=end, stroke="#e45756", stroke_width=2)
    capacity = size(layouts[0].prediction.memory.capacity)
    marks += [line, tag("text", capacity, x=full, y=12, text_anchor="middle")]
    kinds = {kind: None for one in layouts for kind in one.prediction.memory.kinds}
    legend = _legend([*kinds, "activations and temporaries"])
    return tag("div", canvas("memory of a device", (WIDTH, end + 6), *marks), legend)


def _legend(kinds: Iterable[str]) -> Element:
    parts: list[Child] = []
    for kind in kinds:
        dot = canvas(kind, (10, 10), tag("rect", width=10, height=10, fill=_COLOURS[kind]))
        dot.set("style", "width: .7em; height: .7em; margin: 0 .35em 0 1em; display: inline-block")
        parts += [dot, kind]
    return tag("p", *parts, class_="note")


def _timeline(best: Layout) -> list[Element]:
    """The whole step, and one turn of each of its long loops."""
    assert best.table is not None
    events, total = best.table.events, best.table.seconds
    found = [_lanes("one step", events, total)]
    loops = sorted((e for e in events if e.inside), key=lambda e: -e.duration)[:2]
    for loop in loops:
        turn = loop.duration / loop.times
        title = f"one of {loop.times} turns: {loop.name}, {seconds(turn)}"
        found += [tag("h3", title), _lanes(title, loop.inside, turn)]
    found.append(_legend(["compute", "kernel", "hidden", "exposed"]))
    return found


def _lanes(title: str, events: Sequence[Event], total: float) -> Element:
    """Arithmetic above, what travels below, over seconds."""
    left, room = 70, WIDTH - 80
    marks: list[Child] = [
        tag("text", "computes", x=left - 8, y=19, text_anchor="end"),
        tag("text", "travels", x=left - 8, y=43, text_anchor="end"),
    ]
    for event in events:
        x, width = left + room * event.start / total, room * event.duration / total
        if width < 0.3:
            continue
        send = event.kind == SEND
        if event.kind == "loop":
            colour, top = _COLOURS["compute"], 8
        elif send:
            colour, top = _COLOURS["exposed" if event.waits > 0 else "hidden"], 32
        else:
            colour, top = _COLOURS[event.kind], 8
        text = f"{event.name}: {seconds(event.duration)}"
        if event.times > 1:
            text += f", {event.times} turns"
        if send:
            text += f", {size(event.bytes)} over {event.axes}, waits {seconds(event.waits)}"
        marks.append(
            tag(
                "rect",
                title_of(text),
                x=x,
                y=top,
                width=max(width - 0.3, 0.3),
                height=16,
                fill=colour,
            )
        )
    marks += [
        tag("text", "0", x=left, y=64, text_anchor="middle", class_="axis"),
        tag("text", seconds(total), x=left + room, y=64, text_anchor="end", class_="axis"),
    ]
    return canvas(title, (WIDTH, 70), *marks)


def _travel(best: Layout) -> Element:
    own = best.prediction
    rows = [
        (name, seconds(took), seconds(own.waited.get(name, 0.0)))
        for name, took in sorted(own.sent.items(), key=lambda item: -item[1])
    ]
    wire = [(f"sent over {axes}", size(amount), "") for axes, amount in own.wire.items()]
    rates = {NETWORK: own.machine.chip.dcn, "die": DIE}
    links = []
    for name, amount in own.links.items():
        busy = amount / rates.get(name, own.machine.chip.link) / own.seconds
        links.append((f"over each link, {name}", size(int(amount)), f"busy {busy:.0%} of the step"))
    return table(("collective, axes", "takes", "holds the step up"), [*rows, *wire, *links])


def _slice(found: Plan, best: Layout) -> list[Element]:
    """Every chip of the machine, coloured by the part of a parameter that it holds."""
    machine, sizes = found.machine, best.candidate.sizes
    arguments = (
        [a for a in found.surveys[0][1].arguments if "params" in a.path] if found.surveys else []
    )
    if not arguments:
        return []
    largest = max(arguments, key=lambda a: a.bytes)
    cut = [a for axes in largest.cuts for a in axes if sizes.get(a, 1) > 1]
    grid = placed(machine, tuple(sizes.values()))
    order = [*sizes]
    number = np.zeros(grid.shape, int)
    for axis in cut:
        shape = [1] * grid.ndim
        shape[order.index(axis)] = sizes[axis]
        number = number * sizes[axis] + np.arange(sizes[axis]).reshape(shape)
    part = np.zeros(machine.devices, int)
    part[grid.reshape(-1)] = number.reshape(-1)
    parts = int(number.max()) + 1
    coords = machine.coords
    cell = max(4.0, min(16.0, WIDTH / 40))
    planes = sorted({(int(c[0]), int(c[3]) if coords.shape[1] > 4 else 0) for c in coords})
    width = (int(coords[:, 1].max()) + 1) * cell * machine.chip.together
    height = (int(coords[:, 2].max()) + 1) * cell if coords.shape[1] > 3 else cell
    across = max(1, int(WIDTH // (width + 10)))
    marks: list[Child] = []
    for device, place in enumerate(coords):
        depth = int(place[3]) if coords.shape[1] > 4 else 0
        where = planes.index((int(place[0]), depth))
        x0, y0 = (where % across) * (width + 10), (where // across) * (height + 10)
        hue = 360 * int(part[device]) / parts
        y = int(place[2]) if coords.shape[1] > 3 else 0
        x = int(place[1]) * machine.chip.together + int(place[-1])
        text = f"device {device} at {place[1:-1].tolist()}: part {part[device]} of {parts}"
        marks.append(
            tag("rect", title_of(text), x=x0 + x * cell, y=y0 + y * cell, width=cell - 0.6,
                height=cell - 0.6, fill=f"hsl({hue:.0f} 60% 55%)")
        )  # fmt: skip
    rows = math.ceil(len(planes) / across)
    over = ", ".join(cut) or "nothing: every device holds all of it"
    copies = machine.devices // parts
    caption = (
        f"{largest.path}: {parts} parts over {over}, {copies} {'copies' if copies > 1 else 'copy'} "
        f"of each. A square is a device, a colour a part."
    )
    picture = canvas("parameters on the slice", (WIDTH, rows * (height + 10)), *marks)
    return [picture, tag("p", caption, class_="note")]


def _pareto(layouts: Sequence[Layout]) -> Element:
    """Seconds over memory; those that nothing beats in both are filled."""
    points = [(one.prediction.memory.peak, one.prediction.seconds, one) for one in layouts]
    most_x, most_y = max(p[0] for p in points) * 1.05, max(p[1] for p in points) * 1.05
    left, bottom, height = 60, 30, 260
    marks: list[Child] = []

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (WIDTH - left - 20) * x / most_x, height - bottom - (
            height - bottom - 10
        ) * y / most_y

    capacity = layouts[0].prediction.memory.capacity
    if capacity < most_x:
        x, _ = at(capacity, 0)
        marks.append(tag("line", x1=x, x2=x, y1=10, y2=height - bottom, stroke="#e45756"))
    for x, y, one in points:
        beaten = any(a <= x and b <= y and (a, b) != (x, y) for a, b, _ in points)
        cx, cy = at(x, y)
        text = f"{one}: {seconds(y)}, {size(x)}, {'compiled' if one.compiled else 'estimated'}"
        fill = "none" if beaten else _COLOURS["compute"]
        marks.append(
            tag("circle", title_of(text), cx=cx, cy=cy, r=4, fill=fill, stroke=_COLOURS["compute"],
                stroke_width=1.5)
        )  # fmt: skip
    marks += [
        tag("text", "memory of a device", x=(WIDTH + left) / 2, y=height - 4, text_anchor="middle"),
        tag("text", "seconds a step", x=4, y=12, class_="unit"),
        tag("text", seconds(most_y), x=left - 6, y=22, text_anchor="end", class_="axis"),
        tag(
            "text", size(int(most_x)), x=WIDTH - 20, y=height - 14, text_anchor="end", class_="axis"
        ),
    ]
    return columns([canvas("speed and memory", (WIDTH, height), *marks)])


def _sources(best: Layout) -> Element:
    rows = [(name, text) for name, text in best.prediction.sources.items() if text]
    return table(("figure", "by"), rows)
