"""Recommenders: what is read and learnt, ranks and losses, models on any mesh, answers."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from flax import nnx

from fw import metrics
from fw.data import Batches, requests
from fw.data.interactions import (
    Table,
    concatenate,
    is_positive,
    leave_last_out,
    load_interactions,
    split_pairs,
)
from fw.data.recommend import catalogue, clicks, dlrm_fields, pairs, queries, two_tower_fields
from fw.data.vocabulary import fit_vocabulary, load
from fw.errors import FwError
from fw.evaluate import evaluate, make_counter
from fw.models.dlrm import DLRMConfig, dlrm
from fw.models.features import Features
from fw.models.recommender import recommender
from fw.models.two_tower import TwoTowerConfig, two_tower
from fw.optimizer import AdamW, optimizer
from fw.processors.events import Events, Ranking, Retrieval
from fw.recipe import Finetune
from fw.step import initial_state, make_step
from fw.table_optimizer import TableOptions, row_optimizer, with_tables
from fw.tasks import ranking, retrieval, sampled_softmax
from sharding import create, make_mesh, put, rules, shardings
from tests.marks import slow

USERS, ITEMS, KINDS = 40, 24, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """RecBole's files of users who each like one of four kinds of items, and nine of ten times."""
    folder = tmp_path_factory.mktemp("films")
    rng = np.random.default_rng(0)
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float\n"]
    for user in range(USERS):
        liked = rng.random(ITEMS) < np.where(np.arange(ITEMS) % KINDS == user % KINDS, 0.9, 0.1)
        for item in rng.permutation(np.flatnonzero(liked)):
            rating = 5 if item % KINDS == user % KINDS else 2
            lines.append(f"u{user}\ti{item}\t{rating}\t{len(lines) // 2}\n")
    rng.shuffle(lines[1:])
    (folder / "films.inter").write_text("".join(lines))
    ages = [f"u{u}\t{20 + u}\t{'mf'[u % 2]}\n" for u in range(USERS + 2)]
    (folder / "films.user").write_text("user_id:token\tage:float\tsex:token\n" + "".join(ages))
    kinds = [f"i{i}\tkind{i % KINDS} all\n" for i in range(ITEMS + 1)]
    (folder / "films.item").write_text("item_id:token\tclass:token_seq\n" + "".join(kinds))
    return folder


@pytest.fixture(scope="module")
def parts(folder):
    return leave_last_out(load_interactions(folder))


@pytest.fixture(scope="module")
def vocabulary(parts):
    return fit_vocabulary(parts["train"], history=8, spare=4)


def test_the_last_event_of_a_user_is_for_the_test(folder, parts):
    data = load_interactions(folder)
    for user in ("u0", "u7"):
        of_user = data.take(data.events.columns["user"] == user)
        by_time = of_user.events.columns["item"][np.argsort(of_user.order)].tolist()
        found = [
            part.events.columns["item"][part.events.columns["user"] == user].tolist()
            for part in parts.values()
        ]
        assert sorted(found[0]) == sorted(by_time[:-2])
        assert found[1:] == [by_time[-2:-1], by_time[-1:]]
    pairs_of = [
        {*zip(p.events.columns["user"], p.events.columns["item"], strict=True)}
        for p in split_pairs(concatenate([data, data])).values()
    ]
    assert sum(map(len, pairs_of)) == len(set.union(*pairs_of)) == data.events.rows


def test_nothing_is_learnt_from_what_is_not_training(parts, vocabulary):
    train = parts["train"]
    users, items = train.users.columns, train.items.columns
    for name in ("dev", "test"):
        assert not {*parts[name].order} & {*train.order}
    ages = np.where(np.arange(USERS + 2) < USERS, users["age"], 1000.0)  # two who never come
    sexes = np.where(np.arange(USERS + 2) < USERS, users["sex"], "unknown")
    other = Table(train.users.kinds, {**users, "age": ages, "sex": sexes})
    classes = items["class"].copy()
    classes[-1] = ("never", "seen", "before")
    films = Table(train.items.kinds, {**items, "class": classes})
    again = fit_vocabulary(replace(train, users=other, items=films), history=8, spare=4)
    assert again.columns == vocabulary.columns
    [age] = [column for column in again.columns if column.name == "user.age"]
    assert age.mean == np.mean([20 + u for u in range(USERS)])


def test_a_history_ends_before_its_event(parts, vocabulary):
    train, dev = parts["train"], parts["dev"]
    rows = pairs(vocabulary, train).arrays
    names = train.events.columns
    for i in range(0, train.events.rows, 7):
        own = (names["user"] == names["user"][i]) & (train.order < train.order[i])
        before = names["item"][own][np.argsort(-train.order[own])][:8]
        want = [vocabulary.columns[1].id(name) for name in before]
        assert rows["history"][i].tolist() == want + [-1] * (8 - len(want))
        assert vocabulary.items[rows["target"][i]] == names["item"][i]
    found = queries(vocabulary, dev, train)
    for i in range(dev.events.rows):
        own = names["user"] == dev.events.columns["user"][i]
        seen = {vocabulary.items[at] for at in found.arrays["seen"][i] if at >= 0}
        assert seen == {*names["item"][own]}
    np.testing.assert_allclose(
        np.exp(rows["log_q"]),
        [np.mean(names["item"] == name) for name in names["item"]],
        rtol=1e-5,
    )


def test_a_vocabulary_comes_back_and_is_not_believed(vocabulary, tmp_path):
    vocabulary.save(tmp_path)
    found = load(tmp_path)
    assert found.columns == vocabulary.columns and found.items == vocabulary.items
    for name, array in vocabulary.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)
    good = json.loads((tmp_path / "vocabulary.json").read_text())
    for break_it in (
        lambda v: v["items"].pop(),
        lambda v: v["columns"][0].update(spare=0),
        lambda v: v["columns"][1]["tokens"].pop(),
        lambda v: v["columns"][2].update(kind="date"),
        lambda v: v.update(history="many"),
        lambda v: v.update(history=2**31 - 1),
        lambda v: v["columns"][0].update(spare=2**31 - 1),
        lambda v: v["columns"][2].update(width=2**31 - 1),
        lambda v: v["columns"][2].update(mean=10**399),
        lambda v: v.pop("users"),
    ):
        value = json.loads(json.dumps(good))
        break_it(value)
        (tmp_path / "vocabulary.json").write_text(json.dumps(value))
        with pytest.raises(FwError, match="vocabulary"):
            load(tmp_path)
    (tmp_path / "vocabulary.safetensors").unlink()
    (tmp_path / "vocabulary.safetensors").mkdir()  # which no file replaces
    with pytest.raises(FwError, match="cannot be written"):
        vocabulary.save(tmp_path)
    assert len([*tmp_path.iterdir()]) == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "user,item\nada,tea\nada\n", r"a\.csv:3: expected 2 cells"),
        ("a.csv", "user,item,rating\nada,tea,good\n", r"a\.csv:2: expected a number .*'rating'"),
        ("a.tsv", "user\titem\tlabel\nada\ttea\t2\n", r"a\.tsv:2: expected 1 or 0"),
        ("a.inter", "user_id:token\titem_id:token\n\ttea\n", r"a\.inter:2: expected a name"),
        ("a.csv", "user,film\nada,tea\n", r"a\.csv:1: expected a column 'item'"),
        ("a.csv", "user,item,x:date\nada,tea,1\n", r"a\.csv:1: column 'x:date'"),
        ("a.csv", "user,item,label:token_seq\nada,tea,1\n", "'label:token_seq': .* label:float"),
        ("a.csv", "user,item,rating:token_seq\nada,tea,1\n", "'rating:token_seq': .* rating:float"),
        ("a.csv", "user:float,item\n1,tea\n", "'user:float': expected user:token"),
        ("a.csv", "user,item,x:float\nada,tea,1e200\n", "number within ±1e30 in column 'x'"),
        ("a.txt", "user,item\n", r"a\.txt: expected \.csv"),
    ],
)
def test_a_bad_row_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(FwError, match=message):
        load_interactions(tmp_path / name)


def test_a_label_of_an_item_is_a_feature(tmp_path):
    for name, text in (
        ("a.inter", "user_id:token\titem_id:token\nada\ttea\nada\tmilk\n"),
        ("a.item", "item_id:token\tlabel:token\trating:float\ntea\tSony\t\nmilk\tSony\t4\n"),
    ):
        (tmp_path / name).write_text(text)
    found = fit_vocabulary(load_interactions(tmp_path))
    assert [c.tokens for c in found.columns if c.name == "item.label"] == [("Sony",)]


def test_what_is_seen_once_teaches_the_spare_rows(tmp_path):
    (tmp_path / "a.csv").write_text(
        "user,item,timestamp,x:float\nada,tea,1,1e29\nada,milk,2,-1e29\nbob,tea,3,\n"
    )
    train = load_interactions(tmp_path / "a.csv")
    found = fit_vocabulary(train)
    user, item = found.columns[:2]
    assert (user.tokens, item.tokens) == (("ada",), ("tea",))
    assert pairs(found, train).arrays["item"].tolist() == [0, item.id("milk"), 0]
    assert item.id("milk") >= 1 and found.items == ("milk", "tea")  # it can be recommended
    np.testing.assert_allclose(np.exp(found.arrays["log_q"]), [1 / 3, 2 / 3], rtol=1e-6)
    found.save(tmp_path)
    np.testing.assert_array_equal(load(tmp_path).columns[2].encode([1e29, np.nan]), [1, 0])


@pytest.mark.parametrize("by", ["label", "rating"])
def test_what_was_refused_is_no_history(tmp_path, by):
    (tmp_path / "a.csv").write_text(
        f"user,item,timestamp,{by}\nada,tea,1,1\nada,milk,2,0\nada,beer,3,1\nbob,tea,4,0\n"
    )
    train = load_interactions(tmp_path / "a.csv")
    threshold = 1.0 if by == "rating" else 0.0
    recipe = Finetune(task="rank", data="a.csv", run="r", threshold=threshold, history=2)
    made = Ranking.fit(recipe, {"train": Events(train, train)}, None)
    rows, _ = made.rows(recipe, Events(train, train), (), learn=True)
    tea, beer = map(made.vocabulary.columns[1].id, ("tea", "beer"))
    assert rows.arrays["history"].tolist() == [[-1, -1], [tea, -1], [tea, -1], [-1, -1]]
    asked = made.inputs([{"user": user, "item": "tea"} for user in ("ada", "bob")])
    assert asked["history"].tolist() == [[beer, tea], [-1, -1]]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ("a,x,1,5 b,x,2,4", {"threshold": 6.0}, "no rating is 6 or more; the largest is 5; give"),
        ("a,x,1,5 a,y,2,4 b,x,3,4", {}, "no user has three events.*--split hash"),
    ],
)
def test_events_that_cannot_be_parted_say_why(tmp_path, rows, options, message):
    path = tmp_path / "a.csv"
    path.write_text("\n".join(["user,item,timestamp,rating", *rows.split()]))
    with pytest.raises(FwError, match=rf"a\.csv: {message}"):
        Retrieval.read(Finetune(task="retrieve", data=str(path), run="r", **options), path)


def test_requests_are_as_the_data_was_or_refused(parts, vocabulary):
    found = requests.user_inputs(vocabulary, [{"user": "u3"}, {"user": 99, "history": ["i1", "?"]}])
    at = np.flatnonzero(parts["dev"].events.columns["user"] == "u3")
    rows = queries(vocabulary, parts["dev"], parts["train"]).arrays
    for name in ("user", "user.age", "user.sex", "history"):
        np.testing.assert_array_equal(found[name][0], rows[name][at[0]])
    assert {*found["seen"][0].tolist()} - {-1} == {*rows["seen"][at[0]].tolist()} - {-1}
    assert vocabulary.items[found["seen"][1, 0]] == "i1" and found["seen"][1, 1] == -1
    known, total = len(vocabulary.columns[0].tokens), vocabulary.columns[0].rows
    assert known <= found["user"][1] < total and found["user.sex"][1] == -1
    click = clicks(vocabulary, parts["dev"], parts["train"], 4.0)
    one = {"user": "u3", "item": parts["dev"].events.columns["item"][at[0]]}
    for name, values in requests.pair_inputs(vocabulary, [one]).items():
        np.testing.assert_array_equal(values[0], click.arrays[name][at[0]])
    np.testing.assert_array_equal(click.arrays["labels"], is_positive(parts["dev"].events, 4.0))
    for bad, message in (
        ({}, "expected 'user'"),
        ({"user": ["u1"]}, "a name as 'user'"),
        ({"user": "u1", "age": 3}, "unknown 'age'; expected user, user.age, user.sex, history"),
        ({"user": "u1", "user.age": "old"}, "a number within ±1e30 as 'user.age'"),
        ({"user": "u1", "user.age": 10**20 * 10**20}, "a number within ±1e30 as 'user.age'"),
        ({"user": "u1", "user.age": 10**400}, "a number within ±1e30 as 'user.age'"),
        ({"user": "u1", "user.age": 1e300}, "a number within ±1e30 as 'user.age'"),
        ({"user": "u1", "user.age": True}, "a number within ±1e30 as 'user.age'"),
        ({"user": "u1", "history": "i1"}, "a list of names as 'history'"),
    ):
        with pytest.raises(FwError, match=f"request 0: .*{message}"):
            requests.user_inputs(vocabulary, [bad])
        assert message in Retrieval(vocabulary).problem(bad, "")
    assert not Retrieval(vocabulary).problem({"user": "u1", "user.age": 10**20}, "")
    found = requests.user_inputs(vocabulary, [{"user": "u1", "user.age": 10**20}])
    assert np.isfinite(found["user.age"]).all()


def test_ranks_are_those_of_sorting_and_of_scikit_learn():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 12, (50, 30)).astype(np.float32)  # many are equal
    seen = np.stack([rng.permutation(30)[:6] for _ in range(50)]).astype(np.int32)
    seen[:, 4:] = -1
    target = rng.integers(0, 32, 50).astype(np.int32)  # 28 … 31 are no items
    ranked = np.arange(30) < 28
    seen[seen >= 28] = -1
    found = metrics.ranks(*map(jnp.asarray, (scores, target, seen, ranked)))
    for i, (row, at) in enumerate(zip(scores, target, strict=True)):
        left = [j for j in range(28) if j == at or j not in seen[i]]
        order = sorted(left, key=lambda j: (-row[j], j))
        assert found[i] == (order.index(at) if at < 28 else 28)
    scores = rng.normal(size=(50, 30)).astype(np.float32)
    target, nobody = np.arange(50, dtype=np.int32) % 30, np.full((50, 1), -1, np.int32)
    found = metrics.ranks(*map(jnp.asarray, (scores, target, nobody)))
    parts = [
        metrics.rank_means(found[s], found[s] >= 0, (5, 10)) for s in (slice(20), slice(20, 50))
    ]
    figures = {name: metrics.mean_value(m) for name, m in metrics.merge(*parts).items()}
    right = np.eye(30)[target]
    for k in (5, 10):
        theirs = sklearn.metrics.ndcg_score(right, scores, k=k)
        assert figures[f"ndcg@{k}"] == pytest.approx(theirs, abs=1e-6)
        best = np.argsort(-scores)[:, :k]
        assert figures[f"hr@{k}"] == pytest.approx(np.mean(best == target[:, None]) * k)
    theirs = sklearn.metrics.label_ranking_average_precision_score(right, scores)
    assert figures["mrr"] == pytest.approx(theirs, abs=1e-6)


def towers(vocabulary, **more):
    fields = {**two_tower_fields(vocabulary), "size": 16, "temperature": 0.2, **more}
    return two_tower(TwoTowerConfig(**fields))


def clicker(vocabulary, **more):
    return dlrm(DLRMConfig(**{**dlrm_fields(vocabulary), "size": 16, **more}))


def fit(model, task, rows, mesh, layout, *, steps, size=64, rate=0.05):
    """The losses of some steps, and the parameters after them."""
    mesh, layout = make_mesh(mesh), rules(layout)
    config = AdamW(learning_rate=rate, schedule="constant", warmup=0.0)
    lazy = row_optimizer(TableOptions("lazy_adam", rate), config, steps)
    tx = with_tables(optimizer(config, steps), model, lazy)
    key = jax.random.key(0)
    where = shardings(model.axes, jax.eval_shape(model.init, key), mesh, layout)
    state = initial_state(create(model.init, key, shardings=where), tx, mesh)
    step = make_step(model, task.loss, tx, mesh=mesh, rules=layout)
    batches, losses = Batches(rows.arrays, size, seed=0), []
    for i in range(steps):
        state, figures = step(state, put(batches(i), mesh, layout))
        losses.append(float(figures["loss"]))
    return losses, state.variables


def judge(model, task, variables, rows, mesh="data=1", layout="data"):
    counter = make_counter(lambda variables, batch: model.apply(variables, batch)[0], task)
    found = evaluate(counter, variables, rows, size=16, mesh=make_mesh(mesh), rules=rules(layout))
    return found.figures


def small(**more):
    """Towers of three users and five items."""
    return two_tower(
        TwoTowerConfig(("user",), (3,), ("item",), (5,), **{"history": False, "size": 4, **more})
    )


def test_a_user_of_whom_nothing_is_known_has_no_gradient():
    model = small(hidden=(4,))
    batch = {
        "user": jnp.array([-1, 1]), "item": jnp.array([0, 1]),
        "target": jnp.array([0, 1]), "log_q": jnp.zeros(2),
    }  # fmt: skip
    loss = lambda variables: sampled_softmax(model.apply(variables, batch)[0], batch)[0]  # noqa: E731
    variables = model.init(jax.random.key(0))
    for grad in jax.tree.leaves(jax.grad(loss)(variables)):
        assert 0 < jnp.max(jnp.abs(grad)) < 1e3
    users = model.apply(variables, batch)[0]["user"]
    np.testing.assert_allclose(jnp.linalg.norm(users, axis=1), [0, 10], rtol=1e-5)


def test_an_id_that_a_column_has_no_row_for_is_none():
    features = Features(("user", "item"), (3, 5), 2, like=(("history", "item"),), rngs=nnx.Rngs(0))
    known = {"user": jnp.array([2, -1]), "item": jnp.array([-1, 4])}
    known["history"] = jnp.array([[0, -1, 4], [-1, -1, -1]])
    far = {"user": jnp.array([2, 3]), "item": jnp.array([2**31 - 1, 4])}
    far["history"] = jnp.array([[0, 5, 4], [5, 6, -1]])
    for name, vectors in features(known).items():
        np.testing.assert_array_equal(features(far)[name], vectors)
        assert not vectors[int(name != "item")].any()


@pytest.mark.parametrize(
    ("columns", "more"),
    [((), {"numbers": ("a", "b")}), (("item",), {}), (("item",), {"top": ()})],
)
def test_a_dlrm_without_a_product_is_refused(columns, more):
    with pytest.raises(FwError, match="expected a column of ids, and another"):
        DLRMConfig(columns, (3,) * len(columns), **more)


def test_products_of_users_and_items_are_in_float32_and_the_items_tower_stays_behind(vocabulary):
    outputs = {"user": jnp.ones((2, 4)), "item": jnp.ones((2, 4))}
    batch = {
        "target": jnp.arange(2), "log_q": jnp.zeros(2), "seen": jnp.full((2, 1), -1),
        "catalogue": {"item": outputs["item"], "ranked": jnp.ones(2, bool)},
    }  # fmt: skip
    for function in (sampled_softmax, retrieval().count):
        text = str(jax.make_jaxpr(function)(outputs, batch))
        assert text.count("dot_general") == text.count("precision=(Precision.HIGHEST") == 1

    model, said = towers(vocabulary, hidden=(8,)), []

    def apply(variables, batch, **more):
        said.append(jax.config.jax_default_matmul_precision)
        return model.apply(variables, batch, **more)

    variables = model.init(jax.random.key(0))
    answers, kept = recommender(
        replace(model, apply=apply), variables, catalogue(vocabulary), k=3, size=10
    )
    assert {*said} == {"highest"}
    assert {*variables["params"]} - {*kept["params"]} == {"item"}
    shapes = jax.eval_shape(answers.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, kept) == jax.tree.map(jnp.shape, shapes)
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    assert jax.tree.structure(answers.axes, is_leaf=is_axes) == jax.tree.structure(kept)
    inputs = requests.user_inputs(vocabulary, [{"user": "u3"}])
    found = answers.apply(kept, inputs)[0]
    items = model.apply(variables, catalogue(vocabulary).arrays)[0]["item"]
    scores, seen = np.array(model.apply(variables, inputs)[0]["user"] @ items.T), inputs["seen"]
    scores[0, seen[seen >= 0]] = -np.inf
    np.testing.assert_array_equal(found["items"], np.argsort(-scores)[:, :3])


def test_a_split_of_one_class_and_a_model_that_diverged_are_told_apart():
    task, loss = ranking(), metrics.Mean(np.array(1.0), np.array(2.0))
    for labels, logits, message in (
        ([1, 1], [0.0, 1.0], "all 2 rows are '1': AUC compares"),
        ([0, 1], [0.0, np.nan], "1 of 2 are NaN or infinite, so the model has diverged"),
    ):
        pairs = metrics.Sample(np.stack([labels, logits], -1))
        with pytest.raises(FwError, match=message):
            task.summarise({"pairs": pairs, "loss": loss})


MESHES = (("data=8", "data"), ("data=2,fsdp=2,tensor=2", "fsdp_tensor"))


@pytest.mark.parametrize("kind", ["towers", slow("clicks")])
def test_a_mesh_changes_no_number(kind, parts, vocabulary, quickly_compiled):
    # The users have so many rows that the mesh cuts the table.
    if kind == "clicks":
        sizes = {"bottom": (32,), "top": (32, 16), "size": 64}
        model = clicker(vocabulary, rows=(1100, *dlrm_fields(vocabulary)["rows"][1:]), **sizes)
        task, rows = ranking(), clicks(vocabulary, parts["train"], parts["train"], 4.0)
        judged = clicks(vocabulary, parts["dev"], parts["train"], 4.0)
    else:
        model = towers(vocabulary, hidden=(32,), user_rows=(1100, 8), size=64)
        task, rows = retrieval(), pairs(vocabulary, parts["train"])
        judged = queries(vocabulary, parts["dev"], parts["train"])
    losses, variables = fit(model, task, rows, "data=1", "data", steps=3)
    figures = judge(model, task, variables, judged)
    for mesh, layout in MESHES:
        again, there = fit(model, task, rows, mesh, layout, steps=3)
        np.testing.assert_allclose(again, losses, rtol=2e-5)
    here = judge(model, task, there, judged, mesh, layout)
    for name, value in figures.items():
        assert here[name] == pytest.approx(value, rel=1e-3), name


def test_negatives_are_the_items_of_others(parts, vocabulary):
    rng = np.random.default_rng(0)
    user, item = rng.normal(size=(2, 12, 4)).astype(np.float32)
    target = rng.integers(0, 6, 12).astype(np.int32)
    target[3] = -1
    log_q = rng.normal(size=12).astype(np.float32)
    losses = []
    for i in range(12):
        others = [j for j in range(12) if target[j] not in (target[i], -1)]
        logits = [user[i] @ item[j] - log_q[j] for j in [i, *others]]
        losses.append(0 if i == 3 else np.log(np.sum(np.exp(logits))) - logits[0])
    outputs = {"user": jnp.asarray(user), "item": jnp.asarray(item)}
    batch = {"target": jnp.asarray(target), "log_q": jnp.asarray(log_q)}
    total, weight = sampled_softmax(outputs, batch)
    assert float(total) == pytest.approx(sum(losses), rel=1e-5) and float(weight) == 11


def test_towers_find_what_users_like(parts, vocabulary, quickly_compiled):
    model, task = towers(vocabulary), retrieval()
    rows = queries(vocabulary, parts["test"], concatenate([parts["train"], parts["dev"]]))
    _, variables = fit(model, task, pairs(vocabulary, parts["train"]), "data=1", "data", steps=60)
    figures = judge(model, task, variables, rows)
    popular = np.broadcast_to(vocabulary.arrays["log_q"], (rows.rows, len(vocabulary.items)))
    at = metrics.ranks(
        jnp.asarray(popular), *(jnp.asarray(rows.arrays[n]) for n in ("target", "seen"))
    )
    assert figures["mrr"] > 1.3 * float(jnp.mean(1 / (at + 1)))
    # The artifact's answers are the same: of all items but those that the user took in training.
    answers, params = recommender(model, variables, catalogue(vocabulary), k=5)
    asked = [{"user": "u3"}, {"user": "nobody", "history": ["i1", "i5", "i9"]}]
    inputs = requests.user_inputs(vocabulary, asked)
    outputs = answers.apply(params, {k: jnp.asarray(v) for k, v in inputs.items()})[0]
    found = requests.best_items(vocabulary, *(np.asarray(outputs[k]) for k in ("items", "scores")))
    items = model.apply(
        variables, {k: jnp.asarray(v) for k, v in catalogue(vocabulary).arrays.items()}
    )[0]
    users = model.apply(variables, {k: jnp.asarray(v) for k, v in inputs.items()})[0]
    scores = np.array(users["user"] @ items["item"].T)
    for row, seen, answer in zip(scores, inputs["seen"], found, strict=True):
        row[seen[seen >= 0]] = -np.inf
        best = np.argsort(-row)[:5]
        assert [one["item"] for one in answer] == [vocabulary.items[at] for at in best]
        np.testing.assert_allclose([one["score"] for one in answer], row[best], rtol=1e-5)
    assert (
        sum(int(one["item"][1:]) % KINDS == 1 for one in found[1]) >= 2
    )  # they have what he likes


def test_clicks_are_learnt(parts, vocabulary, quickly_compiled):
    model, task = clicker(vocabulary), ranking()
    train_rows = clicks(vocabulary, parts["train"], parts["train"], 4.0)
    _, variables = fit(model, task, train_rows, "data=1", "data", steps=60, rate=0.02)
    rows = clicks(vocabulary, parts["test"], parts["train"], 4.0)
    figures = judge(model, task, variables, rows)
    logits = model.apply(variables, {k: jnp.asarray(v) for k, v in rows.arrays.items()})[0]
    p, y = 1 / (1 + np.exp(-np.asarray(logits, np.float64))), rows.arrays["labels"]
    assert figures["auc"] == pytest.approx(sklearn.metrics.roc_auc_score(y, p), abs=1e-6)
    assert figures["log_loss"] == pytest.approx(sklearn.metrics.log_loss(y, p), abs=1e-5)
    assert figures["auc"] > 0.9
