"""`ringoexp send` as its users see it: on terminals, with integers as arguments, waiting, giving up and resuming."""

import json
import re
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.fake_consumer import Link, fake_consumer
from support.harness import DEADLINE, ROOT, ServerProcess, eventually, free_port, rows, server
from support.scripted_server import ScriptedServer
from support.terminal import Terminal

from ringolib.client.send_options import make_parser, parse_arguments, resume_command
from ringolib.wire import encode_ack

SEND = [sys.executable, str(ROOT / "ringoexp.py"), "send"]
ERASE = "\r\x1b[K"


def send(directory: Path, *flags: str, given: bytes = b"") -> "subprocess.CompletedProcess[str]":
    """Run `ringoexp send` with these flags and this input to its end."""
    done = subprocess.run([*SEND, *flags], cwd=directory, input=given, capture_output=True, timeout=DEADLINE)
    assert b"Traceback" not in done.stderr
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def stored(database: Path, source: str) -> list[tuple[int, int]]:
    """Return the numbers and values of a source, in order."""
    return sorted((sequence, value) for owner, sequence, value in rows(database) if owner == source)


@contextmanager
def peer(answer: Callable[[Link], object]) -> Iterator[str]:
    """Run a server that calls `answer` for each connection, and yield its URL."""
    with fake_consumer(answer) as port:
        yield f"ws://localhost:{port}/v1.0/ingest"


def absorb(link: Link) -> None:
    """Read all messages, and ack none."""
    for _ in link:
        pass


def absent() -> str:
    """Return a URL at which there is no server."""
    return f"ws://localhost:{free_port()}/v1.0/ingest"


# Integers as arguments.


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        (["42", "-7"], [42, -7]),
        (["-7"], [-7]),
        (["-7", "42", "-8"], [-7, 42, -8]),
        (["--", "-7"], [-7]),
        (["1", "--", "-7"], [1, -7]),
        (["--", "--json"], [4]),
        (["--first", "3", "1", "--json", "-2"], [1, -2]),
        ([str(-(2**63))], [-(2**63)]),
        (["file"], [1, 2]),
        (["17"], [3]),  # a file
    ],
)
def test_integers_are_sent_unless_a_file_has_that_name(
    shared: ServerProcess, tmp_path: Path, arguments: list[str], values: list[int]
) -> None:
    (tmp_path / "file").write_text("1\n2\n")
    (tmp_path / "17").write_text("3\n")
    (tmp_path / "--json").write_text("4\n")
    done = send(tmp_path, "--url", shared.url, "--json", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    summary = json.loads(done.stdout)
    assert stored(shared.database, summary["source"]) == list(enumerate(values, summary["first"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["17", "1"], "'17' is a file"),
        (["1", "2.5"], "'2.5' is neither a file nor a whole number of 64 bits"),
        (["99999999999999999999"], "is neither a file nor a whole number of 64 bits"),
        (["--binary", "1"], "--binary is for a file or stdin"),
        (["--timeout", "0"], "a number of seconds above 0"),
        (["--timeout", "nan"], "a number of seconds above 0"),
        (["--skip", "-1"], "a whole number"),
        (["-7x"], "'-7x' is not a flag ("),
        (["--tokn_file=x", "7"], "'--tokn_file' is not a flag: did you mean --token_file? ("),
        (["--skipp", "5", "7"], "'--skipp' is not a flag: did you mean --skip? ("),
    ],
)
def test_other_arguments_are_refused_in_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "17").write_text("3\n")
    done = send(tmp_path, "--url", absent(), *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert message in done.stderr


# Input.


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_text_of_windows_is_sent_or_its_encoding_is_named(shared: ServerProcess, tmp_path: Path, encoding: str) -> None:
    (tmp_path / "file").write_bytes("1\r\n-2\r\n".encode(encoding))
    done = send(tmp_path, "--url", shared.url, "--json", "file")
    if encoding == "utf-8-sig":
        assert (done.returncode, done.stderr) == (0, "")
        assert stored(shared.database, json.loads(done.stdout)["source"]) == [(0, 1), (1, -2)]
    else:
        assert done.returncode == 2 and "UTF-16 text: convert it to UTF-8" in done.stderr
        assert json.loads(done.stdout)["sent"] == 0


@pytest.mark.slow
def test_counts_of_the_summary_are_read_sent_and_acked(tmp_path: Path) -> None:
    with peer(absorb) as url:
        done = send(tmp_path, "--url", url, "--json", "--timeout", "0.3", "--first", "7", "1", "2")
    summary = json.loads(done.stdout)
    assert [summary[key] for key in ("first", "read", "sent", "acked")] == [7, 2, 2, 0]
    done = send(tmp_path, "--url", absent(), "--json", "--timeout", "0.3", "1", "2")
    summary = json.loads(done.stdout)
    assert [summary[key] for key in ("read", "sent", "acked")] == [2, 0, 0]


# Giving up, and resuming.


@pytest.mark.parametrize("given", [b"", b"1\n" * 2_000_000])
def test_timeout_ends_send_while_the_server_is_away(tmp_path: Path, given: bytes) -> None:
    """It waits for acks, or for room in memory."""
    arguments = [] if given else ["1", "2"]
    done = send(tmp_path, "--url", absent(), "--timeout", "0.5", *arguments, given=given)
    assert done.returncode == 4
    reason = "no integer was acked within 0.5 s: connection refused; nothing was sent"
    assert done.stderr.splitlines()[-1] == f"ringoexp send: error: {reason}"


def test_timeout_ends_send_while_it_waits_for_input(tmp_path: Path) -> None:
    command = [*SEND, "--url", absent(), "--timeout", "0.5"]
    with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as running:
        assert running.stdin
        running.stdin.write(b"1\n")
        running.stdin.flush()
        assert running.wait(DEADLINE) == 4


def test_timeout_works_if_its_signal_was_ignored_before(tmp_path: Path) -> None:
    command = shlex.join([*SEND, "--url", absent(), "--timeout", "0.5", "1"])
    done = subprocess.run(["sh", "-c", f"trap '' ALRM; exec {command}"], cwd=tmp_path, timeout=DEADLINE)
    assert done.returncode == 4


def test_timeout_does_not_count_time_without_input(shared: ServerProcess, tmp_path: Path) -> None:
    command = [*SEND, "--url", shared.url, "--timeout", "0.4", "--json"]
    with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdin and running.stdout
        running.stdin.write(b"1\n")
        running.stdin.flush()
        with pytest.raises(subprocess.TimeoutExpired):
            running.wait(1.5)
        running.stdin.write(b"2\n")
        running.stdin.close()
        assert running.wait(DEADLINE) == 0
        assert json.loads(running.stdout.read())["acked"] == 2


def resume_line(errors: str) -> str:
    """Return the command that `send` printed in its last line."""
    hint, command = errors.splitlines()[-2:]
    assert hint.startswith("ringoexp send: ") and "to resume" in hint and command.startswith("  ")
    return command


@pytest.mark.slow
@pytest.mark.parametrize("name", ["numbers", "it's $HOME; x", "-7", "--json"])
def test_resume_command_sends_the_rest_once(tmp_path: Path, name: str) -> None:
    """The input has a bad line. The user corrects it, and pastes the command into a shell."""
    lines = [f"{value}\n" for value in range(100)]
    (tmp_path / name).write_text("".join([*lines[:60], "oops\n"]))
    with server(tmp_path, "-p", "0", "-T", "0") as running:
        first = send(tmp_path, "--url", running.url, "--first", "10", "--skip", "5", "--", name)
        assert first.returncode == 2
        (tmp_path / name).write_text("".join(lines))
        command = resume_line(first.stderr)
        done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE)
        assert (done.returncode, done.stderr) == (0, "")
    source = re.findall(r"--source (\S+)", command)[0]
    assert stored(tmp_path / "ringoexp.db", source) == [(10 + value, value) for value in range(5, 100)]


def test_resume_command_of_piped_input_skips_what_is_acked(shared: ServerProcess, tmp_path: Path) -> None:
    first = send(tmp_path, "--url", shared.url, given=b"1\n2\nx\n")
    command = resume_line(first.stderr)
    assert " --skip 2" in command
    done = subprocess.run(f"printf '1\\n2\\n3\\n' | {command}", shell=True, cwd=tmp_path, timeout=DEADLINE)
    source = re.findall(r"--source (\S+)", command)[0]
    assert done.returncode == 0 and stored(shared.database, source) == [(0, 1), (1, 2), (2, 3)]


def test_resume_command_repeats_the_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {
        "--url": "ws+unix:/tmp/a b:/",
        "--token_file": "my token",
        "--ca": "-ca",
        "--cert": "c'ert",
        "--key": "$key",
        "--timeout": "1.5",
        "--first": "3",
    }
    source = "00000000-0000-0000-0000-000000000001"
    words = [f"{flag}={value}" for flag, value in flags.items()]
    parser = make_parser()
    given = parse_arguments(parser, [*words, "--binary", "--json", "--source", source, "--skip", "4", "42", "-7"])
    monkeypatch.setattr(sys, "argv", ["/nowhere/ringoexp.py"])
    command = shlex.split(resume_command(given, given.source, 2, typed=False))
    assert command[:3] == [sys.executable, "/nowhere/ringoexp.py", "send"]
    again = parse_arguments(parser, command[3:])
    given.skip += 2
    assert again == given
    typed = parse_arguments(parser, shlex.split(resume_command(given, given.source, 2, typed=True))[3:])
    assert (typed.first, typed.skip) == (3 + 6 + 2, 0)


@pytest.mark.parametrize("case", ["400", "401", "403", "missing key", "binary", "token"])
def test_hints_name_only_flags_of_send(case: str, tmp_path: Path) -> None:
    known = {flag for action in make_parser()._actions for flag in action.option_strings}
    (tmp_path / "empty").write_text("")
    flags = {
        "missing key": ["--url", "wss://localhost:1/", "--cert", str(tmp_path / "empty")],
        "token": ["--token_file", "empty"],
        "binary": ["--url", absent()],
    }
    if case.isdigit():
        with ScriptedServer(b"HTTP/1.1 %s No\r\nContent-Length: 0\r\n\r\n" % case.encode()) as refusing:
            done = send(tmp_path, "--url", f"ws://127.0.0.1:{refusing.port}/", "1")
    else:
        done = send(tmp_path, *flags[case], given=bytes(9))
    assert done.returncode in (1, 2)
    hinted = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", done.stderr)) - {"-f", "-t"}  # of iconv
    assert hinted <= known, done.stderr
    assert "send:" not in done.stderr.replace("ringoexp send:", "")


def test_every_flag_in_texts_for_clients_is_one_of_send() -> None:
    """Or the text has a part for `send`."""
    known = {flag for action in make_parser()._actions for flag in action.option_strings}
    for path in (*(ROOT / "ringolib/client").glob("*.py"), ROOT / "ringolib/net/websocket.py"):
        if path.name == "read.py":  # it has flags of its own
            continue
        for text in re.findall(r'"([^"\n]*)"', path.read_text()):
            if "send: " not in text.removeprefix("ringoexp send: "):
                assert set(re.findall(r"--[a-z_-]+", text)) <= known, text


# Terminals.


def drawn(output: str) -> list[str]:
    """Return the lines that were drawn. Nothing but ERASE controls the terminal."""
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", output.replace(ERASE, "").replace("\r\n", "")), repr(output)
    return [line for line in re.split(r"\r\x1b\[K|\r\n", output) if line]


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    (tmp_path / "numbers").write_text("".join(f"{n}\n" for n in range(100_000)))
    return tmp_path / "numbers"


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 40])
def test_terminal_shows_the_server_gone_and_back(tmp_path: Path, numbers: Path, columns: int) -> None:
    port = free_port()
    with Terminal([*SEND, "--url", f"ws://localhost:{port}", "numbers"], tmp_path, columns) as terminal:
        terminal.read_until(": connection refused")
        terminal.read_until(", 1 s")
        with server(tmp_path, "-p", str(port), "-T", str(port)):
            terminal.read_until("100,000 read, 100,000 sent, 100,000 acked in ")
            assert terminal.finish() == 0
    lines = drawn(terminal.output)
    assert all(len(line) <= columns for line in lines if "acked in" not in line)
    assert any(line.startswith("waiting for the server, 1 s:" if columns == 80 else "waiting, 1 s:") for line in lines)
    assert not any(" sent" in line for line in lines if "waiting" in line and "0 sent" not in line), "nothing is sent"


@pytest.mark.slow
def test_terminal_shows_a_bar_that_follows_its_width(tmp_path: Path, numbers: Path) -> None:
    acked = threading.Semaphore(0)

    def ack_some(link: Link) -> None:
        link.recv()
        for part in (1000, 2000):
            link.send(encode_ack(part))
            acked.acquire(timeout=DEADLINE)

    with peer(ack_some) as url, Terminal([*SEND, "--url", url, "numbers"], tmp_path) as terminal:
        terminal.read_until("  1% [----------")
        assert "100,000 read" in terminal.output
        terminal.resize(40)
        acked.release()
        terminal.read_until("  2% [")
        terminal.type("\x03")
        assert terminal.finish() == 130
        acked.release()
    last = [line for line in drawn(terminal.output) if "% [" in line][-1]
    assert len(last.rstrip("^C")) <= 37
    assert "--skip 2000 numbers" in terminal.output


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"NO_COLOR": ""}, {"TERM": "vt100"}])
def test_terminal_output_has_no_colours(tmp_path: Path, environment: dict[str, str], shared: ServerProcess) -> None:
    with Terminal([*SEND, "--url", shared.url, "1"], tmp_path, env=environment) as terminal:
        assert terminal.finish() == 0
    assert re.fullmatch(r"\r\x1b\[K1 read, 1 sent, 1 acked in \d\.\d s\r\n", terminal.output)


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": ""}])
def test_dumb_terminal_gets_plain_lines(tmp_path: Path, environment: dict[str, str]) -> None:
    url = absent()
    with Terminal([*SEND, "--url", url, "--timeout", "1", "1"], tmp_path, env=environment) as terminal:
        assert terminal.finish() == 4
    first, last = terminal.output.splitlines()
    assert first == f"ringoexp send: {url}: connection refused; trying again"
    assert last.startswith("ringoexp send: error: no integer was acked within 1 s")


def test_errors_in_a_file_are_plain_lines(tmp_path: Path) -> None:
    """Stdin and stdout are a terminal."""
    command = shlex.join([*SEND, "--url", absent(), "--timeout", "1"])
    with Terminal(["sh", "-c", f"{command} 2> errors"], tmp_path) as terminal:
        terminal.type("1\n")
        assert terminal.finish() == 4
    assert (tmp_path / "errors").read_text().count("\n") == 2 and "\x1b" not in (tmp_path / "errors").read_text()
    assert terminal.output == "1\r\n"


def test_background_job_does_not_draw(tmp_path: Path) -> None:
    url = absent()
    command = shlex.join([*SEND, "--url", url, "--timeout", "1.5", "1"])
    with Terminal(["sh", "-c", f"set -m; {command} & wait $!"], tmp_path) as terminal:
        assert terminal.finish() == 4
    lines = terminal.output.splitlines()
    assert ERASE not in terminal.output and f"ringoexp send: {url}: connection refused; trying again" in lines


def test_typed_input_is_not_drawn_over(tmp_path: Path) -> None:
    port = free_port()
    url = f"ws://localhost:{port}"
    with Terminal([*SEND, "--url", url], tmp_path) as terminal:
        terminal.read_until("type integers, one a line; Ctrl-D on an empty line ends the input\r\n")
        terminal.type("42\n")
        terminal.read_until(f"ringoexp send: {url}: connection refused; trying again\r\n")
        terminal.type("7")
        with server(tmp_path, "-p", str(port), "-T", str(port)) as running:
            eventually(lambda: running.stats()["recordsStored"] == 1)
            assert not terminal.output.partition("trying again\r\n")[2].strip("7"), "the line is being typed"
            terminal.type("8\n")
            terminal.read_until("all integers so far are acked\r\n")
            terminal.type("\x04")
            terminal.read_until("2 read, 2 sent, 2 acked in ")
            assert terminal.finish() == 0
    before = terminal.output.rpartition(ERASE)[0]
    assert "\x1b" not in before
    assert before.splitlines()[1:] == [
        "42",
        f"ringoexp send: {url}: connection refused; trying again",
        "78",
        f"ringoexp send: {url}: all integers so far are acked",
    ]


def test_ctrl_c_while_typing_tells_how_to_go_on(tmp_path: Path) -> None:
    acked = threading.Event()

    def ack(link: Link) -> None:
        link.recv()
        link.send(encode_ack(1))
        link.ping().wait(DEADLINE)
        acked.set()
        absorb(link)

    with peer(ack) as url, Terminal([*SEND, "--url", url], tmp_path) as terminal:
        terminal.read_until("ends the input\r\n")
        terminal.type("1\n")
        assert acked.wait(DEADLINE)
        terminal.type("22")
        terminal.read_until("22")
        terminal.type("\x03")
        assert terminal.finish() == 130
    tail = terminal.output.rpartition(ERASE)[2]
    assert "1 read, 1 sent, 1 acked in" in tail and "error: interrupted\r\n" in tail
    assert "to resume, type the integers after the first 1 into:\r\n" in tail and "--first 1\r\n" in tail


@pytest.mark.slow
def test_waiting_line_has_the_reason_of_the_server(tmp_path: Path) -> None:
    """The publisher accepts the integers, and its consumer is unreachable."""
    away = free_port()
    with server(tmp_path, "-p", "0", "-T", str(away)) as running:
        with Terminal([*SEND, "--url", running.url, "1"], tmp_path, 120) as terminal:
            terminal.read_until(
                f"s: consumer unreachable: localhost:{away}: Connection refused (1 read, 1 sent, 0 acked)"
            )
            terminal.type("\x03")
            assert terminal.finish() == 130
        assert "waiting for acks, " in terminal.output
        done = send(tmp_path, "--url", running.url, "--timeout", "4", "1")
        assert done.returncode == 4 and "consumer unreachable" in done.stderr.splitlines()[0]


@pytest.mark.slow
def test_waiting_line_says_that_the_server_hangs(tmp_path: Path) -> None:
    with socket.create_server(("localhost", 0)) as hung:
        url = f"ws://localhost:{hung.getsockname()[1]}/v1.0/ingest"
        with Terminal([*SEND, "--url", url, "1"], tmp_path) as terminal:
            terminal.read_until("waiting for the server, ")
            terminal.read_until("the server does not answer")


def test_progress_goes_on_after_ctrl_z(tmp_path: Path) -> None:
    """A shell with job control stops the job and continues it."""
    command = shlex.join([*SEND, "--url", absent(), "1"])
    with Terminal(["bash", "--norc", "-c", f"set -m; {command}; fg"], tmp_path) as terminal:
        terminal.read_until("waiting for the server")
        terminal.type("\x1a")
        terminal.read_until("Stopped")
        terminal.read_until("waiting for the server")
        terminal.type("\x03")
        terminal.read_until("error: interrupted")
