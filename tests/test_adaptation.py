"""`fw finetune --lora`: what trains, where, and what a run with adapters leaves behind."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

import compress
from compress.transform import named_leaves
from fw import hub, run, stages
from fw.adaptation import LoraOptions, adapt, coded
from fw.cli import main
from fw.compression import tables
from fw.errors import FwError
from fw.models.bert import bert
from fw.optimizer import AdamW, optimizer
from fw.recipe import Finetune
from fw.step import initial_state, make_step
from fw.tasks import cross_entropy
from sharding import make_mesh, put, rules
from tests import tiny
from tests.marks import slow

pytestmark = pytest.mark.usefixtures("quickly_compiled")

ONE, EIGHT = "data=1", "data=2,fsdp=2,tensor=2"
COMMON = ("--task", "ner", "--length", "32", "--learning-rate", "1e-2", "--precision", "f32",
          "--steps", "12", "--evaluate-every", "4", "--log-every", "1")  # fmt: skip
KINDS = {
    "lora": ("--lora", "4", "--lora-alpha", "8"),
    "dora": ("--lora", "4", "--dora", "--lora-alpha", "4"),
    "eva": ("--lora", "4", "--lora-init", "eva"),
    "qlora": ("--lora", "4", "--lora-alpha", "8", "--lora-base", "int8"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    tiny.make_model(root / "model", layers=2, seed=1)
    tiny.make_ner(root / "ner")
    return root


def words(world, kind, folder, *more):
    where = ("--model", world / "model", "--data", world / "ner", "--run", folder)
    return [str(word) for word in ("finetune", *COMMON, *KINDS[kind], *where, *more)]


@pytest.fixture(scope="module")
def runs(world):
    made = {}

    def get(kind, mesh=ONE):
        if (kind, mesh) not in made:
            folder = world / f"{kind}-{mesh}"
            assert main(words(world, kind, folder, "--mesh", mesh)) == 0
            made[kind, mesh] = folder
        return made[kind, mesh]

    return get


def losses(folder):
    return [r["loss"] for r in run.metrics(folder) if r["kind"] == "train"]


def load(folder, mesh=ONE, **options):
    return hub.load(folder, mesh=make_mesh(mesh), rules=rules(), **options)


@pytest.mark.parametrize("kind", [slow("lora"), slow("eva"), slow("dora"), "qlora"])
def test_eight_devices_learn_as_one(runs, kind):
    one, eight = runs(kind), runs(kind, EIGHT)
    assert losses(one)[-1] < losses(one)[0]
    np.testing.assert_allclose(losses(eight), losses(one), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("how", [("--dora",), ("--lora-base", "int8")])
def test_a_decoder_learns_on_eight_devices_as_on_one(tmp_path, how):
    """Its losses are computed in a `shard_map`, with no logits anywhere, of a table in parts."""
    tiny.make_decoder(tmp_path / "decoder")
    talks, found = tiny.make_conversations(tmp_path / "talks"), []
    for mesh in (ONE, EIGHT):
        folder = tmp_path / f"run-{mesh}"
        options = ("--task", "lm", "--steps", "6", "--learning-rate", "1e-2", "--log-every", "1",
                   "--length", "32", "--precision", "f32", "--lora", "2", *how, "--remat",
                   "layer", "--mesh", mesh)  # fmt: skip
        where = ("--model", tmp_path / "decoder", "--data", talks, "--run", folder)
        assert main([str(word) for word in ("finetune", *options, *where)]) == 0
        found.append(losses(folder))
    assert found[0][-1] < found[0][0]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)


@pytest.mark.parametrize("kind", ["lora", slow("dora")])
def test_the_adapter_on_its_base_is_the_model(runs, world, kind):
    """What PEFT reads and what transformers reads are one function."""
    folder = runs(kind)
    labels = tuple(run.config(folder)["labels"])
    base = load(world / "model", task="token_classification", labels=labels, key=jax.random.key(0))
    merged = hub.merge(base, hub.load_adapter(folder / "adapter", base))
    want = load(folder / "model").variables["params"]
    for (path, a), (_, b) in zip(
        named_leaves(merged.variables["params"])[0], named_leaves(want)[0], strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6, err_msg=path)


def test_the_base_stays_as_it_was_but_for_thin_changes(runs, world):
    """A kernel's change has the rank; all else but the head is as the base's folder has it."""
    before, after = (load_file(f / "model.safetensors") for f in (
        world / "model", runs("lora") / "model"))  # fmt: skip
    changed = {n for n in before.keys() & after.keys() if not np.array_equal(before[n], after[n])}
    head = {"classifier.weight", "classifier.bias"}
    assert changed - head == {n for n in before if ".layer." in n and before[n].ndim == 2}
    for name in changed - head:
        values = np.linalg.svd(after[name] - before[name], compute_uv=False)
        assert values[0] > 1e-3 and np.all(values[4:] < 1e-5 * values[0]), name


def test_what_patterns_name_is_trained_and_saved(world, tmp_path):
    """Kernels by their names, and the pooler whole: what PEFT's file says of it is the model."""
    base = load(world / "model", scan=True)
    options = LoraOptions(lora=2, lora_on="**/value/kernel, **/up/kernel", lora_whole="pooler/*")
    adapted = adapt(base, options)
    params = adapted.trained.variables["params"]
    moved = jax.tree.map(lambda x: x + 0.1, params)
    assert {path for path, _ in named_leaves(params)[0]} == {
        "pooler/kernel", "pooler/bias", "stack/layers/attention/value/kernel/a",
        "stack/layers/attention/value/kernel/b", "stack/layers/up/kernel/a",
        "stack/layers/up/kernel/b",
    }  # fmt: skip
    assert not adapted.left
    fresh = dataclasses.replace(base, fresh=("classifier/kernel", "classifier/bias"))
    head = adapt(fresh, LoraOptions(lora=2, lora_whole="classifier/*"))
    assert head.share == adapt(fresh, LoraOptions(lora=2)).share
    tuned = adapted.tuned({**adapted.trained.variables, "params": moved})
    hub.save_adapter(tmp_path / "adapter", *hub.detach(tuned))
    again = hub.merge(base, hub.load_adapter(tmp_path / "adapter", base))
    want = hub.merge(tuned)
    for (path, a), (_, b) in zip(
        named_leaves(again.variables)[0], named_leaves(want.variables)[0], strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6, err_msg=path)


def test_checkpoints_hold_what_is_trained(runs):
    folder = runs("lora")
    state = ocp.StandardCheckpointer().restore(folder / "checkpoints" / "12" / "default")
    sizes = [sum(x.size for x in jax.tree.leaves(state["variables"]["params"]))]
    whole = sum(x.size for x in load_file(folder / "model" / "model.safetensors").values())
    share = run.config(folder)["trainable_share"]
    assert sizes[0] / (whole + sizes[0] - 16 * 5 - 5) == pytest.approx(share, rel=1e-6)
    # Adam's two moments, and its counters.
    moments = sum(x.size for x in jax.tree.leaves(state["optimizer"]) if x.ndim)
    assert moments == 2 * sizes[0]


def test_resumed_it_ends_with_the_same_bits(runs, world, tmp_path):
    folder = shutil.copytree(runs("qlora"), tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "12")
    assert main(words(world, "qlora", folder, "--resume")) == 0
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        assert (folder / name).read_bytes() == (runs("qlora") / name).read_bytes()


def test_the_stages_after_it_need_not_know(runs, tmp_path):
    folder = shutil.copytree(runs("lora"), tmp_path / "run")
    assert "int8" in stages.compress_run(folder, "int8")
    assert (stages.export_run(folder, name="int8") / "manifest.json").is_file()


@pytest.mark.parametrize("dora", [False, True])
def test_steps_are_those_of_the_sum_written_out(world, dora):
    """Against W + s·A·B as one array, m / n of its columns, and optax over A, B and m."""
    loaded = load(world / "model", scan=False)
    still = dataclasses.replace(
        loaded.model.config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    loaded = dataclasses.replace(loaded, model=bert(still))
    mesh, layout, adam = make_mesh(ONE), rules(), AdamW(learning_rate=1e-2, clip=0)
    adapted = adapt(loaded, LoraOptions(lora=2, lora_alpha=3.0, dora=dora))
    rng = np.random.default_rng(0)
    batch = {
        "input_ids": rng.integers(4, 30, (4, 8), np.int32),
        "segment_ids": np.ones((4, 8), np.int32),
        "position_ids": np.tile(np.arange(8, dtype=np.int32), (4, 1)),
        "token_type_ids": np.zeros((4, 8), np.int32),
        "first": np.zeros((4, 1), np.int32),
        "labels": rng.integers(0, 2, (4, 1), np.int32),
    }
    batch = put(batch, mesh, layout)
    # Copies: the first step is donated what they are made of.
    trained = {
        path: {"a": leaf.a, "b": leaf.b, **({"magnitude": leaf.magnitude} if dora else {})}
        for path, leaf in named_leaves(
            adapted.tuned(adapted.trained.variables).variables["params"]
        )[0]
        if isinstance(leaf, compress.LoRA)
    }
    trained = jax.tree.map(jnp.copy, trained)
    tx = optimizer(adam, 5)
    step = make_step(
        adapted.trained.model, cross_entropy, tx, mesh=mesh, rules=layout, precision="f32"
    )
    state = initial_state(adapted.trained.variables, tx, mesh)
    got = []
    for _ in range(5):
        state, metrics = step(state, batch, adapted.frozen)
        got.append(float(metrics["loss"]))

    def function(trained, batch):
        flat = {}
        for path, w in named_leaves(loaded.variables["params"])[0]:
            flat[path] = w
            if own := trained.get(path):
                flat[path] = new = w + 1.5 * own["a"] @ own["b"]
                if dora:
                    norm = jax.lax.stop_gradient(jnp.linalg.norm(new, axis=0))
                    flat[path] = new * own["magnitude"] / norm
        params = jax.tree.unflatten(named_leaves(loaded.variables["params"])[1], flat.values())
        outputs, _ = loaded.model.apply(
            {"params": params, "state": {}}, batch, train=True, key=jax.random.key(0)
        )
        total, weight = cross_entropy(outputs, batch)
        return total / weight

    moments, want = tx.init(trained), []
    with jax.default_matmul_precision("highest"), jax.numpy_dtype_promotion("standard"):
        for _ in range(5):
            loss, grads = jax.value_and_grad(function)(trained, batch)
            updates, moments = tx.update(grads, moments, trained)
            trained = optax.apply_updates(trained, updates)
            want.append(float(loss))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_what_stays_as_it_was_is_told(world):
    """Kernels of 16 inputs take no blocks of 32."""
    adapted = adapt(load(world / "model", scan=True), LoraOptions(lora=2, lora_base="mxfp4"))
    assert any("kernel: stays floats: mxfp4 is not for its shape" in line for line in adapted.left)
    assert adapt(load(world / "model"), LoraOptions(lora=2)).left == ()


@pytest.mark.parametrize("format", ["int8", "mxfp4"])
@pytest.mark.parametrize("scan", [False, True])
def test_codes_as_they_are_read_are_those_of_the_whole(world, format, scan):
    """A stack is coded layer by layer, a parameter at a time; no floats stay of what is coded."""
    options = LoraOptions(lora=2, lora_base=format)
    where = {"mesh": EIGHT, "scan": scan}
    read = load(world / "model", become=coded(options), **where)
    plain = load(world / "model", **where).variables["params"]
    both = (compress.Scheme(name, activations="float") for name in (format, "int8"))
    kernels, rows = compress.quantize(next(both)), tables(plain, next(both))
    want, _ = compress.chain(kernels, compress.quantize(rows))(plain)
    for got in (read.variables["params"], adapt(read, options).frozen):
        for (path, a), (_, b) in zip(named_leaves(got)[0], named_leaves(want)[0], strict=True):
            assert type(a) is type(b), path
            for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
                np.testing.assert_array_equal(x, y, err_msg=path)
                assert x.sharding.is_equivalent_to(y.sharding, x.ndim), path
    assert not adapt(load(world / "model"), options)._base.variables


@pytest.mark.parametrize("scan", [False, True])
def test_codes_without_adapters_are_written_as_what_they_stand_for(world, tmp_path, scan):
    """Of kernels thinner than the rank."""
    loaded = load(world / "model", scan=scan, become=coded(LoraOptions(lora=2, lora_base="int8")))
    hub.save(tmp_path / "plain", loaded)
    again = load(tmp_path / "plain", scan=scan).variables["params"]
    for (path, a), (_, b) in zip(
        named_leaves(again)[0], named_leaves(loaded.variables["params"])[0], strict=True
    ):
        np.testing.assert_array_equal(a, b.dense() if compress.is_compressed(b) else b, path)


def test_a_base_with_nan_and_several_adapters_are_refused(world, tmp_path):
    loaded = load(world / "model", scan=False)
    params, _ = compress.lora(2)(loaded.variables["params"])
    both = {"params": compress.stack_adapters([params, params]), "state": {}}
    with pytest.raises(FwError, match="kernel: has several adapters; detach all but one"):
        hub.save(tmp_path / "model", dataclasses.replace(loaded, variables=both))
    broken = jax.tree.map(lambda x: x.at[0].set(jnp.nan), loaded.variables)
    broken = dataclasses.replace(loaded, variables=broken)
    for base in ("", "int8"):
        with pytest.raises(FwError, match="holds NaN or infinity"):
            adapt(broken, LoraOptions(lora=2, lora_base=base))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora": -1}, "lora is -1; expected a rank"),
        ({"dora": True}, "dora is for adapters; give --lora a rank"),
        ({"lora": 4, "lora_base": "int3"}, "lora_base 'int3' is unknown; choose one of"),
        ({"lora": 4, "lora_alpha": -1.0}, "lora_alpha is -1.0; expected 0 or more"),
        ({"lora": 4, "lora_on": "a, b", "lora_whole": "b"}, "'b' is in lora_on and in lora_whole"),
        ({"lora_init": "eva"}, "lora_init is for adapters; give --lora a rank"),
        ({"lora": 4, "lora_init": "pissa"}, "lora_init 'pissa' is unknown; choose one of uniform"),
        ({"lora": 4, "lora_init": "eva", "lora_base": "nf4"}, "leave lora_base or it away"),
        ({"lora": 4, "task": "image", "model": "resnet"}, "lora is for pretrained models"),
    ],
)
def test_options_that_are_refused(options, said):
    with pytest.raises(FwError, match=said):
        Finetune(data="somewhere", **options)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--lora", "99"), "lora: rule '**/kernel' can be applied to no leaf"),
        (("--lora-base", "nf4"), "lora: the model has no kernel that nf4 is for"),
        (("--mesh", "pipe=2"), "lora: layers in stages are not adapted"),
        (("--lora-on", "**/kernels"), "rule '**/kernels' matches no path; nearest are"),
        (("--lora-whole", "**/scale"), "is trained whole, but PEFT keeps heads only in that way"),
    ],
)
def test_what_cannot_be_adapted_is_told_before_there_is_a_run(world, tmp_path, capsys, more, said):
    assert main(words(world, "lora", tmp_path / "run", *more)) == 1
    assert said in capsys.readouterr().err
    assert not Path(tmp_path / "run").exists()
