"""SIGINT and SIGHUP that are ignored when the program starts stay ignored; all others keep their effect."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.harness import DEADLINE, ROOT, Blocked, ServerProcess, eventually, free_port

PROGRAM = [sys.executable, str(ROOT / "ringoexp.py")]
IGNORE = """
import os, signal, sys
signal.signal(getattr(signal, sys.argv[1]), signal.SIG_IGN)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def ignoring(number: signal.Signals) -> list[str]:
    """Return a command that runs another one with this signal ignored, as nohup does."""
    return [sys.executable, "-c", IGNORE, number.name]


def handled(pid: int, number: signal.Signals) -> bool:
    """True if the process has a handler for the signal."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(status["SigCgt"], 16) >> (number - 1) & 1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("single_file", [False, True])
def test_ignored_signal_does_not_end_the_server(tmp_path: Path, number: signal.Signals, single_file: bool) -> None:
    program = PROGRAM
    if single_file:  # it sets a handler of its own during the imports
        pyz = tmp_path / "ringoexp.pyz"
        subprocess.run([sys.executable, str(ROOT / "tools/build_pyz.py"), str(pyz)], check=True, capture_output=True)
        program = [sys.executable, str(pyz)]
    (tmp_path / "token").write_text("secret\n")  # there is something to read again at SIGHUP
    flags = ["-p", "0", "-T", "0", "--token_file", "token"]
    running = ServerProcess(tmp_path, *flags, program=program, under=ignoring(number))
    try:
        assert not handled(running.process.pid, number) and handled(running.process.pid, signal.SIGTERM)
        for _ in range(3):
            running.send_signal(number)
        assert Blocked(running.process.wait).still(0.3)
        assert running.get("/v1.0/alive")[0] == 200
        assert running.stop() == 0
    finally:
        running.kill()
    assert "event=reloaded" not in running.errors.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_signal_that_is_not_ignored_keeps_its_effect(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "token").write_text("secret\n")
    other = signal.SIGHUP if number == signal.SIGINT else signal.SIGINT
    flags = ["-p", "0", "-T", "0", "--token_file", "token"]
    running = ServerProcess(tmp_path, *flags, program=PROGRAM, under=ignoring(other))
    try:
        if number == signal.SIGHUP:
            running.send_signal(number)
            eventually(lambda: "event=reloaded" in running.errors.read_text())
        assert running.stop(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM) == 0
    finally:
        running.kill()


def test_ignored_ctrl_c_does_not_end_send(tmp_path: Path) -> None:
    """In a script, `ringoexp send ... &` goes on when Ctrl-C ends the script's foreground command."""
    url = f"ws://localhost:{free_port()}/"
    command = [*ignoring(signal.SIGINT), *PROGRAM, "send", "--url", url]
    with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as sending:
        try:
            assert sending.stdin and sending.stderr
            sending.stdin.write(b"1\n")
            sending.stdin.close()
            assert b"trying again" in sending.stderr.readline()
            for _ in range(3):
                sending.send_signal(signal.SIGINT)
            assert Blocked(sending.wait).still(0.3)
        finally:
            sending.terminate()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("job", ["send", "server"])
def test_background_job_of_a_script_survives_ctrl_c(tmp_path: Path, job: str) -> None:
    """A shell without job control starts background jobs with SIGINT ignored."""
    flags = ["send", "--url", f"ws://localhost:{free_port()}/"] if job == "send" else ["-p", "0", "-T", "0"]
    script = f"{shlex.join([*PROGRAM, *flags])} < numbers > out 2>&1 & echo $!; wait"
    (tmp_path / "numbers").write_text("1\n")
    (tmp_path / "out").touch()
    with subprocess.Popen(
        ["sh", "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as shell:
        assert shell.stdout
        pid = int(shell.stdout.readline())
        try:
            word = "trying again" if job == "send" else "event=started"
            eventually(lambda: word in (tmp_path / "out").read_text())
            os.killpg(shell.pid, signal.SIGINT)  # as the terminal does
            assert shell.wait(DEADLINE) != 0
            assert Blocked(lambda: eventually(lambda: not is_running(pid))).still(0.3)
        finally:
            os.kill(pid, signal.SIGKILL)


def is_running(pid: int) -> bool:
    """True if the process has not ended. One that has ended may wait for a parent to read its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
