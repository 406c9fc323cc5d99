"""What the guides show is true: their Python runs, commands parse, links lead somewhere."""

import ast
import doctest
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import fw
from tests.tiny import make_model, make_ner, make_reviews

ROOT = Path(__file__).parents[1]
GUIDES = ("README.md", "fw/README.md")
PARSER = import_module("fw.cli.main")._parser()  # `fw.cli.main` is the function


def blocks(guide: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / guide).read_text(), re.DOTALL)


def test_the_line_in_python_runs(tmp_path, monkeypatch, capsys):
    """The README's program as it stands, with a model and data that are learned in seconds."""
    (program,) = blocks("README.md", "python")
    monkeypatch.chdir(tmp_path)
    for name, made in (
        ("all-MiniLM-L6-v2", make_model(tmp_path / "model")),
        ("vader-sentiment", make_reviews(tmp_path / "reviews")),
    ):
        assert program.count(f'"{name}"') >= 1
        program = program.replace(f'"{name}"', f'"{made}"')
    program = re.sub(r"length=\d+", "length=32", program)
    exec(compile(program, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "macro avg" in printed
    assert re.search(r"int8 +test macro_f1 [\d.]+", printed)
    assert {"label", "score", "text"} <= ast.literal_eval(printed.splitlines()[-1]).keys()
    assert (tmp_path / "runs/sentiment/report.html").is_file()


def test_the_guide_runs():
    text = "\n".join(blocks("fw/README.md", "python"))
    case = doctest.DocTestParser().get_doctest(text, {}, "fw/README.md", None, 0)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    results = doctest.DocTestRunner(optionflags=flags).run(case)
    assert results.failed == 0
    assert results.attempted > 30


@pytest.mark.parametrize("guide", GUIDES)
def test_commands_parse(guide):
    """Every `fw ...` in a guide is a command that the parser takes."""
    text = (ROOT / guide).read_text()
    shell = "\n".join(blocks(guide, "sh")).replace("\\\n", " ")
    lines = [line for line in shell.splitlines() if line.startswith("fw ")]
    lines += [code for code in re.findall(r"`(fw [a-z]+ [^`]+)`", text) if "COMMAND" not in code]
    assert len(lines) > 4
    for line in lines:
        # Ends with status 2 on an option or a value that the command does not take.
        PARSER.parse_args(shlex.split(line, comments=True)[1:])


@pytest.mark.parametrize("guide", [*GUIDES, "sharding/README.md", "compress/README.md"])
def test_links_and_files_are_there(guide):
    folder = (ROOT / guide).parent
    text = (ROOT / guide).read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (folder / target).exists(), target
    for script in re.findall(r"scripts/[\w./]+\w", text):
        assert (ROOT / script).exists(), script


def test_the_map_names_every_module():
    """The guide's table and the package's own list are complete."""
    parts = {
        path.stem
        for path in (ROOT / "fw").iterdir()
        if (path.suffix == ".py" or (path / "__init__.py").exists()) and path.stem[0] != "_"
    }
    inside = {"json_files", "labels", "tensors", "winograd"}  # of use to other modules only
    functions = {"generate", "load", "save"}
    assert set(fw.__all__) - {"__version__"} - functions == parts - inside
    text = (ROOT / "fw/README.md").read_text()
    assert [name for name in sorted(parts - inside) if f"`{name}" not in text] == []


def test_importing_the_package_is_free():
    """Neither the package nor its assets bring in jax, and a name that is not there says so."""
    code = (
        "import sys, fw; fw.assets.catalogue(); assert 'jax' not in sys.modules; "
        "assert fw.data.split_by_hash('a') and not hasattr(fw, 'nothing'); print(len(dir(fw)))"
    )
    done = run("-c", code)
    assert int(done.stdout) > 20


@pytest.mark.slow
def test_the_ner_program(tmp_path):
    """scripts/train_ner.py from data to answers, then once more over the finished run."""
    model, data = make_model(tmp_path / "model"), make_ner(tmp_path / "data")
    options = f"""--model {model} --data {data} --run {tmp_path}/run --length 32 --epochs 8
        --learning-rate 1e-2 --precision f32 --mesh data=2 --ask""".split()
    done = run(ROOT / "scripts/train_ner.py", *options, "ada went to oslo .")
    assert re.search(r"PER 0\.\d+  ada\n.*LOC 0\.\d+  oslo", done.stdout), done.stdout
    assert re.search(r"int8 +[\d.]+", done.stdout)
    again = run(ROOT / "scripts/train_ner.py", *options, "alan", "--resume")
    assert "resumed at step" in again.stderr


def test_the_ner_program_says_what_is_wrong(tmp_path):
    done = run(ROOT / "scripts/train_ner.py", "--data", tmp_path / "nothing", status=1)
    assert re.fullmatch(r"train_ner: .*nothing.*\n", done.stderr), done.stderr


@pytest.mark.slow
def test_the_f1_benchmark_goes_on(tmp_path):
    """What was measured before is not measured again; another seed is."""
    model, data = make_model(tmp_path / "model"), make_ner(tmp_path / "data")
    options = f"""--model {model} --data {data} --length 32 --epochs 16 --learning-rate 1e-2
        --only fw-f32 --results {tmp_path}/results.json --seeds""".split()
    script = ROOT / "scripts/bench/ner_f1.py"
    assert run(script, *options, "0").stderr.count("seed 0:") == 1
    done = run(script, *options, "0,1")
    assert "seed 0:" not in done.stderr
    assert "seed 1:" in done.stderr
    means = [float(row.split()[3]) for row in done.stdout.splitlines()[2:]]
    assert len(means) == 2
    assert min(means) > 90


@pytest.mark.slow
def test_the_speed_benchmark(tmp_path):
    model, data = make_model(tmp_path / "model"), make_ner(tmp_path / "data")
    options = f"""--model {model} --data {data} --length 32 --batch 8 --steps 4 --untimed 1
        --rounds 2 --only fw-f32,fw-bf16""".split()
    done = run(ROOT / "scripts/bench/finetune.py", *options)
    assert [row.split()[0] for row in done.stdout.splitlines()[2:]] == ["fw-f32", "fw-bf16"]


def run(*command: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    return done
