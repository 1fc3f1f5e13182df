"""The table of all numbers that a server reports about itself.

Each number is declared once, with its key in `/v1.0/stats`, its metric in `/metrics`, and the function that reads it
from a snapshot. `report.py` and `prometheus.py` generate their output from the table. The tables of
`docs/http.md` and `docs/metrics.md`, and the live page, are tested against it. Metrics are named after
https://prometheus.io/docs/practices/naming/.

The functions are pure, but some readers of the last group ask the operating system about this process.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ringbuffer import RingStats
from ringolib.forward.pool import ForwarderStats
from ringolib.forward.spool import SpoolStats
from ringolib.status import process
from ringolib.status.readiness import ConsumerStats
from ringolib.status.snapshot import Snapshot, consumer_away, consumer_reason, consumer_state, records_stored
from ringolib.storage.interface import Sizes, StoreStats
from ringolib.storage.retention import RetentionStats
from ringolib.timing import format_unix_time

Reader = Callable[[Snapshot], Any]


class Metric(NamedTuple):
    """Name, type and help text of a metric."""

    name: str
    kind: str
    help: str


class Labelled(NamedTuple):
    """One sample of a metric that has a sample for each set of labels."""

    labels: dict[str, str]
    value: float


class Number(NamedTuple):
    """One number: where it is reported and how it is read.

    `read` returns the value in the metric's unit: a number, a `HistogramSnapshot`, or a list of `Labelled`. A value
    that is reported only in the stats can be anything that JSON can represent. None means that this server has no such
    number: it is left out of `/metrics`, and is `missing` in `/v1.0/stats`.
    """

    key: str | None  # in `/v1.0/stats`
    metric: Metric | None
    read: Reader
    to_json: Callable[[Any], Any] | None = None  # converts the value for the stats
    missing: int | None = 0

    def json_value(self, snapshot: Snapshot) -> Any:
        """Return the value for `/v1.0/stats`."""
        value = self.read(snapshot)
        if value is None:
            return self.missing
        return self.to_json(value) if self.to_json else value


def counter(name: str, text: str) -> Metric:
    """Declare a metric that only grows."""
    return Metric(name, "counter", text)


def gauge(name: str, text: str) -> Metric:
    """Declare a metric that goes up and down."""
    return Metric(name, "gauge", text)


def histogram(name: str, text: str) -> Metric:
    """Declare a metric that is a distribution of durations."""
    return Metric(name, "histogram", text)


# Readers of a part of the snapshot. They return None if the server does not have this part.


def from_ring(read: Callable[[RingStats], Any]) -> Reader:
    return lambda snapshot: read(snapshot.ring) if snapshot.ring else None


def from_forwarder(read: Callable[[ForwarderStats], Any]) -> Reader:
    return lambda snapshot: read(snapshot.forwarder) if snapshot.forwarder else None


def from_spool(read: Callable[[SpoolStats], Any]) -> Reader:
    return lambda snapshot: read(snapshot.spool) if snapshot.spool else None


def from_store(read: Callable[[StoreStats], Any]) -> Reader:
    return lambda snapshot: read(snapshot.store) if snapshot.store else None


def from_retention(read: Callable[[RetentionStats], Any]) -> Reader:
    return lambda snapshot: read(snapshot.retention) if snapshot.retention else None


def from_disk(read: Callable[[StoreStats], Any]) -> Reader:
    return lambda snapshot: read(snapshot.disk) if snapshot.disk else None


def from_sizes(read: Callable[[Sizes], Any]) -> Reader:
    return lambda snapshot: read(snapshot.sizes) if snapshot.sizes else None


def from_consumers(read: Callable[[Snapshot], Any]) -> Reader:
    return lambda snapshot: read(snapshot) if snapshot.consumers else None


def by_consumer(read: Callable[[ConsumerStats], float]) -> Reader:
    """Return a reader with one sample for each consumer, labelled with its address."""
    return from_consumers(
        lambda snapshot: [Labelled({"consumer": consumer.address}, read(consumer)) for consumer in snapshot.consumers]
    )


# Conversions.


def milliseconds(seconds: float) -> int:
    """Return whole milliseconds."""
    return round(seconds * 1000)


def exact_milliseconds(seconds: float) -> float:
    """Return milliseconds, to the microsecond."""
    return round(seconds * 1000, 3)


def _consumer_json(consumer: ConsumerStats) -> dict[str, Any]:
    return {
        "address": consumer.address,
        "state": consumer.health.state,
        "reason": consumer.health.reason,
        "awayMs": milliseconds(consumer.health.away),
        "workers": consumer.workers,
        "inDoubt": consumer.in_doubt,
    }


# The table.

SERVER = (
    Number(
        None,
        gauge("ringoexp_build_info", "Always 1. The labels are the version and the role, publisher or consumer."),
        lambda snapshot: [
            Labelled({"version": snapshot.version, "role": "publisher" if snapshot.ring else "consumer"}, 1)
        ],
    ),
    Number(
        "startTime",
        gauge("process_start_time_seconds", "Unix time at which the server started."),
        lambda snapshot: snapshot.started_at,
        to_json=format_unix_time,
    ),
)
RECORDS = (
    Number(
        "recordsReceived",
        counter("ringoexp_records_received_total", "Valid records received."),
        lambda snapshot: snapshot.totals.received,
    ),
    Number(
        "recordsStored",
        counter(
            "ringoexp_records_stored_total",
            "New records in the server's own database. Without one, records acked by the consumer or spooled.",
        ),
        lambda snapshot: records_stored(snapshot.store, snapshot.ring),
    ),
    Number(
        "recordsAcked",
        counter("ringoexp_records_acked_total", "Records acked to clients."),
        lambda snapshot: snapshot.totals.acked,
    ),
    Number(
        "recordsDuplicate",
        counter(
            "ringoexp_records_duplicate_total", "Records that the server's own database already had, not stored again."
        ),
        from_store(lambda store: store.duplicates),
    ),
    Number(
        "recordsRefused",
        counter("ringoexp_records_refused_total", "Records refused. A malformed message counts as one."),
        lambda snapshot: snapshot.totals.refused,
    ),
    Number(
        "recordsExpired",
        counter("ringoexp_records_expired_total", "Records deleted because they were older than --retain."),
        from_retention(lambda retention: retention.expired),
    ),
    Number(
        "oldestRecordMs",
        gauge("ringoexp_oldest_record_seconds", "Age of the oldest record in the database, with --retain."),
        from_retention(lambda retention: retention.oldest),
        to_json=milliseconds,
    ),
)
DATABASE = (
    Number(
        "commits",
        counter("ringoexp_commits_total", "Commits to the database or spool."),
        from_disk(lambda disk: disk.commits),
    ),
    Number(
        "failedCommits",
        counter("ringoexp_failed_commits_total", "Commits that failed."),
        from_disk(lambda disk: disk.failed_commits),
    ),
    Number("storeError", None, from_disk(lambda disk: disk.error), missing=None),
    Number(
        None,
        gauge("ringoexp_store_failing", "1 if the last commit failed, else 0."),
        from_disk(lambda disk: disk.error is not None),
    ),
    Number(
        "powerSafe",
        gauge(
            "ringoexp_power_safe",
            "1 if acked records survive a power cut, else 0: a ClickHouse server that is too old to sync its files.",
        ),
        from_disk(lambda disk: disk.power_safe),
        missing=None,
    ),
    Number(
        None,
        histogram(
            "ringoexp_commit_duration_seconds", "Duration of successful commits, including the sync to the disk."
        ),
        from_disk(lambda disk: disk.commit_times),
    ),
    Number(
        "databaseBytes",
        gauge("ringoexp_database_bytes", "Size of the file of the database or spool."),
        from_sizes(lambda sizes: sizes.database),
    ),
    Number(
        "walBytes",
        gauge("ringoexp_wal_bytes", "Size of the write-ahead log (-wal) of the database or spool."),
        from_sizes(lambda sizes: sizes.wal),
    ),
    Number(
        "diskFreeBytes",
        gauge("ringoexp_disk_free_bytes", "Free space on the disk of the database or spool."),
        from_sizes(lambda sizes: sizes.disk_free),
        missing=None,
    ),
)
CONNECTIONS = (
    Number(
        "bytesReceived",
        counter("ringoexp_received_bytes_total", "Bytes of WebSockets after the handshake, and of HTTP bodies."),
        lambda snapshot: snapshot.totals.bytes_received,
    ),
    Number(
        "connections",
        gauge("ringoexp_connections", "Open connections, HTTP and WebSocket, including the one that asks."),
        lambda snapshot: snapshot.connections.now,
    ),
    Number(
        "totalConnections",
        counter("ringoexp_connections_admitted_total", "Connections admitted within the limit."),
        lambda snapshot: snapshot.connections.total,
    ),
    Number(
        "unauthorizedRequests",
        counter("ringoexp_requests_unauthorized_total", "Requests answered with 401: missing or wrong token."),
        lambda snapshot: snapshot.connections.unauthorized,
    ),
    Number(
        "tlsFailures",
        counter("ringoexp_tls_failures_total", "Connections that failed in the TLS handshake."),
        lambda snapshot: snapshot.connections.tls_failed,
    ),
    Number(
        "certificateExpires",
        gauge(
            "ringoexp_certificate_expires_timestamp_seconds",
            "Unix time at which the server's own certificate expires, with --tls_cert.",
        ),
        lambda snapshot: snapshot.certificate_ends,
        to_json=format_unix_time,
        missing=None,
    ),
    Number(
        "refusedConnections",
        counter("ringoexp_connections_refused_total", "Requests refused because of -n, --threads or --per_address."),
        lambda snapshot: snapshot.connections.refused,
    ),
    Number(
        "unfinishedBytes",
        gauge(
            "ringoexp_unfinished_bytes", "Unfinished messages and request bodies in memory; --unfinished is the limit."
        ),
        lambda snapshot: snapshot.unfinished,
    ),
    Number("clients", gauge("ringoexp_clients", "Open WebSockets."), lambda snapshot: snapshot.totals.clients),
    Number(
        "publishers",
        gauge("ringoexp_publishers", "Open WebSockets with batch messages: links of publishers, and ringoexp send."),
        lambda snapshot: snapshot.totals.publishers,
    ),
)
RING = (
    Number("ringSize", gauge("ringoexp_ring_slots", "Slots of the ring."), from_ring(lambda ring: ring.capacity)),
    Number("ringDepth", gauge("ringoexp_ring_used_slots", "Slots in use."), from_ring(lambda ring: ring.depth)),
    Number(
        "ringInFlight",
        gauge("ringoexp_ring_in_flight_slots", "Slots whose records a worker is storing."),
        from_ring(lambda ring: ring.in_flight),
    ),
    Number(
        "ringHighWater",
        gauge("ringoexp_ring_high_water_slots", "Largest number of slots in use at once."),
        from_ring(lambda ring: ring.high_water),
    ),
    Number(
        "ringTimesFull",
        counter("ringoexp_ring_full_total", "Waits for a free slot. A longer wait counts once for each second."),
        from_ring(lambda ring: ring.times_full),
    ),
    Number(
        "ringOldestInFlightMs",
        gauge(
            "ringoexp_ring_oldest_unstored_seconds",
            "Time since the oldest batch that is not stored was first handed to a worker.",
        ),
        from_ring(lambda ring: ring.oldest_in_flight),
        to_json=exact_milliseconds,
    ),
)
FORWARDING = (
    Number("workers", gauge("ringoexp_workers", "Workers."), from_forwarder(lambda forwarder: forwarder.workers)),
    Number("mostWorkers", None, from_forwarder(lambda forwarder: forwarder.most_workers)),
    Number(
        "linkReconnects",
        counter("ringoexp_link_reconnects_total", "Links to consumers, not counting each worker's first."),
        from_forwarder(lambda forwarder: forwarder.reconnects),
    ),
    Number("notReady", None, lambda snapshot: snapshot.not_ready),
    Number(
        None,
        gauge("ringoexp_ready", "1 if the server is ready, as in /v1.0/ready but without a test commit, else 0."),
        lambda snapshot: not snapshot.not_ready,
    ),
    Number("consumerState", None, consumer_state, missing=None),
    Number("consumerReason", None, consumer_reason, missing=None),
    Number(
        None,
        gauge("ringoexp_consumer_up", "0 if no consumer can be reached, else 1."),
        from_consumers(lambda snapshot: consumer_state(snapshot) != "down"),
    ),
    Number(
        "consumerAwayMs",
        gauge("ringoexp_consumer_away_seconds", "Time for which no consumer could be reached."),
        from_consumers(consumer_away),
        to_json=milliseconds,
    ),
    Number("consumers", None, lambda snapshot: [_consumer_json(consumer) for consumer in snapshot.consumers]),
    Number(
        None,
        gauge("ringoexp_link_up", "0 if this consumer cannot be reached, else 1."),
        by_consumer(lambda consumer: consumer.health.state != "down"),
    ),
    Number(
        None,
        gauge("ringoexp_link_away_seconds", "Time for which this consumer could not be reached."),
        by_consumer(lambda consumer: consumer.health.away),
    ),
    Number(
        None,
        gauge("ringoexp_link_workers", "Workers that store at this consumer."),
        by_consumer(lambda consumer: consumer.workers),
    ),
    Number(
        None,
        gauge(
            "ringoexp_link_in_doubt_records", "Records that this consumer has possibly stored, and that wait for it."
        ),
        by_consumer(lambda consumer: consumer.in_doubt),
    ),
    Number(
        "spoolDepth", gauge("ringoexp_spool_records", "Records in the spool."), from_spool(lambda spool: spool.depth)
    ),
    Number(
        "spoolOldestMs",
        gauge("ringoexp_spool_oldest_seconds", "Age of the oldest record in the spool, by the wall clock."),
        from_spool(lambda spool: spool.oldest),
        to_json=milliseconds,
    ),
    Number(
        "spoolForwarded",
        counter("ringoexp_spool_forwarded_records_total", "Records of the spool that the consumer acked."),
        from_spool(lambda spool: spool.forwarded),
    ),
)
LATENCY = (
    Number("ackLatencyP50Ms", None, lambda snapshot: snapshot.totals.ack_latency_p50_ms, missing=None),
    Number("ackLatencyP99Ms", None, lambda snapshot: snapshot.totals.ack_latency_p99_ms, missing=None),
    Number(
        None,
        histogram("ringoexp_ack_latency_seconds", "Time from reading records to sending their ack, once per read."),
        lambda snapshot: snapshot.totals.ack_latency,
    ),
)
STATS: Sequence[Number] = (*SERVER, *RECORDS, *DATABASE, *CONNECTIONS, *RING, *FORWARDING, *LATENCY)
"""The `stats` of `/v1.0/stats`, in their order there."""
MEMORY_STATS: Sequence[Number] = (
    Number(
        "residentBytes",
        gauge("process_resident_memory_bytes", "Resident memory."),
        lambda snapshot: snapshot.memory.resident_bytes,
    ),
    Number("peakBytes", None, lambda snapshot: snapshot.memory.peak_bytes),
    Number("threads", gauge("ringoexp_threads", "Python threads."), lambda snapshot: snapshot.memory.threads),
    Number(
        "gcCollections",
        counter("python_gc_collections_total", "Garbage collections, by generation."),
        lambda snapshot: [
            Labelled({"generation": str(generation)}, count)
            for generation, count in enumerate(snapshot.memory.gc_collections)
        ],
        to_json=lambda samples: [sample.value for sample in samples],
    ),
    Number("gcCounts", None, lambda snapshot: snapshot.memory.gc_counts),
    Number(
        None,
        counter("process_cpu_seconds_total", "CPU time, user and system."),
        lambda snapshot: process.cpu_seconds(),
    ),
    Number(
        None,
        gauge("process_open_fds", "Open file descriptors, if the system reports them."),
        lambda snapshot: process.open_descriptors(),
    ),
    Number(
        None,
        gauge("process_max_fds", "Limit on open file descriptors, if there is one."),
        lambda snapshot: process.max_descriptors(),
    ),
)
"""The `memStats` of `/v1.0/stats`, and the metrics that Prometheus' own clients report for every process."""
NUMBERS = (*STATS, *MEMORY_STATS)


def to_json(numbers: Sequence[Number], snapshot: Snapshot) -> dict[str, Any]:
    """Return the values of those numbers that have a key."""
    return {number.key: number.json_value(snapshot) for number in numbers if number.key}
