"""Training through the rounding: the function is that of the codes, on any mesh, and in runs."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compress
from compress.transform import named_leaves
from fw import qat, run, stages
from fw.cli import main
from fw.errors import FwError
from fw.models.bert import BertConfig, bert
from fw.models.resnet import ResNetConfig, resnet
from fw.recipe import Finetune
from fw.step import initial_state, make_step
from fw.tasks import cross_entropy
from sharding import make_mesh, put, rules, shardings
from tests import tiny
from tests.marks import fast_are

pytestmark = pytest.mark.usefixtures("quickly_compiled")

IDS = np.random.default_rng(0).integers(1, 30, (8, 8)).astype(np.int32)
PLACES = np.tile(np.arange(8, dtype=np.int32), (8, 1))
TEXT = {"input_ids": IDS, "segment_ids": np.ones_like(IDS), "labels": IDS % 3,
        "position_ids": PLACES}  # fmt: skip
IMAGE = {"pixel_values": np.random.default_rng(1).standard_normal((8, 8, 8, 4)).astype(np.float32),
         "labels": (np.arange(8) % 3).astype(np.int32)}  # fmt: skip
MODELS = {
    "bert": (bert(BertConfig(30, 32, 2, 2, 32, 3, "token_classification",
                             initializer_range=0.2)), TEXT),
    "layers apart": (bert(BertConfig(30, 32, 2, 2, 32, 3, "token_classification", scan=False,
                                     initializer_range=0.2)), TEXT),
    "resnet": (resnet(ResNetConfig(16, (16,), (1,), 3, num_channels=4, layer_type="basic",
                                   stem="small")), IMAGE),
}  # fmt: skip


@pytest.mark.parametrize("name", fast_are(["bert"], MODELS))
@pytest.mark.parametrize("format", qat.FORMATS)
def test_what_is_trained_is_what_the_codes_compute(name, format):
    """Away from where it begins: with weights and scales moved at random."""
    model, batch = MODELS[name]
    variables = model.init(jax.random.key(0))
    learning = qat.learned(model, variables["params"], format)
    rng = np.random.default_rng(2)
    params = jax.tree.map(
        lambda x: x + jnp.asarray(rng.standard_normal(x.shape) * 0.05, x.dtype), learning.params
    )
    got, _ = learning.model.apply({**variables, "params": params}, batch)
    small, report = learning.harden(params)
    own, before = (dict(named_leaves(tree)[0]) for tree in (small, variables["params"]))
    assert {*own} == {*before}
    assert sum(r.bytes_after for r in report) < 0.6 * sum(r.bytes_before for r in report)
    # Tables are rounded at the end; here they stay, to compare.
    kernels, _ = compress.harden()(qat._join(params, learning._schemes))
    want, _ = compress.apply(model.apply)({**variables, "params": kernels}, batch)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def train(mesh, format, steps, name="bert"):
    model, batch = MODELS[name]
    mesh, own = make_mesh(mesh), rules()
    variables = model.init(jax.random.key(0))
    learning = qat.learned(model, variables["params"], format)
    variables = {**variables, "params": learning.params}
    variables = jax.device_put(variables, shardings(learning.model.axes, variables, mesh, own))
    tx = optax.adam(3e-3)
    state = initial_state(variables, tx, mesh)
    step = make_step(learning.model, cross_entropy, tx, mesh=mesh, rules=own, precision="f32")
    losses = []
    for _ in range(steps):
        state, metrics = step(state, put(batch, mesh, own), {})
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state.variables["params"])


@pytest.mark.parametrize("format", fast_are(["int8"], qat.FORMATS))
def test_eight_devices_learn_as_one_and_learn(format):
    one, params = train("data=1", format, 20)
    eight, _ = train("data=2,fsdp=2,tensor=2", format, 3)
    np.testing.assert_allclose(eight, one[:3], rtol=2e-3)  # of a code that tips over here and there
    assert one[-1] < 0.8 * one[0]
    before = qat.learned(*(MODELS["bert"][0], MODELS["bert"][0].init(jax.random.key(0))["params"]),
                         format).params  # fmt: skip
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(params), strict=True):
        assert a.shape == b.shape
    moved = [np.abs(a["kernel"]["log_scale"] - b["kernel"]["log_scale"]).max()
             for a, b in ((before["classifier"], params["classifier"]),)]  # fmt: skip
    assert min(moved) > 1e-4


REFUSED = {
    "unknown": ({"qat": "int3"}, "qat 'int3' is unknown; choose one of int8"),
    "adapters": ({"qat": "int8", "lora": 2}, "qat is for models that are trained whole"),
    "zeros": ({"qat": "int8", "sparsity": 0.5}, "qat is for models that are trained whole"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_are_refused(case):
    options, said = REFUSED[case]
    with pytest.raises(FwError, match=said):
        Finetune(data="somewhere", **options)


def test_a_run_learns_codes_and_resumes_to_the_same_bits(tmp_path, capsys):
    """Beside a teacher; its variant is evaluated and exported like any other."""
    model, data = tiny.make_model(tmp_path / "model", layers=2, seed=1), tmp_path / "data"
    tiny.make_reviews(data)
    words = ("finetune", "--task", "classify", "--length", "32", "--learning-rate", "1e-2",
             "--precision", "f32", "--steps", "6", "--evaluate-every", "3", "--model", model,
             "--data", data)  # fmt: skip

    def fw(*words, status=0):
        assert main([str(w) for w in words]) == status

    fw(*words, "--run", tmp_path / "teacher")
    more = ("--teacher", tmp_path / "teacher", "--qat", "int8")
    fw(*words, "--run", tmp_path / "one", *more)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two/checkpoints/6")
    fw(*words, "--run", tmp_path / "two", *more, "--resume")
    for name in ("model/model.safetensors", "compressed/int8-learned/model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    capsys.readouterr()
    # What it says of itself is of these codes.
    told = run.read_json(tmp_path / "one/result.json")["splits"]["dev"]
    assert told["loss"] == pytest.approx(
        stages.evaluate_run(tmp_path / "one", "dev", name="int8-learned").figures["loss"], rel=1e-5
    )
    fw("eval", tmp_path / "one", "--variant", "int8-learned", "--split", "dev")
    fw("export", tmp_path / "one", "--variant", "int8-learned")
    manifest = json.loads((tmp_path / "one/artifact/manifest.json").read_text())
    assert "int8" in json.dumps(manifest)
    report = run.read_json(tmp_path / "one/compressed/int8-learned/report.json")["leaves"]
    applied = {leaf["path"]: leaf["applied"] for leaf in report}
    assert any(
        path.endswith("kernel") and said.startswith("int8") for path, said in applied.items()
    )
