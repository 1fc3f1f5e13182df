"""`GET /metrics`: a snapshot in the Prometheus text format, version 0.0.4. Pure functions.

https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format; names after
https://prometheus.io/docs/practices/naming/. What a server does not have is left out, not 0.
"""

import gc
import threading
from collections.abc import Callable, Iterable, Iterator

from ringolib.counters import BOUNDS, HistogramSnapshot
from ringolib.status.process import memory, process
from ringolib.status.readiness import ConsumerStats
from ringolib.status.snapshot import Snapshot, consumer_away, consumer_state, records_stored

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Samples = Iterable[tuple[str, float | int]]
"""What follows the metric's name (a suffix, labels, or nothing), and the value."""


def text(now: Snapshot) -> str:
    """All metrics of a server, HELP and TYPE before each."""
    lines = []
    for name, kind, meaning, samples in _metrics(now):
        lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
        lines += [f"{name}{rest} {_number(value)}" for rest, value in samples]
    return "\n".join(lines) + "\n"


def _number(value: float | int) -> str:
    return str(value) if isinstance(value, int) else repr(float(value))


def _labels(**labels: str) -> str:
    """`{name="value",...}`; backslash, quote and line feed escaped."""
    escaped = (f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return "{" + ",".join(escaped) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _histogram(snapshot: HistogramSnapshot) -> list[tuple[str, float | int]]:
    """Cumulative buckets, then the sum and the count."""
    samples: list[tuple[str, float | int]] = []
    total = 0
    for bound, count in zip([*map(repr, BOUNDS), "+Inf"], snapshot.counts, strict=True):
        total += count
        samples.append((f"_bucket{_labels(le=bound)}", total))
    return [*samples, ("_sum", snapshot.sum), ("_count", total)]


def _metrics(now: Snapshot) -> Iterator[tuple[str, str, str, Samples]]:
    """Name, type, help and samples of each metric."""

    def counter(name: str, value: float | int, meaning: str) -> tuple[str, str, str, Samples]:
        return f"ringoexp_{name}_total", "counter", meaning, [("", value)]

    def gauge(name: str, value: float | int, meaning: str) -> tuple[str, str, str, Samples]:
        return f"ringoexp_{name}", "gauge", meaning, [("", value)]

    totals, connections = now.totals, now.connections
    role = _labels(version=now.version, role="publisher" if now.ring else "consumer")
    yield "ringoexp_build_info", "gauge", "Always 1; its labels say what runs.", [(role, 1)]
    yield counter("records_received", totals.received, "Valid records that came in.")
    yield counter(
        "records_stored",
        records_stored(now.store, now.ring),
        "Records new in the own database; without one, acked by the consumer or spooled.",
    )
    yield counter("records_acked", totals.acked, "Records acked to clients.")
    yield counter("records_refused", totals.refused, "Records turned away; a malformed message counts as one.")
    yield counter("received_bytes", totals.bytes_received, "Bytes of WebSockets after the handshake, and HTTP bodies.")
    yield (
        "ringoexp_ack_latency_seconds",
        "histogram",
        "From reading records to sending their ack, for each read.",
        _histogram(totals.ack_latency),
    )
    yield gauge("ready", int(not now.not_ready), "1 if a record sent now would be stored now, as far as known, else 0.")
    yield gauge("connections", connections.now, "Connections open, HTTP and WebSocket.")
    yield counter("connections_admitted", connections.total, "Connections admitted: within the limit.")
    yield counter("connections_refused", connections.refused, "Requests refused because of the limit of connections.")
    yield counter("requests_unauthorized", connections.unauthorized, "Requests refused for want of the token.")
    yield counter("tls_failures", connections.tls_failed, "Connections that ended in the TLS handshake.")
    yield gauge("clients", totals.clients, "WebSockets open.")
    yield gauge("publishers", totals.publishers, "WebSockets open that speak batch messages.")
    if now.certificate_ends is not None:
        ends = "When the server's own certificate expires, Unix time."
        yield gauge("certificate_expires_timestamp_seconds", now.certificate_ends, ends)
    if ring := now.ring:
        yield gauge("ring_slots", ring.capacity, "Slots of the ring.")
        yield gauge("ring_used_slots", ring.depth, "Slots taken.")
        yield gauge("ring_in_flight_slots", ring.in_flight, "Slots taken that a worker is storing.")
        yield gauge("ring_high_water_slots", ring.high_water, "Most slots ever taken.")
        yield counter("ring_full", ring.times_full, "Times somebody waited for a free slot, each second counted.")
        age = "How long ago the oldest batch that is not stored was first handed to a worker."
        yield gauge("ring_oldest_unstored_seconds", ring.oldest_in_flight, age)
    if forwarder := now.forwarder:
        yield gauge("workers", forwarder.workers, "Workers.")
        yield counter("link_reconnects", forwarder.reconnects, "Links made beyond each worker's first.")
    if now.consumers:
        up = consumer_state(now) != "down"
        yield gauge("consumer_up", int(up), "0 while no consumer can be reached, else 1.")
        yield gauge("consumer_away_seconds", consumer_away(now), "How long all consumers have been away.")

        def each(
            name: str, meaning: str, value: Callable[[ConsumerStats], float | int]
        ) -> tuple[str, str, str, Samples]:
            samples = [(_labels(consumer=of.address), value(of)) for of in now.consumers]
            return f"ringoexp_link_{name}", "gauge", meaning, samples

        yield each("up", "0 while this consumer cannot be reached, else 1.", lambda of: int(of.link.state != "down"))
        yield each("away_seconds", "How long this consumer has been away.", lambda of: of.link.away)
        yield each("workers", "Workers that store at this consumer.", lambda of: of.workers)
        yield each("in_doubt_records", "Records it may have stored, which wait for it.", lambda of: of.in_doubt)
    if spool := now.spool:
        yield gauge("spool_records", spool.depth, "Records in the spool.")
        yield gauge("spool_oldest_seconds", spool.oldest, "Age of the oldest record in the spool.")
        yield counter("spool_forwarded_records", spool.forwarded, "Records acked by the consumer from the spool.")
    if now.store:
        yield counter("records_duplicate", now.store.duplicates, "Records known already, and not stored again.")
    if retention := now.retention:
        yield counter("records_expired", retention.expired, "Records deleted because of their age.")
        yield gauge("oldest_record_seconds", retention.oldest, "Age of the oldest record in the own database.")
    if disk := now.disk:
        yield counter("commits", disk.commits, "Commits of the own database or spool.")
        yield counter("failed_commits", disk.failed_commits, "Commits that failed.")
        yield gauge("store_failing", int(disk.error is not None), "1 while the last commit has failed, else 0.")
        yield gauge("power_safe", int(disk.power_safe), "1 if what is acked outlasts a power cut, else 0.")
        yield (
            "ringoexp_commit_duration_seconds",
            "histogram",
            "How long a commit took, those that failed left out.",
            _histogram(disk.commit_times),
        )
    if sizes := now.sizes:
        yield gauge("database_bytes", sizes.database, "Size of the file of the own database or spool.")
        yield gauge("wal_bytes", sizes.wal, "Size of its write-ahead log.")
        if sizes.disk_free is not None:
            yield gauge("disk_free_bytes", sizes.disk_free, "Free room on its disk.")
    yield gauge("threads", threading.active_count(), "Python threads.")
    yield from _process(now.started_at)


def _process(started_at: float) -> Iterator[tuple[str, str, str, Samples]]:
    """The metrics that Prometheus's own clients have for every process, by the same names."""
    now = process()
    resident = memory()["residentBytes"]
    yield "process_start_time_seconds", "gauge", "When it started, Unix time.", [("", started_at)]
    yield "process_cpu_seconds_total", "counter", "CPU time, user and system.", [("", now["cpu"])]
    yield "process_resident_memory_bytes", "gauge", "Resident memory.", [("", resident)]
    if "fds" in now:
        yield "process_open_fds", "gauge", "Open file descriptors.", [("", int(now["fds"]))]
    if "most_fds" in now:
        yield "process_max_fds", "gauge", "Most file descriptors it may open.", [("", int(now["most_fds"]))]
    collections = [(_labels(generation=str(n)), each["collections"]) for n, each in enumerate(gc.get_stats())]
    yield "python_gc_collections_total", "counter", "Garbage collections, by generation.", collections
