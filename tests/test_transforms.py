"""compress: every transform × (dense, scanned, conv, embedding) × mesh, against the plain function.

A family tested once: members are transforms, properties are what all of them promise.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import compress
from compress import Scheme
from compress.transform import named_leaves
from tests.marks import fast_are

ROWS = 16


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def scanned(params, x):
    def layer(x, w):
        return jax.checkpoint(lambda x, w: x + jnp.tanh(x @ w))(x, w), None

    return jax.lax.scan(layer, x, params["layers"]["kernel"])[0]


def convolved(params, x):
    names = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, params["stem"]["kernel"], (1, 1), "SAME", dimension_numbers=names
    )


KINDS: dict[str, tuple[Any, Any, Any, P]] = {  # function, parameters, input, the leaf's spec
    "dense": (
        lambda p, x: x @ p["up"]["kernel"] + p["up"]["bias"],
        {"up": {"kernel": normal(0, 64, 32), "bias": normal(1, 32)}},
        normal(2, ROWS, 64),
        P("a", "b"),
    ),
    "scanned": (scanned, {"layers": {"kernel": normal(3, 3, 64, 64) / 8}}, normal(4, ROWS, 64),
                P(None, "b", "a")),
    "conv": (convolved, {"stem": {"kernel": normal(5, 3, 3, 16, 8)}}, normal(6, ROWS, 6, 6, 16),
             P(None, None, "b", "a")),
    "embedding": (
        lambda p, x: jnp.take(p["words"]["embedding"], x.argmax(1), 0) @ p["words"]["embedding"].T,
        {"words": {"embedding": normal(7, 64, 32)}},
        normal(8, ROWS, 64),
        P("a", "b"),
    ),
}  # fmt: skip

INPUTS = "**/kernel"
STATIC = Scheme("int8", activations="static")


def rules(kind: str, option: Any) -> dict[str, Any]:
    return {"**/embedding" if kind == "embedding" else INPUTS: option}


def group(kind: str, *, format: str = "int4", **more: Any) -> Scheme:
    return Scheme(format, per=16 if kind == "conv" else 32, **more)


MEMBERS: dict[str, tuple[Any, float]] = {  # transform for a kind, largest relative error of outputs
    "int8": (lambda k: compress.quantize(rules(k, "int8")), 0.02),
    "int8 static": (lambda k: compress.quantize(rules(k, STATIC)), 0.03),
    "int8 asymmetric": (lambda k: compress.quantize(rules(k, Scheme(symmetric=False))), 0.02),
    "int4": (lambda k: compress.quantize(rules(k, group(k))), 0.25),
    "int4 clipped": (lambda k: compress.quantize(rules(k, group(k, clip="mse"))), 0.25),
    "e4m3": (lambda k: compress.quantize(rules(k, "e4m3")), 0.08),
    "mxfp8": (lambda k: compress.quantize(rules(k, "mxfp8")), 0.08),
    "mxfp4": (lambda k: compress.quantize(rules(k, "mxfp4")), 0.3),
    "nvfp4": (lambda k: compress.quantize(rules(k, "nvfp4")), 0.25),
    "nf4": (lambda k: compress.quantize(rules(k, Scheme("nf4", per=16))), 0.25),
    "smooth, int8": (
        lambda k: compress.chain(
            compress.smooth(rules(k, 0.5)), compress.quantize(rules(k, "int8"))
        ),
        0.02,
    ),
    "rotate, int4": (
        lambda k: compress.chain(
            compress.rotate(rules(k, 16)), compress.quantize(rules(k, group(k)))
        ),
        0.25,
    ),
    "awq": (lambda k: compress.awq(rules(k, group(k))), 0.25),
    "gptq": (lambda k: compress.gptq(rules(k, group(k))), 0.25),
    "lora": (lambda k: compress.lora(rules(k, 4)), 1e-5),
    "lora eva": (lambda k: compress.lora(rules(k, 4), init="eva"), 1e-5),
    "qlora": (
        lambda k: compress.chain(
            compress.quantize(rules(k, Scheme("nf4", per=16))), compress.lora(rules(k, 4))
        ),
        0.25,
    ),
    "lowrank": (lambda k: compress.lowrank(rules(k, 31 if k == "dense" else 8)), 1.0),
    "lowrank aware": (lambda k: compress.lowrank(rules(k, 7), aware=True), 1.0),
    "pruned": (lambda k: compress.prune(rules(k, 0.5)), 0.6),
    "2:4": (lambda k: compress.prune(rules(k, "2:4")), 0.6),
    "lowrank, int8": (
        lambda k: compress.chain(
            compress.lowrank(rules(k, 8)), compress.quantize(rules(k, "int8"))
        ),
        1.0,
    ),
    "2:4, int8": (
        lambda k: compress.chain(
            compress.prune(rules(k, "2:4")),
            compress.quantize(rules(k, Scheme(symmetric=k == "scanned"))),
        ),
        0.6,
    ),
    "2:4, int4": (
        lambda k: compress.chain(
            compress.prune(rules(k, "2:4")), compress.quantize(rules(k, Scheme("int4", per=8)))
        ),
        0.6,
    ),
    "wanda": (lambda k: compress.prune(rules(k, 0.5), by="wanda"), 0.6),
    "sparsegpt 2:4": (lambda k: compress.prune(rules(k, "2:4"), by="sparsegpt"), 0.8),
    "qat": (lambda k: compress.qat(rules(k, "int8")), 0.02),
}
FOR_TABLES = ("int8", "int8 asymmetric", "int4", "int4 clipped", "e4m3", "mxfp8", "mxfp4", "nvfp4",
              "nf4", "qat", "pruned", "2:4", "2:4, int8")  # fmt: skip
FOR_CONVOLUTIONS = [m for m in MEMBERS if m not in ("mxfp8", "mxfp4", "lora", "lora eva", "qlora")]
PAIRS = [
    (member, kind)
    for member, kind in itertools.product(MEMBERS, KINDS)
    if (kind != "embedding" or member in FOR_TABLES)
    and (kind != "conv" or member in FOR_CONVOLUTIONS)
]
FAST = [
    *(("int8", kind) for kind in KINDS),
    *(("int4", "scanned"), ("gptq", "scanned"), ("qlora", "scanned")),
    *(("smooth, int8", "dense"), ("nvfp4", "dense"), ("int8 static", "conv")),
    *(("lowrank", "scanned"), ("lowrank aware", "conv"), ("2:4", "scanned"), ("wanda", "conv")),
    *(("lowrank, int8", "scanned"), ("lowrank, int8", "conv"), ("2:4, int8", "dense")),
]


def made(member: str, kind: str) -> tuple[Any, Any]:
    """The transform, and the statistics it wants."""
    fn, params, x, _ = KINDS[kind]
    transform = MEMBERS[member][0](kind)
    patterns = transform.hessians()
    stats = None
    if transform.observes() or patterns:
        stats = jax.jit(compress.observe(fn, hessians=patterns))(params, x)[1]
    return transform, stats


def equal(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize(("member", "kind"), fast_are(FAST, PAIRS))
def test_the_function_stays_and_the_report_is_true(member, kind):
    fn, params, x, _ = KINDS[kind]
    transform, stats = made(member, kind)
    small, report = transform(params, stats)
    want, bound = np.asarray(fn(params, x)), MEMBERS[member][1]
    got = np.asarray(jax.jit(compress.apply(fn))(small, x))
    assert np.linalg.norm(got - want) <= bound * np.linalg.norm(want)
    leaves = dict(named_leaves(small)[0])
    for record in report:
        leaf, before = leaves[record.path], dict(named_leaves(params)[0])[record.path]
        assert record.bytes_before == before.nbytes
        assert record.bytes_after == sum(a.nbytes for a in jax.tree.leaves(leaf))
        assert record.shape == before.shape
        if compress.is_compressed(leaf):
            off = np.linalg.norm(np.asarray(leaf.dense()) - before) / np.linalg.norm(before)
            assert record.error == pytest.approx(off, rel=1e-3, abs=1e-6)
    # Of the activations, the derivative is that of the function with the leaf's own floats.
    floats = compress.dequantize(small)
    # Against fixed cotangents: those of sin, say, would differ by how activations were rounded.
    back = np.cos(want)
    slope = np.asarray(jax.grad(lambda x: (fn(floats, x) * back).sum())(x))
    mine = jax.jit(jax.grad(lambda x: (compress.apply(fn)(small, x) * back).sum()))(x)
    assert np.linalg.norm(mine - slope) <= 0.1 * np.linalg.norm(slope)


@pytest.mark.parametrize(("member", "kind"), fast_are(FAST, PAIRS))
def test_compressing_and_sharding_commute_bit_for_bit(member, kind):
    fn, params, x, spec = KINDS[kind]
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    where = jax.tree.map(lambda w: NamedSharding(mesh, spec if w.ndim > 1 else P()), params)
    transform, stats = made(member, kind)
    small, _ = transform(params, stats)
    first = jax.device_put(small, compress.specs(small, where))
    later, _ = transform(jax.device_put(params, where), stats)
    equal(first, later)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(later), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)
    there = jax.device_put(x, NamedSharding(mesh, P("a")))
    got, want = (
        np.asarray(jax.jit(compress.apply(fn))(p, y)) for p, y in ((later, there), (small, x))
    )
    assert np.linalg.norm(got - want) <= 1e-2 * np.linalg.norm(want)  # a rounding may turn


@pytest.mark.parametrize(("member", "kind"), fast_are(FAST, PAIRS))
def test_recipes_replay_and_transforms_trace(member, kind):
    _, params, _, _ = KINDS[kind]
    transform, stats = made(member, kind)
    small, report = transform(params, stats)
    again = compress.loads(compress.dumps(transform))
    assert again == transform
    equal(again(params, stats)[0], small)
    shapes, records = jax.eval_shape(transform, params, stats)
    assert jax.tree.structure(shapes) == jax.tree.structure(small)
    for a, b in zip(jax.tree.leaves(shapes), jax.tree.leaves(small), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert [(r.path, r.applied, r.bytes_after) for r in records] == [
        (r.path, r.applied, r.bytes_after) for r in report
    ]
    traced = jax.jit(transform)(params, stats)[0]
    assert jax.tree.structure(traced) == jax.tree.structure(small)
    kinds = (compress.Quantized, compress.Factored, compress.Packed)
    if all(isinstance(leaf, kinds) for _, leaf in named_leaves(small)[0]):
        equal(compress.from_arrays(compress.to_arrays(small), like=params), small)


@pytest.mark.parametrize("member", ["int8 static", "awq", "gptq", "smooth, int8"])
def test_a_table_that_is_looked_up_has_no_statistics(member):
    transform = MEMBERS[member][0]("embedding")
    with pytest.raises(ValueError, match="words/embedding"):
        transform(KINDS["embedding"][1], {})


def test_a_recipe_for_another_model_is_refused():
    recipe = compress.loads('{"transform": "quantize", "rules": {"encoder/**/kernel": "int8"}}')
    with pytest.raises(ValueError, match="made for another model"):
        recipe(KINDS["dense"][1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "transform None: expected one of"),
        ("transforms = []", "a list of one transform or more"),
        ("{", "neither TOML nor JSON"),
        ('{"transform": "cut"}', "'cut': expected one of"),
        ('{"transform": "quantize"}', "quantize: .*rules"),
        ('{"transform": "quantize", "rules": {"w": "int5"}}', "rule 'w': format 'int5'"),
        ('{"transform": "quantize", "rules": {"w": "int8"}, "speed": 1}', "unexpected .*speed"),
        ('{"transform": "quantize", "rules": 3}', "quantize"),
    ],
)
def test_what_is_no_recipe_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        compress.loads(text)
