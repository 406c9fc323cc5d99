"""Mixtral: against numpy in float64 that reads the folder itself; experts on their devices."""

import dataclasses
import json
import re
from typing import Any

import jax
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from fw import hub, tasks
from fw.data import IGNORE
from fw.errors import FwError
from fw.generation import Decoder, Sampling, decode
from fw.hub.files import Tensor
from fw.models.llama import LlamaConfig, llama
from fw.step import initial_state, make_step
from sharding import gather, make_mesh, put, rules, scope

pytestmark = pytest.mark.usefixtures("quickly_compiled")

EXPERTS, CHOSEN, LAYERS, HEADS, GROUPS, WINDOW = 4, 2, 2, 4, 2, 4
CONFIG = LlamaConfig(
    37, 16, LAYERS, HEADS, 12, model_type="mixtral", num_key_value_heads=GROUPS,
    num_local_experts=EXPERTS, num_experts_per_tok=CHOSEN, router_aux_loss_coef=0.7,
    sliding_window=WINDOW, max_position_embeddings=64, rope_theta=50.0, tie_word_embeddings=True,
)  # fmt: skip
ROWS, LENGTH = 8, 10
SIZES = np.array([10, 3, 7, 10, 5, 1, 9, 10])


def make():
    model = llama(CONFIG)
    random = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: random.normal(0.1, 0.4, x.shape).astype(np.float32),
        jax.eval_shape(model.init, jax.random.key(0)),
    )
    return hub.Loaded(model, variables, ())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("mixtral") / "m"
    hub.save(place, make())
    return place


@pytest.fixture(scope="module")
def plain(folder):
    """The logits of a batch, on one device."""
    loaded = load(folder)
    apply = jax.jit(lambda v, b: loaded.model.apply(v, untold(b))[0])
    return lambda batch: np.asarray(apply(loaded.variables, batch))


def load(folder, spec="data=1", **more):
    return hub.load(folder, mesh=make_mesh(spec), rules=rules(), **more)


def batch_of():
    """Rows of one text, each followed by padding."""
    ids = np.random.default_rng(1).integers(0, 37, (ROWS, LENGTH)).astype(np.int32)
    real = np.arange(LENGTH) < SIZES[:, None]
    targets = np.where(real[:, 1:], ids[:, 1:], IGNORE).astype(np.int32)
    return {
        "input_ids": ids,
        "segment_ids": real.astype(np.int32),
        "position_ids": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        "targets": np.pad(targets, ((0, 0), (0, 1)), constant_values=IGNORE),
    }


def untold(batch):
    return {name: x for name, x in batch.items() if name != "targets"}


# --- the same in numpy, one token at a time -------------------------------------------------------


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def norm(x, scale):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + CONFIG.rms_norm_eps) * scale


def rotated(x):
    """[tokens, heads, size]: element i and element i + size / 2 turn together."""
    half = x.shape[-1] // 2
    speed = CONFIG.rope_theta ** (-np.arange(half) / half)
    angle = np.arange(len(x))[:, None, None] * speed
    a, b = x[..., :half], x[..., half:]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1
    )


def attention_np(w, name, x):
    q, k, v = ((x @ w[f"{name}.{p}_proj.weight"].T).reshape(len(x), -1, CONFIG.size) for p in "qkv")
    q, k = rotated(q), rotated(k)
    out = np.zeros_like(q)
    for head in range(HEADS):
        shared = head // (HEADS // GROUPS)
        for t in range(len(x)):
            first = max(0, t - WINDOW + 1)  # transformers counts the token itself
            scores = k[first : t + 1, shared] @ q[t, head] / np.sqrt(CONFIG.size)
            out[t, head] = softmax(scores) @ v[first : t + 1, shared]
    return out.reshape(len(x), -1) @ w[f"{name}.o_proj.weight"].T


def moe_np(w, name, x):
    """The experts' output, the probabilities of all and the choices of each token."""
    p = softmax(x @ w[f"{name}.gate.weight"].T)
    best = np.argsort(-p, axis=-1)[:, :CHOSEN]
    y = np.zeros_like(x)
    for t, chosen in enumerate(best):
        for e in chosen:
            w1, w2, w3 = (w[f"{name}.experts.{e}.w{i}.weight"] for i in (1, 2, 3))
            gate = w1 @ x[t]
            out = w2 @ (gate / (1 + np.exp(-gate)) * (w3 @ x[t]))
            y[t] += p[t, e] / p[t, chosen].sum() * out
    return y, p, best


def model_np(w, ids):
    """The logits of a text, and of each layer the probabilities and the choices."""
    x, routed = w["model.embed_tokens.weight"][ids], []
    for i in range(LAYERS):
        own = f"model.layers.{i}"
        y = norm(x, w[f"{own}.input_layernorm.weight"])
        x = x + attention_np(w, f"{own}.self_attn", y)
        y = norm(x, w[f"{own}.post_attention_layernorm.weight"])
        y, p, best = moe_np(w, f"{own}.block_sparse_moe", y)
        x, routed = x + y, [*routed, (p, best)]
    return norm(x, w["model.norm.weight"]) @ w["model.embed_tokens.weight"].T, routed


def switch_np(p, best):
    """E Σ fₑ Pₑ, f summed over the choices of a token, as in transformers."""
    share = np.bincount(best.ravel(), minlength=EXPERTS) / len(best)
    return EXPERTS * share @ p.mean(0)


def test_logits_and_loss_are_those_of_plain_numpy(folder):
    w = {n: t.astype(np.float64) for n, t in load_file(folder / "model.safetensors").items()}
    batch = batch_of()
    with jax.enable_x64(True):
        loaded = load(folder, dtype=np.float64)
        apply = loaded.model.apply
        both = jax.jit(lambda v, b: (apply(v, untold(b))[0], apply(v, b)[0]))
        logits, told = both(loaded.variables, batch)
        total, weight = jax.device_get(tasks.word_loss(told, batch))
        counted = tasks.make_task("causal_lm", ()).count(told, batch)["loss"]
    losses, layers = [], [([], []) for _ in range(LAYERS)]
    for row, size in enumerate(SIZES):
        expected, routed = model_np(w, batch["input_ids"][row, :size])
        np.testing.assert_allclose(logits[row, :size], expected, rtol=1e-9, atol=1e-9)
        for t, target in enumerate(batch["targets"][row, : size - 1]):
            losses.append(-np.log(softmax(expected[t])[target]))
        for layer, found in zip(layers, routed, strict=True):
            for kept, new in zip(layer, found, strict=True):
                kept.append(new)
    layers = [tuple(map(np.concatenate, layer)) for layer in layers]
    aux = switch_np(*map(np.concatenate, zip(*layers, strict=True)))
    apart = np.mean([switch_np(*layer) for layer in layers])
    assert abs(aux - apart) > 1e-3  # layers count as one, which is not the mean of their losses
    np.testing.assert_allclose(told["aux"], 0.7 * aux, rtol=1e-9)
    assert weight == len(losses)
    np.testing.assert_allclose(total / weight, np.mean(losses) + 0.7 * aux, rtol=1e-9)
    np.testing.assert_allclose(counted.total, np.sum(losses), rtol=1e-6)  # no aux in a likelihood


# --- on a mesh ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["expert=4,fsdp=2", "data=2,expert=2,tensor=2"])
def test_a_mesh_changes_no_logits(spec, folder, plain):
    loaded, batch = load(folder, spec), batch_of()
    assert loaded.mesh is not None and loaded.rules is not None
    with scope(loaded.mesh, loaded.rules):
        given = put(untold(batch), loaded.mesh, loaded.rules)
        found = gather(jax.jit(loaded.model.apply)(loaded.variables, given)[0])
    real = batch["segment_ids"] > 0
    np.testing.assert_allclose(found[real], plain(batch)[real], atol=2e-5)


def test_a_step_on_experts_has_the_loss_and_the_gradient_of_one_device(folder):
    """With this rate the parameters move by their gradient. Stages are given half a batch each."""
    found = []
    for spec, microbatches in (("data=1", 1), ("pipe=2,expert=2,fsdp=2", 2)):
        loaded, tx = load(folder, spec), optax.sgd(1.0)
        model = llama(dataclasses.replace(loaded.model.config, microbatches=microbatches))
        assert loaded.mesh is not None and loaded.rules is not None
        where: Any = {"mesh": loaded.mesh, "rules": loaded.rules}
        step = make_step(model, tasks.word_loss, tx, **where)
        state = initial_state(loaded.variables, tx, loaded.mesh)
        state, figures = step(state, put(batch_of(), loaded.mesh, loaded.rules))
        found.append((float(figures["loss"]), gather(state.variables["params"])))
    (loss, moved), (loss_on, moved_on) = found
    np.testing.assert_allclose(loss_on, loss, rtol=1e-6)
    start = make().variables["params"]
    for old, one, other in zip(*map(jax.tree.leaves, (start, moved, moved_on)), strict=True):
        assert np.abs(one - old).max() > 1e-4
        np.testing.assert_allclose(other, one, atol=2e-5)


def test_cached_as_uncached_token_for_token_and_on_experts(folder, plain):
    prompts, most = [[3, 1, 4, 1, 5, 9], [5, 3]], 4
    texts, batch = [list(prompt) for prompt in prompts], batch_of()
    for _ in range(most):
        for row, ids in enumerate(texts):
            batch["input_ids"][row, : len(ids)] = ids
            batch["segment_ids"][row] = np.arange(LENGTH) < len(ids)
        logits = plain(batch)
        for row, ids in enumerate(texts):
            ids.append(int(logits[row, len(ids) - 1].argmax()))
    expected = [ids[-most:] for ids in texts]
    loaded, on = load(folder), load(folder, "expert=4")
    apart = Decoder(loaded.model, loaded.variables).apart()
    for decoder in (apart, Decoder(on.model, on.variables, on.mesh, on.rules)):
        steps = decode(decoder, prompts, [Sampling()] * 2, most=most)
        assert list(map(list, zip(*steps, strict=True))) == expected


# --- folders --------------------------------------------------------------------------------------


def test_every_device_reads_its_own_experts_and_they_are_written_as_they_were(
    folder, tmp_path, monkeypatch
):
    read, original = {}, Tensor.read

    def recording(self, index):
        found = original(self, index)
        read[self.name] = read.get(self.name, 0) + found.size
        return found

    monkeypatch.setattr(Tensor, "read", recording)
    loaded, made = load(folder, "expert=4,fsdp=2"), make()
    sizes = {n: t.size for n, t in load_file(folder / "model.safetensors").items()}
    experts = [name for name in sizes if ".experts." in name]
    assert len(experts) == 3 * EXPERTS * LAYERS
    assert {name: read[name] for name in experts} == {name: sizes[name] for name in experts}
    mlp, whole = (x.variables["params"]["stack"]["layers"]["mlp"] for x in (loaded, made))
    assert whole["up"].shape == (LAYERS, EXPERTS, 16, 2, 12)
    for name, one in (("up", (LAYERS, 1, 8, 2, 12)), ("down", (LAYERS, 1, 12, 8))):
        for shard in mlp[name].addressable_shards:
            assert shard.data.shape == one
            np.testing.assert_array_equal(shard.data, whole[name][shard.index])
    hub.save(tmp_path / "again", loaded)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()


def copy_of(folder, place, tensors=lambda found: None, **config):
    """The folder with other tensors and other keys of its config."""
    place.mkdir()
    found = load_file(folder / "model.safetensors")
    tensors(found)
    save_file(found, place / "model.safetensors")
    source = json.loads((folder / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(source | config))
    return place


BROKEN = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


def test_experts_that_lack_or_do_not_fit_are_named_with_their_file(folder, tmp_path):
    lacking = copy_of(folder, tmp_path / "lacking", lambda found: found.pop(BROKEN))
    with pytest.raises(
        FwError, match=rf"lacking/model\.safetensors: tensor {re.escape(BROKEN)} is missing"
    ):
        load(lacking)

    def turn(found):
        found[BROKEN] = np.ascontiguousarray(found[BROKEN].T)

    turned = copy_of(folder, tmp_path / "turned", turn)
    said = rf"turned/model\.safetensors: tensor '{re.escape(BROKEN)}': expected shape \(12, 16\)"
    with pytest.raises(FwError, match=said + r".*found \(16, 12\)"):
        load(turned)
    fewer = copy_of(folder, tmp_path / "fewer", num_local_experts=3)
    with pytest.raises(FwError, match=r"experts\.3\.w1\.weight.* there, which config\.json does"):
        load(fewer)
    noisy = copy_of(folder, tmp_path / "noisy", router_jitter_noise=0.1)
    with pytest.raises(FwError, match=r"config\.json: router_jitter_noise 0\.1 is not supported"):
        load(noisy)


def test_a_config_that_leaves_out_what_transformers_assumes(folder, tmp_path):
    source = json.loads((folder / "config.json").read_text())
    for name in ("num_experts_per_tok", "num_local_experts", "router_aux_loss_coef",
                 "rope_parameters", "rms_norm_eps", "sliding_window"):  # fmt: skip
        del source[name]
    found = hub.FAMILIES["mixtral"].reads(source)
    assert (found["num_local_experts"], found["rope_theta"]) == (8, 1e6)
    assert (found["rms_norm_eps"], found.get("sliding_window")) == (1e-5, None)
    assert (LlamaConfig.num_experts_per_tok, LlamaConfig.router_aux_loss_coef) == (2, 0.001)
