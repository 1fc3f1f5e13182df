"""What a server process holds, and how the fault tests are seeded."""

import os
from pathlib import Path
from typing import NamedTuple

from support.harness import DEADLINE, ServerProcess, eventually

RETURNING = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Environment of a server whose memory is watched: what it frees goes back to the system, so that growth is held."""


class Usage(NamedTuple):
    """Resident bytes that are no file's, threads, and descriptors."""

    memory: int
    threads: int
    descriptors: int

    def __str__(self) -> str:
        return f"{self.memory / 1e6:.1f} MB, {self.threads} threads, {self.descriptors} descriptors"


def usage(process: ServerProcess) -> Usage:
    """What the process holds now."""
    proc = Path(f"/proc/{process.process.pid}")
    fields = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    memory = int(fields["RssAnon"].split()[0]) * 1024
    return Usage(memory, len(os.listdir(proc / "task")), len(os.listdir(proc / "fd")))


def settled(process: ServerProcess) -> Usage:
    """What the process holds once its last connections have ended: the same ten times in a row."""
    seen = [usage(process)]

    def same() -> bool:
        seen.append(usage(process))
        return len({each[1:] for each in seen[-10:]}) == 1 and len(seen) > 10

    eventually(same)
    return seen[-1]


def back_to(process: ServerProcess, base: Usage, deadline: float = DEADLINE) -> Usage:
    """Waits until threads and descriptors are no more than in `base`; what is held then."""
    now = base

    def returned() -> bool:
        nonlocal now
        now = usage(process)
        return now.threads <= base.threads and now.descriptors <= base.descriptors

    try:
        eventually(returned, deadline=deadline)
    except AssertionError:
        raise AssertionError(f"clients are gone, but the server holds {now}; before them it held {base}") from None
    return now


def complaints(process: ServerProcess) -> str:
    """What the server has logged that it should not: errors and tracebacks."""
    lines = process.errors.read_text(errors="replace").splitlines()
    bad = ("level=ERROR", "level=CRITICAL", "Traceback", "Exception")
    return "\n".join(line for line in lines if any(word in line for word in bad))
