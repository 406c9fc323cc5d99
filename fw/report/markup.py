"""HTML and SVG as trees, so that everything from outside is escaped by construction.

`tag` makes an element of the standard library's ElementTree and `page` prints the tree. A string
is text wherever it stands; there is no way to put markup in by a string.
"""

from collections.abc import Iterable, Sequence
from xml.etree.ElementTree import Element, tostring

from fw.report.text import clean

Child = Element | str | None


def tag(name: str, /, *children: Child, **attributes: str | float | None) -> Element:
    """Make an element.

    Args:
        name: such as "td".
        children: elements and texts in their order; None is left out.
        attributes: `class_` is class and `font_size` is font-size; None is left out. Floats are
            printed to 1/100, a hundredth of a pixel in a chart.

    Returns:
        The element.

    >>> page(tag("td", "R&D ", tag("b", "<5"), class_="label"))
    '<td class="label">R&amp;D <b>&lt;5</b></td>'
    """
    element = Element(name)
    for key, value in attributes.items():
        if value is not None:
            element.set(key.rstrip("_").replace("_", "-"), _attribute(value))
    for child in children:
        if isinstance(child, Element):
            element.append(child)
        elif child and len(element):
            element[-1].tail = (element[-1].tail or "") + clean(child)
        elif child:
            element.text = (element.text or "") + clean(child)
    return element


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Child]], *, class_: str | None = None
) -> Element:
    """Make a table in a box that scrolls sideways where the screen is too small for it.

    Args:
        columns: their names; the first is of the rows' names.
        rows: cells, text or elements; the first is the row's name.
        class_: an additional class.
    """
    head = tag("tr", *(tag("th", name, scope="col") for name in columns))
    body = (
        tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in rest))
        for first, *rest in rows
    )
    inner = tag("table", tag("thead", head), tag("tbody", *body), class_=class_)
    return tag("div", inner, class_="scroll")


def page(root: Element) -> str:
    """Print a tree as HTML 5."""
    return tostring(root, encoding="unicode", method="html")


def _attribute(value: str | float) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return clean(str(value))
