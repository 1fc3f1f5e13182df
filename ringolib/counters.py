"""Counters for records, clients and ack latencies, and the histogram that measures durations.

`Totals._lock` guards all counts of a `Totals`. The ingest loop adds to them once per turn, and the thread of an HTTP
request once per request: never once per record. A `Histogram` has no lock: its owner guards it. This module starts no
threads.
"""

import bisect
import threading
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

MAX_LATENCIES = 4096
"""Number of most recent ack latencies from which the percentiles are computed."""
BOUNDS_SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of a histogram's buckets, inclusive. One more bucket counts all longer durations."""


class HistogramSnapshot(NamedTuple):
    """A histogram at one moment: the number of durations in each bucket, not cumulative, and their sum in seconds."""

    counts: tuple[int, ...]
    sum: float


class Histogram:
    """Counts durations in the buckets of BOUNDS_SECONDS. It has no lock of its own."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_SECONDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self._counts[bisect.bisect_left(BOUNDS_SECONDS, seconds)] += 1
        self._sum += seconds

    def add_all(self, durations: Sequence[float]) -> None:
        """Count many durations."""
        if len(durations) < len(self._counts):
            for seconds in durations:
                self.add(seconds)
            return
        ordered = sorted(durations)
        below = 0
        for bucket, bound in enumerate(BOUNDS_SECONDS):
            end = bisect.bisect_right(ordered, bound, below)
            self._counts[bucket] += end - below
            below = end
        self._counts[-1] += len(ordered) - below
        self._sum += sum(ordered)

    def snapshot(self) -> HistogramSnapshot:
        """Return the current counts and sum."""
        return HistogramSnapshot(tuple(self._counts), self._sum)


class TotalsSnapshot(NamedTuple):
    """All counts at one moment. Percentiles are in milliseconds, and None before the first ack."""

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
    """Counts the records and bytes received through `/v1.0/ingest`, the clients connected to it, and ack latencies."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Guarded by _lock. Unless a comment says otherwise, counts are since the start.
        self._received = 0  # valid records
        self._refused = 0
        self._bytes = 0
        self._acked = 0
        self._clients = 0  # open now: WebSockets
        self._publishers = 0  # open now: WebSockets with batch messages
        self._histogram = Histogram()
        self._latencies: deque[float] = deque(maxlen=MAX_LATENCIES)  # seconds

    def add_bytes(self, size: int) -> None:
        """Count `size` bytes as read."""
        with self._lock:
            self._bytes += size

    def add_records(self, records: int) -> None:
        """Count valid records as received."""
        with self._lock:
            self._received += records

    def add_refused(self, records: int = 1) -> None:
        """Count records as refused. A message whose records cannot be counted is one record."""
        with self._lock:
            self._refused += records

    def add_acked(self, records: int, latencies: Sequence[float] = ()) -> None:
        """Count records as acked. `latencies`: the seconds from each read to the ack of its last record."""
        with self._lock:
            self._acked += records
            self._latencies.extend(latencies)
            self._histogram.add_all(latencies)

    def client_opened(self, batches: bool) -> None:
        """Count a WebSocket as open. `batches` is true if its client sends batch messages."""
        with self._lock:
            self._clients += 1
            self._publishers += batches

    def client_closed(self, batches: bool) -> None:
        """Count a WebSocket as closed. `batches` is the same as in `client_opened`."""
        with self._lock:
            self._clients -= 1
            self._publishers -= batches

    def snapshot(self) -> TotalsSnapshot:
        """Return all counts at one moment, and the percentiles of the last MAX_LATENCIES latencies."""
        with self._lock:
            counts = self._received, self._refused, self._bytes, self._acked, self._clients, self._publishers
            histogram = self._histogram.snapshot()
            latencies = list(self._latencies)
        latencies.sort()  # outside the lock: it takes longer than everything else here
        return TotalsSnapshot(*counts, _percentile(latencies, 50), _percentile(latencies, 99), histogram)


def _percentile(ascending: list[float], percent: int) -> float | None:
    """Return the nearest-rank percentile in milliseconds of seconds in ascending order, None without any."""
    if not ascending:
        return None
    rank = -(-len(ascending) * percent // 100)
    return round(ascending[rank - 1] * 1000, 3)
