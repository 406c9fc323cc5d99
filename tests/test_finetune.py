"""The line from end to end on tiny models: every stage, on every mesh, killed where it hurts."""

import dataclasses
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from filelock import FileLock
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from fw import data, hub, run, stages
from fw.checkpoint import Checkpoints
from fw.cli import main
from fw.errors import FwError
from fw.recipe import Finetune
from fw.step import TrainState
from fw.tasks import Summary
from fw.train import Progress, train
from sharding import gather, make_mesh, paths, rules
from tests import tiny
from tests.marks import slow

pytestmark = pytest.mark.usefixtures("quickly_compiled")

ONE, EIGHT = "data=1", "data=2,fsdp=2,tensor=2"
COMMON = ("--length", "32", "--learning-rate", "1e-2", "--precision", "f32")
STEPS = {"ner": 24, "classify": 32}
OPTIONS = {
    "ner": ("--task", "ner", "--steps", "24", "--evaluate-every", "4", "--log-every", "2"),
    "classify": (
        *("--task", "classify", "--columns", "text,liked", "--epochs", "8", "--accumulate", "2"),
        *("--skip-bad-rows", "--schedule", "constant", "--warmup", "0"),
        *("--keep-last", "2", "--log-every", "1"),
    ),
}
LABELS = {"ner": ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"], "classify": ["no", "yes"]}
TMP = "*orbax-checkpoint-tmp*"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the model and the data; the reviews' dev set contradicts their training set."""
    root = tmp_path_factory.mktemp("world")
    # Of the models of seeds 0 … 5, five learn the names in so few steps.
    tiny.make_model(root / "model", seed=1)
    tiny.make_ner(root / "ner")
    reviews = tiny.make_reviews(root / "classify", flip=True)
    with (reviews / "train.csv").open("a") as file:
        file.write("\na film without a label")
    return root


def words(world, task, folder, *more):
    """The command line of a run."""
    options = (*COMMON, *OPTIONS[task], "--model", world / "model", "--data", world / task)
    return [str(word) for word in ("finetune", *options, "--run", folder, *more)]


@pytest.fixture(scope="module")
def runs(world):
    """A function of task and mesh: a finished run; each is made once."""
    made = {}

    def get(task, mesh=ONE):
        if (task, mesh) not in made:
            folder = world / f"{task}-{mesh}"
            assert main(words(world, task, folder, "--mesh", mesh)) == 0
            made[task, mesh] = folder
        return made[task, mesh]

    return get


def losses(folder):
    return {r["step"]: r["loss"] for r in run.metrics(folder) if r["kind"] == "train"}


def parameters(folder):
    return load_file(folder / "model" / "model.safetensors")


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name, array in a.items():
        assert array.tobytes() == b[name].tobytes(), name


# --- a run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [slow("ner"), "classify"])
def test_a_run_explains_itself(runs, world, task):
    folder = runs(task)
    config, result = run.config(folder), run.read_json(folder / run.RESULT)
    for field in dataclasses.fields(Finetune):
        assert field.name in config
    given = {"task": task, "length": 32, "learning_rate": 1e-2, "data": str(world / task)}
    assert given.items() <= config.items()
    assert config["steps"] == STEPS[task]  # for classify, 8 epochs of 4 steps
    assert config["labels"] == LABELS[task]
    assert config["records"] == {"train": 96, "dev": 24, "test": 24}
    assert config["skipped_rows"] == (task == "classify")
    assert config["cut_tokens"] == 0
    # The model's own classifier has two classes.
    fresh = ["classifier/bias", "classifier/kernel"] if task == "ner" else []
    assert config["new_parameters"] == fresh

    assert {"dev", "test"} == result["splits"].keys()
    assert result["stages"].keys() == {"prepare", "train", "save"}
    html = (folder / run.REPORT).read_text()
    for name in (*LABELS[task], "Results on test", "learning_rate", str(config["learning_rate"])):
        assert name.removeprefix("B-").removeprefix("I-") in html


@pytest.mark.parametrize("task", [slow("ner"), "classify"])
def test_the_best_checkpoint_is_delivered_and_the_last_is_kept(runs, task):
    folder = runs(task)
    result = run.read_json(folder / run.RESULT)
    scores = {r["step"]: r["value"] for r in run.metrics(folder) if r["kind"] == "eval"}
    best = max(scores, key=lambda step: (scores[step], step))
    assert result["best_step"] == best
    last = {"ner": {24}, "classify": {28, 32}}[task]
    assert result["checkpoints"] == sorted({best, *last})
    assert sorted(int(p.name) for p in (folder / "checkpoints").iterdir()) == result["checkpoints"]
    if task == "classify":  # its dev set contradicts it, so that learning makes it worse
        assert best < STEPS[task]
        assert result["splits"]["dev"]["macro_f1"] == pytest.approx(scores[best])
    else:
        assert result["splits"]["test"]["f1"] > 0.9

    saved = ocp.StandardCheckpointer().restore(folder / "checkpoints" / str(best) / "default")
    loaded = hub.load(folder / "model", mesh=make_mesh(ONE), rules=rules())
    assert loaded.labels == tuple(LABELS[task])
    want, got = saved["variables"]["params"], gather(loaded.variables["params"])
    for path, a, b in zip(paths(got), jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)


@pytest.mark.parametrize("task", [pytest.param("ner", marks=pytest.mark.slow), "classify"])
def test_eight_devices_give_the_numbers_of_one(runs, task):
    one, eight = (losses(runs(task, mesh)) for mesh in (ONE, EIGHT))
    assert one.keys() == eight.keys()
    np.testing.assert_allclose(list(one.values()), list(eight.values()), rtol=1e-4)
    assert run.config(runs(task, EIGHT))["mesh"] == EIGHT
    assert run.starts(runs(task, EIGHT))[0]["devices"]["count"] == 8


def test_the_learning_rate_and_the_tokens_of_each_step_are_logged(runs, world):
    records = [r for r in run.metrics(runs("ner")) if r["kind"] == "train"]
    assert [r["step"] for r in records] == list(range(2, 25, 2))
    # Linear from 0 to the peak in a tenth of the steps, then down; the record is of its last step.
    want = [1e-2 * min((s - 1) / 2, (24 - (s - 1)) / 22) for s in range(2, 25, 2)]
    np.testing.assert_allclose([r["learning_rate"] for r in records], want, rtol=1e-5)

    tokenizer = data.load_tokenizer(world / "model")
    text = (world / "ner" / "train.conll").read_text().strip().split("\n\n")
    sentences = [[line.split()[0] for line in s.split("\n")] for s in text]
    epoch = sum(len(tokenizer.fast.encode(s, is_pretokenized=True).ids) for s in sentences)
    assert sum(r["tokens"] for r in records) == 8 * epoch  # 24 rows an epoch, 8 a step


# --- the stages after it --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compressed(runs):
    folder = runs("ner")
    assert main(["compress", str(folder), "--split", "test"]) == 0
    return folder


def test_eval_of_a_variant_on_a_mesh(compressed, capsys):
    want = run.read_json(compressed / run.RESULT)["splits"]["test"]["f1"]
    for variant in ("f32", "int8"):
        assert main(["eval", str(compressed), "--variant", variant, "--mesh", EIGHT]) == 0
        row = re.search(r"micro avg +\S+ +\S+ +(\S+) +(\d+)", capsys.readouterr().out)
        assert row is not None
        assert float(row[1]) == pytest.approx(want, abs=0.05 if variant == "int8" else 1e-4)
        assert int(row[2]) > 20


def test_eval_where_the_data_has_moved(compressed, world, tmp_path, capsys):
    moved = shutil.copytree(compressed, tmp_path / "run")
    config = json.loads((moved / run.CONFIG).read_text())
    config["config"]["data"] = str(tmp_path / "elsewhere")
    (moved / run.CONFIG).write_text(json.dumps(config))
    assert main(["eval", str(moved)]) == 1
    assert "elsewhere" in (error := capsys.readouterr().err)
    assert "give --data" in error
    assert main(["eval", str(moved), "--data", str(world / "ner"), "--split", "dev"]) == 0
    got, want = (run.read_json(f / run.RESULT)["splits"]["dev"] for f in (moved, compressed))
    assert got["f1"] == pytest.approx(want["f1"])


def test_compress_says_what_it_cost(compressed):
    tensors = load_file(compressed / "compressed" / "int8" / "model.safetensors")
    kernels = {n for n, x in tensors.items() if x.dtype == np.int8}
    assert len(kernels) == 7 + 3  # and tables of words, places and kinds of texts
    report = run.read_json(compressed / "compressed" / "int8" / "report.json")
    changed = [leaf for leaf in report["leaves"] if leaf["bytes_before"] != leaf["bytes_after"]]
    assert {n.split(":")[0] for n in kernels} == {leaf["path"] for leaf in changed}
    assert all(0 < leaf["error"] < 0.02 for leaf in changed)

    f32, int8 = run.read_json(compressed / run.RESULT)["variants"]
    assert (f32["name"], int8["name"], int8["split"]) == ("f32", "int8", "test")
    assert f32["bytes"] == sum(x.nbytes for x in parameters(compressed).values())
    assert int8["bytes"] == sum(x.nbytes for x in tensors.values())
    assert 0.25 < int8["encoder_bytes"] / f32["encoder_bytes"] < 0.5  # of 16 rows, scales weigh
    assert "Compression" in (compressed / run.REPORT).read_text()


def test_export_and_predict_every_variant(compressed, tmp_path, capsys):
    artifacts = {name: tmp_path / name for name in stages.VARIANTS}
    for name, folder in artifacts.items():
        assert main(["export", str(compressed), "--variant", name, "--output", str(folder)]) == 0
        manifest = json.loads((folder / "manifest.json").read_text())
        provenance = manifest["provenance"]
        assert (provenance["run"], provenance["steps"]) == (compressed.name, STEPS["ner"])
        assert (manifest["precision"], bool(manifest["compression"]["formats"])) == {
            "f32": ("f32", False), "bf16": ("bf16", False), "int8": ("f32", True)
        }[name]  # fmt: skip
    capsys.readouterr()
    assert main(["predict", str(folder), "Ada went to Rome.", "--jsonl"]) == 0
    answer = json.loads(capsys.readouterr().out)
    found = [(e["type"], e["text"], e["start"]) for e in answer["entities"]]
    assert found == [("PER", "Ada", 0), ("LOC", "Rome", 12)]

    rows = stages.summary_rows(compressed, artifacts)  # shorter rows than it times by default
    assert [(row["name"], row["length"]) for row in rows] == [(n, 32) for n in stages.VARIANTS]
    sizes = {row["name"]: row["bytes"] for row in rows}
    assert sizes["int8"] < sizes["bf16"] < sizes["f32"]
    assert all(row["latency_ms"] > 0 and row["f1"] > 0.9 for row in rows)
    assert run.read_json(compressed / run.RESULT)["variants"] == rows
    assert private(tmp_path, *artifacts.values()) == set()


def private(scratch, *folders):
    """The files there that only their owner may read, unlike what is made here."""
    (scratch / "new").touch()
    usual = stat.S_IMODE((scratch / "new").stat().st_mode)
    files = [path for folder in folders for path in folder.iterdir() if path.is_file()]
    assert len(files) > 2
    return {p.name for p in files if p.suffix and stat.S_IMODE(p.stat().st_mode) != usual}


def test_whoever_reads_one_file_of_a_run_reads_them_all(compressed, tmp_path):
    assert (
        private(tmp_path, compressed, compressed / "model", compressed / stages.COMPRESSED / "int8")
        == set()
    )


def test_a_damaged_stage_is_named(compressed, tmp_path):
    copy = shutil.copytree(compressed, tmp_path / "run")
    weights = copy / stages.COMPRESSED / "int8" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(FwError, match=r"int8/model\.safetensors"):
        stages.evaluate_run(copy, name="int8")
    shutil.rmtree(copy / stages.COMPRESSED / "int8")
    with pytest.raises(FwError, match="fw compress"):
        stages.evaluate_run(copy, name="int8")
    shutil.rmtree(copy / "model")
    with pytest.raises(FwError, match="--resume"):
        stages.evaluate_run(copy)


# --- killed and resumed ---------------------------------------------------------------------------


class Killed:
    """A run in a process of its own, to be killed with SIGKILL at a moment."""

    def __init__(self, command, log):
        source = "import sys; from fw.cli import main; sys.exit(main())"
        self.log = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", source, *command],
                stderr=file, stdout=file, cwd=Path(__file__).parents[1],
            )  # fmt: skip

    def when(self, moment, delay=0.0):
        """Kills at the moment; False if the process has ended by itself before it came."""
        deadline = time.monotonic() + 120
        while not moment():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.0005)
        time.sleep(delay)
        os.kill(self.process.pid, signal.SIGKILL)
        return self.process.wait() == -signal.SIGKILL


def saving(folder, since=0):
    """Whether a checkpoint of a step after `since` is being written."""
    steps = (p.name.partition(".")[0] for p in (folder / "checkpoints").glob(TMP))
    return any(step.isdecimal() and int(step) > since for step in steps)


def logged(folder, step):
    path = folder / run.METRICS
    return path.exists() and f'"step": {step},' in path.read_text()


def test_killed_in_a_save_and_between_saves_it_ends_with_the_same_bits(runs, world, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    command = words(world, "ner", folder)
    for attempt in range(4):  # a save may end between the look and the blow
        resume = ["--resume"] if attempt else []
        killed = Killed([*command, *resume], log).when(lambda: saving(folder, since=4))
        assert killed, log.read_text()
        if left := list((folder / "checkpoints").glob(TMP)):
            break
    assert left, "never killed in a save"
    assert not (folder / "model").exists()
    done = [int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdecimal()]
    assert max(done) < STEPS["ner"]

    # Between saves: two steps after a checkpoint.
    step = max(done) + 6
    if step < STEPS["ner"]:
        assert Killed([*command, "--resume"], log).when(lambda: logged(folder, step))
    with (folder / run.METRICS).open("a") as file:
        file.write('{"kind": "train", "step"')  # as a kill in the middle of a line leaves it

    assert main([*command, "--resume"]) == 0
    assert_same_bits(parameters(folder), parameters(runs("ner")))
    assert losses(folder) == losses(runs("ner"))
    assert list((folder / "checkpoints").glob(TMP)) == []
    assert len(run.starts(folder)) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.003, 0.01, 0.03, 0.1])
def test_killed_at_any_moment_of_every_save_it_ends_with_the_same_bits(
    runs, world, tmp_path, delay
):
    folder, log, kills = tmp_path / "run", tmp_path / "log", 0
    command = words(world, "ner", folder)
    for since in (0, 8, 16):
        resume = ["--resume"] if kills else []
        kills += Killed([*command, *resume], log).when(lambda s=since: saving(folder, s), delay)
    assert kills >= 2, log.read_text()  # before the third, the run may have come to its end
    assert main([*command, "--resume"]) == 0
    assert_same_bits(parameters(folder), parameters(runs("ner")))
    assert losses(folder) == losses(runs("ner"))


def test_resumed_on_another_mesh(runs, world, tmp_path):
    """From the middle of a run on eight devices to its end on one."""
    folder, middle = shutil.copytree(runs("classify", EIGHT), tmp_path / "run"), 28
    shutil.rmtree(folder / "checkpoints" / "32")
    assert main(words(world, "classify", folder, "--resume")) == 0
    assert run.starts(folder)[1]["changed"]["mesh"] == [EIGHT, ONE]
    want, got = losses(runs("classify", EIGHT)), losses(folder)
    assert want.keys() == got.keys()
    assert all(got[step] == want[step] for step in range(1, middle + 1))
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-4)
    latest = [
        ocp.StandardCheckpointer().restore(f / "checkpoints" / "32" / "default")["variables"]
        for f in (folder, runs("classify", EIGHT))
    ]
    for path, a, b in zip(paths(latest[0]), *map(jax.tree.leaves, latest), strict=True):
        # Looser than the losses: the gradient of a key's bias is 0 but for rounding, and Adam
        # makes steps of full length of that.
        np.testing.assert_allclose(a, b, atol=1e-3, err_msg=path)


def test_resuming_a_finished_run_changes_nothing_and_starting_over_it_is_refused(
    runs, world, tmp_path, capsys
):
    folder = shutil.copytree(runs("classify"), tmp_path / "run")
    command = words(world, "classify", folder)
    before = (parameters(folder), run.metrics(folder), run.read_json(folder / run.RESULT))
    assert main(command) == 1
    assert "holds a run already" in capsys.readouterr().err
    assert main([*command, "--resume", "--seed", "1", "--clip", "2"]) == 1
    error = capsys.readouterr().err
    assert "cannot resume with other options: clip was 1.0, is 2.0, seed was 0, is 1;" in error
    assert error.count("\n") == 1
    with FileLock(folder / ".lock"):
        assert main([*command, "--resume"]) == 1
    assert "another process is training this run" in capsys.readouterr().err

    assert main([*command, "--resume"]) == 0
    assert_same_bits(parameters(folder), before[0])
    assert run.metrics(folder) == before[1]
    after = run.read_json(folder / run.RESULT)
    assert [after[k] for k in ("splits", "best_step", "checkpoints")] == [
        before[2][k] for k in ("splits", "best_step", "checkpoints")
    ]


def test_a_path_whose_checkpoints_could_not_be_read_is_refused(world, tmp_path, capsys):
    """Orbax globs for arrays: it would write them, and fail at the end of the training."""
    assert main(words(world, "ner", tmp_path / "run[1]")) == 1
    assert "whose path has a '['" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


# --- checkpoints ----------------------------------------------------------------------------------


def state_of(step, value, size=3):
    where = NamedSharding(make_mesh(ONE), PartitionSpec())
    full = jax.device_put(jnp.full(size, value, jnp.float32), where)
    count = jax.device_put(jnp.int32(step), where)
    return TrainState(count, {"params": {"w": full}, "state": {}}, ())


@pytest.mark.parametrize(("last", "best"), [(1, 1), (2, 1), (1, 3)])
def test_the_last_and_the_best_are_on_disk_and_no_other(tmp_path, last, best):
    scores = np.random.default_rng(last * 10 + best).integers(0, 4, 8) / 4  # with equals
    with Checkpoints(tmp_path, metric="f1", keep_last=last, keep_best=best) as checkpoints:
        for step, score in enumerate(scores):
            checkpoints.save(state_of(step, step), {"f1": float(score), "loss": 1.0})
            checkpoints.wait()
    ranked = sorted(range(8), key=lambda step: (scores[step], step))
    with Checkpoints(tmp_path, metric="f1", keep_last=last, keep_best=best) as checkpoints:
        assert checkpoints.steps() == sorted({*range(8 - last, 8), *ranked[-best:]})
        assert (checkpoints.best, checkpoints.latest) == (ranked[-1], 7)
        kept = checkpoints.restore(state_of(0, 0.0), checkpoints.best)
        np.testing.assert_array_equal(kept.variables["params"]["w"], np.full(3, ranked[-1]))


def test_a_save_holds_the_state_of_its_step_though_training_goes_on_in_the_same_memory(tmp_path):
    size, increment = 1 << 21, jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = state_of(0, 0.0, size)
    with Checkpoints(tmp_path, metric="f1", keep_last=3) as checkpoints:
        for _ in range(3):
            state = increment(state)
            checkpoints.save(state, {"f1": 0.5})
            for _ in range(5):
                state = increment(state)
            jax.block_until_ready(state)
        checkpoints.wait()
        for step in checkpoints.steps():
            kept = checkpoints.restore(state, step)
            np.testing.assert_array_equal(kept.variables["params"]["w"], np.full(size, step))
        assert checkpoints.steps() == [1, 7, 13]


def test_a_checkpoint_that_does_not_fit_or_is_damaged_is_named(tmp_path):
    with Checkpoints(tmp_path, metric="f1") as checkpoints:
        with pytest.raises(FwError, match="no checkpoint yet"):
            checkpoints.restore(state_of(0, 0.0), checkpoints.latest)
        checkpoints.save(state_of(5, 1.0), {"f1": 0.5})
        checkpoints.wait()
        with pytest.raises(
            FwError, match=r"/5: variables/params/w: expected \(\(4,\), 'float32'\)"
        ):
            checkpoints.restore(state_of(0, 0.0, size=4), 5)
        other = state_of(0, 0.0)
        other.variables["params"]["v"] = other.variables["params"].pop("w")
        with pytest.raises(FwError, match=r"/5: variables/params/v: .* found nothing"):
            checkpoints.restore(other, 5)
    path = tmp_path / "5" / "default" / "_METADATA"
    path.write_bytes(path.read_bytes()[:-1])
    with Checkpoints(tmp_path, metric="f1") as checkpoints:
        with pytest.raises(FwError, match="/5: damaged: ") as raised:
            checkpoints.restore(state_of(0, 0.0), 5)
        assert len(str(raised.value)) < 600


# --- the loop -------------------------------------------------------------------------------------


def run_loop(folder, losses, *, norms=None, scores=None, every=4):
    """`train` with steps that measure what they are told; the summaries likewise."""
    run.create(folder, {})
    norms = norms or [1.0] * len(losses)
    scores = iter(scores or itertools.repeat(0.5))

    def step(state, batch):
        at = int(batch["at"][0])
        measured = {"loss": losses[at], "grad_norm": norms[at], "tokens": 10}
        return state_of(at + 1, at + 1.0), jax.tree.map(jnp.asarray, measured)

    def evaluate(_):
        return Summary("f1", {"f1": 0.5, "loss": next(scores)}, "")

    with Checkpoints(folder / run.CHECKPOINTS, metric="f1") as checkpoints:
        return train(
            folder, state_of(0, 0.0), step, lambda i: {"at": np.array([i], np.int32)},
            steps=len(losses), evaluate=evaluate, checkpoints=checkpoints, mesh=make_mesh(ONE),
            rules=rules(), learning_rate=lambda i: 0.1 * i, evaluate_every=every, log_every=3,
        )  # fmt: skip


def test_the_loop_logs_averages_and_evaluates_at_the_end_too(tmp_path):
    state = run_loop(tmp_path / "run", [float(i) for i in range(10)])
    assert int(state.step) == 10
    records = run.metrics(tmp_path / "run")
    # Every 3 and every 4 steps and at the end: each average is of the steps since the one before.
    assert {r["step"]: r["loss"] for r in records if r["kind"] == "train"} == {
        3: 1.0, 4: 3.0, 6: 4.5, 8: 6.5, 9: 8.0, 10: 9.0,
    }  # fmt: skip
    assert [r["step"] for r in records if r["kind"] == "eval"] == [4, 8, 10]
    assert [r["tokens"] for r in records if r["kind"] == "train"] == [30, 10, 20, 20, 10, 10]


@pytest.mark.parametrize(
    ("what", "at", "good"),
    [("loss", 1, None), ("loss", 5, 4), ("grad_norm", 3, None), ("grad_norm", 7, 4)],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stops_the_run_before_it_is_saved(tmp_path, what, at, good, value):
    series = {"loss": [1.0] * 10, "grad_norm": [1.0] * 10}
    series[what][at] = value
    kept = "there is no checkpoint yet" if good is None else f"that of step {good} is good"
    with pytest.raises(FwError, match=rf"{what} is {value} at step {at + 1}; {kept}"):
        run_loop(tmp_path / "run", series["loss"], norms=series["grad_norm"])
    found = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert found == ([] if good is None else [str(good)])


def test_parameters_that_are_not_finite_are_found_by_the_evaluation(tmp_path):
    with pytest.raises(FwError, match="loss is nan at step 8; that of step 4 is good"):
        run_loop(tmp_path / "run", [1.0] * 10, scores=[0.5, math.nan])


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(text):
    """What stands on a terminal after a text: a line is erased, written over, or ended."""
    lines = [""]
    for piece in re.findall(r"\r|\n|\x1b\[2K|[^\r\n\x1b]+", text):
        if piece == "\n":
            lines.append("")
        elif piece == "\x1b[2K":
            lines[-1] = ""
        elif piece != "\r":
            lines[-1] += piece
    return lines


def test_progress_on_a_terminal_and_in_a_file():
    for stream, lines in ((Terminal(), 3), (io.StringIO(), 5)):
        progress = Progress(100, stream=stream, began=time.perf_counter() - 50)
        progress.say("resumed")
        progress.show(10, 2.0, 1234.5)
        progress.began -= 9.0  # as if the next ten steps took that long: a minute and a bit is left
        progress.show(20, 1.0, 1234.5)
        progress.say("dev f1 0.5")
        progress.show(21, 1.0, 1.0)
        progress.close()
        text = stream.getvalue()
        assert len(shown(text)) == lines + (not stream.isatty())
        assert shown(text)[0] == "resumed"
        assert shown(text)[-1] == ""
        assert "step 10/100  loss 2.0000  1,234 tokens/s  ETA 7m30s" in text
        assert "step 20/100  loss 1.0000  1,234 tokens/s  ETA 1m12s" in text  # no compiling in it
