"""Vision models: transformers' numbers both ways, batch norm as torch has it and on every mesh."""

import functools
import json
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import sklearn.metrics
from safetensors.numpy import load_file, save_file

from fw import hub, metrics
from fw.errors import FwError
from fw.model import Model
from fw.models import efficientnet as lite
from fw.models.resnet import ResNetConfig, resnet
from fw.models.vision import BatchNorm, batch_norm
from fw.models.vit import vit
from fw.models.vit_config import Dinov2Config, ViTConfig
from fw.step import initial_state, make_step
from fw.tasks import make_task
from fw.tasks.image_classification import image_classification
from fw.tasks.task import cross_entropy
from sharding import gather, make_mesh, put, rules, scope, shardings
from tests.test_hub import assert_same_tensors

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT.parent / "shared" / "golden"
ONE, EIGHT = "data=1", "data=2,fsdp=2,tensor=2"


def normal(seed, *shape, dtype: Any = np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


# --- the numbers of transformers ------------------------------------------------------------------


@pytest.fixture(params=["vit_image_classification", "resnet_image_classification"])
def golden(request):
    folder = GOLDEN / request.param
    if not folder.is_dir():
        pytest.skip(f"no reference models in {GOLDEN}")
    return folder


@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize("spec", [ONE, "data=8", "fsdp=8", "data=4,tensor=2", EIGHT])
def test_golden_both_ways(golden, spec, tmp_path):
    mesh = make_mesh(spec)
    loaded = hub.load(golden, mesh=mesh, rules=rules())
    io = np.load(golden / "io.npz")
    # Eight times the rows: the meshes cut the batch in up to eight.
    pixels = np.concatenate([io["in_pixel_values"].transpose(0, 2, 3, 1)] * 8)
    with scope(mesh, rules()):
        batch = put({"pixel_values": pixels}, mesh, rules())
        logits = np.asarray(jax.jit(loaded.model.apply)(loaded.variables, batch)[0])
    expected = np.concatenate([io["out_logits"]] * 8)
    np.testing.assert_allclose(logits, expected, atol=2e-5, rtol=1e-4)
    assert (loaded.fresh, loaded.unused) == ((), ())
    hub.save(tmp_path / "again", loaded)
    assert_same_tensors(tmp_path / "again", golden)
    assert (tmp_path / "again/config.json").read_bytes() == (golden / "config.json").read_bytes()


# --- batch norm -----------------------------------------------------------------------------------


def batch_norm_np(x, scale, bias, epsilon):
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (x - mean) / np.sqrt(var + epsilon) * scale + bias


def test_batch_norm_far_from_zero_and_its_derivative():
    x = 3000 + normal(0, 4, 5, 6, 3)
    scale, bias = normal(1, 3), normal(2, 3)
    y, mean, var = jax.jit(batch_norm, static_argnums=3)(x, scale, bias, 1e-5)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(var, exact.var((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(y, batch_norm_np(exact, scale, bias, 1e-5), atol=2e-3)
    with jax.enable_x64(True):
        point: Any = tuple(normal(*s, dtype=np.float64) for s in ((0, 3, 4, 5, 2), (1, 2), (2, 2)))
        g = normal(9, 3, 4, 5, 2, dtype=np.float64)
        loss = lambda *at: (batch_norm(*at, 1e-5)[0] * g).sum()  # noqa: E731
        exact: Any = lambda x, scale, bias: (batch_norm_np(x, scale, bias, 1e-5) * g).sum()  # noqa: E731
        for i, grad in enumerate(jax.grad(loss, (0, 1, 2))(*point)):
            along, step = normal(20 + i, *grad.shape, dtype=np.float64), 1e-6
            ends = [exact(*point[:i], point[i] + s * along, *point[i + 1 :]) for s in (step, -step)]
            np.testing.assert_allclose((grad * along).sum(), (ends[0] - ends[1]) / 2 / step, 1e-7)


SMALL = ResNetConfig(8, (8, 16), (1, 1), num_labels=4, layer_type="basic", stem="small")
STEPS = 20


@functools.cache
def trained(spec, accumulate=1):
    """The variables after some steps, and their losses."""
    model, random, key = resnet(SMALL), np.random.default_rng(0), jax.random.key(0)
    mesh, layout, tx = make_mesh(spec), rules(), optax.sgd(0.05, momentum=0.9)
    places = shardings(model.axes, jax.eval_shape(model.init, key), mesh, layout)
    # Drawn on one device: what is compared are the steps.
    state = initial_state(jax.device_put(model.init(key), places), tx, mesh)
    step = make_step(model, cross_entropy, tx, mesh=mesh, rules=layout, accumulate=accumulate)
    losses, classes = [], random.normal(1, 2, (4, 8, 8, 3)).astype(np.float32)
    for _ in range(STEPS):
        labels = random.integers(0, 4, 16).astype(np.int32)
        pixels = classes[labels] + random.normal(size=(16, 8, 8, 3)).astype(np.float32)
        state, figures = step(state, put({"pixel_values": pixels, "labels": labels}, mesh, layout))
        losses.append(float(figures["loss"]))
    return gather(state.variables), losses


@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize(
    ("spec", "accumulate"),
    [
        (EIGHT, 2),
        pytest.param("data=8", 1, marks=pytest.mark.slow),
        pytest.param("data=2,fsdp=4", 4, marks=pytest.mark.slow),
        pytest.param("data=4,tensor=2", 1, marks=pytest.mark.slow),
    ],
)
def test_batch_norm_sees_the_global_batch(spec, accumulate):
    (one, losses), (eight, others) = trained(ONE), trained(spec, accumulate)
    assert losses[-1] < 0.7 * losses[0]  # something was learnt
    np.testing.assert_allclose(others, losses, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, eight)
    assert int(eight["state"]["stem"]["norm"]["count"]) == STEPS


def test_running_averages_are_those_of_torch():
    """mean ← 0.9 mean + 0.1 batch's, and the variance by n - 1."""
    x = jnp.asarray(2 + 3 * normal(5, 6, 4, 4, 3))
    module = BatchNorm(3)
    module(x, True)
    rows = np.asarray(x, np.float64).reshape(-1, 3)
    np.testing.assert_allclose(module.mean[...], 0.1 * rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(module.var[...], 0.9 + 0.1 * rows.var(0, ddof=1), rtol=1e-5)
    with pytest.raises(FwError, match="one number a channel"):
        module(x[:1, :1, :1], True)


# --- the task -------------------------------------------------------------------------------------


def test_top_five_and_the_report_are_those_of_scikit_learn():
    names = tuple("abcdefgh")
    task, random = make_task("image_classification", names), np.random.default_rng(3)
    logits = random.integers(-3, 4, (60, 8)).astype(np.float32)  # many are equal
    labels = random.integers(0, 8, 60).astype(np.int32)
    given = np.where(np.arange(60) % 7 == 0, -1, labels).astype(np.int32)
    parts = [
        jax.jit(task.count)(logits[rows], {"labels": given[rows]})
        for rows in (slice(0, 25), slice(25, 60))
    ]
    figures = task.summarise(metrics.merge(*parts)).figures
    own = given >= 0
    expected = sklearn.metrics.top_k_accuracy_score(labels[own], logits[own], k=5, labels=range(8))
    np.testing.assert_allclose(figures["top_5_accuracy"], expected, rtol=1e-7)
    predicted = logits[own].argmax(1)
    accuracy = sklearn.metrics.accuracy_score(labels[own], predicted)
    assert figures["accuracy"] == accuracy
    macro = sklearn.metrics.f1_score(labels[own], predicted, average="macro")
    np.testing.assert_allclose(figures["macro_f1"], macro)
    every: Any = None
    f1 = sklearn.metrics.f1_score(labels[own], predicted, average=every)
    np.testing.assert_allclose([figures["report"][name]["f1-score"] for name in names], f1)
    few = make_task("image_classification", ("no", "yes"))
    assert "top_5" not in few.count(jnp.asarray(logits[:, :2]), {"labels": jnp.asarray(given % 2)})


def test_mixed_and_smoothed_loss():
    logits, random = normal(1, 6, 4), np.random.default_rng(1)
    labels, others = (random.integers(0, 4, 6).astype(np.int32) for _ in range(2))
    labels[2] = -1
    share = random.uniform(size=6).astype(np.float32)
    log_p = np.log(scipy.special.softmax(logits.astype(np.float64), axis=1))
    goal = 0.9 * (share[:, None] * np.eye(4)[labels] + (1 - share[:, None]) * np.eye(4)[others])
    expected = -np.sum((goal + 0.1 / 4) * log_p, axis=1)[labels >= 0].sum()
    batch = {"labels": labels, "other_labels": others, "share": share}
    task = image_classification(tuple("abcd"), smoothing=0.1)
    total, weight = jax.jit(task.loss)(logits, batch)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert weight == 5


# --- other families -------------------------------------------------------------------------------


@pytest.mark.usefixtures("quickly_compiled")
def test_convolutions_channel_by_channel_are_cut_over_tensor(monkeypatch):
    monkeypatch.setattr(lite, "STAGES", ((3, 1, 1, 16, 1), (5, 2, 6, 24, 2)))
    model = lite.efficientnet(lite.EfficientNetConfig(4, image_size=15))
    variables, pixels = model.init(jax.random.key(0)), normal(0, 4, 15, 15, 3)
    one = jax.jit(model.apply)(variables, {"pixel_values": pixels})[0]
    mesh = make_mesh("data=2,tensor=4")
    places = shardings(model.axes, jax.eval_shape(lambda: variables), mesh, rules())
    placed = jax.device_put(variables, places)
    kernel = placed["params"]["blocks"]["1"]["depthwise"]["conv"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (5, 5, 1, 24)
    with scope(mesh, rules()):
        batch = put({"pixel_values": pixels}, mesh, rules())
        eight = jax.jit(model.apply)(placed, batch)[0]
    np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-6)


@dataclass(frozen=True)
class OwnConfig:
    sizes: tuple[tuple[str, int], ...]
    num_labels: int
    task: str = "tabular_classification"
    seed: int = field(default=0, metadata={"unbounded": True, "signed": True})
    names: tuple[str, ...] | None = None

    model_type: ClassVar[str] = "own"


def own(config):
    sizes = dict(config.sizes)
    axes = {"params": {"head": {"kernel": ("embed", "labels")}}, "state": {"seen": ()}}

    def init(key):
        kernel = jax.random.normal(key, (sizes["in"], config.num_labels))
        return {"params": {"head": {"kernel": kernel}}, "state": {"seen": jnp.int32(5)}}

    return Model(config, init, lambda variables, batch, **_: (None, variables), axes)


def test_a_family_of_our_own_in_a_folder(tmp_path, monkeypatch):
    family = hub.own_family(OwnConfig, own, ["tabular_classification"], head=("head.",))
    known = {**hub.FAMILIES, "own": family}
    for place in ("fw.hub.families.FAMILIES", "fw.hub.config.FAMILIES"):
        monkeypatch.setattr(place, known)
    config = OwnConfig((("in", 8), ("out", 2)), 3, seed=-(2**31), names=("a", "b"))
    model, where = own(config), {"mesh": make_mesh("fsdp=8"), "rules": rules()}
    made = hub.Loaded(model, model.init(jax.random.key(1)), ("x", "y", "z"))
    hub.save(tmp_path / "own", made)
    stored = load_file(tmp_path / "own/model.safetensors")
    assert {name: tensor.dtype.name for name, tensor in stored.items()} == {
        "head.kernel": "float32", "state.seen": "int64",
    }  # fmt: skip
    loaded = hub.load(tmp_path / "own", **where)
    assert (loaded.model.config, loaded.labels) == (config, made.labels)
    assert loaded.variables["state"]["seen"] == 5
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, made.variables)
    other = hub.load(tmp_path / "own", **where, labels=("p", "q"), key=jax.random.key(0))
    assert other.fresh == ("head/kernel",)

    path = tmp_path / "own/config.json"
    whole = json.loads(path.read_text())
    for changes, message in (
        ({"sizes": [["in", 10**9]]}, r"sizes is \[\['in', 1000000000\]\]; expected a list, each a"),
        ({"sizes": [["in"]]}, "expected a list, each a list of a string and an integer from 1 to"),
        ({"sizes": 8}, "sizes is 8; expected a list"),
        ({"seed": 2**40}, "seed is 1099511627776; expected an integer from -2147483648"),
        ({"names": "ab"}, "names is 'ab'; expected a list, each a string"),
    ):
        path.write_text(json.dumps(whole | changes))
        with pytest.raises(FwError, match=message):
            hub.load(tmp_path / "own", **where)
    with pytest.raises(FwError, match="no layers to compute again"):
        hub.load(tmp_path / "own", **where, remat="layer")


REFUSED = {
    "hidden_act": ({"hidden_act": "silu"}, "hidden_act 'silu' is unknown"),
    "other stages": ({"depths": [1, 2, 1]}, "3 depths for 4 hidden_sizes"),
    "deeper": ({"depths": [1, 2, 1, 60]}, "missing, which config.json calls for"),
    "a flood": (
        {"depths": [1, 2, 1, 10**9]},
        r"depths is \[.*\]; expected a list, each an integer",
    ),
    "no list": ({"hidden_sizes": 8}, "hidden_sizes is 8; expected a list"),
    "a layer": ({"layer_type": "wide"}, "layer_type 'wide' is unknown"),
}


DINO = partial(
    Dinov2Config, image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1,
    num_attention_heads=2, num_labels=3,
)  # fmt: skip
VIT = partial(ViTConfig, **DINO.keywords, intermediate_size=16)
RES = partial(replace, SMALL)


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (DINO, {"patch_size": 0}), (DINO, {"num_attention_heads": 0}), (DINO, {"mlp_ratio": 0}),
        (DINO, {"drop_path_rate": 1.0}), (DINO, {"image_size": (8, -8)}),
        (VIT, {"hidden_size": 0}), (VIT, {"intermediate_size": 0}), (VIT, {"num_labels": 0}),
        (RES, {"embedding_size": 0}), (RES, {"hidden_sizes": (8, 0)}), (RES, {"depths": (1, -1)}),
        (lite.EfficientNetConfig, {"num_labels": 0}),
        (partial(lite.EfficientNetConfig, 3), {"image_size": 0}),
    ],
)  # fmt: skip
def test_sizes_that_make_no_model_are_refused(make, change):
    [name] = change
    with pytest.raises(FwError, match=rf"{name} .* expected [01] or more"):
        make(**change)


def test_images_of_another_size_have_at_least_a_patch():
    model = vit(DINO())
    variables = jax.eval_shape(model.init, jax.random.key(0))
    call = lambda *size: jax.eval_shape(  # noqa: E731
        model.apply, variables, {"pixel_values": jnp.zeros((1, *size, 3))}
    )[0]
    assert call(4, 12).shape == (1, 3)
    with pytest.raises(FwError, match="images of 3 x 12; expected at least a patch, 4 x 4"):
        call(3, 12)


@pytest.fixture
def copy(tmp_path):
    folder = GOLDEN / "resnet_image_classification"
    if not folder.is_dir():
        pytest.skip(f"no reference models in {GOLDEN}")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    return tmp_path


@pytest.mark.parametrize("case", REFUSED)
def test_refused(copy, case):
    changes, message = REFUSED[case]
    whole = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(whole | changes))
    with pytest.raises(FwError, match=message):
        hub.load(copy, mesh=make_mesh(ONE), rules=rules())


def test_counts_are_integers_of_32_bits(copy):
    tensors = load_file(copy / "model.safetensors")
    name = "resnet.embedder.embedder.normalization.num_batches_tracked"
    for count, text in (
        (np.int64(2**40), "does not fit int32"),
        (np.float32(1), "expected I64 or"),
    ):
        save_file(tensors | {name: np.asarray(count)}, copy / "model.safetensors")
        with pytest.raises(FwError, match=text):
            hub.load(copy, mesh=make_mesh(ONE), rules=rules())
