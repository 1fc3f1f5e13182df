"""Pythons that lack a module, run on Windows or have no GIL: most parts work, and one line names the missing module.

A module is hidden before the program is imported, as if this Python had been built without it.
"""

import subprocess
import sys
from pathlib import Path

import build_pyz
import pytest
from support.certificates import Pair
from support.harness import DEADLINE, ROOT, RawClient, ServerProcess, frame, free_port, request, rows

HIDE = """
import runpy, sys
for module in {modules!r}:
    for loaded in list(sys.modules):  # coverage has imported sqlite3
        if loaded.partition(".")[0] == module.lstrip("_"):
            del sys.modules[loaded]
    sys.modules[module] = None
{more}
sys.path[0] = {path!r}
sys.argv = [{path!r} + "/ringoexp.py", *sys.argv[1:]]
runpy.run_path({program!r}, run_name="__main__")
"""
TLS_HINT = "TLS is not possible: this Python was built without the module _ssl (OpenSSL): use another Python\n"


def python_without(*modules: str, more: str = "", program: Path = ROOT / "ringoexp.py") -> list[str]:
    """Return the command of the program in a Python that lacks these modules. `more` is run before it."""
    code = HIDE.format(modules=modules, more=more, path=str(ROOT), program=str(program))
    return [sys.executable, "-c", code]


def run(command: list[str], directory: Path, *flags: str, given: str = "") -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*command, *flags], cwd=directory, input=given, capture_output=True, text=True, timeout=DEADLINE
    )


def cannot_run(command: list[str], directory: Path, *flags: str) -> str:
    """Return the one line that the program ends with."""
    done = run(command, directory, *flags)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    return done.stderr.removeprefix("ringoexp: error: ")


@pytest.mark.parametrize("module", ["_sqlite3", "_ssl", "fcntl", "resource", "_ctypes", "_hashlib", "_bz2"])
def test_send_works_without(module: str, tmp_path: Path) -> None:
    with ServerContext(tmp_path, [sys.executable, str(ROOT / "ringoexp.py")]) as running:
        done = run(python_without(module), tmp_path, "send", "--url", running.url, given="1\n2\n3\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert [value for _, _, value in rows(tmp_path / "ringoexp.db")] == [1, 2, 3]


@pytest.mark.parametrize(
    "modules", [("_ssl",), ("_ctypes",), ("_ssl", "_hashlib", "_ctypes", "_bz2", "_lzma", "_uuid")]
)
def test_server_works_without(modules: tuple[str, ...], tmp_path: Path) -> None:
    with ServerContext(tmp_path, python_without(*modules)) as running:
        with RawClient(running.port) as client:
            client.send(frame(2, bytes(8)))
            assert client.acked(1) == 1
        assert running.get("/v1.0/ready")[0] == running.get("/metrics")[0] == running.get("/")[0] == 200
        assert running.stop() == 0


def test_publisher_without_tls_links_to_its_consumer(tmp_path: Path) -> None:
    with ServerContext(tmp_path, python_without("_ssl"), "-I", "false", "-p", "0") as consumer:
        flags = ["-p", "0", "-T", str(consumer.port)]
        with ServerContext(tmp_path, python_without("_ssl"), *flags) as publisher:
            assert publisher.get("/v1.0/ready")[0] == 200
            assert request(publisher.port, "POST", "/v1.0/ingest", bytes(8))[0] == 200


def test_what_needs_tls_says_that_it_is_missing(tmp_path: Path, pair: Pair) -> None:
    command = python_without("_ssl")
    certificate = ["--tls_cert", str(pair.cert), "--tls_key", str(pair.key)]
    assert cannot_run(command, tmp_path, "-p", "0", *certificate) == TLS_HINT
    assert cannot_run(command, tmp_path, "-p", "0", "-U", "localhost", "-T", "1", "--consumer_tls") == TLS_HINT
    clickhouse = cannot_run(command, tmp_path, "-p", "0", "-I", "false", "-D", "clickhouses://localhost/d")
    assert clickhouse == f"clickhouses://localhost:8443/d: {TLS_HINT}"
    done = run(command, tmp_path, "send", "--url", "wss://localhost:1/", given="1\n")
    assert (done.returncode, done.stderr) == (1, f"ringoexp send: error: {TLS_HINT}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["_sqlite3", "sqlite3", "fcntl", "resource", "zlib"])
def test_server_names_the_module_that_it_lacks(module: str, tmp_path: Path) -> None:
    line = cannot_run(python_without(module), tmp_path, "-p", "0")
    assert line.startswith(f"this Python lacks the module {module} (") and "use a Python that was built with it" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [["version"], ["--help"]])
def test_help_and_version_need_no_database(flags: list[str], tmp_path: Path) -> None:
    done = run(python_without("_sqlite3", "_ssl", "fcntl", "resource"), tmp_path, *flags)
    assert (done.returncode, done.stderr) == (0, "") and "ringoexp" in done.stdout


def test_send_names_the_module_that_wsproto_lacks(tmp_path: Path) -> None:
    assert cannot_run(python_without("zlib"), tmp_path, "send").startswith("this Python lacks the module zlib (")


@pytest.mark.parametrize("module", ["_sqlite3", "_ssl"])
def test_producer_is_importable_without(module: str, tmp_path: Path) -> None:
    code = f"import sys; sys.modules[{module!r}] = None; sys.path[0] = {str(ROOT)!r}\n"
    code += "import asyncio; from ringoexp import AsyncProducer, Producer\n"
    code += f"url = 'ws://localhost:{free_port()}'; Producer(url).close(); asyncio.run(AsyncProducer(url).close())\n"
    code += "print('closed')"
    done = run([sys.executable, "-c", code], tmp_path)
    assert (done.stdout, done.stderr) == ("closed\n", "")


@pytest.mark.slow
def test_single_file_names_the_module_that_it_lacks(tmp_path: Path) -> None:
    """Without zlib, Python can read only the start of the file, which is stored as it is."""
    pyz = tmp_path / "ringoexp.pyz"
    assert build_pyz.main([str(pyz)]) == 0
    for module in ("zlib", "_sqlite3", "fcntl"):
        line = cannot_run(python_without(module, program=pyz), tmp_path, "-p", "0")
        assert line.startswith(f"this Python lacks the module {module}"), line


@pytest.mark.parametrize("flags", [["-p", "0"], ["send"], []])
def test_windows_gets_one_line(flags: list[str], tmp_path: Path) -> None:
    command = python_without("fcntl", "resource", more="sys.platform = 'win32'")
    assert "Windows is not supported: run this program on Linux or macOS" in cannot_run(command, tmp_path, *flags)


def test_profiler_declines_to_sample_without_the_gil(tmp_path: Path) -> None:
    """The missing GIL is simulated: the program was not tested with a free-threaded Python."""
    profiler = free_port()
    with ServerContext(
        tmp_path, python_without(more="sys._is_gil_enabled = lambda: False"), "-p", "0", "-T", "0", "-L", str(profiler)
    ) as running:
        for page in ("profile?seconds=1", "threads"):
            status, _, body = request(profiler, "GET", f"/debug/pprof/{page}")
            assert status == 501 and b"PYTHON_GIL=1" in body
        for page in ("", "cmdline", "heap?start=1", "heap"):
            assert request(profiler, "GET", f"/debug/pprof/{page}")[0] == 200
        assert running.stop() == 0


class ServerContext:
    """A server of this program, killed at the end of the block."""

    def __init__(self, directory: Path, program: list[str], *flags: str) -> None:
        self._running = ServerProcess(directory, *(flags or ("-p", "0", "-T", "0")), program=program)

    def __enter__(self) -> ServerProcess:
        return self._running

    def __exit__(self, *unused: object) -> None:
        self._running.kill()
        assert "Traceback" not in self._running.errors.read_text()
