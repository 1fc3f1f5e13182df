"""A terminal for tests: a program runs on a pty as its controlling terminal, so that keys such as Ctrl-C work."""

import fcntl
import os
import select
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import IO

from support.harness import DEADLINE

START = "import fcntl, os, sys, termios; fcntl.ioctl({tty}, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"


class Terminal:
    """Runs `command` on a terminal of `columns`, which is its stderr, and its stdin and stdout unless others are given.

    `output` holds all that the terminal has shown, control characters included.
    """

    def __init__(
        self,
        command: Sequence[str],
        directory: Path,
        columns: int = 80,
        stdin: int | IO[bytes] | None = None,
        stdout: int | IO[bytes] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._ours, theirs = os.openpty()
        self.output = ""
        self.resize(columns)
        self.process = subprocess.Popen(
            [sys.executable, "-c", START.format(tty=2), *command],
            cwd=directory,
            stdin=theirs if stdin is None else stdin,
            stdout=theirs if stdout is None else stdout,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm", **(env or {})},
            start_new_session=True,
        )
        os.close(theirs)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *unused: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def read(self, seconds: float) -> bool:
        """Read output that comes within this time; False at its end."""
        if select.select([self._ours], [], [], seconds)[0]:
            try:
                data = os.read(self._ours, 65536)
            except OSError:  # Linux: no process has the terminal open
                return False
            self.output += data.decode()
            return bool(data)
        return True

    def read_until(self, text: str) -> str:
        """Read until `text` has appeared, and return the output after it. Earlier output does not count."""
        start, deadline = len(self.output), monotonic() + DEADLINE
        while text not in self.output[start:]:
            assert monotonic() < deadline, f"{text!r} is not in {self.output[start:]!r}"
            assert self.read(0.1) or text in self.output[start:], f"{text!r} is not in {self.output[start:]!r}"
        return self.output[start:].partition(text)[2]

    def finish(self) -> int:
        """Read the rest of the output, and return the exit status."""
        deadline = monotonic() + DEADLINE
        while self.read(0.1):
            assert monotonic() < deadline, self.output
        return self.process.wait(DEADLINE)
