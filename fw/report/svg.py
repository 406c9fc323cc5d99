"""Charts as pure functions from numbers to SVG.

Each returns one <svg> drawn in its own units and scaled by the page; colours and fonts are classes
of `style.css`, so that a chart follows the light or dark page. Whatever can be pointed at has a
<title>, which browsers show.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from xml.etree.ElementTree import Element

from fw.report.markup import Child, tag
from fw.report.text import compact, number

Point = tuple[float, float | None]

WIDTH, HEIGHT = 400, 220  # about half a page on a desk, the whole of it on a phone
_TOP, _RIGHT, _BOTTOM = 30, 14, 38
CHARACTER = 6.6  # the width of one in 11-pixel text, on the safe side
_LONGEST = 22  # characters of a label


@dataclass(frozen=True)
class Series:
    """One line or set of dots.

    Attributes:
        name: for the legend and the titles.
        points: (x, y), by increasing x; a y of None is a gap.
        mark: "line", "faint" (a thin line behind, which cannot be pointed at), "dots" (joined) or
            "loose" (dots that are not).
        colour: "a" or "b", the two of the style.
    """

    name: str
    points: Sequence[Point]
    mark: str = "line"
    colour: str = "a"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that span a range: the steps are 1, 2 or 5 times a power of ten.

    Args:
        low: the least value to show.
        high: the greatest; not below `low`.
        count: about how many steps.

    Returns:
        Ticks at equal distances, the first at or below `low`, the last at or above `high`.

    >>> ticks(0.13, 1.02)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2]
    """
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = abs(low) / 2 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / count
    power = math.floor(math.log10(raw))
    factor = next(f for f in (1, 2, 5, 10) if f * 10.0**power >= raw * (1 - 1e-9))
    step = factor * 10.0**power
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # Rounded, or 3 × 0.2 was 0.6000000000000001.
    return [round(i * step, max(0, 1 - power)) for i in range(first, last + 1)]


def chart(
    title: str,
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    from_zero: bool = False,
    show: Callable[[float], str] = number,
) -> Element:
    """Draw series over a common pair of axes.

    Args:
        title: what is seen.
        series: at least one with at least one finite point.
        x: name of the horizontal axis, which begins at 0 so that charts can be compared.
        y: name of the vertical axis, with its unit.
        from_zero: the vertical axis begins at 0.
        show: prints a y in the titles of the points.

    Returns:
        An <svg>.
    """
    shown = [(a, b) for one in series for a, b in one.points if b is not None]
    x_low, x_high = min(0, *(a for a, _ in shown)), max(1, *(a for a, _ in shown))
    y_values = [b for _, b in shown] + [0.0] * from_zero
    y_ticks = ticks(min(y_values), max(y_values))
    x_ticks = [t for t in ticks(x_low, x_high) if x_low <= t <= x_high]
    left = 14 + CHARACTER * max(len(compact(t)) for t in y_ticks)

    def at(point: tuple[float, float]) -> tuple[float, float]:
        along = (point[0] - x_low) / (x_high - x_low)
        up = (point[1] - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        floor = HEIGHT - _BOTTOM
        return left + along * (WIDTH - _RIGHT - left), floor - up * (floor - _TOP)

    grid = tag("g", class_="grid")
    for value in y_ticks:
        _, level = at((x_low, value))
        grid.append(tag("line", x1=left, x2=WIDTH - _RIGHT, y1=level, y2=level))
        grid.append(tag("text", compact(value), x=left - 6, y=level + 4, text_anchor="end"))
    for value in x_ticks:
        across, level = at((value, y_ticks[0]))
        grid.append(tag("text", compact(value), x=across, y=level + 16, text_anchor="middle"))
    middle = (left + WIDTH - _RIGHT) / 2
    grid.append(tag("text", x, x=middle, y=HEIGHT - 4, text_anchor="middle"))
    return canvas(
        title,
        (WIDTH, HEIGHT),
        tag("text", y, x=4, y=14, class_="unit"),
        _legend(series) if len(series) > 1 else None,
        grid,
        *(_marks(one, at) for one in series),
        *(_hover(one, at, x, show) for one in series if one.mark != "faint"),
    )


def bars(title: str, items: Sequence[tuple[str, float]], show: Callable[[float], str]) -> Element:
    """Draw named amounts as horizontal bars from zero, with the amount at the end of each.

    Args:
        title: what is seen.
        items: name and amount, at least one; none negative.
        show: prints an amount with its unit.

    Returns:
        An <svg>.
    """
    names = [shorten(name) for name, _ in items]
    left = 10 + CHARACTER * max(map(len, names))
    room = WIDTH - left - 10 - CHARACTER * max(len(show(amount)) for _, amount in items)
    most = max(amount for _, amount in items) or 1.0
    height, rows = 24, []
    for i, ((name, amount), short) in enumerate(zip(items, names, strict=True)):
        length, top = room * amount / most, float(i * height)
        rows += [
            tag("text", title_of(name), short, x=left - 8, y=top + 16, text_anchor="end"),
            tag("rect", x=left, y=top + 5, width=max(length, 1.0), height=14, rx=2, class_="bar"),
            tag("text", show(amount), x=left + length + 6, y=top + 16, class_="value"),
        ]
    return canvas(title, (WIDTH, height * len(items)), *rows)


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """Keep about `most` points, the least and the greatest of each stretch, so that peaks stay.

    >>> thin([(0, 1.0), (1, 9.0), (2, 2.0), (3, 3.0)], 2)
    [(0, 1.0), (1, 9.0)]
    """
    if len(points) <= most:
        return list(points)
    length = math.ceil(2 * len(points) / most)
    kept: list[Point] = []
    for start in range(0, len(points), length):
        stretch = points[start : start + length]
        finite = [p for p in stretch if p[1] is not None] or stretch[:1]
        ends = {min(finite, key=_height), max(finite, key=_height)}
        kept += sorted(ends, key=lambda point: point[0])
    return kept


def _height(point: Point) -> float:
    return -math.inf if point[1] is None else point[1]


def _marks(one: Series, at: Callable[[tuple[float, float]], tuple[float, float]]) -> Element:
    """One polyline for each stretch without a gap; a dot where a stretch is a single point."""
    group = tag("g", class_=f"series {one.mark} {one.colour}")
    for there, stretch in groupby(one.points, lambda point: point[1] is not None):
        if there:
            places = [at((a, b)) for a, b in stretch if b is not None]
            if len(places) > 1 and one.mark != "loose":
                line = " ".join(f"{a:.2f},{b:.2f}" for a, b in places)
                group.append(tag("polyline", points=line))
            if one.mark in ("dots", "loose") or len(places) == 1:
                group.extend(tag("circle", cx=a, cy=b, r=3.5) for a, b in places)
    return group


def _hover(
    one: Series,
    at: Callable[[tuple[float, float]], tuple[float, float]],
    x: str,
    show: Callable[[float], str],
) -> Element:
    """A strip for each point that shows it, from half-way to the point before to half-way on."""
    points = [(a, b) for a, b in one.points if b is not None]
    places = [at(point) for point in points]
    edges = [(a + b) / 2 for (a, _), (b, _) in pairwise(places)]
    # Dots may lie over another line, which keeps its own strips: theirs are small.
    spans = [(a - 6, a + 6) for a, _ in places]
    if one.mark == "line" and edges:
        spans = list(zip([places[0][0], *edges], [*edges, places[-1][0]], strict=True))
    group = tag("g", class_=f"hover {one.colour}")
    for (a, b), (across, level), (start, end) in zip(points, places, spans, strict=True):
        top, height = (_TOP, HEIGHT - _TOP - _BOTTOM) if one.mark == "line" else (level - 6, 12)
        group.append(
            tag(
                "g",
                title_of(f"{x} {a:,}: {one.name} {show(b)}"),
                tag("rect", x=start, y=top, width=end - start, height=height),
                tag("circle", cx=across, cy=level, r=4),
            )
        )
    return group


def _legend(series: Sequence[Series]) -> Element:
    """A key and a name for each, in their order, up to the right edge."""
    keys = [8.0 if one.mark == "dots" else 18.0 for one in series]
    widths = [k + 14 + CHARACTER * len(one.name) for k, one in zip(keys, series, strict=True)]
    group, left = tag("g", class_="legend"), WIDTH - _RIGHT - sum(widths) + 10
    for one, key, width in zip(series, keys, widths, strict=True):
        mark = tag("g", class_=f"series {one.mark} {one.colour}")
        if one.mark == "dots":
            mark.append(tag("circle", cx=left + 4, cy=10, r=3.5))
        else:
            mark.append(tag("line", x1=left, x2=left + key, y1=10, y2=10))
        group.extend([mark, tag("text", one.name, x=left + key + 4, y=14)])
        left += width
    return group


def shorten(label: str) -> str:
    """Cut a label to what has room beside a chart; its title has all of it."""
    return label if len(label) <= _LONGEST else f"{label[: _LONGEST - 1]}…"


def title_of(text: str) -> Element:
    """The text that shows when its parent is pointed at."""
    return tag("title", text)


def canvas(
    title: str, size: tuple[float, float], *children: Child, class_: str | None = None
) -> Element:
    """The <svg> around its parts.

    Args:
        title: read aloud in place of the picture.
        size: width and height in its own units.
        children: what is drawn.
        class_: for the style.
    """
    width, height = size
    # Drawn no larger than one and a half times its own units, or two classes would fill a page.
    attributes = {"aria-label": title, "viewBox": f"0 0 {width:.0f} {height:.0f}"}
    style = f"max-width: {1.5 * width:.0f}px"
    return tag("svg", *children, role="img", class_=class_, style=style, **attributes)


def columns(charts: Iterable[Element | None]) -> Element:
    """Put charts beside each other where there is room."""
    return tag("div", *charts, class_="columns")
