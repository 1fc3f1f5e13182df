"""`ringoexp send` and its Producer: every record is stored once and in order, whatever fails."""

import io
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import uuid
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import BinaryIO

import pytest
from support.broken import break_connections
from support.fake_consumer import Link, fake_consumer
from support.harness import (
    DEADLINE,
    ROOT,
    Blocked,
    ServerProcess,
    eventually,
    free_port,
    in_order,
    raw_link,
    rows,
    seeded,
    server,
)

from ringolib import timing
from ringolib.client import producer
from ringolib.client import send as command
from ringolib.client.producer import Producer, ProducerError
from ringolib.client.url import Target, parse_url
from ringolib.net import sockets
from ringolib.wire import decode_batch, encode_ack


@pytest.fixture(autouse=True)
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "BACKOFF_FIRST_SECONDS", 0.005)
    monkeypatch.setattr(timing, "BACKOFF_MAX_SECONDS", 0.05)
    monkeypatch.setattr(sockets, "CLOSE_TIMEOUT", 0.2)
    monkeypatch.setattr(producer, "EXIT_FLUSH_SECONDS", 0.2)


def send(directory: Path, *flags: str, given: bytes = b"") -> "subprocess.CompletedProcess[str]":
    """Run `ringoexp send` with these flags and this input to its end."""
    command = [sys.executable, str(ROOT / "ringoexp.py"), "send", *flags]
    done = subprocess.run(command, cwd=directory, input=given, capture_output=True, timeout=60)
    assert b"Traceback" not in done.stderr
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A complete system for tests that only add records to it."""
    directory = tmp_path_factory.mktemp("shared")
    with server(directory, "-p", "0", "-T", "0") as running:
        running.database = directory / "ringoexp.db"  # type: ignore[attr-defined]
        yield running


@contextmanager
def peer(answer: Callable[[Link], object]) -> Iterator[str]:
    """Run a server that calls `answer` for each connection, and yield its URL."""
    with fake_consumer(answer) as port:
        yield f"ws://localhost:{port}/v1.0/ingest"


def test_lines_of_a_pipe_are_stored_in_order(tmp_path: Path) -> None:
    values = [*range(-3, 100_000), 2**63 - 1, -(2**63)]
    with server(tmp_path, "-p", "0", "-T", "0") as running:
        given = "".join(f"{value}\n" for value in values)[:-1].encode()  # the last line without its end
        done = send(tmp_path, "--url", running.url, "--json", given=given)
        summary = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert (summary["sent"], summary["acked"], summary["reconnects"]) == (len(values), len(values), 0)
    assert in_order(tmp_path / "ringoexp.db", summary["source"]) == values


def test_binary_file_is_stored(tmp_path: Path) -> None:
    (tmp_path / "numbers").write_bytes(struct.pack(">3q", 5, -5, 2**62))
    with server(tmp_path, "-p", "0", "-T", "0") as running:
        done = send(tmp_path, "--url", running.url, "--binary", "--json", "numbers")
        cut = send(tmp_path, "--url", running.url, "--binary", given=bytes(11))
    assert in_order(tmp_path / "ringoexp.db", json.loads(done.stdout)["source"]) == [5, -5, 2**62]
    assert cut.returncode == 2 and "3 bytes are left at the end" in cut.stderr


@pytest.mark.parametrize("bad", ["x", "1.5", "1 2", "1_0", "9223372036854775808", "٣", "--1", "caf\xe9"])
def test_bad_line_is_named_and_lines_before_it_are_stored(shared: ServerProcess, tmp_path: Path, bad: str) -> None:
    done = send(tmp_path, "--url", shared.url, "--json", given=f"7\n\n -8 \n{bad}\n9\n".encode())
    summary = json.loads(done.stdout)
    error, hint = done.stderr.splitlines()
    assert done.returncode == 2
    assert "line 4 is not a whole number" in error and (bad in error or "\\" in error)
    assert hint.endswith(
        f"2 of 2 acked; send the integers after the first 2 with --source {summary['source']} --first 2"
    )
    assert in_order(shared.database, json.loads(done.stdout)["source"]) == [7, -8]


@pytest.mark.parametrize("given", ["%05000d" % 7, "+%060000d" % 7, "-%05000d" % 7, "%05000d" % 0])
def test_leading_zeros_do_not_count(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_read", lambda source: source.read(command.READ_BYTES))
    given = f"1\n{given}\r\n {given} \n2"
    values = [value for block in command._text_integers(io.BytesIO(given.encode())) for value in block]
    assert values == [int(line.replace("0" * 4000, "")) for line in given.split("\n")]


@pytest.mark.parametrize("step", [1, 1000, command.READ_BYTES])
@pytest.mark.parametrize("character", [b"x", b"7", b"0", b" "])
@pytest.mark.parametrize("end", [b"", b"7\n9\n"])
def test_line_over_the_limit_is_refused_however_it_arrives(
    character: bytes, end: bytes, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_read", lambda source: source.read(step))
    pipe = io.BytesIO(b"1\n\n2\n" + character * 70_000 + end)
    blocks, values = command._text_integers(pipe), []
    with pytest.raises(command.BadInput, match="^line 4 is longer than 65536 bytes: '"):
        for block in blocks:
            values += block
    assert values == [1, 2]


@pytest.mark.parametrize(("start", "flag"), [(b"7" * 40, ""), (bytes(40), "--binary"), (b"x", "")])
def test_input_without_newlines_ends_send_at_once_in_flat_memory(tmp_path: Path, start: bytes, flag: str) -> None:
    """The input has no end, and the server does not run."""
    url = f"ws://localhost:{free_port()}/v1.0/ingest"
    send = [sys.executable, "-c", MEASURED_SEND, "send", "--url", url]
    with subprocess.Popen(
        send, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    ) as done:
        assert done.stdin and done.stderr and done.stdout
        written = 0
        with pytest.raises(BrokenPipeError):
            while written < 300_000_000:
                written += os.write(done.stdin.fileno(), start.ljust(65536, start[:1]))
        error, grown, seconds = done.stderr.read().decode(), *map(float, done.stdout.read().split())
    assert done.returncode == 2 and error.count("\n") == 1
    assert error.startswith("ringoexp send: error: stdin: line 1 is longer than 65536 bytes: ")
    assert ("--binary" in error) == bool(flag)
    assert written < 2_000_000 and grown < 10e6 and seconds < 1


MEASURED_SEND = """
import resource, sys, time
import ringoexp
from ringolib.client import send
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
status = ringoexp.main()
grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
print(grown, time.process_time() - started)
sys.exit(status)
"""
"""A script that sends, and prints how many bytes its memory has grown, and the seconds of CPU time that it took."""


@pytest.mark.slow
def test_large_input_is_sent_in_flat_memory(tmp_path: Path) -> None:
    """50 MB of input are 10,000 integers with many leading zeros."""
    line = b"%05000d\n" % 7
    with server(tmp_path, "-p", "0", "-T", "0") as running:
        send = [sys.executable, "-c", MEASURED_SEND, "send", "--url", running.url]
        done = subprocess.run(send, cwd=ROOT, input=line * 10_000, capture_output=True, timeout=DEADLINE)
        assert (done.returncode, done.stderr) == (0, b"")
        assert running.stats()["recordsStored"] == 10_000
    assert float(done.stdout.split()[0]) < 20e6


@pytest.mark.parametrize("flags", [[], ["--binary"]])
def test_stdin_that_does_not_block_is_read_to_its_end(shared: ServerProcess, flags: list[str]) -> None:
    """Another program that shares the pipe may have made it non-blocking. No input yet is not the end."""
    source, (read_end, write_end) = uuid.uuid4(), os.pipe()
    os.set_blocking(read_end, False)
    command = [sys.executable, str(ROOT / "ringoexp.py"), "send", "--url", shared.url, "--source", str(source), *flags]
    with subprocess.Popen(command, stdin=read_end, stderr=subprocess.PIPE) as running, open(write_end, "wb", 0) as pipe:
        os.close(read_end)
        for count in (1, 2, 3):
            pipe.write(bytes(8) if flags else b"0\n")
            eventually(lambda count=count: len(in_order(shared.database, source)) == count)
        pipe.close()
        assert running.wait(DEADLINE) == 0


def test_send_without_memory_ends_with_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_memory(*unused: object) -> None:
        raise MemoryError

    monkeypatch.setattr(command, "_read", no_memory)
    (tmp_path / "numbers").write_text("1")
    errors: list[str] = []
    monkeypatch.setattr(command, "print_line", lambda line, error=False: errors.append(line))
    assert command.main([str(tmp_path / "numbers")]) == 1
    assert errors == ["ringoexp send: error: not enough memory (ulimit -v limits it)"]


@pytest.mark.slow
def test_bad_line_far_into_the_file_has_its_number(tmp_path: Path) -> None:
    lines = [str(value) for value in range(200_000)]
    lines[150_000] = "oops"
    with server(tmp_path, "-p", "0", "-T", "0") as running:
        done = send(tmp_path, "--url", running.url, "--json", given="\n".join(lines).encode())
    assert "line 150001 is not" in done.stderr
    assert in_order(tmp_path / "ringoexp.db", json.loads(done.stdout)["source"]) == list(range(150_000))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--url", "http://localhost/"], "ws://HOST:PORT"),
        (["--url", "ws://localhost:99999/"], "ws://HOST:PORT"),
        (["--url", "ws://localhost:0/"], "ws://HOST:PORT"),
        (["--url", "ws://a..b:6660/"], "ws://HOST:PORT"),
        (["--url", "ws://localhost:6660/a b"], "ws://HOST:PORT"),
        (["--url", "ws://localhost:6660/\xe9"], "ws://HOST:PORT"),
        (["--url", "ws://localhost:6660/?a=1"], "ws://HOST:PORT"),
        (["--url", "ws://me:secret@localhost:6660/"], "a name or a password in it is not accepted"),
        (["--url", "ws://me:secret@localhost:99999/"], "the URL is malformed; it is not shown"),
        (["--key", "key.pem"], "requires --cert"),
        (["--url", "ws+unix::/v1.0/ingest"], "ws+unix:PATH:/v1.0/ingest"),
        (["--url", "ws+unix:///tmp/x.sock:/a b"], "ws+unix:PATH:/v1.0/ingest"),
        (["--first", "-1"], "a whole number from 0"),
        (["--source", "me"], "a UUID"),
        (["--nope"], "unrecognized arguments"),
    ],
)
def test_bad_usage_is_one_line(tmp_path: Path, flags: list[str], message: str) -> None:
    done = send(tmp_path, *flags)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("ringoexp send: error: ") and message in done.stderr
    assert "secret" not in done.stderr


@pytest.mark.parametrize("given", [b"1\r\n\r\n2\r\n", b"1\n\n2\n", b" 1 \n \n2"])
def test_empty_lines_are_skipped(shared: ServerProcess, tmp_path: Path, given: bytes) -> None:
    done = send(tmp_path, "--url", shared.url, "--json", given=given)
    assert done.returncode == 0
    assert in_order(shared.database, json.loads(done.stdout)["source"]) == [1, 2]


def test_sequence_overflow_error_names_the_limit(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0") as running:
        done = send(tmp_path, "--url", running.url, "--first", str(2**63 - 3), given=b"1\n2\n3\n4\n")
    assert done.returncode == 2 and "sequences end at 2**63 - 1" in done.stderr


def test_closed_stdin_error_is_one_line(tmp_path: Path) -> None:
    command = f"exec {sys.executable} {ROOT / 'ringoexp.py'} send <&-"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stderr) == (1, "ringoexp send: error: stdin: it is closed\n")


@pytest.mark.parametrize("streams", ["2>&-", ">/dev/full", ">&-", "2>/dev/full"])
def test_unwritable_output_does_not_stop_send(shared: ServerProcess, tmp_path: Path, streams: str) -> None:
    source = uuid.uuid4()
    flags = f"--json --source {source} --url {shared.url}"
    command = f"echo 7 | {sys.executable} {ROOT / 'ringoexp.py'} send {flags} {streams}"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stderr) == (0, "")
    assert in_order(shared.database, source) == [7]


@pytest.mark.slow
def test_connection_trouble_is_printed_once(tmp_path: Path) -> None:
    port = free_port()
    url = f"ws://localhost:{port}/v1.0/ingest"
    command = [sys.executable, str(ROOT / "ringoexp.py"), "send", "--url", url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdin and running.stderr
        running.stdin.write("1\n")
        running.stdin.close()
        first = running.stderr.readline()
        assert first.startswith(f"ringoexp send: {url}: ") and first.endswith("Connection refused; trying again\n")
        with server(tmp_path, "-p", str(port), "-T", str(port)):
            assert running.wait(DEADLINE) == 0
        assert running.stderr.read() == ""


def test_missing_file_error_is_one_line(tmp_path: Path) -> None:
    done = send(tmp_path, "nowhere")
    assert (done.returncode, done.stderr) == (1, "ringoexp send: error: nowhere: No such file or directory\n")


def test_permanent_refusal_ends_send(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0") as running:
        done = send(tmp_path, "--url", running.url.replace("ingest", "nothing"), given=b"1\n")
    assert done.returncode == 1 and "refused with HTTP status 404" in done.stderr
    assert "0 of 1 acked; send all of it again with --source " in done.stderr


def read_until(stream: BinaryIO, end: bytes) -> bytes:
    """Return the bytes of a stream up to `end`."""
    text = b""
    while end not in text:
        text += stream.read(1000)
    return text


def test_tally_says_read_until_there_is_a_connection(tmp_path: Path) -> None:
    """Only a terminal shows it."""
    port, (ours, theirs) = free_port(), os.openpty()
    command = [sys.executable, str(ROOT / "ringoexp.py"), "send", "--url", f"ws://localhost:{port}/v1.0/ingest"]
    with (
        open(ours, "rb", buffering=0) as terminal,
        subprocess.Popen(command, stdin=subprocess.PIPE, stderr=theirs, cwd=tmp_path) as running,
    ):
        os.close(theirs)
        assert running.stdin
        try:
            running.stdin.write(b"1\n" * 100_000)
            running.stdin.close()
            assert b"sent" not in Blocked(lambda: read_until(terminal, b"read, 0 acked")).result()
            with server(tmp_path, "-p", str(port), "-T", str(port)):
                Blocked(lambda: read_until(terminal, b"100,000 sent, 100,000 acked")).result()
                assert running.wait(DEADLINE) == 0
        finally:
            running.kill()


def test_records_sent_before_the_server_starts_are_stored(tmp_path: Path) -> None:
    port = free_port()
    with Producer(f"ws://localhost:{port}/v1.0/ingest") as sender:
        sender.send(range(1000))
        with pytest.raises(TimeoutError, match="1000 records are not acked"):
            sender.flush(0.05)
        with server(tmp_path, "-p", str(port), "-T", str(port)):
            sender.flush(DEADLINE)
            assert (sender.sent, sender.acked, sender.reconnects) == (1000, 1000, 0)
    assert in_order(tmp_path / "ringoexp.db", sender.source) == list(range(1000))


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["consumer", "publisher"])
def test_killed_servers_keep_exactly_once(tmp_path: Path, victim: str) -> None:
    seed = seeded()
    rng = random.Random(seed)
    ports = {"consumer": free_port(), "publisher": free_port()}
    flags = {
        "consumer": ["-I", "false", "-p", str(ports["consumer"]), "-D", "c.db"],
        "publisher": ["-p", str(ports["publisher"]), "-T", str(ports["consumer"])],
    }
    running = {role: ServerProcess(tmp_path, *flags[role]) for role in flags}
    values = array("q", rng.randbytes(8 * 400_000))
    try:
        with Producer(f"ws://localhost:{ports['publisher']}/v1.0/ingest") as sender:
            call = Blocked(lambda: sender.send(values))
            for turn in range(1, 4):
                eventually(lambda turn=turn: sender.acked > turn * 50_000, "acks")
                running[victim].kill()
                known = sender.acked
                if victim == "consumer":
                    held = {sequence for _, sequence, _ in rows(tmp_path / "c.db")}
                    assert held >= set(range(known)), "an acked record is missing"
                running[victim] = ServerProcess(tmp_path, *flags[victim])
            call.result()
            sender.flush(60)
            assert (sender.reconnects > 0) == (victim == "publisher")
    finally:
        for process in running.values():
            process.kill()
    assert in_order(tmp_path / "c.db", sender.source) == list(values)


def test_killed_sender_resumes_with_its_source(tmp_path: Path) -> None:
    """Records that were sent, but not known to be acked, are sent again and stored once."""
    source = uuid.uuid4()
    with server(tmp_path, "-p", "0", "-T", "0") as running:
        command = [sys.executable, str(ROOT / "ringoexp.py"), "send", "--url", running.url, "--source", str(source)]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as first:
            assert first.stdin
            first.stdin.write(b"".join(b"%d\n" % value for value in range(50_000)))
            first.stdin.flush()
            eventually(lambda: running.stats()["recordsStored"] > 1000)
            first.kill()
            first.stdin.close()
        assert first.returncode == -signal.SIGKILL
        rest = b"".join(b"%d\n" % value for value in range(500, 60_000))
        done = send(tmp_path, "--url", running.url, "--source", str(source), "--first", "500", given=rest)
        assert done.returncode == 0
    assert in_order(tmp_path / "ringoexp.db", source) == list(range(60_000))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_send_with_a_line_that_tells_how_to_resume(tmp_path: Path, number: signal.Signals) -> None:
    source = uuid.uuid4()
    url = f"ws://localhost:{free_port()}/v1.0/ingest"
    command = [sys.executable, str(ROOT / "ringoexp.py"), "send", "--url", url, "--source", str(source), "--first", "5"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdin and running.stderr
        running.stdin.write("1\n2\n")
        running.stdin.flush()
        assert "trying again" in running.stderr.readline(), "the lines are read"
        running.send_signal(number)
        errors = running.stderr.read()
    assert running.returncode == 128 + number
    cause = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
    expected = f"0 of 2 acked; send all of it again with --source {source} --first 5"
    assert errors == f"ringoexp send: error: {cause}\nringoexp send: {expected}\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_adds_nothing_to_what_send_prints(tmp_path: Path, number: signal.Signals) -> None:
    """The server hangs, and the closing of the connection takes a moment."""
    with socket.create_server(("localhost", 0)) as hung:
        url = f"ws://localhost:{hung.getsockname()[1]}/v1.0/ingest"
        command = [sys.executable, str(ROOT / "ringoexp.py"), "send", "--url", url]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
            assert running.stdin and running.stderr
            running.stdin.write("1\n2\n")
            running.stdin.flush()
            connection, _ = hung.accept()  # the lines are read
            with connection:
                running.send_signal(number)
                errors = [running.stderr.readline(), running.stderr.readline()]
                running.send_signal(number)
                errors += running.stderr.readlines()
    assert running.returncode == 128 + number
    assert len(errors) == 2 and "0 of 2 acked; send all of it again" in errors[1]


def test_hangup_that_nohup_ignores_does_not_end_send(shared: ServerProcess, tmp_path: Path) -> None:
    source = uuid.uuid4()
    command = ["nohup", sys.executable, str(ROOT / "ringoexp.py"), "send", "--url", shared.url, "--source", str(source)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=tmp_path) as running:
        assert running.stdin
        running.stdin.write(b"1\n2\n")
        running.stdin.flush()
        eventually(lambda: in_order(shared.database, source) == [1, 2])
        running.send_signal(signal.SIGHUP)
        running.stdin.write(b"3\n")
        running.stdin.close()
        assert running.wait(DEADLINE) == 0
    assert in_order(shared.database, source) == [1, 2, 3]


def test_ctrl_c_before_the_first_record_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*unused: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "Producer", interrupted)
    monkeypatch.setattr(sys, "stdin", open(os.devnull))
    with sys.stdin:
        assert command.main([]) == 130
    assert capsys.readouterr().err == "ringoexp send: error: interrupted\n"


def test_partial_acks_and_lost_links_keep_exactly_once() -> None:
    """Every connection is cut after some records; unacked records are sent again with the same numbers."""
    seen: dict[int, int] = {}
    links: list[int] = []
    source = uuid.uuid4()

    def answer(connection: Link) -> None:
        links.append(1)
        total = 0
        for message in connection:
            block = decode_batch(message)  # type: ignore[arg-type]
            (run,) = block.runs
            assert run.source == source.bytes
            for offset, value in enumerate(block.values):
                assert seen.setdefault(run.first + offset, value) == value
                total += 1
                if total == 700 * len(links):
                    connection.send(encode_ack(total))
                    connection.socket.shutdown(socket.SHUT_RDWR)
                    return
            connection.send(encode_ack(total))

    with peer(answer) as url, Producer(url, source) as sender:
        for start in range(0, 5000, 500):
            sender.send(range(start, start + 500))
        sender.flush(DEADLINE)
        assert sender.acked == 5000 and sender.reconnects == len(links) - 1 > 1
    assert seen == {number: number for number in range(5000)}


def test_producer_reconnects_to_a_stalled_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(producer, "STALL_TIMEOUT", 0.2)
    links: list[int] = []

    def answer(connection: Link) -> None:
        links.append(1)
        for _ in connection:
            if len(links) > 2:
                connection.send(encode_ack(3))

    with peer(answer) as url, Producer(url) as sender:
        sender.send([1, 2, 3])
        sender.flush(DEADLINE)
    assert len(links) == 3


def test_server_without_acks_is_stalled_while_records_arrive_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(producer, "STALL_TIMEOUT", 0.3)
    links: list[int] = []

    def answer(connection: Link) -> None:
        links.append(1)
        for _ in connection:
            pass

    with peer(answer) as url:
        sender = Producer(url)

        def trickled() -> bool:
            sender.send([1])
            return len(links) > 1

        eventually(trickled)
        sender.close()


def test_ctrl_c_handler_is_restored_after_the_result_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*unused: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(producer.Producer, "flush", interrupted)
    monkeypatch.setattr(sys, "stdin", open(os.devnull))
    with sys.stdin:
        assert command.main([]) == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert capsys.readouterr().err == "ringoexp send: error: interrupted\n"


def test_send_works_without_a_progress_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    progress = command._Progress(None)  # type: ignore[arg-type]
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with progress:
        pass


def test_send_waits_while_too_many_records_are_unacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(producer, "MAX_UNACKED", 10)
    monkeypatch.setattr(producer, "CHUNK_RECORDS", 5)
    gate = threading.Event()

    def answer(connection: Link) -> None:
        total = 0
        for message in connection:
            total += len(decode_batch(message).values)  # type: ignore[arg-type]
            assert gate.wait(DEADLINE)
            connection.send(encode_ack(total))

    with peer(answer) as url, Producer(url) as sender:
        sender.send(range(10))
        more = Blocked(lambda: sender.send(range(3)))
        assert more.still()
        gate.set()
        more.result()
        sender.flush(DEADLINE)
        assert sender.acked == 13


@pytest.mark.slow
def test_acks_are_progress_while_the_server_reads_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server reads and acks a little at a time; it takes longer than STALL_TIMEOUT to read a whole message."""
    monkeypatch.setattr(producer, "STALL_TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sender = Producer(f"ws://127.0.0.1:{listener.getsockname()[1]}/")
        sender.send(range(producer.CHUNK_RECORDS * 20))
        with raw_link(listener) as peer:
            start = monotonic()
            acked = 0
            while monotonic() < start + 2.0:  # four times STALL_TIMEOUT
                assert peer.recv(2048)
                acked += 10
                peer.sendall(b"\x82\x08" + encode_ack(acked))
                threading.Event().wait(0.02)  # the server reads slowly
            eventually(lambda: sender.acked == acked)
            assert sender.reconnects == 0
            sender.close()


def test_ack_beyond_sent_records_drops_the_connection() -> None:
    links: list[int] = []

    def answer(connection: Link) -> None:
        links.append(1)
        connection.recv()
        connection.send(encode_ack(3 if len(links) > 1 else 4))

    with peer(answer) as url, Producer(url) as sender:
        sender.send([1, 2, 3])
        sender.flush(DEADLINE)
    assert len(links) == 2


def test_unexpected_error_reaches_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*unused: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(producer, "ClientConnection", broken)
    sender = Producer()
    sender.send([1])
    with pytest.raises(ProducerError, match="ZeroDivisionError: a bug"):
        sender.flush(DEADLINE)
    sender.close()


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError(), r"^not enough memory \(ulimit -v limits it\)$"),
        (ZeroDivisionError("a bug"), "ZeroDivisionError: a bug"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
    ids=repr,
)
def test_message_broken_off_by_an_error_is_followed_by_nothing(
    error: BaseException, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is closed, and callers get the error. Another producer resumes."""
    seen: dict[int, int] = {}
    source = uuid.uuid4()

    def answer(connection: Link) -> None:
        total = 0
        for message in connection:
            block = decode_batch(message)
            for run in block.runs:
                for number in range(run.first, run.first + run.count):
                    assert number not in seen
                    seen[number] = block.values[number - run.first]
            total += len(block.values)
            connection.send(encode_ack(total))

    with peer(answer) as url:
        break_connections(monkeypatch, producer, error)
        sender = Producer(url, source)
        sender.send(range(1000))
        with pytest.raises(ProducerError, match=text):
            sender.flush(DEADLINE)
        with pytest.raises(ProducerError, match=text):
            sender.send(range(1000, 2000))
        sender.close()
        assert not seen and sender.acked == 0
        with Producer(url, source) as again:
            again.send(range(2000))
            again.flush(DEADLINE)
    assert seen == {number: number for number in range(2000)}


def test_close_ends_flush_while_the_server_reads_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = Producer(f"ws://127.0.0.1:{listener.getsockname()[1]}/")
        sender.send(range(producer.CHUNK_RECORDS * 60))
        with raw_link(listener):
            flush = Blocked(sender.flush)
            eventually(lambda: sender._unsent < 60 and flush.still())
            closing = Blocked(sender.close)
            with pytest.raises(ValueError, match="closed"):
                flush.result()
            closing.result(producer.STALL_TIMEOUT / 4)


def test_permanent_refusal_reaches_send_and_flush() -> None:
    def answer(connection: Link) -> None:
        connection.recv()
        connection.close(1007, "no")

    with peer(answer) as url:
        sender = Producer(url)
        sender.send([1])
        with pytest.raises(ProducerError, match="closed with 1007 no"):
            sender.flush(DEADLINE)
        with pytest.raises(ProducerError, match="closed with 1007 no"):
            sender.send([2])
        sender.close()


def test_producer_refuses_misuse() -> None:
    with pytest.raises(ValueError, match="ws://"):
        Producer("localhost:6660")
    with pytest.raises(ValueError, match="first"):
        Producer(first=-1)
    sender = Producer(f"ws://localhost:{free_port()}/")
    with pytest.raises(OverflowError):
        sender.send([1, 2**63])
    assert sender.sent == 0
    sender.close()
    sender.close()
    with pytest.raises(ValueError, match="closed"):
        sender.send([1])
    with pytest.raises(RuntimeError, match="mine"), Producer(f"ws://localhost:{free_port()}/") as other:
        other.send([1])
        raise RuntimeError("mine")
    assert not [thread for thread in threading.enumerate() if thread.name == "producer"]


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("ws://host", Target("host", 80, "/v1.0/ingest", False)),
        ("wss://HOST/", Target("host", 443, "/v1.0/ingest", True)),
        ("ws://[::1]:6660/a@b", Target("::1", 6660, "/a@b", False)),
        ("ws://[fe80::1%25eth0]:6660/", Target("fe80::1%eth0", 6660, "/v1.0/ingest", False)),
        ("wss://[FE80::1%Eth0]", Target("fe80::1%Eth0", 443, "/v1.0/ingest", True)),
        ("ws+unix:/tmp/me@x.sock:/v1.0/ingest", Target("unix:/tmp/me@x.sock", 80, "/v1.0/ingest", False)),
        ("ws+unix:///tmp/x.sock", Target("unix:/tmp/x.sock", 80, "/v1.0/ingest", False)),
    ],
)
def test_parse_url_returns_the_parts(url: str, target: Target) -> None:
    assert parse_url(url) == target


@pytest.mark.parametrize("path", ["", "/", "/v1.0/ingest"])
def test_url_path_may_be_left_out(tmp_path: Path, path: str) -> None:
    with server(tmp_path, "-p", "0", "-T", "0") as running:
        with Producer(f"ws://localhost:{running.port}{path}") as producer:
            producer.send([1])
        assert producer.acked == 1


def test_http_answer_without_upgrade_is_permanent(tmp_path: Path) -> None:
    """A status of 200 or a redirect would be the same for the next attempt."""
    with server(tmp_path, "-p", "0", "-T", "0") as running:
        url = f"ws://localhost:{running.port}/v1.0/alive"
        with pytest.raises(ProducerError, match="HTTP status 200: is that the /v1.0/ingest of a ringoexp"):
            with Producer(url) as producer:
                producer.send([1])


# Forks, and the end of the program. Each test runs a script: a fork of the tests would copy their threads.


def run_script(script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a Python script, which finds `Producer` and the module `producer` imported, to its end."""
    start = "import os, sys, time, uuid; from ringolib.client import producer; from ringolib.client.producer import *; "
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{start}\n{script}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Exception ignored" not in done.stderr
    return done


CHILDREN = """
def in_child(work):
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
        except producer.ProducerError as error:
            status = 42 if "after a fork" in str(error) else 2
        finally:
            os._exit(status)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return "hangs"
"""
"""Code for scripts: `in_child` returns 42 if `work` raises the ProducerError of another process, in a child."""


@pytest.mark.slow
def test_child_gets_an_error_while_the_parent_is_sending(shared: ServerProcess) -> None:
    """The lock may be locked at the fork, and the thread is missing in the child."""
    source = uuid.uuid4()
    script = f"""{CHILDREN}
import threading
sender = Producer(sys.argv[1], uuid.UUID(sys.argv[2]))
def send_all():
    for start in range(0, 200_000, 100):
        sender.send(range(start, start + 100))
sending = threading.Thread(target=send_all)
sending.start()
statuses = [in_child(lambda: sender.send([1])) for _ in range(20)]
statuses += [in_child(sender.flush) for _ in range(20)]
sending.join()
sender.flush()
sender.close()
print(set(statuses), sender.acked, sender.reconnects)
"""
    done = run_script(script, shared.url, str(source))
    assert (done.stdout, done.stderr) == ("{42} 200000 0\n", "")
    assert in_order(shared.database, source) == list(range(200_000))


@pytest.mark.parametrize("end", ["sender.close()", "sys.exit()", "pass"])
def test_child_that_ends_leaves_the_connection_of_its_parent(shared: ServerProcess, end: str) -> None:
    """The child closes the producer, leaves the `with` block, or ends without both: only the parent may flush."""
    source = uuid.uuid4()
    script = f"""
with Producer(sys.argv[1], uuid.UUID(sys.argv[2])) as sender:
    sender.send([1])
    sender.flush()
    child = os.fork()
    if not child:
        {end}
        sys.exit()
    os.waitpid(child, 0)
    sender.send([2])
print(sender.acked, sender.reconnects)
"""
    done = run_script(script, shared.url, str(source))
    assert (done.stdout, done.stderr) == ("2 0\n", "")
    assert in_order(shared.database, source) == [1, 2]


def test_child_sends_with_a_producer_of_its_own(shared: ServerProcess) -> None:
    source = uuid.uuid4()
    script = f"""{CHILDREN}
parents = Producer(sys.argv[1])
def work():
    with Producer(sys.argv[1], uuid.UUID(sys.argv[2])) as sender:
        sender.send([1, 2])
    os._exit(7)
print(in_child(work))
parents.close()
"""
    assert run_script(script, shared.url, str(source)).stdout == "7\n"
    assert in_order(shared.database, source) == [1, 2]


@pytest.mark.parametrize(
    "end", ["", "raise SystemExit(0)", "sys.exit()", "with sender: raise SystemExit", "raise KeyError"]
)
def test_program_that_ends_without_flush_stores_its_records(shared: ServerProcess, end: str) -> None:
    source = uuid.uuid4()
    script = f"""
sender = Producer(sys.argv[1], uuid.UUID(sys.argv[2]))
sender.send(range(100_000))
{end}
"""
    done = run_script(script, shared.url, str(source))
    assert "not acked" not in done.stderr
    assert in_order(shared.database, source) == list(range(100_000))


@pytest.mark.parametrize("end", ["", "sender.close()", "with sender: raise SystemExit", "raise KeyError('mine')"])
def test_records_without_ack_are_reported_at_the_end(end: str) -> None:
    """Within a bounded time, with all that another producer needs to resume."""
    source = uuid.uuid4()
    url = f"ws://localhost:{free_port()}/v1.0/ingest"
    script = f"""
producer.EXIT_FLUSH_SECONDS = 0.5
senders = [Producer(sys.argv[1], uuid.UUID(sys.argv[2]), 7) for _ in range(20)]
senders[0].send(range(3))
sender = Producer(sys.argv[1], uuid.UUID(sys.argv[2]), 7)
sender.send(range(1000))
senders.pop(0).close(report=False)
while "refused" not in str(sender.trouble):  # at the first attempt
    time.sleep(0.01)
{end}
"""
    started = monotonic()
    done = run_script(script, url, str(source))
    assert monotonic() - started < 10
    (line,) = [line for line in done.stderr.splitlines() if "not acked" in line]
    assert line.startswith(f"ringoexp Producer: 1000 of 1000 records are not acked by {url} (")
    assert line.endswith(f"Connection refused): send all values again with source {source} and first 7")
    assert ("Traceback" in done.stderr) == ("KeyError" in end)


def test_report_names_the_number_to_resume_with(capsys: pytest.CaptureFixture[str]) -> None:
    def answer(connection: Link) -> None:
        connection.recv()
        connection.send(encode_ack(3))
        connection.recv()

    with peer(answer) as url:
        sender = Producer(url, first=100)
        sender.send(range(10))
        eventually(lambda: sender.acked == 3)
        sender.close()
        sender.close()
    expected = f"7 of 10 records are not acked by {url}: send the values after the first 3 with source "
    assert capsys.readouterr().err == f"ringoexp Producer: {expected}{sender.source} and first 103\n"


def test_closed_producer_with_all_acks_reports_nothing(
    shared: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    with Producer(shared.url) as sender:
        sender.send([1])
    assert capsys.readouterr() == ("", "")
    assert not producer._open_producers


STDERRS = {
    "without an encoding": "type('Tee', (), {'write': lambda self, text: sys.__stderr__.write(text)})()",
    "closed": "open(os.devnull, 'w'); sys.stderr.close()",
    "full": "open('/dev/full', 'w')",
    "missing": "None",
}


@pytest.mark.parametrize("stderr", STDERRS)
def test_report_leaves_the_stderr_of_the_program_as_it_is(stderr: str) -> None:
    script = f"""
sender = Producer("ws://localhost:{free_port()}")
sender.send([1])
sys.stderr = {STDERRS[stderr]}
sender.close()
if "full" in repr(sys.stderr):
    print(os.readlink(f"/proc/self/fd/{{sys.stderr.fileno()}}"))
"""
    done = run_script(script)
    assert done.returncode in (0, 120)  # 120: Python cannot flush the full stderr
    assert ("1 of 1 records are not acked" in done.stderr) == (stderr == "without an encoding")
    assert done.stdout == ("/dev/full\n" if stderr == "full" else "")


@pytest.mark.parametrize("interrupts", [1, 2])
def test_ctrl_c_at_the_end_shortens_the_wait_and_not_the_report(interrupts: int) -> None:
    """The first ends the wait for acks, the second the wait for the closing of the connection."""
    with socket.create_server(("localhost", 0)) as hung:
        script = f"""
import signal
producer.EXIT_CLOSE_SECONDS = 10
signals = iter([signal.SIGINT] * {interrupts})
wait_until, join = producer.wait_until, threading.Thread.join
def wait_and_interrupt(*arguments):
    if threading.current_thread() is threading.main_thread():
        signal.raise_signal(next(signals))
    return wait_until(*arguments)
def join_and_interrupt(thread, timeout=None):
    if thread.name == "producer":
        for number in signals:
            signal.raise_signal(number)
        timeout = 0.01
    join(thread, timeout)
producer.wait_until, threading.Thread.join = wait_and_interrupt, join_and_interrupt
sender = Producer("ws://localhost:{hung.getsockname()[1]}")
sender.send([1])
"""
        done = run_script(f"import threading{script}")
    (line,) = done.stderr.splitlines()
    assert "1 of 1 records are not acked" in line and done.returncode == 0


def test_block_with_an_exception_does_not_wait_for_a_hung_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(producer, "EXIT_CLOSE_SECONDS", 0.1)
    with socket.create_server(("localhost", 0)) as hung:
        with pytest.raises(KeyError), Producer(f"ws://localhost:{hung.getsockname()[1]}") as sender:
            sender.send([1])
            raise KeyError
        assert sender._thread.is_alive(), "it still waits for the server, and ends by itself"
    eventually(lambda: not sender._thread.is_alive())
    assert sender._wakeup.fileno() == sender._wakeup_reader.fileno() == -1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_child_of_multiprocessing_stores_its_records_at_its_end(
    shared: ServerProcess, tmp_path: Path, method: str
) -> None:
    """It does not flush, and its last records come from a thread that outlives its main function."""
    source = uuid.uuid4()
    script = f"""
import multiprocessing, threading, time, uuid
from ringoexp import Producer

def work():
    sender = Producer({shared.url!r}, uuid.UUID({str(source)!r}))
    sender.send([1, 2])
    def send_later():
        threading.main_thread().join(0.1)
        sender.send([3])
    threading.Thread(target=send_later).start()

if __name__ == "__main__":
    child = multiprocessing.get_context({method!r}).Process(target=work)
    child.start()
    child.join()
    print(child.exitcode)
"""
    (tmp_path / "parent.py").write_text(script)
    command = [sys.executable, "-W", "ignore", str(tmp_path / "parent.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("0\n", "")
    assert in_order(shared.database, source) == [1, 2, 3]
