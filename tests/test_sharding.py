"""Meshes, rules and placement: the same values on every mesh, and an error for every accident."""

import dataclasses
import doctest
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding import (
    ACTIVATIONS,
    AXES,
    PRESETS,
    ShardingError,
    build,
    constrain,
    create,
    format_mesh,
    gather,
    make_mesh,
    put,
    rules,
    scope,
    shardings,
    specs,
)

ROOT = Path(__file__).parents[1]
MESHES = ("data=1", "data=8", "fsdp=8", "tensor=8", "data=2,fsdp=2,tensor=2", "fsdp=2,tensor=3")
PARAMETER_NAMES = sorted(set(PRESETS["data"]) - set(ACTIVATIONS))
few = settings(derandomize=True, deadline=None, max_examples=40)

# At most three axes are longer than 1 on 8 devices; which ones is drawn, too.
sizes = (
    st.lists(st.sampled_from((2, 2, 2, 3, 4, 5, 7, 8)), max_size=3)
    .flatmap(lambda long: st.permutations([*long, *[1] * (len(AXES) - len(long))]).map(tuple))
    .filter(lambda s: math.prod(s) <= 8)
)


def cut_by(target):
    """A target as a set of mesh axes, written apart from the library's own."""
    return set() if target is None else {target} if isinstance(target, str) else set(target)


# --- meshes ---------------------------------------------------------------------------------------


@few
@given(sizes)
def test_mesh_is_what_its_spec_says(shape):
    spec = dict(zip(AXES, shape, strict=True))
    mesh = make_mesh(spec)
    assert dict(mesh.shape) == spec
    assert mesh.axis_names == AXES
    assert mesh.axis_types == (AxisType.Auto,) * len(AXES)
    assert set(mesh.devices.flat) == set(jax.devices()[: math.prod(shape)])
    assert make_mesh(format_mesh(mesh)) == mesh
    sparse = ", ".join(f"{axis} = {n}" for axis, n in spec.items() if n > 1) or "data=1"
    assert make_mesh(sparse) == mesh


@few
@given(sizes, st.sampled_from(AXES))
def test_minus_one_takes_the_rest(shape, axis):
    spec = dict(zip(AXES, shape, strict=True))
    others = math.prod(shape) // spec[axis]
    spec[axis] = -1
    if 8 % others:
        with pytest.raises(ShardingError, match=f"8 devices cannot be divided by {others}"):
            make_mesh(spec)
    else:
        assert make_mesh(spec).shape[axis] == 8 // others


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dta=2", "unknown mesh axis 'dta': did you mean 'data'"),
        ("data=2,data=4", "twice"),
        ("data", "expected axis=size"),
        ("data=two", "cannot read 'data=two'"),
        ("data=0", "size 0"),
        ({"data": True}, "size True"),
        ({"data": 2.0}, "size 2.0"),
        ("dcn.data=-1", "mesh axis 'dcn.data' has size -1; expected an integer from 1$"),
        ("dcn.dta=2", "unknown mesh axis 'dcn.dta': did you mean 'dcn.data'"),
        ("dcn.data=3,fsdp=2,tensor=-1", "8 devices cannot be divided by 6"),
        ("data=-1,fsdp=-1", "only one axis"),
        ("", "empty mesh"),
        ("data=16", "needs 16 devices.*are 8.*--xla_force_host_platform_device_count=16"),
    ],
)
def test_mesh_refuses(spec, message):
    with pytest.raises(ShardingError, match=message):
        make_mesh(spec)


def test_mesh_on_chosen_devices():
    assert list(make_mesh("data=2", jax.devices()[4:6]).devices.flat) == jax.devices()[4:6]


@few
@given(sizes, st.sampled_from(AXES))
def test_slices_are_the_outermost_part_of_their_axis(shape, axis):
    assume(math.prod(shape) <= 4)
    inner = dict(zip(AXES, shape, strict=True))
    mesh = make_mesh(inner | {f"dcn.{axis}": 2})
    assert dict(mesh.shape) == inner | {axis: 2 * inner[axis]}
    half = math.prod(shape)  # virtual devices do not tell their slice: two halves, in order
    slices = np.vectorize(lambda device: device.id // half)(mesh.devices)
    place = AXES.index(axis)
    by_slice = np.moveaxis(slices, place, 0).reshape(2, inner[axis], -1)
    assert (by_slice == np.arange(2)[:, None, None]).all()
    flat = make_mesh(inner).devices
    first = np.take(mesh.devices, range(inner[axis]), axis=place)
    assert (first == flat).all()


def test_slices_must_be_those_of_the_devices():
    @dataclasses.dataclass(frozen=True)
    class Chip:
        id: int
        slice_index: int
        platform: str = "tpu"
        process_index: int = 0
        device_kind: str = "TPU v4"
        core_on_chip: int = 0

        @property
        def coords(self):
            return (self.id % 2, self.id // 2 % 2, 0)

    chips = [Chip(i, i // 4) for i in range(8)]
    mesh = make_mesh("dcn.data=2,fsdp=-1", chips)
    assert [chip.slice_index for chip in mesh.devices.flat] == [0] * 4 + [1] * 4
    with pytest.raises(ShardingError, match=r"slices of \[4, 4\].*dcn.AXIS=2"):
        make_mesh("fsdp=8", chips)


# --- rules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_cover_one_vocabulary_and_suit_every_transformer_parameter(preset):
    assert set(PRESETS[preset]) == set(PRESETS["data"])
    parameters = {
        "word": ("vocab", "embed"),
        "position": ("positions", "embed"),
        "type": ("types", "embed"),
        "query": ("embed", "heads"),
        "attention": ("heads", "embed"),
        "up": ("embed", "mlp"),
        "down": ("mlp", "embed"),
        "bias": ("heads",),
        "pooler": ("embed", "pooled"),
        "classifier": ("pooled", "labels"),
        "step": (),
    }
    for path, spec in specs(parameters, rules(preset)).items():
        for name, entry in zip(parameters[path], spec, strict=True):
            assert cut_by(entry) == cut_by(PRESETS[preset][name])


names_and_tables = st.tuples(
    st.lists(st.sampled_from([*PARAMETER_NAMES, None]), max_size=4).map(tuple),
    st.dictionaries(
        st.sampled_from(PARAMETER_NAMES),
        st.none() | st.sampled_from(AXES) | st.lists(st.sampled_from(AXES), unique=True),
    ),
)


@few
@given(names_and_tables, st.sampled_from(sorted(PRESETS)))
def test_a_mesh_axis_cuts_one_axis_of_an_array_or_none(case, preset):
    names, overrides = case
    table = {**PRESETS[preset], **overrides, None: None}
    every = [axis for name in names for axis in cut_by(table[name])]
    layout = rules(preset, overrides)
    assert layout == rules(preset, **dict(reversed(overrides.items())))
    assert hash(layout) == hash(rules(preset, overrides))
    if len(set(every)) < len(every):
        with pytest.raises(ShardingError, match=r"some/path: mesh axis .* would cut both"):
            layout.spec(names, path="some/path")
    else:
        spec = layout.spec(names, path="some/path")
        assert [cut_by(entry) for entry in spec] == [cut_by(table[name]) for name in names]


@few
@given(
    st.lists(st.sampled_from([*PARAMETER_NAMES, None]), max_size=1),
    st.sampled_from(sorted(PRESETS)),
)
def test_in_activations_the_axes_of_batch_belong_to_batch(names, preset):
    layout = rules(preset)
    batch, *rest = layout.spec(("batch", "length", *names), activation=True)
    assert cut_by(batch) == cut_by(PRESETS[preset]["batch"])
    assert not cut_by(batch) & set().union(*map(cut_by, rest))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: rules("fspd"), "unknown rules 'fspd': did you mean 'fsdp'"),
        (lambda: rules("fsdp", mlp="tensr"), "rule 'mlp': unknown mesh axis 'tensr'.*'tensor'"),
        (
            lambda: rules("fsdp", json.loads('{"mlp": 2}')),
            "rule 'mlp': expected a mesh axis.*got 2",
        ),
        (lambda: rules("fsdp", mlp=("fsdp", "fsdp")), "rule 'mlp' names a mesh axis twice"),
        (
            lambda: specs({"layers": [{"kernel": ("embed", "hedas")}]}, rules()),
            "layers/0/kernel: no rule for axis 'hedas'.*did you mean 'heads'",
        ),
        (
            lambda: specs({"kernel": ("embed", "mlp")}, rules("fsdp", mlpp="tensor")),
            "rule 'mlpp' matches no axis.*did you mean 'mlp'",
        ),
        (
            lambda: specs({"kernel": ("embed", "mlp")}, rules("fsdp", heads="tensor")),
            "rule 'heads' matches no axis",
        ),
        (lambda: specs({"kernel": "embed"}, rules()), "kernel: expected a tuple of axis names"),
    ],
)
def test_rules_refuse(act, message):
    with pytest.raises(ShardingError, match=message):
        act()


def test_overrides_may_name_batch_axes_and_declared_activations():
    axes = {"kernel": ("embed", "mlp")}
    specs(axes, rules("fsdp", length="tensor"))
    layout = rules("fsdp", experts="tensor")
    with pytest.raises(ShardingError, match="'experts' matches no axis"):
        specs(axes, layout)
    specs(axes, layout, activations={*ACTIVATIONS, "experts"})


@few
@given(st.lists(st.integers(1, 48), min_size=2, max_size=2), sizes)
def test_shardings_divide_or_refuse(shape, mesh_shape):
    assume(mesh_shape[AXES.index("pipe")] == 1)  # these parameters have no layers
    mesh = make_mesh(dict(zip(AXES, mesh_shape, strict=True)))
    axes, abstract = {"a": [("embed", "mlp")]}, {"a": [jax.ShapeDtypeStruct(shape, np.float32)]}
    ways = (mesh.shape["fsdp"], mesh.shape["tensor"])
    bad = [i for i in range(2) if shape[i] % ways[i]]
    if bad:
        name, axis = (("embed", "fsdp"), ("mlp", "tensor"))[bad[0]]
        divisors = ", ".join(str(n) for n in range(1, mesh.size + 1) if shape[bad[0]] % n == 0)
        wanted = f"a/0: axis '{name}' has size {shape[bad[0]]}, which {axis}={ways[bad[0]]} does"
        with pytest.raises(ShardingError, match=f"{wanted} not divide.* {divisors} would"):
            shardings(axes, abstract, mesh, rules())
    else:
        found = shardings(axes, abstract, mesh, rules())["a"][0]
        assert found.shard_shape(tuple(shape)) == tuple(np.array(shape) // ways)


@pytest.mark.parametrize(
    ("axes", "abstract", "preset", "message"),
    [
        (
            {"a": ("embed",)},
            {"a": np.zeros((8, 8))},
            "fsdp_tensor",
            r"a: shape \(8, 8\) has rank 2",
        ),
        ({"a": ()}, {"a": np.zeros(()), "b": np.zeros(8)}, "fsdp_tensor", "b: has no axis names"),
        ({"a": (), "ab": ()}, {"a": np.zeros(())}, "fsdp_tensor", "ab: has axis names but no"),
        ({"a": ("embed",)}, {"a": np.zeros(8)}, "fsdp", "'tensor' has size 2.*repeat the same"),
        ({}, {}, "fsdp_tensor", "'pipe' has size 2.*map layers to it, which the model lacks"),
    ],
)
def test_shardings_refuse(axes, abstract, preset, message):
    mesh = make_mesh("data=2,fsdp=2,tensor=2" if axes else "pipe=2")
    # A parameter with `mlp`, so that only the case's own fault remains.
    axes, abstract = axes | {"z": ("mlp",)}, abstract | {"z": np.zeros(8)}
    with pytest.raises(ShardingError, match=message):
        shardings(axes, abstract, mesh, rules(preset))


# --- placement ------------------------------------------------------------------------------------

AXES_TREE = {"dense": {"kernel": ("embed", "mlp"), "bias": ("mlp",)}, "scale": ()}


def init(key):
    kernel = jax.random.normal(key, (240, 480))
    return {"dense": {"kernel": kernel, "bias": jnp.arange(480.0)}, "scale": jnp.ones(())}


@pytest.mark.parametrize("spec", MESHES)
def test_created_in_parts_with_the_same_values_on_every_mesh(spec):
    mesh, key = make_mesh(spec), jax.random.key(7)
    where = shardings(AXES_TREE, jax.eval_shape(init, key), mesh, rules())
    made = create(init, key, shardings=where)
    # The bits are the same; the normal's polynomial may round differently in the last digits.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7),
        gather(made),
        jax.jit(init)(key),
    )
    kernel, ways = made["dense"]["kernel"], mesh.shape["fsdp"] * mesh.shape["tensor"]
    for shard in kernel.addressable_shards:
        assert shard.data.size == kernel.size // ways


def test_creating_takes_less_memory_than_the_whole():
    key, mesh = jax.random.key(0), make_mesh("fsdp=4,tensor=2")
    abstract = jax.eval_shape(init, key)
    where = shardings(AXES_TREE, abstract, mesh, rules())
    used = jax.jit(init, out_shardings=where).lower(key).compile().memory_analysis()
    assert used is not None
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    assert used.output_size_in_bytes + used.temp_size_in_bytes < whole * 0.6


dtypes = st.sampled_from([np.int32, np.float32, np.bool_, np.int8, ml_dtypes.bfloat16])


@few
@given(st.data(), st.sampled_from(MESHES), dtypes)
def test_put_and_gather_are_inverse_and_every_shard_is_its_slice(data, spec, dtype):
    mesh = make_mesh(spec)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    shape = (
        ways * data.draw(st.integers(0, 3)),
        *data.draw(st.lists(st.integers(1, 5), max_size=2)),
    )
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    batch = {"rows": [random.integers(0, 2, shape).astype(dtype)], "count": np.int32(3)}
    placed = put(batch, mesh, rules())
    for shard in placed["rows"][0].addressable_shards:
        assert shard.data.shape[0] == shape[0] // ways
        np.testing.assert_array_equal(shard.data, batch["rows"][0][shard.index])
    jax.tree.map(np.testing.assert_array_equal, gather(placed), batch)
    assert gather(placed)["rows"][0].dtype == dtype


def test_put_by_names():
    mesh, layout = make_mesh("data=2,tensor=4"), rules(length="tensor")
    batch = {"ids": np.zeros((4, 8), np.int32), "first": np.zeros((4, 3), np.int32)}
    names = {"ids": ("batch", "length"), "first": ("batch", None)}
    placed = put(batch, mesh, layout, names)
    assert {k: x.sharding.shard_shape(x.shape) for k, x in placed.items()} == {
        "ids": (2, 2),
        "first": (2, 3),
    }
    only = put({"ids": batch["ids"]}, mesh, layout, ("batch", "length"))
    assert only["ids"].sharding == placed["ids"].sharding


@pytest.mark.parametrize(
    ("leaf", "names", "message"),
    [
        (np.zeros((6, 2), np.int32), None, "ids: axis 'batch' has size 6, which data=2 x fsdp=2"),
        (np.zeros((8, 2), np.int64), None, "ids: JAX would turn int64 into int32"),
        (np.array(["a"] * 4), None, "ids: .*leave it out of the batch"),
        (np.zeros((8, 2), np.int32), ("batch",), "ids: .*rank 2, but 1 axis names"),
        (np.zeros((8, 2), np.int32), {"isd": ("batch", None)}, "ids: has no axis names.*'isd'"),
    ],
)
def test_put_refuses(leaf, names, message):
    with pytest.raises(ShardingError, match=message):
        put({"ids": leaf}, make_mesh("data=2,fsdp=2"), rules(), names)


@pytest.mark.parametrize("spec", MESHES)
def test_put_does_not_alias_the_host(spec):
    # 64-byte aligned rows are what JAX on a CPU takes over without a copy.
    raw = np.zeros(8 * 1024 + 64, np.uint8)
    start = -raw.ctypes.data % 64
    rows = raw[start : start + 8 * 1024].view(np.int32).reshape(8, 256)
    placed = put(rows, make_mesh(spec), rules())
    rows[:] = 1
    assert not gather(placed).any()


@few
@given(sizes, st.sampled_from([P(), P("data"), P("fsdp", "tensor"), P(None, ("data", "tensor"))]))
def test_build_reads_each_distinct_slice_once(mesh_shape, spec):
    mesh = make_mesh(dict(zip(AXES, mesh_shape, strict=True)))
    where = NamedSharding(mesh, spec)
    whole = np.random.default_rng(0).standard_normal((840, 56)).astype(np.float32)
    try:
        where.shard_shape(whole.shape)
    except ValueError:
        assume(False)
    seen = []
    built = build(
        jax.ShapeDtypeStruct(whole.shape, whole.dtype),
        where,
        lambda index: (seen.append(index), whole[index])[1],
    )
    np.testing.assert_array_equal(built, whole)
    assert built.sharding == where
    assert len(seen) == len(set(seen))
    assert sum(whole[index].size for index in seen) == whole.size


@pytest.mark.parametrize("wrong", [np.zeros((8, 8), np.float64), np.zeros((4, 8), np.float32)])
def test_build_refuses_what_the_reader_should_not_give(wrong):
    where = NamedSharding(make_mesh("data=2"), P(None, "data"))
    with pytest.raises(ShardingError, match=r"w: expected shape \(8, 4\) and dtype float32"):
        build(jax.ShapeDtypeStruct((8, 8), np.float32), where, lambda _: wrong, path="w")


def test_gather_refuses_keys_by_path():
    with pytest.raises(ShardingError, match="state/key: numpy has no keys"):
        gather({"state": {"key": jax.random.key(0)}})


# --- constrain ------------------------------------------------------------------------------------


def loss(params, x):
    hidden = jnp.tanh(constrain(x @ params["up"], "batch", "mlp"))
    return jnp.mean(constrain(hidden @ params["down"], "batch", "embed") ** 2)


TRANSFORMS = {
    "plain": lambda f: f,
    "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda p, x: jax.lax.scan(lambda c, _: (f(p, x), None), 0.0, None, 2)[0],
    "vmap": lambda f: lambda p, x: jax.vmap(f, (None, 0))(p, jnp.stack([x, x])).mean(),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("spec", ["data=8", "fsdp=8", "data=2,fsdp=2,tensor=2"])
def test_gradients_are_the_same_on_every_mesh(transform, spec):
    random = np.random.default_rng(1)
    host = {"up": random.standard_normal((16, 32)), "down": random.standard_normal((32, 16))}
    host = jax.tree.map(lambda a: (a / 4).astype(np.float32), host)
    x = random.standard_normal((8, 16)).astype(np.float32)
    step = jax.jit(jax.value_and_grad(TRANSFORMS[transform](loss)))
    expected = step(host, x)
    mesh, layout = make_mesh(spec), rules()
    axes = {"up": ("embed", "mlp"), "down": ("mlp", "embed")}
    params = create(lambda: host, shardings=shardings(axes, host, mesh, layout))
    with scope(mesh, layout):
        found = step(params, put(x, mesh, layout))
    # float32 sums in another order: a few ulps of the largest term.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), gather(found), expected
    )


def test_one_jitted_function_follows_the_scope_it_is_called_in():
    traces = []

    @jax.jit
    def f(x):
        traces.append(x.shape)
        return constrain(x + 1, "batch", "mlp")

    x = np.zeros((8, 8), np.float32)
    small, large = make_mesh("data=2,tensor=2"), make_mesh("data=4,tensor=2")
    assert isinstance(f(x).sharding, jax.sharding.SingleDeviceSharding)
    with scope(small, rules()):
        assert f(x).sharding.shard_shape(x.shape) == (4, 4)
        with scope(large, rules()):
            assert f(x).sharding.shard_shape(x.shape) == (2, 4)
        with scope(small, rules(mlp=None)):
            assert f(x).sharding.shard_shape(x.shape) == (4, 8)
        with pytest.raises(RuntimeError), scope(large, rules()):
            raise RuntimeError
        assert f(x).sharding.shard_shape(x.shape) == (4, 4)
    assert isinstance(f(x).sharding, jax.sharding.SingleDeviceSharding)
    assert len(traces) == 4


def test_outside_a_scope_nothing_is_traced():
    def f(x):
        return constrain(x, "batch", "no such name")

    assert not jax.make_jaxpr(f)(np.zeros((2, 2), np.float32)).eqns
    with scope(make_mesh("data=2"), rules()), pytest.raises(ShardingError, match="no such name"):
        f(jnp.zeros((2, 2)))


def test_a_thread_has_its_own_scope():
    found = []
    with scope(make_mesh("data=8"), rules()):
        thread = threading.Thread(target=lambda: found.append(constrain(jnp.zeros(8), "batch")))
        thread.start()
        thread.join()
    assert isinstance(found[0].sharding, jax.sharding.SingleDeviceSharding)


@pytest.mark.parametrize("inside", [False, True])
def test_constrain_refuses_a_wrong_rank(inside):
    with pytest.raises(ShardingError, match=r"constrain: shape \(8, 2\) has rank 2, but 1 axis"):
        if inside:
            with scope(make_mesh("data=2"), rules()):
                constrain(jnp.zeros((8, 2)), "batch")
        else:
            constrain(jnp.zeros((8, 2)), "batch")


# --- several processes ----------------------------------------------------------------------------

WORKER = """
import sys
import jax
import numpy as np
from sharding import *

rank, port = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, rank)
assert jax.device_count() == 8 and jax.local_device_count() == 4

try:
    make_mesh("data=4")
except ShardingError as error:
    assert "2 processes must use them all" in str(error), error
else:
    raise AssertionError("a mesh of half the devices was accepted")

for spec in ("data=8", "data=2,fsdp=2,tensor=2", "fsdp=2,tensor=-1"):
    mesh, layout = make_mesh(spec), rules()
    x = np.random.default_rng(3).standard_normal((16, 4)).astype(np.float32)
    host = {"x": x, "n": np.int32(5)}
    batch = put(host, mesh, layout)
    assert not batch["x"].is_fully_addressable
    jax.tree.map(np.testing.assert_array_equal, gather(batch), host)

    init = lambda key: jax.random.normal(key, (16, 8))
    key = jax.random.key(0)
    where = shardings(("embed", "mlp"), jax.eval_shape(init, key), mesh, layout)
    whole = gather(create(init, key, shardings=where))
    np.testing.assert_allclose(whole, jax.jit(init)(key), rtol=2e-6, atol=1e-7)

    read = []
    built = build(jax.ShapeDtypeStruct((16, 8), np.float32), where,
                  lambda index: (read.append(whole[index].size), whole[index])[1])
    np.testing.assert_array_equal(gather(built), whole)
    local = {tuple(s.indices(16) for s in shard.index): shard.data.size
             for shard in built.addressable_shards}
    assert sum(read) == sum(local.values()), (read, local)

    with scope(mesh, layout):
        y = jax.jit(lambda x, w: constrain(x.T @ x, None, None).sum() + w.sum())(batch["x"], built)
    np.testing.assert_allclose(gather(y), (x.T @ x).sum() + whole.sum(), rtol=1e-4)
print("ok", rank)
"""


def test_two_processes_share_one_mesh():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), port],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=100)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for rank, (worker, output) in enumerate(zip(workers, outputs, strict=True)):
        assert worker.returncode == 0, output
        assert f"ok {rank}" in output


# --- the guide ------------------------------------------------------------------------------------


def test_the_guide_runs():
    text = (ROOT / "sharding" / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    case = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, "README.md", None, 0)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    results = doctest.DocTestRunner(optionflags=flags).run(case)
    assert results.failed == 0
    assert results.attempted > 15
    assert all(f"`{preset}`" in text for preset in PRESETS)
