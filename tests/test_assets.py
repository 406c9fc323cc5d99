"""Assets: what is fetched is what was pinned, whole, once, and nothing of it is executed.

Real archives are served to a real pip from a folder or from an HTTP server on loopback; what can
only be seen between processes (locks, signals, limits) is tested with processes.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fw.assets import Asset, File, Hub, Package, Url, catalogue, cli, fetch, read_catalogue, verify
from fw.assets.archive import extract
from fw.assets.entries import check_path
from fw.assets.provenance import ALWAYS_HASHED
from fw.errors import FwError

CONTENT = {
    "model.safetensors": np.random.default_rng(7).bytes(3 << 20),
    "config.json": b'{"hidden_size": 8}',
    "nested/vocab.txt": b"[PAD]\n[UNK]\n",
}
ROOT = Path(__file__).parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def zip_bytes(members: dict[str, bytes]) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return held.getvalue()


def tar_bytes(members: dict[str, bytes]) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return held.getvalue()


def pinned(folder: str = "", content: dict[str, bytes] = CONTENT) -> tuple[File, ...]:
    return tuple(File(n, len(c), digest(c), folder + n) for n, c in content.items())


def packed(archive: str, content: bytes, folder: str) -> Asset:
    source = Package("tiny-weights==1.0", File(archive, len(content), digest(content)))
    return Asset("tiny", "a small model", "MIT", source, pinned(folder))


WHEEL_NAME = "tiny_weights-1.0-py3-none-any.whl"
WHEEL = zip_bytes({f"tiny/{n}": c for n, c in CONTENT.items()})
TINY = packed(WHEEL_NAME, WHEEL, "tiny/")


def toml(asset: Asset) -> str:
    def line(file: File) -> str:
        pairs = {"name": file.name, "sha256": file.sha256, "member": file.member}
        text = ", ".join(f"{k} = {json.dumps(v)}" for k, v in pairs.items())
        return f"{{ {text}, size = {file.size} }}"

    assert isinstance(asset.source, Package)
    return (
        f'["{asset.name}"]\nwhat = "{asset.what}"\nlicence = "{asset.licence}"\n'
        f'package = "{asset.source.requirement}"\narchive = {line(asset.source.archive)}\n'
        f"files = [{', '.join(map(line, asset.files))}]\n"
    )


def holds(folder: Path, content: dict[str, bytes] = CONTENT) -> bool:
    return all((folder / n).read_bytes() == c for n, c in content.items())


def left_over(cache: Path) -> list[str]:
    """Everything in a cache but lock files."""
    return sorted(p.name for p in cache.glob("*/*") if p.suffix != ".lock")


def half_arrived(where: Path) -> bool:
    parts = where.glob(f"cache/tiny/*.part-*/{WHEEL_NAME}")
    return any(p.stat().st_size for p in parts)


def wait_for(what: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pip and a hub that know of no index, no folder and no configuration but the test's."""
    for name in list(os.environ):
        if name.startswith(("PIP_", "HF_", "FW_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where pip looks for archives."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


class Server(ThreadingHTTPServer):
    """Files by path; a stalled server sends half of each and the rest after `release`."""

    daemon_threads = True
    password: str | None = None

    def __init__(self, files: dict[str, bytes], *, stalled: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked = files, []
        self.stalled, self.release, self.before_second_half = stalled, threading.Event(), None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        """The test looks at `asked` instead."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, path = self.server, unquote(urlsplit(self.path).path)
        server.asked.append(path)
        if server.password and self.headers.get("Authorization") != server.password:
            return self.send_error(401)
        if path not in server.files:
            return self.send_error(404)
        body = server.files[path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        is_json = path.startswith("/api/")
        self.send_header("Content-Type", "application/json" if is_json else "text/html")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{digest(body)}"')
        self.end_headers()
        if self.command == "HEAD":
            return None
        half = len(body) // 2 if server.stalled and len(body) > 4096 else len(body)
        self.wfile.write(body[:half])
        if half < len(body):
            self.wfile.flush()
            server.release.wait(60)
            self.wfile.write(body[half:])
        return None


@contextmanager
def serving(files: dict[str, bytes], *, stalled: bool = False) -> Iterator[Server]:
    with Server(files, stalled=stalled) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.release.set()
            server.shutdown()


def index(archive: str, content: bytes) -> dict[str, bytes]:
    page = f'<!DOCTYPE html><html><body><a href="/files/{archive}">{archive}</a></body></html>'
    return {"/simple/tiny-weights/": page.encode(), f"/files/{archive}": content}


def use_index(server: Server) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k != "PIP_NO_INDEX"}
    return kept | {"PIP_INDEX_URL": f"{server.url}/simple", "PIP_RETRIES": "0"}


@contextmanager
def fetching(
    asset: Asset, where: Path, env: dict[str, str], before: str = "pass"
) -> Iterator[subprocess.Popen[str]]:
    """Fetch in a process of its own; `before` is code that runs first."""
    (where / "own.toml").write_text(toml(asset))
    code = f"import sys; {before}; from fw.assets import cli; sys.exit(cli(sys.argv[1:]))"
    options = ["--cache", str(where / "cache"), "--catalogue", str(where / "own.toml")]
    with subprocess.Popen(
        [sys.executable, "-c", code, asset.name, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        cwd=ROOT,
    ) as child:
        try:
            yield child
        finally:
            child.kill()


# --- sources × what must hold for each -----------------------------------------------------------

BACKEND = b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'


def test_wheel_is_fetched_once_and_recorded(tmp_path: Path, shelf: Path) -> None:
    (shelf / WHEEL_NAME).write_bytes(WHEEL)
    folder = fetch("tiny", cache=tmp_path / "cache", known={"tiny": TINY})
    assert holds(folder)
    record = json.loads((folder / "PROVENANCE.json").read_text())
    assert (record["licence"], record["source"]["requirement"]) == ("MIT", "tiny-weights==1.0")
    assert {n: f["sha256"] for n, f in record["files"].items()} == {
        n: digest(c) for n, c in CONTENT.items()
    }
    assert left_over(tmp_path / "cache") == [TINY.key]
    (shelf / WHEEL_NAME).unlink()
    assert fetch("tiny", cache=tmp_path / "cache", known={"tiny": TINY}) == folder


@pytest.mark.parametrize("progress", [None, True, False])
def test_progress_is_for_terminals(
    tmp_path: Path, shelf: Path, capfd: pytest.CaptureFixture[str], progress: bool | None
) -> None:
    (shelf / WHEEL_NAME).write_bytes(WHEEL)
    fetch("tiny", cache=tmp_path / "cache", known={"tiny": TINY}, progress=progress)
    drawn = capfd.readouterr().err  # which is no terminal
    assert ("tiny:   0%" in drawn) == (progress is True)


@pytest.mark.parametrize("suffix", [".tar.gz", ".zip"])
def test_source_archive_is_not_executed(tmp_path: Path, shelf: Path, suffix: str) -> None:
    marker = tmp_path / "executed"
    members = {f"tiny_weights-1.0/{n}": c for n, c in CONTENT.items()}
    members["tiny_weights-1.0/pyproject.toml"] = BACKEND
    members["tiny_weights-1.0/backend.py"] = f"open({str(marker)!r}, 'w').close()".encode()
    name = f"tiny_weights-1.0{suffix}"
    content = (tar_bytes if suffix == ".tar.gz" else zip_bytes)(members)
    (shelf / name).write_bytes(content)
    asset = packed(name, content, "tiny_weights-1.0/")
    assert holds(fetch("tiny", cache=tmp_path / "cache", known={"tiny": asset}))
    assert not marker.exists()
    # The same archive given to pip itself does run it, so the marker would have shown it.
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(tmp_path)]
    subprocess.run([*pip, str(shelf / name)], capture_output=True, check=False)
    assert marker.exists()


def test_pip_configuration_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(index(WHEEL_NAME, WHEEL)) as server:
        server.password = "Basic " + base64.b64encode(b"ann:secret").decode()
        config, netrc = tmp_path / "pip.conf", tmp_path / "netrc"
        config.write_text(f"[global]\nindex-url = {server.url}/simple\nretries = 0\n")
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
        with pytest.raises(FwError, match="401"):
            fetch("tiny", cache=tmp_path / "cache", known={"tiny": TINY})
        netrc.write_text("machine 127.0.0.1 login ann password secret\n")
        netrc.chmod(0o600)
        monkeypatch.setenv("NETRC", str(netrc))
        assert holds(fetch("tiny", cache=tmp_path / "cache", known={"tiny": TINY}))


def test_archive_in_an_archive(tmp_path: Path, shelf: Path) -> None:
    inner = tar_bytes({f"data/{n}": c for n, c in CONTENT.items()})
    content = zip_bytes({"tiny/data.tar.gz": inner})
    (shelf / WHEEL_NAME).write_bytes(content)
    asset = packed(WHEEL_NAME, content, "tiny/data.tar.gz!data/")
    assert holds(fetch("tiny", cache=tmp_path / "cache", known={"tiny": asset}))


def test_url(tmp_path: Path) -> None:
    for name, content in CONTENT.items():
        (tmp_path / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / name).write_bytes(content)
    source = Url((tmp_path / "site").as_uri() + "/")
    asset = Asset("tiny", "a small model", "MIT", source, pinned())
    assert holds(fetch("tiny", cache=tmp_path / "cache", known={"tiny": asset}))


def test_folder_is_returned_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch(tmp_path) == fetch(str(tmp_path)) == tmp_path
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert fetch("./digits") == Path("digits")
    with pytest.raises(FwError, match="scikit-learn"):  # a bare name is the catalogue's
        fetch("digits", cache=tmp_path / "cache")


# --- the hub -------------------------------------------------------------------------------------


def hub_files(content: dict[str, bytes], stated: dict[str, bytes]) -> dict[str, bytes]:
    """What a hub answers for one repository: its pages state digests of `stated`."""

    def blob(name: str) -> dict[str, object]:
        body = stated[name]
        oid = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        large = {"sha256": digest(body), "oid": digest(body), "size": len(body), "pointerSize": 99}
        return {
            "type": "file",
            "rfilename": name,
            "path": name,
            "size": len(body),
            "blobId": oid,
            "oid": oid,
            **({"lfs": large} if len(body) > 4096 else {}),
        }

    info = {"id": "org/tiny", "sha": COMMIT, "cardData": {"license": "mit"}}
    page = json.dumps(info | {"siblings": [blob(n) for n in content]}).encode()
    tree = json.dumps([blob(n) for n in content]).encode()
    answers = {f"/org/tiny/resolve/{COMMIT}/{n}": c for n, c in content.items()}
    for revision in (COMMIT, "main"):
        answers[f"/api/models/org/tiny/revision/{revision}"] = page
        answers[f"/api/models/org/tiny/tree/{revision}"] = tree
    return answers


def fetch_hub(name: str, where: Path, endpoint: str) -> subprocess.CompletedProcess[str]:
    """In a process, since huggingface_hub reads its environment when it is imported."""
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(where / "hf")}
    code = "import sys; from fw.assets import cli; sys.exit(cli(sys.argv[1:]))"
    command = [sys.executable, "-c", code, name, "--cache", str(where / "cache")]
    return subprocess.run(
        command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False
    )


def test_hub_takes_data_only_and_keeps_it(tmp_path: Path) -> None:
    content = CONTENT | {"pytorch_model.bin": b"pickle", "modeling.py": b"raise SystemExit"}
    with serving(hub_files(content, content)) as server:
        done = fetch_hub("hf:org/tiny@main", tmp_path, server.url)
        assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert files == {*CONTENT, "PROVENANCE.json"}
    assert holds(folder)
    record = json.loads((folder / "PROVENANCE.json").read_text())
    assert (record["licence"], record["source"]["revision"]) == ("mit", COMMIT)
    verify(folder)
    # The server is gone: the commit is in the cache, and a branch cannot be looked up.
    again = fetch_hub(f"hf:org/tiny@{COMMIT}", tmp_path, server.url)
    assert again.stdout == done.stdout, again.stderr
    refused = fetch_hub("hf:org/tiny@main", tmp_path, server.url)
    assert refused.returncode == 1
    assert re.match("fw: hf:org/tiny@main: the hub did not answer", refused.stderr)


def test_hub_content_is_compared(tmp_path: Path) -> None:
    stated = CONTENT | {"config.json": CONTENT["config.json"].replace(b"8", b"9")}
    with serving(hub_files(CONTENT, stated)) as server:
        done = fetch_hub(f"hf:org/tiny@{COMMIT}", tmp_path, server.url)
    assert done.returncode == 1
    assert "config.json has git digest" in done.stderr
    assert left_over(tmp_path / "cache") == []


# --- refusals ------------------------------------------------------------------------------------


def swap(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    ("served", "message"),
    [
        pytest.param(swap(WHEEL), "not the file that was pinned", id="other bytes"),
        pytest.param(WHEEL[:-9], r"ended after \d+ of \d+ bytes", id="cut"),
        pytest.param(WHEEL + b"more", "larger than the", id="longer"),
        pytest.param(None, "is not there", id="absent"),
    ],
)
def test_only_the_pinned_archive_is_taken(
    tmp_path: Path, shelf: Path, served: bytes | None, message: str
) -> None:
    if served is not None:
        (shelf / WHEEL_NAME).write_bytes(served)
    with pytest.raises(FwError, match=message):
        fetch("tiny", cache=tmp_path / "cache", known={"tiny": TINY})
    assert left_over(tmp_path / "cache") == []


def test_pinned_archive_with_another_file_inside(tmp_path: Path, shelf: Path) -> None:
    wheel = zip_bytes({f"tiny/{n}": swap(c) for n, c in CONTENT.items()})
    (shelf / WHEEL_NAME).write_bytes(wheel)
    asset = packed(WHEEL_NAME, wheel, "tiny/")
    with pytest.raises(FwError, match=r"model\.safetensors is not the file that was pinned"):
        fetch("tiny", cache=tmp_path / "cache", known={"tiny": asset})
    assert left_over(tmp_path / "cache") == []


def linked(kind: str) -> bytes:
    """An archive whose member `a` is a link to a file outside."""
    held = io.BytesIO()
    if kind == ".zip":
        with zipfile.ZipFile(held, "w") as archive:
            info = zipfile.ZipInfo("a")
            info.external_attr = 0o120777 << 16
            archive.writestr(info, "/etc/passwd")
    else:
        with tarfile.open(fileobj=held, mode="w:gz") as archive:
            info = tarfile.TarInfo("a")
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(info)
    return held.getvalue()


def twice(kind: str) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w:gz") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("a"))
    return held.getvalue()


ARCHIVES: dict[str, Callable[[dict[str, bytes]], bytes]] = {".zip": zip_bytes, ".tar.gz": tar_bytes}


@pytest.mark.parametrize("kind", ARCHIVES)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda k: ARCHIVES[k]({"b": b"x"}), "there 0 times", id="missing"),
        pytest.param(lambda k: ARCHIVES[k]({"a": b"x" * 99}), "has 99 bytes", id="size"),
        pytest.param(linked, "no regular file", id="link"),
        pytest.param(lambda k: ARCHIVES[k]({"a": b"x"})[:-30], "damaged", id="damaged"),
        pytest.param(lambda k: b"", "damaged", id="empty"),
    ],
)
def test_archive_refusals(
    tmp_path: Path, kind: str, make: Callable[[str], bytes], message: str
) -> None:
    path, out = tmp_path / f"archive{kind}", tmp_path / "out"
    path.write_bytes(make(kind))
    out.mkdir()
    with pytest.raises(FwError, match=message):
        extract(path, [File("a", 1, digest(b"x"))], out)
    assert list(out.iterdir()) == []


def test_member_that_is_there_twice(tmp_path: Path) -> None:
    (tmp_path / "archive.tar.gz").write_bytes(twice(".tar.gz"))
    with pytest.raises(FwError, match="there 2 times"):
        extract(tmp_path / "archive.tar.gz", [File("a", 0, digest(b""))], tmp_path)


@pytest.mark.parametrize("kind", ARCHIVES)
def test_climbing_member_stays_inside(tmp_path: Path, kind: str) -> None:
    """A member that would climb is never asked for, and others of its archive stay unwritten."""
    path, out = tmp_path / f"archive{kind}", tmp_path / "deep" / "out"
    out.mkdir(parents=True)
    path.write_bytes(ARCHIVES[kind]({"../../evil": b"x", "/tmp/evil": b"x", "a": b"x"}))
    extract(path, [File("a", 1, digest(b"x"))], out)
    written = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert written == {path.name, "deep/out/a"}
    for member in ("../../evil", "/tmp/evil"):
        with pytest.raises(FwError, match="not a plain relative path"):
            File("a", 1, digest(b"x"), member)


@given(st.lists(st.sampled_from(["a", "b.c", "..", ".", "", "~", "C:", "\\", "\0"]), min_size=1))
def test_accepted_paths_stay_inside(parts: list[str]) -> None:
    path = "/".join(parts)
    base = Path("/base")
    try:
        check_path(path)
    except FwError:
        assert {"..", ".", "", "C:", "\\", "\0"} & set(parts)
    else:
        resolved = Path(os.path.normpath(base / path))
        assert resolved.is_relative_to(base)
        assert resolved.relative_to(base).as_posix() == path


def test_names_and_places(tmp_path: Path) -> None:
    with pytest.raises(FwError, match="did you mean 'german-credit'"):
        fetch("german_credits", cache=tmp_path)
    with pytest.raises(FwError, match="there is no folder"):
        fetch("models/mine", cache=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(FwError, match="is a file"):
        fetch(tmp_path / "file", cache=tmp_path)
    for name in ("hf:org/tiny", "hf:tiny@main", "hf:../..@" + COMMIT):
        with pytest.raises(FwError, match="form"):
            fetch(name, cache=tmp_path)
    with pytest.raises(FwError, match=r"cannot write to the cache .*FW_CACHE"):
        fetch("tiny", cache=tmp_path / "file", known={"tiny": TINY})


@pytest.mark.parametrize("kind", ["package", "url"])
def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    with serving({}) as server:
        closed = server.url
    url = Asset("tiny", "", "MIT", Url(f"{closed.replace('http:', 'https:')}/"), pinned())
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", f"{closed}/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(FwError, match=r"cannot download .*refused"):
        known = {"tiny": TINY if kind == "package" else url}
        fetch("tiny", cache=tmp_path / "cache", known=known)
    assert left_over(tmp_path / "cache") == []


# --- what was kept, and is altered ---------------------------------------------------------------


def test_altered_file_is_found(tmp_path: Path, shelf: Path) -> None:
    (shelf / WHEEL_NAME).write_bytes(WHEEL)
    folder = fetch("tiny", cache=tmp_path / "cache", known={"tiny": TINY})
    path = folder / "config.json"
    for spoil in (
        lambda: path.write_bytes(swap(CONTENT["config.json"])),
        lambda: path.write_bytes(b""),
        path.unlink,
        lambda: path.symlink_to("/etc/passwd"),
    ):
        spoil()
        with pytest.raises(FwError, match=r"config\.json.*fetch again"):
            fetch("tiny", cache=tmp_path / "cache", known={"tiny": TINY})
    path.unlink()
    path.write_bytes(CONTENT["config.json"])
    assert holds(fetch("tiny", cache=tmp_path / "cache", known={"tiny": TINY}))
    (folder / "PROVENANCE.json").write_text('{"files": ')
    with pytest.raises(FwError, match=r"PROVENANCE\.json: no usable record"):
        fetch("tiny", cache=tmp_path / "cache", known={"tiny": TINY})


def test_large_file_is_trusted_by_its_time_and_verified_by_its_hash(tmp_path: Path) -> None:
    with (tmp_path / "big").open("wb") as file:
        file.truncate(ALWAYS_HASHED)
    with (tmp_path / "big").open("rb") as file:
        sha = hashlib.file_digest(file, "sha256").hexdigest()
    files = (File("big", ALWAYS_HASHED, sha),)
    known = {"big": Asset("big", "", "MIT", Url(f"{tmp_path.as_uri()}/"), files)}
    folder = fetch("big", cache=tmp_path / "cache", known=known)
    before = (folder / "big").stat()
    with (folder / "big").open("r+b") as file:
        file.write(b"x")
    with pytest.raises(FwError, match="altered"):
        fetch("big", cache=tmp_path / "cache", known=known)
    os.utime(folder / "big", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fetch("big", cache=tmp_path / "cache", known=known) == folder
    with pytest.raises(FwError, match="altered"):
        verify(folder, known["big"])


# --- processes, signals, limits ------------------------------------------------------------------


def test_second_process_waits_and_finds_it_done(tmp_path: Path) -> None:
    with (
        serving(index(WHEEL_NAME, WHEEL), stalled=True) as server,
        fetching(TINY, tmp_path, use_index(server)) as first,
    ):
        wait_for(lambda: half_arrived(tmp_path))
        with fetching(TINY, tmp_path, use_index(server)) as second:
            assert second.stderr
            waiting = second.stderr.readline()
            assert f"waiting for process {first.pid} on" in waiting
            assert "which is fetching tiny" in waiting
            server.release.set()
            (out, err), (out2, _) = first.communicate(timeout=60), second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0), err
    assert out == out2
    assert holds(Path(out.strip()))
    assert server.asked.count(f"/files/{WHEEL_NAME}") == 1
    assert left_over(tmp_path / "cache") == [TINY.key]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_fetch_leaves_nothing_half(tmp_path: Path, how: signal.Signals) -> None:
    with serving(index(WHEEL_NAME, WHEEL), stalled=True) as server:
        with fetching(TINY, tmp_path, use_index(server)) as child:
            wait_for(lambda: half_arrived(tmp_path))
            child.send_signal(how)
            child.wait(timeout=60)
        assert child.returncode != 0
        left = left_over(tmp_path / "cache")
        assert TINY.key not in left
        assert len(left) == (how == signal.SIGKILL)  # who is killed cannot tidy up
        server.release.set()
        with fetching(TINY, tmp_path, use_index(server)) as again:
            out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert holds(Path(out.strip()))
    assert left_over(tmp_path / "cache") == [TINY.key]


def test_too_little_room_is_seen_before(tmp_path: Path) -> None:
    size = 1 << 60
    files = (File("huge", size, digest(b"")),)
    known = {"huge": Asset("huge", "", "MIT", Url(f"{tmp_path.as_uri()}/"), files)}
    with pytest.raises(FwError, match=rf"huge: needs {size} bytes in .*, where \d+ are free"):
        fetch("huge", cache=tmp_path / "cache", known=known)


def test_limit_on_the_size_of_a_file(tmp_path: Path, shelf: Path) -> None:
    """A limit that only shows while writing, as a quota does; the child of pip inherits it."""
    (shelf / WHEEL_NAME).write_bytes(WHEEL)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))"
    with fetching(TINY, tmp_path, dict(os.environ), limit) as child:
        _, err = child.communicate(timeout=60)
    assert child.returncode == 1
    assert re.match(rf"fw: tiny: needs \d+ bytes in .*\({os.strerror(errno.EFBIG)}\)\n$", err)
    assert left_over(tmp_path / "cache") == []


def _fails(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode != 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(disk)]
    if shutil.which("mount") is None or _fails(mount):
        pytest.skip("mounting a small tmpfs needs root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_disk_that_fills_up_meanwhile(tmp_path: Path, small_disk: Path) -> None:
    with (
        serving(index(WHEEL_NAME, WHEEL), stalled=True) as server,
        fetching(TINY, small_disk, use_index(server)) as child,
    ):
        wait_for(lambda: half_arrived(small_disk))
        with (small_disk / "somebody").open("wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(bytes(4096))
        server.release.set()
        _, err = child.communicate(timeout=60)
    assert child.returncode == 1
    assert re.match(rf"fw: tiny: needs \d+ bytes.*\({os.strerror(errno.ENOSPC)}\)\n$", err)
    assert left_over(small_disk / "cache") == []


# --- the catalogue and the command ---------------------------------------------------------------


def test_own_catalogue_says_the_same(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(toml(TINY))
    own = read_catalogue(tmp_path / "own.toml")["tiny"]
    assert own == TINY
    assert own.key == TINY.key != packed(WHEEL_NAME, WHEEL + b".", "tiny/").key


ENTRY = toml(TINY)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ENTRY.replace("==1.0", ">=1.0"), r"own\.toml: \[tiny\]: package .* project==version"),
        (ENTRY.replace("-none-any", "-none-win32"), "any platform"),
        (ENTRY.replace('"MIT"', '"MIT"\nlicense = "MIT"'), "license"),
        (ENTRY.replace("licence", "licens"), "'licence' is missing"),
        (ENTRY.replace("nested/vocab.txt", "../vocab.txt"), "plain relative path"),
        (ENTRY.replace("config.json", "PROVENANCE.json"), "fw's own record"),
        (ENTRY.replace("config.json", "model.safetensors"), "each name once"),
        (ENTRY.replace("size = ", "size = -"), "number of bytes"),
        (ENTRY.replace("package", "pakage"), "needs `package`"),
        (ENTRY.replace("[", "", 1), r"not valid TOML: .*line 1"),
        ('["a/b"]' + ENTRY[8:], "asset name"),
        ("tiny = 1", r"\[tiny\]"),
    ],
)
def test_wrong_catalogue_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "own.toml").write_text(text)
    with pytest.raises(FwError, match=message):
        read_catalogue(tmp_path / "own.toml")


def test_other_sources_are_pinned() -> None:
    with pytest.raises(FwError, match="commit"):
        Hub("org/tiny", "main")
    with pytest.raises(FwError, match="https"):
        Url("http://example.org/")


def test_command(tmp_path: Path, shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shelf / WHEEL_NAME).write_bytes(WHEEL)
    (tmp_path / "own.toml").write_text(toml(TINY))
    options = ["--catalogue", str(tmp_path / "own.toml"), "--cache", str(tmp_path / "cache")]
    for cached in ("no", "yes"):
        assert cli(["--list", *options]) == 0
        row = capsys.readouterr().out.splitlines()[1].split()
        assert row[:6] == ["tiny", "3.1", "MB", cached, "MIT", "package"]
        assert cli(["tiny", "--verify", *options]) == 0
        folder = Path(capsys.readouterr().out.strip())
        assert holds(folder)
    (folder / "config.json").write_bytes(b"")
    assert cli(["tiny", *options]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("fw: ")
    assert shown.err.count("\n") == 1
    assert cli(options) == 1


def test_catalogue_names_a_licence_and_no_host() -> None:
    for asset in catalogue().values():
        assert asset.licence
        assert isinstance(asset.source, Package)
        assert "://" not in repr(asset)


@pytest.mark.slow
@pytest.mark.parametrize("name", catalogue())
def test_real_downloads(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("PIP_CONFIG_FILE", "PIP_NO_INDEX"):
        monkeypatch.delenv(key)
    try:
        folder = fetch(name, cache=tmp_path)
    except FwError as error:
        if "Could not fetch" in str(error) or "Error: " in str(error):
            pytest.skip(f"no package index in reach: {error}")
        raise
    verify(folder, catalogue()[name])
