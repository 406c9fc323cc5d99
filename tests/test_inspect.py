"""What the compiler did: exact, in programs compiled here and in the texts of other chips."""

import dataclasses
import itertools
import json
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding import ShardingError, constrain, make_mesh, rules, scope
from sharding.program.collectives import KINDS, collectives, wire
from sharding.program.contract import ContractError, contract
from sharding.program.flow import Flow
from sharding.program.groups import axes_of, coordinates, replica_groups
from sharding.program.hlo import Instruction, read
from sharding.program.loops import Loops
from sharding.program.report import inspect
from sharding.program.shapes import read_shape

few = settings(derandomize=True, deadline=None, max_examples=60)
F32 = 4


def array(mesh, shape, *spec, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def compiled(function, *args, **options):
    return jax.jit(function, **options).lower(*args).compile()


def only(report, kind):
    found = [one for one in report.collectives if one.kind == kind]
    assert len(found) == 1, str(report)
    return found[0]


# --- groups ---------------------------------------------------------------------------------------


def printed(groups, **more):
    attributes = ", ".join(f"{k}={v}" for k, v in {"replica_groups": groups, **more}.items())
    return Instruction("x", "all-reduce", "main", (), "", False, 7, ("f32[]", attributes))


def enumerated(sizes, wanted, ids):
    """The groups, device by device: who agrees on every digit but the wanted ones.

    `wanted` are (axis, parts before, size); a digit of a coordinate is that part of it.
    """

    def digit(place, axis, before, size):
        return place[axis] // (sizes[axis] // (before * size)) % size

    groups = {}
    for place, device in zip(itertools.product(*map(range, sizes)), ids, strict=True):
        inside = tuple(digit(place, *part) for part in wanted)
        rest = [list(place)]
        for axis, before, size in wanted:
            after = sizes[axis] // (before * size)
            rest[0][axis] -= digit(place, axis, before, size) * after
        groups.setdefault(tuple(rest[0]), []).append((inside, device))
    return {tuple(device for _, device in sorted(group)) for group in groups.values()}


meshes = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4).filter(
    lambda sizes: 1 < math.prod(sizes) <= 48
)


@few
@given(meshes, st.data())
def test_every_printed_form_of_groups_is_what_enumeration_says(sizes, data):
    count = math.prod(sizes)
    axes = data.draw(
        st.permutations(range(len(sizes))).flatmap(
            lambda order: st.integers(1, len(order)).map(lambda n: order[:n])
        )
    )
    expected = enumerated(sizes, [(axis, 1, sizes[axis]) for axis in axes], range(count))
    text = "{" + ",".join("{" + ",".join(map(str, g)) + "}" for g in sorted(expected)) + "}"
    assert set(replica_groups(printed(text), count)) == expected
    width = math.prod(sizes[axis] for axis in axes)
    order = [axis for axis in range(len(sizes)) if axis not in axes] + list(axes)
    iota = (
        f"[{count // width},{width}]<=[{','.join(map(str, sizes))}]T({','.join(map(str, order))})"
    )
    assert set(replica_groups(printed(iota), count)) == expected
    named = ",".join(f"'axis_{i}'={size}" for i, size in enumerate(sizes))
    chosen = ",".join(f"'axis_{axis}'" for axis in axes)
    assert set(replica_groups(printed(f"mesh[{named}] {{{chosen}}}"), count)) == expected

    names = tuple("abcd"[: len(sizes)])
    where = np.array(list(itertools.product(*map(range, sizes))))
    long = tuple(names[axis] for axis in sorted(axes) if sizes[axis] > 1)
    assert axes_of(tuple(expected), where, names) == (long, True)


@few
@given(meshes, st.data())
def test_parts_of_axes_and_devices_in_another_order(sizes, data):
    count = math.prod(sizes)
    parts = [
        (axis, before, size)
        for axis, whole in enumerate(sizes)
        for before in range(1, whole + 1)
        for size in range(2, whole + 1)
        if whole % (before * size) == 0
    ]
    wanted = data.draw(st.lists(st.sampled_from(parts), min_size=1, max_size=2, unique=True))
    if len(wanted) == 2 and wanted[0][0] == wanted[1][0]:
        first, second = sorted(wanted, key=lambda part: part[1])
        if second[1] % (first[1] * first[2]):
            wanted = [first]
    ids = data.draw(st.permutations(range(count)))
    named = ",".join(f"'{'abcd'[i]}'={size}" for i, size in enumerate(sizes))
    chosen = ",".join(f"'{'abcd'[a]}':({before}){size}" for a, before, size in wanted)
    it = printed(f"mesh[{named}]", device_ids=f"({','.join(map(str, ids))}) {{{chosen}}}")
    expected = enumerated(sizes, wanted, ids)
    assert set(replica_groups(it, count)) == expected

    where = np.empty((count, len(sizes)), int)
    where[list(ids)] = list(itertools.product(*map(range, sizes)))
    whole = {}
    for axis, _, size in wanted:
        whole[axis] = whole.get(axis, 1) * size
    axes, regular = axes_of(tuple(expected), where, "abcd"[: len(sizes)])
    assert axes == tuple("abcd"[axis] for axis in sorted(whole))
    assert regular == all(sizes[axis] == size for axis, size in whole.items())


def test_groups_that_leave_devices_out_are_irregular():
    where = np.array(list(itertools.product(range(2), range(4))))
    assert axes_of(((0, 1, 2, 3),), where, ("a", "b")) == (("b",), False)
    assert axes_of(((0, 4), (1, 2), (3, 5), (6, 7)), where, ("a", "b")) == (("a", "b"), False)
    assert axes_of(((0, 1), (4, 0)), where, ("a", "b"), directed=True) == (("a", "b"), True)


@pytest.mark.parametrize("text", ["{{0,x}}", "[2,4]<=8", "mesh['a'=2] {'b'}", "mesh['a'=2]", "all"])
def test_other_groups_raise_with_the_line(text):
    with pytest.raises(ShardingError, match=r"line 7.*replica_groups"):
        replica_groups(printed(text), 2)


# --- bytes ----------------------------------------------------------------------------------------


@few
@given(st.integers(1, 9), st.integers(0, 1000))
def test_wire_bytes_are_those_of_the_best_algorithms(n, part):
    """By counting the sends of ring algorithms, whose parts are `part` bytes."""
    ring = sum(part for _ in range(n - 1))
    assert wire("all-gather", n, part, n * part) == ring
    assert wire("reduce-scatter", n, n * part, part) == ring
    assert wire("all-reduce", n, n * part, n * part) == 2 * ring
    assert wire("all-to-all", n, n * part, n * part) == ring
    moves = part if n > 1 else 0
    assert wire("collective-permute", n, part, part) == moves


@pytest.mark.parametrize(
    ("text", "size"),
    [("bf16[3,5]", 30), ("s4[3]", 2), ("pred[7]", 7), ("f8e4m3fn[4]", 4), ("f4e2m1fn[3]", 2),
     ("c64[2]", 16), ("u32[]", 4), ("token[]", 0), ("f32[<=4]{0}", 16)],
)  # fmt: skip
def test_bytes_of_dtypes(text, size):
    shape = read_shape(text)
    assert not isinstance(shape, tuple)
    assert shape.bytes == size


def test_an_unknown_dtype_raises():
    with pytest.raises(ShardingError, match="q7"):
        _ = read_shape("q7[4]").bytes  # type: ignore[union-attr]


# --- programs compiled here -----------------------------------------------------------------------

SHUFFLED = (3, 1, 0, 2, 7, 5, 6, 4)


def shuffled(spec):
    """A mesh whose devices are in no order."""
    mesh = make_mesh(spec)
    return Mesh(
        mesh.devices.reshape(-1)[list(SHUFFLED)].reshape(mesh.devices.shape), mesh.axis_names
    )


@pytest.fixture(params=[make_mesh, shuffled], ids=["ordered", "shuffled"])
def make(request):
    return request.param


def test_a_contracted_axis_is_summed(make):
    mesh = make("data=2,tensor=4")
    x, w = array(mesh, (16, 32), "data", "tensor"), array(mesh, (32, 24), "tensor")
    report = inspect(compiled(lambda x, w: x @ w, x, w))
    (one,) = report.collectives
    size = 8 * 24 * F32  # the product on one device
    assert (one.kind, one.axes, one.regular, one.devices) == ("all-reduce", ("tensor",), True, 4)
    assert (one.operand_bytes, one.result_bytes, one.count) == (size, size, 1)
    assert report.wire == one.wire_bytes == 2 * 3 * size // 4
    assert report.by_axes() == {"tensor": report.wire} == {"tensor": report.by_kind()["all-reduce"]}
    assert one.dtype == "f32"
    assert "test_inspect.py" in one.source


def manual(mesh, body):
    def function(x):
        return jax.shard_map(
            body, mesh=mesh, in_specs=P("data", "tensor"), out_specs=P(), check_vma=False
        )(x)

    return inspect(compiled(function, array(mesh, (16, 32), "data", "tensor")))


PART = 8 * 8 * F32  # of a (16, 32) array on data=2, tensor=4
RING = [(i, (i + 1) % 4) for i in range(4)]


@pytest.mark.parametrize(
    ("body", "kind", "axes", "sent"),
    [
        (lambda x: jax.lax.psum(x, ("data", "tensor")), "all-reduce", "data,tensor", 2 * 7 / 8),
        (lambda x: jax.lax.psum(x, "data"), "all-reduce", "data", 2 * 1 / 2),
        (lambda x: jax.lax.all_gather(x, "tensor"), "all-gather", "tensor", 3),
        (
            lambda x: jax.lax.psum_scatter(x, "tensor", tiled=True),
            "reduce-scatter",
            "tensor",
            3 / 4,
        ),
        (
            lambda x: jax.lax.all_to_all(x, "tensor", 0, 0, tiled=True),
            "all-to-all",
            "tensor",
            3 / 4,
        ),
        (lambda x: jax.lax.ppermute(x, "tensor", RING), "collective-permute", "tensor", 1),
        (lambda x: jax.lax.ppermute(x, "data", [(0, 1)]), "collective-permute", "data", 1),
        (lambda x: jax.lax.ppermute(x, "data", [(0, 0)]), "collective-permute", "-", 0),
    ],
)
def test_collectives_written_by_hand(make, body, kind, axes, sent):
    one = only(manual(make("data=2,tensor=4"), body), kind)
    assert (one.along, one.wire_bytes) == (axes, sent * PART)
    assert one.parameters == ("x",)
    assert one.cause == "x"


def test_an_explicit_mesh_names_the_same_devices_by_its_own_axes():
    mesh = shuffled("data=2,tensor=4")
    program = compiled(lambda x: x.sum(0), array(mesh, (16, 32), "data"))
    turned = Mesh(mesh.devices.reshape(2, 4).T, ("rows", "columns"))
    assert inspect(program).by_axes().keys() == {"data"}
    assert inspect(program, mesh=turned).by_axes().keys() == {"columns"}
    # In order of number, the groups of the shuffled mesh are no lines.
    straight = Mesh(np.array(jax.devices()).reshape(2, 4), ("rows", "columns"))
    ((name, _),) = inspect(program, mesh=straight).by_axes().items()
    assert name == "irregular(rows,columns)"
    with pytest.raises(ShardingError, match="not the same ones"):
        inspect(program, mesh=make_mesh("data=4"))


def test_several_meshes_need_a_choice():
    flat = Mesh(np.array(jax.devices()), ("all",))
    grid = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    program = compiled(lambda x, y: (x.sum(), y), array(flat, (16,), "all"), array(grid, (8,), "a"))
    with pytest.raises(ShardingError, match="pass mesh="):
        inspect(program)
    assert only(inspect(program, mesh=flat), "all-reduce").along == "all"


def layers(mesh, dtype=jnp.float32):
    stacked = {
        "up": array(mesh, (3, 16, 32), None, "fsdp", "tensor", dtype=dtype),
        "down": array(mesh, (3, 32, 16), None, "tensor", "fsdp", dtype=dtype),
    }
    return {"layers": stacked}, array(mesh, (8, 16), "fsdp", dtype=dtype)


def forward(params, x):
    def body(h, layer):
        up = constrain(jnp.tanh(h @ layer["up"]), "batch", "mlp")
        return constrain(up @ layer["down"], "batch", "embed"), None

    return jax.lax.scan(body, x, params["layers"])[0]


def step(params, x):
    loss, grads = jax.value_and_grad(lambda p: jnp.mean(forward(p, x) ** 2))(params)
    return loss, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)


@pytest.fixture(scope="module")
def trained():
    mesh = make_mesh("fsdp=4,tensor=2")
    params, x = layers(mesh)
    shardings = (NamedSharding(mesh, P()), jax.tree.map(lambda p: p.sharding, params))
    with scope(mesh, rules("fsdp_tensor")):
        return compiled(step, params, x, donate_argnums=0, out_shardings=shardings)


def test_parameters_are_gathered_in_every_layer(trained):
    report = inspect(trained)
    gathered = [one for one in report.collectives if one.kind == "all-gather"]
    assert {one.parameters for one in gathered} == {("params/layers/up",), ("params/layers/down",)}
    whole = 16 * 16 * F32  # a kernel, cut over tensor=2 only
    for one in gathered:
        assert (one.along, one.count, one.known, one.always) == ("fsdp", 3, True, True)
        assert (one.result_bytes, one.wire_bytes) == (whole, whole * 3 // 4)
        assert one.step_bytes == 3 * one.wire_bytes


def test_gradients_lead_to_the_parameters_that_they_update(trained):
    report = inspect(trained)
    updates = {path for c in report.collectives for path in c.outputs if c.count == 3}
    assert updates == {"1/layers/up", "1/layers/down"}
    assert {c.outputs for c in report.collectives if c.shape == "f32[]"} == {("0",)}
    sums = [c for c in report.collectives if c.along == "tensor"]
    assert {(c.kind, c.count, c.outputs, c.parameters) for c in sums} == {("all-reduce", 3, (), ())}
    # Each has a line of this file inside the traced function, not of the library that constrains.
    for one in sums:
        assert re.search(r"tests/test_inspect\.py:\d+ forward\.<locals>\.body$", one.source)
        assert one.cause == one.source == one.frames[0]
        assert one.frames[-1].endswith(" step")


def test_loops_without_a_known_count_are_counted_from_their_condition(trained):
    text = trained.as_text()
    assert text.count("known_trip_count") == 2
    bare = read(re.sub(r'"known_trip_count":\{"n":"3"\}', '"other":{}', text))
    loops, original = Loops(Flow(bare)), Loops(Flow(read(text)))
    assert {original.times(name) for name in bare.computations} >= {(3, True, True)}
    for name in bare.computations:
        assert loops.times(name) == original.times(name)


@pytest.mark.parametrize(
    ("start", "stop", "by", "test", "count"),
    [(0, 7, 2, "LT", 4), (1, 7, 2, "LE", 4), (9, 0, -3, "GT", 3), (9, 0, -3, "GE", 4),
     (0, 6, 3, "NE", 2), (0, 7, 3, "NE", None), (5, 2, 1, "LT", 0), (0, 7, -1, "LT", None)],
)  # fmt: skip
def test_counters(start, stop, by, test, count):
    program = read(f"""HloModule m

%cond (c: (s32[], f32[])) -> pred[] {{
  %c = (s32[], f32[]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %stop = s32[] constant({stop})
  ROOT %t = pred[] compare(%i, %stop), direction={test}
}}

%body (b: (s32[], f32[])) -> (s32[], f32[]) {{
  %b = (s32[], f32[]) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %by = s32[] constant({abs(by)})
  %n = s32[] {"add" if by > 0 else "subtract"}(%i, %by)
  %y = f32[] get-tuple-element(%b), index=1
  ROOT %r = (s32[], f32[]) tuple(%n, %y)
}}

ENTRY %main (x: f32[]) -> f32[] {{
  %x = f32[] parameter(0)
  %start = s32[] constant({start})
  %s = (s32[], f32[]) tuple(%start, %x)
  %w = (s32[], f32[]) while(%s), condition=%cond, body=%body
  ROOT %y = f32[] get-tuple-element(%w), index=1
}}
""")
    values = range(start, stop + (by > 0) - (by < 0) if test in ("LE", "GE") else stop, by)
    assert count is None or count == len(values)
    loop = next(i for i in program.computations["main"].values() if i.opcode == "while")
    assert Loops(Flow(program)).trips(loop) == count


def test_nested_loops_multiply_and_branches_are_marked():
    mesh = make_mesh("data=8")

    def body(x):
        inner = lambda _, y: jax.lax.psum(jnp.sin(y), "data")  # noqa: E731
        outer = lambda _, y: jax.lax.fori_loop(0, 5, inner, y)  # noqa: E731
        y = jax.lax.fori_loop(0, 3, outer, x)
        return jax.lax.cond(y[0, 0] > 0, lambda z: jax.lax.pmax(z, "data"), lambda z: z * 2, y)

    def function(x):
        return jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)(x)

    report = inspect(compiled(function, array(mesh, (4, 4))))
    assert sorted((c.count, c.known, c.always) for c in report.collectives) == [
        (1, True, False),
        (15, True, True),
    ]
    assert "1|" in str(report)


def test_a_loop_of_unknown_length_is_said_to_be_one():
    mesh = make_mesh("data=8")

    def function(x, n):
        def body(carry):
            i, y = carry
            y = jnp.tile(jnp.sin(y).sum(0, keepdims=True), (8, 1))
            return i + 1, constrain(y, "batch", None)

        return jax.lax.while_loop(lambda c: c[0] < n, body, (0, x))[1]

    with scope(mesh, rules("data")):
        program = compiled(function, array(mesh, (8, 4), "data"), array(mesh, (), dtype=jnp.int32))
    report = inspect(program)
    assert not report.known
    assert "1?" in str(report)
    assert "or more" in str(report)
    with pytest.raises(ContractError, match=r"trip count the program does not say.*lax\.scan"):
        contract(program, max_wire=10**9)
    contract(program, allowed=["data"])


# --- arguments, memory, output --------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Weights:
    b: Any
    w: list[Any]


def test_arguments_are_named_as_in_the_call_and_unused_ones_are_left_out():
    mesh = make_mesh("data=2,tensor=4")

    def function(params, ema, x, *, scale, extra=None):
        return {"y": x @ ema.w[0] * scale}

    w = Weights(array(mesh, (16,)), [array(mesh, (16, 16), "tensor", None)])
    x = array(mesh, (8, 16), "data", None)
    jitted = jax.jit(function, donate_argnums=2)
    program = jitted.lower(w, w, x, scale=array(mesh, ()), extra=[x]).compile()
    report = inspect(program)
    found = {one.path: one for one in report.parameters}
    assert list(found) == ["ema/w/0", "x", "scale"]
    kernel = found["ema/w/0"]
    assert (kernel.shape, kernel.spec, kernel.copied) == ((16, 16), (("tensor",), ()), ("data",))
    assert (kernel.bytes, kernel.device_bytes, kernel.donated) == (1024, 256, False)
    assert (found["x"].copied, found["x"].donated) == (("tensor",), True)
    assert found["scale"].copied == ("data", "tensor")
    memory = report.memory
    assert memory is not None
    assert memory.arguments == sum(one.device_bytes for one in report.parameters)
    assert memory.peak == memory.arguments + memory.outputs - memory.aliased + memory.temporaries


def test_a_report_is_a_value_a_table_and_json(trained):
    report = inspect(trained)
    assert inspect(trained) == report
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["wire_bytes"] == report.wire == sum(c["step_bytes"] for c in plain["collectives"])
    assert plain["by_axes"] == report.by_axes()
    assert plain["mesh"]["fsdp"] == 4
    sizes = [c.step_bytes for c in report.collectives]
    assert sizes == sorted(sizes, reverse=True)
    lines = str(report).splitlines()
    rows = lines[1 : 1 + len(sizes)]
    column = lines[0].index("collective")
    assert all(row[column - 1] == " " and row[column:].startswith(KINDS) for row in rows)
    assert "params/layers/up" in str(report)
    short = report.table(rows=2)
    rest = sum(sizes[2:])
    assert f"and {len(sizes) - 2} more, {rest / 1024:.1f} KiB" in short


def test_inspect_refuses_what_is_not_compiled():
    with pytest.raises(ShardingError, match=r"\.compile\(\) gives, got Lowered"):
        inspect(jax.jit(jnp.sin).lower(1.0))  # type: ignore[arg-type]


# --- texts of other chips -------------------------------------------------------------------------

# A TPU v5e: a gather runs in the background of the fusion `beside`, with copies of itself in
# three fusions; the sum and slice of a gradient are one; the loop's count is in its condition.
TPU = """HloModule jit_step, is_scheduled=true, num_partitions=8

FileNames
1 "/home/me/model.py"

FunctionNames
1 "step"

FileLocations
1 {file_name_id=1 function_name_id=1 line=23 end_line=23 column=0 end_column=3}

StackFrames
1 {file_location_id=1 parent_frame_id=1}

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %b = bf16[]{:T(256)} parameter(1)
  %a = bf16[]{:T(256)} parameter(0)
  ROOT %c = bf16[]{:T(256)} add(%a, %b)
}

%begin (p.0: bf16[1,64,32]) -> (bf16[1,64,32], bf16[1,64,128], u32[]) {
  %p.0 = bf16[1,64,32]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[1,64,128]{2,1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=15, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={2}, use_global_device_ids=true, frontend_attributes={chain_id="0"}, metadata={op_name="jit(step)/while/body/squeeze" stack_frame_id=1}
  ROOT %s.0 = (bf16[1,64,32]{2,1,0}, bf16[1,64,128]{2,1,0}, /*index=2*/u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%beside (p.1: bf16[1,64,32], p.2: bf16[1,64,128], p.3: bf16[64,128]) -> (bf16[64,128], bf16[1,64,128]) {
  %p.1 = bf16[1,64,32]{2,1,0} parameter(0)
  %p.2 = bf16[1,64,128]{2,1,0} parameter(1)
  %p.3 = bf16[64,128]{1,0} parameter(2)
  %e = bf16[64,128]{1,0} exponential(%p.3)
  %all-gather.2 = bf16[1,64,128]{2,1,0} all-gather(%p.1), channel_id=15, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={2}, use_global_device_ids=true, frontend_attributes={chain_id="0"}
  ROOT %t.1 = (bf16[64,128]{1,0}, bf16[1,64,128]{2,1,0}) tuple(%e, %all-gather.2)
}

%end (p.4: bf16[1,64,32], p.5: bf16[1,64,128]) -> bf16[1,64,128] {
  %p.4 = bf16[1,64,32]{2,1,0} parameter(0)
  %p.5 = bf16[1,64,128]{2,1,0} parameter(1)
  %all-gather.3 = bf16[1,64,128]{2,1,0} all-gather(%p.4), channel_id=15, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={2}, use_global_device_ids=true, frontend_attributes={chain_id="0"}
  ROOT %d.0 = bf16[1,64,128]{2,1,0} custom-call(%p.4, %p.5, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1 (g: bf16[64,128]) -> bf16[64,32] {
  %g = bf16[64,128]{1,0} parameter(0)
  %all-reduce.1 = bf16[64,128]{1,0} all-reduce(%g), channel_id=10, replica_groups={{0,2,4,6},{1,3,5,7}}, use_global_device_ids=true, to_apply=%add, frontend_attributes={from-cross-replica-sharding="true"}
  %zero = u32[] constant(0)
  %table = u32[8]{0} constant({0, 0, 1, 1, 2, 2, 3, 3})
  %id = u32[] partition-id()
  %row = u32[1]{0} dynamic-slice(%table, %id), dynamic_slice_sizes={1}
  %at = u32[] bitcast(%row)
  ROOT %part = bf16[64,32]{1,0} dynamic-slice(%all-reduce.1, %zero, %at), dynamic_slice_sizes={64,32}
}

%body (w: (s32[], bf16[3,64,32], bf16[3,64,32], bf16[64,128])) -> (s32[], bf16[3,64,32], bf16[3,64,32], bf16[64,128]) {
  %w = (s32[], bf16[3,64,32], bf16[3,64,32], bf16[64,128]) parameter(0)
  %i = s32[] get-tuple-element(%w), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %k = bf16[3,64,32] get-tuple-element(%w), index=1
  %dk = bf16[3,64,32] get-tuple-element(%w), index=2
  %h = bf16[64,128] get-tuple-element(%w), index=3
  %nil = s32[] constant(0)
  %slice = bf16[1,64,32] dynamic-slice(%k, %i, %nil, %nil), dynamic_slice_sizes={1,64,32}
  %started = (bf16[1,64,32], bf16[1,64,128], u32[]) fusion(%slice), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%begin
  %in = bf16[1,64,32] get-tuple-element(%started), index=0
  %out = bf16[1,64,128] get-tuple-element(%started), index=1
  %both = (bf16[64,128], bf16[1,64,128]) fusion(%in, %out, %h), kind=kOutput, calls=%beside
  %later = bf16[1,64,128] get-tuple-element(%both), index=1
  %h.1 = bf16[64,128] get-tuple-element(%both), index=0
  %whole = bf16[1,64,128] fusion(%in, %later), kind=kCustom, calls=%end
  %flat = bf16[64,128] bitcast(%whole)
  %grad = bf16[64,128] multiply(%flat, %h.1)
  %scattered = bf16[64,32] fusion(%grad), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="jit(step)/transpose" stack_frame_id=1}
  %row.1 = bf16[1,64,32] bitcast(%scattered)
  %dk.1 = bf16[3,64,32] dynamic-update-slice(%dk, %row.1, %i, %nil, %nil)
  ROOT %r = (s32[], bf16[3,64,32], bf16[3,64,32], bf16[64,128]) tuple(%next, %k, %dk.1, %grad)
}

%cond (v: (s32[], bf16[3,64,32], bf16[3,64,32], bf16[64,128])) -> pred[] {
  %v = (s32[], bf16[3,64,32], bf16[3,64,32], bf16[64,128]) parameter(0)
  %n = s32[] get-tuple-element(%v), index=0
  %three = s32[] constant(3)
  ROOT %lt = pred[] compare(%n, %three), direction=LT
}

ENTRY %main (kernel: bf16[3,64,32], x: bf16[64,128]) -> (bf16[3,64,32], f32[]) {
  %kernel = bf16[3,64,32]{2,1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="params[\\'kernel\\']"}
  %x = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(1), metadata={op_name="x"}
  %begin.0 = s32[] constant(0)
  %start.0 = s32[] copy(%begin.0)
  %z = bf16[] constant(0)
  %zeros = bf16[3,64,32] broadcast(%z), dimensions={}
  %init = (s32[], bf16[3,64,32], bf16[3,64,32], bf16[64,128]) tuple(%start.0, %kernel, %zeros, %x)
  %loop = (s32[], bf16[3,64,32], bf16[3,64,32], bf16[64,128]) while(%init), condition=%cond, body=%body
  %dk.2 = bf16[3,64,32] get-tuple-element(%loop), index=2
  %new = bf16[3,64,32] subtract(%kernel, %dk.2)
  %loss = f32[] constant(1.5)
  ROOT %result = (bf16[3,64,32], f32[]) tuple(%new, %loss)
}
"""  # noqa: E501

# An H100: pairs of -start and -done, two arrays in one, and a slice that runs in the background.
GPU = """HloModule jit_step, num_partitions=8

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %b = bf16[] parameter(1)
  %a = bf16[] parameter(0)
  ROOT %c = bf16[] add(%a, %b)
}

%cut (p: bf16[3,256], i: s32[]) -> bf16[1,256] {
  %p = bf16[3,256]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %o = s32[] constant(0)
  ROOT %s = bf16[1,256]{1,0} dynamic-slice(%p, %i, %o), dynamic_slice_sizes={1,256}
}

%scatter (q: bf16[8,32]) -> bf16[2,32] {
  %q = bf16[8,32]{1,0} parameter(0)
  ROOT %rs = bf16[2,32]{1,0} reduce-scatter(%q), channel_id=4, replica_groups={{0,2,4,6},{1,3,5,7}}, use_global_device_ids=true, dimensions={0}, to_apply=%add
}

ENTRY %main (a.1: bf16[3,256], b.1: bf16[8,32], n: s32[]) -> (bf16[8,32], bf16[2,32], bf16[4,256]) {
  %a.1 = bf16[3,256]{1,0} parameter(0), metadata={op_name="params.a"}
  %b.1 = bf16[8,32]{1,0} parameter(1), metadata={op_name="params.b"}
  %n = s32[] parameter(2), metadata={op_name="n"}
  %fusion-start = ((bf16[3,256]{1,0}, s32[]), bf16[1,256]{1,0}, u32[]) fusion-start(%a.1, %n), kind=kLoop, calls=%cut
  %fusion-done = bf16[1,256]{1,0} fusion-done(%fusion-start)
  %all-gather-start = ((bf16[1,256]{1,0}, bf16[8,32]{1,0}), (bf16[4,256]{1,0}, bf16[32,32]{1,0})) all-gather-start(%fusion-done, %b.1), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, use_global_device_ids=true
  %all-gather-done = (bf16[4,256]{1,0}, bf16[32,32]{1,0}) all-gather-done(%all-gather-start)
  %g.0 = bf16[4,256]{1,0} get-tuple-element(%all-gather-done), index=0
  %all-reduce-start = ((bf16[8,32]{1,0}), bf16[8,32]{1,0}) all-reduce-start(%b.1), channel_id=2, replica_groups=[4,2]<=[8], use_global_device_ids=true, to_apply=%add, output_to_operand_aliasing={{1}: (0, {})}
  %all-reduce-done = bf16[8,32]{1,0} all-reduce-done(%all-reduce-start)
  %collective-permute-start = ((bf16[8,32]{1,0}), bf16[8,32]{1,0}) collective-permute-start(%all-reduce-done), channel_id=3, source_target_pairs={{0,2},{2,4},{4,6},{6,0},{1,3},{3,5},{5,7},{7,1}}
  %collective-permute-done = bf16[8,32]{1,0} collective-permute-done(%collective-permute-start)
  %rs-start = ((bf16[8,32]{1,0}), bf16[2,32]{1,0}) async-start(%b.1), calls=%scatter
  %rs-done = bf16[2,32]{1,0} async-done(%rs-start)
  %ragged = bf16[8,32]{1,0} ragged-all-to-all(%b.1, %b.1, %n, %n, %n, %n), channel_id=5, replica_groups={{0,2,4,6},{1,3,5,7}}
  %sent = (bf16[8,32]{1,0}, u32[], token[]) send(%ragged, %n), channel_id=6, frontend_attributes={_xla_send_recv_source_target_pairs="{{0,1},{2,3}}"}
  ROOT %t = (bf16[8,32]{1,0}, bf16[2,32]{1,0}, bf16[4,256]{1,0}) tuple(%collective-permute-done, %rs-done, %g.0)
}
"""  # noqa: E501

WHERE = np.array(list(itertools.product(range(4), range(2))))


def parsed(text):
    program = read(text)
    entry = program.parameters[program.entry]
    return collectives(
        program,
        WHERE,
        ("fsdp", "tensor"),
        lambda number, _: entry[number].metadata["op_name"],
        lambda path: f"out {path[0]}",
    )


def test_tpu_text():
    gather, scatter = parsed(TPU)
    whole = 64 * 128 * 2
    assert (gather.kind, gather.count, gather.along) == ("all-gather", 3, "fsdp")
    assert gather.asynchronous
    assert (gather.wire_bytes, gather.parameters) == (whole * 3 // 4, ("params['kernel']",))
    assert not gather.resharding
    assert gather.source == "/home/me/model.py:23 step"
    assert (scatter.kind, scatter.count, scatter.along) == ("reduce-scatter", 3, "fsdp")
    assert (scatter.operand_bytes, scatter.result_bytes) == (whole, whole // 4)
    assert (scatter.wire_bytes, scatter.outputs) == (whole * 3 // 4, ("out 0",))
    assert scatter.op_name == "jit(step)/transpose"


def test_gpu_text():
    part = 8 * 32 * 2
    assert [(c.kind, c.along, c.wire_bytes, c.asynchronous, c.parameters) for c in parsed(GPU)] == [
        ("reduce-scatter", "fsdp", part * 3 // 4, True, ("params.b",)),
        ("all-gather", "fsdp", 3 * (256 * 2 + part), True, ("params.a", "params.b")),
        ("all-reduce", "tensor", part, True, ("params.b",)),
        ("collective-permute", "fsdp", part, True, ()),
        ("ragged-all-to-all", "fsdp", part * 3 // 4, False, ("params.b",)),
        ("collective-permute", "tensor", part, True, ()),
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("all-reduce-start(%b.1)", "all-shuffle-start(%b.1)", "'all-shuffle-start'.*not know"),
        (" reduce-scatter(%q)", " reduce-scatter(%q", "line .*cannot read"),
        ("source_target_pairs={{0,2}", "pairs={{0,2}", "source_target_pairs"),
        ("%all-gather-done = ", "%all-gather-none = ", None),
        ("all-gather-done(%all-gather-start)", "tuple(%b.1, %b.1)", "nothing waits for"),
        ("ENTRY %main", "%main", "no ENTRY"),
        ("bf16[8,32]{1,0} all-reduce-done", "bf16[?,32]{1,0} all-reduce-done", "cannot read the"),
    ],
)
def test_what_cannot_be_read_raises(old, new, message):
    assert old in GPU
    text = GPU.replace(old, new)
    if message is None:  # a name is only a name
        text = text.replace("(%all-gather-done)", "(%all-gather-none)")
        assert len(parsed(text)) == 6
        return
    with pytest.raises(ShardingError, match=message):
        parsed(text)


def test_copies_that_cannot_be_told_apart_raise():
    with pytest.raises(ShardingError, match="no chain_id"):
        parsed(TPU.replace(', frontend_attributes={chain_id="0"}', ""))


def test_source_lines_of_older_programs():
    text = GPU.replace(
        "to_apply=%add, output",
        'metadata={op_name="o" source_file="/a/b.py" source_line=4}, output',
    )
    assert parsed(text)[2].source == "/a/b.py:4"


def test_coordinates_of_permuted_devices():
    mesh = shuffled("data=2,tensor=4")
    where = coordinates(mesh, jax.devices())
    for device, place in zip(jax.devices(), where, strict=True):
        assert mesh.devices[tuple(place)] == device


# --- contracts ------------------------------------------------------------------------------------

AXES = {"up": {"kernel": ("embed", "mlp"), "bias": ("mlp",)}}


def dense(mesh, layout):
    """A layer whose kernel is stored as the rules say, and is summed over what cuts `embed`."""
    up = {"kernel": (64, 128), "bias": (128,)}
    params = {"up": {k: array(mesh, s, *layout.spec(AXES["up"][k])) for k, s in up.items()}}
    x = array(mesh, (8, 64), "data")

    def function(params, x):
        return (x @ params["up"]["kernel"] + params["up"]["bias"]).sum(0)

    return compiled(function, params, x)


def violations(*args, **options):
    with pytest.raises(ContractError) as caught:
        contract(*args, **options)
    assert isinstance(caught.value, AssertionError)
    assert isinstance(caught.value, ShardingError)
    assert all(one in str(caught.value) for one in caught.value.violations)
    return caught.value.violations


def test_a_replicated_parameter_is_named_with_its_rule():
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    layout = rules("fsdp_tensor", embed=None)
    program = dense(mesh, layout)
    options = {"axes": AXES, "rules": layout}
    expected = (
        "params/up/kernel (embed, mlp) is replicated over fsdp: every device holds 16.0 KiB of its "
        "32.0 KiB, max_replicated is 1.0 KiB; rule embed=None; map it with rules(embed='fsdp')"
    )
    assert violations(program, max_replicated=1024, **options) == (expected,)
    assert violations(program, max_replicated={"fsdp": 1024}, axes=AXES) == (
        expected.replace("rule embed=None; ", ""),
    )
    contract(program, max_replicated=16 * 1024, **options)
    contract(program, max_replicated={"tensor": 0}, parameters="params/*", **options)
    found = violations(program, max_replicated={"fsdp": 200}, axes=AXES)
    assert [text.split()[0] for text in found] == ["params/up/bias", "params/up/kernel"]
    # Without names every argument counts, and the hint is the axis.
    found = violations(program, max_replicated={"tensor": 0})
    assert len(found) == 1
    assert found[0].startswith("x is replicated over tensor")
    assert "cut axis 1 of (8, 64) over 'tensor'" in found[0]
    fixed = dense(mesh, rules("fsdp_tensor"))
    contract(fixed, max_replicated={"fsdp": 256}, **options)
    # The rule that is named leaves all other parameters a layout.
    tree = {"up": {"kernel": ("mlp", "pooled"), "bias": ("mlp",)}}
    found = violations(program, max_replicated={"fsdp": 200}, axes=tree, rules=rules(mlp="fsdp"))
    assert found[0].endswith("map it with rules(mlp=('tensor', 'fsdp'))")
    tree["up"]["kernel"] = ("embed", "mlp")
    found = violations(program, max_replicated={"fsdp": 200}, axes=tree, rules=rules())
    assert found[0].startswith("params/up/bias (mlp)")
    assert "no rule can be changed" in found[0]
    # An axis that is cut already is cut once more where no other is left.
    (only_mlp,) = violations(
        program, max_replicated={"fsdp": 1024}, axes={"up": {"kernel": (None, "mlp")}}
    )
    assert only_mlp.endswith("map it with rules(mlp=('tensor', 'fsdp'))")


def test_traffic_is_held_to_axes_kinds_and_budgets():
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    layout = rules("fsdp_tensor")
    program = dense(mesh, layout)
    report = contract(program, allowed=mesh.axis_names)
    totals = report.by_axes()
    assert set(totals) == {"data", "fsdp"}
    contract(report, allowed={"data": ["all-reduce"], "fsdp": KINDS}, max_wire=report.wire)
    (text,) = violations(report, allowed=["fsdp"], rules=layout)
    assert re.search(r"all-reduce .* over data .*not allowed along data", text)
    assert "batch=('data', 'fsdp', 'expert')" in text
    (text,) = violations(report, allowed={"data": ["all-gather"], "fsdp": KINDS})
    assert "not allowed along data (data: all-gather)" in text
    (text,) = violations(report, max_wire=report.wire - 1)
    assert "a device sends" in text
    assert report.collectives[0].cause in text
    (text,) = violations(report, max_wire={"data": totals["data"], "fsdp": 0})
    assert " along fsdp, more than max_wire=0 B" in text
    assert report.memory is not None
    contract(report, max_memory=report.memory.peak)
    (text,) = violations(report, max_memory=report.memory.peak - 1)
    assert "params/up/kernel 8.0 KiB" in text
    everything = violations(
        report, allowed=(), max_wire=0, max_memory=0, max_replicated={"fsdp": 0}, axes=AXES
    )
    assert len(everything) == len(report.collectives) + 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allowed": ["fdsp"]}, "unknown mesh axis 'fdsp': did you mean 'fsdp'"),
        ({"allowed": "fsdp"}, "expected axes"),
        ({"allowed": {"fsdp": ["all-gathr"]}}, "did you mean 'all-gather'"),
        ({"max_wire": {"x": 1}}, "unknown mesh axis"),
        ({"max_replicated": {"x": 1}}, "unknown mesh axis"),
        ({"max_replicated": 1, "axes": {"down": ("mlp",)}}, "no parameter to check"),
        ({"max_replicated": 1, "parameters": "state/*"}, "no parameter to check"),
        ({"max_replicated": 1, "axes": {"up": {"kernel": ("embed",)}}}, "1 axis names"),
    ],
)
def test_a_contract_that_means_nothing_is_refused(options, message):
    report = inspect(dense(make_mesh("fsdp=2,tensor=2"), rules("fsdp_tensor")))
    with pytest.raises(ShardingError, match=message) as caught:
        contract(report, **options)
    assert not isinstance(caught.value, ContractError)


@pytest.mark.usefixtures("newly_compiled")
def test_full_rematerialisation_is_found(capfd):
    """Columns cannot become rows of a reshaped array: XLA warns, gathers everything and slices."""
    mesh = make_mesh("data=2,tensor=4")

    def function(x):
        y = jax.lax.with_sharding_constraint(jnp.cos(x), NamedSharding(mesh, P(None, "tensor")))
        z = jnp.sin(y.reshape(64, 4))
        return jax.lax.with_sharding_constraint(z, NamedSharding(mesh, P("data")))

    program = compiled(function, array(mesh, (16, 16), None, "tensor"))
    assert "Involuntary full rematerialization" in capfd.readouterr().err
    (text,) = violations(program)
    assert re.match(r"all-gather of f32\[16,4\] over tensor .*full rematerialisation", text)
    report = contract(program, full_remat=True)
    assert report.collectives[0].resharding
    assert "1!" in str(report)


def test_gathers_that_are_meant_are_no_rematerialisation(trained):
    contract(trained)
    mesh = make_mesh("fsdp=4")

    def gathered_first(w, x):  # whole before the loop, then sliced by its counter
        w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
        return jax.lax.scan(lambda h, k: (jnp.tanh(h @ k), None), x, w)[0]

    w, x = array(mesh, (3, 16, 16), None, "fsdp"), array(mesh, (8, 16), "fsdp")
    report = contract(compiled(gathered_first, w, x))
    assert (report.collectives[0].kind, report.collectives[0].parameters) == ("all-gather", ("w",))

    def by_hand(x):
        def body(x):
            y = jax.lax.all_gather(x, "fsdp", tiled=True)
            return jax.lax.dynamic_slice_in_dim(y, 2 * jax.lax.axis_index("fsdp"), 2)

        return jax.shard_map(body, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"))(x)

    contract(compiled(by_hand, array(mesh, (8, 16), "fsdp")))
