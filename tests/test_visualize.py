"""Pictures of layouts: every device where JAX puts it, every byte counted once, valid SVG."""

import itertools
import math
import re
from collections import Counter
from typing import Any
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from sharding import ShardingError, make_mesh, rules, shardings
from sharding.rules import mesh_axes
from sharding.visualize import Picture, visualize
from sharding.visualize.facts import Grid, Leaf
from sharding.visualize.table import Table
from sharding.visualize.words import ranges

few = settings(derandomize=True, deadline=None, max_examples=80)
SVG = "{http://www.w3.org/2000/svg}"
MESH = "data=2,fsdp=2,tensor=2"


def struct(shape, dtype: Any = np.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def leaf_of(*args, **options) -> Leaf:
    found = visualize(*args, **options).of
    assert isinstance(found, Leaf)
    return found


def table_of(*args, **options) -> Table:
    found = visualize(*args, **options).of
    assert isinstance(found, Table)
    return found


def where(mesh, *spec):
    return NamedSharding(make_mesh(mesh), P(*spec))


@st.composite
def layouts(draw, rank=(0, 4)):
    """A shape and a sharding on a mesh with any axes and any order of devices."""
    sizes = draw(st.lists(st.sampled_from([1, 2, 2, 4]), min_size=1, max_size=3))
    sizes = sizes if math.prod(sizes) <= 8 else [2, 2, 2]
    axes = [f"axis-{i}" for i in range(len(sizes))]
    devices = draw(st.permutations(jax.devices()))[: math.prod(sizes)]
    mesh = Mesh(np.array(devices).reshape(sizes), axes)
    spec = [[] for _ in range(draw(st.integers(*rank)))]
    for axis in draw(st.permutations(axes)):
        if spec and draw(st.booleans()):
            spec[draw(st.integers(0, len(spec) - 1))].append(axis)
    ways = [math.prod(mesh.shape[axis] for axis in entry) for entry in spec]
    shape = tuple(n * draw(st.integers(1, 3)) for n in ways)
    return shape, NamedSharding(mesh, P(*(tuple(entry) or None for entry in spec)))


def expected_blocks(shape, sharding):
    """Devices by block, as JAX itself has it."""
    found = {}
    for device, index in sharding.devices_indices_map(shape).items():
        spans = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        found.setdefault(spans, set()).add(device.id)
    return found


def expanded(text):
    """The numbers of a text such as 0-3,8."""
    ends = (part.split("-") for part in text.split(","))
    return {n for end in ends for n in range(int(end[0]), int(end[-1]) + 1)}


def read_grid(text, shape, sharding):
    """Devices by block, read back from a drawing on the terminal."""
    block = sharding.shard_shape(shape)
    cut = [axis for axis, n in enumerate(shape) if block[axis] < n]
    rows = cut[0] if len(cut) > 1 or (cut and cut[0] < len(shape) - 1) else None
    columns = next((axis for axis in cut if axis != rows), None)
    found, tops, plane = {}, [], {}
    for line in text.splitlines():
        spans = [tuple(map(int, span.split(":"))) for span in re.findall(r"\d+:\d+", line)]
        if "│" in line:
            cells = line[line.index("│") + 1 : -1].split("│")
            for i, cell in enumerate(cells):
                place = {axis: (0, n) for axis, n in enumerate(shape)} | plane
                if rows is not None:
                    place[rows] = spans[0]
                if columns is not None:
                    place[columns] = tops[i]
                key = tuple(place[axis] for axis in range(len(shape)))
                assert key not in found
                found[key] = expanded(cell.strip())
        elif re.match(r"axis \d+→.* \d+:\d+$", line) and len(spans) == len(cut[2:]):
            plane = dict(zip(cut[2:], spans, strict=True)) if cut[2:] else plane
            tops = [] if cut[2:] else spans
        elif spans:
            tops = spans
    return found


# --- one array ------------------------------------------------------------------------------------


@few
@given(layouts())
def test_every_device_is_drawn_in_the_block_that_it_holds(layout):
    shape, sharding = layout
    picture, leaf = (
        visualize(struct(shape), sharding, color=False),
        leaf_of(struct(shape), sharding),
    )
    expected = expected_blocks(shape, sharding)
    assert {index: set(ids) for index, ids in leaf.blocks.items()} == expected
    assert Counter(itertools.chain(*leaf.blocks.values())) == Counter(
        device.id for device in sharding.mesh.devices.flat
    )
    if math.prod(sharding.shard_shape(shape)) != math.prod(shape):
        assert read_grid(str(picture), shape, sharding) == expected
    titles = [node.text for node in ElementTree.fromstring(picture.svg).iter(f"{SVG}title")]
    drawn = Counter(frozenset(expanded(str(text).removeprefix("device "))) for text in titles)
    assert drawn == Counter(map(frozenset, expected.values()))


@few
@given(layouts())
def test_copies_blocks_and_bytes(layout):
    shape, sharding = layout
    leaf = leaf_of(struct(shape, np.int16), sharding)
    used = {axis for entry in sharding.spec for axis in mesh_axes(entry)}
    assert set(leaf.copies) == {a for a, n in sharding.mesh.shape.items() if n > 1} - used
    assert leaf.total == np.zeros(shape, np.int16).nbytes
    assert leaf.per_device * len(leaf.blocks) == leaf.total
    each = {len(ids) for ids in leaf.blocks.values()}
    assert each == {math.prod(sharding.mesh.shape[axis] for axis in leaf.copies)}


GRID = """\
float32[1024, 4096]: embed→fsdp, mlp→tensor
mesh data=2,fsdp=2,tensor=2: 8 devices

                    mlp→tensor
embed→fsdp      0:2048      2048:4096
           ┌─────────────┬─────────────┐
     0:512 │     0,4     │     1,5     │
           ├─────────────┼─────────────┤
  512:1024 │     2,6     │     3,7     │
           └─────────────┴─────────────┘

4 blocks of 512×2048, each on 2 devices (copies along data)
4.19 MB on each device, 16.8 MB in all; with the copies, 33.6 MB"""


def test_golden_grid():
    picture = visualize(
        struct((1024, 4096)), where(MESH, "fsdp", "tensor"), names=("embed", "mlp"), color=False
    )
    assert str(picture) == repr(picture) == GRID


def test_what_has_no_room_is_left_out_and_said_so():
    cut = struct((4, 4, 4)), where(MESH, "data", "fsdp", "tensor")
    assert [str(visualize(*cut)).count(mark) for mark in "┌┼"] == [2, 2]
    cells = Grid(leaf_of(*cut))
    assert cells.planes(1) == ([(0,)], 1)
    cells = Grid(leaf_of(struct((16,)), where("data=8", "data")))
    assert cells.shown(1, 8) == [*range(8)]
    assert cells.shown(1, 5) == [0, 1, 2, None, 7]
    # Four columns have room where the labels are long.
    wide = str(visualize(struct((8 * 10**7,)), where("data=8", "data"), color=False))
    assert "…" in wide
    assert max(map(len, wide.splitlines())) <= 100


# --- a tree ---------------------------------------------------------------------------------------


def tree_of(layers=3):
    layer = {
        "kernel": struct((8, 16)),
        "bias": struct((16,)),
        "up_0": struct((2, 4), jnp.bfloat16),
        "up_1": struct((2, 4), jnp.bfloat16),
    }
    tree = {"words": struct((100, 8)), "layers": [layer] * layers, "step": struct((), np.int32)}
    axes = {
        "kernel": ("embed", "mlp"),
        "bias": ("mlp",),
        "up_0": (None, "embed"),
        "up_1": (None, "embed"),
    }
    axes = {"words": ("vocab", None), "layers": [axes] * layers, "step": ()}
    return tree, axes, shardings(axes, tree, make_mesh(MESH), rules())


TREE = """\
mesh data=2,fsdp=2,tensor=2: 8 devices

array                      shape   dtype     sharding                  total  per device
─────────────────────────  ──────  ────────  ──────────────────────  ───────  ──────────
layers/{0..2}/bias ×3      16      float32   mlp→tensor                192 B        96 B  ▍
layers/{0..2}/kernel ×3    8×16    float32   embed→fsdp, mlp→tensor  1.54 kB       384 B  █▌
layers/{0..2}/up_{0,1} ×6  2×4     bfloat16  –, embed→fsdp              96 B        48 B  ▎
step                       scalar  int32     scalar                      4 B         4 B  ░
words                      100×8   float32   vocab, –                 3.2 kB      3.2 kB  ░░░░░░░░░░░░ replicated

3.73 kB on each of 8 devices, 5.03 kB in all
5.94 × an even share (628 B); 3.2 kB whole on every device"""  # noqa: E501


def test_golden_tree():
    tree, axes, placed = tree_of()
    assert str(visualize(tree, placed, names=axes, color=False)) == TREE


dtypes = st.sampled_from([np.float32, np.int8, np.bool_, ml_dtypes.bfloat16])


@few
@given(st.lists(st.tuples(layouts(), dtypes), min_size=1, max_size=5))
def test_totals_are_those_of_the_arrays_themselves(leaves):
    arrays = [jax.device_put(np.zeros(s, t), sharding) for (s, sharding), t in leaves]
    table = table_of({"a": arrays})
    assert table.total == sum(np.asarray(x).nbytes for x in arrays)
    held = Counter()
    for x in arrays:
        for shard in x.addressable_shards:
            held[shard.device.id] += np.asarray(shard.data).nbytes
    assert Counter(table.bytes_by_device) == held
    assert table.per_device == max(held.values())
    assert sum(row.count for row in table.rows) == len(arrays)
    assert sum(row.total for row in table.rows) == table.total
    ElementTree.fromstring(visualize({"a": arrays}).svg)


numbers = st.integers(0, 3)
patterns = st.sampled_from(["a/{}/w", "a/b_{}/w", "a{}/{}/w", "b/{}", "c", "a/w/{}x"])


@few
@given(st.sets(st.builds(lambda text, i, j: text.format(i, j), patterns, numbers, numbers)))
def test_rows_stand_for_exactly_their_leaves(paths):
    tree = {}
    for path in sorted(paths):
        *folders, name = path.split("/")
        node = tree
        for key in folders:
            node = node.setdefault(key, {})
        node[name] = struct((2,))
    table = table_of(tree, jax.tree.map(lambda _: where("data=2", "data"), tree))
    found = []
    for row in table.rows:
        parts = [
            [a + str(n) for n in expanded(body.replace("..", "-"))] if body else [a]
            for a, body in re.findall(r"([^/{]*)(?:\{(.*?)\})?(?:/|$)", row.path + "/")[:-1]
        ]
        mine = ["/".join(segments) for segments in itertools.product(*parts)]
        assert len(mine) == row.count
        found += mine
    assert sorted(found) == sorted(paths)


def test_rows_by_bytes():
    tree, _, placed = tree_of()
    amounts = [row.per_device for row in table_of(tree, placed, order="bytes").rows]
    assert amounts == sorted(amounts, reverse=True)
    assert len(set(amounts)) > 1


def test_layers_that_differ_are_not_joined():
    tree = [struct((8, 8)), struct((8, 8)), struct((8, 8), np.int8)]
    placed = [where(MESH, "data"), where(MESH, None, "data"), where(MESH, "data")]
    assert [row.path for row in table_of(tree, placed).rows] == ["0", "1", "2"]


def test_devices_that_hold_different_amounts():
    one = jax.device_put(np.zeros(4, np.float32), jax.devices()[3])
    cut = jax.device_put(np.zeros((8, 8), np.float32), where("data=8", "data"))
    picture = visualize({"one": one, "cut": cut}, color=False)
    assert table_of({"one": one, "cut": cut}).bytes_by_device == {
        i: 32 + 16 * (i == 3) for i in range(8)
    }
    assert "32 B to 48 B on each of 8 devices, 272 B in all" in str(picture)
    assert "one    4      float32  1 device" in str(picture)


def test_any_model_and_any_leaf():
    model = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
    tree = {"key": jax.random.key(0), "model": model, "rate": 0.1, "act": jax.nn.gelu}
    rows = table_of(tree).rows
    assert [row.path for row in rows] == ["key", "model/bias", "model/kernel"]
    assert rows[0].leaf.dtype == "key<fry>"
    assert "no arrays" in str(visualize({"rate": 0.1}))
    assert "no arrays" in visualize({}).svg


# --- the picture ----------------------------------------------------------------------------------


def test_svg_is_valid_and_needs_nothing_else():
    hostile = "<script>&'\"\x1b[31m\ud800"
    tree = {hostile: struct((8, 8)), "plain": struct((4,))}
    placed = {hostile: where(MESH, "data"), "plain": where(MESH)}
    for picture in (visualize(tree, placed), visualize(tree[hostile], placed[hostile])):
        root = ElementTree.fromstring(picture.svg)
        assert root.tag == f"{SVG}svg"
        assert not [node for node in root.iter() if node.tag in (f"{SVG}script", f"{SVG}image")]
        names = {name for node in root.iter() for name in node.attrib}
        assert not names & {"href", "src", "{http://www.w3.org/1999/xlink}href", "id"}
        assert "url(" not in picture.svg
        assert "@import" not in picture.svg
        assert picture._repr_svg_() == picture.svg
    text = visualize(tree, placed, color=False)
    assert "\x1b" not in str(text)
    assert "<script>&'\"\ufffd[31m\ufffd" in str(text)
    assert any(
        node.text and node.text.startswith("<script>")
        for node in ElementTree.fromstring(text.svg).iter(f"{SVG}text")
    )


def test_save_replaces_whole(tmp_path):
    picture = visualize(struct((8, 8)), where(MESH, "data"))
    target = tmp_path / "layout.svg"
    target.write_text("before")
    picture.save(target)
    assert target.read_text(encoding="utf-8") == picture.svg
    assert [*tmp_path.iterdir()] == [target]
    with pytest.raises(OSError):
        picture.save(tmp_path / "no such folder" / "layout.svg")


@pytest.mark.parametrize(
    ("color", "terminal", "environment", "expected"),
    [
        (None, False, "", False),
        (None, True, "", True),
        (None, True, "1", False),
        (True, False, "1", True),
        (False, True, "", False),
    ],
)
def test_colour_only_where_it_is_wanted(monkeypatch, color, terminal, environment, expected):
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("NO_COLOR", environment)
    tree, axes, placed = tree_of()
    for drawn in (
        visualize(tree, placed, names=axes, color=color),
        visualize(tree["words"], where(MESH, None, ("data", "fsdp")), color=color),
    ):
        assert ("\x1b[" in str(drawn)) is expected
        plain = Picture(drawn.of, False)
        assert re.sub(r"\x1b\[[\d;]*m", "", str(drawn)) == str(plain)


def test_no_value_is_read():
    class Array:  # whose values nobody could read
        shape, dtype, sharding = (1 << 20, 1 << 20), np.dtype(np.float32), where(MESH, "fsdp")

        def __array__(self):
            raise AssertionError

    picture = visualize({"w": Array()}, color=False)
    assert "2.2 TB on each of 8 devices, 4.4 TB in all" in str(picture)


@pytest.mark.parametrize(
    ("tree", "placed", "names", "message"),
    [
        ({"w": np.ones(4)}, None, None, "^w: a ndarray that lies on no device; place it, or give"),
        (struct((4,)), None, None, "^array: a ShapeDtypeStruct that lies on no device"),
        ({"w": struct((4,))}, {"x": where(MESH)}, None, "^w: has no sharding: known are 'x'"),
        ({"w": struct((4,))}, {"w": P()}, None, r"^w: expected sharding, got P\(\)"),
        ({"w": struct((3,))}, {"w": where(MESH, "data")}, None, r"^w: shape \(3,\) does not fit"),
        ({"w": struct(())}, {"w": where(MESH, "data")}, None, r"^w: shape \(\) does not fit"),
        ({"w": struct((4,))}, {"w": where(MESH)}, {"w": ("a", "b")}, "^w: .*rank 1, but 2 axis"),
        ({"w": struct((4,))}, {"w": where(MESH)}, {"v": ("a",)}, "^w: has no names"),
        (
            struct((4,)),
            NamedSharding(jax.sharding.AbstractMesh((2,), ("a",)), P()),
            None,
            "mesh is abstract",
        ),
    ],
)
def test_refuses(tree, placed, names, message):
    with pytest.raises(ShardingError, match=message):
        visualize(tree, placed, names=names)


def test_refuses_an_unknown_order():
    with pytest.raises(ShardingError, match="unknown order 'byte': did you mean 'bytes'"):
        visualize({}, order="byte")  # pyright: ignore[reportArgumentType]


# --- words ----------------------------------------------------------------------------------------


@few
@given(st.sets(st.integers(0, 300), min_size=1), st.integers(8, 30))
def test_ranges_are_lossless_until_they_are_too_long(numbers, longest):
    text = ranges(numbers)
    assert expanded(text) == numbers
    short = ranges(numbers, longest=longest)
    assert short == text if len(text) <= longest else f"({len(numbers)})" in short


def test_an_array_on_one_device():
    x = jnp.zeros((2, 3))
    assert isinstance(x.sharding, SingleDeviceSharding)
    assert "whole on 1 device" in str(visualize(x))
