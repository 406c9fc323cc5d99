"""A run folder stays whole and readable, by whomever it is written, whenever it is killed."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fw import metrics, report, run
from fw.errors import FwError

OPTIONS = {"task": "classify", "model": "tiny", "data": "texts.csv", "mesh": "data=2", "seed": 0}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)  # fmt: skip
json_objects = st.dictionaries(st.text(), json_values)


# --- files ----------------------------------------------------------------------------------------


@given(value=json_values)
def test_what_is_written_is_read(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.json"
    run.write_json(path, value)
    assert run.read_json(path) == json.loads(path.read_bytes()) == value


@settings(max_examples=40, deadline=None)
@given(records=st.lists(json_objects, max_size=4))
def test_what_is_logged_is_read(tmp_path_factory, records):
    folder = tmp_path_factory.mktemp("run")
    for record in records:
        run.log(folder, record)
    assert run.metrics(folder) == records
    if records:
        assert (folder / run.METRICS).read_bytes().count(b"\n") == len(records)


def test_values_become_plain_json(tmp_path):
    value = {
        "array": np.arange(3, dtype=np.int32),
        "scalar": jnp.float32(0.5),
        "bfloat16": jnp.ones(2, jnp.bfloat16),
        "flag": np.bool_(True),
        "path": Path("a") / "b",
        "lost": [math.nan, np.float32(math.inf), -math.inf],
        "row": metrics.Row("A", 1.0, 0.5, 2 / 3, 4),
        "name": os.fsdecode(b"caf\xe9"),  # not UTF-8: a lone surrogate
    }
    run.write_json(tmp_path / "a.json", value)
    assert run.read_json(tmp_path / "a.json") == {
        "array": [0, 1, 2],
        "scalar": 0.5,
        "bfloat16": [1.0, 1.0],
        "flag": True,
        "path": str(Path("a/b")),
        "lost": [None, None, None],
        "row": {"name": "A", "precision": 1.0, "recall": 0.5, "f1": 2 / 3, "support": 4},
        "name": value["name"],
    }
    assert "NaN" not in (tmp_path / "a.json").read_text()


@pytest.mark.parametrize(
    ("value", "place"),
    [({"a": [{1, 2}]}, "a.json/a/0: JSON cannot hold set"), ({"a": {1: 2}}, "a.json/a: .*key")],
)
def test_what_json_cannot_hold_is_refused_with_its_place(tmp_path, value, place):
    with pytest.raises(TypeError, match=place):
        run.write_json(tmp_path / "a.json", value)
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_named_with_the_line(tmp_path):
    folder = run.create(tmp_path / "run", OPTIONS)
    run.log(folder, {"step": 1})
    with (folder / run.METRICS).open("a") as file:
        file.write('{"step": }\n{"step": 3}\n')
    with pytest.raises(FwError, match=rf"{run.METRICS}:2: not JSON at column 10"):
        run.metrics(folder)
    (folder / run.METRICS).write_text("[1]\n")
    with pytest.raises(FwError, match=rf"{run.METRICS}:1: expected a JSON object; got list"):
        report.write(folder)
    for damage, match in [
        (b'{\n"config": {},\n oops}', ":3: not JSON at column 2"),
        (b'{"a": "\xff"}', "not JSON: .*utf-8"),
        (b"[" * 200_000, "not JSON: .*recursion"),
        (b"[1]", "expected an object with 'config'"),
    ]:
        (folder / run.CONFIG).write_bytes(damage)
        with pytest.raises(FwError, match=match):
            run.config(folder)
    with pytest.raises(FwError, match="holds no run"):
        run.config(tmp_path)
    with pytest.raises(FwError, match="cannot be written"):
        run.write_json(tmp_path / "nowhere" / "a.json", {})


# --- a run ----------------------------------------------------------------------------------------


def test_a_run_says_what_and_where_it_is(tmp_path):
    folder = run.create(tmp_path / "deep" / "run", {**OPTIONS, "layers": (1, 2)})
    assert run.config(folder) == {**OPTIONS, "layers": [1, 2]}
    (start,) = run.starts(folder)
    assert start["devices"] == {"platform": "cpu", "kind": "cpu", "count": 8, "processes": 1}
    assert start["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"jax", "flax", "numpy"} <= start["versions"].keys()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", start["time"])
    assert run.metrics(folder) == []


def test_a_folder_holds_one_run(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    run.create(tmp_path, OPTIONS)
    before = (tmp_path / run.CONFIG).read_bytes()
    with pytest.raises(FwError, match="holds a run already"):
        run.create(tmp_path, {"other": 1})
    assert (tmp_path / run.CONFIG).read_bytes() == before
    with pytest.raises(FwError, match="is a file"):
        run.create(tmp_path / "notes.txt", OPTIONS)


def test_resuming_keeps_the_options_or_notes_the_change(tmp_path):
    folder = run.create(tmp_path / "run", OPTIONS, resume=True)  # none was begun: begins
    with pytest.raises(FwError, match="seed was 0, is 1"):
        run.create(folder, {**OPTIONS, "seed": 1, "mesh": "fsdp=4"}, resume=True)
    assert run.config(folder) == OPTIONS
    changed = {**OPTIONS, "mesh": "fsdp=4"}
    run.create(folder, changed, resume=True, may_change=("mesh",))
    assert run.config(folder) == changed
    assert [start.get("changed") for start in run.starts(folder)] == [
        None,
        {"mesh": ["data=2", "fsdp=4"]},
    ]
    (folder / run.CONFIG).unlink()
    run.log(folder, {"step": 1})
    with pytest.raises(FwError, match=f"has {run.METRICS} of a run but not its {run.CONFIG}"):
        run.create(folder, OPTIONS, resume=True)


def test_a_line_counts_once_its_newline_is_there(tmp_path):
    records = [{"step": 1, "loss": 0.5}, {"step": 2, "label": "é\u2028\n"}, {"step": 3}]
    folder = run.create(tmp_path / "run", OPTIONS)
    for record in records:
        run.log(folder, record)
    path = folder / run.METRICS
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        lines = whole[:length].count(b"\n")
        assert run.metrics(folder) == records[:lines]
        assert run.trim(folder, 100) == 0  # mends the file, so that the next line stands alone
        run.log(folder, {"step": 9})
        assert run.metrics(folder) == [*records[:lines], {"step": 9}]


def test_trim_removes_what_will_be_written_again(tmp_path):
    folder = run.create(tmp_path / "run", OPTIONS)
    assert run.trim(folder, 1) == 0
    for step in (10, 20, 30):
        run.log(folder, {"kind": "train", "step": step})
        run.log(folder, {"kind": "eval", "step": step})
    run.log(folder, {"kind": "note"})
    assert run.trim(folder, 21) == 2
    assert [r.get("step") for r in run.metrics(folder)] == [10, 10, 20, 20, None]


# --- real processes -------------------------------------------------------------------------------


def start(code: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    root = Path(__file__).parents[1]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)


ENDLESS = """
import itertools, sys
from fw import run
folder = run.create(sys.argv[1], {"a": 1}, resume=True)
records = run.metrics(folder)
first = records[-1]["step"] - 5 if len(records) > 5 else 0  # as from a checkpoint of five before
run.trim(folder, first)
print("ready", flush=True)
for step in itertools.count(first):
    run.log(folder, {"step": step, "text": "x" * 50_000})
    run.write_json(folder / run.RESULT, {"step": step, "text": "y" * 50_000})
"""


def test_a_killed_run_stays_whole_and_resumes_without_duplicates(tmp_path):
    folder = tmp_path / "run"
    seen = -1
    for delay in (0.2, 0.31, 0.47):
        with start(ENDLESS, folder) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
                end = time.monotonic() + delay
                while time.monotonic() < end:  # a reader beside the writer never sees a half file
                    if (folder / run.RESULT).exists():
                        assert len(run.read_json(folder / run.RESULT)["text"]) == 50_000
            finally:
                process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        steps = [record["step"] for record in run.metrics(folder)]
        assert steps == list(range(len(steps)))
        assert steps[-1] - 1 <= run.read_json(folder / run.RESULT)["step"] <= steps[-1]
        assert steps[-1] > seen - 5
        seen = steps[-1]
    run.create(folder, {"a": 1}, resume=True)
    assert not list(folder.glob(".*"))
    assert len(run.starts(folder)) == 4


CROWD = """
import sys, time
from fw import run
folder, name, at = sys.argv[1], sys.argv[2], float(sys.argv[3])
run.log(folder, {"name": name, "warm": 1})  # jax is up from here on
time.sleep(max(0.0, at - time.time()))
try:
    run.create(folder + "/one", {"name": name})
    print("won")
except run.FwError as error:
    print(error)
for i in range(100):
    run.log(folder, {"name": name, "i": i, "text": name * 2_000})
"""


def test_processes_at_once_keep_lines_whole_and_one_begins_the_run(tmp_path):
    crowd = [start(CROWD, tmp_path, name, time.time() + 3) for name in "abc"]
    said = [process.communicate(timeout=90)[0] for process in crowd]
    assert [process.returncode for process in crowd] == [0, 0, 0]
    assert sorted(line == "won\n" for line in said) == [False, False, True]
    won = "abc"[said.index("won\n")]
    assert run.config(tmp_path / "one") == {"name": won}
    records = run.metrics(tmp_path)
    for name in "abc":
        mine = [r["i"] for r in records if r["name"] == name and "i" in r]
        assert mine == list(range(100))


RANK = """
import sys
import jax
rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, rank)
from fw import report, run
from jax.experimental.multihost_utils import sync_global_devices
run.create(folder, {"task": "ner"})
for step in range(3):
    run.log(folder, {"kind": "train", "step": step, "rank": rank, "loss": 1.0})
sync_global_devices("logged")
report.write(folder)
try:
    run.create(folder, {"task": "ner"})
except run.FwError as error:
    assert "holds a run already" in str(error), error
else:
    raise AssertionError("a second run was begun")
run.create(folder, {"task": "ner"}, resume=True)
sync_global_devices("done")
print("ok", rank)
"""


def test_of_two_processes_one_writes_and_both_refuse(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    ranks = [start(RANK, rank, port, tmp_path / "run") for rank in range(2)]
    said = [process.communicate(timeout=100)[0] for process in ranks]
    assert [text.split()[-2:] for text in said] == [["ok", "0"], ["ok", "1"]]  # gloo talks, too
    assert [r["rank"] for r in run.metrics(tmp_path / "run")] == [0, 0, 0]
    begun = run.starts(tmp_path / "run")
    assert [s["devices"]["processes"] for s in begun] == [2, 2]
    assert "16 × cpu in 2 processes" in (tmp_path / "run" / run.REPORT).read_text("utf-8")
