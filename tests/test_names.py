"""Names for anybody's parameters: by path or by metadata, and an error for every gap."""

import dataclasses
import re
import typing

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding import ShardingError, gather, make_mesh, paths, put, rules, scope, shardings
from sharding.layout import is_names
from sharding.names import names, unboxed

few = settings(derandomize=True, deadline=None, max_examples=200)
KEY = jax.random.key(0)
X = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: jax.Array
    bias: jax.Array


class Pair(typing.NamedTuple):
    up: Layer
    down: Layer


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        normal = nn.initializers.lecun_normal()
        up = nn.with_logical_partitioning(normal, ("embed", "mlp"))
        down = nn.with_partitioning(normal, ("mlp", "embed"))
        hidden = nn.gelu(nn.Dense(32, kernel_init=up, name="up")(x))
        return nn.Dense(8, kernel_init=down, name="down")(hidden)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 32, kernel_metadata={"axes": ("embed", "mlp")}, rngs=rngs)
        with nnx.use_eager_sharding(False):  # which would take the names for axes of a mesh
            down = {"out_sharding": ("mlp", "embed")}
            self.down = nnx.Linear(32, 8, kernel_metadata=down, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, deterministic=True, rngs=rngs)
        self.activation = jax.nn.gelu

    def __call__(self, x):
        return self.down(self.dropout(self.activation(self.up(x))))


class Equinox(eqx.Module):
    layers: tuple
    activations: tuple
    rate: float

    def __init__(self, key):
        up, down = jax.random.split(key)
        self.layers = (eqx.nn.Linear(8, 32, key=up), eqx.nn.Linear(32, 8, key=down), ())
        self.activations = (jax.nn.gelu, None)
        self.rate = 0.5

    def __call__(self, x):
        return self.layers[1](self.activations[0](self.layers[0](x)))


# --- four kinds of model --------------------------------------------------------------------------


def bare_function():
    up, down = jax.random.split(KEY)
    params = Pair(
        Layer(jax.random.normal(up, (8, 32)) / 3, jnp.ones(32)),
        Layer(jax.random.normal(down, (32, 8)) / 6, jnp.ones(8)),
    )

    def apply(params, x):
        hidden = jax.nn.gelu(x @ params.up.kernel + params.up.bias)
        return hidden @ params.down.kernel + params.down.bias

    patterns = {"up/kernel": ("embed", "mlp"), "*/kernel": ("mlp", "embed"), "**/bias": None}
    return apply, params, names(params, patterns)


def linen():
    model = Linen()
    params = model.init(KEY, X)
    abstract = jax.eval_shape(model.init, KEY, X)
    return model.apply, params, names(abstract, {"params/*/bias": None})


def linen_unboxed():
    apply, params, axes = linen()
    return apply, nn.unbox(params), unboxed(axes)


def nnx_module():
    net = Net(nnx.Rngs(0))
    return lambda net, x: net(x), net, names(net, {"*/bias": None})


def nnx_state():
    net = Net(nnx.Rngs(0))
    graph, params, rest = nnx.split(net, nnx.Param, ...)
    return lambda p, x: nnx.merge(graph, p, rest)(x), params, names(params, {"*/bias": None})


def equinox():
    params, static = eqx.partition(Equinox(KEY), eqx.is_array)
    patterns = [("layers/0/weight", ("mlp", "embed")), ("**/weight", ("embed", "mlp"))]
    axes = names(params, [*patterns, ("**", None)])
    return lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, axes


MODELS = [bare_function, linen, linen_unboxed, nnx_module, nnx_state, equinox]


@pytest.mark.parametrize("model", MODELS, ids=lambda f: f.__name__)
def test_any_model_runs_cut_and_gives_what_it_gives_on_one_device(model):
    apply, params, axes = model()
    mesh, layout = make_mesh("data=2,fsdp=2,tensor=2"), rules()
    assert paths(axes, is_leaf=is_names) == paths(params)
    where = shardings(axes, params, mesh, layout)
    placed = jax.device_put(params, where)
    cut = [a for a in jax.tree.leaves(placed) if a.ndim and not a.sharding.is_fully_replicated]
    assert {a.sharding.shard_shape(a.shape) for a in cut} == {(4, 16), (16, 4)}

    def loss(params, x):
        y = apply(params, x)
        return jnp.sum(jnp.sin(y)), y

    step = jax.jit(jax.value_and_grad(loss, has_aux=True, allow_int=True))
    (_, expected), slopes = step(params, X)
    with scope(mesh, layout):
        (_, found), cut_slopes = step(placed, put(X, mesh, layout))
    np.testing.assert_allclose(gather(found), expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(cut_slopes), jax.tree.leaves(slopes), strict=True):
        if jnp.issubdtype(b.dtype, jnp.floating):
            np.testing.assert_allclose(gather(a), b, rtol=1e-5, atol=1e-5)


def test_what_is_no_array_becomes_none():
    module = Equinox(KEY)
    axes = names({"model": module, "step": 0, "rate": 0.1, "empty": ((), (None,))}, {"**": None})
    assert axes["model"].activations is None
    assert axes["model"].layers[0].weight == (None, None)
    assert axes["model"].rate == () == axes["step"] == axes["rate"]
    found = eqx.filter(module, eqx.is_array)
    assert paths(names(found, {"**": None}), is_leaf=is_names) == paths(found)
    assert axes["empty"] is None


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return Linen(name="layer")(x), None


def test_flax_names_the_axis_of_scanned_layers():
    scanned = nn.scan(
        Body,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )()
    axes = names(jax.eval_shape(scanned.init, KEY, X, None), {"**/bias": ("layers", None)})
    assert unboxed(axes)["params"]["layer"]["up"] == {
        "kernel": ("layers", "embed", "mlp"),
        "bias": ("layers", None),
    }


# --- patterns -------------------------------------------------------------------------------------


def like_the_shell(pattern, path):
    """Whether a glob of whole segments matches, by recursion: the reference for the regex."""
    if not pattern or not path:
        return not pattern and not path
    head, *rest = pattern
    if head == "**":
        return any(like_the_shell(rest, path[i:]) for i in range(len(path))) if rest else True
    letters = re.escape(head).replace(r"\*", ".*").replace(r"\?", ".")
    return bool(re.fullmatch(letters, path[0])) and like_the_shell(rest, path[1:])


segments = st.sampled_from(["a", "b", "ab", "kernel", "a.b", "0", "10"])
globs = st.sampled_from(["**", "*", "a*", "*b", "?", "?b", "1?", None])
trees = st.lists(st.lists(segments, min_size=1, max_size=4).map(tuple), min_size=2, max_size=8)


@st.composite
def trees_and_patterns(draw):
    """A tree, and patterns made of its own paths with some segments blurred."""
    tree = nested(draw(trees))
    some = draw(st.lists(st.sampled_from(paths(tree)), max_size=4)) if tree else []
    patterns = [[draw(globs) or segment for segment in path.split("/")] for path in some]
    return tree, patterns + [["**"]] * draw(st.booleans())


def nested(keys):
    """A dict with an array at each path; a path through an array is left out."""
    tree = {}
    for path in keys:
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                break
        else:
            if not isinstance(node.get(path[-1]), dict):
                node[path[-1]] = np.zeros(2)
    return tree


@few
@given(trees_and_patterns(), st.booleans())
def test_the_first_pattern_that_matches_wins(case, useful):
    tree, patterns = case
    won, kept, matched = {}, [], []
    for pattern in patterns:
        mine = [path for path in paths(tree) if like_the_shell(pattern, path.split("/"))]
        if useful and not set(mine) - set(won):
            continue
        matched.append(bool(set(mine) - set(won)))
        won |= {path: (f"axis{len(kept)}",) for path in mine if path not in won}
        kept.append(pattern)
    pairs = [("/".join(pattern), (f"axis{i}",)) for i, pattern in enumerate(kept)]
    if all(matched) and len(won) == len(paths(tree)):
        axes = names(tree, pairs)
        leaves = jax.tree.leaves(axes, is_leaf=is_names)
        assert dict(zip(paths(axes, is_names), leaves, strict=True)) == won
    else:
        with pytest.raises(ShardingError) as error:
            names(tree, pairs)
        if not all(matched):
            assert repr(pairs[matched.index(False)][0]) in str(error.value)
        else:
            assert any(str(error.value).startswith(path) for path in set(paths(tree)) - set(won))


def test_braces_and_literal_commas():
    tree = {"query": np.ones(2), "key": np.ones(2), "a,b": np.ones(2), "(x)": np.ones(2)}
    axes = names(tree, {"{query,key}": ("heads",), "a,b": ("mlp",), "(*)": (None,)})
    assert axes == {"query": ("heads",), "key": ("heads",), "a,b": ("mlp",), "(x)": (None,)}


TREE = {"layers": [{"kernel": np.ones((4, 8)), "bias": np.ones(8)}] * 2, "scale": np.float32(1)}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (None, r"layers/0/bias \(and 3 more\): it does not name its axes; give patterns"),
        (
            {"**/kernel": ("embed", "mlp")},
            r"layers/0/bias \(and 1 more\): no pattern matches it.*nearest.*'\*\*/kernel'",
        ),
        ({"**/kernal": ()}, r"'\*\*/kernal' matches no array: the nearest paths are 'layers/./ker"),
        ({"scale": ("embed",)}, "'scale' matches no array"),
        (
            {"layers/**": None, "**/kernel": ("embed", "mlp")},
            r"'\*\*/kernel' is never used: 'layers/\*\*' before it matches all",
        ),
        (
            {"**/kernel": ("embed",), "**": None},
            r"layers/0/kernel \(pattern '\*\*/kernel'\): shape \(4, 8\) has rank 2, but 1 axis",
        ),
        ({"**/bias": "mlp"}, "expected a tuple of axis names.*got 'mlp'"),
        (["**/bias"], "expected pairs"),
        ({"{a,{b,c}}": None}, "braces"),
        ({"a}": None}, "braces"),
    ],
)
def test_refuses(patterns, message):
    with pytest.raises(ShardingError, match=message):
        names(TREE, patterns)


def test_a_scalar_needs_no_pattern_but_may_have_one():
    patterns = {"**/kernel": ("embed", "mlp"), "**/bias": ("mlp",)}
    assert names(TREE, patterns)["scale"] == ()
    assert names(TREE, {**patterns, "scale": ()}) == names(TREE, patterns)
    assert names(TREE, {"**": None})["scale"] == ()


# --- metadata -------------------------------------------------------------------------------------


def test_a_pattern_comes_before_metadata():
    net = Net(nnx.Rngs(0))
    axes = names(net, {"up/kernel": (None, "heads"), "*/bias": (None,)})
    assert axes.up.kernel.get_value() == (None, "heads")
    assert axes.down.kernel.get_value() == ("mlp", "embed")


@pytest.mark.parametrize("key", ["axes", "out_sharding", "sharding_names", "sharding"])
@pytest.mark.parametrize("given", [("embed", None), jax.P("embed", None), ["embed", None]])
def test_every_key_of_metadata(key, given):
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Variable:  # as an older flax may have it
        value: typing.Any

        def get_metadata(self):
            return {"axes": None, key: given}

    assert unboxed(names(Variable(np.ones((2, 3))))) == ("embed", None)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (("embed",), r"^gain: shape \(2, 3\) has rank 2, but 1 axis names: \('embed',\)"),
        (
            (("data", "fsdp"), None),
            "^gain: its metadata 'axes' is .*expected a tuple",
        ),
        ("embed", "^gain: its metadata 'axes' is 'embed'"),
        (None, "^gain: it does not name its axes; give patterns"),
    ],
)
def test_refuses_metadata(axes, message):
    with pytest.raises(ShardingError, match=message):
        names({"gain": nnx.Param(jnp.ones((2, 3)), axes=axes)})


def test_an_array_made_of_arrays_is_named_by_part():
    variable = nnx.Param({"int8": jnp.ones((4, 2), jnp.int8), "scale": jnp.ones(2)})
    tree = {"dense": {"kernel": variable}}
    axes = names(tree, {"**/kernel/int8": ("embed", "mlp"), "dense/kernel/scale": ("mlp",)})
    assert axes["dense"]["kernel"].get_value() == {"int8": ("embed", "mlp"), "scale": ("mlp",)}


def test_unboxed_keeps_every_leaf():
    params = Linen().init(KEY, X)
    assert paths(unboxed(params)) == paths(nn.unbox(params))
    jax.tree.map(np.testing.assert_array_equal, unboxed(params), nn.unbox(params))
    state = nnx.state(Net(nnx.Rngs(0)), nnx.Param)
    assert paths(unboxed(state)) == paths(nnx.to_pure_dict(state))
