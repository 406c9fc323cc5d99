"""What SVG drawings share: one style, text in the colours of mesh axes, the <svg> around it all.

One colour stands for one mesh axis. Elements are those of the standard library's ElementTree, so
whatever comes from outside is escaped. The style is plain classes under `.sharding`, for some
viewers know no variables, and a notebook's page shares it; it follows a light or dark page.
"""

from collections.abc import Iterable
from xml.etree.ElementTree import Element, tostring

from sharding.visualize.facts import Leaf, hue
from sharding.visualize.words import Word

CHARACTER = 6.6  # the width of one in 11-pixel text, on the safe side
PAD = 20  # around everything
LINE = 18
_HATCH = 5.0  # between slanted lines
_COLOURS = (  # by `hue`, on a light and on a dark page
    ("#2563c4", "#74a9ff"),
    ("#7a3fb5", "#c39bff"),
    ("#b9500b", "#f2a35f"),
    ("#23803f", "#6fcf8b"),
    ("#0d7c8a", "#5ecbd9"),
    ("#b3266e", "#ff8fc0"),
)
# Card, rule, ink, quiet ink, warning, ground: those of a report's page.
_LIGHT = ("#ffffff", "#e2e6eb", "#1a1f26", "#5c6672", "#9a3412", "#f5f6f8")
_DARK = ("#181c22", "#2b323b", "#e7ebf0", "#9aa5b2", "#fdba74", "#0f1216")


def _rules(shades: tuple[str, ...], page: int) -> str:
    card, rule, ink, quiet, warn, soft = shades
    styles = {
        ".card": f"fill:{card};stroke:{rule}",
        "text": f"fill:{ink}",
        ".quiet": f"fill:{quiet}",
        ".warn": f"fill:{warn}",
        ".rule": f"stroke:{rule}",
        ".soft": f"fill:{soft};stroke:{rule}",
        ".whole,.sharding .box": f"stroke:{quiet};fill:none",
        ".n": f"color:{quiet}",
        **{f".c{i}": f"color:{pair[page]}" for i, pair in enumerate(_COLOURS)},
        ".axis,.sharding .fill": "fill:currentColor",
    }
    return "".join(f".sharding {which}{{{what}}}" for which, what in styles.items())


_STYLE = (
    ".sharding{font:11px system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',sans-serif;"
    "font-variant-numeric:tabular-nums}"
    ".sharding .title{font-size:15px;font-weight:600}"
    ".sharding .strong,.sharding .axis{font-weight:600}"
    ".sharding .end{text-anchor:end}.sharding .mid{text-anchor:middle}"
    ".sharding .line{stroke:currentColor;stroke-width:1.5}.sharding .outer{stroke-width:3}"
    f"{_rules(_LIGHT, 0)}@media (prefers-color-scheme:dark){{{_rules(_DARK, 1)}}}"
)


def hatched(x: float, y: float, width: float, height: float) -> list[Element]:
    """A box of slanted lines: a pattern would need an id, and pages with two pictures clash."""
    lines = []
    at = _HATCH / 2
    while at < width + height:
        x1, x2 = min(at, width), max(at - height, 0.0)
        lines.append(f"M{x + x1:.1f} {y + at - x1:.1f}L{x + x2:.1f} {y + at - x2:.1f}")
        at += _HATCH
    box = tag("rect", x=x, y=y, width=width, height=height, class_="whole")
    return [box, tag("path", d="".join(lines), class_="whole")]


def colour(axis: str, leaf: Leaf) -> str:
    """The class of a mesh axis's colour."""
    return f"c{hue(axis, leaf.mesh) % len(_COLOURS)}" if leaf.mesh else "n"


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Element:
    """A straight line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def words_at(words: Iterable[Word], leaf: Leaf, x: float, y: float, class_: str = "") -> Element:
    """Text in which every mesh axis has its colour."""
    text = tag("text", x=x, y=y, class_=class_ or None)
    for piece, axis in words:
        if axis:
            text.append(tag("tspan", piece, class_=f"axis {colour(axis, leaf)}"))
        elif len(text):
            text[-1].tail = (text[-1].tail or "") + piece
        else:
            text.text = (text.text or "") + piece
    return text


def tag(name: str, /, *children: Element | str, **attributes: str | float | None) -> Element:
    """Make an element; `class_` is class, None is left out, floats are printed to 1/100.

    >>> tostring(tag("text", "a<b", class_="quiet", x=1.5, rx=None))
    b'<text class="quiet" x="1.5">a&lt;b</text>'
    """
    element = Element(name)
    for key, value in attributes.items():
        if value is not None:
            number = isinstance(value, float)
            text = f"{value:.2f}".rstrip("0").rstrip(".") if number else str(value)
            element.set(key.rstrip("_").replace("_", "-"), text)
    for child in children:
        if isinstance(child, Element):
            element.append(child)
        else:
            element.text = child
    return element


def canvas(label: str, width: float, height: float, parts: Iterable[Element]) -> str:
    """The <svg> around its parts, on a card.

    Args:
        label: read aloud in place of the picture.
        width: in its own units.
        height: in its own units.
        parts: what is drawn.
    """
    root = Element("svg", xmlns="http://www.w3.org/2000/svg", role="img")
    root.set("class", "sharding")
    root.set("aria-label", label)
    root.set("viewBox", f"0 0 {width:.0f} {height:.0f}")
    root.set("width", f"{width:.0f}")
    root.set("height", f"{height:.0f}")
    root.append(tag("style", _STYLE))
    edge = {"x": 0.5, "y": 0.5, "width": round(width) - 1.0, "height": round(height) - 1.0}
    root.append(tag("rect", rx=10.0, class_="card", **edge))
    root.extend(parts)
    return tostring(root, encoding="unicode")
