"""The command line: every flag right and wrong, what a user sees when it cannot run, signals, the README's tables."""

import json
import os
import re
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from array import array
from contextlib import ExitStack, closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from support.harness import (
    DEADLINE,
    ROOT,
    Blocked,
    RawClient,
    ServerProcess,
    eventually,
    frame,
    free_port,
    request,
    server,
)

import ringoexp
from ringoexp import main
from ringolib import app as assembly
from ringolib import options
from ringolib.app import App, StartupError, is_own_consumer
from ringolib.options import OPTIONS, Option, Settings, read_arguments
from ringolib.wire import SUBPROTOCOL, Run, encode_batch
from store import Store

README = (ROOT / "README.md").read_text()


def run(directory: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """`python ringoexp.py` with these flags, to its end."""
    return subprocess.run(
        [sys.executable, str(ROOT / "ringoexp.py"), *flags],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )


def usage_error(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The one line that these flags are refused with."""
    with pytest.raises(SystemExit) as ended:
        read_arguments(flags)
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    assert said.err.startswith("ringoexp: error: ") and said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize("word", ["help", "--help", "-h"])
def test_help_shows_every_option_with_its_default_in_groups(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([word])
    said = capsys.readouterr()
    assert (ended.value.code, said.err) == (0, "")
    shown = " ".join(said.out.split())
    for option in OPTIONS:
        assert f"-{option.short}" in shown and f"--{option.long}" in shown and option.help in shown
        if option.default != "" and option.long != "debug":
            default = "off" if option.default is None else str(option.default).lower()
            assert f"{option.help} (default {default})" in shown
    for group in ("basic:", "publisher:", "consumer:", "system:", "common:", "examples:"):
        assert f"\n{group}\n" in said.out
    for example in re.findall(r"^    ringoexp (.*)$", said.out, re.MULTILINE):
        read_arguments(example.split())
    assert len(re.findall(r"^    ringoexp ", said.out, re.MULTILINE)) == 2


@pytest.mark.parametrize("word", ["version", "--version", "-V"])
def test_version(word: str, tmp_path: Path) -> None:
    done = run(tmp_path, word)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"ringoexp {options.__version__}\n", "")


def test_the_table_and_the_settings_are_the_same_in_the_same_order() -> None:
    assert [option.long for option in OPTIONS] == [field.name for field in fields(Settings)]
    assert read_arguments([]) == Settings(**{option.long: option.default for option in OPTIONS})


GOOD: dict[str, list[tuple[str, Any]]] = {
    "name": [("Ringo", "Ringo"), ("", "")],
    "hostname": [("0.0.0.0", "0.0.0.0"), ("::1", "::1")],
    "port": [("0", 0), ("65535", 65535)],
    "connections": [("5", 5), ("0", 0), ("-3", 0)],
    "is_publisher": [("true", True), ("false", False)],
    "ring_size": [("1", 1), ("65536", 65536)],
    "consumer_hostname": [("db.example", "db.example")],
    "consumer_port": [("1", 1), ("65535", 65535)],
    "workers": [("1", 1), ("65536", 65536)],
    "ack": [("stored", "stored"), ("ring", "ring")],
    "spool": [("a b.spool", "a b.spool")],
    "spool_max": [("1", 1), (str(2**62), 2**62)],
    "database": [("a b.db", "a b.db")],
    "clickhouse_cluster": [("a b", "a b")],
    "retain": [("30", 30), ("0.5", 0.5), (".25", 0.25)],
    "per_address": [("1", 1), ("0", 0), ("-1", 0)],
    "threads": [("512", 512), ("1000000", 1000000)],
    "procs": [("1", 1), ("0", 0), ("-1", 0)],
    "profiler_port": [("0", 0), ("-1", 0), ("6061", 6061)],
    "profiler_host": [("::1", "::1")],
    "log_json": [("true", True), ("F", False)],
    "consumer_tls": [("true", True), ("F", False)],
}


NEEDED = {
    "tls_key": ["--tls_cert", "c"],
    "client_ca": ["--tls_cert", "c"],
    "consumer_ca": ["--consumer_tls"],
    "clickhouse_cluster": ["-D", "clickhouse://h"],
}


@pytest.mark.parametrize("option", [option for option in OPTIONS if option.long != "debug"], ids=lambda o: o.long)
def test_every_flag_in_every_spelling(option: Option) -> None:
    more = NEEDED.get(option.long, [])
    for text, value in GOOD.get(option.long) or [("a b.pem", "a b.pem")]:
        for flag in {f"--{option.long}", f"--{option.long.replace('_', '-')}"}:
            assert getattr(read_arguments([flag, text, *more]), option.long) == value
            assert getattr(read_arguments([f"{flag}={text}", *more]), option.long) == value
        if option.short:
            assert getattr(read_arguments([f"-{option.short}", text]), option.long) == value


def test_debug_has_no_value() -> None:
    assert read_arguments(["-d"]).debug and read_arguments(["--debug"]).debug


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["-I"], True),
        (["--is_publisher"], True),
        (["-I", "-d"], True),
        (["-I", "false"], False),
        (["-I=false"], False),
        (["-Ifalse"], False),
        (["--is_publisher=false"], False),
        (["--is-publisher", "FALSE"], False),
        (["-I", "0"], False),
        (["-I", "F"], False),
        (["-I=1"], True),
        (["-I", "True"], True),
        (["-I", "t"], True),
        (["-I", "false", "-I", "true"], True),
    ],
)
def test_is_publisher_in_every_form(words: list[str], value: bool) -> None:
    assert read_arguments(words).is_publisher is value


NUMBERS = ["x", "", "1.5", "1e3", "0x10", "--", "٣", "9" * 30]
BAD: dict[str, list[str]] = {
    "name": ["a\nb", "caf\xe9", "\0"],
    "hostname": ["", "  "],
    "port": ["-1", "65536", *NUMBERS],
    "connections": NUMBERS,
    "is_publisher": ["yes", "2", ""],
    "ring_size": ["0", "-1", "2147483649", *NUMBERS],
    "consumer_hostname": ["", " "],
    "consumer_port": ["-1", "0", "65536", *NUMBERS],
    "workers": ["0", "65537", *NUMBERS],
    "ack": ["disk", "", "STORED"],
    "spool": ["", "a\0b"],
    "spool_max": ["0", "-1", str(2**62 + 1), *NUMBERS],
    "retain": ["0", "0.0", "-1", "1.", "inf", *(text for text in NUMBERS if text != "1.5")],
    "database": ["", "a\0b"],
    "token_file": ["", " "],
    "tls_cert": ["", "a\0b"],
    "consumer_tls": ["yes", ""],
    "per_address": NUMBERS,
    "threads": ["0", "511", "1000001", *NUMBERS],
    "procs": ["100000", *NUMBERS],
    "profiler_port": ["65536", *NUMBERS],
    "profiler_host": ["", " "],
}


@pytest.mark.parametrize(
    ("option", "text"),
    [
        pytest.param(option, text, id=f"{option.long} {text!r}")
        for option in OPTIONS
        for text in BAD.get(option.long, ())
    ],
)
def test_a_bad_value_is_one_line_with_flag_value_and_what_is_accepted(
    option: Option, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = usage_error(capsys, f"--{option.long}={text}")
    assert f"argument {option.flags}" in said
    assert repr(text) in said or f" {text} " in said
    assert "not accepted: " in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--no_such_flag"], "'--no_such_flag' is not a flag"),
        (["stray"], "'stray' is not a flag"),
        (["-S", "spool.db", "-I", "false"], "only a publisher has a spool"),
        (["--ring", "5"], "'--ring' is not a flag"),
        (["-p"], "-p/--port: expected one argument"),
        (["-A", "ring", "-I", "false"], "a consumer has no ring"),
        (["-L", "65536"], "1 to 65535, 0 or less for off"),
        (["--tls_key", "k.pem"], "--tls_key: 'k.pem' requires --tls_cert"),
        (["--client_ca", "c.pem"], "--client_ca: 'c.pem' requires --tls_cert"),
        (["--consumer_ca", "c.pem"], "--consumer_ca: 'c.pem' requires --consumer_tls"),
        (["--consumer_tls", "-I", "false"], "a consumer has no links"),
    ],
)
def test_other_bad_usage_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in usage_error(capsys, *words)


@pytest.mark.parametrize(
    ("words", "own"),
    [
        ([], True),
        (["-p", "7000"], False),
        (["-p", "7000", "-T", "7000"], True),
        (["-U", "127.0.0.1"], True),
        (["-U", "LOCALHOST"], True),
        (["-H", "127.0.0.1", "-U", "127.0.0.2"], False),
        (["-H", "0.0.0.0"], True),
        (["-H", "0.0.0.0", "-U", "127.0.0.2"], True),
        (["-H", "0.0.0.0", "-U", "192.0.2.1"], False),
        (["-H", "0.0.0.0", "-U", "::1"], False),  # IPv4 only
        (["-U", "::1"], True),
        (["-U", "[::1]"], True),
        (["-H", "::1"], True),
        (["-H", "[::1]", "-U", "127.0.0.1"], False),
        (["-H", "::", "-U", "::1"], True),
        (["-H", "::", "-U", "127.0.0.2"], True),
        (["-H", "::", "-U", "::ffff:127.0.0.1"], True),
        (["-U", "::ffff:127.0.0.1"], True),
        (["-H", "unix:a.sock"], True),
        (["-H", "unix:a.sock", "-p", "7000"], True),
        (["-H", "unix:a.sock", "-U", "localhost"], False),
        (["-H", "unix:a.sock", "-T", "6660"], False),
        (["-H", "unix:a.sock", "-U", "unix:./a.sock"], True),
        (["-H", "unix:a.sock", "-U", "unix:b.sock", "-T", "0"], False),
        (["-U", "unix:a.sock"], False),
    ],
)
def test_a_publisher_whose_consumer_has_its_own_address_is_its_own(words: list[str], own: bool) -> None:
    assert is_own_consumer(read_arguments(words)) is own


def cannot_run(directory: Path, *flags: str) -> str:
    """The one line that a server which cannot start ends with."""
    done = run(directory, *flags)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("ringoexp: error: ") and done.stderr.count("\n") == 1
    return done.stderr


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"cannot listen on localhost:{port}: " in cannot_run(tmp_path, "-p", str(port))


@pytest.mark.parametrize("flag", ["-H", "-U"])
@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 70, "a..b"])
def test_a_host_that_does_not_resolve_is_one_line(tmp_path: Path, flag: str, host: str) -> None:
    assert f"{flag} {host}: " in cannot_run(tmp_path, "-p", "0", flag, host)


def test_a_port_in_use_on_one_address_of_several_is_one_line_that_names_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = cannot_run(tmp_path, "-p", str(port), "-H", "localhost")
        assert f"cannot listen on localhost:{port}: Address already in use at 127.0.0.1:{port} (" in said


def test_an_address_of_another_machine_is_one_line(tmp_path: Path) -> None:
    assert "cannot listen on 192.0.2.1:" in cannot_run(tmp_path, "-p", "0", "-H", "192.0.2.1")


@pytest.mark.parametrize("consumer", [True, False])
def test_a_database_that_cannot_be_opened_is_one_line(tmp_path: Path, consumer: bool) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "text").write_text("some text, and not a little of it\n" * 50)
    with closing(sqlite3.connect(tmp_path / "other")) as other:
        other.execute("CREATE TABLE theirs(x)")
    flags = ["-p", "0", *(["-I", "false"] if consumer else ["-T", "0"])]
    for name, said in [
        ("directory", "is a directory"),
        ("text", "not a SQLite file"),
        ("other", "another application"),
        ("missing/file", "No such file or directory"),
    ]:
        line = cannot_run(tmp_path, *flags, "-D", name)
        assert name in line and said in line
    with server(tmp_path, *flags, "-D", "used"):
        assert "in use by another ringoexp" in cannot_run(tmp_path, *flags, "-D", "used")


def test_a_start_that_fails_makes_no_file(tmp_path: Path) -> None:
    """Its port is taken, or what -D names cannot be a database."""
    (tmp_path / "text").write_text("precious\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cannot_run(tmp_path, "-p", port, "-T", port)
        cannot_run(tmp_path, "-p", port, "-I", "false")
    cannot_run(tmp_path, "-p", "0", "-T", "0", "-D", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_a_database_for_a_publisher_that_has_none_is_refused(tmp_path: Path) -> None:
    said = cannot_run(tmp_path, "-p", "0", "-D", "mine.db")
    assert "-D mine.db: this publisher has no database, it forwards to localhost:6660" in said
    assert list(tmp_path.iterdir()) == []


def test_without_its_package_it_says_what_to_install(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-E", str(ROOT / "ringoexp.py"), "-p", "0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "pip install simple-websocket" in done.stderr


def test_when_no_thread_is_to_be_had_it_says_so_and_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(*unused: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(assembly, "Forwarder", no_thread)
    port, database = free_port(), str(tmp_path / "d")
    flags = ["-p", str(port), "-T", str(port), "-D", database]
    with pytest.raises(StartupError, match="cannot start a thread: can't start new thread"):
        App(read_arguments(flags), flags)
    assert not accepts(port)
    Store(database).close()


@pytest.mark.parametrize("out", ["a pipe nobody reads", "a full disk"])
def test_output_that_nobody_takes_does_not_disturb(tmp_path: Path, out: str) -> None:
    if out == "a full disk":
        to = os.open("/dev/full", os.O_WRONLY)
    else:
        reading, to = os.pipe()
        os.close(reading)
    port = free_port()
    with open(tmp_path / "errors", "wb") as errors:
        flags = ["-p", str(port), "-T", str(port)]
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "ringoexp.py"), *flags], cwd=tmp_path, stdout=to, stderr=errors
        )
    os.close(to)
    try:
        eventually(lambda: accepts(port))
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE) == 0
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "errors").read_text() == ""


def test_a_name_that_stdout_cannot_show_is_escaped(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    command = [sys.executable, str(ROOT / "ringoexp.py"), "-p", "0", "-T", "0", "-D", "z\xe9ro.db"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            assert process.stdout.readline().endswith("storing in z\\xe9ro.db\n")
        finally:
            process.terminate()
    assert process.returncode == 0


def test_ctrl_c_while_the_installed_program_still_imports_has_its_default_effect(tmp_path: Path) -> None:
    code = "import signal, sys; sys.argv = ['/usr/bin/ringoexp']; import ringoexp; print(signal.getsignal(2).name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE)
    assert done.stdout == "SIG_DFL\n", done.stderr


def test_debug_shows_the_cause(tmp_path: Path) -> None:
    done = run(tmp_path, "-p", "0", "-d", "-U", "no-such-host.invalid")
    assert "gaierror" in done.stderr and done.stderr.splitlines()[-1].startswith("ringoexp: error: ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("role", [["-T", "0"], ["-I", "false"]])
def test_a_signal_ends_an_idle_server_at_once(tmp_path: Path, number: int, role: list[str]) -> None:
    with server(tmp_path, "-p", "0", *role) as running:
        assert running.stop(number) == 0
        assert running.tally == "ringoexp: stopped, 0 stored, 0 unstored"


def draining(directory: Path, seconds: float) -> ServerProcess:
    """A publisher whose consumer is away, which gives up draining after `seconds`."""
    flags = ["-p", "0", "-T", str(free_port()), "-r", "10"]
    return ServerProcess(directory, *flags, patch=f"app.DRAIN_SECONDS = {seconds}")


def test_a_stop_that_leaves_batches_unstored_does_not_say_that_they_will_not_be(tmp_path: Path) -> None:
    """1001 says to a publisher's link that what was not acked may go elsewhere; the last of these may be stored yet."""
    running = draining(tmp_path, 0.5)
    try:
        with RawClient(running.port, {"Sec-WebSocket-Protocol": SUBPROTOCOL}) as client:
            client.send(frame(2, encode_batch([Run(bytes(16), 0, 1)], array("q", [1]))))
            eventually(lambda: running.stats()["ringDepth"] == 1)
            assert running.stop() == 3
            assert client.closed() == (1011, "not stored before the server stopped", 0)
    finally:
        running.kill()


@pytest.mark.parametrize("records", [5, 50])
def test_what_cannot_be_stored_is_counted_and_ends_with_3(tmp_path: Path, records: int) -> None:
    """With 50 records the session is blocked in the full ring; with 5 it waits for their ack."""
    running = draining(tmp_path, 0.5)
    try:
        with RawClient(running.port) as client:
            client.send(frame(2, bytes(8)) * records)
            held = min(records, 10)
            eventually(lambda: running.stats()["ringDepth"] == held)
            assert running.stop() == 3
            assert f"event=draining unstored={held} " in running.errors.read_text()
            assert running.tally == f"ringoexp: stopped, 0 stored, {held} unstored"
            assert client.closed() == (1001, "the server is stopping", 0)
    finally:
        running.kill()
    assert "Traceback" not in running.errors.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_draining_server_at_once(tmp_path: Path, number: int) -> None:
    running = draining(tmp_path, 600)
    try:
        with RawClient(running.port) as client:
            client.send(frame(2, bytes(4)))
            eventually(lambda: running.stats()["ringDepth"] == 1)
            running.send_signal(number)
            eventually(lambda: refusal(running.port), "it takes no more")
            ended = Blocked(running.process.wait)
            assert ended.still()
            eventually(lambda: running.send_signal(number) or running.process.poll() is not None)
            assert ended.result() == -number
    finally:
        running.kill()
    assert "Traceback" not in running.errors.read_text()


def test_a_second_signal_ends_a_server_that_hangs_in_a_call_too(tmp_path: Path) -> None:
    """A statement of SQLite's that does not end stands for a disk that hangs."""
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    patch = f"store.Store.close = lambda self: self._db.execute('{endless}').fetchone()"
    running = ServerProcess(tmp_path, "-p", "0", "-T", "0", patch=patch)
    try:
        running.send_signal(signal.SIGTERM)
        end = Blocked(running.process.wait)
        assert end.still(ringoexp.SAME_SIGNAL_SECONDS)
        running.send_signal(signal.SIGTERM)
        for _ in range(10):  # it may have got to the first one late
            if end.still(ringoexp.SAME_SIGNAL_SECONDS + ringoexp.STUCK_SECONDS):
                running.send_signal(signal.SIGTERM)
        assert end.result() == 128 + signal.SIGTERM
    finally:
        running.kill()


@pytest.mark.parametrize("numbers", [(signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT), (2, 2, 2)])
def test_signals_that_come_together_are_one(tmp_path: Path, numbers: tuple[int, ...]) -> None:
    """A shell and a process manager may both send one. SIGSTOP makes sure that they come together."""
    with server(tmp_path, "-p", "0", "-T", "0") as running:
        with RawClient(running.port) as client:
            client.send(frame(2, bytes(4)))
            client.acked(1)
            running.send_signal(signal.SIGSTOP)
            for number in numbers:
                running.send_signal(number)
            running.send_signal(signal.SIGCONT)
            assert running.wait() == 0
        assert running.tally == "ringoexp: stopped, 1 stored, 0 unstored"


def refusal(port: int) -> str:
    """Why a POST is refused for now; empty if it is not, or if the server has just begun to stop and cuts it off."""
    try:
        status, headers, body = request(port, "POST", "/v1.0/ingest", b"no integer")
    except ConnectionError:
        return ""
    assert status == 400 or (status == 503 and headers["Retry-After"])
    return str(json.loads(body)["error"]) if status == 503 else ""


def test_a_draining_server_takes_no_more_and_still_says_how_it_is(tmp_path: Path) -> None:
    running = draining(tmp_path, 600)
    try:
        with RawClient(running.port) as client:
            client.send(frame(2, bytes(4)))
            eventually(lambda: running.stats()["ringDepth"] == 1)
            running.send_signal(signal.SIGTERM)
            assert eventually(lambda: refusal(running.port)) == "the server is stopping"
            assert running.get("/v1.0/alive")[0] == 200
            assert running.stats()["ringDepth"] == 1
            assert running.get("/nothing")[0] == 503
    finally:
        running.kill()
    assert "Traceback" not in running.errors.read_text()


def test_who_looks_on_keeps_no_server_from_ending(tmp_path: Path) -> None:
    """Its connection, quiet between two requests, and one that has asked for nothing yet."""
    running = draining(tmp_path, 3)
    try:
        with RawClient(running.port) as client, ExitStack() as lookers:
            client.send(frame(2, bytes(4)))
            eventually(lambda: running.stats()["ringDepth"] == 1)
            running.send_signal(signal.SIGTERM)
            eventually(lambda: refusal(running.port))
            for _ in range(3):
                lookers.enter_context(socket.create_connection(("localhost", running.port)))
            assert running.wait() == 3
    finally:
        running.kill()
    assert "Traceback" not in running.errors.read_text()


def test_who_goes_on_asking_keeps_no_server_from_ending(tmp_path: Path) -> None:
    """A client that has sent a thousand requests on one connection, and does not wait for answers."""
    with (
        server(tmp_path, "-p", "0", "-T", "0") as running,
        socket.create_connection(("localhost", running.port), DEADLINE) as asker,
    ):
        asker.sendall(b"GET /v1.0/alive HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert asker.recv(100)
        stop = threading.Event()

        def ask() -> None:
            try:
                while not stop.is_set():
                    asker.sendall(b"GET /v1.0/stats HTTP/1.1\r\nHost: localhost\r\n\r\n" * 10)
            except OSError:
                pass  # ended by the server

        def read() -> None:
            try:
                while asker.recv(65536):
                    pass
            except OSError:
                pass

        calls = Blocked(ask), Blocked(read)
        try:
            assert running.stop(deadline=20) == 0
        finally:
            stop.set()
        for each in calls:
            each.result()


def test_a_draining_server_without_descriptors_waits_for_some(tmp_path: Path) -> None:
    """It must not try to accept all the time."""
    running = draining(tmp_path, 600)
    try:
        with RawClient(running.port) as client, ExitStack() as waiting:
            client.send(frame(2, bytes(4)))
            eventually(lambda: running.stats()["ringDepth"] == 1)
            used = len(os.listdir(f"/proc/{running.process.pid}/fd"))
            resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE, (used, used))
            for _ in range(3):
                waiting.enter_context(socket.create_connection(("localhost", running.port)))
            running.send_signal(signal.SIGTERM)
            tried = 0

            def told() -> int:
                return sum(map(int, re.findall(r"event=cannot_accept .*count=(\d+)", running.errors.read_text())))

            tried = eventually(told)
            began = time.monotonic()
            eventually(lambda: told() > tried + 3)
            assert told() - tried < 50 * (time.monotonic() - began), "five times a second"
    finally:
        running.kill()


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("localhost", port)).close()
    except OSError:
        return False
    return True


def test_the_limit_of_open_files_is_raised_to_what_all_threads_may_need(tmp_path: Path) -> None:
    """As far as that may be: the hard limit stays, and a soft one that is higher."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for soft, most, expected in (("256", "100000", 700 + 256), ("256", "500", 500), ("20000", "30000", 20000)):
        if hard != resource.RLIM_INFINITY and hard < int(most):
            continue
        limited = ["bash", "-c", f'ulimit -Sn {soft} && ulimit -Hn {most} && exec "$@"', "x"]
        with server(tmp_path, "-p", "0", "-T", "0", "--threads", "700", under=limited) as running:
            assert resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE)[0] == expected


def test_procs_limits_the_cores(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", "-X", "1") as running:
        status = Path(f"/proc/{running.process.pid}/status").read_text()
        assert re.search(r"^Cpus_allowed_list:\s*\d+$", status, re.MULTILINE)


def test_the_readmes_flags_are_the_tables() -> None:
    section = README[README.index("\n## Flags\n") : README.index("\n## Who may come in\n")]
    found = re.findall(r"^\| (?:`-(\w)` )?\| `--(\w+)` \| (.*?) \|", section, re.MULTILINE)
    shown = {"name": "empty", "debug": "off"} | {option.long: "off" for option in OPTIONS if option.default is None}
    expected = [
        (option.short, option.long, shown.get(option.long, f"`{str(option.default).lower()}`")) for option in OPTIONS
    ]
    flags = {option.long for option in OPTIONS}
    assert [row for row in found if row[1] in flags] == expected


@pytest.mark.parametrize("role", [["-T", "0"], ["-I", "false"]])
def test_the_readme_explains_every_key_of_the_stats(tmp_path: Path, role: list[str]) -> None:
    with server(tmp_path, "-p", "0", *role) as running:
        report = json.loads(running.get("/v1.0/stats")[2])
    assert report["options"] == ["-p", "0", *role]
    for section in ("info", "stats", "memStats"):
        missing = [key for key in report[section] if f"`{key}`" not in README]
        assert not missing, f"{section}: {missing}"


def test_the_readmes_byte_example_and_python_client_work(tmp_path: Path) -> None:
    (client,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(client.strip().splitlines()) <= 10
    with server(tmp_path, "-p", "0", "-T", "0") as running:
        script = client.replace("6660", str(running.port))
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=DEADLINE)
        assert done.stdout == "1000 stored\n", done.stderr
