"""A server on a terminal: its lines are for people. The terminal is a real pseudo-terminal (pty(7))."""

import json
import re
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from support.harness import DEADLINE, ROOT, free_port, request, server
from support.terminal import Terminal

TIME = r"\d\d:\d\d:\d\d"


class ServerTerminal(Terminal):
    """A server whose stdin, stdout and stderr are a terminal."""

    def __init__(self, directory: Path, *flags: str, env: Mapping[str, str] | None = None, patch: str = "pass") -> None:
        start = f"import sys; sys.path[0] = {str(ROOT)!r}; import ringoexp; from ringolib import status, app; "
        imports = "import ringolib.status.look, ringolib.status.logs; "
        command = [sys.executable, "-c", f"{start}{imports}{patch}; sys.exit(ringoexp.main())", *flags]
        super().__init__(command, directory, env={"NO_COLOR": "", "PYTHONUTF8": "1", **(env or {})})

    def until(self, pattern: str) -> str:
        """Read until the output has this pattern, and return all of it."""
        deadline = time.monotonic() + DEADLINE
        while not re.search(pattern, self.output):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.output!r}"
            assert self.read(0.1), f"ended without {pattern!r}: {self.output!r}"
        return self.output

    def stop(self, number: int = signal.SIGINT) -> str:
        """End the server with a signal, and return its output."""
        self.process.send_signal(number)
        assert self.finish() == 0
        return self.output


def lines(output: str) -> list[str]:
    """Return the lines as they stay on the screen: what precedes a carriage return is overwritten."""
    return [line.rstrip("\r").rpartition("\r")[2] for line in output.split("\n")][:-1]


def test_start_is_one_line_with_url_role_path_token_and_tls(tmp_path: Path) -> None:
    with ServerTerminal(tmp_path, "-p", "0", "-T", "0", env={"NO_COLOR": "1", "RINGOEXP_TOKEN": "x"}) as running:
        running.until("TLS off")
        first, last = lines(running.stop())
    assert re.fullmatch(
        rf"{TIME} ringoexp [\d.]+: publisher on http://localhost:\d+/ storing in {tmp_path}/ringoexp.db, "
        "token on, TLS off",
        first,
    )
    assert re.fullmatch(rf"{TIME} ringoexp: stopped, 0 stored, 0 unstored", last)


def test_level_has_a_colour_and_thread_and_logger_are_left_out(tmp_path: Path) -> None:
    with ServerTerminal(tmp_path, "-p", "0", "-T", "0", "-X", "100000") as running:
        running.until("TLS off")
        output = running.stop()
    assert re.search(rf"\x1b\[2m{TIME}\x1b\[0m \x1b\[33mwarning few_cores\x1b\[0m procs=100000", output)
    assert "thread=" not in output and "logger=" not in output


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"TERM": ""}])
def test_colours_can_be_turned_off(tmp_path: Path, env: dict[str, str]) -> None:
    with ServerTerminal(tmp_path, "-p", "0", "-T", "0", "-X", "100000", env=env) as running:
        running.until("TLS off")
        output = running.stop()
    assert "\x1b" not in output and re.search(rf"{TIME} warning few_cores procs=100000 ", output)


def test_log_json_is_json_on_a_terminal_too(tmp_path: Path) -> None:
    with ServerTerminal(tmp_path, "-p", "0", "-T", "0", "--log_json") as running:
        running.until("started")
        events = [json.loads(line)["event"] for line in lines(running.stop())]
    assert events == ["started", "stopped"]


def test_control_characters_of_a_path_do_not_reach_the_terminal(tmp_path: Path) -> None:
    with ServerTerminal(tmp_path, "-p", "0", "-T", "0", "-D", "z\xe9ro\x1b[31m.db", env={"NO_COLOR": "1"}) as running:
        assert r"/z" "\xe9" r"ro\x1b[31m.db, token off" in running.until("TLS off")


@pytest.mark.parametrize(("host", "words"), [("0.0.0.0", "all IPv4 addresses"), ("::", "all addresses")])
def test_url_of_a_server_on_all_addresses_can_be_opened(tmp_path: Path, host: str, words: str) -> None:
    with ServerTerminal(tmp_path, "-H", host, "-p", "0", "-T", "0", env={"NO_COLOR": "1"}) as running:
        output = running.until("TLS off")
        match = re.search(rf" on http://localhost:(\d+)/ \({words}\) storing in ", output)
        assert match and request(int(match[1]), "GET", "/")[0] == 200


def test_publisher_says_that_its_consumer_does_not_answer(tmp_path: Path) -> None:
    """The hint has the flags of a complete system."""
    port, unused = free_port(), free_port()
    with ServerTerminal(tmp_path, "-p", str(port), "-T", str(unused), env={"NO_COLOR": "1"}) as running:
        running.until("consumer_away.*\n")
        _, line, _ = lines(running.stop())
    assert f'reason="localhost:{unused}: Connection refused"' in line
    assert f"with -p {port} -T {port} this publisher is its own consumer" in line


def test_one_of_several_consumers_that_does_not_answer_is_named(tmp_path: Path) -> None:
    """Several consumers have a worker each from the start, whose link logs it."""
    unused = free_port()
    with server(tmp_path, "-I", "false", "-p", "0", "-D", "c.db") as consumer:
        both = f"127.0.0.1:{consumer.port},127.0.0.1:{unused}"
        with ServerTerminal(tmp_path, "-p", "0", "-U", both) as running:
            running.until(rf"(link_down|consumer_away).*127.0.0.1:{unused}: .*refused")


def test_publisher_is_silent_if_its_consumer_answers(tmp_path: Path) -> None:
    """`looked` shows that it has asked."""
    patch = "real = status.look.Look._run; status.look.Look._run = lambda self: (real(self), app.log.info('looked'))"
    with server(tmp_path, "-I", "false", "-p", "0", "-D", "c.db") as consumer:
        with ServerTerminal(tmp_path, "-p", "0", "-T", str(consumer.port), patch=patch) as running:
            running.until("looked")
            assert "consumer_away" not in running.stop()


def test_counts_held_back_are_told_before_the_last_line(tmp_path: Path) -> None:
    patch = "status.logs.RATE_LIMIT_SECONDS = 600"
    with ServerTerminal(tmp_path, "-p", "0", "-T", "0", env={"NO_COLOR": "1"}, patch=patch) as running:
        match = re.search(r"http://localhost:(\d+)/", running.until("TLS off"))
        assert match
        for _ in range(3):
            assert request(int(match[1]), "GET", "/nothing")[0] == 404
        *_, held_back, last = lines(running.stop())
    assert "refused" in held_back and "count=2" in held_back and "ringoexp: stopped, 0 stored" in last


def test_line_covers_the_echo_of_ctrl_c(tmp_path: Path) -> None:
    with ServerTerminal(tmp_path, "-p", "0", "-T", "0") as running:
        running.until("TLS off")
        assert "\r\x1b[2m" in running.stop()
