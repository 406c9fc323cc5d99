"""What `result.json` holds, as tables and matrices: scores of splits and domains, variants, times.

Every function takes a part of the file and returns elements, or None where the part is missing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from fw.errors import FwError
from fw.report.curves import FRACTIONS, UNITS, label
from fw.report.markup import Child, table, tag
from fw.report.matrix import heat_map
from fw.report.risk import risk
from fw.report.svg import bars
from fw.report.text import MISSING, number, percent, seconds, size

_AVERAGES = ("accuracy", "micro avg", "macro avg", "weighted avg")  # of `fw.metrics.to_dict`
_SCORES = ("precision", "recall", "f1-score")
_LARGE = 12  # classes from which the most confused pairs are listed
_PAIRS = 12
_TALL = 24  # rows from which a report scrolls in a box of its own


def figure(name: str, value: float | None) -> str:
    """Print a figure with its unit: a fraction in percent, a loss in nats.

    >>> figure("macro_f1", 0.7126), figure("loss", 0.5)
    ('71.3 %', '0.5 nats')
    """
    if name in FRACTIONS:
        return percent(value)
    shown = number(value)
    return f"{shown} {UNITS[name]}" if name in UNITS and value is not None else shown


def figures(entry: Mapping[str, Any]) -> dict[str, float | None]:
    """The single numbers of a split or domain, in their order."""
    return {
        name: value
        for name, value in entry.items()
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    }


def split(entry: Mapping[str, Any], path: Path, where: str) -> list[Element]:
    """Show the scores of a split or a domain.

    Args:
        entry: figures, and "report", "tags", "confusion", "curves" and "domains" where there are.
        path: the file, for errors.
        where: the place in it, for errors.

    Returns:
        Blocks for the page.

    Raises:
        FwError: a part is not what `fw.metrics` makes.
    """
    blocks: list[Element] = []
    if singles := figures(entry):
        pairs = [(tag("dt", label(k)), tag("dd", figure(k, v))) for k, v in singles.items()]
        blocks.append(tag("dl", *(tag("div", *pair) for pair in pairs), class_="figures"))
    parts: list[Element] = []
    confusion = _part(entry, "confusion", path, where)
    if report := _part(entry, "report", path, where):
        kind = "class" if "accuracy" in report else "entity type"
        parts.append(_report(report, kind, path, f"{where}/report"))
    if confusion:
        parts += _confusion(confusion, path, f"{where}/confusion")
    if parts:
        large = bool(confusion) and len(confusion.get("labels") or ()) > _LARGE
        blocks.append(tag("div", *parts, class_=None if large else "columns"))
    if drawn := _part(entry, "curves", path, where):
        name = str(entry.get("class_1", "class 1"))
        blocks.append(risk(drawn, name, path, f"{where}/curves"))
    if tags := _part(entry, "tags", path, where):
        inner = _report(tags, "tag", path, f"{where}/tags")
        blocks.append(tag("details", tag("summary", "By tag, token by token"), inner))
    if domains := _part(entry, "domains", path, where):
        blocks += _domains(domains, path, f"{where}/domains")
    return blocks


def variants(entries: Sequence[Mapping[str, Any]], path: Path) -> list[Element]:
    """Compare the variants of a model: size, latency and quality, against f32 or the first.

    Args:
        entries: "name" and some of "bytes", "encoder_bytes", "latency_ms" with "batch" and
            "length", and figures.
        path: the file, for errors.

    Returns:
        A table and a sentence that says of what the latency is.
    """
    for i, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or "name" not in entry:
            raise FwError(f"{path}: 'variants/{i}': expected an object with 'name'")
    base = next((e for e in entries if e["name"] == "f32"), entries[0])
    amounts = {"bytes": "size", "encoder_bytes": "encoder weights", "latency_ms": "latency"}
    known = (*amounts, "name", "batch", "length")
    names = list(dict.fromkeys(n for e in entries for n in figures(e) if n not in known))
    columns = [a for a in amounts if any(a in e for e in entries)]
    shapes = [f"{e['batch']:,} × {e['length']:,}" for e in entries if {"batch", "length"} <= {*e}]
    many = len(set(shapes)) > 1

    def row(entry: Mapping[str, Any]) -> list[Child]:
        shape = (
            f"{entry['batch']} × {entry['length']}" if {"batch", "length"} <= {*entry} else MISSING
        )
        return [
            str(entry["name"]),
            *(_amount(entry, base, name, entries) for name in columns),
            *([shape] if many else []),
            *(_quality(entry, base, name) for name in names),
        ]

    head = ["variant", *(amounts[c] for c in columns), *(["batch × tokens"] if many else [])]
    blocks = [table([*head, *map(label, names)], map(row, entries), class_="wide")]
    if shapes and not many and "latency_ms" in columns:
        text = f"Latency of one batch of {shapes[0]} tokens. Compared with {base['name']}."
        blocks.append(tag("p", text, class_="note"))
    return blocks


def stages(entries: Mapping[str, float | None]) -> Element | None:
    """Draw the seconds of each stage."""
    items = [(name, float(value)) for name, value in entries.items() if value is not None]
    return bars("Seconds of each stage", items, seconds) if items else None


def checkpoints(entries: Sequence[Any], best: int | None) -> Element:
    """List the checkpoints: steps as a sentence; paths, or objects with more, as a table.

    Args:
        entries: of one kind or mixed.
        best: the step of the best one.
    """
    if all(isinstance(entry, int) for entry in entries):
        steps = ", ".join(f"{entry:,}" for entry in entries)
        chosen = f" The best is that of step {best:,}." if best is not None else ""
        return tag("p", f"Kept at step {steps}.{chosen}")
    rows = [e if isinstance(e, Mapping) else {_kind(e): e} for e in entries]
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = ([_value(name, row.get(name)) for name in names] for row in rows)
    return table([label(name) for name in names], cells)


def _kind(entry: Any) -> str:
    return "step" if isinstance(entry, int) else "checkpoint"


def _value(name: str, value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return figure(name, value) if value is None or isinstance(value, float) else str(value)


def _part(entry: Mapping[str, Any], name: str, path: Path, where: str) -> Mapping[str, Any] | None:
    value = entry.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise FwError(f"{path}: '{where}/{name}': expected an object; got {type(value).__name__}")
    return value


def _report(report: Mapping[str, Any], kind: str, path: Path, where: str) -> Element:
    """Precision, recall, F1 and support, a row for each class and average."""
    rows = []
    for name, scores in report.items():
        if isinstance(scores, Mapping):
            cells = [percent(scores.get(key)) for key in _SCORES]
            rows.append([name, *cells, _count(scores.get("support"))])
        elif scores is None or isinstance(scores, int | float):
            rows.append([name, "", "", percent(scores), ""])
        else:
            raise FwError(f"{path}: '{where}/{name}': expected scores; got {type(scores).__name__}")
    element = table([kind, "precision", "recall", "F1", "support"], rows)
    if len(rows) > _TALL:
        element.set("class", "scroll tall")
    for line in element.iter("tr"):
        if (line[0].text or "") in _AVERAGES:
            line.set("class", "average")
    return element


def _confusion(entry: Mapping[str, Any], path: Path, where: str) -> list[Element]:
    labels, counts = entry.get("labels"), entry.get("counts")
    if not isinstance(labels, list) or not isinstance(counts, list) or not _square(counts, labels):
        raise FwError(f"{path}: '{where}': expected C 'labels' and C × C counts from 0 as 'counts'")
    labels = [str(name) for name in labels]
    heat = heat_map("Confusion matrix", labels, counts) if labels else None
    if heat is not None and len(labels) <= _LARGE:
        note = "Count, and share of the texts with that label."
        return [tag("figure", heat, tag("figcaption", note, class_="note"))]
    off = [
        (counts[i][j], labels[i], labels[j], sum(counts[i]))
        for i in range(len(labels))
        for j in range(len(labels))
        if i != j and counts[i][j]
    ]
    worst = sorted(off, key=lambda pair: -pair[0])[:_PAIRS]
    rows = [[a, b, f"{n:,}", percent(n / total)] for n, a, b, total in worst]
    columns = ["label", "predicted", "count", "of the label"]
    title = tag("h3", "Most confused") if rows else None
    pairs = tag("div", title, table(columns, rows, class_="pairs") if rows else None)
    if heat is not None:
        heat = tag("div", heat, class_="scroll whole")
    return [block for block in (pairs, heat) if block is not None]


def _square(counts: list[Any], labels: list[Any]) -> bool:
    size = len(labels)
    rows = all(isinstance(row, list) and len(row) == size for row in counts)
    return rows and len(counts) == size and all(_is_count(n) for row in counts for n in row)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


def _domains(domains: Mapping[str, Any], path: Path, where: str) -> list[Element]:
    """One row for each domain, and its own report to unfold."""
    for name in domains:
        _part(domains, name, path, where)
    names = list(dict.fromkeys(n for entry in domains.values() for n in figures(entry)))
    supports = {name: _support(entry) for name, entry in domains.items()}
    counted = any(n is not None for n in supports.values())
    rows = [
        [name, *([_count(supports[name])] if counted else [])]
        + [figure(n, entry.get(n)) for n in names]
        for name, entry in domains.items()
    ]
    columns = ["domain", *(["support"] if counted else []), *map(label, names)]
    blocks = [tag("h3", "By domain"), table(columns, rows, class_="wide")]
    for name, entry in domains.items():
        rest = {key: value for key, value in entry.items() if key not in figures(entry)}
        if inner := split(rest, path, f"{where}/{name}"):
            blocks.append(tag("details", tag("summary", name), *inner))
    return blocks


def _support(entry: Mapping[str, Any]) -> int | None:
    average = (entry.get("report") or {}).get("weighted avg") or {}
    return average.get("support")


def _count(value: int | None) -> str:
    return MISSING if value is None else f"{value:,}"


def _amount(
    entry: Mapping[str, Any],
    base: Mapping[str, Any],
    name: str,
    entries: Sequence[Mapping[str, Any]],
) -> Child:
    """A size or latency with a bar beside the largest one, and how it compares."""
    value = entry.get(name)
    if value is None:
        return MISSING
    shown = size(value) if name != "latency_ms" else f"{number(value)} ms"
    most = max(e.get(name) or 0 for e in entries)
    share = 100 * value / most if most else 0.0
    words = ("faster", "slower") if name == "latency_ms" else ("smaller", "larger")
    ratio = (base.get(name) or 0) / value if value and entry is not base else 0.0
    if ratio:
        factor = max(ratio, 1 / ratio)
        compared = f"{factor:.1f}× {words[ratio < 1]}" if factor >= 1.05 else "the same"
    else:
        compared = ""
    return tag(
        "div",
        shown,
        tag("small", compared) if compared else None,
        tag("i", class_="part", style=f"width: {share:.1f}%"),
    )


def _quality(entry: Mapping[str, Any], base: Mapping[str, Any], name: str) -> Child:
    value, reference = entry.get(name), base.get(name)
    if value is None or reference is None or entry is base or name not in FRACTIONS:
        return figure(name, value)
    points = f"{100 * (value - reference):+.1f} points".replace("-", "−")
    return tag("div", figure(name, value), tag("small", points))
