"""An artifact gives what the model gave, in a process that does not know the model; damage shows.

The references are the model itself on one unpadded text at a time, and plain Python around it.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from jax import export as jax_export

import compress
from fw import export, precision
from fw.data import load_tokenizer
from fw.errors import FwError
from fw.export import command, function, manifest
from fw.export.load import CHUNK
from fw.model import Model
from fw.models.bert import BertConfig, bert
from tests.marks import fast_are, slow

pytestmark = pytest.mark.usefixtures("quickly_compiled")

ROOT = Path(__file__).parents[1]
LENGTH, LAYERS = 48, 1
TASKS = ("token_classification", "sequence_classification")
LABELS = {
    "token_classification": ("O", "B-LOC", "I-LOC", "B-PER", "I-PER"),
    "sequence_classification": ("negative", "neutral", "positive"),
}
WORDS = "ada love ##lace wrote to char ##les in london par ##is her note ##s . , ' é 北 京 @ # u s"
FORMS = ("f32", "bf16", "int8", "int4")
FILES = manifest.file_names(TASKS[0])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS.split()]
    (folder / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"strip_accents": false}')
    return load_tokenizer(folder)


def arguments(task, form, tokenizer):
    config = {"num_labels": len(LABELS[task]), "task": task, "max_position_embeddings": 64}
    model = bert(BertConfig(40, 32, LAYERS, 2, 64, initializer_range=0.3, **config))
    variables = model.init(jax.random.key(7))
    report = ()
    if form in ("int8", "int4"):
        scheme = compress.Scheme(form, per=16 if form == "int4" else None)
        params, report = compress.quantize({"**/kernel": scheme})(variables["params"])
        variables = variables | {"params": params}
    return {
        "model": model,
        "variables": variables,
        "task": task,
        "labels": LABELS[task],
        "processor": export.Text(tokenizer, LENGTH),
        "precision": "bf16" if form == "bf16" else "f32",
        "report": report,
    }


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """A function of task and form: what was saved, and where; each is saved once."""
    made = {}

    def get(task, form="f32"):
        if (task, form) not in made:
            given = arguments(task, form, tokenizer)
            folder = tmp_path_factory.mktemp("saved") / "artifact"
            made[task, form] = SimpleNamespace(
                **given,
                folder=export.save(folder, **given),
                artifact=export.load(folder),
                jitted=jax.jit(given["model"].apply),
            )
        return made[task, form]

    return get


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved("token_classification").folder, tmp_path / "artifact")
    return tmp_path / "artifact"


def resign(folder, **changes):
    """Give a changed folder a manifest that agrees with it, as a forger would."""
    old = json.loads((folder / manifest.NAME).read_text())
    kept = {k: v for k, v in old.items() if k not in ("format", "files", "sha256")}
    manifest.write(folder, kept | changes)


def random_batch(task, rows, length, rng):
    cut = rng.integers(1, length, (rows, 1))
    place = np.arange(length)
    first = place < cut
    batch = {
        "input_ids": rng.integers(0, 28, (rows, length)),
        "segment_ids": np.where(first, 1, 2),
        "position_ids": np.where(first, place, place - cut),
    }
    if task == "sequence_classification":
        batch["first"] = np.concatenate([np.zeros_like(cut), cut], axis=1)
    return {name: x.astype(np.int32) for name, x in batch.items()}


# --- the function ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "form"),
    fast_are([(TASKS[0], "int8"), (TASKS[1], "f32")], itertools.product(TASKS, FORMS)),
)
def test_logits_are_the_models_own_for_any_number_of_rows(saved, task, form):
    it, rng = saved(task, form), np.random.default_rng(3)
    apply = compress.apply(it.model.apply)
    if form == "bf16":
        apply = precision.apply(apply, "bf16")
    for rows, length in ((1, 5), (3, LENGTH), (16, 17)):
        batch = random_batch(task, rows, length, rng)
        want, _ = jax.jit(apply)(it.variables, batch)
        got = it.artifact.logits(batch)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, atol=1e-5)
        assert np.std(want) > 0.1


def test_the_platforms_are_four_and_nothing_of_this_machine_is_inside(saved):
    folder = saved("token_classification").folder
    data = (folder / manifest.STABLEHLO).read_bytes()
    exported = jax_export.deserialize(bytearray(data))
    assert set(exported.platforms) == {"cpu", "cuda", "rocm", "tpu"}
    assert exported.platforms == tuple(saved("token_classification").artifact.manifest["platforms"])
    assert b".py" not in data
    assert len(data) < 100_000  # no weights in it


def test_equal_arguments_give_equal_bytes(saved, tokenizer, tmp_path):
    it = saved("sequence_classification", "int8")
    again = export.save(
        tmp_path / "artifact", **arguments("sequence_classification", "int8", tokenizer)
    )
    for name in (manifest.NAME, *manifest.file_names(it.task)):
        assert (again / name).read_bytes() == (it.folder / name).read_bytes(), name


def test_int8_weights_are_int8_in_the_file_and_in_the_compiled_dots(saved):
    it = saved("token_classification", "int8")
    with safetensors.safe_open(it.folder / manifest.WEIGHTS, "np") as file:
        forms = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    kernels = {name: form for name, form in forms.items() if "/kernel:int8" in name}
    assert set(kernels.values()) == {"I8"}
    assert not any(name.endswith("/kernel") for name in forms)
    assert len(kernels) == LAYERS * 6 + 1
    formats = it.artifact.manifest["compression"]["formats"]
    assert sorted(formats) == sorted(name.partition(":")[0] for name in kernels)
    assert len(it.artifact.manifest["compression"]["report"]) == len(kernels)

    batch = random_batch(it.task, 4, 16, np.random.default_rng(0))
    text = it.artifact.call.lower(it.artifact.weights, batch).compile().as_text()
    dots = re.findall(r"= s32\[\S+ dot\(%(\S+), %(\S+)\)", text)
    assert len(dots) == len(kernels)
    for name in {n for pair in dots for n in pair}:
        assert re.search(rf"%{re.escape(name)} = s8\[", text), name


def test_int4_weights_are_two_to_a_byte_in_the_file_and_become_floats_inside_of_products(saved):
    it = saved("token_classification", "int4")
    weights = it.artifact.weights
    codes = {n: x for n, x in weights.items() if ":int4:" in n}
    assert len(codes) == LAYERS * 6 + 1
    formats = it.artifact.manifest["compression"]["formats"]
    assert {formats[n.partition(":")[0]] for n in codes} == {"int4:float32:pack=-2"}
    report = {r["path"]: r for r in it.artifact.manifest["compression"]["report"]}
    for name, x in codes.items():
        path = name.partition(":")[0]
        told = report[path.removeprefix("params/")]
        assert x.dtype == np.uint8 and 2 * x.size == np.prod(told["shape"])
        assert told["bytes_after"] == x.nbytes + weights[f"{path}:scale"].nbytes
    batch = random_batch(it.task, 4, 16, np.random.default_rng(0))
    text = it.artifact.call.lower(it.artifact.weights, batch).as_text()
    # An array of all codes, one to a byte, is nowhere: only halves of it are.
    whole = {f"{told['shape'][0]}x{told['shape'][1]}xi8>" for told in report.values()}
    assert "ui8" in text and not any(shape in text for shape in whole)


def test_bf16_kernels_are_stored_as_what_they_are_rounded_to(saved):
    f32, bf16 = (saved("token_classification", form) for form in ("f32", "bf16"))
    sizes = [it.artifact.manifest["compression"]["bytes"] for it in (f32, bf16)]
    kernels = 4 * (LAYERS * (4 * 32 * 32 + 2 * 32 * 64) + 32 * 5)
    assert sizes[0] - sizes[1] == kernels / 2
    dtypes = {x.dtype for n, x in bf16.artifact.weights.items() if n.endswith("kernel")}
    assert dtypes == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("form", fast_are(["int8"], FORMS))
def test_an_artifact_has_all_that_it_takes_to_export_it_again(saved, tmp_path, form):
    it = saved("sequence_classification", form)
    described = it.artifact.manifest["model"]
    assert described["config_class"] == "fw.models.bert.BertConfig"
    again = export.save(
        tmp_path / "again",
        model=bert(BertConfig(**described["config"])),
        variables=export.load_variables(it.folder),
        processor=export.Text.of(it.folder / "tokenizer.json", LENGTH),
        **{name: getattr(it, name) for name in ("task", "labels", "precision")},
    )
    for name in (manifest.WEIGHTS, manifest.STABLEHLO, "tokenizer.json"):
        assert (again / name).read_bytes() == (it.folder / name).read_bytes(), name
    batch = random_batch(it.task, 2, 9, np.random.default_rng(5))
    np.testing.assert_allclose(
        export.load(again).logits(batch), it.artifact.logits(batch), atol=1e-5
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segment_ids": None}, "expected first, input_ids, position_ids, segment_ids; got"),
        ({"labels": np.zeros((2, 9), np.int32)}, "expected .*; got .*labels"),
        ({"input_ids": np.zeros((2, 9), np.int64)}, r"input_ids: expected int32\[b, t\]"),
        ({"input_ids": np.zeros(9, np.int32)}, r"input_ids: expected int32\[b, t\]"),
        ({"input_ids": np.zeros((2, 8), np.int32)}, "t is 9, but 8 before"),
        ({"first": np.zeros((3, 1), np.int32)}, "b is 2, but 3 before"),
        ({"first": np.zeros((2, 0), np.int32)}, "not empty"),
    ],
)
def test_a_batch_of_another_form_is_refused(saved, change, message):
    batch = random_batch("sequence_classification", 2, 9, np.random.default_rng(0)) | change
    batch = {name: x for name, x in batch.items() if x is not None}
    with pytest.raises(FwError, match=message):
        saved("sequence_classification").artifact.logits(batch)


def test_rows_are_at_most_as_long_as_was_said(saved):
    batch = random_batch("token_classification", 1, LENGTH + 1, np.random.default_rng(0))
    with pytest.raises(FwError, match=f"expected at most {LENGTH}"):
        saved("token_classification").artifact.logits(batch)


# --- a process of its own ----------------------------------------------------------------------

FRESH = """
import json, sys
import fw.export
artifact = fw.export.load(sys.argv[1])
answers = list(artifact.predict(["ada lovelace wrote to charles .", "london", ""]))
print(json.dumps([answers, [m for m in ("fw.models", "fw.model", "quax", "compress", "optax")
                            if m in sys.modules]]))
"""

ALONE = """
import json, os, sys
os.chdir(sys.argv[1])
sys.path.insert(0, "")
import safetensors.flax
batch = safetensors.flax.load_file("golden.safetensors")
want = batch.pop("logits")
exec(json.load(open("manifest.json"))["run"]["without fw"])
assert "fw" not in sys.modules
print(float(abs(logits - want).max()))
"""


def run_python(code, *args, **options):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, args)],
        **({"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120} | options),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("task", fast_are(TASKS[:1], TASKS))
def test_a_fresh_process_answers_alike_without_any_code_of_the_model(saved, task):
    it = saved(task, "int8")
    answers, imported = run_python(FRESH, it.folder)
    assert imported == []
    assert answers == list(it.artifact.predict(["ada lovelace wrote to charles .", "london", ""]))


@pytest.mark.parametrize("form", [slow("bf16"), "int8"])
def test_the_manifest_says_how_to_run_it_without_fw(saved, form, tmp_path):
    error = run_python(ALONE, saved("sequence_classification", form).folder, cwd=tmp_path)
    assert error < 1e-5


# --- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [0, 0.5, -1])
@pytest.mark.parametrize("name", (manifest.NAME, *FILES))
def test_one_changed_byte_in_any_file_is_found(copy, name, where):
    data = bytearray((copy / name).read_bytes())
    data[int(where * len(data)) if where > 0 else where] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(FwError, match=re.escape(str(copy / name))):
        export.load(copy)


@pytest.mark.parametrize("name", (manifest.NAME, *FILES))
def test_a_missing_short_or_linked_file_is_named(copy, tmp_path, name):
    path, aside = copy / name, tmp_path / "aside"
    path.rename(aside)
    for spoil in (
        lambda: None,
        lambda: path.symlink_to(aside),
        lambda: (path.unlink(), path.write_bytes(aside.read_bytes()[:-1])),
    ):
        spoil()
        with pytest.raises(FwError, match=re.escape(str(path))):
            export.load(copy, verify=False)


def test_a_file_too_many_is_named(copy):
    (copy / "hook.py").write_text("print('never run')")
    with pytest.raises(FwError, match=r"hook\.py: is not part of the artifact"):
        export.load(copy)


def test_an_edited_manifest_is_found_even_where_its_json_stays_the_same(copy):
    path = copy / manifest.NAME
    whole = json.loads(path.read_text())
    for text in (
        json.dumps(whole | {"labels": whole["labels"][::-1]}, indent=1) + "\n",
        json.dumps(whole),
        '{"format": 2, ' + path.read_text()[1:],
        "[1]",
        '{"a": ' * 100_000,
    ):
        path.write_text(text)
        with pytest.raises(FwError, match=r"manifest\.json: (altered|damaged)"):
            export.load(copy)


def forge(folder, edit):
    """Edit the manifest and give it a digest that is right."""
    whole = json.loads((folder / manifest.NAME).read_text())
    edit(whole)
    del whole["sha256"]
    whole["sha256"] = hashlib.sha256(manifest._render(whole)).hexdigest()
    (folder / manifest.NAME).write_bytes(manifest._render(whole))


FORGERIES = {
    "another format": (lambda m: m.update(format=1), r"manifest\.json: format 1; this fw reads 3"),
    "no format": (lambda m: m.pop("format"), r"manifest\.json: format None"),
    "a path upwards": (
        lambda m: m["files"].update({"../secret": {"bytes": 1, "sha256": ""}}),
        r"manifest\.json: 'files': '\.\./secret' is unexpected",
    ),
    "a path instead": (
        lambda m: m["files"].update({"/etc/passwd": m["files"].pop("tokenizer.json")}),
        r"manifest\.json: 'files': '/etc/passwd' is unexpected",
    ),
    "a file left out": (
        lambda m: m["files"].pop("model.safetensors"),
        r"manifest\.json: 'files': 'model\.safetensors' is unexpected or missing",
    ),
    "a digest of a number": (
        lambda m: m["files"]["tokenizer.json"].update(sha256=0),
        r"manifest\.json: files: tokenizer\.json: expected 'bytes' and 'sha256'",
    ),
    "another platform": (lambda m: m.update(platforms=["tpu"]), "made for tpu; this is cpu"),
    "a newer jax": (
        lambda m: m["versions"].update(calling_convention=999),
        r"calling convention 999; jax .* runs",
    ),
    "fewer labels": (lambda m: m["labels"].pop(), r"model\.stablehlo: gives 5 classes"),
    "no labels": (lambda m: m.update(labels=[]), "'labels': expected a list"),
    "another task": (
        lambda m: m.update(task="sequence_classification"),
        r"model\.stablehlo: takes and gives something else",
    ),
    "no task": (lambda m: m.update(task="ner"), r"manifest\.json: expected a task of"),
    "another signature": (
        lambda m: m["signature"]["weights"].popitem(),
        r"model\.stablehlo: takes and gives something else",
    ),
    "a text for a number": (
        lambda m: m["processor"].update(length="48"),
        "'length': expected a number above 0",
    ),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_manifest_is_refused(copy, name):
    edit, message = FORGERIES[name]
    forge(copy, edit)
    with pytest.raises(FwError, match=message):
        export.load(copy, verify=False)


def test_a_manifest_of_monstrous_size_is_not_read(copy):
    with (copy / manifest.NAME).open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(FwError, match=r"manifest\.json: has 1099511627776 bytes"):
        export.load(copy)


def test_weights_that_give_other_answers_are_found_by_the_golden_batch(copy, saved):
    weights = dict(saved("token_classification").artifact.weights)
    weights["params/classifier/bias"] += 1e-3
    safetensors.numpy.save_file(
        {n: np.asarray(x) for n, x in weights.items()}, copy / manifest.WEIGHTS
    )
    resign(copy)
    with pytest.raises(FwError, match=r"golden\.safetensors: .* off by 0\.001, at most 0\.0001"):
        export.load(copy)
    assert export.load(copy, verify=False).labels == LABELS["token_classification"]
    del weights["params/classifier/bias"]
    safetensors.numpy.save_file(
        {n: np.asarray(x) for n, x in weights.items()}, copy / manifest.WEIGHTS
    )
    resign(copy)
    with pytest.raises(FwError, match=r"model\.safetensors: its tensors are not those"):
        export.load(copy)


def test_a_function_that_calls_into_jaxlib_is_refused(copy, saved, monkeypatch):
    it = saved("token_classification")

    def outside(weights, batch):
        matrix = weights["params/stack/layers/up/kernel"][0, :5, :5]
        shape = (*batch["input_ids"].shape, 5)
        return jnp.zeros(shape) + jnp.linalg.eigh(matrix + matrix.T)[0]

    weights = {n: np.asarray(x) for n, x in it.artifact.weights.items()}
    monkeypatch.setattr(function, "PLATFORMS", ("cpu",))
    traced = function.trace(jax.jit(outside), weights, it.processor.specs(it.task))
    (copy / manifest.STABLEHLO).write_bytes(traced.serialize())
    resign(copy)
    with pytest.raises(FwError, match=r"model\.stablehlo: calls lapack\S*, .* outside StableHLO"):
        export.load(copy, verify=False)


# --- what is not saved -------------------------------------------------------------------------


def lengthen(arguments, length):
    arguments.update(processor=dataclasses.replace(arguments["processor"], length=length))


def nan(variables):
    return jax.tree.map(lambda x: x * jnp.nan, variables)


REFUSED = {
    "labels": (lambda a: a.update(labels=("a", "b")), "the model has 3 classes; got 2"),
    "twice a label": (lambda a: a.update(labels=("a", "b", "b")), "names, each once"),
    "task": (lambda a: a.update(task="ner"), "task: expected one of token_classification"),
    "tags": (lambda a: a.update(task="token_classification"), "'negative' is no tag"),
    "length": (lambda a: lengthen(a, 65), "at most the model's 64 positions; got 65"),
    "no length": (lambda a: lengthen(a, 2), "more than the 2 special tokens"),
    "precision": (lambda a: a.update(precision="fp4"), "precision 'fp4' is unknown"),
    "processor": (lambda a: a.update(processor="a"), "processor: expected Text for"),
    "NaN": (lambda a: a.update(variables=nan(a["variables"])), "gives NaN or infinity"),
    "no examples": (lambda a: a.update(examples=[" "]), "examples: expected a text with a word"),
    "another vocabulary": (
        lambda a: a.update(model=bert(dataclasses.replace(a["model"].config, vocab_size=9))),
        "ids up to 27, but the model's vocabulary ends at 8",
    ),
}


@pytest.fixture
def given(tokenizer):
    return arguments("sequence_classification", "f32", tokenizer)


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_do_not_fit_leave_nothing_behind(given, tmp_path, name):
    REFUSED[name][0](given)
    with pytest.raises(FwError, match=REFUSED[name][1]):
        export.save(tmp_path / "artifact", **given)
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_is_replaced_whole_and_nothing_else_is(given, copy, tmp_path):
    before = (copy / manifest.NAME).read_bytes()
    with pytest.raises(FwError, match="NaN"):
        export.save(copy, **given | {"variables": nan(given["variables"])})
    assert (copy / manifest.NAME).read_bytes() == before
    export.save(copy, **given)
    assert export.load(copy).task == "sequence_classification"
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]

    (tmp_path / "artifact").rename(tmp_path / "run")
    (tmp_path / "run" / manifest.NAME).unlink()
    with pytest.raises(FwError, match="is there and no artifact, so it is not replaced"):
        export.save(tmp_path / "run", **given)
    (tmp_path / "file").touch()
    with pytest.raises(FwError, match=r"file/artifact: cannot be written: .*Not a directory"):
        export.save(
            tmp_path / "file" / "artifact", **given | {"variables": nan(given["variables"])}
        )
    with pytest.raises(FwError, match=r"run: is a run, not an artifact; give .*run/artifact"):
        (tmp_path / "run" / "artifact").mkdir()
        (tmp_path / "run" / "artifact" / manifest.NAME).touch()
        export.load(tmp_path / "run")


def test_a_function_that_calls_into_jaxlib_is_not_saved(given, tmp_path):
    def apply(variables, batch, *, key=None, train=False):
        square = variables["params"]["w"] @ variables["params"]["w"].T
        return jnp.zeros((*batch["first"].shape, 3)) + jnp.linalg.qr(square)[1][0], variables

    variables = {"params": {"w": jnp.ones((3, 4))}, "state": {}}
    given |= {"model": Model(None, lambda key: variables, apply, {}), "variables": variables}
    with pytest.raises(FwError, match=r"the model: calls .*, which is outside StableHLO"):
        export.save(tmp_path / "artifact", **given)


def test_examples_and_provenance_are_recorded(given, tmp_path):
    provenance = {"run": Path("runs/a"), "seed": np.int64(3)}
    export.save(
        tmp_path / "a", **given | {"examples": ["ada wrote", "to"], "provenance": provenance}
    )
    artifact = export.load(tmp_path / "a")
    assert artifact.manifest["provenance"] == {"run": "runs/a", "seed": 3}
    golden = safetensors.numpy.load_file(tmp_path / "a" / manifest.GOLDEN)
    ids = golden["input_ids"]
    assert ids.shape == (1, 32)
    assert np.count_nonzero(golden["segment_ids"]) == 4 + 3
    np.testing.assert_allclose(
        artifact.logits({n: x for n, x in golden.items() if n != "logits"}),
        golden["logits"],
        atol=1e-5,
    )


# --- answers -----------------------------------------------------------------------------------


def one_by_one(it, ids):
    """The model's logits for one text, alone in a batch without padding."""
    ids = np.array([ids], np.int32)
    ones = np.ones_like(ids)
    batch = {"input_ids": ids, "segment_ids": ones, "position_ids": np.cumsum(ones, 1) - ones}
    if it.task == "sequence_classification":
        batch["first"] = np.zeros((1, 1), np.int32)
    return np.asarray(it.jitted(it.variables, batch)[0][0])


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def entities(text, words, scores):
    """Plain conlleval: an entity goes on as long as I- of its type follows."""
    found = []
    for (start, end), row in zip(words, scores, strict=True):
        tag, score = LABELS["token_classification"][row.argmax()], row.max()
        if tag == "O":
            open_type = None
            continue
        if tag[0] == "I" and found and open_type == tag[2:]:
            found[-1]["end"] = end
            found[-1]["score"].append(score)
        else:
            found.append({"type": tag[2:], "start": start, "end": end, "score": [score]})
        open_type = tag[2:]
    return [e | {"text": text[e["start"] : e["end"]]} for e in found]


def close(got, want):
    assert [(e["type"], e["text"], e["start"], e["end"]) for e in got] == [
        (e["type"], e["text"], e["start"], e["end"]) for e in want
    ]
    for a, b in zip(got, want, strict=True):
        assert a["score"] == pytest.approx(np.mean(b["score"]), abs=1e-5)


def random_texts(rng, count, longest):
    """Words of one or several pieces, unknown ones, punctuation, accents, and odd white space."""
    words = ["Ada", "Lovelace", "wrote", "Charles", "London", "Paris", "notes", "é", "北京", "U.S."]
    words += ["@ada", "note's", "xyz", "\u200b", "e\u0301", "🙂"]
    spaces = [" ", " ", " ", "  ", "\t", "\n", ", "]
    return [
        "".join(rng.choice(words) + rng.choice(spaces) for _ in range(rng.integers(0, longest)))
        for _ in range(count)
    ]


@pytest.mark.parametrize("batch_size", [3, 32])
def test_entities_are_those_of_each_text_alone(saved, tokenizer, batch_size):
    it, texts = saved("token_classification"), random_texts(np.random.default_rng(1), 30, 8)
    answers = list(it.artifact.predict(iter(texts), batch_size))
    assert [a["text"] for a in answers] == texts
    total = 0
    for text, answer in zip(texts, answers, strict=True):
        encoding = tokenizer.fast.encode(text)
        assert len(encoding.ids) <= LENGTH
        logits = one_by_one(it, encoding.ids)
        words, scores = {}, {}
        for i, word in enumerate(encoding.word_ids):
            if word is not None:
                start, end = encoding.offsets[i]
                words[word] = (words.get(word, (start, end))[0], end)
                scores.setdefault(word, softmax(logits[i]))
        want = entities(text, words.values(), scores.values())
        close(answer["entities"], want)
        total += len(want)
    assert total > 30


def test_a_text_longer_than_a_row_goes_on_in_the_next(saved):
    it, rng = saved("token_classification"), np.random.default_rng(2)
    words = rng.choice(["ada", "wrote", "to", "london", "note"], 3 * LENGTH).tolist()
    ids = {w: it.processor.tokenizer.fast.token_to_id(w) for w in words}
    room = LENGTH - 2
    rows = [words[i : i + room] for i in range(0, len(words), room)]
    scores = [softmax(one_by_one(it, [2, *map(ids.get, row), 3])[1:-1]) for row in rows]
    text = " ".join(words)
    places = [m.span() for m in re.finditer(r"\S+", text)]
    want = entities(text, places, np.concatenate(scores))
    assert any(e["end"] > len(" ".join(rows[0])) for e in want)
    for given in (text, words):
        ((answer),) = it.artifact.predict([given])
        assert answer["text"] == text
        close(answer["entities"], want)


def test_given_words_are_taken_as_they_are(saved, tokenizer):
    it, words = saved("token_classification"), ["U.S.", "@ada", "北京", "London"]
    encoding = tokenizer.fast.encode(words, is_pretokenized=True)
    logits = one_by_one(it, encoding.ids)
    first = [encoding.word_ids.index(i) for i in range(len(words))]
    text = "U.S. @ada 北京 London"
    spans = [m.span() for m in re.finditer(r"\S+", text)]
    (answer,) = it.artifact.predict([tuple(words)])
    assert answer["text"] == text
    close(answer["entities"], entities(text, spans, softmax(logits[first])))


def test_labels_are_those_of_each_text_alone_and_cuts_are_told(saved, tokenizer):
    it = saved("sequence_classification")
    texts = [*random_texts(np.random.default_rng(4), 12, 30), "ada " * (LENGTH - 2), "ada " * 50]
    answers = list(it.artifact.predict(texts, 4))
    assert [a["truncated"] for a in answers[-2:]] == [False, True]
    assert np.std([a["score"] for a in answers]) > 0.01
    for text, answer in zip(texts, answers, strict=True):
        ids = tokenizer.fast.encode(text).ids
        assert answer["truncated"] == (len(ids) > LENGTH)
        scores = softmax(one_by_one(it, [*ids[:-1][: LENGTH - 1], ids[-1]])[0])
        assert answer["text"] == text
        assert answer["label"] == it.labels[scores.argmax()]
        assert answer["score"] == max(answer["scores"].values())
        np.testing.assert_allclose(list(answer["scores"].values()), scores, atol=1e-5)


def test_texts_are_answered_as_they_come(saved):
    it = saved("sequence_classification")
    taken = []
    endless = (taken.append(i) or f"ada {'wrote ' * (i % 5)}" for i in range(10**9))
    answers = it.artifact.predict(endless)
    assert next(answers)["text"] == "ada "
    assert len(taken) == CHUNK


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("token_classification", 3, "text 2: expected a text or a list of words; got int"),
        ("token_classification", ["ada", " "], "text 2: expected words that are texts and not"),
        ("token_classification", ["ada", None], "text 2: expected words that are texts"),
        ("sequence_classification", ["ada"], "text 2: expected a text; got list"),
        ("sequence_classification", "ada \ud800", "half a surrogate pair at character 5"),
    ],
)
def test_what_is_no_text_is_refused_by_its_number(saved, task, text, message):
    with pytest.raises(FwError, match=message):
        list(saved(task).artifact.predict(["ada", text]))


def test_one_text_is_not_taken_for_many(saved):
    artifact = saved("sequence_classification").artifact
    with pytest.raises(FwError, match=r"predict\(\[text\]\)"):
        list(artifact.predict("ada"))
    with pytest.raises(FwError, match="batch_size: expected at least one"):
        list(artifact.predict(["ada"], 0))
    assert list(artifact.predict([])) == []


# --- the command -------------------------------------------------------------------------------


def run_command(*args):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers(required=True))
    parsed = parser.parse_args(["predict", *map(str, args)])
    return parsed.command(parsed)


def test_texts_and_files_of_either_kind_give_the_same_lines(saved, tmp_path, capsys):
    it, texts = saved("token_classification"), ["ada wrote .", "london, paris"]
    want = list(it.artifact.predict(texts))
    lines, plain = tmp_path / "in.jsonl", tmp_path / "in.txt"
    lines.write_text("".join(json.dumps({"text": t, "id": 1}) + "\n" for t in texts))
    plain.write_bytes("\ufeffada wrote .\r\n\nlondon, paris".encode())
    for args in (texts, ["-f", lines], ["--file", plain], ["-f", plain, "--read", "text"]):
        assert run_command(it.folder, *args) == 0
        assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == want
    out = tmp_path / "out.jsonl"
    assert run_command(it.folder, "-f", lines, "-o", out, "--batch-size", 1) == 0
    assert [a["text"] for a in map(json.loads, out.read_text().splitlines())] == texts
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "ada"}\n\n{"text": 3}\n', r"a\.jsonl:3: 'text': expected a text"),
        ("a.jsonl", b'{"text": "ada"}\n{"text"\n', r"a\.jsonl:2: expected a JSON object"),
        ("a.jsonl", b'["ada"]\n', r"a\.jsonl:1: expected {\"text\": …} or"),
        ("a.jsonl", b'{"text": "a", "tokens": ["a"]}\n', r"a\.jsonl:1: expected {\"text\": …} or"),
        ("a.jsonl", b'{"tokens": "ada"}\n', r"a\.jsonl:1: 'tokens': expected a list of words"),
        ("a.jsonl", b'{"tokens": ["ada", ""]}\n', r"a\.jsonl:1: expected words .* not blank"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl:1: .* half a surrogate pair"),
        ("a.txt", b"ada\n\xff\n", r"a\.txt:2: expected UTF-8"),
        ("a.txt", b"\n \n", r"a\.txt: expected a text a line; found none"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_written(saved, tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    folder = saved("token_classification").folder
    with pytest.raises(FwError, match=message):
        run_command(folder, "-f", tmp_path / name, "-o", tmp_path / "out.jsonl")
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_the_command_wants_texts_from_one_place(saved, tmp_path):
    folder = saved("token_classification").folder
    for args in ([], ["ada", "-f", "-"]):
        with pytest.raises(FwError, match="give either things to answer or --file"):
            run_command(folder, *args)
    with pytest.raises(FwError, match=r"nowhere/out: cannot be written: No such file"):
        run_command(folder, "ada", "-o", tmp_path / "nowhere" / "out")
    for output in (tmp_path, "."):
        with pytest.raises(FwError, match="is a folder; give --output the file to write"):
            run_command(folder, "ada", "-o", output)


def test_a_pipe_comes_in_and_people_get_text(saved):
    """A real process, its standard output a terminal, its standard input a pipe."""
    it = saved("sequence_classification")
    code = (
        "import argparse, sys; from fw.export import command; p = argparse.ArgumentParser(); "
        "command.add_parser(p.add_subparsers()); a = p.parse_args(); sys.exit(a.command(a))"
    )
    args = [sys.executable, "-c", code, "predict", it.folder, "-f", "-", "--read", "jsonl"]
    screen, terminal = pty.openpty()
    try:
        process = subprocess.run(
            args,
            cwd=ROOT,
            stdout=terminal,
            stderr=subprocess.PIPE,
            input=b'{"text": "ada wrote"}\n{"text": "%s"}\n' % (b"ada " * 60),
            check=False,
            timeout=120,
        )
        assert process.returncode == 0, process.stderr.decode()
        shown = os.read(screen, 1 << 16).decode().split("\r\n")
    finally:
        os.close(screen)
        os.close(terminal)
    first, second = it.artifact.predict(["ada wrote", "ada " * 60])
    assert shown[0] == f"{first['label']} {first['score']:.2f}  ada wrote"
    assert shown[1].startswith(second["label"])
    assert shown[1].endswith("(cut for length)")
