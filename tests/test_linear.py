"""Products and look-ups that write their communication out: the same numbers, the fewest bytes."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fw import precision
from sharding import ShardingError, constrain, create, linear, lookup, make_mesh, put, rules, scope
from sharding import shardings as where

MESHES = (
    "data=8",
    "fsdp=8",
    "tensor=8",
    "sequence=4",
    "data=2,fsdp=2,tensor=2",
    "fsdp=2,sequence=2,tensor=2",
    "data=2,fsdp=2,expert=2",
)
AXES = {
    "word": ("vocab", "embed"),
    "place": ("positions", "embed"),
    "kind": ("types", "embed"),
    "query": ("embed", "heads"),
    "key": ("embed", "heads"),
    "out": ("heads", "embed"),
}
SHAPES = {"word": (48, 16), "place": (8, 16), "kind": (2, 16)} | dict.fromkeys(
    ("query", "key", "out"), (16, 16)
)


def case(dtype):
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=shape).astype(dtype) / 4 for name, shape in SHAPES.items()}
    ids = rng.integers(-3, 60, (8, 8)).astype(np.int32)  # some of them out of range
    return params, {"ids": ids, "places": rng.integers(0, 8, (8, 8)).astype(np.int32)}


def loss(params, batch, embed=lookup, products=linear):
    """Embeddings, two products of one input, one back, and something that is not linear."""
    tables, ids = ("word", "place", "kind"), [batch["ids"], batch["places"], jnp.array(1)]
    x = embed([params[n] for n in tables], ids, [AXES[n] for n in tables])
    x = constrain(x, "batch", "length", "embed")
    q, k = products(x, [params["query"], params["key"]], AXES["query"])
    x = x + products(jnp.tanh(q) * k, [params["out"]], AXES["out"])[0]
    return jnp.mean(jnp.sin(x))


def plain(params, batch):
    return loss(
        params,
        batch,
        lambda tables, ids, _: sum(
            (t[jnp.clip(i, 0, len(t) - 1)] for t, i in zip(tables, ids, strict=True)),
            start=jnp.zeros((), tables[0].dtype),
        ),
        lambda x, kernels, _: [x @ kernel for kernel in kernels],
    )


def on_mesh(spec, params, batch, layout, fn=loss):
    """The compiled gradient of `fn` and its arguments, placed."""
    mesh = make_mesh(spec)
    params = create(lambda: params, shardings=where(AXES, params, mesh, layout))
    batch = put(batch, mesh, layout)
    with scope(mesh, layout, differentiate=True):
        step = jax.jit(
            jax.value_and_grad(fn),
            out_shardings=(None, jax.tree.map(lambda x: x.sharding, params)),
        )
        return step.lower(params, batch).compile(), (params, batch)


@pytest.mark.parametrize("vocab", [None, "tensor"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(np.float64, 1e-13), pytest.param(np.float32, 1e-6, marks=pytest.mark.slow)],
)
def test_values_and_gradients_are_the_plain_ones(dtype, tolerance, vocab):
    with jax.enable_x64(dtype == np.float64):
        params, batch = case(dtype)
        expected = jax.jit(jax.value_and_grad(plain))(params, batch)
        assert all(np.abs(g).max() > 1e-4 for g in jax.tree.leaves(expected))
        for spec in MESHES:
            step, args = on_mesh(spec, params, batch, rules(vocab=vocab))
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance),
                step(*args),
                expected,
            )


@pytest.mark.parametrize("heads", [("fsdp", "tensor"), ("tensor", "fsdp")])
def test_kernels_cut_twice_along_one_axis(heads):
    """Gathered over the outer of two mesh axes, the parts of the inner one would be interleaved."""
    rng = np.random.default_rng(0)
    x, kernel = (rng.normal(size=s).astype(np.float32) for s in ((8, 4, 16), (16, 16)))
    mesh, layout = make_mesh("data=2,fsdp=2,tensor=2"), rules(embed=None, heads=heads)
    names = AXES["query"]
    lies = where({"query": names}, {"query": kernel}, mesh, layout)["query"]
    with scope(mesh, layout, differentiate=True):
        y = jax.jit(lambda x, k: linear(x, [k], names)[0])(
            put(x, mesh, layout), jax.device_put(kernel, lies)
        )
    np.testing.assert_allclose(y, x @ kernel, atol=1e-5)


def wire(text):
    """Bytes out of a device by (kind, mesh axes), read off the program's own replica groups."""
    found = {}
    for line in text.splitlines():
        form = r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\("
        if not (match := re.search(form, line)):
            continue
        shapes = re.findall(r"(f64|f32|bf16|s32|u16|pred)\[([\d,]*)\]", match[1])
        width = {"f64": 8, "f32": 4, "s32": 4, "bf16": 2, "u16": 2, "pred": 1}
        size = sum(width[t] * math.prod(int(n) for n in s.split(",") if n) for t, s in shapes)
        groups = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line)
        assert groups, line
        lengths = dict(re.findall(r"'(\w+)'=(\d+)", groups[1]))
        axes = tuple(re.findall(r"'(\w+)'", groups[2]))
        n = math.prod(int(lengths[axis]) for axis in axes)
        times = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1}.get(match[2], (n - 1) / n)
        key = match[2], axes
        found[key] = found.get(key, 0) + times * size
    return found


@pytest.mark.parametrize(("dtype", "width"), [("f32", 4), ("bf16", 2)])
def test_no_byte_too_many(dtype, width):
    params, batch = case(np.float32)
    fn = precision.apply(loss, dtype)
    kernels = 3 * 16 * 16
    rows, table = 8 * 8 * 16 * 4, (48 + 8 + 2) * 16 * 4  # bytes of activations, of tables

    found = wire(on_mesh("fsdp=8", params, batch, rules(), fn)[0].as_text())
    ids = 2 * 8 * 8 * 4
    expected = {
        ("all-gather", ("fsdp",)): 7 / 8 * (kernels * width + ids),
        ("reduce-scatter", ("fsdp",)): 7 / 8 * kernels * 4,
        ("all-to-all", ("fsdp",)): 2 * 7 / 8 * rows / 8,  # there, and its gradient back
    }
    assert {k: v for k, v in found.items() if v > 100} == pytest.approx(expected)

    found = wire(on_mesh("tensor=8", params, batch, rules(), fn)[0].as_text())
    assert found == pytest.approx({("all-reduce", ("tensor",)): 2 * (2 * 7 / 8 * rows)})

    # Over data, what is left of the gradients after they are scattered over fsdp.
    found = wire(on_mesh("data=4,fsdp=2", params, batch, rules(), fn)[0].as_text())
    over_data = sum(v for (_, axes), v in found.items() if axes == ("data",))
    assert over_data == pytest.approx(2 * 3 / 4 * (kernels * 4 + table) / 2)
    assert found[("reduce-scatter", ("fsdp",))] == pytest.approx(1 / 2 * kernels * 4)


def test_outside_training_and_on_one_device_it_is_a_plain_product():
    x, kernel = jnp.ones((8, 8, 16)), jnp.ones((16, 16))
    for spec, differentiate in itertools.product(("data=1", "fsdp=2"), (True, False)):
        with scope(make_mesh(spec), rules(), differentiate=differentiate):
            program = str(jax.make_jaxpr(lambda x, k: linear(x, [k], AXES["query"]))(x, kernel))
        assert ("shard_map" in program) == (spec == "fsdp=2" and differentiate)


def test_names_must_fit():
    with pytest.raises(ShardingError, match=r"x has rank 2.*expected 1 names of rows"):
        linear(jnp.ones((2, 3)), [jnp.ones((3, 3))], ("embed", "mlp"))
    with (
        scope(make_mesh("fsdp=8"), rules(), differentiate=True),
        pytest.raises(ShardingError, match="linear: kernel: axis 'embed' has size 12"),
    ):
        linear(jnp.ones((8, 2, 12)), [jnp.ones((12, 8))], ("embed", "mlp"))
