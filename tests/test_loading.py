"""Loading and saving at scale: each byte read once and only where needed, memory bounded."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

from fw import hub
from fw.errors import FwError
from fw.hub import files
from fw.hub.files import WEIGHTS, open_tensors
from fw.hub.reader import reader
from fw.models.llama import LlamaConfig, llama
from fw.models.names import Name
from fw.tensors import tensor_file, write_tensors
from sharding import fill, gather, make_mesh, rules

ROOT = Path(__file__).parents[1]
BF16 = ml_dtypes.bfloat16


@pytest.fixture
def reads(monkeypatch):
    """The (place, bytes) of every read of a tensor's file."""
    found, preadv = [], os.preadv

    def counting(opened, buffers, place):
        count = preadv(opened, buffers, place)
        found.append((place, count))
        return count

    monkeypatch.setattr(files.os, "preadv", counting)
    return found


def read_once(reads):
    """Bytes read; none of them twice."""
    end = 0
    for place, count in sorted(reads):
        assert place >= end, "read twice"
        end = place + count
    return sum(count for _, count in reads)


# --- parts of tensors -----------------------------------------------------------------------------

ROWS, WIDE = 160, 4096  # more rows than are turned at a time; half a row is a page or more
LAYERS = [Name("w", f"w.{i}", True, (i,)) for i in range(4)]
NESTED = [Name("w", f"w.{2 * i + j}", True, (i, j)) for i in range(2) for j in range(2)]
PAIRS = [Name("w", f"w.{2 * i + j}", True, (i, None, j)) for i in range(2) for j in range(2)]
CASES = {
    # our shape, the names of its tensors, and the axes of the mesh that cut ours
    "rows": ((ROWS, WIDE), [Name("w", "w.0")], ("fsdp", None)),
    "columns": ((ROWS, WIDE), [Name("w", "w.0")], (None, "fsdp")),
    "both": ((ROWS, WIDE), [Name("w", "w.0")], ("data", "fsdp")),
    "nothing": ((ROWS, WIDE), [Name("w", "w.0")], ()),
    "turned": ((WIDE, ROWS), [Name("w", "w.0", True)], ("fsdp", None)),
    "turned stack": ((4, WIDE, ROWS), LAYERS, (None, "fsdp", "data")),
    "stages": ((4, WIDE, ROWS), LAYERS, ("data", "fsdp", None)),
    "nested stack": ((2, 2, WIDE, ROWS), NESTED, (None, "data", "fsdp", None)),
    "stack within": ((2, WIDE, 2, ROWS), PAIRS, (None, "fsdp", None, "data")),
    "third of three": ((WIDE, ROWS), [Name("w", "joined", True, (), (2, 3))], ("fsdp", "data")),
    "one axis": ((WIDE,), [Name("b", "b")], (("data", "fsdp"),)),
}
PROCESSES = {
    "one": lambda parts: [parts],
    "two": lambda parts: [parts[: len(parts) // 2], parts[len(parts) // 2 :]],
    "two that alternate": lambda parts: [parts[::2], parts[1::2]],
}
"""Which parts each of them has."""


@pytest.fixture(scope="module", params=[np.float32, BF16], ids=["f32", "bf16"])
def stored(request, tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("parts"), np.random.default_rng(0)
    shapes = {f"w.{i}": (ROWS, WIDE) for i in range(4)} | {"joined": (3 * ROWS, WIDE), "b": (WIDE,)}
    tensors = {name: random.normal(size=shape) for name, shape in shapes.items()}
    save_file({name: x.astype(request.param) for name, x in tensors.items()}, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("case", CASES)
def test_parts_are_read_once_and_right(stored, reads, case, processes):
    shape, names, axes = CASES[case]
    whole = load_file(stored / WEIGHTS)
    expected = np.empty(shape, np.float32)
    for name in names:
        theirs = np.split(whole[name.tensor], name.part[1])[name.part[0]]
        expected[name.index] = theirs.T if name.transposed else theirs
    where = jax.NamedSharding(make_mesh("data=2,fsdp=4"), jax.P(*axes))

    def write(parts):
        for own in PROCESSES[processes](list(parts.items())):
            reads.clear()
            reader(names, tensors)(dict(own))
            size = sum(part.size for _, part in own) * whole["b"].itemsize
            assert read_once(reads) == size

    with open_tensors(stored) as tensors:
        found = fill(jax.ShapeDtypeStruct(shape, np.float32), where, write)
    np.testing.assert_array_equal(found, expected)


def test_rows_closer_than_a_page_are_read_together(stored, reads):
    with open_tensors(stored) as tensors:
        tensor = tensors["w.0"]
        whole = load_file(stored / WEIGHTS)["w.0"]
        some = WIDE - 2048 // whole.itemsize
        part = tensor.read((slice(2, 9), slice(0, some)))
    np.testing.assert_array_equal(part, whole[2:9, :some])
    assert read_once(reads) == 7 * whole.nbytes // ROWS
    assert len(reads) == 1


def test_names_that_leave_a_gap_are_refused(stored):
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with open_tensors(stored) as tensors, pytest.raises(FwError, match="w: its tensors have 19"):
        fill(jax.ShapeDtypeStruct((4, WIDE, ROWS), np.float32), where, reader(LAYERS[1:], tensors))


def test_a_file_that_shrinks_is_an_error(tmp_path):
    write_tensors(tmp_path / WEIGHTS, {"x": np.zeros((100, 100), np.float32)})
    with open_tensors(tmp_path) as tensors:
        os.truncate(tmp_path / WEIGHTS, 10_000)
        with pytest.raises(FwError, match=r"model.safetensors: .* ends at byte 10000, in a tensor"):
            tensors["x"].read((slice(0, 100), slice(0, 100)))


# --- memory ---------------------------------------------------------------------------------------


def test_two_processes_hold_their_parts_and_no_more(tmp_path):
    """Both load half of 160 MB; what is above that is less than the largest tensor."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "bench" / "loading.py", "--gigabytes=0.16",
         "--layers=2", "--hidden=2048", "--vocabulary=3000", "--files=2", "--rounds=0",
         "--processes=2", "--sides=fw", f"--json={tmp_path / 'figures.json'}"],
        capture_output=True, text=True, cwd=ROOT, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    held = json.loads((tmp_path / "figures.json").read_text())["held"]
    assert [row["rank"] for row in held] == [0, 1]
    for row in held:
        assert row["part"] > 70e6
        assert row["part"] <= row["own"] <= row["part"] + 3000 * 2048 * 4, row
        # The configuration, and a thousand looks a second at the memory, are read as well.
        assert row["part"] <= row["read"] <= 1.2 * row["part"], row


def test_saving_holds_one_parameter_at_a_time(tmp_path):
    config = LlamaConfig(500, 64, 4, 4, 2048, num_key_value_heads=2)
    model = llama(config)
    made = hub.Loaded(model, model.init(jax.random.key(0)), ())
    hub.save(tmp_path / "one", made)
    eight = hub.load(tmp_path / "one", mesh=make_mesh("fsdp=8"), rules=rules())
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(eight.variables)]
    tracemalloc.start()
    try:
        hub.save(tmp_path / "two", eight)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert max(sizes) < sum(sizes) / 3
    # The largest, a chunk of it on its way to the file, and what Python needs.
    assert max(sizes) < peak < 2 * max(sizes) + 300_000, (peak, max(sizes))
    assert kept < 300_000, "the arrays keep what was gathered of them"
    two = (tmp_path / "two" / WEIGHTS).read_bytes()
    assert two == (tmp_path / "one" / WEIGHTS).read_bytes()
    host = dict(load_file(tmp_path / "two" / WEIGHTS))
    assert two == save(host, {"format": "pt"})
    layers = gather(eight.variables)["params"]["stack"]["layers"]
    down = host["model.layers.3.mlp.down_proj.weight"]
    np.testing.assert_array_equal(down, layers["mlp"]["down"]["kernel"][3].T)


# --- the bytes of the library ---------------------------------------------------------------------


def test_files_are_those_of_the_library(tmp_path):
    random = np.random.default_rng(0)
    dtypes = (np.int64, np.float64, np.float32, np.int32, BF16, np.float16, np.int8, np.uint8, bool)
    arrays: dict[str, Any] = {f"{i % 3}{np.dtype(d).name}": random.normal(0, 9, (3, i)).astype(d)
              for i, d in enumerate(dtypes)}  # fmt: skip
    arrays |= {
        'quoted "ß\
漢': np.float32(3),
        "turned": random.normal(size=(700, 900)).T,
    }
    dense = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    write_tensors(tmp_path / "a", arrays)
    assert (tmp_path / "a").read_bytes() == save(dense, {"format": "pt"})

    like = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in dense.items() if x.ndim}
    with tensor_file(tmp_path / "b", like) as write:
        for name in sorted(like, reverse=True):
            for part in (2, 0, 1) if len(dense[name]) == 3 else (0,):
                write(
                    name,
                    dense[name][part : part + 1] if len(dense[name]) == 3 else dense[name],
                    part,
                )
    assert (tmp_path / "b").read_bytes() == save({n: dense[n] for n in like}, {"format": "pt"})


def test_a_file_that_lacks_something_is_refused(tmp_path):
    like = {"x": np.zeros(3, np.float32), "y": np.zeros(2, np.float32)}
    with (
        pytest.raises(FwError, match="a: 8 of 20 bytes were not given"),
        tensor_file(tmp_path / "a", like) as write,
    ):
        write("x", like["x"])
    with pytest.raises(FwError, match="a: cannot be written: 'x' is complex64"):
        write_tensors(tmp_path / "a", {"x": np.zeros(3, np.complex64)})
