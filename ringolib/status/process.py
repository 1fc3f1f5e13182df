"""TODO: ringolib/status/process.py."""

import gc
import os
import resource
import sys
import threading
from typing import Any


def memory() -> dict[str, Any]:
    """This process's memory, threads and garbage collections: the `memStats` of the stats."""
    resident, peak = _resident()
    return {
        "residentBytes": resident,
        "peakBytes": peak,
        "threads": threading.active_count(),
        "gcCollections": [generation["collections"] for generation in gc.get_stats()],
        "gcCounts": list(gc.get_count()),
    }


def process() -> dict[str, float]:
    """This process's CPU seconds, and its open and allowed descriptors; of these only what the system tells."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    found: dict[str, float] = {"cpu": usage.ru_utime + usage.ru_stime}
    try:
        found["fds"] = len(os.listdir("/proc/self/fd")) - 1  # listing takes one
    except OSError:
        pass
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY:
        found["most_fds"] = limit
    return found


def _resident() -> tuple[int, int]:
    """Resident size now and at its peak, in bytes; without /proc the peak stands for both."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            fields = dict(line.split(":", 1) for line in status)
        return tuple(int(fields[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))  # type: ignore[return-value]
    except (OSError, KeyError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
        return peak, peak
