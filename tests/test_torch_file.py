"""fw.hub.torch_file: torch's own files are read and never run, and hostile ones are refused."""

import collections
import io
import os
import pickle
import struct
import sys
import types
import zipfile

import numpy as np
import pytest

from fw import hub
from fw.errors import FwError
from fw.hub import torch_file
from fw.hub.torch_file import MAGIC, open_torch
from sharding import make_mesh, rules

SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"long": 4}}


class FloatStorage:
    key: str
    count: int


class LongStorage(FloatStorage):
    pass


def _rebuild_tensor_v2(*_):
    raise AssertionError("run")


class Stored:
    """A tensor as torch pickles it: a view of a storage, which the pickler calls by its key."""

    def __init__(self, array, key, strides=None, offset=0, count=None, kind=FloatStorage):
        self.array, self.offset = array, offset
        own = tuple(n // array.itemsize for n in array.strides)
        self.strides = own if strides is None else strides
        self.storage = kind()
        self.storage.key, self.storage.count = key, array.size if count is None else count

    def __reduce__(self):
        hooks = collections.OrderedDict()
        given = (self.storage, self.offset, self.array.shape, self.strides, False, hooks)
        return _rebuild_tensor_v2, given


@pytest.fixture(autouse=True)
def no_torch(monkeypatch):
    """Modules of torch's names, that the pickler below finds its own stand-ins there."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for module, thing in ((torch, FloatStorage), (torch, LongStorage), (utils, _rebuild_tensor_v2)):
        monkeypatch.setattr(thing, "__module__", module.__name__)
        monkeypatch.setattr(module, thing.__name__, thing, raising=False)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def pickled(thing, zipped):
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            if isinstance(obj, FloatStorage):
                view = () if zipped else (None,)
                return ("storage", type(obj), obj.key, "cpu", obj.count, *view)
            return None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(thing)
    return buffer.getvalue()


def bytes_of(stored):
    """As the storage has them: from the slowest axis to the fastest."""
    array = stored.array
    return array.transpose(np.argsort([-n for n in array.strides], kind="stable")).tobytes()


def write(path, tensors, zipped, *, body=None, system=SYSTEM, compression=zipfile.ZIP_STORED):
    body = pickled(collections.OrderedDict(tensors), zipped) if body is None else body
    stores = {t.storage.key: t for t in tensors.values()}
    if zipped:
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("archive/data.pkl", body)
            archive.writestr("archive/byteorder", "little")
            for key, stored in stores.items():
                archive.writestr(f"archive/data/{key}", bytes_of(stored))
        return
    head = b"".join(pickle.dumps(thing, 2) for thing in (MAGIC, 1001, system))
    tail = b"".join(t.storage.count.to_bytes(8, "little") + bytes_of(t) for t in stores.values())
    path.write_bytes(head + body + pickle.dumps(list(stores), 2) + tail)


def kernel():
    return np.random.default_rng(0).normal(size=(4, 3, 2, 2)).astype(np.float32)


def state():
    turned = np.ascontiguousarray(kernel().transpose(2, 3, 1, 0)).transpose(3, 2, 0, 1)
    return {
        "conv.weight": Stored(kernel(), "0"),
        "turned": Stored(turned, "1"),
        "count": Stored(np.array(7, np.int64), "2", kind=LongStorage),
    }


@pytest.mark.parametrize("zipped", [False, True])
def test_tensors_are_read_where_they_lie(tmp_path, zipped):
    path = tmp_path / "model.pth"
    write(path, state(), zipped)
    with open_torch(path) as tensors:
        assert {name: t.shape for name, t in tensors.items()} == {
            "conv.weight": (4, 3, 2, 2), "turned": (4, 3, 2, 2), "count": (),
        }  # fmt: skip
        index = (slice(1, 3), slice(0, 2), slice(0, 2), slice(1, 2))
        for name in ("conv.weight", "turned"):
            np.testing.assert_array_equal(tensors[name].read(index), kernel()[index])
        assert tensors["count"].read(()) == 7
    with pytest.raises(FwError, match="not those of an EfficientNet-Lite"):
        hub.load(tmp_path, mesh=make_mesh("data=1"), rules=rules())


def gap():
    return {"x": Stored(kernel(), "0", strides=(24, 4, 2, 1), count=96)}


def far():
    return {"x": Stored(kernel(), "0", offset=1)}


def two():
    other = Stored(kernel()[:1], "0")
    return {"x": Stored(kernel(), "0"), "y": other}


def calls(name):
    module, own = name.split()
    return b"\x80\x02c" + f"{module}\n{own}\n".encode() + b"X\x04\x00\x00\x00true\x85R."


BODIES = {
    "system": (calls("posix system"), "the name 'posix system'"),
    "eval": (calls("builtins eval"), "the name 'builtins eval'"),
    "a tensor of text": (calls("torch._utils _rebuild_tensor_v2"), "a call of _Symbol"),
    "an object": (b"\x80\x02c_torch\nX\n)\x81.", "the name '_torch X'"),
    "newer names": (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "the instruction STACK_GLOBAL"),
    "an extension": (b"\x80\x02\x82\x01.", "the instruction EXT1"),
    "an instance": (b"\x80\x02(iposix\nsystem\n.", "the instruction INST"),
    "no end": (b"\x80\x02}", "broken, or no file of torch|expected a state dict"),
    "an empty stack": (b"\x80\x02.", "broken, or no file of torch"),
    "a list": (b"\x80\x02].", "expected a state dict, got 'list'"),
    "numbers": (b"\x80\x02}X\x01\x00\x00\x00aK\x01s.", "expected a tensor, got 'int'"),
    "a long text": (b"\x80\x02X\xff\xff\xff\xffa.", "broken, or no file of torch"),
    "a text beyond all memory": (
        b"\x80\x02\x8d" + (2**62).to_bytes(8, "little"),
        "broken, or no file of torch",
    ),
    "many": (b"\x80\x02" + b"N" * 300 + b".", "more than 200 instructions"),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("case", BODIES)
def test_pickles_are_not_run(tmp_path, monkeypatch, case, zipped):
    monkeypatch.setattr(torch_file, "MOST_STEPS", 200)
    body, message = BODIES[case]
    write(tmp_path / "model.pth", state(), zipped, body=body)
    with pytest.raises(FwError, match=message), open_torch(tmp_path / "model.pth"):
        pass


TENSORS = {
    "gap": (gap, "leave gaps"),
    "far": (far, r"shape \(4, 3, 2, 2\) is more than its storage holds"),
    "two lengths": (two, "two storages '0'"),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("case", TENSORS)
def test_tensors_stay_within_their_file(tmp_path, case, zipped):
    make, message = TENSORS[case]
    write(tmp_path / "model.pth", make(), zipped)
    with pytest.raises(FwError, match=message), open_torch(tmp_path / "model.pth"):
        pass


def test_files_that_are_none(tmp_path):
    path = tmp_path / "model.pth"

    def refused(message):
        with pytest.raises(FwError, match=message), open_torch(path):
            pass

    write(path, state(), False)
    whole = path.read_bytes()
    for cut in (0, 10, 100, 400, len(whole) - 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refused("broken, or no file of torch|longer than the file|not as long as")
    path.write_bytes(b"not a pickle at all")
    refused("broken, or no file of torch")
    write(path, state(), False, system=SYSTEM | {"little_endian": False})
    refused("not little-endian")
    write(path, {"x": Stored(kernel(), "0", count=2**61)}, True)
    refused("longer than the file")
    write(path, {"x": Stored(kernel(), "0", count=2**61 + 1)}, False)
    refused("storage '0' is longer than the file")
    write(path, state(), True, compression=zipfile.ZIP_DEFLATED)
    refused("its members are compressed")
    write(path, state(), True)
    os.truncate(path, path.stat().st_size - 30)
    refused("broken, or no archive of torch")


def encrypted(whole, entry, _):
    whole[entry + 8] |= 1


def no_text(whole, entry, _):
    whole[entry + 9] |= 8  # its name is UTF-8
    whole[entry + 46] = 0xFF


def beyond(whole, entry, end):
    whole[entry + 42 : entry + 46] = b"\xff" * 4  # where it begins says a field of Zip64's
    whole[entry + 30] = 12
    whole[end:end] = struct.pack("<HHQ", 1, 8, 2**63)
    whole[-10] += 12


@pytest.mark.parametrize(
    ("member", "damage"), [("data.pkl", encrypted), ("data/0", no_text), ("data/0", beyond)]
)
def test_odd_directories_are_refused(tmp_path, member, damage):
    path = tmp_path / "model.pth"
    write(path, state(), True)
    whole, name = bytearray(path.read_bytes()), f"archive/{member}".encode()
    at = whole.rindex(name)
    damage(whole, at - 46, at + len(name))  # the directory's entry: 46 bytes, and the name
    path.write_bytes(whole)
    with pytest.raises(FwError, match="broken, or no archive of torch"), open_torch(path):
        pass


def test_a_folder_holds_one(tmp_path):
    for name in ("a.pth", "b.pth"):
        write(tmp_path / name, state(), True)
    with pytest.raises(FwError, match=r"holds 2 \.pth files; keep one"):
        hub.load(tmp_path, mesh=make_mesh("data=1"), rules=rules())
