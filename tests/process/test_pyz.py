"""`ringoexp.pyz`: its contents, and that it does everything that the program does, on every Python on this machine.

It runs with `-I -S`, without environment variables, in its own directories: no installed package can help it.
"""

import ast
import functools
import importlib.metadata
import json
import os
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import build_pyz
import pytest
from build_pyz import BuildError
from support.harness import (
    DEADLINE,
    ROOT,
    RawClient,
    ServerProcess,
    eventually,
    free_port,
    program_files,
    request,
    rows,
)

pytestmark = pytest.mark.slow  # builds, virtual environments and other Pythons

MAX_BYTES = 450_000
PAGE_FILE = ROOT / "ringolib/web/dashboard.html"
PAGE = PAGE_FILE.read_bytes()
SITE = str(importlib.metadata.distribution("h11").locate_file(""))


@functools.cache
def pythons() -> dict[tuple[int, int], str]:
    """Return the Pythons on the PATH and in pyenv, one for each minor version. The tests' own Python comes first."""
    versions = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    paths = [os.path.realpath(sys.executable), *map(str, sorted(versions.glob("*/bin/python")))]
    names = ["python2.7", *(f"python3.{minor}" for minor in range(30))]
    paths += [path for name in names if (path := shutil.which(name))]
    by_version: dict[tuple[int, int], str] = {}
    for path in paths:
        code = "import sqlite3, sys; print('%d %d' % sys.version_info[:2])"
        done = subprocess.run([path, "-c", code], capture_output=True, text=True)
        if done.returncode == 0:  # a shim of pyenv fails for a version that is not selected
            major, minor = map(int, done.stdout.split())
            by_version.setdefault((major, minor), path)
    return by_version


GOOD = {version: path for version, path in sorted(pythons().items()) if version >= (3, 10)}
OLD = {version: path for version, path in sorted(pythons().items()) if version < (3, 10)}
each_python = pytest.mark.parametrize("python", GOOD.values(), ids=[f"{major}.{minor}" for major, minor in GOOD])
this_python = os.path.realpath(sys.executable)


@pytest.fixture(scope="module")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that `python tools/build_pyz.py` builds, alone in a directory."""
    directory = tmp_path_factory.mktemp("built")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/build_pyz.py")],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in directory.iterdir()] == ["ringoexp.pyz"]
    return directory / "ringoexp.pyz"


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[list[str]]:
    """A command prefix that clears the environment. HOME is not writable and must stay empty."""
    home = tmp_path / "home"
    home.mkdir(mode=0o555)
    yield ["env", "-i", f"HOME={home}"]
    assert list(home.iterdir()) == []


def run(command: list[str], directory: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(command, cwd=directory, input=stdin, capture_output=True, text=True, timeout=DEADLINE)


def post(port: int, *values: int) -> tuple[int, int]:
    """Send these values with POST; return the status and the number that the response gives as stored."""
    headers = {"Content-Type": "application/octet-stream"}
    status, _, body = request(port, "POST", "/v1.0/ingest", struct.pack(f">{len(values)}q", *values), headers)
    return status, json.loads(body)["stored"]


@pytest.mark.slow
@each_python
def test_one_file_is_the_whole_program(pyz: Path, alone: list[str], tmp_path: Path, python: str) -> None:
    work = tmp_path / "work"
    work.mkdir()
    program = [python, "-I", "-S", str(pyz)]
    profiler = free_port()
    running = ServerProcess(work, "-p", "0", "-T", "0", "-L", str(profiler), program=program, under=alone)
    try:
        done = run([*alone, *program, "send", "--url", running.url], work, "\n".join(map(str, range(1000))))
        assert done.returncode == 0, done.stderr
        assert post(running.port, 42, -(2**63)) == (200, 2)
        assert running.get("/")[::2] == (200, PAGE)
        assert running.stats()["recordsStored"] == 1002
        assert b"ringoexp_records_stored_total 1002" in running.get("/metrics")[2]
        status, _, threads = request(profiler, "GET", "/debug/pprof/threads")
        assert status == 200 and b"accept" in threads
        assert request(profiler, "GET", "/debug/pprof/profile?seconds=1")[0] == 200
        taken = run([*alone, *program, "-p", str(running.port)], work)
        assert (taken.returncode, taken.stderr.count("\n")) == (1, 1) and "cannot listen" in taken.stderr
        assert running.stop(signal.SIGTERM) == 0
        assert running.tally == "ringoexp: stopped, 1002 stored, 0 unstored"
    finally:
        running.kill()
    files = {path.name for path in work.iterdir()} - {running.errors.name}
    assert files == {"ringoexp.db", "ringoexp.db-lock"}
    stored = [value for _, _, value in rows(work / "ringoexp.db")]
    assert sorted(stored) == sorted([*range(1000), 42, -(2**63)])
    assert "Traceback" not in running.errors.read_text()
    assert [path.name for path in pyz.parent.iterdir()] == ["ringoexp.pyz"]


@pytest.mark.slow
@each_python
def test_exit_statuses_are_kept(pyz: Path, alone: list[str], tmp_path: Path, python: str) -> None:
    program = [python, "-I", "-S", str(pyz)]
    for word in ("version", "--help"):
        done = run([*alone, *program, word], tmp_path)
        assert done.returncode == 0 and done.stdout.startswith(("ringoexp 0", "usage: ringoexp")) and not done.stderr
    for flags in (["-p", "many"], ["send", "--first", "x"]):
        done = run([*alone, *program, *flags], tmp_path)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    done = run([*alone, *program, "send", str(tmp_path / "none")], tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


@pytest.mark.slow
def test_exit_status_is_3_if_records_stay_unstored(pyz: Path, alone: list[str], tmp_path: Path) -> None:
    patched = f"""
import runpy, sys
sys.path.insert(0, {str(pyz)!r})
import ringolib.app
ringolib.app.DRAIN_SECONDS = 0.2
runpy.run_path({str(pyz)!r}, run_name="__main__")
"""
    program = [this_python, "-I", "-S", "-c", patched]
    running = ServerProcess(tmp_path, "-p", "0", "-T", str(free_port()), program=program, under=alone)
    try:
        with RawClient(running.port) as client:
            client.send(b"\x82\x84\0\0\0\0" + struct.pack(">i", 42))
            eventually(lambda: running.stats()["recordsReceived"] == 1)
            assert running.stop() == 3
    finally:
        running.kill()
    assert running.tally == "ringoexp: stopped, 0 stored, 1 unstored"


@each_python
def test_publisher_and_consumer_run_from_one_file(pyz: Path, alone: list[str], tmp_path: Path, python: str) -> None:
    program = [python, "-I", "-S", str(pyz)]
    consumer = ServerProcess(tmp_path, "-I", "false", "-p", "0", "-D", "numbers.db", program=program, under=alone)
    try:
        publisher = ServerProcess(tmp_path, "-p", "0", "-T", str(consumer.port), program=program, under=alone)
        try:
            assert post(publisher.port, 1, 2, 3) == (200, 3)
            assert (publisher.stop(signal.SIGINT), consumer.stop(signal.SIGINT)) == (0, 0)
        finally:
            publisher.kill()
    finally:
        consumer.kill()
    assert [value for _, _, value in rows(tmp_path / "numbers.db")] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize(
    "missing", ["wsproto/", "h11/", "simple_websocket/", "ringolib/counters.py", "ringolib/status/profiler.py"]
)
def test_incomplete_file_does_not_run(pyz: Path, alone: list[str], tmp_path: Path, missing: str) -> None:
    """Check the other tests: they could not notice a missing file if an installed package replaced it."""
    with zipfile.ZipFile(pyz) as whole, zipfile.ZipFile(tmp_path / "part.pyz", "w") as part:
        for info in whole.infolist():
            if not info.filename.startswith(missing):
                part.writestr(info, whole.read(info))
    done = run([*alone, sys.executable, "-I", "-S", str(tmp_path / "part.pyz"), "-p", "0", "-T", "0"], tmp_path)
    assert done.returncode == 1 and f"{missing.removesuffix('.py').strip('/').replace('/', '.')}" in done.stderr
    assert "ModuleNotFoundError" in done.stderr or "is missing" in done.stderr


@pytest.mark.slow
def test_file_is_executable_under_any_name(pyz: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(this_python)
    shutil.copy(pyz, tmp_path / "numbers")
    clean = ["env", "-i", f"PATH={tmp_path / 'bin'}:/usr/bin:/bin", str(tmp_path / "numbers")]
    done = run([*clean, "version"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("ringoexp ")


def test_other_programs_can_import_from_the_file(pyz: Path, tmp_path: Path) -> None:
    code = "from ringoexp import AsyncProducer, Producer; import sys, wsproto\n"
    code += (
        "for module in (Producer.__module__, AsyncProducer.__module__, 'wsproto'): print(sys.modules[module].__file__)"
    )
    done = run(["env", "-i", f"PYTHONPATH={pyz}", this_python, "-S", "-c", code], tmp_path)
    files = ("ringolib/client/producer.py", "ringolib/client/async_producer.py", "wsproto/__init__.py")
    assert done.stdout == "".join(f"{pyz}/{file}\n" for file in files), done.stderr


@pytest.mark.slow
def test_ctrl_c_during_imports_ends_without_a_traceback(pyz: Path, tmp_path: Path) -> None:
    slow = f"""
import runpy, sys, time
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "wsserver":
            print("importing", flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Slow())
runpy.run_path({str(pyz)!r}, run_name="__main__")
"""
    command = [this_python, "-I", "-S", "-c", slow]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout and process.stdout.readline() == b"importing\n"
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=DEADLINE)[1] == b""
        finally:
            process.kill()
    assert process.returncode == -signal.SIGINT


@pytest.mark.slow
def test_running_program_survives_replacement_of_its_file(pyz: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.pyz"
    shutil.copy(pyz, mine)
    running = ServerProcess(tmp_path, "-p", "0", "-T", "0", program=[this_python, "-I", "-S", str(mine)])
    try:
        (tmp_path / "new").write_bytes(b"another" * 5000)
        os.replace(tmp_path / "new", mine)
        assert running.get("/")[::2] == (200, PAGE)
        with RawClient(running.port) as client:
            client.send(b"\x82\x84\0\0\0\0" + struct.pack(">i", 42))
            assert client.acked(1) == 1
        assert post(running.port, 7) == (200, 1)
        assert request(running.port, "GET", "/none")[0] == 404
        assert running.stop() == 0
    finally:
        running.kill()
    assert "Traceback" not in running.errors.read_text()


def test_old_python_gets_a_one_line_error(pyz: Path, tmp_path: Path) -> None:
    """Old Pythons on this machine, and this one with another version number."""
    pretend = f"import runpy, sys; sys.version_info = (3, 9, 18); runpy.run_path({str(pyz)!r}, run_name='__main__')"
    commands = [((3, 9), [this_python, "-I", "-S", "-c", pretend])]
    commands += [(version, [path, str(pyz), "-p", "0", "-T", "0"]) for version, path in OLD.items()]
    for (major, minor), command in commands:
        done = run(command, tmp_path)
        expected = f"ringoexp: error: this is Python {major}.{minor}, Python 3.10 or newer is needed\n"
        assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)
    assert 'requires-python = ">=3.10"' in (ROOT / "pyproject.toml").read_text()


def test_old_python_gets_a_one_line_error_from_a_checkout(tmp_path: Path) -> None:
    pretend = "import runpy, sys; sys.version_info = (3, 9, 18); runpy.run_path(sys.argv[1], run_name='__main__')"
    commands = [[this_python, "-c", pretend, str(ROOT / "ringoexp.py")]]
    commands += [[path, str(ROOT / "ringoexp.py")] for version, path in OLD.items() if version >= (3, 8)]
    for command in commands:
        done = run(command, tmp_path)
        assert done.returncode == 1
        assert re.fullmatch(r"ringoexp: error: this is Python 3.[89], Python 3.10 or newer is needed\n", done.stderr)


def test_main_module_has_no_new_syntax() -> None:
    tree = ast.parse(build_pyz.MAIN, feature_version=(3, 4))
    assert isinstance(tree.body[0], ast.Import) and isinstance(tree.body[1], ast.If), (
        "import sys, then check the version"
    )
    assert build_pyz.MAIN.isascii()
    assert not re.search(r"\bprint\b|\bf\"|\bnonlocal\b|\bfrom\b.*:", build_pyz.MAIN)


def test_file_holds_exactly_the_program_and_its_dependencies(pyz: Path) -> None:
    own = {path.relative_to(ROOT).as_posix() for path in program_files()}
    dependencies = {
        str(path.relative_to(SITE))
        for package in build_pyz.DEPENDENCIES.values()
        for path in Path(SITE, package).rglob("*.py")
    }
    with zipfile.ZipFile(pyz) as packed:
        names = packed.namelist()
        licences = {name: packed.read(name).decode() for name in names if "LICENSE" in name}
        infos = packed.infolist()
    assert set(names) == own | dependencies | {"__main__.py", "ringolib/web/dashboard.html"} | set(licences)
    assert names == sorted(names)
    assert {(info.date_time, info.external_attr >> 16, info.create_system) for info in infos} == {
        ((1980, 1, 1, 0, 0, 0), 0o100644, 3)
    }
    assert licences.pop("LICENSE") == (ROOT / "LICENSE").read_text()
    packages = {name.split("/")[1].rsplit("-", 1)[0] for name in licences}
    assert packages == set(build_pyz.DEPENDENCIES) and all("Copyright" in text for text in licences.values())


def test_file_is_small_and_executable(pyz: Path) -> None:
    assert pyz.stat().st_size < MAX_BYTES
    assert stat.S_IMODE(pyz.stat().st_mode) == 0o755
    assert pyz.read_bytes().startswith(b"#!/usr/bin/env python3\n")


@each_python
def test_build_is_reproducible(pyz: Path, tmp_path: Path, python: str) -> None:
    """Build with another directory, file times, modes, order, umask, locale, time zone and Python."""
    source = tmp_path / "elsewhere"
    source.mkdir()
    for name in sorted([*map(str, program_files()), *map(str, [PAGE_FILE, ROOT / "tools/build_pyz.py"])], reverse=True):
        copy = source / Path(name).relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(name, copy)
    shutil.copyfile(ROOT / "LICENSE", source / "LICENSE")
    (source / "ringolib/app.py").chmod(0o700)
    work = tmp_path / "work"
    work.mkdir()
    environment = [f"PYTHONPATH={SITE}", "TZ=Asia/Tokyo", "LC_ALL=C", "PYTHONHASHSEED=7"]
    shell = ["sh", "-c", 'umask 077; exec "$0" "$@"']
    done = run(["env", "-i", *environment, *shell, python, "-S", str(source / "tools/build_pyz.py"), "mine"], work)
    assert done.returncode == 0, done.stderr
    assert (work / "mine").read_bytes() == pyz.read_bytes()
    assert stat.S_IMODE((work / "mine").stat().st_mode) == 0o755
    assert re.fullmatch(r"mine: \d+ bytes, sha256 [0-9a-f]{64}, with simple-websocket .*\n", done.stdout)


@pytest.mark.slow
def test_build_error_is_one_line(pyz: Path, tmp_path: Path) -> None:
    script = str(ROOT / "tools/build_pyz.py")
    for command, status, message in (
        ([this_python, "-I", "-S", script], 1, "simple-websocket is not installed"),
        ([sys.executable, script, "none/ringoexp.pyz"], 1, "No such file or directory"),
        ([sys.executable, script, ""], 1, ". is a directory: name a file in it"),
        ([sys.executable, script, str(tmp_path)], 1, "is a directory: name a file in it"),
        ([sys.executable, script, "a", "b"], 2, "usage: python tools/build_pyz.py [OUTPUT]"),
        ([sys.executable, script, "--help"], 2, "usage: python tools/build_pyz.py [OUTPUT]"),
    ):
        done = run(command, tmp_path)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (status, "", 1) and message in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["h11/__init__.py"], "its licence"),
        (["h11-1.dist-info/LICENSE"], "its files"),
        (["h11/__init__.py", "h11/fast.so", "h11-1.dist-info/LICENSE"], "h11/fast.so is not Python"),
    ],
)
def test_build_refuses_broken_packages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: list[str], message: str
) -> None:
    """A copy of h11 with only these files is installed in front of the real one."""
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    info = tmp_path / "h11-1.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: h11\nVersion: 1\n")
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in files))
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BuildError, match=f"^h11 1: .*{re.escape(message)}"):
        build_pyz.contents()
