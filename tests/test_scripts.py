"""The set-up scripts with real shells and real interpreters; the locks; what is in the wheel."""

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import tomllib
import zipfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
REAL = Path(sys.base_prefix, "bin", "python{}.{}".format(*sys.version_info))
BROKEN = "#!/bin/sh\necho 'pyenv: command not found' >&2\nexit 127\n"
SILENT = "#!/bin/sh\nexit 0\n"
STEPS = '{"ms": 1, "rows": 1, "peak": 0, "loss": 1}'
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A home without pyenv and a PATH with the few programs the scripts use, but no Python."""
    (tmp_path / "bin").mkdir()
    for program in ("sort", "head", "tail", "cat", "date", "mv", "rm"):
        (tmp_path / "bin" / program).symlink_to(str(shutil.which(program)))
    return tmp_path


def shell(machine: Path, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/sh", "-euc", f"root={machine}; . {SCRIPTS}/setup.sh; {script}"],
        env={"PATH": str(machine / "bin"), "HOME": str(machine), **environment},
        cwd=machine,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def install(place: Path, content: str | None = None) -> Path:
    """A program: the given script, or the real interpreter."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        place.symlink_to(REAL)
    else:
        place.write_text(content)
        place.chmod(0o755)
    return place


def test_python_skips_names_that_do_not_run(machine: Path) -> None:
    install(machine / "bin/python3.13", BROKEN)
    install(machine / "bin/python3.12", SILENT)
    real = install(machine / "bin/python3")
    install(machine / ".pyenv/versions/3.13.0/bin/python")
    found = shell(machine, "project_python")
    assert (found.returncode, found.stdout) == (0, f"{real}\n"), found.stderr


def test_python_order_on_the_path(machine: Path) -> None:
    for name in ("python3", "python3.12", "python3.13"):
        wanted = install(machine / "bin" / name)
        assert shell(machine, "project_python").stdout == f"{wanted}\n"


def test_python_from_pyenv_newest_first(machine: Path) -> None:
    install(machine / "bin/python3", BROKEN)
    for version, content in {
        "3.9.18": SILENT,
        "3.12.9": None,
        "3.12.10": None,
        "3.13.0": BROKEN,
    }.items():
        install(machine / "its" / "versions" / version / "bin/python", content)
    found = shell(machine, "project_python", PYENV_ROOT=str(machine / "its"))
    assert found.stdout == f"{machine}/its/versions/3.12.10/bin/python\n", found.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="uv's folder names differ")
def test_python_from_uv_when_nothing_else_runs(machine: Path) -> None:
    install(machine / "bin/python3", BROKEN)
    (machine / "bin/uv").symlink_to(str(shutil.which("uv", path=sysconfig.get_path("scripts"))))
    version = "{}.{}.{}".format(*sys.version_info)
    managed = machine / f"managed/cpython-{version}-linux-{platform.machine()}-gnu"
    managed.mkdir(parents=True)
    for folder in ("bin", "lib"):
        (managed / folder).symlink_to(Path(sys.base_prefix, folder))
    found = shell(machine, "project_python", UV_PYTHON_INSTALL_DIR=str(machine / "managed"))
    assert found.stdout.startswith(f"{managed}/bin/python"), found.stderr


def test_chosen_python_is_the_only_candidate(machine: Path) -> None:
    install(machine / "bin/python3.13")
    chosen = install(machine / "elsewhere/python")
    assert shell(machine, "project_python", PYTHON=str(chosen)).stdout == f"{chosen}\n"
    for bad, reason in ((BROKEN, "pyenv: command not found"), (SILENT, "")):
        broken = install(machine / "elsewhere/broken", bad)
        found = shell(machine, "project_python", PYTHON=str(broken))
        assert (found.returncode, found.stdout) == (1, "")
        assert f"PYTHON={broken} does not do" in found.stderr
        assert reason in found.stderr


def test_python_outside_the_bounds_is_refused(machine: Path) -> None:
    for bounds in ("3.98 3.99", "3.1 3.2"):
        found = shell(machine, f"find_python {REAL} {bounds}")
        assert found.returncode == 1
        assert f"it is Python {sys.version.split()[0]}" in found.stderr


def test_no_python_is_one_sentence(machine: Path) -> None:
    install(machine / "bin/python3", BROKEN)
    found = shell(machine, "project_python")
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.startswith("setup: no Python that runs, 3.12 or newer")
    assert found.stderr.count("\n") == 1


def locked(name: str) -> dict[str, set[str]]:
    """Requirement line (name, version, marker) → hashes."""
    pins: dict[str, set[str]] = {}
    for line in (SCRIPTS / name).read_text().replace("\\\n", "").splitlines():
        requirement, *hashes = line.split("--hash=")
        pins[requirement.strip()] = {value.strip() for value in hashes}
    return pins


@pytest.mark.parametrize(
    ("goldens", "steps", "status"),
    [
        ('{"goldens": {"bert": 7e-7}}', STEPS, 0),
        ('{"goldens": {"bert": 1e-3}}', STEPS, 1),
        ('{"goldens": {"bert": NaN}}', STEPS, 1),
        ("{}", STEPS, 1),
        ('{"goldens": {"bert": 7e-7}}', "{}", 1),
    ],
)
def test_a_bad_side_of_the_accelerator_benchmark_is_its_status(
    goldens: str, steps: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`{}` stands for a side that did not end well."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # which the program sets
    spec = spec_from_file_location("accelerator", SCRIPTS / "bench" / "accelerator.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(bench := module_from_spec(spec))
    said = {"checks:": goldens}
    monkeypatch.setattr(bench, "run", lambda side, _: said.get(side, steps))
    monkeypatch.setattr("sys.argv", ["accelerator.py", "--goldens", "x", "--models", "bert"])
    assert bench.main() == status


@pytest.mark.parametrize("name", ["build.lock", "run.lock", "dev.lock", "bench/peer.lock"])
def test_lock_holds_names_versions_hashes_and_no_host(name: str) -> None:
    pins = locked(name)
    assert pins
    for requirement, hashes in pins.items():
        assert re.fullmatch(r"[a-z0-9-]+==[\w.]+( ; .+)?", requirement), requirement
        assert hashes, requirement
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", value) for value in hashes), requirement


def test_locks_fit_one_environment_and_the_project() -> None:
    run, dev = locked("run.lock"), locked("dev.lock")
    assert run.items() <= dev.items()  # so that dev may follow run into the same environment
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = {
        "run.lock": PROJECT["project"]["dependencies"],
        "dev.lock": extras["dev"],
        "build.lock": PROJECT["build-system"]["requires"],
    }
    for name, requirements in wanted.items():
        versions = {Requirement(pin).name: Requirement(pin) for pin in locked(name)}
        for requirement in map(Requirement, requirements):
            (pin,) = versions[canonicalize_name(requirement.name)].specifier
            assert requirement.specifier.contains(pin.version), f"{name}: run scripts/lock"


def test_wheel_holds_every_file_of_the_packages(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry_points,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        assert "fw = fw.cli:main" in archive.read(entry_points).decode()
    assert names == {
        path.relative_to(ROOT).as_posix()
        for package in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


BACKEND = """
import zipfile

def build_editable(directory, config_settings=None, metadata_directory=None):
    name = "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(f"{directory}/{name}", "w") as wheel:
        info = "tiny-1.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: tiny\\nVersion: 1\\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nTag: py3-none-any\\n")
        wheel.writestr(f"{info}/RECORD", "")
        wheel.writestr("tiny.py", "")
    return name

build_wheel = build_editable
"""


@pytest.fixture
def clone(machine: Path) -> Path:
    """A project of nothing, with locks of nothing, so that its set-up needs no network."""
    install(machine / "bin/python3")
    (machine / "scripts").mkdir()
    for name in ("build", "run", "dev"):
        (machine / "scripts" / f"{name}.lock").touch()
    (machine / "backend.py").write_text(BACKEND)
    (machine / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        '[project]\nname = "tiny"\nversion = "1"\n'
    )
    return machine


@pytest.mark.slow
def test_environment_is_made_once_and_mended(clone: Path) -> None:
    def set_up(level: str) -> str:
        done = shell(clone, f"setup_venv {level}; $venv/bin/python -c 'import tiny'")
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert "making .venv" in set_up("run")
    started = time.monotonic()
    assert set_up("run") == ""
    assert time.monotonic() - started < 1.0
    assert "adding scripts/dev.lock" in set_up("dev")
    assert set_up("run") == ""  # dev holds run
    pyproject = clone / "pyproject.toml"
    pyproject.write_text(pyproject.read_text() + "# changed\n")
    assert "ready" in set_up("run")
    assert set_up("dev") == ""  # and is still dev
    (clone / "scripts/dev.lock").write_text("# changed\n")
    assert "making .venv" in set_up("run")
    (clone / ".venv/bin/python").unlink()
    assert "making .venv" in set_up("run")
    assert set_up("run") == ""


@pytest.mark.slow
def test_two_set_ups_at_once_take_turns_and_a_killed_one_is_remade(clone: Path) -> None:
    command = ["/bin/sh", "-euc", f"root={clone}; . {SCRIPTS}/setup.sh; setup_venv run"]
    environment = {"PATH": str(clone / "bin"), "HOME": str(clone)}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    killed = start()
    while not (clone / ".venv/bin/python").exists():
        assert killed.poll() is None
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (clone / ".venv/ready").exists()

    said = [process.communicate(timeout=120)[1] for process in [start(), start()]]
    assert "".join(said).count("making .venv") == 1, said
    assert (clone / ".venv/ready").exists()


@pytest.mark.slow
def test_failed_install_says_so_and_leaves_nothing_ready(clone: Path) -> None:
    (clone / "scripts/dev.lock").write_text(f"no-such-package==1 --hash=sha256:{'0' * 64}\n")
    assert shell(clone, "setup_venv run").returncode == 0
    done = shell(clone, "setup_venv dev", PIP_NO_INDEX="1")
    assert done.returncode == 1
    assert "no-such-package" in done.stderr
    assert "setup: pip failed" in done.stderr
    assert not (clone / ".venv/ready").exists()
