"""A recipe of stages, from a run to an artifact: in order, resumed to the same bits, refused."""

import dataclasses
import json
import shutil

import pytest

from fw import finetune as finetune_module
from fw import pipeline, run
from fw.cli import main
from fw.errors import FwError
from fw.recipe import Finetune
from tests import tiny

RECIPE = """
[[stages]]
stage = "prune"
flops = 0.8

[[stages]]
stage = "distil"
epochs = 2
learning_rate = 1e-2

[[stages]]
stage = "compress"
recipe = "int8"

[[stages]]
stage = "export"
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A finished run, which tests copy."""
    root = tmp_path_factory.mktemp("world")
    model = tiny.make_model(root / "model", layers=2, seed=1)
    data = tiny.make_reviews(root / "data")
    words = ("finetune", "--task", "classify", "--length", "32", "--learning-rate", "1e-2",
             "--precision", "f32", "--steps", "24", "--model", model, "--data", data)  # fmt: skip
    assert main([str(w) for w in (*words, "--run", root / "run")]) == 0
    return root


@pytest.fixture
def small(world, tmp_path):
    shutil.copytree(world / "run", tmp_path / "run")
    (tmp_path / "small.toml").write_text(RECIPE)
    return tmp_path


def compress(folder, status=0, more=()):
    words = ("compress", folder / "run", "--recipe", folder / "small.toml", *more)
    assert main([str(w) for w in words]) == status


def weights(folder):
    work = folder / "run/pipelines/small"
    return [
        (work / name).read_bytes()
        for name in (
            "1-prune/model/model.safetensors",
            "2-distil/model/model.safetensors",
            "2-distil/compressed/int8/model.safetensors",
            "artifact/model.safetensors",
        )
    ]


def test_stages_run_in_order_and_resume_to_the_same_bits(
    small, world, tmp_path_factory, capsys, monkeypatch
):
    def ran(folder, *more):
        compress(folder, more=more)
        return capsys.readouterr().out

    said = ran(small)
    told = json.loads((small / "run/pipelines/small/pipeline.json").read_text())["stages"]
    assert [entry["spec"]["stage"] for entry in told] == [
        "start",
        "prune",
        "distil",
        "compress",
        "export",
    ]
    sizes = [entry["figures"]["bytes"] for entry in told[:4]]
    assert sizes[0] > sizes[1] == sizes[2] > sizes[3]
    assert "stage 4 of 4: export" in said

    # A second one is killed in its second stage, goes on, and ends with the same bits.
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(world / "run", other / "run")
    (other / "small.toml").write_text(RECIPE)
    whole = finetune_module.train

    def killed(*args, **kwargs):
        whole(*args, **{**kwargs, "steps": kwargs["steps"] // 2})
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune_module, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        pipeline.pipeline(other / "run", other / "small.toml", say=lambda _: None)
    monkeypatch.undo()
    assert not (other / "run/pipelines/small/2-distil/model").exists()
    other = other.rename(other.with_name("elsewhere"))  # its model and its teacher with it
    capsys.readouterr()
    said = ran(other)
    assert "(done before)" in said
    assert "stage 1 of 4" not in said
    assert weights(other) == weights(small)

    # All is done: nothing is done again, on another split neither.
    assert "stage " not in ran(other)
    said = ran(other, "--split", "test")
    assert "stage " not in said
    assert "distil    test macro_f1" in said
    # What has gone, or has another recipe's model in its place, is made again.
    made = other / "run/pipelines/small/2-distil/compressed/int8/model.safetensors"
    made.write_bytes(made.read_bytes()[:-1] + b"\x01")
    said = ran(other)
    assert "stage 2 of 4" not in said
    assert "stage 3 of 4: compress" in said
    assert "stage 4 of 4: export" in said
    assert weights(other) == weights(small)
    # Another last stage: only that.
    (other / "small.toml").write_text(RECIPE.replace('"int8"', '"int8-weights"'))
    said = ran(other)
    assert "stage 2 of 4" not in said
    assert "stage 3 of 4: compress" in said
    # A stage whose folder has gone, and what follows, is done again; the rest is not lost.
    shutil.rmtree(other / "run/pipelines/small/2-distil")
    (other / "small.toml").write_text(RECIPE.partition('[[stages]]\nstage = "compress"')[0])
    moved = other.with_name("moved")
    other.rename(moved)
    said = ran(moved)
    assert "stage 1 of 2" not in said
    assert "stage 2 of 2: distil" in said
    files = "run/pipelines/small/2-distil/model/model.safetensors"
    assert (moved / files).read_bytes() == (small / files).read_bytes()


TORN = ("[]", "null", "{}", '{"stages": 3}', '{"stages": [1]}', '{"stages": [{"spec": {}}]}')


@pytest.mark.parametrize("text", TORN)
def test_a_damaged_file_of_what_was_done_is_refused(text, small, capsys):
    work = small / "run/pipelines/small"
    work.mkdir(parents=True)
    (work / "pipeline.json").write_text(text)
    compress(small, status=1)
    assert "pipeline.json: not what a pipeline writes; remove it" in capsys.readouterr().err


WRONG = {
    "nothing": ("", "expected \\[\\[stages\\]\\]"),
    "kind": ('[[stages]]\nstage = "shrink"', "stage 1: expected stage = one of prune"),
    "option": ('[[stages]]\nstage = "prune"\nflop = 0.5', "unknown option 'flop'"),
    "type": ('[[stages]]\nstage = "prune"\nflops = "half"', "flops is 'half'; expected float"),
    "part": (
        '[[stages]]\nstage = "prune"\nflops = nan',
        "flops is nan; expected the part",
    ),
    "multiple": ('[[stages]]\nstage = "prune"\nflops = 0.5\nmultiple = 0', "multiple is 0"),
    "layers": ('[[stages]]\nstage = "prune"\nlayers = 1\nmultiple = 2', "layers stay evenly"),
    "budget": ('[[stages]]\nstage = "prune"', "give parameters, flops or latency"),
    "own": ('[[stages]]\nstage = "distil"\nmodel = "x"', "unknown option 'model'"),
    "value": ('[[stages]]\nstage = "distil"\ntemperature = 0.0', "temperature is 0.0"),
    "recipe": ('[[stages]]\nstage = "compress"\nrecipe = "int3"', "int3': expected one of int8"),
    "order": ('[[stages]]\nstage = "export"\n[[stages]]\nstage = "export"', "export is the last"),
    "floats": (
        '[[stages]]\nstage = "compress"\n[[stages]]\nstage = "distil"',
        "distil comes after compress",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_recipe_is_refused_before_anything_is_done(name, tmp_path):
    text, message = WRONG[name]
    (tmp_path / "small.toml").write_text(text)
    config = dataclasses.asdict(Finetune(task="classify", data="reviews", model="model"))
    (tmp_path / "run").mkdir()
    run.write_json(tmp_path / "run" / run.CONFIG, {"config": config, "starts": []})
    with pytest.raises(FwError, match=message):
        pipeline.pipeline(tmp_path / "run", tmp_path / "small.toml")
    assert not (tmp_path / "run/pipelines").exists()


@pytest.mark.slow
def test_codes_may_be_learnt_in_a_stage(small, capsys):
    """Taught by the run, and exported as what was learnt."""
    text = """
[[stages]]
stage = "prune"
flops = 0.8

[[stages]]
stage = "qat"
format = "int4"
epochs = 1
teacher_attention = 1.0

[[stages]]
stage = "export"
"""
    (small / "small.toml").write_text(text)
    compress(small)
    told = json.loads((small / "run/pipelines/small/pipeline.json").read_text())["stages"]
    assert told[2]["figures"]["bytes"] < 0.8 * told[1]["figures"]["bytes"]
    folder = small / "run/pipelines/small"
    assert run.config(folder / "2-qat")["qat"] == "int4"
    recipe = json.loads((folder / "artifact/manifest.json").read_text())
    assert "int4" in json.dumps(recipe)
