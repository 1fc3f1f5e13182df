"""Measure the memory, threads and descriptors of a server process, and find errors in its log."""

import os
from pathlib import Path
from typing import NamedTuple

from support.harness import DEADLINE, ServerProcess, eventually

RETURNING = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Environment of a server whose memory is measured: it returns freed memory to the system, so growth is in use."""


class Usage(NamedTuple):
    """Anonymous resident memory in bytes, threads, and descriptors."""

    memory: int
    threads: int
    descriptors: int

    def __str__(self) -> str:
        return f"{self.memory / 1e6:.1f} MB, {self.threads} threads, {self.descriptors} descriptors"


def usage(process: ServerProcess) -> Usage:
    """Return the present usage of a server."""
    proc = Path(f"/proc/{process.process.pid}")
    fields = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    memory = int(fields["RssAnon"].split()[0]) * 1024
    return Usage(memory, len(os.listdir(proc / "task")), len(os.listdir(proc / "fd")))


def settled(process: ServerProcess) -> Usage:
    """Wait until the last connections have ended, and return the usage once it is constant."""
    measured = [usage(process)]

    def is_constant() -> bool:
        measured.append(usage(process))
        return len({(now.threads, now.descriptors) for now in measured[-10:]}) == 1 and len(measured) > 10

    eventually(is_constant)
    return measured[-1]


def back_to(process: ServerProcess, base: Usage, deadline: float = DEADLINE) -> Usage:
    """Wait until threads and descriptors are not above `base`, and return the usage then."""
    now = base

    def returned() -> bool:
        nonlocal now
        now = usage(process)
        return now.threads <= base.threads and now.descriptors <= base.descriptors

    try:
        eventually(returned, deadline=deadline)
    except AssertionError:
        raise AssertionError(f"all clients have gone, but the server uses {now}; before them {base}") from None
    return now


def complaints(process: ServerProcess) -> str:
    """Return the lines of the log that must not be there: errors and tracebacks."""
    lines = process.errors.read_text(errors="replace").splitlines()
    bad = ("level=error", "level=critical", "Traceback", "Exception")
    return "\n".join(line for line in lines if any(word in line for word in bad))
