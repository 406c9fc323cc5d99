"""Structured pruning: what shrinks together is found in any program, and what is left is valid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import compress
from compress.coupling import couplings
from compress.importance import activation_scores, choose_units, magnitude_scores, taylor_scores
from compress.shrink import Cut, Shrink, check_shrunk, shrink
from compress.transform import named_leaves
from fw.models.bert import BertConfig, bert
from fw.models.llama import LlamaConfig, llama
from fw.models.resnet import ResNetConfig, resnet
from fw.models.unet import UNetConfig, unet
from sharding import make_mesh

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SIZE = 4
"""Of a head."""


# --- random networks: no size is written in them but that of a head -------------------------------


def residual(p, x):
    return x + jnp.tanh(x @ p["up"] + p["bias"]) @ p["down"]


def dense(p, x):
    return jax.nn.relu(x @ p["kernel"] + p["bias"])


def fork(p, x):
    return jnp.concatenate([x @ p["kernel"], jnp.tanh(x @ p["other"])], axis=-1)


def gate(p, x):
    return x * jax.nn.sigmoid(x @ p["kernel"])


def heads(p, x):
    y = (x @ p["kernel"]).reshape(len(x), -1, SIZE) * p["scale"][:, None]
    return x + y.reshape(len(x), -1) @ p["out"]


def packed(p, x):
    """One kernel for queries, keys and values, of which heads go together."""
    q, k, v = jnp.moveaxis((x @ p["kernel"]).reshape(len(x), 3, -1, SIZE), 1, 0)
    weights = jax.nn.softmax(jnp.einsum("bhd,bhe->bhde", q, k))
    return x + jnp.einsum("bhde,bhe->bhd", weights, v).reshape(len(x), -1) @ p["out"]


def scan(p, x):
    return jax.lax.scan(lambda x, w: (residual(w, x), None), x, p)[0]


def conv(p, x):
    y = jax.lax.conv_general_dilated(
        x[:, :, None], p["depthwise"], (1,), "SAME", feature_group_count=x.shape[1],
        dimension_numbers=("NCH", "HIO", "NCH"),
    )  # fmt: skip
    return x + y[:, :, 0] @ p["kernel"]


BLOCKS = {f.__name__: f for f in (residual, dense, fork, gate, heads, packed, scan, conv)}
SHAPES = {
    "residual": {"up": "nm", "bias": "m", "down": "mn"},
    "dense": {"kernel": "nm", "bias": "m"},
    "fork": {"kernel": "nm", "other": "nm"},
    "gate": {"kernel": "nn"},
    "heads": {"kernel": "nh", "scale": "m", "out": "hn"},
    "packed": {"kernel": "nq", "out": "hn"},
    "scan": {"up": "3nm", "bias": "3m", "down": "3mn"},
    "conv": {"depthwise": "11n", "kernel": "nn"},
}
TIMES_WIDER = {"dense": 1, "fork": 2}


def net(params, x):
    for block in params["blocks"]:
        for kind, p in block.items():
            x = BLOCKS[kind](p, x)
    return x @ params["head"]


def build(kinds, width, seed):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-2:][0]))

    blocks, n = [], width
    for kind in kinds:
        m = int(rng.integers(2, 7))
        sizes = {"n": n, "m": m, "h": m * SIZE, "q": 3 * m * SIZE, "1": 1, "3": 3}
        shapes = SHAPES[kind].items()
        blocks.append({kind: {k: normal(*(sizes[c] for c in of)) for k, of in shapes}})
        n = m * TIMES_WIDER[kind] if kind in TIMES_WIDER else n
    params = jax.tree.map(jnp.asarray, {"blocks": blocks, "head": normal(n, 2)})
    return params, jnp.asarray(normal(5, width))


networks = st.builds(
    build, st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=5), st.integers(3, 8),
    st.integers(0, 2**32 - 1),
)  # fmt: skip


def some(found, part, seed=0):
    """Units of every dimension, by chance."""
    rng = np.random.default_rng(seed)
    kept = {}
    for name, d in found.dimensions.items():
        scores = rng.random((d.layers or 1, d.units))
        left = max(2, round(part * d.units))
        kept[name] = np.sort(np.argsort(scores, axis=1)[:, :left], axis=1)
    return kept


def zeroed(params, found, kept):
    """The same tree with zeros where units go."""
    leaves, tree = named_leaves(params)
    new = {path: np.array(x) for path, x in leaves}
    for name, units in kept.items():
        d = found.dimensions[name]
        for (path, axis), entries in d.members.items():
            for layer, (at, stay) in enumerate(zip(entries, units, strict=True)):
                whole = new[path] if d.layers is None else new[path][layer]
                along = np.moveaxis(whole, axis - (d.layers is not None), 0)
                along[np.delete(at, stay, axis=0).reshape(-1)] = 0
    return jax.tree.unflatten(tree, [jnp.asarray(new[path]) for path, _ in leaves])


@settings(deadline=None, max_examples=25)
@given(networks, st.floats(0.3, 0.9))
def test_any_network_shrinks_to_a_valid_one_and_zeros_leave_no_trace(network, part):
    params, x = network
    found = couplings(net, params, x)
    assert not found.opaque
    assert found.parameters(found.units) == sum(leaf.size for leaf in jax.tree.leaves(params))
    kept = some(found, part)
    transform, before = shrink(found, kept), zeroed(params, found, kept)
    small, report = transform(before)
    check_shrunk(found, transform, net, small, x)
    np.testing.assert_allclose(jax.jit(net)(small, x), net(before, x), atol=1e-4, rtol=1e-4)
    left = found.units | {name: units.shape[1] for name, units in kept.items()}
    assert found.parameters(left) == sum(leaf.size for leaf in jax.tree.leaves(small))
    again = couplings(net, small, x)
    assert found.flops(left) == again.flops(again.units)
    assert compress.loads(compress.dumps(transform)) == transform
    assert [r.bytes_after for r in report] == [4 * x.size for _, x in named_leaves(small)[0]]


def test_what_every_kind_of_block_lets_go():
    """The dimensions by hand, so that a rule that fixes too much is seen."""
    expected = {
        "residual": {"blocks/0/residual/bias:0"},
        "dense": {"blocks/0/dense/bias:0"},
        "fork": {"blocks/0/fork/kernel:1", "blocks/0/fork/other:1"},
        "gate": set(),
        "heads": {"blocks/0/heads/kernel:1"},
        "packed": {"blocks/0/packed/kernel:1"},
        "scan": {"blocks/0/scan/bias:0", "blocks/0/scan/bias:1"},
        "conv": set(),
    }
    for kind, names in expected.items():
        found = couplings(net, *build([kind], 6, 0))
        assert set(found.dimensions) == names, kind
        # After a layer that puts out what it likes, its width may shrink, too.
        found = couplings(net, *build(["dense", kind], 6, 0))
        assert "blocks/0/dense/bias:0" in found.dimensions, kind


# --- models ---------------------------------------------------------------------------------------

IDS = jax.ShapeDtypeStruct((2, 16), "int32")
FIRST = jax.ShapeDtypeStruct((2, 2), "int32")
TEXT = {"input_ids": IDS, "segment_ids": IDS, "position_ids": IDS, "first": FIRST}
IMAGE = {"pixel_values": jax.ShapeDtypeStruct((2, 16, 16, 2), "float32")}
STACK = "params/stack/layers"
MODELS = {
    "bert": (
        bert(BertConfig(30, 8, 3, 2, 16, num_labels=2, task="sequence_classification")), TEXT,
        {f"{STACK}/attention/key/bias:1": (2, 3), f"{STACK}/down/kernel:1": (16, 3),
         f"{STACK}/attention/key/bias:0": (3, None), "params/embeddings/norm/bias:0": (8, None),
         "params/classifier/kernel:0": (8, None)},
    ),
    "llama": (
        llama(LlamaConfig(40, 16, 2, 4, 32, num_key_value_heads=2)), TEXT,
        {f"{STACK}/attention/key/kernel:2": (2, 2), f"{STACK}/mlp/down/kernel:1": (32, 2),
         f"{STACK}/attention/key/kernel:0": (2, None), "params/head/embedding:1": (16, None)},
    ),
    "resnet": (
        resnet(ResNetConfig(8, (8, 16), (1, 2), 4, num_channels=2, layer_type="basic",
                            stem="small")), IMAGE,
        {"params/classifier/kernel:0": (16, None),
         "params/stages/0/0/units/0/conv/kernel:2": (8, None),
         "params/stages/0/0/units/0/conv/kernel:3": (8, None),
         "params/stages/1/0/units/0/conv/kernel:3": (16, None),
         "params/stages/1/1/units/0/conv/kernel:3": (16, None)},
    ),
    "unet": (
        unet(UNetConfig(3, num_channels=2, width=4, depth=1)), IMAGE,
        {"params/classifier/kernel:2": (4, None), "params/downs/0/convs/0/kernel:3": (4, None),
         "params/downs/0/convs/1/kernel:3": (4, None), "params/downs/1/convs/0/kernel:3": (8, None),
         "params/downs/1/convs/1/kernel:3": (8, None), "params/rises/0/bias:0": (4, None),
         "params/ups/0/convs/0/kernel:3": (4, None)},
    ),
}  # fmt: skip


def of(model):
    return lambda variables, batch: model.apply(variables, batch)[0]


@pytest.mark.parametrize("name", MODELS)
def test_dimensions_of_models(name):
    """Heads (shared ones in groups), neurons, layers and widths; channels through residuals."""
    model, batch, expected = MODELS[name]
    variables = jax.eval_shape(model.init, jax.random.key(0))
    found = couplings(of(model), variables, batch)
    assert {n: (d.units, d.layers) for n, d in found.dimensions.items()} == expected
    params = sum(x.size for x in jax.tree.leaves(variables))
    assert found.parameters(found.units) == params


@pytest.mark.parametrize("name", MODELS)
def test_models_run_on_what_is_left(name):
    model, batch, _ = MODELS[name]
    variables = model.init(jax.random.key(0))
    found = couplings(of(model), variables, batch)
    transform = shrink(found, some(found, 0.5))
    small, _ = transform(variables)
    check_shrunk(found, transform, of(model), small, batch)
    out = jax.eval_shape(of(model), small, batch)
    assert out.shape == jax.eval_shape(of(model), variables, batch).shape


def test_a_size_that_is_written_in_the_function_is_told():
    def pairs(p, x):
        return (x @ p["up"]).reshape(-1, 4, 2).sum(-1) @ p["down"]

    p = {"up": jnp.ones((3, 8)), "down": jnp.ones((4, 3))}
    found = couplings(pairs, p, jnp.ones((2, 3)))
    transform = shrink(found, {"down:0": np.array([[0, 2]])})
    with pytest.raises(ValueError, match="is a size written in it"):
        check_shrunk(found, transform, pairs, transform(p)[0], jnp.ones((2, 3)))
    found, one = couplings(net, PARAMS, X), {HIDDEN: np.array([[0]])}
    with pytest.raises(ValueError, match="one unit is left"):
        check_shrunk(found, shrink(found, one), net, shrink(found, one)(PARAMS)[0], X)


def up(p, x):
    return x @ p["up"]


def counted(p, x):
    """Layers of which every second is another."""

    def step(carry, w):
        x, i = carry
        return (x + jnp.tanh(x @ w) * jnp.where(i % 2 == 0, 1.0, 3.0), i + 1), None

    return jax.lax.scan(step, (x, 0), p["stack"])[0][0]


def shifted(p, x):
    """What comes in goes through three places before it is read."""
    zero = jnp.zeros((len(x), p["up"].shape[1]))

    def step(carry, x):
        a, b, c = carry
        return (jnp.tanh(x @ p["up"]), a, b), c @ p["down"]

    return jax.lax.scan(step, (zero,) * 3, jnp.stack([x] * 6))[1]


def layers(p, x):
    return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p["stack"])[0]


def grouped(p, x):
    y = up(p, x).reshape(len(x), 4, -1)
    y = y / (1 + jnp.abs(y).sum(-1, keepdims=True))
    return y.reshape(len(x), -1) @ p["down"]


WRITTEN = {
    "an index": lambda p, x: up(p, x) @ p["down"] + up(p, x)[:, 0][:, None],
    "the last": lambda p, x: up(p, x) @ p["down"] + up(p, x)[:, -1:],
    "a slice": lambda p, x: up(p, x) @ p["down"] + up(p, x)[:, :4].sum(-1, keepdims=True),
    "a stride": lambda p, x: up(p, x) @ p["down"] + up(p, x)[:, ::2].sum(-1, keepdims=True),
    "halves": lambda p, x: jnp.maximum(up(p, x)[:, :4], up(p, x)[:, 4:]).sum(-1),
    "mixed": lambda p, x: p["bias"][0] * x + p["bias"][1] * x**2 + jnp.abs(p["bias"]).sum(),
    "a layer": lambda p, x: layers(p, x) @ p["stack"][0],
    "a counter": counted,
    "shifted": shifted,
    "groups": grouped,
    "summed up": lambda p, x: jnp.cumsum(
        jnp.broadcast_to(x[:, :1], (len(x), p["down"].shape[0])), 1) @ p["down"],
    "updated": lambda p, x: jax.lax.dynamic_update_slice(
        jnp.zeros((len(x), p["down"].shape[0])), x @ p["thin"], (0, 0)) @ p["down"],
    "drawn": lambda p, x: jnp.where(
        jax.random.bernoulli(jax.random.key(0), 0.5, (p["up"].shape[1],)), up(p, x), 0.0
    ) @ p["down"],
    "both ways": lambda p, x: up(p, x) @ p["two"][0] + up(p, x)[:, ::-1] @ p["two"][1],
    "looked up": lambda p, x: x @ jnp.take(p["stack"], jnp.array([[1]]), axis=0)[0, 0],
    "pooled": lambda p, x: jax.lax.reduce_window(
        up(p, x), -jnp.inf, jax.lax.max, (1, 2), (1, 2), "VALID").sum(-1),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_in_a_function_is_never_silently_wrong(name):
    """It stays, or the check tells, or what is left computes what zeros do."""
    rng = np.random.default_rng(7)
    shapes = {"up": (3, 8), "down": (8, 3), "bias": (4,), "stack": (4, 3, 3), "thin": (3, 4),
              "two": (2, 8, 3)}  # fmt: skip
    params = {k: jnp.asarray(rng.standard_normal(n, np.float32)) for k, n in shapes.items()}
    x, fn = jnp.asarray(rng.standard_normal((2, 3), np.float32)), WRITTEN[name]
    found = couplings(fn, params, x)
    for seed in range(6):
        kept = some(found, 0.5, seed)
        transform, before = shrink(found, kept), zeroed(params, found, kept)
        small, _ = transform(before)
        try:
            check_shrunk(found, transform, fn, small, x)
        except ValueError as error:
            assert "written in" in str(error)
            continue
        np.testing.assert_allclose(fn(small, x), fn(before, x), atol=1e-4)


def test_what_no_rule_is_known_of_stays():
    def fn(p, x):
        return jnp.fft.fft(x @ p["up"]).real @ p["down"]

    found = couplings(fn, {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 3))}, jnp.ones((2, 3)))
    assert not found.dimensions
    assert found.opaque == ("fft",)


def test_flops_are_those_of_the_loop_counted_out():
    params, x = build(["scan"], 6, 0)
    found = couplings(net, params, x)
    up = params["blocks"][0]["scan"]["up"]
    assert found.flops(found.units) == 2 * len(x) * (3 * 2 * up[0].size + params["head"].size)


# --- what matters, and what stays -----------------------------------------------------------------

PARAMS, X = build(["residual", "scan"], 6, 3)
FOUND = couplings(net, PARAMS, X)
HIDDEN, LAYER = "blocks/0/residual/bias:0", "blocks/1/scan/bias:1"


def test_magnitude_of_units():
    p = jax.tree.map(np.asarray, PARAMS["blocks"][0]["residual"])
    want = sum(
        (np.square(w) / np.square(w).mean()).sum(axis) for w, axis in ((p["up"], 0), (p["down"], 1))
    )
    np.testing.assert_allclose(magnitude_scores(FOUND, PARAMS)[HIDDEN][0], want, rtol=1e-5)
    assert magnitude_scores(FOUND, PARAMS)[LAYER].shape == (3, FOUND.units[LAYER])


def test_taylor_is_the_slope_of_a_gate():
    """Against the derivative of the loss by a factor on each hidden unit."""

    def loss(params, x):
        return jnp.square(net(params, x)).mean()

    def gated(gate, x):
        p = PARAMS["blocks"][0]["residual"]
        y = x + (jnp.tanh(x @ p["up"] + p["bias"]) * gate) @ p["down"]
        return jnp.square(scan(PARAMS["blocks"][1]["scan"], y) @ PARAMS["head"]).mean()

    want = 0
    for x in (X, X + 1):
        want += np.square(jax.grad(gated)(jnp.ones(FOUND.units[HIDDEN]), x))
    got = taylor_scores(FOUND, loss, PARAMS, [X, X + 1])[HIDDEN][0]
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_activations_weigh_what_is_read():
    _, stats = compress.observe(net)(PARAMS, X)
    scores = activation_scores(FOUND, PARAMS, stats)
    p = jax.tree.map(np.asarray, PARAMS["blocks"][0]["residual"])
    hidden = np.abs(np.tanh(np.asarray(X) @ p["up"] + p["bias"])).mean(0)
    want = np.square(hidden[:, None] * p["down"]).sum(1)
    np.testing.assert_allclose(scores[HIDDEN][0], want, rtol=1e-4)
    with pytest.raises(ValueError, match="calibration saw no kernel that reads it"):
        activation_scores(FOUND, PARAMS, {})


@settings(deadline=None, max_examples=20)
@given(networks, st.floats(0.4, 1.0), st.sampled_from(["parameters", "flops"]))
def test_a_budget_is_met_and_hardly_more(network, part, of_what):
    params, x = network
    found = couplings(net, params, x)
    scores = magnitude_scores(found, params)
    cost = getattr(found, of_what)
    try:
        kept = choose_units(found, scores, **{of_what: part})
    except ValueError as error:
        assert "least part that can stay" in str(error) or not found.dimensions
        return
    left = found.units | {name: units.shape[1] for name, units in kept.items()}
    assert cost(left) <= part * cost(found.units)
    assert all(n >= 2 for n in left.values())
    if kept:  # the last that went was needed
        more = [cost({**left, name: left[name] + 1}) for name in kept]
        assert max(more) > part * cost(found.units)
    for name, units in kept.items():
        for row, of_layer in zip(units, scores[name], strict=True):
            gone = np.delete(of_layer, row)
            assert gone.max() <= of_layer[row].min()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "give parameters or flops"),
        ({"parameters": 0.5, "flops": 0.5}, "give parameters or flops"),
        ({"parameters": 1.5}, r"in \(0, 1\]"),
        ({"flops": 0.5, "among": "nothing/*"}, "matches no dimension; nearest are"),
        ({"parameters": 0.01}, "is the least part that can stay"),
    ],
)
def test_budgets_that_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        choose_units(FOUND, magnitude_scores(FOUND, PARAMS), **options)


def test_units_go_by_several_at_once():
    params, x = build(["dense"], 8, 1)
    found = couplings(net, params, x)
    kept = choose_units(found, magnitude_scores(found, params), parameters=0.7, multiple=2)
    for name, units in kept.items():
        assert (found.units[name] - units.shape[1]) % 2 == 0


# --- on a mesh, and refusals ----------------------------------------------------------------------


def test_shrinking_and_sharding_in_either_order():
    mesh = make_mesh("fsdp=4,tensor=2")
    params = {
        "up": jnp.arange(8.0 * 16).reshape(8, 16),
        "down": jnp.arange(16.0 * 8).reshape(16, 8),
    }
    where = {"up": P("fsdp", "tensor"), "down": P("tensor", "fsdp")}
    found = couplings(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], params, jnp.ones((2, 8)))
    for left, spec in ((6, P("fsdp", "tensor")), (5, P("fsdp", None))):
        transform = shrink(found, {"down:0": np.arange(left)[None] * 2})
        laid = {k: jax.device_put(x, NamedSharding(mesh, where[k])) for k, x in params.items()}
        small, _ = transform(laid)
        assert small["up"].sharding.spec == spec
        for a, b in zip(jax.tree.leaves(small), jax.tree.leaves(transform(params)[0]), strict=True):
            np.testing.assert_array_equal(a, b)


REFUSED = {
    "unknown": (lambda: shrink(FOUND, {"up:9": np.array([[0]])}), "dimension 'up:9' is unknown"),
    "nothing left": (
        lambda: shrink(FOUND, {HIDDEN: np.zeros((1, 0), int)}), "expected rows of the same length"),
    "layers": (lambda: shrink(FOUND, {LAYER: np.array([[0]])}), "units of 1 layers; expected 3"),
    "another model": (
        lambda: shrink(FOUND, {HIDDEN: np.array([[0]])})({"w": X}), "is no leaf; was it made for"),
    "another size": (
        lambda: Shrink((Cut("w", 1, 9, ((0,),)),))({"w": X}), "9 entries were expected along axis"),
    "order": (lambda: Cut("w", 0, 3, ((1, 0),)), r"entries \(1, 0\) do not ascend"),
    "codes": (
        lambda: couplings(net, compress.quantize({"head": "int8"})(PARAMS)[0], X),
        "^head: it is .*shrink floats"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    make, said = REFUSED[case]
    with pytest.raises(ValueError, match=said):
        make()
