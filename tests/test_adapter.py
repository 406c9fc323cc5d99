"""fw.hub.adapter: a merged adapter is what numpy makes of the files; what is saved is what was."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import compress
import fw
from fw import hub
from fw.errors import FwError
from fw.hub import FAMILIES
from fw.models.bert import BertConfig
from fw.models.llama import LlamaConfig
from fw.models.modernbert import ModernBertConfig
from sharding import make_mesh, put, rules, scope

BASE = "base_model.model."
ONE, EIGHT = "data=1", "data=2,fsdp=2,tensor=2"
SIZES = (60, 16, 2, 2, 32)
TOKENS, TEXTS = "token_classification", "sequence_classification"
MODELS: dict[str, Any] = {
    "llama": LlamaConfig(*SIZES, num_key_value_heads=2),
    "bert": BertConfig(*SIZES, num_labels=2, task=TOKENS),
    "modernbert": ModernBertConfig(
        *SIZES, num_labels=2, task=TOKENS, max_position_embeddings=40, local_attention=8
    ),
}
LISTS = {
    "llama": ["q_proj", "v_proj", "down_proj", "lm_head"],
    "bert": ["query", "value", "dense"],
    "modernbert": ["Wqkv", "Wi"],
}


def load(folder: Path, mesh: str = ONE, **options: Any) -> hub.Loaded:
    return hub.load(folder, mesh=make_mesh(mesh), rules=rules(), **options)


def make(folder: Path, config: Any) -> Path:
    model, rng = FAMILIES[config.model_type].model(config), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    variables = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    hub.save(folder, hub.Loaded(model, variables, ("a", "b") if config.num_labels else ()))
    return folder


def adapt(folder: Path, base: Path, targets: Any, modules: list[str], **config: Any) -> Path:
    """A folder as PEFT writes it, of random A and B for modules of a base."""
    rng, shapes = np.random.default_rng(1), load_file(base / "model.safetensors")
    config = CONFIG | {"target_modules": targets} | config
    tensors = {}
    for module in modules:
        out, size = shapes[f"{module}.weight"].shape
        rank = rank_of(config, module)
        for side, shape in (("A", (rank, size)), ("B", (out, rank))):
            name = f"base_model.model.{module}.lora_{side}.weight"
            tensors[name] = rng.normal(0, 0.3, shape).astype(np.float32)
        if config["use_dora"]:
            name = f"base_model.model.{module}.lora_magnitude_vector"
            tensors[name] = rng.uniform(0.5, 2, out).astype(np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    return folder


CONFIG: dict[str, Any] = {
    "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": "someone/base",
    "bias": "none", "corda_config": None, "eva_config": None, "exclude_modules": None,
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
    "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
    "loftq_config": {}, "lora_alpha": 16, "lora_bias": False, "lora_dropout": 0.1,
    "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None,
    "peft_type": "LORA", "qalora_group_size": 16, "r": 4, "rank_pattern": {}, "revision": None,
    "target_modules": None, "task_type": "CAUSAL_LM", "trainable_token_indices": None,
    "use_dora": False, "use_qalora": False, "use_rslora": False,
}  # fmt: skip
"""What PEFT writes for `LoraConfig(r=4, lora_alpha=16, lora_dropout=0.1)`."""


def rank_of(config: dict[str, Any], module: str) -> int:
    return next((r for end, r in config["rank_pattern"].items() if module.endswith(end)),
                config["r"])  # fmt: skip


def merged_by_numpy(into: Path, base: Path, adapter: Path) -> Path:
    """The base with W + s·B·A, of lengths m, in the layout of the files, in float64."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors, sides = (
        load_file(base / "model.safetensors"),
        load_file(adapter / "adapter_model.safetensors"),
    )
    for name in sides:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if f"{module}.weight" not in tensors or not name.endswith(".lora_A.weight"):
            continue
        a, b = (sides[f"base_model.model.{module}.lora_{s}.weight"].astype(float) for s in "AB")
        alpha = next((x for end, x in config["alpha_pattern"].items() if module.endswith(end)),
                     config["lora_alpha"])  # fmt: skip
        scale = alpha / (math.sqrt(len(a)) if config["use_rslora"] else len(a))
        weight = tensors[f"{module}.weight"].astype(float) + scale * (b @ a)
        if config["use_dora"]:
            lengths = sides[f"base_model.model.{module}.lora_magnitude_vector"].astype(float)
            weight *= (lengths / np.linalg.norm(weight, axis=1))[:, None]
        tensors[f"{module}.weight"] = weight.astype(np.float32)
    into.mkdir()
    (into / "config.json").write_text((base / "config.json").read_text())
    save_file(tensors, into / "model.safetensors", {"format": "pt"})
    return into


def runner(loaded: hub.Loaded, through: Any = lambda fn: fn) -> Any:
    """A function from the parameters of a model to its logits on a fixed batch."""
    ids = np.random.default_rng(2).integers(1, 60, (4, 6)).astype(np.int32)
    ones, places = np.ones_like(ids), np.arange(ids.shape[1], dtype=np.int32)
    batch = {"input_ids": ids, "segment_ids": ones, "position_ids": ones * places}
    mesh, layout = loaded.mesh, loaded.rules
    assert mesh is not None and layout is not None
    run = jax.jit(through(loaded.model.apply))

    def logits(variables: Any) -> np.ndarray:
        with scope(mesh, layout):
            return np.asarray(run(variables, put(batch, mesh, layout))[0])

    return logits


def modules_of(base: Path, ends: list[str]) -> list[str]:
    names = [n.removesuffix(".weight") for n in load_file(base / "model.safetensors")]
    return sorted(n for n in names if n.split(".")[-1] in ends)


@pytest.fixture(scope="module", params=[*MODELS, "llama, dora", "modernbert, dora"])
def case(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapter")
    name, _, dora = request.param.partition(", ")
    base, ends = make(root / "base", MODELS[name]), LISTS[name]
    folder = adapt(root / "adapter", base, ends, modules_of(base, ends), use_dora=bool(dora))
    return base, folder


@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize("mesh", [ONE, EIGHT])
def test_merged_is_what_numpy_makes_of_the_files(case, tmp_path, mesh):
    base, folder = case
    loaded = load(base, mesh)
    logits = runner(loaded)
    reference = load(merged_by_numpy(tmp_path / "expected", base, folder), mesh)
    expected = logits(reference.variables)
    adapter = hub.load_adapter(folder, loaded)
    merged = hub.merge(loaded, adapter)
    found = logits(merged.variables)
    print(f"{np.abs(found - expected).max():.1e} of {np.abs(expected).max():.1f}")
    np.testing.assert_allclose(found, expected, atol=1e-6 * max(1, np.abs(expected).max()), rtol=0)
    change = np.abs(found - logits(loaded.variables)).max()
    assert change > 0.1 * np.abs(expected).max()  # the adapter matters
    for new, old in zip(*map(jax.tree.leaves, (merged.variables, loaded.variables)), strict=True):
        assert (new.sharding, new.dtype, new.shape) == (old.sharding, old.dtype, old.shape)
    if mesh == EIGHT:
        for path, (a, b) in adapter.pairs.items():
            (size, rank), out = a.addressable_shards[0].data.shape[-2:], b.addressable_shards[0]
            assert (2 * size, rank) == a.shape[-2:], path
            ways = 1 if path.startswith("head") else 2  # the words are not cut
            assert ways * out.data.shape[-1] == b.shape[-1], path
    attached = hub.attach(loaded, adapter)
    found = runner(loaded, compress.apply)(attached.variables)
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, np.abs(expected).max()), rtol=0)
    base_again, detached = hub.detach(attached)
    assert jax.tree.leaves(base_again.variables) == jax.tree.leaves(loaded.variables)
    for place, made in (("again", adapter), ("detached", detached)):
        hub.save_adapter(tmp_path / place, loaded, made)
        weights = "adapter_model.safetensors"
        assert (tmp_path / place / weights).read_bytes() == (folder / weights).read_bytes()
    config = "adapter_config.json"
    assert (tmp_path / "again" / config).read_bytes() == (folder / config).read_bytes()


# --- trained here ---------------------------------------------------------------------------------


TRAINED: dict[str, Any] = {
    "llama": ({"**/query/kernel": 2, "**/down/kernel": {"rank": 3, "alpha": 4}}, {"dora": True}),
    "bert": ({"**/value/kernel": 2, "classifier/bias": "train"}, {}),
    # Query and value are a third each of one layer, whose other third is not adapted.
    "modernbert": ({"**/query/kernel": 2, "**/value/kernel": 3, "classifier/*": "train"}, {}),
    "modernbert, dora": ({"**/query/kernel": {"rank": 2, "alpha": 3}}, {"dora": True}),
}


@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize("name", TRAINED)
def test_what_was_trained_here_goes_into_a_folder(tmp_path, name):
    rules, options = TRAINED[name]
    loaded = load(make(tmp_path / "base", MODELS[name.partition(",")[0]]))
    adapt = compress.lora({f"params/{k}": option for k, option in rules.items()}, **options)
    trainable, frozen = compress.partition(adapt(loaded.variables)[0])
    leaves, structure = jax.tree.flatten(trainable)
    rng = np.random.default_rng(4)
    moved = [x + rng.normal(0, 0.3, x.shape).astype(np.float32) for x in leaves]
    tree = compress.combine(jax.tree.unflatten(structure, moved), frozen)
    base, adapter = hub.detach(dataclasses.replace(loaded, variables=tree), base="someone/base")
    hub.save_adapter(tmp_path / "a", base, adapter)
    merged = hub.merge(loaded, hub.load_adapter(tmp_path / "a", loaded)).variables
    expected = compress.merge(tree)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), merged, expected
    )
    change = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), merged, loaded.variables)
    assert sum(x > 0.1 for x in jax.tree.leaves(change)) >= len(rules)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/base"
    assert config["modules_to_save"] == (None if "dora" in options else ["classifier"])
    again = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {len(x) for key, x in again.items() if key.endswith("lora_A.weight")} == {
        "llama": {2, 3}, "bert": {2}, "modernbert": {5}, "modernbert, dora": {2}
    }[name]  # fmt: skip


def test_a_quantised_base(llama, tmp_path):
    """The adapter meets what the codes stand for, attached and merged."""
    folder = adapt(tmp_path / "a", llama, ["q_proj"], modules_of(llama, ["q_proj"]))
    loaded = load(llama)
    rules = {"params/**/kernel": compress.Scheme("int4", per=16)}
    small = dataclasses.replace(loaded, variables=compress.quantize(rules)(loaded.variables)[0])
    adapter = hub.load_adapter(folder, small)
    attached = hub.attach(small, adapter)
    found = runner(loaded, compress.apply)(attached.variables)
    merged = compress.dequantize(hub.merge(small, adapter).variables)
    np.testing.assert_allclose(found, runner(loaded)(merged), atol=1e-5)
    # As merging into the floats that the codes stand for.
    plain = dataclasses.replace(loaded, variables=compress.dequantize(small.variables))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6),
        merged,
        hub.merge(plain, adapter).variables,
    )
    with pytest.raises(FwError, match=r"query/kernel: the adapter is for .* which has no other"):
        hub.attach(attached, adapter)


@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["llama", "modernbert"])
def test_some_layers_come_back(tmp_path, name, dora):
    """An adapter of one layer of a stack, attached and detached, is the same in the files."""
    base = make(tmp_path / "base", MODELS[name])
    modules = modules_of(base, {"llama": ["q_proj"], "modernbert": ["Wqkv"]}[name])[1:]
    ends = [module.split(".")[-1] for module in modules][:1]
    folder = adapt(tmp_path / "a", base, ends, modules, layers_to_transform=[1], use_dora=dora)
    loaded = load(base, scan=True)
    attached = hub.attach(loaded, hub.load_adapter(folder, loaded))
    plain, detached = hub.detach(attached)
    assert [target.module for target in detached.targets] == modules
    hub.save_adapter(tmp_path / "again", plain, detached)
    again = hub.attach(loaded, hub.load_adapter(tmp_path / "again", loaded))
    jax.tree.map(np.testing.assert_array_equal, again.variables, attached.variables)
    weights = "adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (folder / weights).read_bytes()

    if name == "modernbert":  # a part with an A of its own: the layer's is all of them
        attention = attached.variables["params"]["stack"]["layers"]["attention"]
        leaf = attention["query"]["kernel"]
        attention["query"]["kernel"] = dataclasses.replace(leaf, a=2 * leaf.a)
        plain, detached = hub.detach(attached)
        assert [target.module for target in detached.targets] == modules
        hub.save_adapter(tmp_path / "joined", plain, detached)
        merged = hub.merge(loaded, hub.load_adapter(tmp_path / "joined", loaded)).variables
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
            merged,
            compress.merge(attached.variables),
        )


def test_detach_refuses(llama):
    loaded = load(llama)
    for chosen, message in (
        ({"params/**/norm*/scale": "train"}, "no kernel of the model has an adapter"),
        ({"params/**/query/kernel": 2, "params/word/embedding": "train"}, "PEFT keeps heads only"),
    ):
        tree, _ = compress.lora(chosen)(loaded.variables)
        with pytest.raises(FwError, match=message):
            hub.detach(dataclasses.replace(loaded, variables=tree))
    tree, _ = compress.lora({"params/**/query/kernel": 2})(loaded.variables)
    leaf = tree["params"]["stack"]["layers"]["attention"]["query"]["kernel"]
    leaf = dataclasses.replace(leaf, scaling=0 * leaf.scaling)
    tree["params"]["stack"]["layers"]["attention"]["query"]["kernel"] = leaf
    with pytest.raises(FwError, match="query/kernel: the scale of its adapter is 0, as that of"):
        hub.detach(dataclasses.replace(loaded, variables=tree))


# --- forms of a folder ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make(tmp_path_factory.mktemp("llama") / "base", MODELS["llama"])


FORMS: dict[str, Any] = {
    "rslora": ({"use_rslora": True}, ["q_proj", "o_proj"], ["q_proj", "o_proj"]),
    "patterns": (
        {
            "rank_pattern": {"layers.1.self_attn.q_proj": 7, "o_proj": 2},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 3, "o_proj": 0.5},
        },
        ["q_proj", "o_proj"],
        ["q_proj", "o_proj"],
    ),
    "a pattern of targets": ({}, r".*layers\.\d\.mlp\.(up|gate)_proj", ["up_proj", "gate_proj"]),
    "all linear": (
        {"lora_alpha": 3.5, "init_lora_weights": "gaussian"},
        "all-linear",
        ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_config(llama, tmp_path, form):
    config, targets, ends = FORMS[form]
    folder = adapt(tmp_path / "a", llama, targets, modules_of(llama, ends), **config)
    assert_merges(llama, folder, tmp_path)


def assert_merges(base: Path, folder: Path, tmp_path: Path) -> None:
    """The parameters, not only what comes of them; and what is saved again."""
    expected = load(merged_by_numpy(tmp_path / "expected", base, folder))
    loaded = load(base)
    adapter = hub.load_adapter(folder, loaded)
    merged = hub.merge(loaded, adapter)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
        merged.variables,
        expected.variables,
    )
    hub.save_adapter(tmp_path / "again", loaded, adapter)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name


def test_some_layers_and_a_gradient(llama, tmp_path):
    """One layer of a stack; the other stays bit for bit, in the merged model and in training."""
    module = "model.layers.1.self_attn.q_proj"
    folder = adapt(tmp_path / "a", llama, ["q_proj"], [module], layers_to_transform=[1])
    assert_merges(llama, folder, tmp_path)
    loaded = load(llama)
    adapter = hub.load_adapter(folder, loaded)

    def loss(adapter: hub.Adapter) -> jax.Array:
        variables = hub.merge(loaded, adapter).variables
        kernel = variables["params"]["stack"]["layers"]["attention"]["query"]["kernel"]
        return jax.numpy.sum(kernel**2)

    slope = jax.jit(jax.grad(loss))(adapter)
    a, b = slope.pairs["stack/layers/attention/query/kernel"]
    assert not np.any(a[0]) and not np.any(b[0])
    assert np.any(a[1]) and np.any(b[1])


def test_a_head_that_comes_whole(tmp_path):
    """As PEFT keeps it for a classifier, on a base that has none."""
    config = BertConfig(*SIZES, num_labels=3, task=TEXTS)
    base = make(tmp_path / "base", dataclasses.replace(config, task="embedding", num_labels=0))
    bare = modules_of(base, ["query"])
    folder = adapt(tmp_path / "a", base, ["query"], bare, modules_to_save=["classifier", "score"])
    path = folder / "adapter_model.safetensors"
    tensors = {n.replace("model.enc", "model.bert.enc"): t for n, t in load_file(path).items()}
    head = np.random.default_rng(3).normal(size=(3, 16)).astype(np.float32)
    tensors["base_model.model.classifier.weight"] = head
    tensors["base_model.model.classifier.bias"] = head[:, 0].copy()
    save_file(tensors, path, {"format": "pt"})

    options = {"task": TEXTS, "labels": ("a", "b", "c"), "key": jax.random.key(0)}
    loaded = load(base, **options)
    adapter = hub.load_adapter(folder, loaded)
    merged = hub.merge(loaded, adapter)
    assert merged.fresh == ("pooler/bias", "pooler/kernel")
    np.testing.assert_array_equal(merged.variables["params"]["classifier"]["kernel"], head.T)
    np.testing.assert_array_equal(merged.variables["params"]["classifier"]["bias"], head[:, 0])
    hub.save_adapter(tmp_path / "again", loaded, adapter)
    assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    same = fw.load(base, adapter=folder, **options)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), same.variables, merged.variables
    )

    del tensors["base_model.model.classifier.bias"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(FwError, match=r"'base_model.model.classifier.bias' is missing"):
        hub.load_adapter(folder, loaded)


def test_an_encoder_alone(tmp_path):
    config = BertConfig(*SIZES, num_labels=0, task="embedding")
    base = make(tmp_path / "base", config)
    folder = adapt(tmp_path / "a", base, ["query"], modules_of(base, ["query"]))
    assert "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight" in load_file(
        folder / "adapter_model.safetensors"
    )
    assert_merges(base, folder, tmp_path)


def test_experts(tmp_path):
    """Those that lie apart, an expert each; their first layers are one parameter, in two parts."""
    config = LlamaConfig(*SIZES, model_type="mixtral", num_local_experts=2)
    base = make(tmp_path / "base", config)
    ends = ["q_proj", "gate", "w2"]
    assert_merges(base, adapt(tmp_path / "a", base, ends, modules_of(base, ends)), tmp_path)
    folder = adapt(tmp_path / "b", base, ["w1"], modules_of(base, ["w1"]))
    with pytest.raises(FwError, match=r"w1\.lora_A\.weight': the model has no dense layer"):
        hub.load_adapter(folder, load(base))


def test_dtypes_come_back(llama, tmp_path):
    folder = adapt(tmp_path / "a", llama, ["q_proj"], modules_of(llama, ["q_proj"]))
    path = folder / "adapter_model.safetensors"
    save_file({n: t.astype(np.float16) for n, t in load_file(path).items()}, path, {"format": "pt"})
    loaded = load(llama)
    adapter = hub.load_adapter(folder, loaded, dtype=np.float16)
    hub.save_adapter(tmp_path / "again", loaded, adapter)
    assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    exact = hub.merge(loaded, hub.load_adapter(folder, loaded))  # the same numbers in float32
    jax.tree.map(np.testing.assert_array_equal, hub.merge(loaded, adapter).variables,
                 exact.variables)  # fmt: skip


# --- refusals -------------------------------------------------------------------------------------

Q = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"


def with_config(**changes: Any):
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def with_tensors(change: Any):
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        save_file(tensors | change if isinstance(change, dict) else change(tensors), path)

    return edit


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def without(*names: str):
    return lambda tensors: {n: t for n, t in tensors.items() if n not in names}


def pipe(name: str):
    def make_it(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return make_it


REFUSED: dict[str, Any] = {
    "another method": (with_config(peft_type="LOHA"), "peft_type is 'LOHA'; expected 'LORA'"),
    "no method": (with_config(peft_type=None), "peft_type is None"),
    "dora": (with_config(use_dora=True), "q_proj.lora_magnitude_vector' is missing"),
    "perhaps dora": (with_config(use_dora="yes"), "use_dora is 'yes'; expected true or false"),
    "short magnitudes": (
        lambda f: (with_config(use_dora=True)(f), with_tensors({
            f"{Q.replace('.0.', f'.{i}.')}.lora_magnitude_vector": zeros(15 + i) for i in (0, 1)
        })(f)),
        r"lora_magnitude_vector': expected shape \(16,\)",
    ),
    "biases": (with_config(bias="lora_only"), "bias is 'lora_only'; expected 'none'"),
    "bias of B": (with_config(lora_bias=True), "lora_bias is True"),
    "pissa": (with_config(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    "one for true": (with_config(init_lora_weights=1), "init_lora_weights is 1"),
    "replication": (with_config(layer_replication=[[0, 2]]), "layer_replication is"),
    "tokens": (with_config(trainable_token_indices=[1]), "trainable_token_indices is"),
    "unknown": (with_config(**{"new\x1b": 1}), r"new\\x1b is 1; expected none"),
    "no rank": (with_config(r=0), "json: r is 0; expected an integer of more than 0"),
    "true as rank": (with_config(r=True), "r is True; expected an integer"),
    "endless alpha": (with_config(lora_alpha=float("inf")), "lora_alpha is inf; expected a number"),
    "rank of a list": (with_config(rank_pattern=[1]), "rank_pattern is .*; expected an object"),
    "rank as text": (with_config(rank_pattern={"q_proj": "4"}), "rank_pattern: 'q_proj' is '4'"),
    "endless pattern": (with_config(rank_pattern={"(.*)*x": 4}), "expected the name of a layer"),
    "targets": (with_config(target_modules=[1]), "target_modules is .*; expected a list of names"),
    "rslora": (with_config(use_rslora="no"), "use_rslora is 'no'; expected true or false"),
    "kept layer": (with_config(modules_to_save=["mlp"]), "only a head can be replaced, not model."),
    "kept, missing": (with_config(modules_to_save=["lm_head"]), "lm_head.weight' is missing"),
    "another rank": (with_config(r=5), rf"{A}': expected shape \(5, 16\).*found \(4, 16\)"),
    "not a target": (with_config(target_modules=["proj"]), "target_modules .* do not name its"),
    "more targets": (with_config(target_modules=["q_proj", "k_proj"]), "k_proj.*A.*is missing"),
    "no A": (with_tensors(without(A)), f"safetensors: tensor '{A}' is missing"),
    "no B": (with_tensors(without(B)), f"safetensors: tensor '{B}' is missing"),
    "no layer": (with_tensors(without(A, B)), f"safetensors: tensor '{A}' is missing"),
    "shape of A": (with_tensors({A: zeros(4, 17)}), rf"{A}': expected shape \(4, 16\)"),
    "shape of B": (with_tensors({B: zeros(4, 16)}), rf"{B}': expected shape \(16, 4\)"),
    "vector": (with_tensors({B: zeros(16)}), rf"{B}': expected shape \(16, 4\)"),
    "integers": (with_tensors({A: zeros(4, 16, dtype=np.int8)}), "found .* and I8"),
    "stranger": (with_tensors({f"{BASE}x.lora_A.weight": zeros(4, 16)}), "x.lora_A.weight'"),
    "deeper": (
        with_tensors({A.replace("layers.0", "layers.2"): zeros(4, 16), B.replace("layers.0",
                      "layers.2"): zeros(16, 4)}),
        "layers.2.*no dense layer of this name",
    ),
    "embedding": (
        with_tensors({f"{BASE}model.embed_tokens.lora_embedding_A": zeros(4, 60)}),
        "embed_tokens.lora_embedding_A' is there, but it is neither A nor B",
    ),
    "norm": (with_tensors({f"{BASE}model.norm.lora_A.weight": zeros(4, 16)}), "model.norm.*A"),
    "magnitude": (with_tensors({f"{Q}.lora_magnitude_vector": zeros(16)}), "is neither A nor B"),
    "a bias": (with_tensors({f"{Q}.bias": zeros(16)}), "q_proj.bias' is there"),
    "not PEFT's": (with_tensors({"x\x1b": zeros(16)}), r"tensor 'x\\x1b': expected a name after"),
    "nothing": (with_tensors(lambda tensors: {}), "tensor .* is missing"),
    "cut off": (
        lambda f: os.truncate(f / "adapter_model.safetensors", 900),
        "adapter_model.safetensors: ",
    ),
    "no tensors": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "adapter_model.safetensors: cannot be read",
    ),
    "a pipe": (pipe("adapter_model.safetensors"), "expected a plain file"),
    "a pipe for a config": (pipe("adapter_config.json"), "expected a plain file"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "config.json: cannot be read"),
    "not JSON": (lambda f: (f / "adapter_config.json").write_text("["), "expected a JSON object"),
}  # fmt: skip


@pytest.fixture(scope="module")
def loaded(llama):
    return load(llama)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(llama, loaded, tmp_path, name):
    folder = adapt(tmp_path / "a", llama, ["q_proj"], modules_of(llama, ["q_proj"]))
    break_it, message = REFUSED[name]
    break_it(folder)
    with pytest.raises(FwError, match=message) as error:
        hub.load_adapter(folder, loaded)
    assert str(folder) in str(error.value)
    assert str(error.value).isprintable()


def test_odd_values_are_refused_or_harmless(llama, loaded, tmp_path):
    """Every key of the config with values of every type."""
    folder = adapt(tmp_path / "a", llama, ["q_proj"], modules_of(llama, ["q_proj"]))
    path = folder / "adapter_config.json"
    good, refused = path.read_text(), 0
    for key in CONFIG:
        for value in (
            True,
            7,
            -1,
            1e400,
            "x",
            "\ud800",
            [1],
            ["\ud800"],
            {"a": {}},
            {"": 1},
            [[[]]],
        ):
            path.write_text(json.dumps(json.loads(good) | {key: value}))
            try:
                hub.load_adapter(folder, loaded)
            except FwError:
                refused += 1
    assert refused > 100


def test_merge_and_save_refuse(llama, loaded, tmp_path):
    folder = adapt(tmp_path / "a", llama, ["q_proj"], modules_of(llama, ["q_proj"]))
    adapter = hub.load_adapter(folder, loaded)
    with pytest.raises(FwError, match="exists already"):
        hub.save_adapter(folder, loaded, adapter)
    small = LlamaConfig(60, 8, 2, 2, 32, num_key_value_heads=2)
    other = load(make(tmp_path / "other", small))
    with pytest.raises(FwError, match=r"query/kernel: the adapter is for \(2, 16, 16\), got"):
        hub.merge(other, adapter)
    with pytest.raises(FwError, match="expected shape"):
        hub.load_adapter(folder, other)

    words = make(tmp_path / "words", MODELS["modernbert"])
    folder = adapt(tmp_path / "b", words, ["Wi"], modules_of(words, ["Wi"]))
    joint = load(words)
    adapter = hub.load_adapter(folder, joint)
    path, (a, b) = next(iter(adapter.pairs.items()))
    adapter = dataclasses.replace(adapter, pairs=adapter.pairs | {path: (a + 1, b)})
    with pytest.raises(FwError, match=r"have different A, but .*Wi is one layer in the files"):
        hub.save_adapter(tmp_path / "new", joint, adapter)
    assert not (tmp_path / "new").exists()
