"""Encoders as stacks: apart or stacked, in stages, computed again or kept, the numbers are one."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compress
from fw import hub
from fw.checkpoint import Checkpoints
from fw.cli.main import main
from fw.hub import FAMILIES
from fw.models.stack_layout import relayout
from fw.optimizer import AdamW, optimizer
from fw.step import initial_state
from fw.tasks import cross_entropy
from sharding import gather, make_mesh, paths, rules, shardings
from sharding.parallel.pipeline import REMAT
from tests.marks import slow
from tests.test_encoders import CONFIGS, make
from tests.texts import ROWS, batch_of, outputs
from tests.tiny import make_model, make_ner

TOKENS = "token_classification"


pytestmark = pytest.mark.usefixtures("quickly_compiled")


def deep(family, **options):
    """Of four layers, apart."""
    name = "n_layers" if family == "distilbert" else "num_hidden_layers"
    made = make(family, TOKENS)
    config = dataclasses.replace(made.model.config, **{name: 4})
    model, random = FAMILIES[family].model(config), np.random.default_rng(len(family))
    variables = jax.tree.map(
        lambda x: np.asarray(x + random.normal(0, 0.3, x.shape), np.float32),
        model.init(jax.random.key(0)),
    )
    return changed(dataclasses.replace(made, model=model, variables=variables), **options)


def changed(made, **options):
    """The same model with its layers computed otherwise."""
    config = dataclasses.replace(made.model.config, **options)
    model = FAMILIES[config.model_type].model(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    arrays = dict(zip(paths(made.variables), jax.tree.leaves(made.variables), strict=True))
    moved = relayout(arrays, paths(shapes))
    variables = jax.tree.unflatten(jax.tree.structure(shapes), [moved[p] for p in paths(shapes)])
    return dataclasses.replace(made, model=model, variables=variables)


def loss_of(made, batch):
    """Its loss and gradients in training, as a compiled program."""

    def loss(params, batch):
        variables = {"params": params, "state": {}}
        y, _ = made.model.apply(variables, batch, key=jax.random.key(3), train=True)
        return cross_entropy(y, batch)[0]

    return jax.jit(jax.value_and_grad(loss)).lower(made.variables["params"], batch).compile()


def labelled(rows=ROWS):
    batch, _ = batch_of(rows)
    return {**batch, "labels": np.where(batch["segment_ids"] > 0, batch["input_ids"] % 3, -1)}


@pytest.mark.parametrize("family", CONFIGS)
def test_stacked_as_apart_and_in_stages_and_the_same_file(family, tmp_path):
    apart = deep(family)
    stacked = changed(apart, scan=True, microbatches=2)
    assert {x.shape[0] for x in jax.tree.leaves(stacked.variables["params"]["stack"])} == {4}
    alone = outputs(apart, ROWS)
    for spec in ("data=1", "pipe=2,fsdp=2"):
        for a, b in zip(outputs(stacked, ROWS, spec), alone, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=spec)
    for name, made in (("apart", apart), ("stacked", stacked)):
        hub.save(tmp_path / name, made)
    one, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("apart", "stacked"))
    assert one == other
    mesh = make_mesh("pipe=2,fsdp=2,tensor=2")
    again = hub.load(tmp_path / "apart", mesh=mesh, rules=rules(), microbatches=2)
    assert again.model.config == stacked.model.config  # on stages, stacked; as made, apart
    assert hub.load(tmp_path / "stacked", mesh=make_mesh("data=1"), rules=rules()).model.config == (
        apart.model.config
    )
    jax.tree.map(np.testing.assert_array_equal, gather(again.variables), stacked.variables)


STACKED = [(True, remat) for remat in REMAT if remat != "stage"]
APART = [(False, remat) for _, remat in STACKED]


@pytest.mark.parametrize(
    ("family", "ways"),
    [
        slow("bert", STACKED + APART),
        ("modernbert", STACKED + APART[:1]),
    ],
)
def test_remat_keeps_less_and_changes_nothing(family, ways):
    """Nor does a stack, dropout included."""
    batch, apart = labelled(ROWS * 8), deep(family, microbatches=2)
    results, memory = {}, {}
    for scan, remat in ways:
        made = changed(apart, scan=scan, remat=remat)
        program = loss_of(made, batch)
        analysis: Any = program.memory_analysis()
        memory[scan, remat] = analysis.temp_size_in_bytes
        loss, grads = program(made.variables["params"], batch)
        arrays = dict(zip(paths(grads), jax.tree.leaves(grads), strict=True))
        results[scan, remat] = loss, relayout(arrays, paths(apart.variables["params"]))
    assert memory[True, "layer"] < 0.6 * memory[True, None], memory
    assert memory.get((False, "layer"), 0) < 0.8 * memory[False, None], memory
    assert memory[True, "layer"] < memory[True, "dots"] < 0.8 * memory[True, None], memory
    loss, grads = results.pop((False, None))
    for how, (same, others) in results.items():
        np.testing.assert_allclose(same, loss, rtol=1e-5, err_msg=str(how))
        for path, grad in grads.items():
            np.testing.assert_allclose(others[path], grad, rtol=1e-3, atol=1e-4, err_msg=path)


def test_a_layer_of_a_stack_has_its_own_scales():
    apart = deep("bert")
    stacked = changed(apart, scan=True)
    small, report = compress.quantize("int8")(stacked.variables["params"])
    each, _ = compress.quantize("int8")(apart.variables["params"])
    arrays = compress.to_arrays(small)
    for path, array in relayout(arrays, compress.to_arrays(each)).items():
        np.testing.assert_array_equal(array, compress.to_arrays(each)[path], err_msg=path)
    assert {r.applied for r in report if r.path.endswith("kernel") and "stack" in r.path} == {
        "int8"
    }
    batch, _ = batch_of(ROWS)
    run = [
        jax.jit(compress.apply(made.model.apply))({"params": params, "state": {}}, batch)[0]
        for made, params in ((stacked, small), (apart, each))
    ]
    np.testing.assert_allclose(*run, rtol=1e-4, atol=1e-4)
    exact = stacked.model.apply(stacked.variables, batch)[0]
    assert 0 < np.abs(run[0] - exact).max() < 0.2 * np.abs(exact).max()


def test_a_checkpoint_is_read_stacked_and_apart(tmp_path):
    tx = optimizer(AdamW(), 10)

    def state_of(made, spec):
        mesh = make_mesh(spec)
        lie = shardings(made.model.axes, made.variables, mesh, rules())
        return initial_state(jax.device_put(made.variables, lie), tx, mesh)

    apart = deep("bert")
    stacked = changed(apart, scan=True)
    for name, one, other in (("a", apart, stacked), ("b", stacked, apart)):
        spec = "data=1" if other is apart else "pipe=2,fsdp=2,tensor=2"
        with Checkpoints(tmp_path / name, metric="f1") as checkpoints:
            there = state_of(one, "fsdp=2")
            moments = jax.tree.map(lambda x: x + 1, there.optimizer)
            checkpoints.save(there._replace(optimizer=moments), {"f1": 1.0})
            checkpoints.wait()
            like = state_of(other, spec)
            like = like._replace(variables=jax.tree.map(jnp.zeros_like, like.variables))
            found = checkpoints.restore(like, 0)
        assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(
            lambda x: x.sharding, state_of(other, spec)
        )
        jax.tree.map(np.testing.assert_array_equal, gather(found.variables), other.variables)
        ones = jax.tree.map(lambda x: x + 1, like.optimizer)
        jax.tree.map(np.testing.assert_array_equal, gather(found.optimizer), gather(ones))


def test_biases_and_norms_of_a_stack_do_not_decay():
    made = changed(deep("bert"), scan=True)
    params = jax.tree.map(jnp.ones_like, made.variables["params"])
    tx = optimizer(AdamW(1.0, warmup=0.0, weight_decay=0.5), 10)
    zero = jax.tree.map(jnp.zeros_like, params)
    with jax.numpy_dtype_promotion("standard"):
        news, _ = jax.jit(tx.update)(zero, tx.init(params), params)
    for path, new in zip(paths(news), jax.tree.leaves(news), strict=True):
        decays = path.endswith(("kernel", "embedding"))
        np.testing.assert_allclose(new, -0.5 if decays else 0.0, err_msg=path)


@pytest.mark.slow
def test_a_fine_tuning_in_stages_is_that_on_one_device(tmp_path):
    model = make_model(tmp_path / "model", layers=2)
    data = make_ner(tmp_path / "data", (48, 8, 8))

    def run(name, *more) -> list[dict[str, Any]]:
        folder = tmp_path / name
        given = ("--task=ner", f"--model={model}", f"--data={data}", f"--run={folder}",
                 "--length=32", "--batch=8", "--steps=3", "--log-every=1", "--precision=f32",
                 "--learning-rate=1e-2")  # fmt: skip
        assert main(["finetune", *given, *more]) == 0
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [line for line in lines if line["kind"] == "train"]

    staged = run("staged", "--mesh=pipe=2,fsdp=2", "--remat=dots")
    config = json.loads((tmp_path / "staged/config.json").read_text())["config"]
    assert (config["microbatches"], config["remat"]) == (4, "dots")
    alone = run("alone", "--microbatches=4")
    for name in ("loss", "grad_norm"):
        a, b = ([line[name] for line in lines] for lines in (staged, alone))
        assert len(a) == 3
        np.testing.assert_allclose(a, b, rtol=2e-4)
    assert main(["compress", str(tmp_path / "staged")]) == 0  # apart
    assert main(["eval", str(tmp_path / "staged"), "--mesh=pipe=2", "--variant=int8"]) == 0
