"""What the server counts, and the process's own figures.

`Totals._lock` guards every count in it; connection threads add to them once a read, not once a
record. A `Histogram` is guarded by whoever owns it. No thread runs here.
"""

import bisect
import threading
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

LATENCIES_KEPT = 4096
BOUNDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of a histogram's buckets, in seconds; one more bucket takes the rest."""


class HistogramSnapshot(NamedTuple):
    """Observations by bucket, each of them in one, and the sum of them all in seconds."""

    counts: tuple[int, ...]
    sum: float


class Histogram:
    """How often something took how long, in the buckets of BOUNDS. Whoever owns it guards it."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """One observation."""
        self._counts[bisect.bisect_left(BOUNDS, seconds)] += 1
        self._sum += seconds

    def snapshot(self) -> HistogramSnapshot:
        """What there is now."""
        return HistogramSnapshot(tuple(self._counts), self._sum)


class TotalsSnapshot(NamedTuple):
    """The counts at one moment. Latencies are in milliseconds, None before the first ack."""

    received: int
    refused: int
    bytes_received: int
    acked: int
    clients: int
    publishers: int
    ack_latency_p50_ms: float | None
    ack_latency_p99_ms: float | None
    ack_latency: HistogramSnapshot


class Totals:
    """What came in through `/v1.0/ingest` since the start, from how many, and how long acks took."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Guarded by _lock.
        self._received = 0
        self._refused = 0
        self._bytes = 0
        self._acked = 0
        self._clients = 0  # WebSockets open now
        self._publishers = 0  # those of them that speak batch messages
        self._histogram = Histogram()
        self._latencies: deque[float] = deque(maxlen=LATENCIES_KEPT)  # seconds

    def add_bytes(self, size: int) -> None:
        """`size` bytes were read."""
        with self._lock:
            self._bytes += size

    def add_records(self, records: int) -> None:
        """`records` valid records came in."""
        with self._lock:
            self._received += records

    def add_refused(self, records: int = 1) -> None:
        """`records` records, or one message whose records cannot be counted, were turned away."""
        with self._lock:
            self._refused += records

    def add_acked(self, records: int, latencies: Sequence[float] = ()) -> None:
        """An ack for `records` more records left; what was read these many seconds ago is stored."""
        with self._lock:
            self._acked += records
            self._latencies.extend(latencies)
            for seconds in latencies:
                self._histogram.add(seconds)

    def client_opened(self, batches: bool) -> None:
        """A WebSocket was opened; `batches`: its client speaks batch messages."""
        with self._lock:
            self._clients += 1
            self._publishers += batches

    def client_closed(self, batches: bool) -> None:
        """It was closed."""
        with self._lock:
            self._clients -= 1
            self._publishers -= batches

    def snapshot(self) -> TotalsSnapshot:
        """All counts at one moment, and the percentiles of the latest LATENCIES_KEPT latencies."""
        with self._lock:
            counts = self._received, self._refused, self._bytes, self._acked, self._clients, self._publishers
            histogram = self._histogram.snapshot()
            latencies = list(self._latencies)
        latencies.sort()
        return TotalsSnapshot(*counts, _percentile(latencies, 50), _percentile(latencies, 99), histogram)


def _percentile(ordered: list[float], percent: int) -> float | None:
    """The nearest-rank percentile of seconds in ascending order, in milliseconds."""
    if not ordered:
        return None
    rank = -(-len(ordered) * percent // 100)
    return round(ordered[rank - 1] * 1000, 3)
