"""Tables: files into cells, cells into columns, columns into models that learn."""

import csv
import json
import re
import string
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.preprocessing import QuantileTransformer

from fw.data import columns as saved
from fw.data.columns import ABSENT, RESERVED, UNSEEN
from fw.data.fit_columns import MISSING, fit_columns
from fw.data.scaling import learn_scales, scaled
from fw.data.table import Entry, read_entries
from fw.errors import FwError

few = settings(derandomize=True, deadline=None, max_examples=30)


# --- files ----------------------------------------------------------------------------------------

words = st.text(string.ascii_letters + ' ,"\n;?é', max_size=6)


@few
@given(
    st.lists(words.filter(str.strip), min_size=1, max_size=4, unique_by=str.strip).flatmap(
        lambda names: st.tuples(
            st.just(names), st.lists(st.lists(words, min_size=len(names), max_size=len(names)))
        )
    )
)
def test_what_csv_writes_is_read_again_cell_by_cell(tmp_path_factory, table):
    names, rows = table
    rows = [
        row for row in rows if len(row) > 1 or row[0]
    ]  # a row of one empty cell is a blank line
    path = tmp_path_factory.mktemp("csv") / "train.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    entries = read_entries(path)
    assert [[*entry.cells.values()] for entry in entries] == rows
    assert all([*entry.cells] == [name.strip() for name in names] for entry in entries)


def test_every_format_gives_its_entries_and_bad_rows_are_named(tmp_path):
    def read(name, text, **options):
        (tmp_path / name).write_text(text)
        return [entry.cells for entry in read_entries(tmp_path / name, **options)]

    assert read("a.tsv", 'a\tb\n"x\t1\n\ny\t2\n') == [{"a": '"x', "b": "1"}, {"a": "y", "b": "2"}]
    lines = '{"a": 1.5, "b": true}\n{"a": null, "c": "x"}'
    assert read("a.jsonl", lines) == [{"a": 1.5, "b": "true"}, {"a": None, "c": "x"}]
    assert read("a.csv", "3,2,no,yes\n1,2,0\n3,4,1\n5,6,1\n")[1] == {
        "x0": "3", "x1": "4", "target": "yes",
    }  # fmt: skip
    for name, text, message in (
        ("a.csv", "a,b\n1,2,3\n", ":2: expected 2 cells; got 3"),
        ("a.csv", 'a,b\n1,2\n"x"y,2\n', ":3: expected a row of separated values"),
        ("a.csv", "2,2,no,yes\n1,2,0\n1,2,2\n", ":3: expected the id of one of 2 classes"),
        ("a.jsonl", '{"a": 1}\n{"a": [1]}', ":2: 'a': expected a text, a finite number"),
        ("a.jsonl", '{"a": 1}\n[1]', ":2: expected an object"),
        ("a.jsonl", '{"a": 1}\n{"a": Infinity}', ":2: 'a': expected"),
    ):
        with pytest.raises(FwError, match=re.escape(str(tmp_path / name) + message)):
            read(name, text)
        bad: list[str] = []
        assert len(read(name, text, on_bad_row=bad.append)) < 3 and len(bad) == 1
    for name, text in (("a.csv", "a,a\n1,2\n"), ("a.csv", ",b\n1,2\n"), ("a.csv", "")):
        with pytest.raises(FwError, match=":1: expected a header"):
            read(name, text)
    with pytest.raises(FwError, match="expected a table"):
        read("a.pdf", "")


# --- columns --------------------------------------------------------------------------------------


def people(seed, count, shift=0.0):
    """Numbers, some missing; whole numbers; categories; what follows from them."""
    rng = np.random.default_rng(seed)
    age = rng.gamma(2.0, 20.0, count) + shift
    rooms, job = rng.integers(1, 4, count), rng.choice(["clerk", "cook", "smith"], count)
    score = 0.05 * age + (job == "cook") + rng.normal(0, 0.3, count)
    entries = []
    for i in range(count):
        cells: Any = {
            "age": "NA" if i % 10 == 3 else f"{age[i]:.2f}", "rooms": str(rooms[i]),
            "job": " ?" if i % 12 == 5 else job[i], "score": f"{score[i]:.4f}",
            "good": "yes" if score[i] > 2 else "no",
        }  # fmt: skip
        entries.append(Entry(cells, f"people.csv:{i + 2}"))
    return entries


@pytest.mark.parametrize("ties", [False, True])
def test_quantiles_are_those_of_scikit_learn_and_those_of_train_alone(ties):
    rng = np.random.default_rng(2)
    train, test = rng.gamma(1.0, 3.0, (900, 3)), rng.gamma(1.0, 5.0, (500, 3))
    if ties:
        train, test = train.round(), test.round()
    train[::7, 1] = np.nan
    scales = learn_scales(train, "quantile")
    theirs = QuantileTransformer(n_quantiles=30, output_distribution="normal", subsample=None)
    theirs.fit(train)
    np.testing.assert_allclose(scales, theirs.quantiles_.T, rtol=1e-12)
    both = np.concatenate([train[:, [0, 2]], test[:, [0, 2]]])
    ours = scaled(both, scales[[0, 2]], "quantile")
    np.testing.assert_allclose(
        ours, theirs.transform(np.insert(both, 1, 0, -1))[:, [0, 2]], rtol=1e-7, atol=1e-9
    )


def test_columns_are_told_apart_by_the_rule_or_as_stated(tmp_path):
    train = people(0, 300)
    columns = fit_columns(train, "good", drop=["score"])
    assert columns.numbers == ("age",) and columns.classes == ("no", "yes")
    assert columns.categories == {"rooms": ("1", "2", "3"), "job": ("clerk", "cook", "smith")}
    assert columns.cardinalities == (5, 5) and columns.labels == ("no", "yes")
    rows = columns.encode(train)
    assert rows.arrays["missing"].sum() == 30 and rows.empty["labels"] == -1
    np.testing.assert_array_equal(rows.arrays["missing"][3], [1])
    ages = [float(e.cells["age"]) for e in train if e.cells["age"] != "NA"]
    median = columns.inputs([{"age": float(np.median(ages))}])["numbers"]
    np.testing.assert_array_equal(rows.arrays["numbers"][3], median[0])
    jobs = [["job", "?"], ["job", "pilot"], ["job", "smith"], ["rooms", 2.0]]
    found = columns.inputs([{name: value} for name, value in jobs])["categories"]
    assert found.tolist() == [
        [ABSENT, ABSENT], [ABSENT, UNSEEN], [ABSENT, RESERVED + 2], [RESERVED + 1, ABSENT],
    ]  # fmt: skip

    other = fit_columns(
        train, "score", saved.NUMBER, drop=["good"], numeric=["rooms"], transform="standard"
    )
    assert other.numbers == ("age", "rooms") and other.labels == ("score",)
    arrays = other.encode(train).arrays
    assert arrays["labels"].shape == (300, 1) and np.isnan(other.encode(train).empty["labels"])
    np.testing.assert_allclose(arrays["numbers"][:, 1].std(), 1, rtol=1e-5)
    said = [answer["number"] for answer in other.answers(arrays["labels"])]
    np.testing.assert_allclose(said, [float(e.cells["score"]) for e in train], rtol=1e-5)
    text = fit_columns(train, "good", categorical=["age"], classes=["yes", "no"], least=3)
    assert len(text.categories["age"]) < 3 and text.classes == ("yes", "no")
    assert text.answers(np.array([[2.0, 0.0]]))[0]["label"] == "yes"


def test_rows_of_test_never_reach_what_is_learnt(tmp_path):
    train, test = people(0, 300), people(1, 100, shift=500.0)
    columns = fit_columns(train, "good", drop=["score"])
    columns.save(tmp_path)
    before = [(tmp_path / name).read_bytes() for name in (saved.FILE, saved.TENSORS)]
    far = columns.encode(test).arrays["numbers"]
    assert far[[i % 10 != 3 for i in range(100)]].min() > 5  # beyond all of train: they are alike
    columns.save(tmp_path)
    assert before == [(tmp_path / name).read_bytes() for name in (saved.FILE, saved.TENSORS)]
    leaky = fit_columns([*train, *test], "good", drop=["score"])
    assert not np.array_equal(leaky.scales, columns.scales)


cells = st.one_of(
    st.none(), st.floats(allow_nan=False, allow_infinity=False, width=32), st.integers(-9, 9),
    st.sampled_from([*MISSING, "a", " b ", "é", "7", "1e3"]),
)  # fmt: skip
tables = st.integers(1, 3).flatmap(
    lambda width: st.lists(
        st.tuples(st.booleans(), st.lists(cells, min_size=width, max_size=width)), min_size=2
    )
)


@few
@given(tables, st.sampled_from(["quantile", "standard"]))
def test_columns_that_are_saved_and_loaded_encode_alike(tmp_path_factory, table, transform):
    rows = [
        Entry({"y": "yes" if good or not i else "no", **{f"c{j}": v for j, v in enumerate(row)}})
        for i, (good, row) in enumerate(table)
    ]
    try:
        columns = fit_columns(rows, "y", transform=transform)
    except FwError as error:
        assert re.search("two classes|but a number in most rows", str(error))
        return
    folder = tmp_path_factory.mktemp("columns")
    columns.save(folder)
    again = saved.load(folder)
    one, two = columns.encode(rows), again.encode(rows)
    assert one.arrays.keys() == two.arrays.keys() and one.empty == two.empty
    for name, values in one.arrays.items():
        np.testing.assert_array_equal(values, two.arrays[name])
        assert np.isfinite(values).all()
    items = [{k: v for k, v in entry.cells.items() if k != "y"} for entry in rows]
    for name, values in again.inputs(items).items():
        np.testing.assert_array_equal(values, one.arrays[name])
    assert again.cardinalities == columns.cardinalities
    for i, size in enumerate(columns.cardinalities):
        assert (one.arrays["categories"][:, i] < size).all()


def test_what_no_columns_can_be_made_of_is_refused():
    train = people(0, 100)
    for options, message in (
        ({"target": "gold"}, "no column 'gold' to learn from; expected one of age"),
        ({"drop": ["age", "rooms", "job", "score"]}, "no column beside 'good'"),
        ({"numeric": ["job"]}, "people.csv:2: 'job': expected a number; got"),
        ({"transform": "log"}, "expected one of"),
        ({"classes": ["no"]}, "two classes or more"),
        ({"classes": ["no", "maybe"]}, "'good': expected no, maybe; got 'yes'"),
        ({"task": saved.NUMBER}, "people.csv:2: 'good': expected a number; got"),
    ):
        with pytest.raises(FwError, match=re.escape(message)):
            fit_columns(train, **{"target": "good", **options})
    with pytest.raises(FwError, match="no rows at all"):
        fit_columns([], "good")
    slip = [*train, Entry({**train[0].cells, "age": "4o"}, "people.csv:200")]
    with pytest.raises(FwError, match=r"people\.csv:200: 'age' is '4o', but a number in most rows"):
        fit_columns(slip, "good")
    bad: list[str] = []
    columns = fit_columns(slip, "good", numeric=["age"], on_bad_row=bad.append)
    assert len(bad) == 1 and columns.encode(slip, on_bad_row=bad.append).rows == 100
    empty = [Entry({**e.cells, "age": ""}) for e in train]
    with pytest.raises(FwError, match="no row has a number"):
        fit_columns(empty, "good", numeric=["age"])
    for cells, message in (
        ({"good": ""}, "it is missing"),
        ({"good": "maybe"}, "'good': expected no, yes; got 'maybe'"),
        ({"height": "1"}, "no column 'height'; expected age, score, rooms, job"),
    ):
        with pytest.raises(FwError, match=f"x.csv:9: .*{message}"):
            columns.encode([Entry({**train[0].cells, **cells}, "x.csv:9")])
    with pytest.raises(FwError, match="no row has a column 'age'"):
        columns.encode([Entry({"good": "yes", "job": "cook"}, "x.csv:2")])
    for item, message in (
        ("cook", "row 2: expected values by column; got str"),
        ({"ages": 3}, "row 2: there is no column 'ages'"),
        ({"age": "old"}, "row 2: 'age': expected a number; got 'old'"),
        ({"age": [1]}, "row 2: 'age': expected a text, a finite number, true, false or null; got"),
        ({"age": float("nan")}, "row 2: 'age': expected a text"),
    ):
        with pytest.raises(FwError, match=re.escape(message)):
            columns.inputs([{"age": 3, "good": "yes"}, item])


def test_a_hostile_folder_is_refused(tmp_path):
    columns = fit_columns(people(0, 100), "good")
    with pytest.raises(FwError, match="found nothing"):
        saved.load(tmp_path)
    columns.save(tmp_path)
    told = json.loads((tmp_path / saved.FILE).read_text())
    for name, value in (
        ("task", "ner"), ("target", 3), ("classes", ["a", "a"]), ("spread", 0), ("mean", True),
        ("numbers", "age"), ("categories", {"job": [1]}), ("missing", None), ("transform", []),
    ):  # fmt: skip
        (tmp_path / saved.FILE).write_text(json.dumps({**told, name: value}))
        with pytest.raises(FwError, match=f"{saved.FILE}: '{name}' cannot be"):
            saved.load(tmp_path)
    (tmp_path / saved.FILE).write_text(json.dumps({**told, "numbers": ["age"]}))
    with pytest.raises(FwError, match=r"expected medians f64\[1\]"):
        saved.load(tmp_path)
    (tmp_path / saved.FILE).write_text(json.dumps(told))
    (tmp_path / saved.TENSORS).write_bytes(b"no tensors")
    with pytest.raises(FwError, match="not tensors"):
        saved.load(tmp_path)
    (tmp_path / saved.TENSORS).unlink()
    with pytest.raises(FwError, match="found nothing"):
        saved.load(tmp_path)
    (tmp_path / saved.FILE).write_text("[]")
    with pytest.raises(FwError, match="expected an object"):
        saved.load(tmp_path)
