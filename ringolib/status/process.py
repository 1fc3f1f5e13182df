"""Memory, threads, CPU time and file descriptors of this process.

The functions read what the operating system and Python report. They keep no state and start no threads.
"""

import gc
import os
import resource
import sys
import threading
from typing import NamedTuple


class MemoryStats(NamedTuple):
    """Memory, threads and garbage collections of this process at one moment."""

    resident_bytes: int
    peak_bytes: int
    threads: int
    gc_collections: list[int]  # by generation
    gc_counts: list[int]  # by generation: allocations counted towards the next collection


def memory() -> MemoryStats:
    """Return the memory, threads and garbage collections of this process."""
    return MemoryStats(
        *_resident_and_peak_bytes(),
        threads=threading.active_count(),
        gc_collections=[generation["collections"] for generation in gc.get_stats()],
        gc_counts=list(gc.get_count()),
    )


def cpu_seconds() -> float:
    """Return the CPU time of this process, user and system."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def open_descriptors() -> int | None:
    """Return the number of open file descriptors, or None if the system has no `/proc`."""
    try:
        return len(os.listdir("/proc/self/fd")) - 1  # one is open only to list them
    except OSError:
        return None


def max_descriptors() -> int | None:
    """Return the limit on open file descriptors, or None if it is unlimited."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if limit == resource.RLIM_INFINITY else limit


def _resident_and_peak_bytes() -> tuple[int, int]:
    """Return the resident memory now and its peak. Without `/proc` both are the peak."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            fields = dict(line.split(":", 1) for line in status)
        return _kibibytes(fields["VmRSS"]), _kibibytes(fields["VmHWM"])
    except (OSError, KeyError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
        return peak, peak


def _kibibytes(field: str) -> int:
    """Return the bytes of a field such as `  1234 kB`."""
    return int(field.split()[0]) * 1024
