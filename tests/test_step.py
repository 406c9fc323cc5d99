"""Training steps against numpy in float64, on every mesh; evaluation against plain counting."""

import contextlib
import dataclasses
import json
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics.sequence_labeling import get_entities

from fw import data
from fw.errors import FwError
from fw.evaluate import count, evaluate, make_counter
from fw.model import Model
from fw.models.bert import BertConfig, bert
from fw.models.layers import dropout
from fw.optimizer import SCHEDULES, AdamW, learning_rate, optimizer
from fw.step import abstract_state, initial_state, make_step
from fw.tasks import cross_entropy, make_task
from sharding import ContractError, contract, create, make_mesh, put, rules, shardings
from tests.marks import slow

RULES = rules()


def born(model, mesh, variables=None):
    """The model's variables on a mesh: those given, or new ones."""
    init = model.init if variables is None else lambda _: jax.tree.map(jnp.asarray, variables)
    where = shardings(model.axes, jax.eval_shape(init, jax.random.key(0)), mesh, RULES)
    return create(init, jax.random.key(0), shardings=where)


def run(model, config, mesh, batches, variables=None, **options):
    """Takes a step a batch; returns the last state and the metrics of all steps."""
    mesh, tx = make_mesh(mesh), optimizer(config, len(batches))
    step = make_step(
        model, options.pop("loss", cross_entropy), tx, mesh=mesh, rules=RULES, **options
    )
    state, measured = initial_state(born(model, mesh, variables), tx, mesh), []
    for batch in batches:
        state, metrics = step(state, put(batch, mesh, RULES))
        measured.append(metrics)
    return state, {k: np.array([m[k] for m in measured]) for k in measured[0]}


# --- one step, written again in numpy -------------------------------------------------------------

LINEAR = Model(
    config=None,
    init=lambda key: {
        "params": {"kernel": jax.random.normal(key, (6, 3)), "bias": jnp.ones(3)},
        "state": {},
    },
    apply=lambda variables, batch, *, key=None, train=False: (
        batch["x"] @ variables["params"]["kernel"] + variables["params"]["bias"],
        variables,
    ),
    axes={"params": {"kernel": ("embed", "labels"), "bias": ("labels",)}, "state": {}},
)


def linear_batches(steps, dtype: Any = np.float64):
    """16 rows; every fourth has no label, so one of four microbatches has none."""
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(steps):
        labels = rng.integers(0, 3, 16).astype(np.int32)
        labels[rng.random(16) < 0.3] = data.IGNORE
        labels[::4] = data.IGNORE
        batches.append({"x": rng.normal(size=(16, 6)).astype(dtype), "labels": labels})
    return batches


def schedule_np(config, step, steps):
    """As `get_scheduler` of transformers defines it, for a whole number of warm-up steps."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.learning_rate * step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    shape = {"constant": 1, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return config.learning_rate * shape[config.schedule]


def adamw_np(params, batches, config):
    """Softmax regression with AdamW, from the formulae of the papers."""
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    first, second = ({k: np.zeros_like(v) for k, v in params.items()} for _ in range(2))
    losses, norms = [], []
    for step, batch in enumerate(batches):
        x, labels = batch["x"], batch["labels"]
        counted = labels != data.IGNORE
        logits = x @ params["kernel"] + params["bias"]
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        losses.append(-np.log(p[counted, labels[counted]]).sum() / counted.sum())
        g = (p - np.eye(3)[labels]) * counted[:, None] / counted.sum()
        grads = {"kernel": x.T @ g, "bias": g.sum(0)}
        norms.append(math.sqrt(sum(np.square(v).sum() for v in grads.values())))
        shrink = min(1, config.clip / norms[-1]) if config.clip else 1
        rate = schedule_np(config, step, len(batches))
        for name, value in params.items():
            grad, t = grads[name] * shrink, step + 1
            first[name] = config.b1 * first[name] + (1 - config.b1) * grad
            second[name] = config.b2 * second[name] + (1 - config.b2) * grad**2
            mean, var = first[name] / (1 - config.b1**t), second[name] / (1 - config.b2**t)
            decay = config.weight_decay * value * (name == "kernel")
            params[name] = value - rate * (mean / (np.sqrt(var) + config.epsilon) + decay)
    return params, losses, norms


CHANGES = {
    "linear": {},
    "cosine, no clipping": {"schedule": "cosine", "clip": 0.0},
    "constant, no warm-up": {"schedule": "constant", "warmup": 0.0},
}


@pytest.mark.parametrize("changes", CHANGES)
def test_steps_equal_those_written_in_numpy(changes):
    config = AdamW(learning_rate=0.1, weight_decay=0.3, clip=0.9, warmup=0.3)
    config = dataclasses.replace(config, **CHANGES[changes])
    batches = linear_batches(8)
    with jax.enable_x64(True):
        start = LINEAR.init(jax.random.key(1))
        state, metrics = run(LINEAR, config, "data=1", batches, start)
    params, losses, norms = adamw_np(start["params"], batches, config)
    assert int(state.step) == 8
    assert min(norms) < 0.9 < max(norms)
    # All in f64 but optax's learning rate, which is f32.
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-7)
    np.testing.assert_allclose(metrics["grad_norm"], norms, rtol=1e-7)
    for name, value in params.items():
        np.testing.assert_allclose(state.variables["params"][name], value, rtol=1e-7)


def test_microbatches_change_nothing():
    batches, results = linear_batches(8), []
    counted = [[(b["labels"][i::4] != data.IGNORE).sum() for i in range(4)] for b in batches]
    assert all(len(set(numbers)) > 1 and 0 in numbers for numbers in counted)
    with jax.enable_x64(True):
        start = LINEAR.init(jax.random.key(1))
        for mesh, parts in (("data=1", 1), ("data=1", 2), ("data=2,fsdp=2", 4)):
            state, metrics = run(LINEAR, AdamW(0.1), mesh, batches, start, accumulate=parts)
            results.append((state.variables["params"], metrics))
    for result in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), result, results[0])


@settings(derandomize=True, deadline=None, max_examples=10)
@given(st.sampled_from(SCHEDULES), st.floats(0, 0.99), st.integers(1, 60))
def test_learning_rate(schedule, warmup, steps):
    config = AdamW(learning_rate=3e-4, schedule=schedule, warmup=warmup)
    rate = learning_rate(config, steps)
    got = np.array([rate(step) for step in range(steps)])
    expected = [schedule_np(config, step, steps) for step in range(steps)]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schedule": "sine"}, "schedule 'sine' is unknown; choose one of"),
        ({"warmup": 1.0}, r"warmup is 1.0; expected a fraction of all steps in \[0, 1\)"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0; expected 0 or more"),
        ({"clip": -0.5}, "clip is -0.5; expected 0 or more"),
    ],
)
def test_a_bad_optimiser_is_refused(changes, said):
    with pytest.raises(FwError, match=said):
        AdamW(**changes)


# --- state and keys -------------------------------------------------------------------------------


def test_the_state_is_donated_and_stays_where_it_lies():
    mesh, tx = make_mesh("data=2,fsdp=2"), optimizer(AdamW(), 3)
    step = make_step(LINEAR, cross_entropy, tx, mesh=mesh, rules=RULES)
    state = initial_state(born(LINEAR, mesh), tx, mesh)
    lie = jax.tree.map(lambda x: x.sharding, state)
    cut = {tuple(x.sharding.spec) for x in jax.tree.leaves(state) if x.shape == (6, 3)}
    assert cut == {("fsdp", None)}  # the kernel and its two moments
    for batch in linear_batches(3, np.float32):
        old, (state, _) = state, step(state, put(batch, mesh, RULES))
        assert all(x.is_deleted() for x in jax.tree.leaves(old))
        assert not any(x.is_deleted() for x in jax.tree.leaves(state))
        assert jax.tree.map(lambda x: x.sharding, state) == lie
    assert step._cache_size() == 1


def test_tokens_are_counted_and_a_batch_without_labels_changes_nothing():
    segments = np.array([[1, 1, 2, 0], [0, 0, 0, 0]] * 8, np.int32)
    batch = {**linear_batches(1, np.float32)[0], "segment_ids": segments}
    batch["labels"] = np.full(16, data.IGNORE, np.int32)
    start = LINEAR.init(jax.random.key(0))
    config = AdamW(learning_rate=1.0, weight_decay=0.0)
    state, metrics = run(LINEAR, config, "data=1", [batch] * 2, start, accumulate=2)
    jax.tree.map(np.testing.assert_array_equal, state.variables, start)
    assert metrics["loss"].tolist() == metrics["grad_norm"].tolist() == [0, 0]
    assert metrics["tokens"].tolist() == [24, 24]
    assert run(LINEAR, config, "data=1", linear_batches(1, np.float32))[1]["tokens"] == [0]


def test_microbatches_must_divide_the_batch():
    said = "a batch of 16 rows does not divide into 3 microbatches; choose --accumulate"
    with pytest.raises(FwError, match=said):
        run(LINEAR, AdamW(), "data=1", linear_batches(1, np.float32), accumulate=3)


def test_dropout_changes_with_seed_step_and_microbatch_and_with_nothing_else():
    """A model that is its own mask; rows 0 and 1 are two microbatches, of opposite weights."""
    model = Model(
        config=None,
        init=lambda _: {"params": {"gain": jnp.ones(64)}, "state": {}},
        apply=lambda variables, batch, *, key=None, train=False: (
            dropout(variables["params"]["gain"] * jnp.ones_like(batch["x"]), 0.5, key),
            variables,
        ),
        axes={"params": {"gain": ("embed",)}, "state": {}},
    )

    def loss(outputs, batch):
        return (outputs * batch["x"] * jnp.arange(64.0)).sum(), jnp.ones(())

    batch = {"x": np.array([[1.0] * 64, [-1.0] * 64], np.float32)}

    def losses(seed, accumulate=2):
        config = AdamW(learning_rate=0.0)
        options = {"loss": loss, "seed": seed, "accumulate": accumulate}
        return run(model, config, "data=1", [batch] * 4, **options)[1]["loss"].tolist()

    zero, one = losses(0), losses(1)
    assert losses(0) == zero
    assert 0 not in zero  # the two rows have different masks
    assert len({*zero, *one}) == 8
    assert len({*losses(0, accumulate=1)}) == 4


class Linen(linen.Module):
    """A linen module with batch norm, to enter through the record."""

    @linen.compact
    def __call__(self, x, train):
        x = linen.Dense(16)(x)
        x = linen.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return linen.Dense(3)(linen.relu(x))


def test_a_linen_module_with_batch_norm_trains():
    module = Linen()

    def init(key):
        made = module.init(key, jnp.zeros((1, 6)), train=False)
        return {"params": made["params"], "state": made["batch_stats"]}

    def apply(variables, batch, *, key=None, train=False):
        tree = {"params": variables["params"], "batch_stats": variables["state"]}
        out, changed = module.apply(tree, batch["x"], train=train, mutable=["batch_stats"])
        return out, {**variables, "state": changed["batch_stats"]}

    norm = dict.fromkeys(("scale", "bias"), ("mlp",))
    params = {
        "Dense_0": {"kernel": ("embed", "mlp"), "bias": ("mlp",)},
        "BatchNorm_0": norm,
        "Dense_1": {"kernel": ("mlp", "labels"), "bias": ("labels",)},
    }
    state = {"BatchNorm_0": {"mean": ("mlp",), "var": ("mlp",)}}
    model = Model(module, init, apply, {"params": params, "state": state})
    batches = linear_batches(40, np.float32)
    for batch in batches:  # a rule to learn
        batch["labels"] = np.argmax(batch["x"][:, :3], 1).astype(np.int32)
    config = AdamW(learning_rate=0.03, weight_decay=0.0)
    trained, metrics = run(model, config, "data=2,fsdp=2,tensor=2", batches)
    assert metrics["loss"][-5:].mean() < 0.5 * metrics["loss"][:5].mean()
    # The running mean is that of the first layer, which is linear, over batches with mean ~0.
    kernel, stats = trained.variables["params"]["Dense_0"], trained.variables["state"]
    assert np.all(np.abs(stats["BatchNorm_0"]["mean"] - kernel["bias"]) < 0.5)
    assert np.all(stats["BatchNorm_0"]["var"] != 1)


# --- the mesh never changes the result ------------------------------------------------------------

# Every axis and the useful pairs of them, on 1, 2, 4 and 8 devices; those with `pipe` and experts
# are in test_wide.py.
MESHES = (
    "data=8",
    "fsdp=8",
    "tensor=4",
    "sequence=8",
    "fsdp=2",
    "sequence=2,tensor=2",
    "data=2,fsdp=2,tensor=2",
    "data=2,expert=2,sequence=2",
    "fsdp=2,sequence=2,tensor=2",
)
ROWS, LENGTH, WORDS, STEPS = 8, 16, 48, 50


def text_batch(task, step):
    """Two texts a row and padding; the label is a function of the token, so there is a rule."""
    rng = np.random.default_rng((7, step))
    ids = rng.integers(0, WORDS, (ROWS, LENGTH), dtype=np.int32)
    cut, end = rng.integers(4, 13, (ROWS, 1)), rng.integers(13, LENGTH + 1, (ROWS, 1))
    place = np.arange(LENGTH)[None]
    segments = np.where(place < cut, 1, np.where(place < end, 2, 0))
    positions = np.where(segments == 2, place - cut, np.where(segments == 1, place, 0))
    batch = {"input_ids": ids, "segment_ids": segments, "position_ids": positions}
    if task == "token_classification":
        counted = (segments > 0) & (rng.random(ids.shape) < 0.7)
        batch["labels"] = np.where(counted, ids % 3, data.IGNORE)
    else:
        batch["first"] = np.concatenate([0 * cut, cut], 1)
        batch["labels"] = np.take_along_axis(ids, batch["first"], 1) % 3
        batch["labels"][::3, 1] = data.IGNORE
    return {name: value.astype(np.int32) for name, value in batch.items()}


@contextlib.contextmanager
def quickly_compiled(quick):
    """The partitioner's program all the same, but machine code made in half the time."""
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize(
    ("task", "x64", "layers", "meshes"),
    [
        ("token_classification", True, 1, MESHES[-2:]),
        slow("sequence_classification", False, 1, MESHES[-1:]),
        *[
            slow(task, x64, 2, MESHES)
            for task in ("token_classification", "sequence_classification")
            for x64 in (True, False)
        ],
    ],
)
def test_fifty_steps_are_the_same_on_every_mesh(task, x64, layers, meshes):
    sizes = BertConfig(
        vocab_size=WORDS, hidden_size=16, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=32, num_labels=3, task=task, max_position_embeddings=LENGTH,
    )  # fmt: skip
    model, config = bert(sizes), AdamW(learning_rate=3e-3)
    batches = [text_batch(task, step) for step in range(STEPS)]
    with jax.enable_x64(x64), quickly_compiled(layers == 1):
        start = model.init(jax.random.key(0))
        alone = run(model, config, "data=1", batches, start)[1]
        assert alone["loss"][-5:].mean() < 0.9 * alone["loss"][:5].mean()
        for mesh in meshes:
            state, together = run(model, config, mesh, batches, start)
            query = state.variables["params"]["stack"]["layers"]["attention"]["query"]["kernel"]
            assert query.dtype == (np.float64 if x64 else np.float32)
            assert (
                not {"fsdp", "tensor"} & {*re.findall(r"\w+(?==)", mesh)}
                or len({str(s.index) for s in query.addressable_shards}) > 1
            )
            rtol = 1e-9 if x64 else 1e-4
            np.testing.assert_allclose(together["loss"], alone["loss"], rtol=rtol, err_msg=mesh)
            np.testing.assert_array_equal(together["tokens"], alone["tokens"])
            print(f"{mesh}: {np.abs(together['loss'] / alone['loss'] - 1).max():.1e} relative")


def test_the_step_keeps_its_contract():
    """What lies whole on several devices is small, and nothing travels where it should not."""
    sizes = BertConfig(
        vocab_size=WORDS, hidden_size=16, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=32, num_labels=4, task="token_classification",
        max_position_embeddings=LENGTH,
    )  # fmt: skip
    model, tx = bert(sizes), optimizer(AdamW(), 1)
    whole = ["all-reduce"]
    scattered = ["all-gather", "reduce-scatter", "all-to-all", "all-reduce"]
    batch = text_batch("token_classification", 0)
    for spec, allowed in {
        "data=2,fsdp=2,tensor=2": {"data": whole, "fsdp": scattered, "tensor": whole},
        "fsdp=2,sequence=4": {"fsdp": scattered, "sequence": ["collective-permute", *whole]},
    }.items():
        mesh = make_mesh(spec)
        step = make_step(model, cross_entropy, tx, mesh=mesh, rules=RULES)
        state = abstract_state(model, tx, mesh, RULES)
        with quickly_compiled(True):
            compiled = step.lower(state, put(batch, mesh, RULES)).compile()
        kernel = 16 * 32 * 4
        wire = {"fsdp": 8 * kernel}
        limits: dict[str, Any] = {
            "allowed": allowed,
            "max_wire": wire,
            "max_replicated": {"fsdp": 256},
        }
        contract(compiled, axes=model.axes["params"], rules=RULES, **limits)
    # A rule that leaves kernels whole breaks it, and is named.
    careless, mesh = rules(embed=None), make_mesh("data=2,fsdp=2,tensor=2")
    step = make_step(model, cross_entropy, tx, mesh=mesh, rules=careless)
    lowered = step.lower(abstract_state(model, tx, mesh, careless), put(batch, mesh, careless))
    with quickly_compiled(True):
        compiled = lowered.compile()
    with pytest.raises(ContractError, match=r"up/kernel .*over fsdp.*map it with rules\(embed="):
        contract(compiled, axes=model.axes["params"], rules=careless, **limits)


# --- evaluation -----------------------------------------------------------------------------------

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def encoded_texts(task, texts=63):
    """Random texts as `fw.data` would encode them; for words, some pieces do not count."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(3, 15, texts)
    total = int(lengths.sum())
    tokens = task == "token_classification"
    labels = rng.integers(0, len(TAGS), total if tokens else texts).astype(np.int32)
    words = np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)
    if tokens:
        labels[rng.random(total) < 0.3] = data.IGNORE
    return data.Encoded(
        input_ids=rng.integers(1, WORDS, total).astype(np.int32), words=words, labels=labels,
        offsets=np.concatenate([[0], np.cumsum(lengths)]), pad=0, records=texts,
        record=np.arange(texts, dtype=np.int32), per_word=tokens,
    )  # fmt: skip


def count_plainly(task, encoded, table):
    """Text after text, with numpy and seqeval; no rows, no batches, no padding."""
    confusion, total, weight = np.zeros((len(TAGS),) * 2, np.int64), 0.0, 0
    entities = {"LOC": [0, 0, 0], "PER": [0, 0, 0]}
    for n, (start, stop) in enumerate(zip(encoded.offsets, encoded.offsets[1:], strict=False)):
        logits = table[encoded.input_ids[start:stop]].astype(np.float64)
        labels = encoded.labels[start:stop]
        if task == "sequence_classification":
            logits, labels = logits[:1], encoded.labels[n : n + 1]
        logits, labels = logits[labels != data.IGNORE], labels[labels != data.IGNORE]
        guess = logits.argmax(1)
        np.add.at(confusion, (labels, guess), 1)
        picked = logits[np.arange(len(labels)), labels]
        total += (np.log(np.exp(logits).sum(1)) - picked).sum()
        weight += len(labels)
        gold, found = ({*get_entities([TAGS[i] for i in ids])} for ids in (labels, guess))
        for column, spans in enumerate((gold & found, found, gold)):
            for kind, _, _ in spans:
                entities[kind][column] += 1
    return confusion, total, weight, entities


@pytest.mark.parametrize("mesh", ["data=1", "data=8", "data=2,fsdp=2,tensor=2"])
@pytest.mark.parametrize("name", ["token_classification", "sequence_classification"])
def test_counts_over_a_mesh_are_plain_counts(name, mesh):
    encoded, task, mesh = encoded_texts(name), make_task(name, TAGS), make_mesh(mesh)
    rows = data.pack(encoded, 16, max_texts=3)
    assert rows.rows % 8  # so the last batch is filled up
    table = np.random.default_rng(4).normal(size=(WORDS, len(TAGS))).astype(np.float32)

    def forward(variables, batch):
        logits = variables["table"][batch["input_ids"]]
        if name == "sequence_classification":
            logits = jnp.take_along_axis(logits, batch["first"][..., None], axis=1)
        return logits

    where = {"mesh": mesh, "rules": RULES, "size": 8}
    variables = put({"table": table}, mesh, RULES, ("vocab", "labels"))
    counter = make_counter(forward, task)
    counts = count(counter, variables, rows, **where)
    confusion, total, weight, entities = count_plainly(name, encoded, table)
    assert counts["loss"].weight == weight > 0
    np.testing.assert_allclose(counts["loss"].total, total, rtol=1e-6)
    if name == "token_classification":
        np.testing.assert_array_equal(counts["tags"], confusion)
        np.testing.assert_array_equal(counts["entities"], list(entities.values()))
    else:
        np.testing.assert_array_equal(counts["confusion"], confusion)

    summary = evaluate(counter, variables, rows, **where)
    assert json.loads(json.dumps(summary.figures))[summary.metric] == summary.value
    assert math.isclose(summary.figures["loss"], total / weight, rel_tol=1e-6)
    assert math.isclose(summary.figures["accuracy"], np.trace(confusion) / weight)


def test_an_unknown_task_is_refused():
    with pytest.raises(FwError, match="task 'poetry' is unknown; choose one of"):
        make_task("poetry", ("a", "b"))
