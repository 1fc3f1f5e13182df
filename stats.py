"""What the server counts, and the process's own figures for `GET /v1.0/stats`.

`Totals._lock` guards every count in it; connection threads add to them once a read, not once a
record. No thread runs here.
"""

import gc
import resource
import sys
import threading
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

LATENCIES_KEPT = 4096


class TotalsSnapshot(NamedTuple):
    """The counts at one moment. Latencies are in milliseconds, None before the first ack."""

    received: int
    refused: int
    bytes_received: int
    ack_latency_p50_ms: float | None
    ack_latency_p99_ms: float | None


class Totals:
    """What came in through `/v1.0/ingest` since the start, and how long the latest acks took."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Guarded by _lock.
        self._received = 0
        self._refused = 0
        self._bytes = 0
        self._latencies: deque[float] = deque(maxlen=LATENCIES_KEPT)  # seconds

    def read(self, size: int) -> None:
        """`size` bytes were read."""
        with self._lock:
            self._bytes += size

    def received(self, records: int) -> None:
        """`records` valid records came in."""
        with self._lock:
            self._received += records

    def refused(self, records: int = 1) -> None:
        """`records` records, or one message whose records cannot be counted, were turned away."""
        with self._lock:
            self._refused += records

    def acked(self, latencies: Iterable[float]) -> None:
        """Acks left, these many seconds after what they ack had been read."""
        with self._lock:
            self._latencies.extend(latencies)

    def snapshot(self) -> TotalsSnapshot:
        """All counts at one moment, and the percentiles of the latest LATENCIES_KEPT latencies."""
        with self._lock:
            counts = self._received, self._refused, self._bytes
            latencies = sorted(self._latencies)
        return TotalsSnapshot(*counts, _percentile(latencies, 50), _percentile(latencies, 99))


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


def _percentile(ordered: list[float], percent: int) -> float | None:
    """The nearest-rank percentile of seconds in ascending order, in milliseconds."""
    if not ordered:
        return None
    rank = -(-len(ordered) * percent // 100)
    return round(ordered[rank - 1] * 1000, 3)


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
