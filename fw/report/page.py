"""The page: what a run was, how it went and what came out, in one file without a network.

`curves` draws `metrics.jsonl` and `scores` shows `result.json`; here they get their order, their
headings and the style. A part that the run does not have is left out.
"""

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from fw import run
from fw.errors import FwError
from fw.report import scores
from fw.report.curves import SQUARES, UNITS, Records, curves, label, not_finite, throughput
from fw.report.markup import Child, page, table, tag
from fw.report.text import seconds, size

_HEADLINES = ("auc", "r2", "f1", "macro_f1", "accuracy", "micro_f1", "pearson", "spearman", "loss")
# Belt and braces: all is escaped and nothing is linked, and the browser is told to hold to it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def write(folder: str | Path) -> Path:
    """Write `report.html` from `config.json`, `metrics.jsonl` and `result.json` of a run.

    The two latter may be missing, so a run can be looked at while it goes on.

    Args:
        folder: a run.

    Returns:
        The report's path. Only process 0 writes it.

    Raises:
        FwError: the folder holds no run, or a file in it is damaged.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as parent:
    ...     folder = run.create(f"{parent}/demo", {"task": "ner", "model": "all-MiniLM-L6-v2"})
    ...     run.log(folder, {"kind": "train", "step": 10, "loss": 0.5})
    ...     write(folder).read_text().startswith("<!doctype html>")
    True
    """
    folder = Path(folder)
    options, starts, records = run.config(folder), run.starts(folder), run.metrics(folder)
    path = folder / run.RESULT
    result = run.read_json(path) if path.exists() else {}
    for name, kind in _KINDS.items():
        if not isinstance(result, dict) or not isinstance(result.get(name, kind()), kind):
            what = "an object" if kind is dict else "a list"
            raise FwError(f"{path}: '{name}': expected {what} in an object; restore the file")
    title = folder.resolve().name
    body = tag(
        "main",
        _header(title, options, starts),
        _tiles(records, result),
        *_training(records, options),
        *_results(result, path),
        *_rest(result, path),
        _options(options, starts),
    )
    run.write_text(folder / run.REPORT, document(f"{title}: fw run", body))
    return folder / run.REPORT


def document(title: str, body: Element) -> str:
    """A page in one file, with the style of all."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", content=_POLICY, **{"http-equiv": "Content-Security-Policy"}),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", resources.files("fw.report").joinpath("style.css").read_text("utf-8")),
    )
    html = page(tag("html", head, tag("body", body), lang="en"))
    return f"<!doctype html>\n{html}\n"


_KINDS = {"splits": dict, "variants": list, "stages": dict, "checkpoints": list}


def _header(title: str, options: Mapping[str, Any], starts: list[dict[str, Any]]) -> Element:
    """Task, model, data, mesh, precision, when and on what."""
    facts = [(label(k), _text(options[k])) for k in _FACTS if options.get(k) not in (None, "")]
    if starts:
        last = starts[-1]
        again = len(starts) - 1
        resumed = f", resumed {again} time{'s' * (again > 1)}" if again else ""
        facts.append(("started", _date(starts[0].get("time")) + resumed))
        facts.append(("devices", _devices(last.get("devices") or {})))
        versions = last.get("versions") or {}
        shown = [f"{name} {versions[name]}" for name in ("fw", "jax", "python") if name in versions]
        facts.append(("versions", ", ".join(shown)))
    pairs = (tag("div", tag("dt", k), tag("dd", v)) for k, v in facts if v)
    return tag("header", tag("p", "fw run", class_="kicker"), tag("h1", title), tag("dl", *pairs))


_FACTS = ("task", "model", "data", "mesh", "precision")


def _tiles(records: Records, result: Mapping[str, Any]) -> Element | None:
    """The few numbers that one came for."""
    tiles: list[tuple[str, str, str]] = []
    splits = result.get("splits") or {}
    name = "test" if "test" in splits else next(reversed(splits), None)
    if name is not None and isinstance(splits[name], Mapping):
        found = scores.figures(splits[name])
        heads = [key for key in _HEADLINES if key in found][:2]
        tiles += [(label(key), scores.figure(key, found[key]), f"on {name}") for key in heads]
    if rate := throughput(records):
        tiles.append(("throughput", f"{rate:,.0f} tokens/s", "median, without padding"))
    if (spent := (result.get("stages") or {}).get("train")) is not None:
        tiles.append(("training", seconds(spent), ""))
    sized = [e for e in result.get("variants") or [] if isinstance(e, Mapping) and e.get("bytes")]
    if len(sized) > 1:
        least, most = (pick(sized, key=lambda e: e["bytes"]) for pick in (min, max))
        ratio = f"{most['bytes'] / least['bytes']:.1f}× smaller than {most.get('name')}"
        tiles.append((f"{least.get('name')} model", size(least["bytes"]), ratio))
    if not tiles:
        return None
    boxes = (
        tag("div", tag("span", name), tag("strong", value), tag("small", note) if note else None)
        for name, value, note in tiles
    )
    return tag("div", *boxes, class_="tiles")


def _training(records: Records, options: Mapping[str, Any]) -> list[Element]:
    unit = SQUARES if options.get("task") == "regress" else UNITS["loss"]
    drawn = curves(records, unit)
    lost = not_finite(records)
    warning = f"The loss of {lost:,} records is not finite: NaN or infinite. The lines have gaps."
    if drawn is None and not lost:
        return []
    return [_section("Training", tag("p", warning, class_="warning") if lost else None, drawn)]


def _results(result: Mapping[str, Any], path: Path) -> list[Element]:
    sections = []
    splits = result.get("splits") or {}
    for name, entry in sorted(splits.items(), key=lambda item: item[0] != "test"):
        if not isinstance(entry, Mapping):
            raise FwError(f"{path}: 'splits/{name}': expected an object; restore the file")
        if blocks := scores.split(entry, path, f"splits/{name}"):
            sections.append(_section(f"Results on {name}", *blocks))
    return sections


def _rest(result: Mapping[str, Any], path: Path) -> list[Element]:
    sections = []
    if entries := result.get("variants"):
        sections.append(_section("Compression", *scores.variants(entries, path)))
    if (drawn := scores.stages(result.get("stages") or {})) is not None:
        sections.append(_section("Time by stage", drawn))
    if entries := result.get("checkpoints"):
        best = result.get("best_step")
        shown = scores.checkpoints(entries, best if isinstance(best, int) else None)
        sections.append(_section("Checkpoints", shown))
    return sections


def _options(options: Mapping[str, Any], starts: list[dict[str, Any]]) -> Element:
    """Every option and version, folded away."""
    rows = [[name, _text(value)] for name, value in options.items()]
    blocks: list[Child] = [
        tag("summary", "All options"),
        table(["option", "value"], rows, class_="pairs"),
    ]
    for i, start in enumerate(starts):
        versions = start.get("versions") or {}
        facts = [["platform", str(start.get("platform", ""))], *map(list, versions.items())]
        facts += [[f"{k}, changed from", _text(v[0])] for k, v in start.get("changed", {}).items()]
        title = f"{'Resumed' if i else 'Started'} {_date(start.get('time'))}"
        blocks += [tag("h3", title), table(["", ""], facts, class_="pairs plain")]
    return tag("section", tag("details", *blocks))


def _section(title: str, *blocks: Child) -> Element:
    return tag("section", tag("h2", title), *blocks)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _date(time: Any) -> str:
    return str(time or "").replace("T", " ").replace("+00:00", " UTC")


def _devices(devices: Mapping[str, Any]) -> str:
    count, kind = devices.get("count"), devices.get("kind") or devices.get("platform")
    processes = devices.get("processes", 1)
    return (
        f"{count} × {kind}" + (f" in {processes} processes" if processes > 1 else "")
        if count
        else ""
    )
