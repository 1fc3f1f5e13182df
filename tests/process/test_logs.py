"""The log: the format of a line, rate limits, a stalled reader, events of a server, and contents that never appear."""

import ast
import json
import logging
import os
import re
import resource
import shlex
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

import pytest
from support.harness import (
    ROOT,
    RawClient,
    ServerProcess,
    eventually,
    frame,
    free_port,
    program_files,
    request,
    rows,
    server,
)

from ringolib.status import log_format, logs
from ringolib.wire import encode_plain

Attach = Callable[..., IO[bytes]]
LINE = re.compile(r"time=(\S+) level=(debug|info|warning|error) event=(\S+) (.*)thread=(\S+) logger=(\S+)")


def logged(stream: IO[bytes]) -> list[str]:
    stream.seek(0)
    return stream.read().decode().splitlines()


def lines(running: ServerProcess) -> list[dict[str, str]]:
    """Return the fields of each line of a server's log. Fails if a line does not have the format."""
    parsed = []
    for line in running.errors.read_text().splitlines():
        assert LINE.fullmatch(line), line
        # shlex is good enough to remove the quotes of a JSON string
        parsed.append(dict(word.split("=", 1) for word in shlex.split(line)))
    return parsed


def events(running: ServerProcess, event: str) -> list[dict[str, str]]:
    """Return the fields of each line with this event."""
    return [line for line in lines(running) if line["event"] == event]


@pytest.fixture
def log() -> logging.Logger:
    return logging.Logger("ringoexp.test", logging.DEBUG)


@pytest.fixture
def attach(log: logging.Logger) -> Iterator[Attach]:
    """Attach a handler to the logger, and return the file that it writes to."""
    with ExitStack() as files:

        def attach(as_json: bool = False, rate_limited: tuple[str, ...] = ()) -> IO[bytes]:
            stream = files.enter_context(tempfile.TemporaryFile())
            log.addHandler(
                logs.LineHandler(
                    log_format.format_json if as_json else log_format.format_logfmt, rate_limited, stream.fileno()
                )
            )
            return stream

        yield attach


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("word", "word"),
        ("127.0.0.1:80", "127.0.0.1:80"),
        ("two words", '"two words"'),
        ("", '""'),
        ('say "no"', r'"say \"no\""'),
        ("a=b", '"a=b"'),
        ("line\nlevel=error event=forged", r'"line\nlevel=error event=forged"'),
        ("\x1b[31mred\x7f", r'"\u001b[31mred\u007f"'),
        ("caf\xe9", r'"caf\u00e9"'),
        ("back\\slash", r'"back\\slash"'),
        (5, "5"),
        (0.25, "0.25"),
        (None, "null"),
        (True, "true"),
        (Path("/x"), "/x"),
    ],
)
def test_value_is_a_word_or_a_quoted_string_on_one_line(
    log: logging.Logger, attach: Attach, value: Any, text: str
) -> None:
    stream = attach()
    log.info("happened", {"key": value})
    (line,) = logged(stream)
    assert f" event=happened key={text} thread=MainThread logger=ringoexp.test" in line


def test_time_is_utc_to_the_millisecond(log: logging.Logger, attach: Attach) -> None:
    stream = attach()
    log.info("happened")
    (line,) = logged(stream)
    match = LINE.fullmatch(line)
    assert match
    time = datetime.strptime(match[1], "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=timezone.utc)
    assert abs((datetime.now(timezone.utc) - time).total_seconds()) < 60


def test_json_has_the_same_keys_and_keeps_types(log: logging.Logger, attach: Attach) -> None:
    stream = attach(as_json=True)
    log.warning("happened", {"count": 3, "reason": 'a\n"b"', "none": None})
    (line,) = logged(stream)
    fields = json.loads(line)
    assert list(fields) == ["time", "level", "event", "count", "reason", "none", "thread", "logger"]
    assert (fields["level"], fields["count"], fields["reason"], fields["none"]) == ("warning", 3, 'a\n"b"', None)


@pytest.mark.parametrize("as_json", [False, True])
def test_cause_has_its_calls_and_its_own_causes_on_one_line(log: logging.Logger, attach: Attach, as_json: bool) -> None:
    stream = attach(as_json)

    def fail() -> None:
        raise KeyError("first\nline")

    try:
        try:
            fail()
        except KeyError as error:
            raise ValueError("second") from error
    except ValueError:
        log.error("failed", {"at": 1}, exc_info=True)
    (line,) = logged(stream)
    for part in ("ValueError: second (test_logs.py:", " <- KeyError: ", " fail, test_logs.py:"):
        assert part in line


def test_record_of_a_library_is_a_message(log: logging.Logger, attach: Attach) -> None:
    log.name = "other"
    stream = attach()
    log.warning("%d of %s", 3, "those")
    (line,) = logged(stream)
    assert ' event=message message="3 of those" thread=' in line


def test_pending_events_are_counted_in_the_next_line(
    log: logging.Logger, attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(logs, "monotonic", lambda: now[0])
    stream = attach(rate_limited=("refused",))

    def written() -> list[str]:
        """Return the lines since the last call, without time and thread."""
        lines = [re.sub("^.* event=| thread.*$", "", line) for line in logged(stream)]
        stream.seek(0)
        stream.truncate()
        return lines

    for n in range(5):
        log.info("refused", {"status": 404, "n": n})
    log.info("refused", {"status": 503, "n": 5})
    assert written() == ["refused status=404 n=0 count=1", "refused status=503 n=5 count=1"]
    log.info("else")
    assert written() == ["else"], "not yet"
    now[0] += 2 * logs.RATE_LIMIT_SECONDS
    log.info("else")
    assert sorted(written()) == ["else", "refused status=404 n=4 count=4"]
    log.info("refused", {"status": 404, "n": 6})
    assert written() == [], "the interval since the last line of this kind is not over"
    log.info("refused", {"status": 503, "n": 7})
    assert written() == ["refused status=503 n=7 count=1"]
    log.handlers[0].close()
    assert written() == ["refused status=404 n=6 count=1"], "closing the handler writes all pending events"


def test_names_beyond_the_limit_share_a_line(log: logging.Logger, attach: Attach) -> None:
    stream = attach(rate_limited=("refused",))
    for n in range(100):
        log.info("refused", {"status": 421, "reason": f"name-{n}"})
    log.handlers[0].close()
    counts = [int(line) for line in re.findall(r"count=(\d+)", "\n".join(logged(stream)))]
    assert counts == [1] * (logs.MAX_NAMES + 1) + [100 - logs.MAX_NAMES - 1]


def test_thread_writes_what_is_due_and_ends_with_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "RATE_LIMIT_SECONDS", 0.05)
    log = logging.Logger("ringoexp.test", logging.DEBUG)
    with tempfile.TemporaryFile() as stream:
        handler = logs.LineHandler(log_format.format_logfmt, ("refused",), stream.fileno())
        log.addHandler(handler)
        handler.start()
        try:
            for n in range(3):
                log.info("refused", {"n": n})
            eventually(lambda: sum(map(int, re.findall(r"count=(\d+)", "\n".join(logged(stream))))) == 3)
        finally:
            handler.stop()
    assert "log" not in [thread.name for thread in threading.enumerate()]


def test_log_without_a_thread_writes_with_the_next_line(log: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **more: Any) -> None:
        raise logs.ThreadError("none left")

    monkeypatch.setattr(logs, "start_thread", refuse)
    with tempfile.TemporaryFile() as stream:
        handler = logs.LineHandler(log_format.format_logfmt, ("refused",), stream.fileno())
        log.addHandler(handler)
        handler.start()
        log.info("refused")
        log.info("refused")
        handler.stop()
        assert len(logged(stream)) == 2


def test_lines_are_dropped_and_counted_if_the_reader_stalls(log: logging.Logger) -> None:
    read_end, write_end = os.pipe()
    with open(read_end, "rb", buffering=0) as reader, open(write_end, "wb", buffering=0):
        log.addHandler(logs.LineHandler(rate_limited=(), descriptor=write_end))
        for n in range(2000):
            log.info("happened", {"n": n, "more": "x" * 100})
        text = reader.read(1 << 20)
        log.info("went_on")
        while b"went_on" not in text:
            text += reader.read(1 << 20)
    lines = text.decode().splitlines()
    kept = sum("event=happened" in line for line in lines)
    dropped = re.findall(r"event=log_dropped count=(\d+)", lines[-2])
    assert 100 < kept < 2000 and dropped == [str(2000 - kept)] and "event=went_on" in lines[-1]


def test_lines_that_the_disk_does_not_take_are_counted(log: logging.Logger, attach: Attach) -> None:
    """The limit of a file's size has the same effect as a full disk: a line is cut, and the next ones fail."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    stream = attach()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150, limits[1]))
        for _ in range(4):
            log.info("happened")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.info("went_on")
    first, cut, *others = logged(stream)
    assert LINE.fullmatch(first) and first.startswith(cut[:5]) and not LINE.fullmatch(cut)
    assert [LINE.fullmatch(line)[3] for line in others] == ["log_dropped", "went_on"]  # type: ignore[index]
    assert "count=3" in others[0]


class Unprintable:
    """A field that has no text."""

    def __str__(self) -> str:
        raise MemoryError


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("rate_limited", [(), ("happened",)])
def test_line_that_cannot_be_made_is_counted_and_raises_nothing(
    log: logging.Logger, attach: Attach, as_json: bool, rate_limited: tuple[str, ...]
) -> None:
    stream = attach(as_json, rate_limited)
    log.info("happened", {"field": Unprintable()})
    log.info("went_on")
    lines = logged(stream)
    assert len(lines) == 2 and "log_dropped" in lines[0] and "went_on" in lines[1]
    assert re.search(r"count\W+1\b", lines[0])


def test_handler_with_a_broken_state_raises_nothing(log: logging.Logger, attach: Attach) -> None:
    """For example after a MemoryError in the middle of its bookkeeping."""
    stream = attach(rate_limited=("happened",))
    log.info("happened", {"status": []})  # not a key of a dictionary
    log.info("went_on")
    assert "event=log_dropped count=1" in logged(stream)[0]


def answers(port: int) -> bool:
    """True if a server answers on this port."""
    try:
        return request(port, "GET", "/v1.0/alive")[0] == 200
    except OSError:
        return False


@pytest.mark.slow
def test_server_runs_and_stops_if_its_log_is_not_read(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    port = free_port()
    with open(read_end, "rb"):
        running = subprocess.Popen(
            [sys.executable, ROOT / "ringoexp.py", "-p", str(port), "-T", str(port), "-d"],
            cwd=tmp_path,
            stderr=write_end,
        )
        os.close(write_end)
        try:
            eventually(lambda: answers(port))
            for _ in range(600):
                assert request(port, "POST", "/v1.0/ingest", bytes(4))[0] == 200
            running.terminate()
            assert running.wait(30) == 0
            assert len(rows(tmp_path / "ringoexp.db")) == 600
        finally:
            running.kill()
            running.wait()


@pytest.mark.parametrize("as_json", [False, True])
def test_line_is_at_most_what_a_pipe_takes_at_once(log: logging.Logger, attach: Attach, as_json: bool) -> None:
    stream = attach(as_json)
    log.info("happened", {"reason": "\xfc" * 900, "more": "\xfc" * 900, "count": 3})
    (line,) = logged(stream)
    assert len(line) < 4096 and "\\u00fc" in line and ("count=3" in line or '"count": 3' in line)
    assert not as_json or json.loads(line)["count"] == 3


def test_server_without_stderr_logs_to_the_null_device(tmp_path: Path) -> None:
    """Otherwise a socket or the database gets the number of stderr, and the lines."""
    port = free_port()
    command = ["sh", "-c", 'exec "$0" "$@" 0<&- 2>&-', sys.executable, str(ROOT / "ringoexp.py")]
    running = subprocess.Popen([*command, "-p", str(port), "-T", str(port), "-d"], cwd=tmp_path)
    try:
        eventually(lambda: answers(port))
        for descriptor in (0, 2):
            assert os.readlink(f"/proc/{running.pid}/fd/{descriptor}") == os.devnull
        assert request(port, "POST", "/v1.0/ingest", bytes(4))[0] == 200
        running.terminate()
        assert running.wait(30) == 0
        assert len(rows(tmp_path / "ringoexp.db")) == 1
    finally:
        running.kill()
        running.wait()


def test_long_texts_are_cut(log: logging.Logger, attach: Attach) -> None:
    stream = attach()
    log.info("happened", {"reason": "x" * 5000})
    (line,) = logged(stream)
    assert f"reason={'x' * log_format.MAX_TEXT_LENGTH}... thread=" in line


def test_client_is_logged_when_it_connects_and_disconnects(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0") as running:
        with RawClient(running.port) as client:
            client.send(frame(2, bytes(8)) * 3)
            client.acked(3)
            client.send(frame(2, bytes(7)))
            assert client.closed()[0] == 1007
        eventually(lambda: events(running, "disconnected"))
        with RawClient(running.port, {"Sec-WebSocket-Protocol": "ringoexp.batch.v1"}):
            pass
        eventually(lambda: len(events(running, "disconnected")) == 2)
        opened, closed = events(running, "connected"), events(running, "disconnected")
        assert [line["kind"] for line in opened] == [line["kind"] for line in closed] == ["plain", "batches"]
        assert [line["client"] for line in opened] == [line["client"] for line in closed]
        plain, batches = closed
        assert (plain["code"], plain["received"], plain["acked"]) == ("1007", "3", "3") and plain["reason"]
        assert (batches["code"], batches["received"], batches["reason"]) == ("1006", "0", "connection lost")
        with RawClient(running.port) as client:
            client.send(frame(8, struct.pack(">H", 3000) + b"s3cret"))
            assert client.closed()[0] == 3000
        last = eventually(lambda: events(running, "disconnected")[2:])[0]
        assert (last["code"], last["by"]) == ("3000", "client") and "reason" not in last
        assert running.stats()["clients"] == running.stats()["publishers"] == 0


@pytest.mark.slow
def test_link_is_logged_once_per_change(tmp_path: Path) -> None:
    port = free_port()
    quick = "timing.BACKOFF_MAX_SECONDS = 0.05"
    with server(tmp_path, "-p", "0", "-T", str(port), "-r", "64", patch=quick) as publisher:
        with RawClient(publisher.port) as client:
            for turn in range(1, 4):
                client.send(frame(2, bytes(8)) * 10)
                eventually(lambda turn=turn: len(events(publisher, "link_down")) == turn)
                with server(tmp_path, "-I", "false", "-p", str(port)):
                    client.acked(10 * turn)
        eventually(lambda: len(events(publisher, "link_up")) == 3)
        changes = [line["event"] for line in lines(publisher) if line["event"].startswith(("link_", "sink_"))]
        assert changes == ["link_down", "link_up"] * 3
        down, up = events(publisher, "link_down")[0], events(publisher, "link_up")[0]
        assert down["consumer"] == up["consumer"] == f"localhost:{port}" and "refused" in down["reason"]
        assert float(up["away_seconds"]) >= 0


@pytest.mark.slow
def test_refusals_are_rate_limited_except_with_debug(tmp_path: Path) -> None:
    for flags, expected in (([], {"404": 1}), (["-d"], {"404": 50})):
        with server(tmp_path, "-p", "0", "-T", "0", *flags, patch="status.logs.RATE_LIMIT_SECONDS = 600") as running:
            for _ in range(50):
                assert request(running.port, "GET", "/nothing")[0] == 404
            refused = events(running, "refused")
            assert {"404": len(refused)} == expected
            assert (refused[0]["status"], refused[0]["client"]) == ("404", "127.0.0.1")
            assert len(events(running, "request")) == (50 if flags else 0)
            assert running.stop() == 0
            assert sum(int(line.get("count", 1)) for line in events(running, "refused")) == 50


def test_every_refused_name_is_in_the_log_at_once(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", patch="status.logs.RATE_LIMIT_SECONDS = 600") as running:
        for name in ("a.example", "b.example", "c.example", "a.example"):
            assert request(running.port, "GET", "/", headers={"Host": name})[0] == 421
            origin = f"http://{name}"
            assert request(running.port, "POST", "/v1.0/ingest", bytes(4), {"Origin": origin})[0] == 403
        for status in ("403", "421"):
            refused = [line for line in events(running, "refused") if line["status"] == status]
            assert [re.findall("[abc].example", line["reason"])[0] for line in refused] == [
                "a.example",
                "b.example",
                "c.example",
            ]
        assert running.stop() == 0
        assert sum(int(line["count"]) for line in events(running, "refused")) == 8


def test_line_that_a_limit_holds_back_comes_within_its_second(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0") as running:
        for _ in range(3):
            assert request(running.port, "GET", "/nothing")[0] == 404
        eventually(lambda: sum(int(line["count"]) for line in events(running, "refused")) == 3, deadline=10)


def test_stopped_is_the_last_line_after_lines_held_back(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", patch="status.logs.RATE_LIMIT_SECONDS = 600") as running:
        for _ in range(3):
            assert request(running.port, "GET", "/nothing")[0] == 404
        assert running.stop() == 0
        assert [line["event"] for line in lines(running)] == ["started", "refused", "refused", "stopped"]
        assert lines(running)[-2]["count"] == "2"


def test_nothing_is_written_after_stopped(log: logging.Logger, attach: Attach) -> None:
    """Threads of requests may end later than the server."""
    stream = attach(rate_limited=("refused",))
    for n in range(2):
        log.info("refused", {"n": n})
    log.info("stopped", {"stored": 0, "unstored": 0})
    log.info("refused", {"n": 2})
    log.error("happened")
    log.handlers[0].close()
    assert re.findall("event=([a-z]+)", "\n".join(logged(stream))) == ["refused", "refused", "stopped"]


VALUE = 1_234_567_890_123_456_789


def send_everything(running: ServerProcess) -> None:
    """Send valid and invalid requests and messages, with VALUE and a token in all possible places."""
    auth = {"Authorization": "Bearer s3cret-token", "Cookie": "session=s3cret-token"}
    body = encode_plain([VALUE])
    assert request(running.port, "POST", "/v1.0/ingest?token=s3cret-token", body, auth)[0] == 200
    assert request(running.port, "POST", "/v1.0/ingest", body + b"x", auth)[0] == 400
    assert request(running.port, "POST", "/v1.0/ingest", body, {**auth, "Content-Type": "text/html"})[0] == 415
    for kind in ("text/plain", "application/json", "application/x-www-form-urlencoded"):
        for text in (f"{VALUE} s3cret-token", f"{VALUE}x", f"{VALUE * 10}"):
            assert (
                request(running.port, "POST", "/v1.0/ingest", text.encode(), {**auth, "Content-Type": kind})[0] == 400
            )
    for query in ("source=s3cret-token", f"source={VALUE}&first=s3cret-token", "first=0&token=s3cret-token"):
        assert request(running.port, "POST", f"/v1.0/ingest?{query}", body, auth)[0] == 400
    for path in ("/v1.0/stats", "/nothing", "/v1.0/ingest"):
        request(running.port, "GET", f"{path}?access_token=s3cret-token", headers=auth)
    for header in ("Origin", "Content-Type", "Accept"):
        request(running.port, "POST", "/v1.0/ingest", body, {header: "http://me:s3cret-token@x/?t=s3cret-token"})
    with socket.create_connection(("localhost", running.port)) as raw:
        raw.sendall(b"GET http://me:s3cret-token@x/v1.0/alive?s3cret-token HTTP/1.1\r\nHost: x\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 400")
        raw.sendall(b"GET /v1.0/alive?s3cret-token s3cret-token HTTP/1.1\r\n\r\n")
        assert raw.recv(65536)
    frames = [
        frame(8, struct.pack(">H", 3000) + b"s3cret-token"),
        frame(2, struct.pack(">q", VALUE)),
        frame(2, struct.pack(">q", VALUE) + b"x"),
        frame(1, str(VALUE).encode()),
        frame(2, struct.pack(">q", VALUE), mask=None),
        frame(8, b"\x03\xe8"),
    ]
    for second in frames:
        with RawClient(running.port, {"Authorization": "Bearer s3cret-token"}) as client:
            client.send(frame(2, struct.pack(">q", VALUE)) + second)
            if second is not frames[1]:  # the one that does not end the connection
                client.closed()


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["-d"], ["-d", "--log_json"]], ids=" ".join)
def test_log_contains_no_value_and_no_token(tmp_path: Path, flags: list[str]) -> None:
    with (
        server(tmp_path, "-I", "false", "-p", "0", "-D", "c.db", *flags) as consumer,
        server(tmp_path, "-p", "0", "-T", str(consumer.port), *flags) as publisher,
    ):
        for running in (consumer, publisher):
            send_everything(running)
            eventually(lambda running=running: running.stats()["clients"] <= (running is consumer))
        for running in (publisher, consumer):
            assert running.stop() == 0
            text = running.errors.read_text()
            assert "connected" in text and "refused" in text
            assert "s3cret" not in text and str(VALUE) not in text
            for form in (struct.pack(">q", VALUE), struct.pack("<q", VALUE)):
                assert form not in text.encode() and form.hex() not in text and repr(form)[2:-1] not in text


def test_log_json_writes_a_json_object_per_line(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", "-d", "--log_json") as running:
        send_everything(running)
        assert running.stop() == 0
        lines = [json.loads(line) for line in running.errors.read_text().splitlines()]
    assert {"connected", "disconnected", "refused", "request"} <= {line["event"] for line in lines}
    assert [line["event"] for line in lines if line["event"] in ("started", "stopped")] == ["started", "stopped"]
    assert lines[-1]["event"] == "stopped"
    for line in lines:
        assert list(line)[:3] == ["time", "level", "event"] and list(line)[-2:] == ["thread", "logger"]


def is_text(node: ast.expr) -> bool:
    """Return whether an expression is a string, whatever is put into it."""
    return isinstance(node, ast.JoinedStr) or isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_events_in_the_source_are_words_with_one_dict_of_fields() -> None:
    """A `%` in the name, or more arguments, would change the line."""
    calls = 0
    for path in program_files():
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or path.name == "timing.py":  # timing has log_unexpected itself
                continue
            function = ast.unparse(call.func)
            if re.fullmatch(r"log\.(debug|info|warning|error)", function):
                event, *fields = call.args
                calls += 1
                assert len(fields) <= 1 and not any(map(is_text, fields)), f"{path.name}: {ast.unparse(call)}"
            elif function == "log_unexpected":
                event = call.args[1]
            else:
                continue
            name = event.value if isinstance(event, ast.Constant) else ""
            assert re.fullmatch(r"[a-z_]+", str(name)), f"{path.name}: {ast.unparse(call)}"
    assert calls > 20
