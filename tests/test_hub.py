"""fw.hub: folders that transformers wrote give its numbers; what is saved is what was loaded."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fw import hub
from fw.data import Encoded, pack, unpack_texts, unpack_words
from fw.errors import FwError
from fw.hub.families import FAMILIES
from fw.hub.files import Tensor, new_folder
from fw.models.bert import BertConfig, bert
from sharding import gather, make_mesh, paths, put, rules, scope

pytestmark = pytest.mark.usefixtures("quickly_compiled")

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT.parent / "shared" / "golden"
TOKENS, TEXTS = "token_classification", "sequence_classification"
ONE, EIGHT = "data=1", "data=2,fsdp=2,tensor=2"
CUTS = {"embed": 2, "heads": 2, "mlp": 2}
"""Parts that the default rules cut an axis into on the mesh EIGHT."""


def load(folder, mesh=ONE, **options):
    return hub.load(folder, mesh=make_mesh(mesh), rules=rules(), **options)


def by_path(variables):
    return dict(zip(paths(variables), jax.tree.leaves(variables), strict=True))


def assert_same(a, b):
    assert paths(a) == paths(b)
    jax.tree.map(np.testing.assert_array_equal, gather(a), gather(b))


def assert_same_tensors(a, b):
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert (tensor.dtype, tensor.shape) == (b[name].dtype, b[name].shape), name
        assert tensor.tobytes() == b[name].tobytes(), name


def make(task, seed=0, labels=("O", "B-x", "I-x")):
    """A tiny model in which every parameter is random, so that each one matters."""
    config = BertConfig(
        60, 16, 2, 2, 32, num_labels=len(labels), task=task, max_position_embeddings=40, scan=False
    )
    model, random = bert(config), np.random.default_rng(seed)
    variables = jax.tree.map(
        lambda x: jax.numpy.asarray(random.normal(0.5, 0.5, x.shape), np.float32),
        model.init(jax.random.key(0)),
    )
    return hub.Loaded(model, variables, labels)


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "tagger"
    hub.save(folder, make(TOKENS))
    return folder


@pytest.fixture
def copy(tagger, tmp_path):
    return Path(shutil.copytree(tagger, tmp_path / "copy"))


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    changed = change(tensors)
    save_file(tensors if changed is None else changed, path, {"format": "pt"})


# --- the numbers of transformers ------------------------------------------------------------------


FOLDERS = (
    "bert_token_classification",
    "bert_sequence_classification",
    "distilbert_token_classification",
    "modernbert_token_classification",
    "roberta_sequence_classification",
    "llama_causal_lm",
    "qwen3_causal_lm",
)


@pytest.fixture(params=FOLDERS)
def golden(request):
    folder = GOLDEN / request.param
    if not folder.is_dir():
        pytest.skip(f"no reference models in {GOLDEN}")
    return folder


@pytest.mark.parametrize("mesh", [ONE, "data=8", "fsdp=8", "data=4,tensor=2", EIGHT])
def test_golden_logits(golden, mesh):
    loaded = load(golden, mesh)
    arrays = np.load(golden / "io.npz")
    # Eight times the rows: the meshes cut the batch in up to eight.
    io = {name: np.concatenate([arrays[name]] * 8) for name in arrays.files}
    mask = io["in_attention_mask"].astype(np.int32)
    batch = {
        "input_ids": io["in_input_ids"].astype(np.int32),
        "segment_ids": mask,
        "position_ids": np.broadcast_to(np.arange(mask.shape[1], dtype=np.int32), mask.shape),
        "first": np.zeros((len(mask), 1), np.int32),
    }
    if "in_token_type_ids" in io:
        batch["token_type_ids"] = io["in_token_type_ids"].astype(np.int32)
    with scope(make_mesh(mesh), rules()):
        batch = put(batch, make_mesh(mesh), rules())
        logits = np.asarray(jax.jit(loaded.model.apply)(loaded.variables, batch)[0])
    expected = io["out_logits"]
    if loaded.model.config.task != TEXTS:
        logits, expected = logits[mask == 1], expected[mask == 1]
    else:
        logits = logits[:, 0]
    print(f"{golden.name}: {np.abs(logits - expected).max():.1e}")
    np.testing.assert_allclose(logits, expected, atol=2e-5, rtol=1e-4)
    assert (loaded.fresh, loaded.unused) == ((), ())


@pytest.mark.parametrize("mesh", [ONE, EIGHT])
def test_golden_bytes_come_back(golden, mesh, tmp_path):
    loaded = load(golden, mesh)
    hub.save(tmp_path / "again", loaded)
    assert_same_tensors(tmp_path / "again", golden)
    assert (tmp_path / "again/config.json").read_bytes() == (golden / "config.json").read_bytes()
    assert_same(load(tmp_path / "again").variables, loaded.variables)


# --- forms of a folder ----------------------------------------------------------------------------


def bare(tensors):
    """As BertModel saves itself: the encoder alone, without the prefix, with a buffer."""
    encoder = {n.removeprefix("bert."): t for n, t in tensors.items() if n.startswith("bert.")}
    return encoder | {"embeddings.position_ids": np.arange(40)[None]}


def old(tensors):
    """As early checkpoints named the norms, with the heads of pretraining."""
    for name in [name for name in tensors if "LayerNorm" in name]:
        new = name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")
        tensors[new] = tensors.pop(name)
    tensors["cls.predictions.bias"] = np.zeros(60, np.float32)


def test_folder_of_the_encoder_alone(copy):
    encoder = {n: x for n, x in by_path(load(copy).variables).items() if "classifier" not in n}
    edit_tensors(copy, bare)
    edit_config(copy, architectures=["BertModel"])
    assert load(copy).model.config.task == "embedding"
    edit_config(copy, architectures=["BertForPreTraining"])
    with pytest.raises(FwError, match="names no task; give one of token_classification"):
        load(copy)
    with pytest.raises(FwError, match="no labels for token_classification; give labels"):
        load(copy, task=TOKENS)
    with pytest.raises(FwError, match=r"lacks .*classifier/kernel.*; train it first, or give"):
        load(copy, task=TEXTS, labels=("a", "b"))

    key = jax.random.key(5)
    loaded = load(copy, EIGHT, task=TEXTS, labels=["a", "b"], key=key)
    heads = ("classifier", "pooler")
    assert loaded.fresh == tuple(f"{h}/{leaf}" for h in heads for leaf in ("bias", "kernel"))
    assert loaded.unused == ("embeddings.position_ids",)
    found, init = by_path(loaded.variables), by_path(loaded.model.init(key))
    for path, expected in encoder.items():
        np.testing.assert_array_equal(found[path], expected, err_msg=path)
    for path in loaded.fresh:
        np.testing.assert_allclose(found[f"params/{path}"], init[f"params/{path}"], rtol=2e-6)


def test_old_names(tagger, copy):
    edit_tensors(copy, old)
    loaded = load(copy)
    assert_same(loaded.variables, load(tagger).variables)
    assert loaded.unused == ("cls.predictions.bias",)


def test_several_files(tagger, copy):
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    places = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(tensors)}
    for place in set(places.values()):
        save_file({n: t for n, t in tensors.items() if places[n] == place}, copy / place)
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert_same(load(copy, EIGHT).variables, load(tagger).variables)

    name = min(places)
    first, second = sorted(set(places.values()))
    for place in (f"../{copy.name}/{first}", str(copy / first), "..", "a.bin", 7, ""):
        index.write_text(json.dumps({"weight_map": places | {name: place}}))
        with pytest.raises(FwError, match=r"index.json: tensor .*: expected the name of a .saf"):
            load(copy)
    index.write_text(json.dumps({"weight_map": places | {"x": second}}))
    with pytest.raises(FwError, match=f"expected tensor 'x' in {second}"):
        load(copy)
    (copy / second).unlink()
    with pytest.raises(FwError, match=f"names '{second}', which is not"):
        load(copy)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_dtypes_of_files(copy, tmp_path, dtype):
    edit_tensors(copy, lambda tensors: {n: t.astype(dtype) for n, t in tensors.items()})
    stored = load_file(copy / "model.safetensors")
    loaded = load(copy, EIGHT)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.variables)} == {np.dtype(np.float32)}
    kernel = loaded.variables["params"]["classifier"]["kernel"]
    np.testing.assert_array_equal(kernel, stored["classifier.weight"].T.astype(np.float32))

    with jax.enable_x64(True):
        hub.save(tmp_path / "again", load(copy, dtype=dtype))
    assert_same_tensors(tmp_path / "again", copy)
    name = np.dtype(dtype).name
    assert json.loads((tmp_path / "again/config.json").read_text())["dtype"] == name
    if dtype is np.float64:
        with pytest.raises(FwError, match="jax_enable_x64"):
            load(copy, dtype=dtype)


# --- labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "wanted", "kept"),
    [
        (("O", "B-x", "I-x"), ("O", "B-x", "I-x"), True),
        (("O", "B-x", "I-x"), ("O", "I-x", "B-x"), False),
        (("O", "B-x", "I-x"), ("O", "B-x"), False),
        (("LABEL_0", "LABEL_1", "LABEL_2"), ("O", "B-x", "I-x"), True),
        (("LABEL_0", "LABEL_1", "LABEL_2"), ("O", "B-x"), False),
    ],
)
def test_classifier_is_kept_for_its_labels(copy, tmp_path, named, wanted, kept):
    edit_config(copy, id2label=dict(enumerate(named)))
    assert load(copy).labels == named
    loaded = load(copy, labels=wanted, key=jax.random.key(0))
    assert loaded.labels == wanted
    assert loaded.fresh == (() if kept else ("classifier/bias", "classifier/kernel"))
    assert loaded.unused == (() if kept else ("classifier.bias", "classifier.weight"))
    hub.save(tmp_path / "again", loaded)
    again = load(tmp_path / "again")
    assert (again.labels, again.fresh) == (wanted, ())
    assert_same(again.variables, loaded.variables)


def test_two_unnamed_labels_are_the_default_of_the_format(tmp_path):
    folder = tmp_path / "model"
    hub.save(folder, make(TEXTS, labels=("no", "yes")))
    config = json.loads((folder / "config.json").read_text())
    del config["id2label"], config["label2id"]
    (folder / "config.json").write_text(json.dumps(config))
    assert load(folder).labels == ("LABEL_0", "LABEL_1")


def test_another_task_gets_another_classifier(copy):
    loaded = load(copy, task=TEXTS, labels=("O", "B-x", "I-x"), key=jax.random.key(0))
    assert "classifier/kernel" in loaded.fresh
    assert loaded.unused == ("classifier.bias", "classifier.weight")


# --- placement ------------------------------------------------------------------------------------


def test_born_sharded(tagger, monkeypatch):
    """No device gets more than its part, and no byte of the file is read twice."""
    reads = {}
    read = Tensor.read

    def counting(tensor, index):
        part = read(tensor, index)
        reads.setdefault(tensor.name, []).append(part.nbytes)
        return part

    monkeypatch.setattr(Tensor, "read", counting)
    loaded = load(tagger, EIGHT)
    names = jax.tree.leaves(loaded.model.axes, is_leaf=lambda node: type(node) is tuple)
    leaves = jax.tree.leaves(loaded.variables)
    for leaf, axes in zip(leaves, names, strict=True):
        ways = int(np.prod([CUTS.get(axis, 1) for axis in axes]))
        shards = [shard.data.nbytes for shard in leaf.addressable_shards]
        assert shards == [leaf.nbytes // ways] * 8, axes
    assert sorted(map(sum, reads.values())) == sorted(leaf.nbytes for leaf in leaves)


WORKER = """
import sys
import jax
from fw import hub
from fw.errors import FwError
from sharding import make_mesh, rules

rank, port, folder, out = int(sys.argv[1]), *sys.argv[2:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, rank)
loaded = hub.load(folder, mesh=make_mesh("data=2,fsdp=2,tensor=2"), rules=rules())
hub.save(out, loaded)
try:
    hub.save(out, loaded)
except FwError as error:
    assert ("exists already" in str(error)) == (rank == 0), error
    print("ok", rank)
"""


def test_two_processes_write_one_folder(tagger, tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), port, tagger, tmp_path / "out"],
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
    assert_same_tensors(tmp_path / "out", tagger)


# --- packing, with every parameter random ---------------------------------------------------------


@pytest.mark.parametrize("task", [TOKENS, TEXTS])
@pytest.mark.parametrize("seed", [0, 1])
def test_packed_equals_unpacked(task, seed):
    made, random = make(task, seed), np.random.default_rng(seed)
    lengths = random.integers(3, 20, 11)
    total, count = int(lengths.sum()), len(lengths)
    texts = Encoded(
        input_ids=random.integers(1, 60, total).astype(np.int32),
        words=np.arange(total, dtype=np.int32),
        labels=np.zeros(total if task == TOKENS else count, np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        record=np.arange(count, dtype=np.int32),
        records=count,
        pad=0,
        per_word=task == TOKENS,
    )

    def outputs(packed):
        rows = pack(texts, 40, max_texts=8, packed=packed)
        assert (rows.rows < count) == packed
        logits = jax.jit(made.model.apply)(made.variables, rows.arrays)[0]
        return (
            np.concatenate(unpack_words(rows, logits))
            if task == TOKENS
            else (unpack_texts(rows, logits))
        )

    np.testing.assert_allclose(outputs(True), outputs(False), rtol=1e-5, atol=1e-5)


# --- refusals -------------------------------------------------------------------------------------

KERNEL = "bert.encoder.layer.1.output.dense.weight"


def drop(*names):
    return lambda folder: edit_tensors(
        folder, lambda tensors: {n: t for n, t in tensors.items() if n not in names}
    )


def put_tensor(name, array):
    return lambda folder: edit_tensors(folder, lambda tensors: {**tensors, name: array})


def with_config(**changes):
    return lambda folder: edit_config(folder, **changes)


REFUSED = {
    "unknown type": (with_config(model_type="brt"), "model_type is 'brt'; expected one of bert"),
    "no type": (with_config(model_type=None), "model_type is None"),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: expected a JSON obj"),
    "a list": (lambda f: (f / "config.json").write_text("[1]"), "object, got list"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: cannot be read"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "found neither"),
    "pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "pickles are not read: pytorch_model.bin",
    ),
    "cut off": (lambda f: os.truncate(f / "model.safetensors", 4000), "model.safetensors: broken"),
    "empty": (lambda f: os.truncate(f / "model.safetensors", 0), "model.safetensors: broken"),
    "decoder": (with_config(is_decoder=True), "is_decoder True is not supported; expected False"),
    "relative": (with_config(position_embedding_type="relative_key"), "expected 'absolute'"),
    "relu": (with_config(hidden_act="relu"), "hidden_act 'relu' is not supported"),
    "text as size": (with_config(hidden_size="16"), "hidden_size is '16'; expected an integer"),
    "true as size": (with_config(num_hidden_layers=True), "num_hidden_layers is True; expected an"),
    "a flood of layers": (with_config(num_hidden_layers=10**9), "integer from 1 to 60"),
    "endless rate": (with_config(layer_norm_eps=float("inf")), "layer_norm_eps is inf; expected a"),
    "dropout of all": (with_config(hidden_dropout_prob=1.0), "hidden_dropout_prob 1.0 is no rate"),
    "gap in labels": (with_config(id2label={"0": "O", "2": "B-x"}), "id2label: expected names by"),
    "same labels": (with_config(id2label={"0": "O", "1": "O"}), "id2label: expected different"),
    "fewer labels": (
        with_config(id2label={"0": "O", "1": "B-x"}),
        r"'classifier.bias': expected shape \(2,\), as config.json says, found \(3,\)",
    ),
    "several labels a text": (
        with_config(architectures=["BertForSequenceClassification"], problem_type="several"),
        "problem_type 'several' is not supported; expected one of single_label_classification, ",
    ),
    "missing": (drop(KERNEL), f"tensor {KERNEL} is missing, which config.json calls for"),
    "too deep": (with_config(num_hidden_layers=7), "and 75 more are missing"),
    "too shallow": (with_config(num_hidden_layers=1), "and 11 more are there, which config.json"),
    "stranger": (put_tensor("bert.x", np.zeros(1)), "tensor bert.x is there"),
    "twice": (
        put_tensor("bert.embeddings.LayerNorm.gamma", np.zeros(16, np.float32)),
        "both 'bert.embeddings.LayerNorm.gamma' and 'bert.embeddings.LayerNorm.weight'",
    ),
    "shape": (
        put_tensor(KERNEL, np.zeros((32, 16), np.float32)),
        rf"safetensors: tensor '{KERNEL}': expected shape \(16, 32\), .*found \(32, 16\)",
    ),
    "integers": (put_tensor(KERNEL, np.zeros((16, 32), np.int8)), "found I8; a quantised model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(copy, case):
    break_it, message = REFUSED[case]
    break_it(copy)
    with pytest.raises(FwError, match=message):
        load(copy)


def test_a_head_that_the_file_lacks_needs_a_key(copy):
    drop("classifier.weight")(copy)
    with pytest.raises(FwError, match="lacks the parameters classifier/kernel"):
        load(copy)
    assert load(copy, key=jax.random.key(0)).fresh == ("classifier/kernel",)


# --- writing --------------------------------------------------------------------------------------


def test_save_keeps_what_it_does_not_know(copy, tmp_path):
    known = json.loads((copy / "config.json").read_text())
    extra = {"pad_token_id": 0, "_name_or_path": "someone/tagger", "use_cache": True}
    stale = {"auto_map": {"AutoModel": "code.py"}, "torch_dtype": "float16", "num_labels": 3}
    edit_config(copy, **extra, **stale)
    (copy / "vocab.txt").write_text("[PAD]\n")
    (copy / "code.py").write_text("")
    hub.save(tmp_path / "deep/er", load(copy))
    assert json.loads((tmp_path / "deep/er/config.json").read_text()) == known | extra
    written = {path.name for path in (tmp_path / "deep/er").iterdir()}
    assert written == {"config.json", "model.safetensors", "vocab.txt"}
    assert len({path.stat().st_mode for path in (tmp_path / "deep/er").iterdir()}) == 1

    (tmp_path / "words").mkdir()
    (tmp_path / "words/tokenizer.json").write_text("{}")
    hub.save(tmp_path / "other", load(copy), tokenizer_from=tmp_path / "words")
    written = {path.name for path in (tmp_path / "other").iterdir()}
    assert written == {"config.json", "model.safetensors", "tokenizer.json"}


def test_save_refuses(tagger, tmp_path):
    loaded = load(tagger)
    (tmp_path / "file").write_text("")
    for folder in (tagger, tmp_path / "file"):
        with pytest.raises(FwError, match="exists already"):
            hub.save(folder, loaded)
    with pytest.raises(FwError, match="cannot be written"):
        hub.save(tmp_path / "file/model", loaded)

    def refused(message, **changes):
        with pytest.raises(FwError, match=message):
            hub.save(tmp_path / "new", dataclasses.replace(loaded, **changes))

    kernels = loaded.variables["params"]
    refused("the model has 3 labels, got 2", labels=("a", "b"))
    refused("expected different, non-empty names", labels=("a", "a", "b"))
    refused(
        r"classifier/bias: expected \(3,\), got none",
        variables={"params": kernels | {"classifier": {}}, "state": {}},
    )
    refused(
        r"lora/a: expected no parameter, got \(2, 3\)",
        variables={"params": kernels | {"lora": {"a": np.zeros((2, 3))}}, "state": {}},
    )
    refused(
        "one floating dtype, got int8",
        variables=jax.tree.map(lambda x: x.astype(np.int8), loaded.variables),
    )
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_a_folder_is_whole_or_not_there(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "model") as part:
        (part / "config.json").write_text("{}")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


OF_OUR_OWN = {
    "unet": {"num_labels": 2, "num_channels": 3, "width": 4, "depth": 2, "norm": "none",
             "dropout": 0.2, "channels": ((3, 4, 2, 5, 4), (6, 8, 7, 5, 8), (9, 12))},
    "mlp": {"numbers": 2, "categories": (3, 4), "num_labels": 2, "hidden_size": 8,
            "num_hidden_layers": 3, "dropout": 0.2, "category_size": 5},
    "ft_transformer": {"numbers": 2, "categories": (3, 4), "num_labels": 2, "hidden_size": 8,
                       "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
                       "dropout": 0.2, "attention_dropout": 0.1, "layer_norm_eps": 1e-3},
    "dlrm": {"columns": ("user", "item"), "rows": (5, 7), "numbers": ("age",), "history": True,
             "size": 4, "bottom": (6,), "top": (5,), "dropout": 0.2},
    "two_tower": {"user_columns": ("user", "job"), "user_rows": (5, 7), "item_columns": ("item",),
                  "item_rows": (6,), "user_numbers": ("age",), "item_numbers": ("cost",),
                  "history": False, "size": 4, "hidden": (6,), "normalize": False,
                  "temperature": 0.5, "dropout": 0.2, "initializer_range": 0.1},
}  # fmt: skip
"""Every field of every family without a home at Hugging Face, none as it is by default."""


@pytest.mark.parametrize(
    "name", [name for name, family in FAMILIES.items() if isinstance(family.names, partial)]
)
def test_every_field_of_our_own_families_comes_back(tmp_path, name):
    family = FAMILIES[name]
    fields = [f for f in dataclasses.fields(family.config) if f.name not in family.own]  # type: ignore[arg-type]
    given = OF_OUR_OWN[name]
    assert all(given[f.name] != f.default for f in fields)
    task, labels = next(iter(family.architectures)), ("a", "b")[: given.get("num_labels", 0)]
    config = family.config(**given, task=task)
    where = {"mesh": make_mesh(ONE), "rules": rules()}
    made = hub.new(config, labels, key=jax.random.key(0), **where)
    hub.save(tmp_path / "model", made)
    again = load(tmp_path / "model")
    assert again.model.config == config
    assert_same(again.variables, made.variables)
