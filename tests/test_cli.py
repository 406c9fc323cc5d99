"""The command as a user meets it: help that helps, errors of one line, a process made ready."""

import argparse
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fw import run
from fw.cli import main
from fw.cli.main import _parser
from fw.errors import FwError
from fw.options import add_options, descriptions, read_options
from fw.recipe import Finetune, read_recipe
from tests import tiny

ROOT = Path(__file__).parents[1]
COMMANDS = ("fetch", "finetune", "eval", "compress", "export", "predict")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    tiny.make_model(root / "model")
    tiny.make_ner(root / "ner")
    tiny.make_reviews(root / "reviews")
    return root


def finetune(world, folder, *more, task="ner", data=None):
    """The command line of a run that the tests here do not expect to come far."""
    data = world / {"ner": "ner", "classify": "reviews"}[task] if data is None else data
    options = ("--task", task, "--model", world / "model", "--data", data, "--run", folder)
    return [str(word) for word in ("finetune", *options, "--length", "32", *more)]


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_every_option_does(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    (subparsers,) = [a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)]
    for action in subparsers.choices[command]._actions:
        assert action.help, action.dest
        assert all(flag in text for flag in action.option_strings)
    if command == "finetune":
        for name, said in descriptions(Finetune).items():
            assert f"--{name.replace('_', '-')}" in text
            assert said.removesuffix(".") in text


def test_the_command_lists_its_subcommands(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(f"fw {command}" in text for command in COMMANDS)
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2


def test_every_field_is_an_option_of_its_type_and_described():
    assert descriptions(Finetune).keys() == {f.name for f in dataclasses.fields(Finetune)}
    parser = argparse.ArgumentParser()
    add_options(parser, Finetune)
    other = Finetune(data="d")
    for field in dataclasses.fields(Finetune):
        value = getattr(other, field.name)
        assert type(value) is field.type, field.name
    words = ["--data=d", "--epochs", "2", "--no-packed", "--skip-bad-rows", "--learning-rate=1e-3"]
    read = read_options(parser.parse_args(words), Finetune, seed=7, epochs=9.0)
    want = {"epochs": 2.0, "packed": False, "skip_bad_rows": True, "learning_rate": 1e-3, "seed": 7}
    assert read == dataclasses.replace(other, **want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "tag"}, "task 'tag' is unknown; choose one of ner, classify"),
        ({"data": ""}, "data is missing; give --data"),
        ({"precision": "fp8"}, "precision 'fp8' is unknown"),
        ({"schedule": "step"}, "schedule 'step' is unknown"),
        ({"scheme": "bilou"}, "scheme 'bilou' is unknown; choose one of auto, iob1, bio"),
        ({"batch": 6, "accumulate": 4}, "batch is 6, which accumulate=4 does not divide"),
        ({"batch": 0}, "batch is 0; expected 1 or more"),
        ({"steps": -1}, "steps is -1; expected 0 or more"),
        ({"epochs": 0.0}, "epochs and steps are both 0"),
        ({"seed": -1}, "seed is -1; expected 0 … 4294967295"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; expected a number"),
        ({"clip": float("inf")}, "clip is inf; expected a number"),
        ({"columns": "text"}, "columns is 'text'; expected two names"),
        ({"columns": "text,"}, "columns is 'text,'; expected two names"),
    ],
)
def test_an_option_is_refused_before_anything_is_read(options, message):
    with pytest.raises(FwError) as raised:
        Finetune(**{"data": "d", **options})
    assert message in str(raised.value)


def test_a_recipe_comes_back_from_a_run_and_a_damaged_one_is_named(tmp_path):
    recipe = Finetune(data="d", batch=4, learning_rate=1e-3, packed=False)
    folder = run.create(tmp_path / "run", {**dataclasses.asdict(recipe), "labels": ["a"]})
    assert read_recipe(folder) == recipe
    path = folder / run.CONFIG
    whole = json.loads(path.read_text())
    for damage, message in [
        ({"batch": "8"}, "'config/batch': expected int, got '8'"),
        ({"batch": True}, "'config/batch': expected int, got True"),
        ({"packed": 1}, "'config/packed': expected bool, got 1"),
        ({"learning_rate": None}, "'config/learning_rate': expected float, got None"),
        ({"task": "tag"}, "task 'tag' is unknown"),
    ]:
        path.write_text(json.dumps({**whole, "config": whole["config"] | damage}))
        with pytest.raises(FwError) as raised:
            read_recipe(folder)
        assert str(path) in str(raised.value)
        assert message in str(raised.value)


# --- errors: one line, status 1, and no run where none began --------------------------------------


def refused(capsys, command):
    """The one line that a refused command prints."""
    assert main([str(word) for word in command]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fw: ")
    assert error.count("\n") == 1
    return error


def test_what_a_run_cannot_start_with_is_named_and_leaves_nothing(world, tmp_path, capsys):
    def start(*more, **options):
        error = refused(capsys, finetune(world, tmp_path / "run", *more, **options))
        assert not (tmp_path / "run").exists()
        return error

    assert "data 'nowhere.csv' is no file: " in start(data="nowhere.csv")
    assert "did you mean 'all-MiniLM-L6-v2'" in start("--model", "all-minilm-l6")
    assert "unknown mesh axis 'tensr': did you mean 'tensor'" in start("--mesh", "tensr=2")
    assert "needs 64 devices, but there are 8" in start("--mesh", "data=64")
    assert "unknown rules 'fspd'" in start("--rules", "fspd")
    assert "batch: axis 'batch' has size 6, which data=2 x fsdp=2 does not divide" in start(
        "--batch", "6", "--mesh", "data=2,fsdp=2"
    )
    assert "batch / accumulate: axis 'batch' has size 2" in start(
        "--batch", "8", "--accumulate", "4", "--mesh", "data=4"
    )
    assert "axis 'embed' has size 16, which fsdp=3" in start("--mesh", "fsdp=3", "--batch", "6")
    assert "length is 64, but" in (error := start("--length", "64"))
    assert "has 48 positions; choose 48 or less" in error
    assert "task 'tag' is unknown" in start("--task", "tag")
    assert "train.csv:1: expected one column named 'stars'" in start(
        "--columns", "text,stars", task="classify"
    )
    assert "expected a file for token_classification with 'train' in its name" in start(
        data=world / "model"
    )


def test_data_that_a_run_cannot_use_is_named(world, tmp_path, capsys):
    folder = tmp_path / "reviews"
    folder.mkdir()
    command = finetune(world, tmp_path / "run", task="classify", data=folder)
    (folder / "train.csv").write_text("text,label\ngood,yes\nbad,no\nfine\n")
    (folder / "dev.csv").write_text("text,label\ngood,yes\n")
    assert "train.csv:4: expected 2 cells; got 1" in refused(capsys, command)
    (folder / "train.csv").write_text("text,label\ngood,yes\nbad,no\n")
    (folder / "dev.csv").write_text("text,label\ngood,maybe\n")
    error = refused(capsys, command)
    assert "dev.csv:2: expected a label of the training data (no, yes); got 'maybe'" in error
    (folder / "dev.csv").rename(folder / "test.csv")
    (folder / "dev.csv").write_text("text,label\ngood,yes\n")
    assert "test.csv:2: expected a label of the training data" in refused(capsys, command)
    single = finetune(world, tmp_path / "run", task="classify", data=folder / "train.csv")
    assert "no text for dev; " in refused(capsys, single)
    (folder / "train.csv").write_bytes(b"text,label\ncaf\xe9,yes\n")
    assert "train.csv:2: expected UTF-8" in refused(capsys, command)


def test_a_tokenizer_of_another_model_is_refused(world, tmp_path, capsys):
    model = shutil.copytree(world / "model", tmp_path / "model")
    (model / "vocab.txt").write_text("\n" * 50 + (model / "vocab.txt").read_text())
    command = [*finetune(world, tmp_path / "run"), "--model", model]
    assert "is it another model's tokenizer?" in refused(capsys, command)


def test_a_loss_that_is_not_finite_ends_the_run(world, tmp_path, capsys):
    options = ("--learning-rate", "1e30", "--warmup", "0", "--steps", "2", "--clip", "0")
    assert main(finetune(world, tmp_path / "run", *options)) == 1
    *progress, error = capsys.readouterr().err.splitlines()
    assert error.startswith(f"fw: {tmp_path / 'run'}: ")
    assert "at step 2; there is no checkpoint yet" in error
    assert "--learning-rate" in error
    assert "Traceback" not in "".join(progress)
    assert "finish the run with --resume" in refused(capsys, ["eval", tmp_path / "run"])


@pytest.mark.parametrize("command", ["eval", "compress", "export"])
def test_a_stage_without_a_run_or_with_a_damaged_one(tmp_path, capsys, command):
    assert "holds no run" in refused(capsys, [command, tmp_path])
    (tmp_path / run.CONFIG).write_text('{"config": {\n')
    assert f"{run.CONFIG}:2: not JSON" in refused(capsys, [command, tmp_path])


def test_predict_with_what_is_no_artifact(tmp_path, capsys):
    assert "there is no such folder" in refused(capsys, ["predict", tmp_path / "a", "text"])
    assert "manifest.json" in refused(capsys, ["predict", tmp_path, "text"])


# --- the process ----------------------------------------------------------------------------------

GLIBC = platform.libc_ver()[0] == "glibc"
PROGRAM = """\
import json, os, sys
from fw import host
with open(os.environ["STARTS"], "a") as file:
    json.dump([os.getpid(), "jax" in sys.modules, sys.argv[1:], os.environ.get("GLIBC_TUNABLES")],
              file)
    file.write("\\n")
host.prepare("data=3, fsdp=1" if sys.argv[1:] == ["devices"] else "")
if sys.argv[1:] == ["devices"]:
    import jax
    assert len(jax.devices()) == 3, jax.devices()
"""


def starts(tmp_path, command, stdin=None, **environment):
    """Every start of the program in a process: its id, whether JAX was there, words, setting."""
    record = tmp_path / "starts"
    env = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "XLA_FLAGS")}
    env |= {"STARTS": str(record), "PYTHONPATH": f"{ROOT}:{tmp_path}", **environment}
    done = subprocess.run(
        [sys.executable, *command], env=env, input=stdin, text=True, capture_output=True,
        check=False, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in record.read_text().splitlines()]


@pytest.mark.skipif(not GLIBC, reason="only glibc has these settings")
@pytest.mark.parametrize("form", ["script", "module", "code"])
def test_the_process_starts_once_more_with_the_same_words(tmp_path, form):
    (tmp_path / "program.py").write_text(PROGRAM)
    how = {"script": ["program.py"], "module": ["-m", "program"], "code": ["-c", PROGRAM]}[form]
    words = ["--data", "a b", "", "ü", "-x"]
    first, second = starts(tmp_path, ["-X", "utf8", *how, *words])
    assert first[0] == second[0]  # the process keeps its id, for whoever waits for it or kills it
    assert not first[1]  # and restarts before it has loaded anything large
    assert first[2] == second[2] == words
    assert first[3] is None
    assert "glibc.malloc.hugetlb=1" in second[3]


def test_what_the_user_set_stays_and_standard_input_is_not_read_twice(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    for setting in ("", "glibc.malloc.check=1"):
        (tmp_path / "starts").unlink(missing_ok=True)
        (only,) = starts(tmp_path, ["program.py"], GLIBC_TUNABLES=setting)
        assert only[3] == setting
    (tmp_path / "starts").unlink()
    assert len(starts(tmp_path, ["-", "a"], stdin=PROGRAM)) == 1


def test_a_cpu_gets_the_devices_of_the_mesh(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    assert len(starts(tmp_path, ["program.py", "devices"])) == 1 + GLIBC


def command(*words, stdout=subprocess.PIPE):
    """The command in a process of its own, whose devices it settles itself."""
    code = "import sys; from fw.cli import main; sys.exit(main())"
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code, *words], env=env, text=True, stdout=stdout,
        stderr=subprocess.PIPE, check=False, timeout=120,
    )  # fmt: skip


def test_an_error_of_the_command_is_a_status_and_one_line(world, tmp_path):
    done = command(*finetune(world, tmp_path / "run", "--mesh", "data=3", "--batch", "4"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("fw: batch: axis 'batch' has size 4, which data=3")
    assert done.stderr.count("\n") == 1


def test_a_reader_that_has_seen_enough_is_no_error():
    reads, writes = os.pipe()
    os.close(reads)
    done = command("fetch", "--list", stdout=writes)
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")
