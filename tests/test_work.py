"""What is planned for without data is what data makes; and what is planned for here, with it."""

import dataclasses
import json
import math

import jax
import pytest

from fw import run
from fw.adaptation import LoraOptions
from fw.data.batches import Batches
from fw.errors import FwError
from fw.finetune import finetune, prepare
from fw.planning import here, model_flops, plan_training
from fw.recipe import TASKS, Finetune, read_recipe
from fw.work import OF_TEXTS, Work, source_of
from sharding.mesh import sizes_of
from tests import things, tiny
from tests.marks import slow

DATA = {
    "ner": tiny.make_ner, "classify": tiny.make_reviews, "multilabel": tiny.make_topics,
    "regress": tiny.make_ratings, "qa": tiny.make_questions, "mlm": tiny.make_lines,
    "lm": tiny.make_conversations, "tabular": things.make_table, "estimate": things.make_table,
    "rank": things.make_events, "retrieve": things.make_events, "image": things.make_images,
    "segment": things.make_maps,
}  # fmt: skip
OPTIONS = {
    "multilabel": {"columns": "text,topics"}, "regress": {"columns": "text,valence,hours"},
    "tabular": {"target": "pays"}, "estimate": {"target": "income"}, "rank": {"threshold": 3.0},
    "segment": {"size": 32},
}  # fmt: skip


def recipe_of(task, folder, **more):
    """A recipe on small data of a task, and where that is."""
    given = {"batch": 16, **OPTIONS.get(task, {}), **more}
    if TASKS[task] in OF_TEXTS:
        make = tiny.make_decoder if task == "lm" else tiny.make_model
        given |= {"model": str(make(folder / "model")), "length": 32}
    if task in ("rank", "retrieve"):
        given["history"] = 4
    path = DATA[task](folder / ("data.csv" if task in ("tabular", "estimate") else "data"))
    return Finetune(task=task, data=str(path), run=str(folder / "run"), **given), path


@pytest.mark.parametrize("task", TASKS)
def test_a_batch_is_planned_for_as_data_makes_it(task, tmp_path):
    recipe, path = recipe_of(task, tmp_path)
    source = tmp_path / "model" if TASKS[task] in OF_TEXTS else None
    made = prepare(recipe, path, source)
    config = {}
    if source is None:
        own = made.processor.config(recipe, recipe.long_task, made.labels)
        config = dataclasses.asdict(own)
    side = made.rows["train"].arrays["images"].shape[1] if task == "image" else recipe.size
    work = Work(
        recipe.model, 16, recipe.length, task=task, size=side,
        classes=len(made.labels) or Work.classes, channels=config.get("num_channels", 3),
        history=recipe.history, config=config,
    )  # fmt: skip
    example = Batches(made.rows["train"].arrays, 16, 0, made.change).example
    real = {name: ((16, *x.shape[1:]), x.dtype) for name, x in example.items()}
    said = {name: (x.shape, x.dtype) for name, x in source_of(work).batch(work).items()}
    bags = {name for name in real if name.startswith("item.")}  # how many ids, data alone can say
    assert {n: (s[:1], d) if n in bags else (s, d) for n, (s, d) in real.items()} == said


@pytest.mark.parametrize("task", [slow("classify"), "rank"])
def test_auto_plans_for_the_data_and_the_devices_there_are(task, tmp_path, monkeypatch):
    monkeypatch.setenv("FW_CACHE", str(tmp_path / "cache"))
    recipe, _ = recipe_of(task, tmp_path, plan="auto", steps=2, epochs=0.0)
    chosen = read_recipe(finetune(recipe))
    assert math.prod(sizes_of(chosen.mesh, jax.device_count()).values()) == here().devices > 1
    assert 16 % chosen.accumulate == 0
    if task == "rank":  # a run that goes on keeps what its numbers depend on, whatever is faster
        path = tmp_path / "run/config.json"
        begun = json.loads(path.read_text())
        begun["config"]["accumulate"] = 4
        path.write_text(json.dumps(begun))
        assert read_recipe(finetune(recipe, resume=True)).accumulate == 4


def test_new_models_are_planned_for(tmp_path):
    table = {"columns": ("user", "item"), "rows": (4_000_000, 40), "size": 128, "numbers": ("x",)}
    work = Work("dlrm", 1024, config=table)
    spelt = dataclasses.replace(work, config="columns=user/item,rows=4000000/40,size=128,numbers=x")
    assert source_of(work) == source_of(spelt)
    found = plan_training(work, "v5e:2x4", compile=0)
    assert found.unit == "rows" and "rows/s" in str(found) and not found.notes
    narrow = plan_training(
        dataclasses.replace(work, config=table | {"size": 64}), "v5e:2x4", compile=0
    )
    assert "tables of 64 columns" in str(narrow)
    best = found.best.prediction
    # All devices have a part of the rows, which travel to who asks for them; no mesh without.
    assert best.memory.kinds["parameters"] < 4 * 128 * 4_000_000 / 8 * 1.01
    assert best.sent["rows of tables"] > 0
    lazy = plan_training(
        dataclasses.replace(work, table_optimizer="lazy_adam"), "v5e:2x4", compile=0
    )
    optimizer = lazy.best.prediction.memory.kinds["optimizer"]
    assert optimizer > 1.9 * best.memory.kinds["parameters"]
    # Towers contrast all pairs of rows, which microbatches would change; so is a batch norm whole.
    towers = Work("two_tower", 64, config="user_rows=500,item_rows=300,size=16")
    assert model_flops(towers) == 3 * 2 * 64 * 64 * 16
    for one in (towers, Work("unet", 8, size=32, config="width=4,depth=2")):
        layouts = plan_training(one, "2*cpu", compile=0).layouts
        assert {x.candidate.variant.choices["accumulate"] for x in layouts} == {"1"}


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("dlrm", {}, "as in config columns=user/item"),
        ("dlrm", {"config": "columns=a/labels,rows=3/4"}, "called 'labels'"),
        ("dlrm", {"config": "columns=a/b,rows=3/4,numbers=a"}, "called 'a'"),
        ("mlp", {}, "as in config numbers=20"),
        ("mlp", {"task": "ner"}, "mlp is for tabular, estimate"),
        ("mlp", {"config": "numbers=2", "size": 64}, "size is for image, segment"),
        ("unet", {"size": 40}, "size is 40; expected a multiple of 16"),
        ("llama-2-7b", {"task": "classify"}, "task 'classify': llama-2-7b is for lm"),
        ("llama-2-7b", {"accumulate": (0,)}, "accumulate is "),
    ],
)
def test_what_cannot_be_planned_is_said(model, options, said):
    with pytest.raises(FwError, match=said):
        source_of(Work(model, 8, **options)).batch(Work(model, 8, **options))


def test_adapters_of_images_train_in_float32(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 64, "image_size": 32, "patch_size": 16}  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "vit"} | sizes))
    work = Work(str(path), 8, adapters=(LoraOptions(lora=4),), remat=(None,), accumulate=(1,))
    with pytest.raises(FwError, match="choose bf16 or f32"):
        plan_training(work, "2*cpu", compile=0)
    with pytest.raises(FwError, match="choose bf16 or f32"):
        Finetune(task="image", model="x", data="x", lora=4, precision="bf16_activations")
    found = plan_training(dataclasses.replace(work, precision="bf16"), "2*cpu", compile=0)
    assert found.best.prediction.memory.kinds["frozen"] > 0


def test_new_models_have_no_adapters():
    work = Work("mlp", 8, config="numbers=2", adapters=(LoraOptions(lora=4),))
    with pytest.raises(FwError, match="mlp is trained whole"):
        plan_training(work, "2*cpu", compile=0)


@pytest.mark.parametrize("spec", ["data=2", "fsdp=2", "data=2,fsdp=2,tensor=2"])
def test_narrow_activations_are_summed_on_cpus_too(spec, tmp_path):
    recipe, _ = recipe_of("tabular", tmp_path, steps=1, epochs=0.0, mesh=spec, model="mlp")
    losses = []
    for precision in ("bf16_activations", "f32"):
        own = dataclasses.replace(recipe, precision=precision, run=str(tmp_path / precision))
        losses.append(run.metrics(finetune(own))[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
