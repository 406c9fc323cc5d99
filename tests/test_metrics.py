"""Metrics against scikit-learn and seqeval, on any sharding, down to the printed character."""

import json
from collections import Counter
from functools import partial
from itertools import product
from typing import Any

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqeval.metrics
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.scheme import IOB1, IOB2, Tokens

from fw import metrics
from fw.errors import FwError
from fw.metrics import IGNORE

TAGS = ("O", "B-PER", "I-PER", "I-LOC", "B-LOC", "B-X-Y", "I-X-Y", "I-MISC")
SHAPE = (8, 16)
ZERO: Any = {"zero_division": 0}  # Any, since scikit-learn's inferred type is str
MODES = [("default", "bio"), ("strict", "bio"), ("strict", "iob1")]
SEQEVAL = {
    ("default", "bio"): {},
    ("strict", "bio"): {"mode": "strict", "scheme": IOB2},
    ("strict", "iob1"): {"mode": "strict", "scheme": IOB1},
}
close = partial(pytest.approx, rel=1e-12, abs=1e-12)  # float64 sums in another order

modes = pytest.mark.parametrize(("mode", "scheme"), MODES)
count_entities = jax.jit(metrics.entity_counts, static_argnames=("tags", "mode", "scheme"))
count_classes = jax.jit(metrics.confusion, static_argnames="num_classes")


def pack(labels, noise, lengths, breaks):
    """Make packed rows: sentences that start at `breaks`, padding from `lengths` on."""
    inside = np.arange(SHAPE[1]) < lengths[:, None]
    labels = np.where(inside, labels, IGNORE).astype(np.int32)
    segments = np.where(inside, 1 + np.cumsum(breaks, axis=1), 0).astype(np.int32)
    # Half of the predictions agree, so that there are true positives to find.
    predictions = np.where((noise % 2 == 0) & (labels != IGNORE), labels, noise // 2)
    return labels, predictions.astype(np.int32), segments


@st.composite
def packed(draw):
    last = len(TAGS) - 1
    every = partial(hnp.arrays, np.int32, SHAPE, fill=st.nothing())  # or most elements were equal
    return pack(
        draw(every(elements=st.integers(IGNORE, last))),
        draw(every(elements=st.integers(0, 2 * last + 1))),
        draw(hnp.arrays(np.int32, SHAPE[0], elements=st.integers(0, SHAPE[1]))),
        draw(hnp.arrays(np.bool_, SHAPE)),
    )


def random_packed(seed, ignored=0.3):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(TAGS), SHAPE)
    labels[rng.random(SHAPE) < ignored] = IGNORE
    noise = rng.integers(0, 2 * len(TAGS), SHAPE)
    return pack(labels, noise, rng.integers(0, SHAPE[1] + 1, SHAPE[0]), rng.random(SHAPE) < 0.2)


def sentences(labels, predictions, segments):
    """List the tag names of every sentence, counted tokens only, gold and predicted."""
    gold, found = [], []
    for row in range(SHAPE[0]):
        for segment in np.unique(segments[row]):
            words = (segments[row] == segment) & (labels[row] != IGNORE)
            gold.append([TAGS[i] for i in labels[row][words]])
            found.append([TAGS[i] for i in predictions[row][words]])
    return gold, found


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name] == close(expected), name


# Entities


@modes
def test_every_short_sequence_has_seqevals_spans(mode, scheme):
    for tags in product(("O", "B-A", "I-A", "B-B", "I-B"), repeat=5):
        if mode == "default":
            expected = [(kind, start, end + 1) for kind, start, end in get_entities(list(tags))]
        else:
            entities = Tokens(list(tags), SEQEVAL[mode, scheme]["scheme"]).entities
            expected = [(entity.tag, entity.start, entity.end) for entity in entities]
        assert metrics.entity_spans(tags, mode=mode, scheme=scheme) == expected, tags


@modes
@settings(max_examples=40, deadline=None, derandomize=True)
@given(batch=packed())
def test_device_counts_are_those_of_host_spans(mode, scheme, batch):
    expected = Counter()
    spans_of = partial(metrics.entity_spans, mode=mode, scheme=scheme)
    for gold_tags, found_tags in zip(*sentences(*batch), strict=True):
        gold, found = set(spans_of(gold_tags)), set(spans_of(found_tags))
        for column, spans in enumerate((gold & found, found, gold)):
            expected.update((kind, column) for kind, *_ in spans)
    counts = count_entities(*batch, tags=TAGS, mode=mode, scheme=scheme)
    types = metrics.entity_types(TAGS)
    assert counts.tolist() == [[expected[kind, column] for column in range(3)] for kind in types]


@modes
@pytest.mark.parametrize("seed", range(4))
def test_entity_report_is_seqevals(mode, scheme, seed):
    batches = [random_packed(10 * seed + i) for i in range(2)]
    count = partial(count_entities, tags=TAGS, mode=mode, scheme=scheme)
    report = metrics.entity_report(metrics.merge(*(count(*batch) for batch in batches)), TAGS)
    texts = [sentences(*batch) for batch in batches]
    gold, found = ([tags for text in texts for tags in text[side]] for side in (0, 1))
    theirs = partial(
        seqeval.metrics.classification_report,
        gold,
        found,
        zero_division=0,
        **SEQEVAL[mode, scheme],
    )
    assert_same(metrics.to_dict(report), theirs(output_dict=True))
    assert metrics.to_text(report) == theirs()
    assert metrics.to_text(report, digits=4) == theirs(digits=4)
    assert report.micro.f1 > 0  # the data has true positives, so equality means something


def test_types_that_nobody_used_are_left_out():
    ids = np.array([[1, 2, 0, 1]], np.int32)  # only PER, of four types
    report = metrics.entity_report(count_entities(ids, ids, np.ones_like(ids), tags=TAGS), TAGS)
    assert [row.name for row in report.rows] == ["PER"]
    assert report.macro.f1 == 1


@pytest.mark.parametrize("tags", [TAGS, ("O",)])
def test_no_entities_score_zero(tags):
    zeros = np.zeros((1, 4), np.int32)
    counts = count_entities(zeros, zeros, zeros, tags=tags)
    report = metrics.entity_report(counts, tags)
    assert counts.shape == (len(metrics.entity_types(tags)), 3)
    assert report.rows == ()
    assert report.micro.f1 == report.macro.f1 == report.weighted.f1 == report.micro.support == 0
    assert "weighted avg       0.00      0.00      0.00         0\n" in metrics.to_text(report)
    assert metrics.entity_spans([]) == metrics.entity_spans(["O"]) == []


def test_bare_tags_have_seqevals_type():
    tags = ["B", "I", "O", "I"]
    assert metrics.entity_types(("O", "B", "I")) == ("_",)
    assert [kind for kind, *_ in get_entities(tags)] == ["_"] * 2
    assert metrics.entity_spans(tags) == [("_", 0, 2), ("_", 3, 4)]


@pytest.mark.parametrize("tag", ["E-PER", "positive", "B-", "", "O-PER", "BPER", "LABEL_0"])
def test_a_tag_of_another_scheme_is_refused_by_name(tag):
    with pytest.raises(FwError, match=repr(tag)):
        metrics.entity_types(("O", tag))


def test_wrong_entity_arguments_are_refused():
    ids = jnp.zeros((2, 4), jnp.int32)
    with pytest.raises(FwError, match="twice"):
        metrics.entity_types(("O", "B-A", "O"))
    with pytest.raises(ValueError, match="one shape"):
        metrics.entity_counts(ids, ids, ids[:1], TAGS)
    with pytest.raises(ValueError, match="one shape"):
        metrics.entity_counts(ids[0], ids[0], ids[0], TAGS)
    with pytest.raises(ValueError, match="mode 'lenient'"):
        metrics.entity_counts(ids, ids, ids, TAGS, mode="lenient")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="scheme 'iob2'"):
        metrics.entity_spans(["O"], scheme="iob2")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"\(4, 3\)"):
        metrics.entity_report(np.zeros((2, 3), np.int64), TAGS)


# Classes


def class_names(num_classes):
    return [f"class {i}" for i in range(num_classes)]


@pytest.mark.parametrize(
    ("used", "num_classes"),
    [((0, 1, 2, 3, 4), 5), ((0, 2, 3), 5), ((0, 1), 2), ((0,), 1), ((1,), 2)],
)
@pytest.mark.parametrize("absent", [False, True])
def test_classification_report_is_scikit_learns(used, num_classes, absent):
    rng = np.random.default_rng(num_classes * 10 + len(used))
    shape = (6, 32)
    labels = rng.choice(used[: max(1, len(used) - 1)], shape).astype(
        np.int32
    )  # the last: never gold
    predictions = np.where(rng.random(shape) < 0.6, labels, rng.choice(used, shape))
    labels[rng.random(shape) < 0.2] = IGNORE
    where = rng.random(shape) < 0.9
    counts = count_classes(labels, predictions.astype(np.int32), num_classes, where)
    kept = where & (labels != IGNORE)
    gold, found = labels[kept], predictions[kept]
    present = range(num_classes) if absent else np.union1d(gold, found)
    names = class_names(num_classes)

    theirs = partial(
        sklearn.metrics.classification_report,
        gold,
        found,
        labels=list(present),
        target_names=[names[i] for i in present],
        **ZERO,
    )
    report = metrics.classification_report(counts, names, absent=absent)
    assert_same(metrics.to_dict(report), theirs(output_dict=True))
    assert metrics.to_text(report) == theirs()
    assert metrics.to_text(report, digits=5) == theirs(digits=5)
    assert report.accuracy == close(np.mean(gold == found))
    if not absent:
        macro = sklearn.metrics.f1_score(gold, found, average="macro", **ZERO)
        assert report.macro.f1 == close(macro)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    labels=hnp.arrays(np.int32, 24, elements=st.integers(IGNORE, 3)),
    predictions=hnp.arrays(np.int32, 24, elements=st.integers(0, 3)),
)
def test_confusion_is_scikit_learns(labels, predictions):
    counts = count_classes(labels, predictions, 4)
    kept = labels != IGNORE
    expected = np.zeros((4, 4), np.int64)
    if kept.any():
        expected = sklearn.metrics.confusion_matrix(
            labels[kept], predictions[kept], labels=range(4)
        )
    assert counts.dtype == jnp.int32
    np.testing.assert_array_equal(counts, expected)


def test_confusion_leaves_out_ids_beyond_the_classes():
    labels, predictions = jnp.array([0, 2, 1, -5, 0]), jnp.array([0, 0, 9, 1, -1])
    assert metrics.confusion(labels, predictions, 2).tolist() == [[1, 0], [0, 0]]


def test_nothing_counted_scores_zero():
    report = metrics.classification_report(np.zeros((2, 2), np.int64), ["a", "b"])
    assert (report.rows, report.accuracy, report.macro.f1) == ((), 0.0, 0.0)


def test_report_is_json_and_refuses_names_that_clash():
    counts = np.array([[3, 1], [0, 2]])
    as_dict = metrics.to_dict(metrics.classification_report(counts, ["no", "yes"]))
    assert json.loads(json.dumps(as_dict)) == as_dict
    for names in (["accuracy", "b"], ["macro avg", "b"], ["a", "a"]):
        with pytest.raises(FwError, match=names[0]):
            metrics.to_dict(metrics.classification_report(counts, names))


def test_wrong_class_arguments_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        metrics.confusion(jnp.zeros((2, 3), jnp.int32), jnp.zeros((3,), jnp.int32), 2)
    with pytest.raises(ValueError, match="3 names"):
        metrics.classification_report(np.zeros((2, 2)), class_names(3))


# Sharding and merging


@pytest.mark.parametrize("spec", [("data",), ("data", "tensor"), (("data", "tensor"),)])
def test_counts_do_not_depend_on_the_sharding(spec):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    batch = random_packed(7)
    spread = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(*spec)))
    assert len(spread[0].sharding.device_set) == 8
    for mode, scheme in MODES:
        count = partial(count_entities, tags=TAGS, mode=mode, scheme=scheme)
        assert count(*batch).any()
        np.testing.assert_array_equal(count(*spread), count(*batch))
    np.testing.assert_array_equal(
        count_classes(*spread[:2], len(TAGS)), count_classes(*batch[:2], len(TAGS))
    )


def test_batches_merge_to_the_counts_of_the_whole():
    batches = [random_packed(seed) for seed in range(3)]
    joined = [np.concatenate(parts) for parts in zip(*batches, strict=True)]

    def count(labels, predictions, segments):
        return {
            "tokens": metrics.confusion(labels, predictions, len(TAGS)),
            "entities": metrics.entity_counts(labels, predictions, segments, TAGS),
        }

    merged = metrics.merge(*(jax.jit(count)(*batch) for batch in batches))
    jax.tree.map(np.testing.assert_array_equal, merged, jax.jit(count)(*joined))
    assert all(leaf.dtype == np.int64 for leaf in jax.tree.leaves(merged))


def test_merge_counts_past_32_bits():
    full = jnp.full((2,), np.iinfo(np.int32).max, jnp.int32)
    assert metrics.merge(full, full, full).tolist() == [3 * np.iinfo(np.int32).max] * 2
    # In f32, 2²⁴ + 1 is 2²⁴.
    total = metrics.merge(jnp.float32(2**24), jnp.bfloat16(1))
    assert (total.dtype, float(total)) == (np.float64, 2**24 + 1)


def test_merge_refuses_what_is_not_one_metric():
    with pytest.raises(ValueError, match=r"'a'.*\(2,\), \(3,\)"):
        metrics.merge({"a": np.zeros(2)}, {"a": np.zeros(3)})
    with pytest.raises(ValueError, match="at least one"):
        metrics.merge()
    with pytest.raises(TypeError, match="complex64"):
        metrics.merge(np.zeros(2, np.complex64))


def test_mean_is_the_weighted_mean_of_all_batches():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(5, 64)).astype(np.float32)
    weights = rng.integers(0, 3, (5, 64)).astype(np.int32)
    poisoned = np.where(weights == 0, np.nan, values)  # what is not counted does no harm
    merged = metrics.merge(*map(jax.jit(metrics.mean), poisoned, weights))
    expected = np.average(values.astype(np.float64), weights=weights)
    assert metrics.mean_value(merged) == pytest.approx(expected, rel=1e-5)  # f32 within a batch
    assert metrics.mean_value(metrics.mean(jnp.array([1.0, 4.0]))) == 2.5
    with pytest.raises(ValueError, match="nothing was counted"):
        metrics.mean_value(metrics.mean(jnp.zeros(3), jnp.zeros(3)))
    with pytest.raises(ValueError, match="shape"):
        metrics.mean(jnp.zeros(3), jnp.zeros(2))
