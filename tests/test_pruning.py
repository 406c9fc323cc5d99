"""A shrunk model is a model like any other: its config says its sizes, and its folder is read."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compress
from fw import hub, pruning, stages
from fw.cli import main
from fw.errors import FwError
from fw.models.bert import BertConfig, bert
from fw.models.distilbert import DistilBertConfig, distilbert
from fw.models.efficientnet import EfficientNetConfig, efficientnet
from fw.models.llama import LlamaConfig, llama
from fw.models.modernbert import ModernBertConfig, modernbert
from fw.models.resnet import ResNetConfig, resnet
from fw.models.unet import UNetConfig, unet
from fw.models.vit import vit
from fw.models.vit_config import Dinov2Config, ViTConfig
from fw.pruning import LAYERS, outputs, shrunk
from sharding import make_mesh, rules
from tests import tiny
from tests.marks import slow

pytestmark = pytest.mark.usefixtures("quickly_compiled")

IDS = jnp.arange(12, dtype=jnp.int32).reshape(2, 6) % 5
ONES = jnp.ones_like(IDS)
TEXT = {"input_ids": IDS, "segment_ids": ONES, "position_ids": IDS, "first": IDS[:, :1] * 0}
IMAGE = {"pixel_values": jnp.linspace(-1, 1, 2 * 8 * 8 * 3).reshape(2, 8, 8, 3)}
QUERY, MLP = f"{LAYERS}/attention/key/bias:1", f"{LAYERS}/down/kernel:1"
STACK = f"{LAYERS}/attention/key/bias:0"
DECODER = {QUERY: f"{LAYERS}/attention/key/kernel:2", MLP: f"{LAYERS}/mlp/down/kernel:1",
           STACK: f"{LAYERS}/attention/key/kernel:0"}  # fmt: skip
MODELS = {
    "bert": (bert(BertConfig(9, 16, 4, 4, 24, 2, "sequence_classification")), TEXT),
    "distilbert": (
        distilbert(DistilBertConfig(9, 16, 4, 4, 24, 2, "sequence_classification")), TEXT),
    "llama": (llama(LlamaConfig(9, 16, 4, 4, 24, num_key_value_heads=2)), TEXT),
    "vit": (
        vit(ViTConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=4,
                      num_attention_heads=4, num_labels=2, intermediate_size=24)), IMAGE),
}  # fmt: skip


def made(name):
    model, batch = MODELS[name]
    labels = () if name == "llama" else ("no", "yes")
    loaded = hub.Loaded(model, model.init(jax.random.key(3)), labels)
    return loaded, batch, compress.couplings(outputs(model), loaded.variables, batch)


def cut(name, found, parts):
    """What stays, by chance: so many of every layer's units."""
    rng, kept = np.random.default_rng(0), {}
    for dimension, left in parts.items():
        own = DECODER[dimension] if name == "llama" else dimension
        d = found.dimensions[own]
        chosen = [rng.permutation(d.units)[:left] for _ in range(d.layers or 1)]
        kept[own] = np.sort(np.stack(chosen), axis=1)
    return compress.shrink(found, kept)


def same(loaded, again, batch):
    got, want = (outputs(x.model)(x.variables, batch) for x in (again, loaded))
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("parts", [{MLP: 10, STACK: 2}, {QUERY: 1, MLP: 10, STACK: 3}])
def test_what_is_left_is_a_model_with_a_folder(name, parts, tmp_path):
    loaded, batch, found = made(name)
    transform = cut(name, found, parts)
    small = shrunk(loaded, transform)
    # The old functions on what is left, which have no sizes in them, say what it computes.
    want = outputs(loaded.model)(transform(loaded.variables)[0], batch)
    np.testing.assert_allclose(outputs(small.model)(small.variables, batch), want, atol=1e-6)
    hub.save(tmp_path / "small", small)
    again = hub.load(tmp_path / "small", mesh=make_mesh("data=1"), rules=rules(), scan=True)
    same(small, again, batch)
    written = json.loads((tmp_path / "small/config.json").read_text())
    fewer = QUERY in parts and name != "llama"  # which has a field for it
    assert ("head_size" in written) == fewer
    sizes = [written.get(key, written.get(other)) for key, other in (
        ("num_hidden_layers", "n_layers"), ("intermediate_size", "hidden_dim"))]  # fmt: skip
    assert sizes == [parts[STACK], parts[MLP]]


def by_chance(found, seed, keep=0.6):
    """Units of every dimension by chance, more than half of them."""
    rng = np.random.default_rng(seed)
    return {
        name: np.sort(np.stack([
            rng.permutation(d.units)[: max(1, round(keep * d.units))] for _ in range(d.layers or 1)
        ]), axis=1)
        for name, d in found.dimensions.items() if d.units > 1
    }  # fmt: skip


def bytes_of(loaded, folder):
    hub.save(folder, loaded)
    return (folder / "model.safetensors").read_bytes()


NETS = {
    "resnet": (resnet(ResNetConfig(8, (8, 12), (2, 1), 2, layer_type="basic", stem="small")),
               IMAGE),
    "bottlenecks": (resnet(ResNetConfig(8, (16, 24), (1, 2), 2)), IMAGE),
    "unet": (unet(UNetConfig(2, num_channels=3, width=4, depth=2)), IMAGE),
    "dinov2": (vit(Dinov2Config(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=3,
                                   num_attention_heads=4, num_labels=2)), IMAGE),
    "modernbert": (modernbert(ModernBertConfig(9, 16, 4, 4, 24, 2, "sequence_classification",
                                               max_position_embeddings=16, local_attention=8)),
                   TEXT),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("seed", [0, slow(1)])
def test_what_is_left_of_every_dimension_is_a_model_with_a_folder(name, seed, tmp_path):
    """Channels, streams, widths, heads and layers at once."""
    model, batch = NETS[name]
    loaded = hub.Loaded(model, model.init(jax.random.key(3)), ("no", "yes"))
    found = compress.couplings(outputs(model), loaded.variables, batch)
    kept = by_chance(found, seed)
    even = {n: np.ones((d.layers or 1, d.units)) for n, d in found.dimensions.items()}
    kept = pruning.tied(found, even, kept)
    transform = compress.shrink(found, kept)
    small = shrunk(loaded, transform)
    want = outputs(loaded.model)(transform(loaded.variables)[0], batch)
    np.testing.assert_allclose(outputs(small.model)(small.variables, batch), want, atol=1e-5)
    assert small.model.config != loaded.model.config
    first = bytes_of(small, tmp_path / "small")
    again = hub.load(tmp_path / "small", mesh=make_mesh("data=1"), rules=rules(), scan=True)
    same(small, again, batch)
    assert again.model.config == small.model.config
    assert bytes_of(again, tmp_path / "again") == first


def test_a_poolers_width_goes_with_the_states():
    """Both kept by their scores; where only what is pooled would go, the states do, too."""
    loaded, batch, found = made("bert")
    scores = compress.magnitude_scores(found, loaded.variables)
    for among, part in (("**/embeddings/**", 0.8), ("**/classifier/**", 0.99)):
        kept = compress.choose_units(found, scores, parameters=part, among=among)
        small = shrunk(loaded, compress.shrink(found, pruning.tied(found, scores, kept)))
        config = small.model.config
        assert config.hidden_size < 16 and config.head_size == 4
        assert small.variables["params"]["pooler"]["kernel"].shape == (config.hidden_size,) * 2
    assert outputs(small.model)(small.variables, batch).shape == (2, 1, 2)


def test_layers_stay_evenly():
    loaded, _, found = made("bert")
    kept = pruning.fewer_layers(found, 2)
    small = shrunk(loaded, compress.shrink(found, kept))
    assert small.model.config.num_hidden_layers == 2
    for path in ("up", "attention"):
        got, want = (x.variables["params"]["stack"]["layers"][path] for x in (small, loaded))
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[1::2]), got, want)
    with pytest.raises(ValueError, match="layers is 5; expected 1 to 4"):
        pruning.fewer_layers(found, 5)


def test_a_latency_is_met_by_what_was_measured():
    """With a clock of our own: of a tenth that never goes, and one that nothing meets."""
    loaded, _batch, found = made("bert")
    scores = compress.magnitude_scores(found, loaded.variables)
    choose = functools.partial(compress.choose_units, found, scores, among="**/layers/**")
    flops = found.flops(found.units)

    def clock(kept):
        left = found.units | {name: rows.shape[1] for name, rows in kept.items()}
        return 0.1 + 0.9 * found.flops(left) / flops

    kept = pruning.within_time(0.7, choose, clock)
    assert 0.6 < clock(kept) <= 0.7
    with pytest.raises(ValueError, match=r"latency is 0.2, but the least that was measured is 0"):
        pruning.within_time(0.2, choose, clock)


def test_it_quantises_like_any_other():
    loaded, batch, found = made("bert")
    small = shrunk(loaded, cut("bert", found, {MLP: 8, QUERY: 2}))
    params, report = compress.quantize("int8")(small.variables["params"])
    assert any(r.applied == "int8" for r in report)
    variables = {**small.variables, "params": params}
    got = compress.apply(outputs(small.model))(variables, batch)
    np.testing.assert_allclose(got, outputs(small.model)(small.variables, batch), atol=0.05)


def test_what_no_config_can_say_is_told():
    loaded, _, found = made("bert")
    width = {"params/embeddings/norm/bias:0": np.arange(8)[None]}
    with pytest.raises(FwError, match=r"classifier/kernel: \[16, 2\] is left.*; shrink both alike"):
        shrunk(loaded, compress.shrink(found, width))
    both = width | {"params/classifier/kernel:0": np.arange(8)[None]}
    small = shrunk(loaded, compress.shrink(found, both))
    assert (small.model.config.hidden_size, small.model.config.head_size) == (8, 4)
    with pytest.raises(FwError, match=r"w is no leaf|was it made for another model"):
        shrunk(loaded, compress.Shrink((compress.Cut("w", 0, 3, ((0,),)),)))
    net = efficientnet(EfficientNetConfig(num_labels=2))
    other = hub.Loaded(net, net.init(jax.random.key(0)), ("no", "yes"))
    cut = compress.Cut("params/classifier/bias", 0, 2, ((0,),))
    with pytest.raises(FwError, match=r"EfficientNet.* has no fields for what is left"):
        shrunk(other, compress.Shrink((cut,)))
    model = resnet(ResNetConfig(8, (12,), (1,), 2, layer_type="basic", stem="small"))
    other = hub.Loaded(model, model.init(jax.random.key(0)), ("no", "yes"))
    found = compress.couplings(outputs(model), other.variables, IMAGE)
    last = ("params/classifier/kernel", 0)
    name = next(name for name, d in found.dimensions.items() if last in d.members)
    with pytest.raises(FwError, match=r"shortcut/.*: is left, .* a projection between as many"):
        shrunk(other, compress.shrink(found, {name: np.arange(8)[None]}))


def fw(*words, status=0):
    assert main([str(word) for word in words]) == status


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A finished run."""
    root = tmp_path_factory.mktemp("world")
    where = ("--model", tiny.make_model(root / "model", layers=2, seed=1), "--data",
             tiny.make_reviews(root / "data"))  # fmt: skip
    common = ("finetune", "--task", "classify", "--length", "32", "--learning-rate", "1e-2")
    fw(*common, *where, "--run", root / "run", "--steps", "24")
    return root


def test_a_run_is_pruned_by_the_time_that_it_takes(world, tmp_path, capsys):
    """On a clock that tells FLOPs; of states' width too, which a pooler's must follow."""
    opened = stages.open_run(world / "run", scan=True)
    size = sum(x.size for x in jax.tree.leaves(opened.loaded.variables["params"]))

    def clock(loaded, adapt, found, batch, kept):
        small = shrunk(loaded, compress.shrink(found, kept))
        assert adapt(small.model).apply(small.variables, batch)[0].shape[-1] == 2
        return sum(x.size for x in jax.tree.leaves(small.variables["params"])) / size

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruning, "part_of_time", clock)
        fw("prune", world / "run", tmp_path / "small", "--latency", "0.8", "--among", "**",
           "--by", "magnitude")  # fmt: skip
    capsys.readouterr()
    small = hub.load(tmp_path / "small", mesh=make_mesh("data=1"), rules=rules())
    left = sum(x.size for x in jax.tree.leaves(small.variables["params"])) / size
    assert 0.6 < left <= 0.8


def test_time_is_measured_of_the_model_as_its_rows_want_it(world):
    """A part of it for fewer units; a model of images is given pixels by its processor."""
    opened = stages.open_run(world / "run", scan=True)
    batch = next(stages._training(opened, ""))
    found = compress.couplings(outputs(opened.model), opened.loaded.variables, batch)
    kept = pruning.fewer_layers(found, 1)
    part = pruning.part_of_time(opened.loaded, opened.processor.adapt, found, batch, kept)
    assert 0 < part < 3


@pytest.mark.parametrize("by", pruning.SCORES)
def test_a_run_is_pruned(world, tmp_path, capsys, by):
    fw("prune", world / "run", tmp_path / "small", "--flops", "0.75", "--by", by)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("params/stack/layers/")
    before, after = (float(part.split()[0].replace(",", "")) for part in said[-1].split(" → "))
    assert said[-1].endswith(f"FLOPs ({after / before:.3f})")
    assert after <= 0.75 * before
    where = {"mesh": make_mesh("data=1"), "rules": rules()}
    small, whole = (hub.load(f, **where) for f in (tmp_path / "small", world / "run/model"))
    count = [sum(x.size for x in jax.tree.leaves(m.variables)) for m in (small, whole)]
    assert count[0] < count[1]
    assert small.labels == whole.labels


@pytest.mark.slow
def test_what_is_left_learns_from_what_it_was(world, tmp_path, capsys):
    fw("prune", world / "run", tmp_path / "small", "--parameters", "0.9", "--multiple", "2")
    fw("finetune", "--task", "classify", "--model", tmp_path / "small", "--teacher", world / "run",
       "--data", world / "data", "--length", "32", "--learning-rate", "1e-2", "--steps", "24",
       "--run", tmp_path / "taught")  # fmt: skip
    fw("compress", tmp_path / "taught")
    assert "int8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "give parameters, flops or latency"),
        (("--flops", "0.5", "--layers", "1"), "give parameters, flops or latency"),
        (("--layers", "3"), "layers is 3; expected 1 to 2"),
        (
            ("--layers", "1", "--by", "magnitude"),
            "by, among and multiple are for the other budgets",
        ),
        (
            ("--by", "magnitude", "--latency", "2"),
            "latency is 2.0; expected the part that may stay",
        ),
        (("--by", "magnitude", "--parameters", "0.001"), "is the least part that can stay"),
        (
            ("--by", "magnitude", "--parameters", "0.5", "--among", "nothing"),
            "matches no dimension; nearest are",
        ),
    ],
)
def test_what_cannot_be_pruned_is_told(world, tmp_path, capsys, options, said):
    fw("prune", world / "run", tmp_path / "small", *options, status=1)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "small").exists()
