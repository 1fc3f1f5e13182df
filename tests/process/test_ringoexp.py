"""The command line: flags, startup errors, signals, and the examples of the documents."""

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
from support.documents import read
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
import ringolib
from ringoexp import main
from ringolib import app
from ringolib.app import App, StartupError, is_own_consumer
from ringolib.options import OPTIONS, Option, Settings, read_arguments
from ringolib.timing import ThreadError
from ringolib.wire import SUBPROTOCOL, Run, encode_batch
from store import Store


def run(directory: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run `python ringoexp.py` with these flags to its end."""
    return subprocess.run(
        [sys.executable, str(ROOT / "ringoexp.py"), *flags],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )


def usage_error(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """Return the one-line error for these flags."""
    with pytest.raises(SystemExit) as exit_info:
        read_arguments(flags)
    output = capsys.readouterr()
    assert (exit_info.value.code, output.out) == (2, "")
    assert output.err.startswith("ringoexp: error: ") and output.err.count("\n") == 1
    return output.err


@pytest.mark.parametrize("word", ["help", "--help", "-h"])
def test_help_shows_every_option_with_its_default(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([word])
    output = capsys.readouterr()
    assert (exit_info.value.code, output.err) == (0, "")
    text = " ".join(output.out.split())
    for option in OPTIONS:
        assert f"-{option.short}" in text and f"--{option.long}" in text and option.help in text
        if option.default not in ("", None, ()) and option.long != "debug":
            assert f"{option.help} (default {str(option.default).lower()})" in text
    for group in ("basic:", "publisher:", "consumer:", "system:", "common:", "examples:"):
        assert f"\n{group}\n" in output.out
    examples = re.findall(r"^    ringoexp (.*)$", output.out, re.MULTILINE)
    for example in examples:
        read_arguments(example.split())
    assert len(examples) == 3


@pytest.mark.slow
@pytest.mark.parametrize("word", ["version", "--version", "-V"])
def test_version(word: str, tmp_path: Path) -> None:
    done = run(tmp_path, word)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"ringoexp {ringolib.__version__}\n", "")


def test_settings_have_the_fields_of_the_options_table() -> None:
    assert [*(option.long for option in OPTIONS), "given"] == [field.name for field in fields(Settings)]
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
    "allow_host": [("numbers.example", ("numbers.example",))],
    "allow_origin": [
        ("https://a.example:8443", ("https://a.example:8443",)),
        ("null", ("null",)),
        ("file://", ("file://",)),
        ("http://[::1]:80", ("http://[::1]:80",)),
    ],
    "unfinished": [("16", 16), ("1048576", 1048576)],
}


REQUIRED = {
    "tls_key": ["--tls_cert", "c"],
    "client_ca": ["--tls_cert", "c"],
    "consumer_ca": ["--consumer_tls"],
    "clickhouse_cluster": ["-D", "clickhouse://h"],
    "spool_max": ["-S", "s"],
    "profiler_host": ["-L", "6061"],
}


@pytest.mark.parametrize("option", [option for option in OPTIONS if option.long != "debug"], ids=lambda o: o.long)
def test_flag_is_read_in_every_spelling(option: Option) -> None:
    others = REQUIRED.get(option.long, [])
    for text, value in GOOD.get(option.long) or [("a b.pem", "a b.pem")]:
        for flag in {f"--{option.long}", f"--{option.long.replace('_', '-')}"}:
            assert getattr(read_arguments([flag, text, *others]), option.long) == value
            assert getattr(read_arguments([f"{flag}={text}", *others]), option.long) == value
        if option.short:
            assert getattr(read_arguments([f"-{option.short}", text]), option.long) == value


def test_allowed_hosts_and_origins_may_be_given_several_times() -> None:
    settings = read_arguments(["--allow_host", "a", "--allow-host=b", "--allow_origin", "http://a"])
    assert settings.allow_host == ("a", "b") and settings.allow_origin == ("http://a",)


def test_debug_takes_no_value() -> None:
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
        (["-I", "yes"], True),
        (["-I", "ON"], True),
        (["-I=no"], False),
        (["-I", "off"], False),
    ],
)
def test_is_publisher_accepts_every_form(words: list[str], value: bool) -> None:
    assert read_arguments(words).is_publisher is value


NUMBERS = ["x", "", "1.5", "1e3", "0x10", "--", "٣", "9" * 30]
BAD: dict[str, list[str]] = {
    "name": ["a\nb", "caf\xe9", "\0"],
    "hostname": ["", "  "],
    "port": ["-1", "65536", *NUMBERS],
    "connections": NUMBERS,
    "is_publisher": ["maybe", "2", "", "y"],
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
    "consumer_tls": ["2", ""],
    "per_address": NUMBERS,
    "threads": ["0", "511", "1000001", *NUMBERS],
    "procs": NUMBERS,
    "profiler_port": ["65536", *NUMBERS],
    "profiler_host": ["", " "],
    "allow_host": ["", "a.example:80", "http://a.example", "a b", "--"],
    "allow_origin": [
        *(
            "",
            "a.example",
            "http://a.example/",
            "--",
            "http://",
            "http://a:99999",
            "http://me@a",
            "file://?",
            "http://a#",
        ),
        *("*", "https://*.example", "http://[x"),
    ],
    "unfinished": ["15", "1048577", *NUMBERS],
}


@pytest.mark.parametrize(
    ("option", "text"),
    [
        pytest.param(option, text, id=f"{option.long} {text!r}")
        for option in OPTIONS
        for text in BAD.get(option.long, ())
    ],
)
def test_bad_value_error_names_flag_value_and_accepted_form(
    option: Option, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = usage_error(capsys, f"--{option.long}={text}")
    assert f"argument {option.flags}" in output
    assert repr(text) in output or f" {text} " in output
    assert "not accepted: " in output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--no_such_flag"], "'--no_such_flag' is not a flag"),
        (["stray"], "'stray' is not a flag or a command: the commands are send, read, help, version ("),
        (["--allow_origin", "https://*.example"], "wildcards are not supported: give one flag for each origin"),
        (["--ring", "5"], "'--ring' is not a flag: did you mean --ring_size?"),
        (["--prot=5"], "'--prot' is not a flag: did you mean --port?"),
        (["--ring-sise", "5"], "'--ring-sise' is not a flag: did you mean --ring_size?"),
        (["--tls"], "'--tls' is not a flag: did you mean --tls_cert or --tls_key?"),
        (["--verison"], "'--verison' is not a flag: did you mean --version?"),
        (["-port", "7000"], "'-port' is not a flag: did you mean --port?"),
        (["-is_publisher=false"], "'-is_publisher=false' is not a flag: did you mean --is_publisher=false?"),
        (["sned"], "'sned' is not a flag or a command: did you mean send?"),
        (["hlep"], "'hlep' is not a flag or a command: did you mean help?"),
        (["-p", "7000", "send"], "the command 'send' must be the first argument"),
        (["-p", "7000", "sned"], "'sned' is not a flag ("),
        (["-p"], "-p/--port: expected one argument"),
        (["-L", "65536"], "1 to 65535, 0 or less for off"),
        (["--unfinished", "15"], "a whole number of MiB, 16 to 1048576"),
    ],
)
def test_bad_usage_error_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in usage_error(capsys, *words)


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
def test_own_consumer_is_detected_by_address(words: list[str], own: bool) -> None:
    assert is_own_consumer(read_arguments(words)) is own


def cannot_run(directory: Path, *flags: str) -> str:
    """Return the one-line error of a server that cannot start."""
    done = run(directory, *flags)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("ringoexp: error: ") and done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.slow
def test_port_in_use_error_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"cannot listen on localhost:{port}: " in cannot_run(tmp_path, "-p", str(port))


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["-H", "-U"])
@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 70, "a..b"])
def test_unresolved_host_error_is_one_line(tmp_path: Path, flag: str, host: str) -> None:
    assert f"{flag} {host}: " in cannot_run(tmp_path, "-p", "0", flag, host)


def test_port_in_use_error_names_the_address(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        output = cannot_run(tmp_path, "-p", str(port), "-H", "localhost")
        assert f"cannot listen on localhost:{port}: Address already in use at 127.0.0.1:{port} (" in output


def test_foreign_address_error_is_one_line(tmp_path: Path) -> None:
    assert "cannot listen on 192.0.2.1:" in cannot_run(tmp_path, "-p", "0", "-H", "192.0.2.1")


@pytest.mark.slow
@pytest.mark.parametrize("consumer", [True, False])
def test_unusable_database_error_is_one_line(tmp_path: Path, consumer: bool) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "text").write_text("text, not SQLite\n" * 100)
    with closing(sqlite3.connect(tmp_path / "other")) as other:
        other.execute("CREATE TABLE other(x)")
    flags = ["-p", "0", *(["-I", "false"] if consumer else ["-T", "0"])]
    for name, message in [
        ("directory", "is a directory"),
        ("text", "not a SQLite file"),
        ("other", "another application"),
        ("missing/file", "cannot open missing/file: No such file or directory (check that its directory exists)"),
    ]:
        line = cannot_run(tmp_path, *flags, "-D", name)
        assert name in line and message in line
    with server(tmp_path, *flags, "-D", "used"):
        assert "in use by another ringoexp" in cannot_run(tmp_path, *flags, "-D", "used")


@pytest.mark.slow
def test_failed_start_creates_no_file(tmp_path: Path) -> None:
    """The port is in use, or the file of -D is not a database."""
    (tmp_path / "text").write_text("precious\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cannot_run(tmp_path, "-p", port, "-T", port)
        cannot_run(tmp_path, "-p", port, "-I", "false")
    cannot_run(tmp_path, "-p", "0", "-T", "0", "-D", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_forwarding_publisher_refuses_a_database(tmp_path: Path) -> None:
    output = cannot_run(tmp_path, "-p", "0", "-D", "mine.db")
    assert "'mine.db' is not accepted: this publisher has no database, it forwards to localhost:6660" in output
    assert "(with -p 0 -T 0 it stores in a database of its own)" in output
    assert list(tmp_path.iterdir()) == []


def test_missing_package_error_names_the_package(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-E", str(ROOT / "ringoexp.py"), "-p", "0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "pip install simple-websocket" in done.stderr


def test_thread_error_at_startup_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(*unused: object) -> None:
        raise ThreadError("cannot start a thread: can't start new thread (ulimit -u limits threads)")

    monkeypatch.setattr(app, "Forwarder", no_thread)
    port, database = free_port(), str(tmp_path / "d")
    flags = ["-p", str(port), "-T", str(port), "-D", database]
    with pytest.raises(StartupError, match="cannot start a thread: can't start new thread"):
        App(read_arguments(flags), flags)
    assert not accepts(port)
    Store(database).close()


@pytest.mark.slow
@pytest.mark.parametrize("out", ["a closed pipe", "a full disk"])
def test_server_runs_if_its_streams_cannot_be_written(tmp_path: Path, out: str) -> None:
    if out == "a full disk":
        broken = os.open("/dev/full", os.O_WRONLY)
    else:
        reading, broken = os.pipe()
        os.close(reading)
    port = free_port()
    command = [sys.executable, str(ROOT / "ringoexp.py"), "-p", str(port), "-T", str(port)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=broken, stderr=broken)
    os.close(broken)
    try:
        eventually(lambda: accepts(port))
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_ctrl_c_during_imports_has_its_default_effect(tmp_path: Path) -> None:
    code = "import signal, sys; sys.argv = ['/usr/bin/ringoexp']; import ringoexp; print(signal.getsignal(2).name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE)
    assert done.stdout == "SIG_DFL\n", done.stderr


@pytest.mark.slow
def test_debug_log_shows_the_cause_of_a_startup_error(tmp_path: Path) -> None:
    done = run(tmp_path, "-p", "0", "-d", "-U", "no-such-host.invalid")
    assert "gaierror" in done.stderr and done.stderr.splitlines()[-1].startswith("ringoexp: error: ")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("role", [["-T", "0"], ["-I", "false"]])
def test_signal_stops_an_idle_server_at_once(tmp_path: Path, number: int, role: list[str]) -> None:
    with server(tmp_path, "-p", "0", *role) as running:
        assert running.stop(number) == 0
        assert running.tally == "ringoexp: stopped, 0 stored, 0 unstored"


def draining(directory: Path, seconds: float) -> ServerProcess:
    """Return a publisher that has no consumer and drains for `seconds`."""
    flags = ["-p", "0", "-T", str(free_port()), "-r", "10"]
    return ServerProcess(directory, *flags, patch=f"app.DRAIN_SECONDS = {seconds}")


@pytest.mark.slow
def test_stop_with_unstored_batches_closes_with_1011(tmp_path: Path) -> None:
    """With 1001, a publisher would send unacked records to another consumer, but the last batch may still be stored."""
    running = draining(tmp_path, 0.5)
    try:
        with RawClient(running.port, {"Sec-WebSocket-Protocol": SUBPROTOCOL}) as client:
            client.send(frame(2, encode_batch([Run(bytes(16), 0, 1)], array("q", [1]))))
            eventually(lambda: running.stats()["ringDepth"] == 1)
            assert running.stop() == 3
            assert client.closed() == (1011, "not stored before the server stopped", 0)
    finally:
        running.kill()


@pytest.mark.slow
@pytest.mark.parametrize("records", [5, 50])
def test_unstored_records_are_counted_and_exit_with_3(tmp_path: Path, records: int) -> None:
    """With 50 records the session is blocked by the full ring; with 5 it waits for their ack."""
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


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_ends_a_draining_server_at_once(tmp_path: Path, number: int) -> None:
    running = draining(tmp_path, 600)
    try:
        with RawClient(running.port) as client:
            client.send(frame(2, bytes(4)))
            eventually(lambda: running.stats()["ringDepth"] == 1)
            running.send_signal(number)
            eventually(lambda: refusal(running.port), "it accepts no records")
            ended = Blocked(running.process.wait)
            assert ended.still()
            eventually(lambda: running.send_signal(number) or running.process.poll() is not None)
            assert ended.result() == -number
    finally:
        running.kill()
    assert "Traceback" not in running.errors.read_text()


@pytest.mark.slow
def test_second_signal_ends_a_server_that_hangs(tmp_path: Path) -> None:
    """An endless SQLite statement simulates a disk that hangs."""
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    patch = f"store.Store.close = lambda self: self._db.execute('{endless}').fetchone()"
    running = ServerProcess(tmp_path, "-p", "0", "-T", "0", patch=patch)
    try:
        running.send_signal(signal.SIGTERM)
        ended = Blocked(running.process.wait)
        assert ended.still(ringoexp.SAME_SIGNAL_SECONDS)
        running.send_signal(signal.SIGTERM)
        for _ in range(10):  # the first one may have been handled late
            if ended.still(ringoexp.SAME_SIGNAL_SECONDS + ringoexp.STUCK_SECONDS):
                running.send_signal(signal.SIGTERM)
        assert ended.result() == 128 + signal.SIGTERM
    finally:
        running.kill()


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [(signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT), (2, 2, 2)])
def test_simultaneous_signals_count_as_one(tmp_path: Path, numbers: tuple[int, ...]) -> None:
    """A shell and a process manager may both send one. SIGSTOP makes them arrive together."""
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
    """Return why a POST is refused for now; empty if it is accepted, or the stopping server cuts the connection."""
    try:
        status, headers, body = request(port, "POST", "/v1.0/ingest", b"no integer")
    except ConnectionError:
        return ""
    assert status == 400 or (status == 503 and headers["Retry-After"])
    return str(json.loads(body)["error"]) if status == 503 else ""


def test_draining_server_refuses_records_and_answers_stats(tmp_path: Path) -> None:
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


@pytest.mark.slow
def test_idle_http_connections_do_not_delay_the_stop(tmp_path: Path) -> None:
    """One connection idles between two requests, others have not sent a request yet."""
    running = draining(tmp_path, 3)
    try:
        with RawClient(running.port) as client, ExitStack() as stack:
            client.send(frame(2, bytes(4)))
            eventually(lambda: running.stats()["ringDepth"] == 1)
            running.send_signal(signal.SIGTERM)
            eventually(lambda: refusal(running.port))
            for _ in range(3):
                stack.enter_context(socket.create_connection(("localhost", running.port)))
            assert running.wait() == 3
    finally:
        running.kill()
    assert "Traceback" not in running.errors.read_text()


@pytest.mark.slow
def test_pipelined_requests_do_not_delay_the_stop(tmp_path: Path) -> None:
    """A client sends requests on one connection without waiting for the responses."""
    with (
        server(tmp_path, "-p", "0", "-T", "0") as running,
        socket.create_connection(("localhost", running.port), DEADLINE) as client,
    ):
        client.sendall(b"GET /v1.0/alive HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.recv(100)
        stop = threading.Event()

        def write() -> None:
            try:
                while not stop.is_set():
                    client.sendall(b"GET /v1.0/stats HTTP/1.1\r\nHost: localhost\r\n\r\n" * 10)
            except OSError:
                pass  # the server closed the connection

        def read() -> None:
            try:
                while client.recv(65536):
                    pass
            except OSError:
                pass

        calls = Blocked(write), Blocked(read)
        try:
            assert running.stop(deadline=20) == 0
        finally:
            stop.set()
        for call in calls:
            call.result()


@pytest.mark.slow
def test_draining_server_without_descriptors_does_not_spin(tmp_path: Path) -> None:
    """It must not try to accept in a busy loop."""
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

            def failures() -> int:
                return sum(map(int, re.findall(r"event=cannot_accept .*count=(\d+)", running.errors.read_text())))

            before = eventually(failures)
            began = time.monotonic()
            eventually(lambda: failures() > before + 3)
            assert failures() - before < 50 * (time.monotonic() - began), "five times a second"
    finally:
        running.kill()


def accepts(port: int) -> bool:
    """True if a server listens on this port."""
    try:
        socket.create_connection(("localhost", port)).close()
    except OSError:
        return False
    return True


@pytest.mark.slow
def test_descriptor_limit_is_raised_for_all_threads(tmp_path: Path) -> None:
    """The hard limit is not raised, and a higher soft limit is kept."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for soft, hard_limit, expected in (
        ("256", "100000", ringoexp.MANY_CONNECTIONS + 700 + 256),
        ("256", "500", 500),
        ("20000", "30000", 20000),
    ):
        if hard != resource.RLIM_INFINITY and hard < int(hard_limit):
            continue
        limited = ["bash", "-c", f'ulimit -Sn {soft} && ulimit -Hn {hard_limit} && exec "$@"', "x"]
        with server(tmp_path, "-p", "0", "-T", "0", "--threads", "700", under=limited) as running:
            assert resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE)[0] == expected


@pytest.mark.slow
def test_more_procs_than_cores_uses_all_and_says_so(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", "-X", "100000") as running:
        assert f"event=few_cores procs=100000 cores={len(os.sched_getaffinity(0))} " in running.errors.read_text()
        assert os.sched_getaffinity(running.process.pid) == os.sched_getaffinity(0)


@pytest.mark.slow
def test_procs_limits_the_cores(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", "-X", "1") as running:
        status = Path(f"/proc/{running.process.pid}/status").read_text()
        assert re.search(r"^Cpus_allowed_list:\s*\d+$", status, re.MULTILINE)


@pytest.mark.slow
def test_python_client_of_the_sending_page_works(tmp_path: Path) -> None:
    pytest.importorskip("websockets")
    (client,) = re.findall(r"^```python\n(import struct.*?)^```", read("docs/sending.md"), re.MULTILINE | re.DOTALL)
    assert len(client.strip().splitlines()) <= 10
    with server(tmp_path, "-p", "0", "-T", "0") as running:
        script = client.replace("6660", str(running.port))
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=DEADLINE)
        assert done.stdout == "1000 stored\n", done.stderr
