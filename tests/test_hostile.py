"""fw.hub: whatever a downloaded folder holds, it loads equal or an error names file and tensor.

Never another exception, a wait, or memory beyond the order of the files. Headers are mutated by
their structure, not byte by byte, so that most mutants are JSON and go deep.
"""

import json
import os
import random
import resource
import shutil
import signal
import struct
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from fw import hub
from fw.errors import FwError
from fw.hub import FAMILIES
from fw.models.bert import BertConfig
from fw.models.llama import LlamaConfig
from fw.models.modernbert import ModernBertConfig
from sharding import gather, make_mesh, rules

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
SECONDS, BYTES = 20, 2**30
"""What a case may take: seconds where one takes 0.1, for the machine is shared; new memory."""


def load(folder: Path) -> hub.Loaded:
    return hub.load(folder, mesh=make_mesh("data=1"), rules=rules())


def same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, gather(a), gather(b))


@contextmanager
def watched():
    """Fails what takes too long or too much memory, be it in Python or below."""

    def late(*_):
        raise TimeoutError(f"a case took more than {SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refusal(folder: Path, expected: Any) -> str:
    """The error of loading a folder, or nothing if what was loaded is what was expected."""
    with watched():
        try:
            loaded = load(folder)
        except FwError as error:
            message = str(error)
            assert type(error) is FwError
            assert message.isprintable(), message
            assert len(message) < 2000, message
            return message
    same(loaded.variables, expected.variables)
    return ""


def make(name: str, root: Path) -> hub.Loaded:
    configs: Any = {"bert": BertConfig, "modernbert": ModernBertConfig, "llama": LlamaConfig}
    head: Any = {}
    if name != "llama":
        head = {"num_labels": 2, "task": "token_classification", "scan": False}
    if name == "modernbert":  # its own are larger than any tensor here
        head |= {"max_position_embeddings": 40, "local_attention": 8}
    model = FAMILIES[name].model(configs[name](60, 16, 2, 2, 32, **head))
    rng, shapes = np.random.default_rng(0), jax.eval_shape(model.init, jax.random.key(0))
    variables = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    made = hub.Loaded(model, variables, ("a", "b") if head else ())
    hub.save(root, made)
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile") / "model"
    return root, make("llama", root)


@pytest.fixture
def copy(model, tmp_path):
    return Path(shutil.copytree(model[0], tmp_path / "copy"))


# --- headers --------------------------------------------------------------------------------------

Pairs = list[tuple[str, Any]]


class Raw(str):
    """Stands in the file as it is."""


def text(node: Any) -> str:
    """JSON of lists of pairs for objects, so that a name can be there twice."""
    if isinstance(node, Raw):
        return str(node)
    if isinstance(node, list) and node and all(isinstance(item, tuple) for item in node):
        return "{" + ",".join(f"{json.dumps(k)}:{text(v)}" for k, v in node) + "}"
    if isinstance(node, list):
        return "[" + ",".join(map(text, node)) + "]"
    return json.dumps(node)


def read_file(path: Path) -> tuple[Pairs, bytes]:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end], object_pairs_hook=list)
    return header, data[end:]


def write_file(path: Path, header: str | bytes, data: bytes) -> None:
    header = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def entry(key: str, *values: Any):
    """Mutators that give a key of one tensor's entry another value."""

    def one(value: Any):
        def mutate(header: Pairs, at: int, rng: random.Random) -> str:
            name, fields = header[at]
            new = value(dict(fields)[key], rng) if callable(value) else value
            header[at] = (name, [(k, new if k == key else v) for k, v in fields])
            return name

        return mutate

    return {f"{key} {i}": one(value) for i, value in enumerate(values)}


def tensor(change: Any):
    """A mutator of one tensor's pair: what stands in its place, none or several."""

    def mutate(header: Pairs, at: int, rng: random.Random) -> str:
        name, fields = header[at]
        header[at : at + 1] = change(name, fields)
        return name

    return mutate


def swapped(header: Pairs, at: int, rng: random.Random) -> str:
    """Two tensors take each other's bytes."""
    other = rng.randrange(len(header))
    (a, first), (b, second) = header[at], header[other]
    spans = dict(first)["data_offsets"], dict(second)["data_offsets"]
    header[at] = (a, [(k, spans[1] if k == "data_offsets" else v) for k, v in first])
    header[other] = (b, [(k, spans[0] if k == "data_offsets" else v) for k, v in second])
    return f"{a}|{b}"


def shuffled(header: Pairs, at: int, rng: random.Random) -> str:
    """The same header."""
    rng.shuffle(header)
    header[:] = [(k, rng.sample(v, len(v))) for k, v in header]
    return ""


FORM = [("dtype", "F32"), ("shape", [1]), ("data_offsets", [0, 4])]
DEEP = Raw("[" * 20_000 + "]" * 20_000)
ODD = (None, True, -1, 1.0, "1", [], {}, 2**53, 2**63, 2**64, Raw("9" * 5000), Raw("NaN"), DEEP)
SPANS = (
    lambda span, rng: [span[0], span[1] + 4],
    lambda span, rng: [span[0] + 4, span[1]],
    lambda span, rng: [n + 4 for n in span],
    lambda span, rng: span[::-1],
    lambda span, rng: [*span, 0],
    lambda span, rng: [0, span[1] - span[0]],
    lambda span, rng: [n + 2**62 for n in span],
    lambda span, rng: [n - 2**62 for n in span],
    lambda span, rng: [rng.choice(ODD), span[1]],
    lambda span, rng: [span[0], rng.choice(ODD)],
    lambda span, rng: rng.choice(ODD),
)
SHAPES = (
    lambda shape, rng: shape[::-1],
    lambda shape, rng: [*shape, 1],
    lambda shape, rng: [int(np.prod(shape))],
    lambda shape, rng: [*shape, 2**62, 2**62],
    lambda shape, rng: [0, *shape],
    lambda shape, rng: [2**62, 0, 2**62],
    lambda shape, rng: [2**61, 8, *shape],  # 2**64, which wraps around to nothing
    lambda shape, rng: [1] * 100 + shape,
    lambda shape, rng: [2**62] * 100_000,
    lambda shape, rng: [rng.choice(ODD), *shape[1:]],
    lambda shape, rng: rng.choice(ODD),
)
MUTATORS = {
    **entry("data_offsets", *SPANS),
    **entry("shape", *SHAPES),
    **entry("dtype", "F16", "I32", "F64", "F4", "float32", "", "f32", "\ud800", *ODD),
    "twice": tensor(lambda name, fields: [(name, fields)] * 2),
    "gone": tensor(lambda name, fields: []),
    "renamed": tensor(lambda name, fields: [(f"{name}\x1b[2J\n", fields)]),
    "long name": tensor(lambda name, fields: [(name * 10_000, fields)]),
    "surrogate": tensor(lambda name, fields: [(f"{name}\ud800", fields)]),
    "nul": tensor(lambda name, fields: [(f"{name}\0", fields)]),
    "no name": tensor(lambda name, fields: [("", fields)]),
    "unknown key": tensor(lambda name, fields: [(name, [*fields, ("x", [1])])]),
    "key twice": tensor(lambda name, fields: [(name, [*fields, ("dtype", "F16")])]),
    "no dtype": tensor(lambda name, fields: [(name, fields[1:])]),
    "no offsets": tensor(lambda name, fields: [(name, fields[:-1])]),
    "a list": tensor(lambda name, fields: [(name, [v for _, v in fields])]),
    "no object": tensor(lambda name, fields: [(name, 7)]),
    "stranger": tensor(lambda name, fields: [(name, fields), (f"{name}.x", FORM)]),
    "empty stranger": tensor(
        lambda name, fields: [
            (name, fields),
            (f"{name}.y", [("dtype", "F32"), ("shape", [0, 2**40]), ("data_offsets", [0, 0])]),
        ]
    ),
    "swapped": swapped,
    "shuffled": shuffled,
}
"""Each changes a header in place and returns the tensor at fault, or several apart by |."""


def near(name: str, tensors: Pairs) -> list[str]:
    """A tensor of the valid file, and those whose bytes lie before and behind its own."""
    order = [n for n, _ in sorted(tensors, key=lambda pair: dict(pair[1])["data_offsets"])]
    at = order.index(name)
    return order[max(at - 1, 0) : at + 2]


def mutate(plan: list[str], mutant: Pairs, rng: random.Random) -> list[str]:
    """Mutates a header in place, and returns the names of the tensors at fault."""
    blamed = []
    for name in plan:
        at = rng.randrange(len(mutant)) if mutant else -1
        # The one before may have left nothing that this one could change.
        if at >= 0 and isinstance(mutant[at][1], list) and mutant[at][1]:
            try:
                blamed += MUTATORS[name](mutant, at, rng).split("|")
            except (TypeError, ValueError, KeyError):
                continue
    return [name for name in blamed if name]


def test_mutated_headers(model, copy):
    header, data = read_file(model[0] / WEIGHTS)
    tensors = [pair for pair in header if pair[0] != "__metadata__"]
    known = {name for name, _ in tensors}
    rng, names = random.Random(0), list(MUTATORS)
    # Every mutator alone on three tensors, then in twos and threes.
    plans = [[name] for name in names for _ in range(3)]
    plans += [rng.choices(names, k=rng.choice((2, 3))) for _ in range(560 - len(plans))]
    equal = 0
    for plan in plans:
        mutant = list(tensors)
        blamed = mutate(plan, mutant, rng)
        write_file(copy / WEIGHTS, text(mutant), data)
        message = refusal(copy, model[1])
        if not message:
            equal += 1
            continue
        assert f"{copy / WEIGHTS}: " in message, (plan, message)
        if "expected a JSON object" in message:
            continue  # what cannot be parsed has no tensors
        if "expected to begin at byte" in message or "its tensors end at byte" in message:
            # Where bytes belong to none or to two, either neighbour may be the one at fault.
            blamed = [n for name in blamed for n in (near(name, tensors) if name in known else [])]
        assert any(name[:90] in message for name in blamed), (plan, blamed, message)
    assert len(plans) == 560
    assert 10 < equal < 100, equal


def test_bytes_around_a_header(model, copy):
    """The length before it, the end of the file, and bytes that are no text."""
    path = copy / WEIGHTS
    whole = path.read_bytes()
    size, length = len(whole), int.from_bytes(whole[:8], "little")
    texts, data = whole[8 : 8 + length], whole[8 + length :]
    for count in (0, 7, 8, 9, 8 + length - 1, 8 + length, size - 1):
        path.write_bytes(whole[:count])
        assert f"{path}: " in refusal(copy, model[1])
    assert f"{path}: tensor '" in refusal(copy, model[1])  # only the last byte is cut off
    for stated in (0, 1, length - 1, length + 1, size - 7, 2**31, 2**63, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", stated) + whole[8:])
        assert f"{path}: " in refusal(copy, model[1])
    for header in (
        b"", b"[]", b"{}", b"7", b"null", b"\0" * 50, b"\xff" + texts[1:], b"\xef\xbb\xbf" + texts,
        texts.decode().encode("utf-16"), texts.strip()[:-1], texts + b"}",
        b"[" * 10**6, b'{"a":' * 10**6, b"[{}" + b",{}" * 10**6 + b"]",
    ):  # fmt: skip
        write_file(path, header, data)
        assert f"{path}: " in refusal(copy, model[1]), header[:20]
    for metadata in ("[]", "7", '"a"', '{"a": 1}', '{"a": {}}', '{"a": NaN}', DEEP):
        header = f'{{"__metadata__": {metadata}, {texts.decode()[1:]}'
        write_file(path, header, data)
        assert f"{path}: " in refusal(copy, model[1]), metadata[:20]
    path.write_bytes(whole + b"\0")
    assert f"{path}: broken, or no safetensors file: its tensors end at" in refusal(copy, model[1])
    # A terabyte of header that takes no room on the disk.
    os.truncate(path, 2**40)
    with path.open("r+b") as file:
        file.write(struct.pack("<Q", 2**39))
    assert "expected at most 100000000 bytes" in refusal(copy, model[1])
    write_file(path, texts + b" \n" * 100, data)
    assert refusal(copy, model[1]) == ""


fuzz = settings(
    derandomize=True,
    deadline=None,
    max_examples=40,
    # Each example writes all of the file that it changes, so they may share a folder.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@fuzz
@given(data=st.data())
def test_damaged_bytes(model, copy, data):
    damaged = bytearray((model[0] / WEIGHTS).read_bytes())
    where = st.integers(0, 7 + int.from_bytes(damaged[:8], "little"))
    for at, byte in data.draw(st.dictionaries(where, st.integers(0, 255), max_size=3)).items():
        damaged[at] = byte
    (copy / WEIGHTS).write_bytes(damaged)
    assert refusal(copy, model[1]).startswith(("", f"{copy / WEIGHTS}: "))


# --- indices and files ----------------------------------------------------------------------------


@pytest.fixture
def parts(copy):
    """A model in two files, and the file of each tensor."""
    tensors = load_file(copy / WEIGHTS)
    (copy / WEIGHTS).unlink()
    places = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(tensors)}
    for place in set(places.values()):
        save_file({n: t for n, t in tensors.items() if places[n] == place}, copy / place)
    return copy, places


def test_indices(model, parts):
    folder, places = parts
    index, name, first = folder / INDEX, min(places), min(places.values())

    def refused(weight_map: Any, *holds: str) -> None:
        index.write_text(json.dumps({"weight_map": weight_map}))
        message = refusal(folder, model[1])
        for part in (f"{index}: ", *holds):
            assert part in message, (str(weight_map)[:100], message)

    index.write_text(json.dumps({"weight_map": places}))
    assert refusal(folder, model[1]) == ""
    outside = folder.parent / "outside.safetensors"
    shutil.copy(folder / first, outside)
    for place in ("../outside.safetensors", str(outside), f"./{first}", f"a/{first}", f"a\\{first}",
                  f"C:{first}", f"{first}\0", f"\0{first}", f"{first}\n", f"\x1b[2J{first}", "",
                  f"\u202e{first}", "\ud800.safetensors", ".", "..", ".safetensors", INDEX, CONFIG,
                  "model.bin", 7, None, True, 1.5, [first], {first: first}):  # fmt: skip
        refused(places | {name: place}, name, "expected the name of a .safetensors file")
    (folder / "folder.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "device.safetensors").symlink_to("/dev/zero")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    (folder / "broken.safetensors").symlink_to("nowhere")
    for place in ("folder", "pipe", "device", "loop", "broken", "none", "a" * 300, "a" * 5000):
        refused(places | {name: f"{place}.safetensors"}, name, "no plain file")
    for weight_map in (None, [], {}, 7, [[name, first]], "x"):
        refused(weight_map, "expected 'weight_map'")
    refused(places | {"x\x1b[2J": first}, r"expected tensor 'x\x1b[2J' in")
    refused(places | {name: next(p for p in places.values() if p != places[name])}, name)
    many = {f"model.layers.{i}.mlp.up_proj.weight": first for i in range(10**6)}
    refused(many, "expected tensor 'model.layers.", f"in {first}; it is not")
    for content in (
        "",
        "{",
        "[1]",
        "\ufeff",
        '{"weight_map": ' * 10**5,
        "[" + "{}," * 10**6 + "{}]",
    ):
        index.write_text(content)
        assert f"{index}: expected" in refusal(folder, model[1])
    index.write_bytes(b'{"weight_map": "\xff"}')
    assert f"{index}:1: expected UTF-8" in refusal(folder, model[1])

    # The same tensor in both files; then one that only the other file's header knows.
    index.write_text(json.dumps({"weight_map": places}))
    second = folder / max(places.values())
    tensors = load_file(second)
    save_file({**tensors, name: np.zeros(1, np.float32)}, second)
    assert f"{second}: tensor '{name}' is also in {first}" in refusal(folder, model[1])
    lost = min(tensors)
    save_file({n: t for n, t in tensors.items() if n != lost}, second)
    assert f"{index}: expected tensor '{lost}' in {second.name}" in refusal(folder, model[1])
    index.write_text(json.dumps({"weight_map": {n: p for n, p in places.items() if n != lost}}))
    assert f"{index}: tensor {lost} is missing" in refusal(folder, model[1])


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, INDEX])
def test_what_is_no_plain_file(parts, name):
    folder, places = parts
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    for make_it in (
        Path.mkdir,
        os.mkfifo,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to(path.name),
    ):
        for place in {name, INDEX}:  # without an index the first file would not matter
            (folder / place).unlink(missing_ok=True)
        make_it(folder / name)
        assert name in refusal(folder, None)
        (folder / name).rmdir() if (folder / name).is_dir() else (folder / name).unlink()
    with (folder / name).open("wb") as file:
        file.truncate(2**40)
    assert f"{folder / name}: " in refusal(folder, None)


def test_links_into_a_store_are_followed(model, copy):
    """As huggingface_hub keeps its downloads: names that lead to blobs elsewhere."""
    for name in (CONFIG, WEIGHTS):
        blob = (copy / name).rename(copy.parent / f"blob-{name}")
        (copy / name).symlink_to(f"../{blob.name}")
    assert refusal(copy, model[1]) == ""


# --- config.json ----------------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)


@pytest.fixture(scope="module", params=["bert", "modernbert", "llama"])
def family(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("strange") / "model"
    made = make(request.param, root)
    assert refusal(root, made) == ""
    return root, made


@fuzz
@given(data=st.data())
def test_strange_configs(family, data):
    root, made = family
    before = (root / CONFIG).read_text()
    config = json.loads(before)
    more = ("is_decoder", "problem_type", "num_labels", "rope_scaling", "use_sliding_window")
    key, value = data.draw(st.sampled_from([*sorted(config), *more])), data.draw(values)
    inside = config.get("rope_parameters")
    if inside and data.draw(st.booleans()):
        key, value = "rope_parameters", {**inside, data.draw(st.sampled_from([*inside])): value}
    try:
        (root / CONFIG).write_text(json.dumps(config | {key: value}))
        refusal(root, made)
    finally:
        (root / CONFIG).write_text(before)


def test_a_flood_of_layers(tmp_path):
    """A large vocabulary bears out a large number, but not that many names of tensors."""
    made = make("bert", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / WEIGHTS)
    tensors["bert.embeddings.word_embeddings.weight"] = np.zeros((10**6, 16), np.float16)
    save_file(tensors, tmp_path / "model" / WEIGHTS)
    config = tmp_path / "model" / CONFIG
    text = json.loads(config.read_text()) | {"vocab_size": 10**6, "num_hidden_layers": 10**6}
    config.write_text(json.dumps(text))
    message = refusal(tmp_path / "model", made)
    assert f"{tmp_path / 'model' / WEIGHTS}: tensors bert.encoder.layer.10." in message
