"""Llama and its relatives: what a token may see, on any mesh, in stages, and through a folder."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest

from fw import hub
from fw.errors import FwError
from fw.hub import FAMILIES
from fw.models import stack
from fw.models.llama import ARCHITECTURES, LlamaConfig, llama, read_config, speeds
from sharding import gather, make_mesh, rules
from tests.texts import LENGTHS, ROWS, batch_of, outputs

SHAPE = (60, 16, 4, 4, 24)
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "rope_type": "llama3", "rope_factor": 4.0,
              "original_max_position_embeddings": 12},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 4, "head_dim": 8},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
}  # fmt: skip
ALIKE = ("mistral", "qwen2", "qwen3")
"""Those that differ from the others in little; `--all` runs them."""


pytestmark = pytest.mark.usefixtures("quickly_compiled")


def make(kind, **more):
    """A model in which every parameter is random, so that each one matters."""
    config = LlamaConfig(*SHAPE, model_type=kind, max_position_embeddings=40, **KINDS[kind] | more)
    model, random = llama(config), np.random.default_rng(len(kind))
    variables = jax.tree.map(
        lambda x: np.asarray(x + random.normal(0, 0.2, x.shape), np.float32),
        model.init(jax.random.key(0)),
    )
    return hub.Loaded(model, variables, ())


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[pytest.mark.slow] if k in ALIKE else []) for k in KINDS],
)
def test_packed_as_unpacked_on_any_mesh_and_back_from_a_folder(kind, tmp_path):
    made = make(kind)
    alone = outputs(made, tuple((i,) for i in range(len(LENGTHS))))
    for spec in ("data=1", "fsdp=2,tensor=2", "sequence=2,fsdp=2"):
        for a, b in zip(outputs(made, ROWS, spec), alone, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=spec)
    staged = make(kind, microbatches=2)
    for a, b in zip(outputs(staged, ROWS, "pipe=2,fsdp=2"), alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    config = dataclasses.replace(made.model.config, scan=False)
    params = dict(made.variables["params"])
    params["stack"] = {"layers": stack.apart(params["stack"]["layers"], SHAPE[2])}
    apart = hub.Loaded(llama(config), {"params": params, "state": {}}, ())
    for a, b in zip(outputs(apart, ROWS, "fsdp=2,tensor=2"), alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    hub.save(tmp_path / "m", made)
    hub.save(tmp_path / "apart", apart)
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("m", "apart")]
    assert written[0] == written[1]
    mesh = make_mesh("pipe=2,fsdp=2,tensor=2")
    again = hub.load(tmp_path / "m", mesh=mesh, rules=rules())
    assert (again.model.config, again.fresh, again.unused) == (made.model.config, (), ())
    jax.tree.map(np.testing.assert_array_equal, gather(again.variables), made.variables)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_sees_those_before_it_and_no_further_than_its_window(kind):
    made, (batch, _) = make(kind), batch_of(((4,),))
    run = jax.jit(lambda batch: made.model.apply(made.variables, batch)[0])
    plain, changed = run(batch), 6
    other = {**batch, "input_ids": batch["input_ids"].copy()}
    other["input_ids"][0, changed] += 1
    moved = np.flatnonzero(np.abs(run(other) - plain).max(-1)[0] > 1e-6)
    last = 15
    if kind == "mistral":  # each layer carries what it sees three tokens further
        last = min(last, changed + SHAPE[2] * 3)
    assert moved.tolist() == list(range(changed, last + 1))


def test_remat_changes_nothing():
    for remat in ("layer", "stage"):
        a, b = (outputs(make("llama", remat=r), ROWS) for r in (None, remat))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), a, b)


def test_speeds_of_llama_3_keep_the_fast_and_slow_down_the_slow():
    config = LlamaConfig(9, 64, 1, 2, 8, rope_type="llama3", rope_factor=8.0, rope_theta=5e5)
    plain = dataclasses.replace(config, rope_type="default")
    ratio = speeds(config) / speeds(plain)
    turned = 8192 * speeds(plain) / (2 * np.pi)
    np.testing.assert_allclose(ratio[turned > 4], 1)
    np.testing.assert_allclose(ratio[turned < 1], 1 / 8)
    between = (turned >= 1) & (turned <= 4)
    np.testing.assert_allclose(
        ratio[between], 1 / 8 + 7 / 8 * (turned[between] - 1) / 3, rtol=1e-12
    )


def test_configs_of_both_generations_say_the_same():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **scaling}}
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **scaling}}
    keys = ("rope_theta", "rope_type", "rope_factor", "high_freq_factor", "sliding_window")
    assert [read_config(old)[k] for k in keys] == [read_config(new)[k] for k in keys]
    assert read_config({"model_type": "mistral", "sliding_window": 9})["sliding_window"] == 9
    assert read_config({"model_type": "qwen2", "sliding_window": 9})["sliding_window"] is None
    bare = read_config({"model_type": "mistral"})  # as transformers' own defaults
    assert (bare["sliding_window"], bare["num_key_value_heads"]) == (4096, 8)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_type 'linear': 'factor' is missing"),
        ({"rope_parameters": [1]}, "rope_parameters: expected an object"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layers of different kinds"),
        ({"layer_types": ["linear_attention"]}, "layers of different kinds"),
        ({"use_sliding_window": True}, "only some layers slide"),
    ],
)
def test_a_folder_that_asks_for_more_is_refused(source, said, tmp_path):
    hub.save(tmp_path / "m", make("llama"))
    path = tmp_path / "m/config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    path.write_text(json.dumps(config | source))
    with pytest.raises(FwError, match=rf"config\.json: .*{said}"):
        hub.load(tmp_path / "m", mesh=make_mesh("data=1"), rules=rules())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is unknown; choose one of llama, mistral"),
        ({"task": "masked_lm"}, "task 'masked_lm' is unknown; choose one of causal_lm"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_he"),
        ({"num_attention_heads": 3}, "hidden_size 16 is not a multiple of num_attention_heads 3"),
        ({"head_dim": 3}, "head_dim 3 is odd"),
        ({"sliding_window": 0}, "sliding_window 0: expected 1 or more"),
        (
            {"rope_type": "llama3", "low_freq_factor": 4.0},
            "expected the first less than the second",
        ),
        ({"rope_theta": 0.0}, "rope_theta and factor: expected more than 0"),
        (
            {"num_local_experts": 4},
            "num_local_experts 4 of a llama: expected .* none for the others",
        ),
        ({"model_type": "mixtral"}, "num_local_experts None of a mixtral: expected a number"),
        (
            {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 5},
            "num_experts_per_tok 5: expected 1 to num_local_experts 4",
        ),
        ({"model_type": "mixtral", "num_local_experts": 4, "mlp_bias": True}, "mlp_bias: experts"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused(changes, said):
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
             "intermediate_size")  # fmt: skip
    with pytest.raises(FwError, match=said):
        LlamaConfig(**dict(zip(names, SHAPE, strict=True)) | changes)


def test_the_table_of_families_has_them_all():
    assert set(ARCHITECTURES) <= set(FAMILIES)
