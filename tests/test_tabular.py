"""Tables: files into cells, cells into columns, columns into models that learn."""

import csv
import json
import re
import string
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.preprocessing import QuantileTransformer

from fw import metrics
from fw.data import columns as saved
from fw.data.batches import Batches
from fw.data.columns import ABSENT, RESERVED, UNSEEN
from fw.data.fit_columns import MISSING, fit_columns
from fw.data.scaling import learn_scales, scaled
from fw.data.table import Entry, read_entries
from fw.errors import FwError
from fw.evaluate import evaluate, make_counter
from fw.models.ft_transformer import FTTransformerConfig, ft_transformer
from fw.models.mlp import MLPConfig, mlp
from fw.optimizer import AdamW, optimizer
from fw.step import initial_state, make_step
from fw.tasks import make_task
from fw.tasks.tabular_regression import tabular_regression
from sharding import create, make_mesh, put, rules, shardings
from tests.marks import slow

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


def number(entry, name):
    return float(str(entry.cells[name]))


@pytest.mark.parametrize("ties", [False, True])
def test_quantiles_are_those_of_scikit_learn_and_those_of_train_alone(ties):
    rng = np.random.default_rng(2)
    train, test = rng.gamma(1.0, 3.0, (900, 3)), rng.gamma(1.0, 5.0, (500, 3))
    if ties:
        train, test = train.round(), test.round()
    train[::7, 1] = np.nan
    scales = learn_scales(train, "quantile")
    options: Any = {"output_distribution": "normal", "subsample": None}
    theirs: Any = QuantileTransformer(n_quantiles=30, **options)
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
    ages = [number(e, "age") for e in train if e.cells["age"] != "NA"]
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
    np.testing.assert_allclose(said, [number(e, "score") for e in train], rtol=1e-5)
    text = fit_columns(train, "good", categorical=["age"], classes=["yes", "no"], least=3)
    assert len(text.categories["age"]) < 3 and text.classes == ("yes", "no")
    assert text.answers(np.array([[2.0, 0.0]]))[0]["label"] == "yes"


def test_a_value_is_the_same_however_it_is_spelt():
    """As pandas writes whole numbers, or truth, in a column with a gap; and as JSON does."""
    rows = [("1.0", "True", "0.0"), ("2.0", "False", "1.0"), ("", "", "1"), ("-3", "true", "0")]
    names = "n", "told", "y"
    columns = fit_columns(
        [Entry(dict(zip(names, row, strict=True))) for row in rows * 2], "y", missing=["-3.0"]
    )
    assert columns.categories == {"n": ("1", "2"), "told": ("false", "true")}
    assert columns.classes == ("0", "1")
    for spelling in ((1, True), (1.0, "true"), ("1", "TRUE"), ("1.00", " True ")):
        found = columns.inputs([dict(zip(names, spelling, strict=False))])["categories"]
        assert found.tolist() == [[RESERVED, RESERVED + 1]], spelling
    assert columns.inputs([{"n": -3}])["categories"].tolist() == [[ABSENT, ABSENT]]
    assert columns.inputs([{"n": "v1.0"}])["categories"].tolist() == [[UNSEEN, ABSENT]]


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
        assert re.search("two classes|but a number in most rows|no row has a value", str(error))
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
            given: Any = {"target": "good", **options}
            fit_columns(train, **given)
    with pytest.raises(FwError, match="no rows at all"):
        fit_columns([], "good")
    slip = [*train, Entry({**train[0].cells, "age": "4o"}, "people.csv:200")]
    with pytest.raises(FwError, match=r"people\.csv:200: 'age' is '4o', but a number in most rows"):
        fit_columns(slip, "good")
    bad: list[str] = []
    columns = fit_columns(slip, "good", numeric=["age"], on_bad_row=bad.append)
    assert len(bad) == 1 and columns.encode(slip, on_bad_row=bad.append).rows == 100
    empty = [Entry({**e.cells, "age": ""}) for e in train]
    for numeric in (["age"], []):
        with pytest.raises(FwError, match=r"'age': no row has a value; .* --drop age"):
            fit_columns(empty, "good", numeric=numeric)
    assert "age" not in fit_columns(empty, "good", drop=["age"]).names
    for cells, message in (
        ({"good": ""}, "it is missing"),
        ({"good": "maybe"}, "'good': expected no, yes; got 'maybe'"),
        ({"height": "1"}, "no column 'height'; expected age, score, rooms, job"),
    ):
        with pytest.raises(FwError, match=f"x.csv:9: .*{message}"):
            columns.encode([train[0], Entry({**train[0].cells, **cells}, "x.csv:9")])
    with pytest.raises(FwError, match="no row has a column 'age'"):
        columns.encode([Entry({"good": "yes", "job": "cook"}, "x.csv:2")])
    for good in ({}, {"good": ""}):
        asked = [Entry({"age": "4", "score": "1", "rooms": "1", "job": "", **good}, "t.csv:2")] * 2
        for on_bad_row in (None, bad.append):
            with pytest.raises(FwError, match=r"t\.csv: no row has a value in 'good'.*fw predict"):
                columns.encode(asked, on_bad_row=on_bad_row)
    with pytest.raises(FwError, match=r"t\.csv:2: 'good': expected no, yes.*no other row"):
        columns.encode(
            [Entry({**asked[0].cells, "good": "so so"}, "t.csv:2")], on_bad_row=bad.append
        )
    wrong: Any = "cook"
    for item, message in (
        (wrong, "row 2: expected values by column; got str"),
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
    (tmp_path / saved.TENSORS).mkdir()  # which no file replaces
    with pytest.raises(FwError, match="cannot be written"):
        columns.save(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {saved.FILE, saved.TENSORS}
    (tmp_path / saved.FILE).write_text("[]")
    with pytest.raises(FwError, match="expected an object"):
        saved.load(tmp_path)


# --- models ---------------------------------------------------------------------------------------

TWO = ("no", "yes")
SMALL: Any = {"hidden_size": 32, "num_hidden_layers": 2}
MODELS = {
    "mlp": lambda n, c, task, out: mlp(MLPConfig(n, c, out, task, **SMALL)),
    "ft": lambda n, c, task, out: ft_transformer(
        FTTransformerConfig(n, c, out, task, 32, 2, 4, 48)
    ),
}


def wild(model, seed):
    """Variables that are nowhere 0 or 1, so that none goes unseen."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.array(rng.normal(size=x.shape) / 4, jnp.float32), shapes)


def batch_of(numbers, cardinalities, seed, rows=16):
    rng, batch = np.random.default_rng(seed), {}
    if numbers:
        batch["numbers"] = rng.normal(size=(rows, numbers)).astype(np.float32)
        batch["missing"] = (rng.random((rows, numbers)) < 0.3).astype(np.float32)
    if cardinalities:
        ids = [rng.integers(0, size, rows) for size in cardinalities]
        batch["categories"] = np.stack(ids, -1).astype(np.int32)
    return batch


def dense_np(p, x):
    return x @ p["kernel"] + p.get("bias", 0)


def norm_np(p, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def vectors_np(p, ids, cardinalities):
    """One table a column, as if each had been given its own."""
    tables = np.split(p["table"]["embedding"], np.cumsum(cardinalities)[:-1])
    return np.stack([table[ids[:, i]] for i, table in enumerate(tables)], 1)


def ft_np(p, batch, cardinalities, heads=4):
    """Row by row, head by head, in float64."""
    out = []
    for row in range(len(next(iter(batch.values())))):
        own, t = {name: values[row] for name, values in batch.items()}, p["tokens"]
        tokens = []
        for i, x in enumerate(own.get("numbers", ())):
            tokens.append(x * t["weight"][i] + own["missing"][i] * t["missing"][i])
        if cardinalities:
            tokens += [*vectors_np(t["categories"], own["categories"][None], cardinalities)[0]]
        x = np.stack([t["first"][0], *(a + b for a, b in zip(tokens, t["bias"], strict=True))])
        for number in range(len(p["layers"])):
            layer = p["layers"][str(number)]
            y = norm_np(layer["attention_norm"], x) if number else x
            q, k, v = (dense_np(layer[name], y) for name in ("query", "key", "value"))
            mixed = np.zeros_like(q)
            for part in np.split(np.arange(q.shape[1]), heads):
                scores = np.exp(q[:, part] @ k[:, part].T / np.sqrt(len(part)))
                mixed[:, part] = scores / scores.sum(-1, keepdims=True) @ v[:, part]
            x = x + dense_np(layer["out"], mixed)
            y = norm_np(layer["norm"], x)
            inner = np.maximum(dense_np(layer["gate"], y), 0) * dense_np(layer["up"], y)
            x = x + dense_np(layer["down"], inner)
        out.append(dense_np(p["classifier"], np.maximum(norm_np(p["norm"], x[0]), 0)))
    return np.stack(out)


def mlp_np(p, batch, cardinalities):
    x = p["bias"]
    if "numbers" in batch:
        numbers = batch["numbers"]
        x = x + dense_np(p["numbers"], numbers) + dense_np(p["missing"], batch["missing"])
    if cardinalities:
        flat = vectors_np(p["vectors"], batch["categories"], cardinalities)
        x = x + dense_np(p["categories"], flat.reshape(len(flat), -1))
    x = np.maximum(x, 0)
    for layer in p.get("layers", {}).values():
        x = np.maximum(dense_np(layer, x), 0)
    return dense_np(p["classifier"], x)


@pytest.mark.parametrize(("numbers", "cardinalities"), [(3, (4, 5, 3)), (4, ()), (0, (6, 2))])
@pytest.mark.parametrize("kind", MODELS)
def test_a_forward_pass_is_that_of_plain_numpy(kind, numbers, cardinalities, quickly_compiled):
    model = MODELS[kind](numbers, cardinalities, saved.CLASSES, 3)
    variables, batch = wild(model, 1), batch_of(numbers, cardinalities, 2)
    found = jax.jit(model.apply)(variables, batch)[0]
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    expected = (ft_np if kind == "ft" else mlp_np)(params, batch, cardinalities)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("mesh", [slow("data=8"), "data=2,fsdp=2,tensor=2"])
@pytest.mark.parametrize("kind", ["mlp", slow("ft")])
def test_meshes_take_the_steps_of_one_device(kind, mesh, quickly_compiled):
    model, found = MODELS[kind](3, (4, 5, 3), saved.CLASSES, 2), []
    task, batch = make_task(saved.CLASSES, TWO), batch_of(3, (4, 5, 3), 3)
    batch["labels"] = np.arange(16, dtype=np.int32) % 3 - 1
    for name in ("data=1", mesh):
        where, layout, key = make_mesh(name), rules(), jax.random.key(0)
        lie = shardings(model.axes, jax.eval_shape(model.init, key), where, layout)
        tx = optimizer(AdamW(learning_rate=1e-2, warmup=0), 4)
        step = make_step(model, task.loss, tx, mesh=where, rules=layout)
        state = initial_state(create(model.init, key, shardings=lie), tx, where)
        losses = []
        for _ in range(3):
            state, figures = step(state, put(batch, where, layout))
            losses.append(float(figures["loss"]))
        found.append([*losses, float(figures["grad_norm"])])
    np.testing.assert_allclose(*found, rtol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_a_missing_number_is_the_median_until_one_was_missing_in_training(kind, quickly_compiled):
    model = MODELS[kind](3, (4,), saved.NUMBER, 1)
    variables, batch = model.init(jax.random.key(0)), batch_of(3, (4,), 5)
    present = {**batch, "missing": np.zeros_like(batch["missing"])}
    np.testing.assert_array_equal(
        model.apply(variables, batch)[0], model.apply(variables, present)[0]
    )


@pytest.mark.parametrize("column", ["numbers", "categories"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_batch_without_a_column_is_no_batch(kind, column):
    model, batch = MODELS[kind](1, (4,), saved.NUMBER, 1), batch_of(1, (4,), 5)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    del batch[column]
    with pytest.raises(KeyError, match=column):
        jax.eval_shape(model.apply, variables, batch)


def test_configs_that_cannot_be_are_refused():
    for change, message in (
        ({"task": "ner"}, "task 'ner' is unknown"), ({"numbers": 0, "categories": ()}, "columns"),
        ({"categories": (3, 0)}, "rows of each"), ({"hidden_size": 0}, "hidden_size is 0"),
        ({"dropout": 1.0}, "dropout 1.0 is no rate"), ({"num_labels": 0}, "num_labels is 0"),
    ):  # fmt: skip
        for config in (MLPConfig, FTTransformerConfig):
            with pytest.raises(FwError, match=message):
                given: Any = {"numbers": 1, "categories": (), "num_labels": 2, **change}
                config(**{"task": saved.CLASSES, **given})
    with pytest.raises(FwError, match="not a multiple of num_attention_heads"):
        FTTransformerConfig(1, (), 2, saved.CLASSES, hidden_size=30)


# --- tasks ----------------------------------------------------------------------------------------


def learn(model, task, train, test, steps=60):
    """The line in short: batches, steps, evaluation on a mesh of four."""
    mesh, layout, key = make_mesh("data=2,tensor=2"), rules(), jax.random.key(1)
    lie = shardings(model.axes, jax.eval_shape(model.init, key), mesh, layout)
    tx = optimizer(AdamW(learning_rate=1e-2), steps)
    step = make_step(model, task.loss, tx, mesh=mesh, rules=layout)
    state = initial_state(create(model.init, key, shardings=lie), tx, mesh)
    batches = Batches(train.arrays, 64, seed=0)
    for i in range(steps):
        state, _ = step(state, put(batches(i), mesh, layout))
    counter = make_counter(lambda variables, batch: model.apply(variables, batch)[0], task)
    summary = evaluate(counter, state.variables, test, size=64, mesh=mesh, rules=layout)
    return summary, np.asarray(
        jax.jit(model.apply)(jax.device_get(state.variables), test.arrays)[0]
    )


@pytest.mark.parametrize("kind", ["mlp", slow("ft")])
def test_two_classes_are_learnt_and_judged_as_scikit_learn_does(kind, quickly_compiled):
    train, test = people(0, 400), people(1, 150)
    columns = fit_columns(train, "good", drop=["score"])
    model = MODELS[kind](len(columns.numbers), columns.cardinalities, saved.CLASSES, 2)
    rows = columns.encode(test)
    task = make_task(saved.CLASSES, columns.labels)
    summary, logits = learn(model, task, columns.encode(train), rows)
    gold = rows.arrays["labels"]
    scores = [answer["scores"]["yes"] for answer in columns.answers(logits)]
    assert task.metric == summary.metric == "auc"
    assert summary.value == pytest.approx(sklearn.metrics.roc_auc_score(gold, scores), abs=1e-4)
    assert summary.value > 0.93
    given = [answer["label"] == "yes" for answer in columns.answers(logits)]
    assert summary.figures["f1"] == pytest.approx(sklearn.metrics.f1_score(gold, given))
    assert summary.figures["log_loss"] == pytest.approx(summary.figures["loss"], rel=1e-4)
    json.dumps(summary.figures)
    curves = summary.figures["curves"]
    assert curves["roc"][0][:2] == [0, 0] and curves["roc"][-1][:2] == [1, 1]
    assert sum(count for *_, count in curves["reliability"]) == len(test)
    # Far out, both have the probability 1.
    counts = task.count(jnp.zeros((3, 2)), {"labels": jnp.array([0, 1, 0])})
    certain = metrics.Sample(np.array([[0, 40.0], [1, 50.0], [0, -1.0]]))
    figures = task.summarise({**jax.device_get(counts), "pairs": certain}).figures
    assert [figures[name] for name in ("auc", "average_precision", "ks")] == [1, 1, 1]
    assert [row[1] for row in figures["curves"]["roc"]] == [0, 1, 1, 1]
    with pytest.raises(FwError, match="all 2 rows are 'yes'"):
        ones = columns.encode([e for e in test if e.cells["good"] == "yes"][:2])
        counts = jax.device_get(task.count(jnp.array(logits[:2]), ones.arrays))
        assert task.judge is not None
        task.summarise({**counts, **task.judge(ones, logits[:2])})


def test_more_classes_and_numbers_are_learnt_and_judged(quickly_compiled):
    train, test, bad = people(0, 400), people(1, 150), []
    columns = fit_columns(train, "job", drop=["good"], on_bad_row=bad.append)
    rows = columns.encode(test, on_bad_row=bad.append)
    assert rows.rows == 137 and len(bad) == 33 + 13  # every twelfth has no job
    model = MODELS["mlp"](len(columns.numbers), columns.cardinalities, saved.CLASSES, 3)
    task = make_task(saved.CLASSES, columns.labels)
    summary, logits = learn(model, task, columns.encode(train, on_bad_row=bad.append), rows, 30)
    theirs = sklearn.metrics.f1_score(rows.arrays["labels"], logits.argmax(-1), average="macro")
    assert summary.metric == task.metric == "macro_f1"
    assert summary.value == pytest.approx(theirs) and "auc" not in summary.figures

    columns = fit_columns(train, "score", saved.NUMBER, drop=["good"], transform="standard")
    model = MODELS["mlp"](len(columns.numbers), columns.cardinalities, saved.NUMBER, 1)
    task, rows = tabular_regression(columns.labels, columns.spread), columns.encode(test)
    summary, outputs = learn(model, task, columns.encode(train), rows)
    gold = [number(entry, "score") for entry in test]
    said = [answer["number"] for answer in columns.answers(outputs)]
    assert summary.metric == task.metric == "r2"
    for name, figure in (
        ("r2", sklearn.metrics.r2_score(gold, said)),
        ("rmse", sklearn.metrics.root_mean_squared_error(gold, said)),
        ("mae", sklearn.metrics.mean_absolute_error(gold, said)),
    ):
        assert summary.figures[name] == pytest.approx(figure, rel=1e-3)
    assert summary.value > 0.6
