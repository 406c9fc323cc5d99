"""A search for a recipe: what a target spells, what it finds in a run, and that it goes on."""

import json
import shutil

import jax
import numpy as np
import pytest

from fw import pipeline, stages, target
from fw.cli import main
from fw.errors import FwError
from fw.target import Target, Trial
from tests import tiny

TARGETS = {
    "latency 2x, quality -1": Target(2.0, 0.0, -1.0),
    "size 4.5x": Target(0.0, 4.5, -1.0),
    "quality 0,latency 1.7x , size 3x": Target(1.7, 3.0, 0.0),
}
REFUSED = {
    "": "a latency or a size of more than 1x",
    "quality -1": "a latency or a size of more than 1x",
    "latency 0.5x, size 2x": "a latency or a size of more than 1x",
    "latency 2x, quality 1": "expected 0 or less",
    "latency 2": "'latency 2'; expected each of",
    "latency 2x, latency 3x": "'latency 3x'; expected each of",
}


@pytest.mark.parametrize("text", TARGETS)
def test_what_a_target_spells(text):
    assert Target.of(text) == TARGETS[text]


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_target(text):
    with pytest.raises(FwError) as refused:
        Target.of(text)
    assert REFUSED[text] in str(refused.value)


def test_what_meets_a_target_to_the_digit():
    wanted = Target(2.0, 3.0, -1.0)
    assert Trial(0, 0, "int8", 2.0, 3.0, 100 * (0.85 - 0.86)).meets(wanted)
    for worse in ((1.99, 3.0, 0.0), (2.0, 2.9, 0.0), (2.0, 3.0, -1.1)):
        assert not Trial(0, 0, "int8", *worse).meets(wanted)
    assert Trial(0, 0, "int8", 2.0, 3.0, -5.0).meets(wanted, but="quality")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A finished run, which tests copy."""
    root = tmp_path_factory.mktemp("world")
    where = ("--model", tiny.make_model(root / "model", layers=2, seed=1), "--data",
             tiny.make_reviews(root / "data"))  # fmt: skip
    words = ("finetune", "--task", "classify", "--length", "32", "--learning-rate", "1e-2",
             "--precision", "f32", "--steps", "24", *where, "--run", root / "run")  # fmt: skip
    assert main([str(w) for w in words]) == 0
    return root


SIZE = 2.13
"""Times less than what int8 and one level of pruning give, and no more than two do."""


def search(folder, text, status=0):
    words = ("compress", folder / "run", "--target", text, "--epochs", "1")
    assert main([str(w) for w in words]) == status


@pytest.mark.slow
def test_a_search_prunes_where_formats_are_not_enough_and_goes_on(
    world, tmp_path, capsys, monkeypatch
):
    """What was done is not done again; the recipe that it writes makes the same model."""
    shutil.copytree(world / "run", tmp_path / "run")
    for name, value in (("FORMATS", ("int8",)), ("STEP", 0.92), ("MULTIPLE", 2)):
        monkeypatch.setattr(target, name, value)
    search(tmp_path, f"size {SIZE}x, quality -100")
    said, work = capsys.readouterr().out, tmp_path / f"run/targets/size-{SIZE}x-quality-100"
    told = json.loads((work / "trials.json").read_text())["trials"]
    assert [(t["level"], t["stages"], t["variant"]) for t in told] == [
        (0, 0, "int8"), (1, 2, "f32"), (1, 2, "int8"), (2, 4, "f32"), (2, 4, "int8")
    ]  # fmt: skip
    assert told[2]["size"] < SIZE <= told[4]["size"]
    assert said.splitlines()[-1] == str(work)
    (chosen,) = (line for line in said.splitlines() if line.endswith("chosen"))
    assert chosen.startswith("0.8464 of the operations, int8")
    assert (work / "report.html").read_text().startswith("<!doctype html>")
    # Killed after the first level, it goes on: what is there is taken, and comes out the same.
    first = json.loads((work / "trials.json").read_text())
    (work / "trials.json").write_text(json.dumps({**first, "trials": told[:3]}))
    stages_of = sorted((tmp_path / "run/pipelines" / work.name).glob("*-*/"))
    inodes = [path.stat().st_ino for path in stages_of]
    assert len(inodes) == 4
    search(tmp_path, f"size {SIZE}x, quality -100")
    again = json.loads((work / "trials.json").read_text())["trials"]
    assert [(t["size"], t["quality"]) for t in again] == [(t["size"], t["quality"]) for t in told]
    # It had ended: the same is chosen and exported again, though its variant has gone.
    made = (work / "artifact/model.safetensors").read_bytes()
    shutil.rmtree(work / "artifact")
    shutil.rmtree(stages_of[-1] / "compressed")
    search(tmp_path, f"size {SIZE}x, quality -100")
    assert (work / "artifact/model.safetensors").read_bytes() == made
    assert [path.stat().st_ino for path in stages_of] == inodes
    # By the recipe alone, in another run of the same model.
    shutil.copytree(world / "run", tmp_path / "other/run")
    made = pipeline.pipeline(tmp_path / "other/run", work / "recipe.toml")
    weights = (folder / "artifact/model.safetensors" for folder in (made, work))
    assert len({path.read_bytes() for path in weights}) == 1


def test_what_nothing_meets_is_told(world, tmp_path, capsys, monkeypatch):
    shutil.copytree(world / "run", tmp_path / "run")
    monkeypatch.setattr(target, "FORMATS", ("int8",))
    monkeypatch.setattr(target, "LEVELS", 0)
    search(tmp_path, "size 90x, quality -100", status=1)
    assert "nothing that was tried meets the target; see" in capsys.readouterr().out
    search(tmp_path, "size 90", status=1)
    assert "expected each of" in capsys.readouterr().err


def test_times_are_of_the_variant_beside_the_run(world, monkeypatch):
    """Of a clock that a call of the run moves by three, and one of the variant by one."""
    opened = stages.open_run(world / "run")
    of = stages.variant(opened, "f32")[1]
    now = [0.0]
    monkeypatch.setattr(target.time, "perf_counter", lambda: now[0])

    def taking(seconds):
        def tick(x):
            now[0] += seconds
            return np.asarray(x)

        def forward(variables, batch):
            y = of(variables, batch)
            return jax.pure_callback(tick, jax.ShapeDtypeStruct(y.shape, y.dtype), y)

        return opened.loaded.variables, forward

    variants = {"f32": taking(3.0), "int8": taking(1.0)}
    monkeypatch.setattr(stages, "variant", lambda opened, name: variants[name])
    assert target.times_faster(opened, opened, "int8") == pytest.approx(3.0)


HOSTILE = {"a list": "[]", "nothing": "null", "no trials": "{}", "torn": '{"asked": '}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_damaged_file_of_trials_is_told(world, tmp_path, capsys, case):
    shutil.copytree(world / "run", tmp_path / "run")
    work = tmp_path / "run/targets/size-9x-quality-1"
    work.mkdir(parents=True)
    (work / "trials.json").write_text(HOSTILE[case])
    search(tmp_path, "size 9x, quality -1", status=1)
    assert "trials.json" in capsys.readouterr().err


def test_options_that_do_not_go_together(world, capsys):
    for words, said in (
        (("--target", "size 2x", "--recipe", "int4"), "leave --recipe and --mesh away"),
        (("--epochs", "3"), "epochs is for --target"),
        (("--target", "size 2x", "--epochs", "0"), "epochs is 0.0; expected more than 0"),
    ):
        assert main(["compress", str(world / "run"), *words]) == 1
        assert said in capsys.readouterr().err
