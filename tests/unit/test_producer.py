"""`ringoexp send` and its Producer: every record is stored once and in order, whatever fails."""

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import pytest
from support.both_producers import run_program
from support.fake_consumer import Link, fake_consumer
from support.harness import (
    DEADLINE,
    ROOT,
    ServerProcess,
    eventually,
    free_port,
    in_order,
    server,
)
from support.short_times import shorten_times

from ringolib.client import numbers_input, producer
from ringolib.client import send as command
from ringolib.client.producer import Producer
from ringolib.client.url import Target, parse_url
from ringolib.wire import encode_ack


@pytest.fixture(autouse=True)
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_times(monkeypatch, 0.005, 0.05)
    monkeypatch.setattr(producer, "EXIT_FLUSH_SECONDS", 0.2)


def send(directory: Path, *flags: str, given: bytes = b"") -> "subprocess.CompletedProcess[str]":
    """Run `ringoexp send` with these flags and this input to its end."""
    command = [sys.executable, str(ROOT / "ringoexp.py"), "send", *flags]
    done = subprocess.run(command, cwd=directory, input=given, capture_output=True, timeout=60)
    assert b"Traceback" not in done.stderr
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


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
    assert [summary[key] for key in ("read", "sent", "acked", "reconnects")] == [len(values)] * 3 + [0]
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
    error, hint, command = done.stderr.splitlines()
    assert done.returncode == 2
    assert "line 4 is not a whole number" in error and (bad in error or "\\" in error)
    assert hint == "ringoexp send: 2 read, 2 sent, 2 acked; to resume, pipe all of the same input into:"
    assert command.endswith(f" --json --source {summary['source']} --skip 2")
    assert in_order(shared.database, json.loads(done.stdout)["source"]) == [7, -8]


@pytest.mark.parametrize("start", [b"7" * 40, bytes(40), b"x"])
def test_input_without_newlines_ends_send_at_once_in_flat_memory(tmp_path: Path, start: bytes) -> None:
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
    assert "--binary" in error
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

    monkeypatch.setattr(numbers_input, "read_piece", no_memory)
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
        (["--url", "ftp://localhost/"], "ws://HOST:PORT"),
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
        (["--nope"], "'--nope' is not a flag ("),
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
        assert first.startswith(f"ringoexp send: {url}: ") and first.endswith(": connection refused; trying again\n")
        with server(tmp_path, "-p", str(port), "-T", str(port)):
            assert running.wait(DEADLINE) == 0
        assert running.stderr.read() == ""


def test_missing_file_error_is_one_line(tmp_path: Path) -> None:
    done = send(tmp_path, "nowhere")
    reason = "No such file or directory, and it is no whole number of 64 bits either"
    assert (done.returncode, done.stderr) == (1, f"ringoexp send: error: nowhere: {reason}\n")


def test_permanent_refusal_ends_send(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0") as running:
        done = send(tmp_path, "--url", running.url.replace("ingest", "nothing"), given=b"1\n")
    assert done.returncode == 1 and "refused with HTTP status 404" in done.stderr
    assert done.stderr.endswith("; nothing was sent\n"), "and so there is no command to resume"


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
    acked = threading.Event()

    def ack_one(link: Link) -> None:
        link.recv()
        link.send(encode_ack(1))
        acked.set()
        link.recv()

    with peer(ack_one) as url:
        flags = ["--url", url, "--source", str(source), "--first", "5", "--skip", "1"]
        command = [sys.executable, str(ROOT / "ringoexp.py"), "send", *flags]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
            assert running.stdin and running.stderr
            running.stdin.write("0\n1\n2\n")
            running.stdin.flush()
            assert acked.wait(DEADLINE)
            running.send_signal(number)
            error, hint, resume = running.stderr.read().splitlines()
    assert running.returncode == 128 + number
    cause = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
    assert error == f"ringoexp send: error: {cause}"
    assert re.fullmatch(r"ringoexp send: 2 read, 2 sent, [01] acked; to resume, pipe all of the same input into:", hint)
    assert re.search(rf" send --url \S+ --source {source} --first 5 --skip [12]$", resume)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_before_anything_was_sent_ends_send_with_one_line(tmp_path: Path, number: signal.Signals) -> None:
    url = f"ws://localhost:{free_port()}/v1.0/ingest"
    command = [sys.executable, str(ROOT / "ringoexp.py"), "send", "--url", url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdin and running.stderr
        running.stdin.write("1\n2\n")
        running.stdin.flush()
        assert "trying again" in running.stderr.readline(), "the lines are read"
        running.send_signal(number)
        errors = running.stderr.read()
    assert running.returncode == 128 + number
    cause = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
    reason = "while it waited for the server: connection refused; nothing was sent"
    assert errors == f"ringoexp send: error: {cause} {reason}\n"


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
                errors = [running.stderr.readline()]
                running.send_signal(number)
                errors += running.stderr.readlines()
    assert running.returncode == 128 + number
    assert len(errors) == 1 and "; nothing was sent" in errors[0]


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


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("ws://host", Target("host", 80, "/v1.0/ingest", False)),
        ("wss://HOST/", Target("host", 443, "/v1.0/ingest", True)),
        ("http://localhost:6660/", Target("localhost", 6660, "/v1.0/ingest", False)),
        ("https://host", Target("host", 443, "/v1.0/ingest", True)),
        ("ws://[::1]:6660/a@b", Target("::1", 6660, "/a@b", False)),
        ("ws://[fe80::1%25eth0]:6660/", Target("fe80::1%eth0", 6660, "/v1.0/ingest", False)),
        ("wss://[FE80::1%Eth0]", Target("fe80::1%Eth0", 443, "/v1.0/ingest", True)),
        ("ws+unix:/tmp/me@x.sock:/v1.0/ingest", Target("unix:/tmp/me@x.sock", 80, "/v1.0/ingest", False)),
        ("ws+unix:///tmp/x.sock", Target("unix:/tmp/x.sock", 80, "/v1.0/ingest", False)),
    ],
)
def test_parse_url_returns_the_parts(url: str, target: Target) -> None:
    assert parse_url(url) == target


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
    assert ("1 of 1 record is not acked" in done.stderr) == (stderr == "without an encoding")
    assert done.stdout == ("/dev/full\n" if stderr == "full" else "")


@pytest.mark.parametrize("interrupts", [1, 2])
def test_ctrl_c_at_the_end_shortens_the_wait_and_not_the_report(interrupts: int) -> None:
    """The first ends the wait for acks, the second the wait for the closing of the connection."""
    with socket.create_server(("localhost", 0)) as hung:
        script = f"""
import signal
producer.EXIT_CLOSE_SECONDS = 10
signals = iter([signal.SIGINT] * {interrupts})
sender = Producer("ws://localhost:{hung.getsockname()[1]}")
sender.send([1])
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
"""
        done = run_script(f"import threading{script}")
    (line,) = done.stderr.splitlines()
    assert "1 of 1 record is not acked" in line and done.returncode == 0


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
    done = run_program(tmp_path, script)
    assert (done.stdout, done.stderr) == ("0\n", "")
    assert in_order(shared.database, source) == [1, 2, 3]
