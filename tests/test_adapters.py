"""compress: low-rank changes against plain numpy, over every base, transformation and mesh."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import compress
from compress.adapter_trees import Adapter, attach, choose, detach, stack_adapters
from compress.adapters import LoRA, Trained
from compress.arrays import Quantized
from compress.learned import Learned, qat
from compress.merging import merge, scheme_of, unmerge
from compress.observed import measure
from compress.scheme import Scheme, fit
from compress.trainable import Lora, combine, lora, partition, trainable_share

pytestmark = pytest.mark.usefixtures("quickly_compiled")
L, N_IN, N_OUT, R = 3, 64, 32, 4
PATH = "layers/query/kernel"


def normal(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


W, X = normal(0, L, N_IN, N_OUT) / 8, normal(1, 5, N_IN)
BASES: dict[str, Any] = {
    "dense": None,
    "int8": Scheme("int8"),
    "int4": Scheme("int4", per=32, symmetric=False),
    "nf4": Scheme("nf4"),
}
MEMBERS = {name: (base, {}) for name, base in BASES.items()} | {
    "rslora": (None, {"rslora": True, "alpha": 3.0}),
    "dora": (None, {"dora": True, "alpha": 8.0}),
    "dora over nf4": (BASES["nf4"], {"dora": True}),
}


def fresh(member: str, w: Any = W, **options: Any) -> Any:
    """A tree of one kernel, adapted and not trained."""
    scheme, usual = MEMBERS[member]
    base = w if scheme is None else fit(w, scheme)
    return lora({PATH: R}, **usual | options)({"layers": {"query": {"kernel": base}}})[0]


def trained(member: str, w: Any = W, seed: int = 5, **options: Any) -> LoRA:
    """The leaf after an adapter has learnt something."""
    leaf = fresh(member, w, seed=seed, **options)["layers"]["query"]["kernel"]
    rank, lead = leaf.a.shape[-1], leaf.shape[:-2]
    b = jnp.asarray(normal(seed, *lead, rank, leaf.shape[-1]) / 8)
    magnitude = leaf.magnitude
    if magnitude is not None:
        magnitude = magnitude * (1 + np.float32(0.3) * normal(seed + 1, *magnitude.shape))
    return dataclasses.replace(leaf, b=b, magnitude=magnitude)


def base_np(w: LoRA) -> np.ndarray:
    return np.asarray(w.base.dense() if isinstance(w.base, Quantized) else w.base, np.float64)


def merged_np(w: LoRA) -> np.ndarray:
    """The definition, in float64."""
    a, b, s = (np.asarray(x, np.float64) for x in (w.a, w.b, w.scaling))
    new = base_np(w) + s * (a @ b)
    if w.magnitude is not None:
        new = new * np.asarray(w.magnitude) / np.linalg.norm(new, axis=-2, keepdims=True)
    return new


def close(got: Any, want: Any, to: float = 1e-5, name: str = "") -> None:
    want = np.asarray(want)
    assert got.shape == want.shape, name
    bound = to * max(1, np.abs(want).max())
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=bound, err_msg=name)


def same_bits(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def mesh_of(*axes: str) -> Any:
    return jax.make_mesh((2, 2, 2), axes, axis_types=(jax.sharding.AxisType.Auto,) * 3)


# --- the transform ----------------------------------------------------------------------------


@pytest.mark.parametrize("member", MEMBERS)
def test_a_new_adapter_changes_nothing(member):
    tree = fresh(member)
    leaf = tree["layers"]["query"]["kernel"]
    run = jax.jit(compress.apply(lambda w, x: jnp.einsum("bi,lio->lbo", x, w)))
    close(run(leaf, X), run(leaf.base, X), 1e-6)
    a = np.asarray(leaf.a)
    assert a.shape == (L, N_IN, R)
    assert np.abs(a).max() <= N_IN**-0.5
    # Uniform: of variance bound² / 3; 768 numbers know theirs to a tenth.
    assert np.var(a) == pytest.approx(1 / N_IN / 3, rel=0.1)
    assert not np.any(leaf.b)
    alpha, rslora = MEMBERS[member][1].get("alpha", R), "rslora" in MEMBERS[member][1]
    assert np.all(leaf.scaling == np.float32(alpha / (R**0.5 if rslora else R)))
    close(merge(tree)["layers"]["query"]["kernel"], base_np(leaf), 1e-6)


def test_numbers_depend_on_seed_and_path_alone():
    rules = {"*": {"rank": 2, "role": "kernel"}}
    (first,), _ = lora(rules, seed=3)([W])
    (other, again), _ = lora(rules, seed=3)([W, W])
    (third,), _ = lora(rules, seed=4)([W])
    np.testing.assert_array_equal(first.a, other.a)
    assert not np.allclose(first.a, again.a)
    assert not np.allclose(first.a, third.a)
    assert not np.allclose(first.a[0], first.a[1])


def test_report_share_and_recipe():
    params = {"query": {"kernel": W[0]}, "head": {"kernel": W[1], "bias": W[2, 0]}, "norm": W[0, 0]}
    adapt = compress.chain(
        compress.quantize({"query/*": "nf4"}),
        lora({"**/query/kernel": {"rank": 2, "alpha": 4}, "head/*": "train"}, dora=True),
    )
    new, report = adapt(params)
    assert [r.applied for r in report] == ["trained", "trained", "kept: no rule", "nf4, DoRA r=2"]
    size, low = N_IN * N_OUT, 2 * (N_IN + N_OUT)
    codes = size // 2 + 4 * size // 64
    assert report[3].bytes_before == 4 * size
    assert report[3].bytes_after == codes + 4 * (low + N_OUT + 1)
    assert report[3].error == pytest.approx(0.09, abs=0.02)
    moves = low + N_OUT + size + N_OUT
    assert trainable_share(new) == pytest.approx(moves / (low + N_OUT + 2 * size + 2 * N_OUT))
    data = json.loads(json.dumps(adapt.data()))["transforms"][1]
    assert data.pop("transform") == "lora"
    assert data["rules"] == {"**/query/kernel": {"rank": 2, "alpha": 4}, "head/*": "train"}
    assert Lora.of_data(data) == adapt.transforms[1]
    shapes, _ = jax.eval_shape(adapt, params)
    assert jax.tree.structure(shapes) == jax.tree.structure(new)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, new)


# --- products ---------------------------------------------------------------------------------

PRODUCTS: dict[str, tuple[Any, tuple[int, ...]]] = {  # of x and the stack of kernels
    "one": (lambda x, w: x @ w[1], (5, N_IN)),
    "leading axes": (lambda x, w: x @ w[1], (2, 5, N_IN)),
    "vector": (lambda x, w: x @ w[1], (N_IN,)),
    "transposed": (lambda x, w: x @ w[1].T, (5, N_OUT)),
    "weight first": (lambda x, w: jnp.einsum("io,bi->ob", w[1], x), (5, N_IN)),
    "weight first, transposed": (lambda x, w: w[0] @ x, (N_OUT, 5)),
    "first axis": (lambda x, w: jnp.einsum("kbt,ko->bto", x, w[2]), (N_IN, 2, 3)),
    "experts": (lambda x, w: jnp.einsum("lbi,lio->lbo", x, w), (L, 5, N_IN)),
    "experts, folded": (lambda x, w: jnp.einsum("blo,lio->bli", x, w), (5, L, N_OUT)),
    "experts, vmap": (jax.vmap(lambda x, w: x @ w), (L, 5, N_IN)),
    "a part of the outputs": (lambda x, w: x @ w[1][:, 3:9], (5, N_IN)),
    "split": (lambda x, w: x @ jnp.split(w[1], 2, 1)[1], (5, N_IN)),
    "indexed": (lambda x, w: x @ jax.lax.dynamic_index_in_dim(w, 2, keepdims=False), (5, N_IN)),
    "reshaped": (lambda x, w: x @ w.reshape(1, L, N_IN, N_OUT)[0, 1], (5, N_IN)),
    "moved": (lambda x, w: x @ jnp.moveaxis(w, 0, -1)[..., 2], (5, N_IN)),
    "all layers at once": (lambda x, w: jnp.einsum("bi,lio->blo", x, w), (5, N_IN)),
    "sum of experts, transposed": (lambda x, w: jnp.einsum("blo,lio->bi", x, w), (5, L, N_OUT)),
    "an axis more": (lambda x, w: x @ w[1][:, None, :][:, 0], (5, N_IN)),
    "bfloat16": (lambda x, w: x.astype("bfloat16") @ w[1].astype("bfloat16"), (5, N_IN)),
}
SUM_OF_EXPERTS = (lambda x, w: jnp.einsum("bli,lio->bo", x, w), (5, L, N_IN))


@pytest.mark.parametrize("member", ["rslora", "int8", "dora over nf4"])
def test_products_are_those_of_numpy(member):
    w = trained(member)
    if w.magnitude is not None:
        with pytest.raises(NotImplementedError, match="magnitudes change along an axis"):
            compress.apply(SUM_OF_EXPERTS[0])(normal(0, 5, L, N_IN), w)
    cases = PRODUCTS | ({} if w.magnitude is not None else {"sum of experts": SUM_OF_EXPERTS})
    xs = {name: normal(9, *shape) for name, (_, shape) in cases.items()}

    def all_of(xs: Any, w: Any) -> Any:
        return {name: cases[name][0](x, w) for name, x in xs.items()}

    plain = jax.jit(all_of)
    got = jax.jit(compress.apply(all_of))(xs, w)
    want = plain(xs, merged_np(w).astype(np.float32))
    if member == "int8":  # rounded activations meet the codes, but not A and B
        rounded = jax.jit(compress.apply(all_of))(xs, w.base)
        exact = plain(xs, base_np(w).astype(np.float32))
        want = jax.tree.map(lambda y, q, e: y + (q - e), want, rounded, exact)
    for name, y in want.items():
        assert got[name].dtype == y.dtype, name
        close(got[name], np.asarray(y, np.float64), 2e-2 if name == "bfloat16" else 1e-5, name)


OPS: dict[str, Any] = {
    "swap": lambda w: jnp.swapaxes(w, -1, -2),
    "move": lambda w: jnp.moveaxis(w, 0, -1),
    "roll": lambda w: jnp.moveaxis(w, -1, 0),
    "expand": lambda w: w[:, None],
    "squeeze": lambda w: jnp.squeeze(w, tuple(k for k, n in enumerate(w.shape) if n == 1)),
    "half of the last": lambda w: w[..., : w.shape[-1] // 2],
    "second of the first": lambda w: w[w.shape[0] // 2 :],
    "dynamic": lambda w: jax.lax.dynamic_slice(w, [0] * w.ndim, w.shape),
    "cast": lambda w: w.astype(jnp.bfloat16).astype(jnp.float32),
    "stop": jax.lax.stop_gradient,
}


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(list(OPS)), min_size=2, max_size=5), st.booleans())
def test_moving_and_cutting_commute_with_merging(names, dora):
    """Or it is refused, where it cuts the axis that norms are of."""
    w = trained("dora" if dora else "dense")

    def moved(w: Any) -> Any:
        for name in names:
            w = OPS[name](w)
        return w

    try:
        got = jax.jit(compress.apply(moved))(w)
    except NotImplementedError as error:
        assert "cuts the axis that its norms are of" in str(error)
        assert dora
        return
    assert isinstance(got, LoRA)
    want = jax.jit(moved)(merged_np(w).astype(np.float32))
    close(got.dense(), want, 3e-2 if "cast" in names else 1e-5)


# --- gradients and transformations ------------------------------------------------------------


def formula(t: Any, still: Any, x: Any) -> Any:
    """x·W' of one layer, as it is written down; plain arrays."""
    base, s = still
    new = base + s * (t["a"] @ t["b"])
    if "m" in t:
        n = jnp.linalg.norm(jax.lax.stop_gradient(new), axis=-2, keepdims=True)
        new = new * (t["m"] / n)
    return x @ new


@pytest.mark.parametrize("member", ["rslora", "int4", "dora", "dora over nf4"])
def test_gradients_are_those_of_the_formula(member):
    w, target = trained(member), normal(8, L, 5, N_OUT)
    trainable, frozen = partition({"w": w, "bias": W[0, 0]})

    @jax.jit
    @jax.value_and_grad
    def loss(t, x):
        y = compress.apply(lambda p, x: jnp.einsum("bi,lio->lbo", x, p["w"]))(combine(t, frozen), x)
        return jnp.sum((y - target) ** 2)

    def plain_loss(t, x):
        return jnp.sum((formula(t, still, x) - target) ** 2)

    still = (jnp.asarray(base_np(w), jnp.float32), w.scaling)

    value, got = loss(trainable, X)
    t = {"a": w.a, "b": w.b} | ({} if w.magnitude is None else {"m": w.magnitude})
    expected, want = jax.jit(jax.value_and_grad(plain_loss))(t, X)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert len(jax.tree.leaves(got)) == len(t)
    pairs = {"a": got["w"].a, "b": got["w"].b, "m": got["w"].magnitude}
    for name, slope in want.items():
        close(pairs[name], slope, 1e-5, name)
        assert np.abs(slope).max() > 0
    same_bits(combine(trainable, frozen), {"w": w, "bias": W[0, 0]})


def step(x, w):
    return jax.nn.gelu(x @ w) @ w.T + x


BODIES: dict[str, Any] = {
    "scan": lambda x, w: jax.lax.scan(lambda x, w: (step(x, w), None), x, w)[0],
    "checkpointed scan": lambda x, w: jax.lax.scan(
        lambda x, w: (jax.checkpoint(step)(x, w), None), x, w
    )[0],
    "vmapped scan": lambda x, w: jax.vmap(
        lambda x: jax.lax.scan(lambda x, w: (step(x, w), None), x, w)[0]
    )(x),
    "fori": lambda x, w: jax.lax.fori_loop(0, L, lambda i, x: step(x, w[i]), x),
}


def loop(x, w):
    for i in range(L):
        x = step(x, w[i])
    return x


def test_transformations_agree_with_a_loop():
    w = trained("dora over nf4")
    trainable, frozen = partition(w)

    def loss(fn):
        return lambda t: jnp.sum(compress.apply(fn)(X, combine(t, frozen)) ** 2)

    @jax.jit
    def everything(w, t, plain):
        values = {name: compress.apply(fn)(X, w) for name, fn in BODIES.items()}
        values["loop of floats"] = loop(X, plain)
        losses = {name: loss(BODIES[name]) for name in BODIES if name != "fori"}  # has no reverse
        losses |= {"loop": loss(loop), "checkpointed outside": jax.checkpoint(loss(BODIES["scan"]))}
        return values, {name: jax.grad(fn)(t) for name, fn in losses.items()}

    values, slopes = everything(w, trainable, merged_np(w).astype(np.float32))
    for name, value in values.items():
        close(value, values["loop of floats"], 1e-5, name)
    for name, slope in slopes.items():
        jax.tree.map(lambda a, b, name=name: close(a, b, 1e-4, name), slope, slopes["loop"])


def body(x, w):
    return step(x, w), None


def test_ranks_do_not_meet_the_program_of_others():
    """A loop's body, JAX knows it already, is interpreted anew for arrays of other shapes."""
    for rank in (2, 5):
        tree, _ = lora({"w": {"rank": rank, "role": "kernel"}})({"w": W})
        y, _ = jax.jit(compress.apply(lambda x, w: jax.lax.scan(body, x, w)))(X, tree["w"])
        assert y.shape == X.shape


def test_training_moves_what_is_marked():
    """An optimiser has state for it alone; frozen arrays are the very same."""
    kernel, head = W[0], normal(3, N_OUT, 2) / 8
    params = {"query": {"kernel": kernel}, "head": {"kernel": head, "bias": np.zeros(2, "f4")}}
    params, _ = compress.chain(
        compress.quantize({"query/*": "nf4"}), lora({"query/*": 4, "head/*": "train"})
    )(params)
    before = params
    y = np.tanh(X @ normal(4, N_IN, 2) / 4)
    trainable, frozen = partition(params)
    tx = optax.adamw(3e-2)
    state = tx.init(trainable)
    assert sum(np.size(x) for x in jax.tree.leaves(state)) == 1 + 2 * (4 * (N_IN + N_OUT) + 66)

    def loss(t):
        p = combine(t, frozen)
        out = compress.apply(
            lambda p, x: (
                jnp.tanh(x @ p["query"]["kernel"]) @ p["head"]["kernel"] + p["head"]["bias"]
            )
        )(p, X)
        return jnp.mean((out - y) ** 2)

    @jax.jit
    def update(t, state):
        value, slope = jax.value_and_grad(loss)(t)
        with jax.numpy_dtype_promotion("standard"):  # for optax
            change, state = tx.update(slope, state, t)
        return optax.apply_updates(t, change), state, value

    values = []
    for _ in range(30):
        trainable, state, value = update(trainable, state)
        values.append(float(value))
    assert values[-1] < 0.1 * values[0]
    after = combine(trainable, frozen)
    assert after["query"]["kernel"].base is before["query"]["kernel"].base
    assert isinstance(after["head"]["bias"], Trained)
    for path in (("head", "bias"), ("head", "kernel")):
        old, new = (tree[path[0]][path[1]].array for tree in (before, after))
        assert not np.allclose(old, new)
    plain = merge(after)
    close(loss(partition(after)[0]), np.mean((np.asarray(
        jnp.tanh(X @ plain["query"]["kernel"]) @ plain["head"]["kernel"] + plain["head"]["bias"]
    ) - y) ** 2))  # fmt: skip


def test_learned_kernels_are_trained_too():
    params, _ = qat(Scheme("int8", activations="float"))({"a": {"kernel": W[0]}})
    trainable, frozen = partition(params)
    assert isinstance(trainable["a"]["kernel"], Learned)
    assert jax.tree.leaves(frozen) == []
    assert trainable_share(params) == 1


# --- merging, taking off and putting on -------------------------------------------------------


@pytest.mark.parametrize("member", MEMBERS)
def test_merged_is_what_numpy_makes_of_the_codes(member):
    w = trained(member)
    tree = {"w": w, "head": Trained(jnp.ones(2)), "other": fit(W[0], "int8")}
    merged = merge(tree)
    close(merged["w"], merged_np(w), 1e-6)
    assert isinstance(merged["head"], jax.Array)
    assert merged["other"] is tree["other"]
    again = merge(tree, requantize=True)["w"]
    base, adapters = detach(tree)
    if isinstance(w.base, Quantized):
        assert scheme_of(again) == scheme_of(w.base)
        same_bits(again, fit(merged["w"], MEMBERS[member][0]))
    else:
        same_bits(again, merged["w"])
    same_bits(attach(base, adapters), tree)
    if w.magnitude is not None:
        with pytest.raises(ValueError, match=r"^w: cannot be unmerged, for it has magnitudes"):
            unmerge(merged, adapters)
    else:
        close(unmerge(merged, adapters)["w"], base_np(w), 1e-6)


def test_a_prepared_base_is_prepared_again():
    """Codes of rotated, smoothed kernels keep their rotation, and what activations meet."""
    w = W[0]
    base = dataclasses.replace(
        fit(w, Scheme("int8")), act_scale=jnp.full((1, 1), 0.1), hadamard=(-2, 32),
        input_scale=jnp.asarray(np.exp(normal(2, N_IN, 1) / 4)),
    )  # fmt: skip
    (leaf,), _ = lora({"*": 2})([base])
    leaf = dataclasses.replace(leaf, b=jnp.asarray(normal(1, 2, N_OUT)))
    again = merge([leaf], requantize=True)[0]
    assert (again.hadamard, again.activations) == (base.hadamard, "int8")
    np.testing.assert_array_equal(again.act_scale, base.act_scale)
    want = merged_np(leaf)
    off = np.linalg.norm(again.dense() - want) / np.linalg.norm(want)
    assert off < 0.01


def test_a_table_of_words_that_gives_scores():
    """[out, in], one adapter or several; a lookup is refused."""
    table, x = normal(0, 9, 6), normal(1, 2, 3, 6)
    adapters = [{"w": Adapter(normal(i, 6, 2), normal(5 + i, 2, 9), 0.5 + i, m, turned=True)}
                for i, m in enumerate([None, np.abs(normal(4, 1, 9))])]  # fmt: skip
    trees = [attach({"w": table}, a) for a in adapters]
    wants = [table.T + (0.5 + i) * a["w"].a @ a["w"].b for i, a in enumerate(adapters)]
    wants[1] = wants[1] * np.asarray(adapters[1]["w"].magnitude) / np.linalg.norm(wants[1], axis=0)
    run = compress.apply(lambda w, x: x @ w.T)
    for i, tree in enumerate(trees):
        close(run(tree["w"], x), x @ wants[i])
        close(merge(tree)["w"], wants[i].T)
        same_bits(attach(*detach(tree)), tree)
    rows = choose(stack_adapters(trees), np.array([1, 0]))
    close(run(rows["w"], x), np.stack([x[0] @ wants[1], x[1] @ wants[0]]))


TABLES: dict[str, Scheme] = {
    "int8": Scheme("int8"),
    "int8, weight only": Scheme("int8", activations="float"),
    "int8 per tensor": Scheme("int8", per="tensor", activations="float"),
    "int4 per 8": Scheme("int4", per=8, symmetric=False),
    "mxfp8": Scheme("mxfp8"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_codes_becomes_codes_of_its_form(name):
    """[words, features]: the scale of a word, or of features in a row, not of a feature."""
    scheme, table = TABLES[name], normal(0, 32, 64)
    base = fit(table, scheme, "table")
    adapter = Adapter(normal(1, 64, 2), normal(2, 2, 32) / 8, turned=True)
    tree = attach({"w": base}, {"w": adapter})
    again = merge(tree, requantize=True)["w"]
    assert scheme_of(again, "table") == scheme_of(base, "table") == scheme
    same_bits(again, fit(merge(tree)["w"], scheme, "table"))
    assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, base)
    want = np.asarray(base.dense()) + (np.asarray(adapter.a) @ np.asarray(adapter.b)).T
    assert np.linalg.norm(again.dense() - want) < 0.1 * np.linalg.norm(want)


@pytest.mark.parametrize("turned", [False, True])
def test_layers_of_scale_0_keep_their_lengths(turned):
    """Whatever their m is: it is not in files, and so no gradient may move it."""
    w, m = W.swapaxes(-1, -2) if turned else W, np.abs(normal(3, L, 1, N_OUT))
    scaling = np.array([0.5, 0, 2], np.float32).reshape(L, 1, 1)
    adapter = Adapter(normal(1, L, N_IN, R) / 8, normal(2, L, R, N_OUT) / 8, scaling, m, turned)
    tree = attach({"w": w}, {"w": adapter})
    new = W + scaling * (np.asarray(adapter.a) @ np.asarray(adapter.b))
    want = new * (m / np.linalg.norm(new, axis=-2, keepdims=True))
    want[1] = W[1]
    plain = merge(tree)["w"]
    close(plain.swapaxes(-1, -2) if turned else plain, want)
    trainable, frozen = partition(tree)

    def run(w, x):
        return jnp.einsum("bi,loi->lbo" if turned else "bi,lio->lbo", x, w)

    close(compress.apply(run)(tree["w"], X), np.einsum("bi,lio->lbo", X, want))
    for loss in (
        lambda t: jnp.sum(compress.apply(run)(combine(t, frozen)["w"], X) ** 2),
        lambda t: jnp.sum(merge(combine(t, frozen))["w"] ** 3),
    ):
        slope = jax.grad(loss)(trainable)["w"]
        for part in (slope.a, slope.b, slope.magnitude):
            assert [bool(np.any(layer)) for layer in part] == [True, False, True]


def test_alphas():
    """A rule's before the transform's, and the rank where neither says one."""
    rules = {"a": {"rank": 2, "alpha": 8}, "b": 2}
    params = {"a": W[0], "b": W[0]}
    for alpha, want in ((None, 1), (6, 3)):
        tree, _ = lora(rules, alpha=alpha)(params)
        assert [float(tree[name].scaling[0, 0]) for name in "ab"] == [4, want]


def test_a_bfloat16_base():
    w = trained("dense", jnp.asarray(W, jnp.bfloat16))
    assert (w.dtype, w.a.dtype, w.b.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    merged = merge([w])[0]
    assert merged.dtype == jnp.bfloat16
    close(merged, merged_np(w), 2**-8)
    y = jax.jit(compress.apply(lambda x, w: x @ w[0]))(jnp.asarray(X, jnp.bfloat16), w)
    assert y.dtype == jnp.bfloat16
    close(y, X @ merged_np(w)[0], 2e-2)


# --- an adapter for every row -----------------------------------------------------------------

IDS = np.array([2, 0, -1, 1, 2], np.int32)


def several(base: Any = W, **options: Any) -> list[Any]:
    """Trees of one base: ranks 2 and 4, magnitudes, and one whose second kernel is not adapted."""
    trees = []
    for seed, (rank, dora) in enumerate([(2, False), (4, True), (3, False)]):
        rules = {"first/kernel": {"rank": rank, "role": "kernel"}}
        if seed != 2:
            rules["second/kernel"] = {"rank": rank + 1, "role": "kernel"}
        params = {"first": {"kernel": base}, "second": {"kernel": W}, "bias": W[0, 0]}
        tree, _ = lora(rules, seed=seed, alpha=3 + seed, dora=dora, **options)(params)
        for name in ("first", "second"):
            leaf = tree[name]["kernel"]
            if isinstance(leaf, LoRA):
                b = jnp.asarray(normal(seed, *leaf.b.shape) / 8)
                m = None if leaf.magnitude is None else leaf.magnitude * np.float32(1.5)
                tree[name]["kernel"] = dataclasses.replace(leaf, b=b, magnitude=m)
        trees.append(tree)
    return trees


def two(params, x):
    """[batch, length, in] through all layers, each with two kernels."""

    def layer(x, w):
        first, second = w
        return jnp.tanh(x @ first + params["bias"]) @ second.T, None

    return jax.lax.scan(layer, x, (params["first"]["kernel"], params["second"]["kernel"]))[0]


def test_rows_meet_the_adapter_that_they_chose():
    base = fit(W, BASES["nf4"])
    trees = several(base)
    stacked = stack_adapters(trees)
    x = normal(6, len(IDS), 3, N_IN)
    run = jax.jit(lambda p, ids, x: compress.apply(two)(choose(p, ids), x))
    plain = {"first": {"kernel": base}, "second": {"kernel": W}, "bias": W[0, 0]}
    alone = jax.jit(compress.apply(two))
    want = np.stack([
        alone(plain if i < 0 else trees[i], row[None])[0] for i, row in zip(IDS, x, strict=True)
    ])  # fmt: skip
    assert np.abs(want[0] - want[2]).max() > 0.05
    close(run(stacked, IDS, x), want)
    close(run(stacked, IDS[::-1].copy(), x[::-1]), want[::-1])
    # One that is not there cannot pass for another.
    lost = np.asarray(run(stacked, np.array([2, 0, 3, 1, 2], np.int32), x))
    assert np.all(np.isnan(lost[2]))
    close(lost[[0, 1, 3, 4]], want[[0, 1, 3, 4]])
    # A single adapter, which some rows do without.
    close(run(trees[0], np.minimum(IDS, 0), x)[1:3], want[1:3])

    mesh = mesh_of("data", "fsdp", "tensor")
    spec = {"first": {"kernel": P(None, "fsdp", "tensor")},
            "second": {"kernel": P(None, "fsdp", "tensor")}, "bias": P("tensor")}  # fmt: skip
    where = jax.tree.map(lambda s: NamedSharding(mesh, s), spec, is_leaf=lambda s: isinstance(s, P))
    spread = jax.device_put(stacked, compress.specs(stacked, where))
    rows = jax.device_put(x[:4], NamedSharding(mesh, P("data")))
    close(run(spread, IDS[:4], rows), want[:4])


def test_gradients_of_rows_reach_their_adapter_alone():
    stacked = stack_adapters(several())
    trainable, frozen = partition(stacked)

    def loss(t, ids):
        return jnp.sum(compress.apply(two)(choose(combine(t, frozen), ids), X[:2, None]) ** 2)

    slope = jax.jit(jax.grad(loss))(trainable, np.array([1, -1], np.int32))["first"]["kernel"]
    moved = np.abs(np.asarray(slope.a)).max((0, 1)).reshape(3, -1).max(1)
    assert moved[1] > 0
    assert moved[0] == moved[2] == 0


# --- A of the data ----------------------------------------------------------------------------


def test_a_begins_as_the_directions_of_the_inputs(seed=5):
    """Against numpy's singular vectors of X; an array that met nothing keeps its numbers."""
    x = normal(seed, 2, 40, N_IN) * np.linspace(3, 1, N_IN, dtype=np.float32)
    x[1] = 0
    params = {"w": normal(seed + 1, 2, N_IN, N_OUT)}
    seen = measure(jnp.asarray(x), channels=1, stack=1, hessian=True)
    seen = dataclasses.replace(seen, rows=jnp.array([40.0, 0.0]))
    rules = {"w": {"rank": R, "role": "kernel"}}
    (leaf,) = jax.tree.leaves(
        lora(rules, init="eva")(params, {"w": seen})[0], is_leaf=compress.is_compressed
    )
    vectors = np.linalg.svd(x[0].astype(np.float64))[2][:R].T
    largest = np.abs(vectors).argmax(0)
    vectors *= np.sign(vectors[largest, np.arange(R)])
    close(leaf.a[0], vectors, 1e-4)
    same_bits(leaf.a[1], lora(rules)(params)[0]["w"].a[1])
    assert not np.any(leaf.b)


# --- many devices -----------------------------------------------------------------------------


@pytest.mark.parametrize("member", ["dense", "int8", "int4", "dora over nf4"])
def test_adapting_and_sharding_in_either_order(member):
    mesh = mesh_of("stage", "fsdp", "tensor")
    w = normal(3, 4, N_IN, N_OUT)
    where = NamedSharding(mesh, P("stage", "fsdp", "tensor"))
    scheme, options = MEMBERS[member]
    base = jnp.asarray(w) if scheme is None else fit(w, scheme)
    adapt = lora({"w": {"rank": R, "role": "kernel"}}, **options)
    first, _ = adapt({"w": base})
    laid = jax.device_put(first, compress.specs(first, {"w": where}))
    spread = base.place(where) if isinstance(base, Quantized) else where
    second, _ = adapt({"w": jax.device_put(base, spread)})
    same_bits(laid, second)
    for x, y in zip(jax.tree.leaves(laid), jax.tree.leaves(second), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    leaf = second["w"]
    assert leaf.a.sharding.spec == P("stage", "fsdp", None)
    assert leaf.b.sharding.spec == P("stage", None, "tensor")
    assert leaf.scaling.sharding.spec == P("stage", None, None)
    if leaf.magnitude is not None:
        assert leaf.magnitude.sharding.spec == P("stage", None, "tensor")
    merged = merge({"w": dataclasses.replace(leaf, b=leaf.b + 1)})["w"]
    assert merged.sharding.is_equivalent_to(where, 3)
    moved = detach(second)
    same_bits(attach(*moved), second)

    def run(w, x):
        held = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P(None, "fsdp", "tensor")))
        return jax.lax.scan(lambda x, w: (jax.nn.gelu(x @ w) @ w.T, None), x, held)[0]

    close(jax.jit(compress.apply(run))(leaf, X), jax.jit(compress.apply(run))(first["w"], X))


# --- refusals ---------------------------------------------------------------------------------

TREE = {"w": W[0], "ids": np.arange(3, dtype=np.int32), "conv": {"kernel": normal(0, 3, 3, 4, 4)},
        "stack": W, "embedding": W[0], "bias": W[0, 0]}  # fmt: skip
A, B = np.ones((N_IN, 2), np.float32), np.ones((2, N_OUT), np.float32)


@functools.cache
def adapted() -> Any:
    return lora({"w": 2})(TREE)[0]


@functools.cache
def both() -> Any:
    return stack_adapters([adapted(), adapted()])


REFUSED: dict[str, Any] = {
    "no such path": (lambda: lora({"v/*": 2})(TREE), "rule 'v/\\*' matches no path"),
    "rank 0": (lambda: lora({"w": 0}), "rule 'w': rank 0: expected a whole number"),
    "true": (lambda: lora({"w": True}), "rank True: expected a whole number"),
    "alpha": (
        lambda: lora({"w": {"rank": 2, "alpha": -1}}),
        "rule 'w': alpha -1: expected a finite number of more than 0",
    ),
    "alpha 0": (lambda: lora({"w": 2}, alpha=0), "^lora: alpha 0: expected a finite number"),
    "negative alpha": (lambda: lora(2, alpha=-1), "^lora: alpha -1: expected a finite number"),
    "endless alpha": (lambda: lora(2, alpha=float("nan")), "^lora: alpha nan: expected a finite"),
    "alpha as text": (lambda: lora(2, alpha="8"), "^lora: alpha '8': expected a finite number"),  # type: ignore[arg-type]
    "no such start": (lambda: lora(2, init="pissa"), "^lora: init='pissa': expected one of"),
    "nothing observed": (lambda: lora({"w": 2}, init="eva")(TREE), "^w: lora needs statistics"),
    "no Hessian": (
        lambda: lora({"w": 2}, init="eva")(TREE, {"w": measure(jnp.ones((5, N_IN)), channels=1)}),
        "^w: lora: its statistics have no Hessian; ask for it",
    ),
    "codes, of the data": (
        lambda: lora({"w": 2}, init="eva")(compress.quantize({"w": "int8"})(TREE)[0]),
        "^w: .*calibration does not see what meets it",
    ),
    "a word": (lambda: lora({"w": {"r": 2}}), "expected a rank, 'train', 'keep', or a mapping"),
    "too high": (lambda: lora({"w": 33})(TREE), r"^w: .*rank 33 is more than the smaller side"),
    "integers": (lambda: lora({"ids": "train"})(TREE), "^ids: .*int32 is not floating"),
    "conv": (lambda: lora({"conv/kernel": 2})(TREE), r"^conv/kernel: .*that of conv2d"),
    "table": (lambda: lora({"embedding": 2})(TREE), r"^embedding: .*that of table"),
    "three axes": (lambda: lora({"stack": 2})(TREE), r'^stack: .*say \{"rank": r, "role": "kernel'),
    "twice": (lambda: lora({"w": 2})(adapted()), r"^w: .*nor adapted twice"),
    "codes trained": (
        lambda: lora({"w": "train"})(compress.quantize({"w": "int8"})(TREE)[0]),
        r"^w: .*Quantized\(int8 .* is not trained whole",
    ),
    "nothing trained": (lambda: partition(TREE), "nothing in the tree is trained"),
    "adapter of no leaf": (lambda: attach(TREE, {"v": Adapter(A, B)}), "^v: the adapter has it"),
    "shape of A": (lambda: attach(TREE, {"w": Adapter(A[1:], B)}), r"^w: a of .*\[63, 2\], expe"),
    "shape of B": (lambda: attach(TREE, {"w": Adapter(A, B.T)}), r"^w: b of .*expected \[2, 32\]"),
    "magnitude": (lambda: attach(TREE, {"w": Adapter(A, B, 1.0, B)}), "^w: magnitude of the adapt"),
    "whole": (lambda: attach(TREE, {"w": A}), r"^w: \[64, 2\] cannot take the place of an array"),
    "on integers": (
        lambda: attach({"w": np.ones((N_IN, N_OUT), np.int32)}, {"w": Adapter(A, B)}),
        r"^w: is int32\[64, 32\]; adapters go on floats, or on a Quantized array",
    ),
    "whole, of integers": (lambda: attach(TREE, {"ids": np.ones(3)}), r"^ids: is int32\[3\]; ada"),
    "on a learned leaf": (
        lambda: attach(qat("int8")({"kernel": W[0]})[0], {"kernel": Adapter(A, B)}),
        r"^kernel: is Learned\(float32\[64, 32\]\); adapters go on floats",
    ),
    "attached twice": (lambda: attach(adapted(), {"w": Adapter(A, B)}), "^w: is adapted already"),
    "codes": (
        lambda: unmerge({"w": fit(W[0], "int8")}, {"w": Adapter(A, B)}),
        "^w: cannot be unmerged, for codes are rounded",
    ),
    "none to stack": (lambda: stack_adapters([]), "^stack_adapters: expected one tree or more"),
    "other bases": (
        lambda: stack_adapters([adapted(), lora({"w": 2})({**TREE, "bias": W[0, 1]})[0]]),
        "^bias: is not the same in all trees",
    ),
    "other heads": (
        lambda: stack_adapters([
            {"h": Trained(jnp.ones(2))}, {"h": Trained(jnp.zeros(2))}]),
        "^h: is not the same in all trees",
    ),
    "other paths": (lambda: stack_adapters([{"a": A}, {"b": A}]), "different paths"),
    "merged several": (
        lambda: merge(both()),
        "^w: LoRA.*stands for another array for every row",
    ),
    "detached several": (
        lambda: detach(both()), "^w: LoRA.* holds 2 adapters"),
    "no choice": (
        lambda: compress.apply(jnp.matmul)(X, both()["w"]),
        r"holds 2 adapters; say which each row of the batch takes: compress.choose",
    ),
    "ids": (lambda: choose(adapted(), np.array([0, 1])), "from -1 to 0, got"),
    "floats": (lambda: choose(adapted(), np.ones(2, np.float32)), "expected integers of shape"),
    "no adapters": (lambda: choose(TREE, np.array([0])), "no leaf of the tree has adapters"),
    "other rows": (
        lambda: compress.apply(jnp.matmul)(X, choose(adapted(), np.array([0, 0]))["w"]),
        r"chosen for 2 rows, and the activations are \[5, 64\]",
    ),
    "a file": (lambda: compress.to_arrays(adapted()), "^w: a LoRA is no plain array"),
    "lookup": (
        lambda: compress.apply(lambda w: jnp.take(w, jnp.array([1]), axis=0))(adapted()["w"]),
        "gather of LoRA.*it is for kernels",
    ),
    "sum": (
        lambda: compress.apply(lambda w: w + 1.0)(adapted()["w"]), "no rule for the primitive 'add'"
    ),
    "both axes": (
        lambda: compress.apply(lambda w: jnp.vdot(W[0], w))(adapted()["w"]), "LoRA"),
    "reshaped": (
        lambda: compress.apply(lambda w: w.reshape(8, 8, N_OUT))(adapted()["w"]),
        "only the axes before its input and output axis can be joined or split",
    ),
    "as integers": (
        lambda: compress.apply(lambda w: w.astype(jnp.int32))(adapted()["w"]), "floating dtype"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    act, message = REFUSED[name]
    with pytest.raises((ValueError, NotImplementedError, TypeError), match=message):
        act()
