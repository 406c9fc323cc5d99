"""A confusion matrix as a picture: the shade of a cell is its share of the row.

Drawn like the charts of `fw.report.svg`; numbers as long as there is room, titles always.
"""

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from fw.report.markup import tag
from fw.report.svg import CHARACTER, canvas, shorten, title_of
from fw.report.text import percent

_NUMBERED = 12  # cells of a larger matrix have no room for numbers
_CELLS = 150  # beyond this many classes a matrix cannot be read at all
_ROOM = 300.0  # for the cells of a matrix with numbers, as far as they are not too small


def heat_map(title: str, labels: Sequence[str], counts: Sequence[Sequence[int]]) -> Element | None:
    """Draw a confusion matrix: rows are labels, columns predictions, shade is the row's share.

    Args:
        title: what is seen.
        labels: C class names.
        counts: C rows of C counts.

    Returns:
        An <svg>: up to 12 classes with the numbers in the cells, above that with titles alone;
        None for more classes than can be drawn.
    """
    if len(labels) > _CELLS:
        return None
    numbered = len(labels) <= _NUMBERED
    # A few classes get wide cells, so that their names fit under them.
    cell = min(max(_ROOM / len(labels), 46.0), 76.0) if numbered else 11.0
    names = [shorten(label) for label in labels]
    longest = max(map(len, names))
    left = 26 + longest * (CHARACTER if numbered else 5.4)
    slanted = not numbered or longest * CHARACTER > cell
    below = (left - 18 if not numbered else 0.75 * left + 6) if slanted else 20.0
    side = cell * len(labels)
    width, height = left + side + 2, side + below + 22
    body: list[Element] = [tag("rect", x=left, y=1, width=side, height=side, class_="empty")]
    for i, row in enumerate(counts):
        total = sum(row)
        for j, count in enumerate(row):
            if count or numbered:
                share = count / total if total else 0.0
                place = left + j * cell, 1 + i * cell
                body.append(_cell(place, cell, count, share, numbered=numbered))
                body[-1].insert(0, title_of(_confused(labels[i], labels[j], count, total)))
    for i, (label, name) in enumerate(zip(labels, names, strict=True)):
        along = (i + 0.5) * cell
        down, right = 1 + along + 4, left + along
        body.append(tag("text", title_of(label), name, x=left - 6, y=down, text_anchor="end"))
        turn = f"rotate({-40 if numbered else -90} {right + 3:.2f} {side + 12:.2f})"
        body.append(
            tag("text", title_of(label), name, x=right + 3, y=side + 12, text_anchor="end")
            if slanted
            else tag("text", title_of(label), name, x=right, y=side + 16, text_anchor="middle")
        )
        if slanted:
            body[-1].set("transform", turn)
    body += [
        tag("text", "predicted", x=left + side / 2, y=height - 4, class_="axis"),
        tag(
            "text",
            "label",
            x=10,
            y=side / 2,
            class_="axis",
            transform=f"rotate(-90 10 {side / 2:.2f})",
        ),
    ]
    return canvas(title, (width, height), *body, class_="map" if numbered else "map fine")


def _cell(
    place: tuple[float, float], side: float, count: int, share: float, *, numbered: bool
) -> Element:
    x, y = place
    group = tag("g", class_="cell strong" if share > 0.5 else "cell")
    gap = 1.0 if numbered else 0.5
    group.append(
        tag("rect", x=x, y=y, width=side - gap, height=side - gap, fill_opacity=0.04 + 0.96 * share)
    )
    if numbered:
        middle = x + side / 2
        group.append(tag("text", f"{count:,}", x=middle, y=y + side / 2, class_="value"))
        if count:
            group.append(tag("text", percent(share), x=middle, y=y + side / 2 + 13, class_="share"))
    return group


def _confused(label: str, predicted: str, count: int, total: int) -> str:
    share = f", {percent(count / total)} of the label" if total else ""
    return f"label {label}, predicted {predicted}: {count:,}{share}"
