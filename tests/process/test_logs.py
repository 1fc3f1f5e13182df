"""What a line of the log says, how it is written, and what it never says."""

import json
import logging
import os
import re
import shlex
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
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
    server,
)

from ringolib.status import logs
from ringolib.wire import encode_plain

LINE = re.compile(r"time=(\S+) level=(debug|info|warning|error) event=(\S+) (.*)thread=(\S+) logger=(\S+)")


def logged(stream: IO[bytes]) -> list[str]:
    stream.seek(0)
    return stream.read().decode().splitlines()


def lines(running: ServerProcess) -> list[dict[str, str]]:
    """The server's log, each line taken apart; fails where one is not of the form."""
    found = []
    for line in running.errors.read_text().splitlines():
        assert LINE.fullmatch(line), line
        # shlex undoes the quotes of a JSON string well enough
        found.append(dict(word.split("=", 1) for word in shlex.split(line)))
    return found


def of(running: ServerProcess, event: str) -> list[dict[str, str]]:
    return [line for line in lines(running) if line["event"] == event]


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    made = logging.Logger("ringoexp.test", logging.DEBUG)
    with files:
        yield made


files = ExitStack()


def attached(log: logging.Logger, as_json: bool = False, limited: tuple[str, ...] = ()) -> IO[bytes]:
    stream = files.enter_context(tempfile.TemporaryFile())
    log.addHandler(logs.Lines(as_json, limited, stream.fileno()))
    return stream


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
def test_a_value_is_a_word_or_a_quoted_string_on_one_line(log: logging.Logger, value: Any, text: str) -> None:
    stream = attached(log)
    log.info("happened", {"key": value})
    (line,) = logged(stream)
    assert f" event=happened key={text} thread=MainThread logger=ringoexp.test" in line


def test_times_are_utc_to_the_millisecond(log: logging.Logger) -> None:
    stream = attached(log)
    log.info("happened")
    (line,) = logged(stream)
    found = LINE.fullmatch(line)
    assert found
    at = datetime.strptime(found[1], "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=timezone.utc)
    assert abs((datetime.now(timezone.utc) - at).total_seconds()) < 60


def test_json_has_the_same_keys_and_values_of_their_type(log: logging.Logger) -> None:
    stream = attached(log, as_json=True)
    log.warning("happened", {"count": 3, "reason": 'a\n"b"', "none": None})
    (line,) = logged(stream)
    said = json.loads(line)
    assert list(said) == ["time", "level", "event", "count", "reason", "none", "thread", "logger"]
    assert (said["level"], said["count"], said["reason"], said["none"]) == ("warning", 3, 'a\n"b"', None)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_cause_is_told_with_its_places_and_its_own_causes_on_the_same_line(
    log: logging.Logger, as_json: bool
) -> None:
    stream = attached(log, as_json)

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


def test_what_others_log_is_a_message(log: logging.Logger) -> None:
    log.name = "other"
    stream = attached(log)
    log.warning("%d of %s", 3, "those")
    (line,) = logged(stream)
    assert ' event=message message="3 of those" thread=' in line


def test_what_comes_too_fast_is_counted_and_told_by_the_next_line(
    log: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(logs, "monotonic", lambda: now[0])
    stream = attached(log, limited=("refused",))

    def told() -> list[str]:
        found = [re.sub("^.* event=| thread.*$", "", line) for line in logged(stream)]
        stream.seek(0)
        stream.truncate()
        return found

    for n in range(5):
        log.info("refused", {"status": 404, "n": n})
    log.info("refused", {"status": 503, "n": 5})
    assert told() == ["refused status=404 n=0 count=1", "refused status=503 n=5 count=1"]
    log.info("else")
    assert told() == ["else"], "not yet"
    now[0] += 2 * logs.LIMIT_SECONDS
    log.info("else")
    assert sorted(told()) == ["else", "refused status=404 n=4 count=4"]
    log.info("refused", {"status": 404, "n": 6})
    assert told() == [], "a second has not passed since the last line of its kind"
    log.info("refused", {"status": 503, "n": 7})
    assert told() == ["refused status=503 n=7 count=1"]
    log.handlers[0].close()
    assert told() == ["refused status=404 n=6 count=1"], "nothing is left untold in the end"


def test_a_reader_that_stalls_stops_nothing_and_what_is_missing_is_counted(log: logging.Logger) -> None:
    theirs, ours = os.pipe()
    with open(theirs, "rb", buffering=0) as reader, open(ours, "wb", buffering=0):
        log.addHandler(logs.Lines(as_json=False, limited=(), descriptor=ours))
        for n in range(2000):
            log.info("happened", {"n": n, "more": "x" * 100})
        text = reader.read(1 << 20)
        log.info("went_on")
        while b"went_on" not in text:
            text += reader.read(1 << 20)
    said = text.decode().splitlines()
    kept = sum("event=happened" in line for line in said)
    dropped = re.findall(r"event=log_dropped count=(\d+)", said[-2])
    assert 100 < kept < 2000 and dropped == [str(2000 - kept)] and "event=went_on" in said[-1]


def test_a_server_whose_log_nobody_reads_serves_and_ends(tmp_path: Path) -> None:
    theirs, ours = os.pipe()
    with open(theirs, "rb"):
        running = subprocess.Popen(
            [sys.executable, ROOT / "ringoexp.py", "-p", "0", "-T", "0", "-d"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=ours,
            text=True,
        )
        os.close(ours)
        try:
            assert running.stdout
            port = int(running.stdout.readline().split(",")[0].rsplit(":", 1)[1])
            for _ in range(600):
                assert request(port, "POST", "/v1.0/ingest", bytes(4))[0] == 200
            running.terminate()
            assert running.communicate(timeout=30)[0] == "ringoexp: stopped, 600 stored, 0 unstored\n"
        finally:
            running.kill()
            running.wait()


@pytest.mark.parametrize("as_json", [False, True])
def test_a_line_fits_into_what_a_pipe_takes_at_once(log: logging.Logger, as_json: bool) -> None:
    stream = attached(log, as_json)
    log.info("happened", {"reason": "\xfc" * 900, "more": "\xfc" * 900, "count": 3})
    (line,) = logged(stream)
    assert len(line) < 4096 and "\\u00fc" in line and ("count=3" in line or '"count": 3' in line)
    assert not as_json or json.loads(line)["count"] == 3


def test_a_server_without_stderr_logs_to_nobody(tmp_path: Path) -> None:
    """Or the next descriptor, a socket or the database, would have its number, and get the lines."""
    port = free_port()
    command = ["sh", "-c", 'exec "$0" "$@" 0<&- 2>&-', sys.executable, str(ROOT / "ringoexp.py")]
    running = subprocess.Popen(
        [*command, "-p", str(port), "-T", str(port), "-d"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    try:
        assert running.stdout and running.stdout.readline()
        for descriptor in (0, 2):
            assert os.readlink(f"/proc/{running.pid}/fd/{descriptor}") == os.devnull
        assert request(port, "POST", "/v1.0/ingest", bytes(4))[0] == 200
        running.terminate()
        assert running.communicate(timeout=30)[0] == "ringoexp: stopped, 1 stored, 0 unstored\n"
    finally:
        running.kill()
        running.wait()


def test_long_texts_are_cut(log: logging.Logger) -> None:
    stream = attached(log)
    log.info("happened", {"reason": "x" * 5000})
    (line,) = logged(stream)
    assert f"reason={'x' * logs.MAX_TEXT}... thread=" in line


def test_a_client_is_logged_when_it_comes_and_when_it_goes_and_why(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0") as running:
        with RawClient(running.port) as client:
            client.send(frame(2, bytes(8)) * 3)
            client.acked(3)
            client.send(frame(2, bytes(7)))
            assert client.closed()[0] == 1007
        eventually(lambda: of(running, "disconnected"))
        with RawClient(running.port, {"Sec-WebSocket-Protocol": "ringoexp.batch.v1"}):
            pass
        eventually(lambda: len(of(running, "disconnected")) == 2)
        came, went = of(running, "connected"), of(running, "disconnected")
        assert [line["kind"] for line in came] == [line["kind"] for line in went] == ["plain", "batches"]
        assert [line["client"] for line in came] == [line["client"] for line in went]
        assert (went[0]["code"], went[0]["received"], went[0]["acked"]) == ("1007", "3", "3") and went[0]["reason"]
        assert (went[1]["code"], went[1]["received"], went[1]["reason"]) == ("1006", "0", "connection lost")
        with RawClient(running.port) as client:
            client.send(frame(8, struct.pack(">H", 3000) + b"s3cret"))
            assert client.closed()[0] == 3000
        last = eventually(lambda: of(running, "disconnected")[2:])[0]
        assert (last["code"], last["by"]) == ("3000", "client") and "reason" not in last
        assert running.stats()["clients"] == running.stats()["publishers"] == 0


def test_a_link_is_logged_once_per_change(tmp_path: Path) -> None:
    port = free_port()
    quick = "timing.BACKOFF_MAX_SECONDS = 0.05"
    with server(tmp_path, "-p", "0", "-T", str(port), "-r", "64", patch=quick) as publisher:
        with RawClient(publisher.port) as client:
            for turn in range(1, 4):
                client.send(frame(2, bytes(8)) * 10)
                eventually(lambda turn=turn: len(of(publisher, "link_down")) == turn)
                with server(tmp_path, "-I", "false", "-p", str(port)):
                    client.acked(10 * turn)
        eventually(lambda: len(of(publisher, "link_up")) == 3)
        events = [line["event"] for line in lines(publisher) if line["event"].startswith(("link_", "sink_"))]
        assert events == ["link_down", "link_up"] * 3
        down, up = of(publisher, "link_down")[0], of(publisher, "link_up")[0]
        assert down["consumer"] == up["consumer"] == f"localhost:{port}" and "refused" in down["reason"]
        assert float(up["away_seconds"]) >= 0


def test_refusals_are_limited_and_debug_tells_each(tmp_path: Path) -> None:
    for flags, expected in (([], {"404": 1}), (["-d"], {"404": 50})):
        with server(tmp_path, "-p", "0", "-T", "0", *flags, patch="status.logs.RATE_LIMIT_SECONDS = 600") as running:
            for _ in range(50):
                assert request(running.port, "GET", "/nothing")[0] == 404
            told = of(running, "refused")
            assert {"404": len(told)} == expected and told[0]["status"] == "404" and told[0]["client"] == "127.0.0.1"
            assert len(of(running, "request")) == (50 if flags else 0)
            assert running.stop() == 0
            assert sum(int(line.get("count", 1)) for line in of(running, "refused")) == 50


VALUE = 1_234_567_890_123_456_789


def everything(running: ServerProcess) -> None:
    """All that a client can do, right and wrong, with VALUE and a token wherever they can be."""
    auth = {"Authorization": "Bearer s3cret-token", "Cookie": "session=s3cret-token"}
    body = encode_plain([VALUE])
    assert request(running.port, "POST", "/v1.0/ingest?token=s3cret-token", body, auth)[0] == 200
    assert request(running.port, "POST", "/v1.0/ingest", body + b"x", auth)[0] == 400
    assert request(running.port, "POST", "/v1.0/ingest", body, {**auth, "Content-Type": "text/plain"})[0] == 415
    for path in ("/v1.0/stats", "/nothing", "/v1.0/ingest"):
        request(running.port, "GET", f"{path}?access_token=s3cret-token", headers=auth)
    for header in ("Origin", "Content-Type", "Accept"):
        request(running.port, "POST", "/v1.0/ingest", body, {header: "http://me:s3cret-token@x/?t=s3cret-token"})
    with socket.create_connection(("localhost", running.port)) as raw:
        raw.sendall(b"GET http://me:s3cret-token@x/v1.0/alive?s3cret-token HTTP/1.1\r\nHost: x\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 404")
        raw.sendall(b"GET /v1.0/alive?s3cret-token s3cret-token HTTP/1.1\r\n\r\n")
        assert raw.recv(65536)
    sent = [
        frame(8, struct.pack(">H", 3000) + b"s3cret-token"),
        frame(2, struct.pack(">q", VALUE)),
        frame(2, struct.pack(">q", VALUE) + b"x"),
        frame(1, str(VALUE).encode()),
        frame(2, struct.pack(">q", VALUE), mask=None),
        frame(8, b"\x03\xe8"),
    ]
    for each in sent:
        with RawClient(running.port, {"Authorization": "Bearer s3cret-token"}) as client:
            client.send(frame(2, struct.pack(">q", VALUE)) + each)
            if each is not sent[1]:
                client.closed()


@pytest.mark.parametrize("flags", [[], ["-d"], ["-d", "--log_json"]], ids=" ".join)
def test_no_line_has_a_value_or_a_token_in_it(tmp_path: Path, flags: list[str]) -> None:
    with (
        server(tmp_path, "-I", "false", "-p", "0", "-D", "c.db", *flags) as consumer,
        server(tmp_path, "-p", "0", "-T", str(consumer.port), *flags) as publisher,
    ):
        for running in (consumer, publisher):
            everything(running)
            eventually(lambda running=running: running.stats()["clients"] <= (running is consumer))
        for running in (publisher, consumer):
            assert running.stop() == 0
            said = running.errors.read_text()
            assert "connected" in said and "refused" in said
            assert "s3cret" not in said and str(VALUE) not in said
            for form in (struct.pack(">q", VALUE), struct.pack("<q", VALUE)):
                assert form not in said.encode() and form.hex() not in said and repr(form)[2:-1] not in said


def as_json(running: ServerProcess) -> list[dict[str, Any]]:
    return [json.loads(line) for line in running.errors.read_text().splitlines()]


def test_with_log_json_every_line_is_a_json_object(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", "-d", "--log_json") as running:
        everything(running)
        assert running.stop() == 0
        said = as_json(running)
    assert {"connected", "disconnected", "refused", "request"} <= {line["event"] for line in said}
    for line in said:
        assert list(line)[:3] == ["time", "level", "event"] and list(line)[-2:] == ["thread", "logger"]


def test_the_events_of_the_source_are_words_with_one_dict_of_fields() -> None:
    """Or a `%` in the name, or more arguments, would make something else of the line."""
    found = 0
    for path in program_files():
        for call in re.finditer(r"\blog\.(?:debug|info|warning|error)\(\s*([^,)]+)([,)])\s*(.?)", path.read_text()):
            found += 1
            assert re.fullmatch(r'"[a-z_]+"', call[1]), f"{path.name}: {call[0]}"
            assert call[2] == ")" or call[3] in "{ew", f"{path.name}: {call[0]}"
    assert found > 20


def test_events_are_in_the_readme() -> None:
    """Those that a user may see without -d."""
    text = (ROOT / "README.md").read_text()
    for path in program_files():
        for level, event in re.findall(r'\blog\.(info|warning|error)\(\s*"([a-z_]+)"', path.read_text()):
            assert f"`{event}`" in text or f"event={event}" in text, f"{path.name}: {level} {event}"
