"""A report is well-formed, closed to the network, safe from its input and true to the data.

The page is read back with an HTML parser: every number checked here went through the file.
"""

import itertools
import math
import re
import string
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fw import metrics, report, run
from fw.data.rows import Rows
from fw.errors import FwError
from fw.metrics.report import summarise
from fw.report import curves, matrix, svg, text
from fw.tasks import make_task

OPTIONS = {"task": "classify", "model": "tiny", "data": "texts.csv", "mesh": "data=2", "seed": 0}


# --- the page -------------------------------------------------------------------------------------

VOID = {"meta"}
HEAD = {"html", "head", "meta", "title", "style", "body"}
BODY = {"main", "header", "section", "h1", "h2", "h3", "p", "dl", "dt", "dd", "div", "span", "i"}
MORE = {"strong", "small", "details", "summary", "figure", "figcaption"}
TABLE = {"table", "thead", "tbody", "tr", "th", "td"}
DRAWN = {"svg", "g", "text", "line", "rect", "circle", "polyline"}
TAGS = HEAD | BODY | MORE | TABLE | DRAWN


class Node:
    """An element as the parser saw it."""

    def __init__(self, name: str, attributes: dict[str, str]):
        self.name, self.attributes, self.children = name, attributes, []

    def all(self, name: str, class_: str = "") -> Iterator["Node"]:
        for child in self.children:
            if isinstance(child, Node):
                if child.name == name and {*class_.split()} <= {*child.get("class").split()}:
                    yield child
                yield from child.all(name, class_)

    def get(self, name: str) -> str:
        return self.attributes.get(name, "")

    def number(self, name: str) -> float:
        return float(self.attributes[name])

    @property
    def text(self) -> str:
        return "".join(c if isinstance(c, str) else c.text for c in self.children)

    @property
    def own(self) -> str:
        return "".join(c for c in self.children if isinstance(c, str))


class Page(HTMLParser):
    """Parse a report; fail where it is not well-formed or reaches out."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text("utf-8")
        self.root = Node("", {})
        self.open = [self.root]
        self.feed(self.source)
        self.close()
        assert self.open == [self.root], "an element is not closed"
        assert self.source.startswith("<!doctype html>")
        names = {node.name for node in self.nodes()}
        assert names <= TAGS, f"unexpected elements: {names - TAGS}"
        for node in self.nodes():
            for name, value in node.attributes.items():
                assert name not in ("src", "href", "srcset", "data", "action", "xlink:href")
                assert not name.startswith("on")
                assert name == "aria-label" or "url(" not in value
        for style in self.root.all("style"):
            assert "url(" not in style.text
            assert "@import" not in style.text
        (policy,) = (m for m in self.root.all("meta") if "http-equiv" in m.attributes)
        assert policy.get("content").startswith("default-src 'none'")

    def nodes(self) -> Iterator[Node]:
        stack: list[Node] = [self.root]
        while stack:
            node = stack.pop()
            stack += [child for child in node.children if isinstance(child, Node)]
            if node is not self.root:
                yield node

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs)
        node = Node(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag):
        assert self.open.pop().name == tag

    def handle_data(self, data):
        self.open[-1].children.append(data)

    @property
    def text(self) -> str:
        return self.root.text

    def titled(self, name: str) -> Node:
        (found,) = (s for s in self.root.all("svg") if s.get("aria-label") == name)
        return found

    def section(self, name: str) -> Node:
        (found,) = (
            s for s in self.root.all("section") if [*s.all("h2")][:1] and s.children[0].text == name
        )
        return found

    def headings(self) -> list[str]:
        return [h.text for h in self.root.all("h2")]


def rows(node: Node) -> list[list[str]]:
    """The body of the first table in a node."""
    body = next(node.all("tbody"))
    return [[c.text for c in row.children if isinstance(c, Node)] for row in body.all("tr")]


def entry(names, seed, size=400) -> dict:
    rng = np.random.default_rng(seed)
    gold = rng.integers(len(names), size=size)
    guess = np.where(rng.random(size) < 0.7, gold, rng.integers(len(names), size=size))
    counts = np.zeros((len(names), len(names)), int)
    np.add.at(counts, (gold, guess), 1)
    scores = metrics.classification_report(counts, names)
    return {
        "macro_f1": scores.macro.f1,
        "accuracy": scores.accuracy,
        "loss": 0.625,
        "report": metrics.to_dict(scores),
        "confusion": {"labels": list(names), "counts": counts.tolist()},
    }


def records(steps: int) -> list[dict]:
    rng = np.random.default_rng(5)
    train = [
        {
            "kind": "train",
            "step": 10 * (i + 1),
            "loss": float(rng.uniform(0.2, 1.1)),
            "learning_rate": 5e-5 * (1 - i / steps),
            "grad_norm": float(rng.uniform(0.5, 4)),
            "tokens_per_second": float(rng.uniform(4000, 6000)),
        }
        for i in range(steps)
    ]
    dev = {"kind": "eval", "split": "dev", "metric": "macro_f1"}
    return train + [
        {**dev, "step": 10 * i, "loss": 1.5 / i, "value": 1 - 1 / (i + 1)}
        for i in range(5, steps, 5)
    ]


NAMES = ("negative", "neutral", "positive")
RESULT = {
    "task": "classify",
    "best_step": 200,
    "splits": {
        "dev": entry(NAMES, 1),
        "test": {
            **entry(NAMES, 2),
            "domains": {"tweets": entry(NAMES, 3), "news": entry(NAMES, 4)},
        },
    },
    "variants": [
        {"name": "f32", "bytes": 90_900_000, "encoder_bytes": 42_500_000, "latency_ms": 61.2,
         "batch": 16, "length": 64, "accuracy": 0.742, "macro_f1": 0.713},
        {"name": "int8", "bytes": 23_100_000, "encoder_bytes": 10_700_000, "latency_ms": 25.5,
         "batch": 16, "length": 64, "accuracy": 0.739, "macro_f1": 0.718},
    ],
    "stages": {"fetch": 0.25, "train": 150.4, "export": 20.0},
    "checkpoints": [100, 200],
}  # fmt: skip


def make(folder: Path, logged=(), result=None, options=OPTIONS) -> Page:
    run.create(folder, options)
    for record in logged:
        run.log(folder, record)
    if result is not None:
        run.write_json(folder / run.RESULT, result)
    return Page(report.write(folder))


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    return make(tmp_path_factory.mktemp("full") / "demo", records(30), RESULT)


def test_the_page_tells_what_was_run(page):
    header = next(page.root.all("header"))
    assert next(header.all("h1")).text == "demo"
    facts = dict(zip(*([d.text for d in header.all(n)] for n in ("dt", "dd")), strict=True))
    assert {k: facts[k] for k in ("task", "model", "data", "mesh")} == {
        k: OPTIONS[k] for k in ("task", "model", "data", "mesh")
    }
    assert facts["devices"] == "8 × cpu"
    assert facts["started"].endswith(" UTC")
    assert "jax " in facts["versions"]
    assert page.headings() == [
        "Training", "Results on test", "Results on dev", "Compression", "Time by stage",
        "Checkpoints",
    ]  # fmt: skip
    tiles = next(page.root.all("div", "tiles"))
    shown = {t.text for t in tiles.all("strong")}
    scored = RESULT["splits"]["test"]
    assert text.percent(scored["macro_f1"]) in shown
    assert "23.1 MB" in shown
    assert "2 min 30 s" in shown


@pytest.mark.parametrize(
    ("title", "key", "scale"),
    [("Loss", "loss", 1), ("Throughput", "tokens_per_second", 1),
     ("Learning rate", "learning_rate", 1), ("Gradient norm", "grad_norm", 1),
     ("macro-F1 on dev", "value", 100)],
)  # fmt: skip
def test_curves_go_through_the_data(page, title, key, scale):
    chart = page.titled(title)
    to_data = axes(chart)
    kinds = ("train", "eval") if key == "loss" else ("eval",) if key == "value" else ("train",)
    drawn = [g for g in chart.all("g", "series") if list(g.all("polyline"))]
    for kind in kinds:
        wanted = [(r["step"], scale * r[key]) for r in records(30) if r["kind"] == kind]
        found = [
            [to_data(*map(float, point.split(","))) for point in line.get("points").split()]
            for group in drawn
            for line in group.all("polyline")
        ]
        spread = max(y for _, y in wanted)
        assert any(
            len(line) == len(wanted)
            and np.allclose(line, wanted, rtol=0, atol=[0.2, 2e-4 * spread])  # 1/100 of a pixel
            for line in found
        ), (title, kind)


def axes(chart: Node):
    """The map from pixels to data that a reader would infer from two labels of each axis."""
    grid = next(chart.all("g", "grid"))
    labels = [t for t in grid.all("text") if re.fullmatch(r"-?[\d.]+(e-?\d+|k|M)?", t.text)]
    values = [float(t.text.replace("k", "e3").replace("M", "e6")) for t in labels]
    ups = [
        (v, t.number("y") - 4)
        for v, t in zip(values, labels, strict=True)
        if t.get("text-anchor") == "end"
    ]
    along = [
        (v, t.number("x"))
        for v, t in zip(values, labels, strict=True)
        if t.get("text-anchor") == "middle"
    ]

    def line(pairs):
        (v0, p0), (v1, p1) = pairs[0], pairs[-1]
        return lambda p: v0 + (p - p0) * (v1 - v0) / (p1 - p0)

    x, y = line(along), line(ups)
    return lambda a, b: (x(a), y(b))


def test_every_point_can_be_pointed_at(page):
    titles = {t.text for t in page.titled("Throughput").all("title")}
    rate = records(30)[3]["tokens_per_second"]
    assert f"step 40: train {rate:,.0f}" in titles


@pytest.mark.parametrize("split", ["dev", "test"])
def test_scores_and_matrix_are_those_of_the_result(page, split):
    wanted = RESULT["splits"][split]
    section = page.section(f"Results on {split}")
    shown = {name: cells for name, *cells in rows(section)}
    for name, scores in wanted["report"].items():
        if name == "accuracy":
            assert shown[name][2] == text.percent(scores)
            continue
        *fractions, support = scores.values()
        assert shown[name] == [*map(text.percent, fractions), f"{support:,}"]
    heat = next(s for s in section.all("svg") if s.get("aria-label") == "Confusion matrix")
    cells = list(heat.all("g", "cell"))
    counts = np.array(wanted["confusion"]["counts"])
    assert [int(next(c.all("text", "value")).text) for c in cells] == counts.flatten().tolist()
    shades = np.array([next(c.all("rect")).number("fill-opacity") for c in cells])
    shares = (counts / counts.sum(axis=1, keepdims=True)).flatten()
    np.testing.assert_allclose(shades, 0.04 + 0.96 * shares, atol=0.0051)
    # Rows are labels: the cell below another has a greater y.
    assert next(cells[3].all("rect")).number("y") > next(cells[0].all("rect")).number("y")


def test_curves_of_two_classes_go_through_their_points(tmp_path):
    rng = np.random.default_rng(8)
    gold = rng.integers(0, 2, 300)
    logits = np.stack([0 * gold, gold + rng.normal(size=300)], -1)
    task = make_task("tabular_classification", ("good", "bad"))
    assert task.judge is not None
    rows = Rows({"labels": gold}, {"labels": -1})
    counts = task.count(jnp.array(logits, jnp.float32), {"labels": jnp.array(gold, jnp.int32)})
    figures = dict(task.summarise({**counts, **task.judge(rows, logits)}).figures)
    page = make(tmp_path / "run", result={"splits": {"test": figures}})
    assert text.percent(figures["auc"]) in {t.text for t in page.root.all("strong")}
    roc = np.array(figures["curves"]["roc"])
    for title, wanted in (
        ("ROC", roc[:, :2]),
        ("Reliability", np.array(figures["curves"]["reliability"])[:, :2]),
        ("Share at or above a score", roc[::-1][:, [2, 0]]),
        ("Share at or above a score", roc[::-1][:, [2, 1]]),
    ):
        chart = page.titled(title)
        to_data = axes(chart)
        lines = [line.get("points").split() for line in chart.all("polyline")]
        found = [[to_data(*map(float, point.split(","))) for point in line] for line in lines]
        assert any(
            len(line) == len(wanted) and np.allclose(line, wanted, rtol=0, atol=1e-3)
            for line in found
        ), title
    figures["curves"] = {"reliability": [[0, 1]], "roc": []}
    with pytest.raises(FwError, match=r"splits/test/curves/reliability.*three numbers"):
        make(tmp_path / "bad", result={"splits": {"test": figures}})


def test_domains_and_variants_and_stages(page):
    section = page.section("Results on test")
    table = next(t for t in section.all("table", "wide"))
    domains = RESULT["splits"]["test"]["domains"]
    assert rows(table) == [
        [name, "400", text.percent(d["macro_f1"]), text.percent(d["accuracy"]), "0.625 nats"]
        for name, d in domains.items()
    ]
    assert [d.children[0].text for d in section.all("details")] == list(domains)

    compression = page.section("Compression")
    f32, int8 = rows(compression)
    assert f32 == ["f32", "90.9 MB", "42.5 MB", "61.2 ms", "74.2 %", "71.3 %"]
    assert int8 == [
        "int8", "23.1 MB3.9× smaller", "10.7 MB4.0× smaller", "25.5 ms2.4× faster",
        "73.9 %−0.3 points", "71.8 %+0.5 points",
    ]  # fmt: skip
    assert "16 × 64 tokens" in compression.text

    bars = page.titled("Seconds of each stage")
    widths = [bar.number("width") for bar in bars.all("rect", "bar")]
    seconds = list(RESULT["stages"].values())
    np.testing.assert_allclose(widths[2] / widths[1], seconds[2] / seconds[1], rtol=1e-3)
    assert [t.text for t in bars.all("text", "value")] == ["250 ms", "2 min 30 s", "20.0 s"]
    assert "Kept at step 100, 200. The best is that of step 200." in page.text


HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style></title></svg><b>",
    "a&lt;b &amp; c",
    "https://example.org/x.css",
    "\x00\x1b[31mred\x9b",
    "']]>--><!--",
)


def test_what_comes_from_outside_is_text(tmp_path):
    """Every place that shows a string gets every hostile one; `Page` allows no other element."""
    for i, bad in enumerate(HOSTILE):
        names = [bad, f"{bad}2", "fine"]
        result = {
            "splits": {
                bad: {
                    **entry(names, 1),
                    "domains": {bad: entry(names, 2)},
                    "tags": entry(names, 3)["report"],
                }
            },
            "variants": [{"name": bad, "bytes": 1, "latency_ms": 2.0, bad: 0.5}],
            "stages": {bad: 1.0},
            "checkpoints": [{"path": bad, bad: bad}],
        }
        logged = [
            {"kind": "train", "step": 1, "loss": 0.5},
            {"kind": "eval", "step": 1, "split": bad, "metric": bad, "value": 0.5, "loss": 0.5},
        ]
        options = dict.fromkeys((*OPTIONS, bad), bad)
        page = make(tmp_path / f"run {i} <&'", logged, result, options)
        shown = text.clean(bad)
        assert "\x1b" not in page.source
        for place in ("th", "td", "dd", "summary", "title"):
            assert any(shown in node.text for node in page.root.all(place)), place
        assert f"Results on {shown}" in page.headings()


PARTS = {
    "splits": "Results on test", "variants": "Compression", "stages": "Time by stage",
    "checkpoints": "Checkpoints",
}  # fmt: skip


@pytest.mark.parametrize("kept", [c for n in range(3) for c in itertools.combinations(PARTS, n)])
def test_what_is_missing_is_left_out(tmp_path, kept):
    page = make(tmp_path / "run", (), {part: RESULT[part] for part in kept})
    wanted = [PARTS[part] for part in PARTS if part in kept]
    assert [h for h in page.headings() if h != "Results on dev"] == wanted
    charts = {s.get("aria-label") for s in page.root.all("svg")}
    assert charts <= {"Confusion matrix", "Seconds of each stage"}


def test_a_run_that_goes_on_has_a_report(tmp_path):
    page = make(tmp_path / "run", [{"kind": "train", "step": 1, "loss": 0.5}])
    assert page.headings() == ["Training"]
    assert [s.get("aria-label") for s in page.root.all("svg")] == ["Loss"]
    assert (
        len(list(page.titled("Loss").all("circle"))) == 2
    )  # the point, and where it is pointed at


def test_a_loss_that_is_not_finite_is_said_and_leaves_a_gap(tmp_path):
    losses = [0.9, 0.8, math.nan, 0.7, 0.6, math.inf]
    logged = [{"kind": "train", "step": i, "loss": loss} for i, loss in enumerate(losses)]
    page = make(tmp_path / "run", logged)
    lines = list(page.titled("Loss").all("polyline"))
    assert [len(line.get("points").split()) for line in lines] == [2, 2]
    assert "The loss of 2 records is not finite" in page.text


def test_many_classes_get_titles_and_their_worst_pairs(tmp_path):
    names = [f"{a}{b}_intent" for a, b in itertools.product(string.ascii_lowercase, "abc")][:77]
    scored = entry(names, 9, size=3000)
    page = make(tmp_path / "run", (), {"splits": {"test": scored}})
    counts = np.array(scored["confusion"]["counts"])
    heat = page.titled("Confusion matrix")
    cells = {next(c.all("title")).text for c in heat.all("g", "cell")}
    share = text.percent(counts[1, 1] / counts[1].sum())
    title = f"label {names[1]}, predicted {names[1]}: {counts[1, 1]}, {share} of the label"
    assert title in cells
    assert len(cells) == np.count_nonzero(counts)
    off = counts - np.diag(counts.diagonal())
    pairs = rows(next(page.root.all("table", "pairs")))
    assert [int(n) for _, _, n, _ in pairs] == sorted(off.flatten(), reverse=True)[: len(pairs)]
    for label, predicted, n, _ in pairs:
        assert off[names.index(label), names.index(predicted)] == int(n)
    assert matrix.heat_map("", ["x"] * 1000, [[0] * 1000] * 1000) is None


def test_entities_are_reported_by_type_and_tag(tmp_path):
    three = np.array([3, 2]), np.array([4, 2]), np.array([3, 5])
    entities = summarise(["LOC", "PER"], *three, single_label=False)
    tags = summarise(["B-LOC", "O"], *three, single_label=True)
    figures = {"f1": 0.5, "report": metrics.to_dict(entities), "tags": metrics.to_dict(tags)}
    page = make(tmp_path / "run", (), {"splits": {"test": figures}})
    section = page.section("Results on test")
    first, second = section.all("table")
    assert rows(first)[0] == ["LOC", "75.0 %", "100.0 %", "85.7 %", "3"]
    assert [r[0] for r in rows(first)][2:] == ["micro avg", "macro avg", "weighted avg"]
    assert next(th.text for th in first.all("th")) == "entity type"
    assert rows(second)[0][0] == "B-LOC"


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        ([], "'splits': expected an object"),
        ({"stages": [1]}, "'stages': expected an object"),
        ({"splits": {"test": 3}}, "'splits/test': expected an object"),
        ({"splits": {"test": {"report": [1]}}}, "'splits/test/report': expected an object"),
        ({"splits": {"test": {"confusion": {"labels": ["a"], "counts": [[1, 2]]}}}}, "C × C"),
        ({"splits": {"test": {"domains": {"x": 1}}}}, "'splits/test/domains/x'"),
        ({"variants": [{"bytes": 1}]}, "'variants/0': expected an object with 'name'"),
    ],
)
def test_a_damaged_result_is_refused_with_its_place(tmp_path, damage, match):
    folder = run.create(tmp_path / "run", OPTIONS)
    run.write_json(folder / run.RESULT, damage)
    with pytest.raises(FwError, match=match):
        report.write(folder)
    assert not (folder / run.REPORT).exists()


# --- pieces ---------------------------------------------------------------------------------------

finite = st.floats(-1e12, 1e12)


@given(a=finite, b=finite)
def test_ticks_are_round_even_and_span_the_range(a, b):
    low, high = sorted((a, b))
    marks = np.array(svg.ticks(low, high))
    slack = 1e-6 * max(high - low, 1e-9 * abs(high), 1e-300)
    assert marks[0] <= low + slack
    assert marks[-1] >= high - slack
    assert 2 <= len(marks) <= 13
    steps = np.diff(marks)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-4)
    assert f"{steps.mean():.0e}"[0] in "125"


points = st.lists(st.none() | st.floats(-1e6, 1e6), min_size=1, max_size=60).map(
    lambda ys: list(enumerate(ys))
)


@given(points=points, most=st.integers(2, 20))
def test_thinning_keeps_the_extremes(points, most):
    kept = svg.thin(points, most)
    assert len(kept) <= max(most + 2, 2)
    assert set(kept) <= set(points)
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    ys = [y for _, y in points if y is not None]
    if ys:
        assert {min(ys), max(ys)} <= {y for _, y in kept}


@given(points=points, reach=st.integers(0, 10))
def test_smoothing_is_the_mean_of_a_centred_window(points, reach):
    for i, (x, y) in enumerate(curves.smooth(points, reach)):
        half = min(reach, i, len(points) - 1 - i)
        near = [v for _, v in points[i - half : i + half + 1] if v is not None]
        assert x == points[i][0]
        if points[i][1] is None:
            assert y is None
        else:
            assert y == pytest.approx(np.mean(near), abs=1e-6)


def test_the_terminal_table_lines_up():
    lines = report.table(
        [["日本", 1, None], ["a\x1b[0m\nb", 0.123456, "22.9 MB"]], ["name", "value", "size"]
    ).splitlines()
    assert lines == [
        "name      value     size",
        "───────  ──────  ───────",
        "日本          1        –",
        "a\ufffd[0m b  0.1235  22.9 MB",
    ]
    assert report.table([], ["a", "b"]).splitlines() == ["a  b", "─  ─"]
    with pytest.raises(ValueError, match="row 0 has 1 cells for 2 columns"):
        report.table([["x"]], ["a", "b"])
