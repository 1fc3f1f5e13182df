"""What a server says of itself: one snapshot of all its rooms, as the JSON of `/v1.0/stats`.

No thread runs here and nothing is guarded: each room locks for its own snapshot.
"""

from typing import Any, NamedTuple

from ringbuffer import RingLayout, RingStats
from ringolib.counters import TotalsSnapshot
from ringolib.forward.spool import SpoolStats
from ringolib.forward.workers import ForwarderStats
from ringolib.status.readiness import ConsumerStats
from ringolib.storage.interface import Sizes, StoreStats
from ringolib.storage.retention import RetentionStats
from ringolib.timing import at
from ringolib.web.connections import ConnectionStats


class Snapshot(NamedTuple):
    """What the rooms say at nearly one moment; None for those that this server does not have."""

    version: str
    started_at: float  # Unix time
    totals: TotalsSnapshot
    connections: ConnectionStats
    ring: RingStats | None
    layout: RingLayout | None
    forwarder: ForwarderStats | None
    consumers: list[ConsumerStats]  # where they are not the server itself
    store: StoreStats | None  # its own database, where it has one
    spool: SpoolStats | None
    retention: RetentionStats | None  # where old records are deleted
    disk: StoreStats | None  # of its own database, or else of its spool
    sizes: Sizes | None  # of that
    certificate_ends: float | None  # Unix time, of its own certificate
    not_ready: list[str]  # the codes of why a record sent now would not be stored now, as far as known without a commit


def consumer_state(now: Snapshot) -> str | None:
    """How it stands with the consumers: "up" if it is with one of them, "down" if they all are; "own" for a publisher
    that is its own, None for a server without one.
    """
    states = [each.link.state for each in now.consumers]
    if not states:
        return "own" if now.ring else None
    return "up" if "up" in states else "unknown" if "unknown" in states else "down"


def consumer_away(now: Snapshot) -> float:
    """Seconds since the last consumer of all has gone; 0 if one is there."""
    return min(each.link.away for each in now.consumers) if consumer_state(now) == "down" else 0.0


def stats(now: Snapshot) -> dict[str, Any]:
    """The `stats` of `/v1.0/stats`. The README explains each key."""
    totals, ring, forwarder, spool, disk = now.totals, now.ring, now.forwarder, now.spool, now.disk
    why = "; ".join(each.link.reason or "" for each in now.consumers) if consumer_state(now) == "down" else None
    return {
        "recordsReceived": totals.received,
        "recordsStored": records_stored(now.store, ring),
        "recordsAcked": totals.acked,
        "recordsDuplicate": now.store.duplicates if now.store else 0,
        "recordsRefused": totals.refused,
        "recordsExpired": now.retention.expired if now.retention else 0,
        "oldestRecordMs": round(now.retention.oldest * 1000) if now.retention else 0,
        "commits": disk.commits if disk else 0,
        "failedCommits": disk.failed_commits if disk else 0,
        "storeError": disk.error if disk else None,
        "powerSafe": disk.power_safe if disk else None,
        "databaseBytes": now.sizes.database if now.sizes else 0,
        "walBytes": now.sizes.wal if now.sizes else 0,
        "diskFreeBytes": now.sizes.disk_free if now.sizes else None,
        "bytesReceived": totals.bytes_received,
        "connections": now.connections.now,
        "totalConnections": now.connections.total,
        "unauthorizedRequests": now.connections.unauthorized,
        "tlsFailures": now.connections.tls_failed,
        "certificateExpires": None if now.certificate_ends is None else at(now.certificate_ends),
        "refusedConnections": now.connections.refused,
        "clients": totals.clients,
        "publishers": totals.publishers,
        "ringSize": ring.capacity if ring else 0,
        "ringDepth": ring.depth if ring else 0,
        "ringInFlight": ring.in_flight if ring else 0,
        "ringHighWater": ring.high_water if ring else 0,
        "ringTimesFull": ring.times_full if ring else 0,
        "ringOldestInFlightMs": round(ring.oldest_in_flight * 1000, 3) if ring else 0,
        "workers": forwarder.workers if forwarder else 0,
        "mostWorkers": forwarder.most_workers if forwarder else 0,
        "linkReconnects": forwarder.reconnects if forwarder else 0,
        "notReady": now.not_ready,
        "consumerState": consumer_state(now),
        "consumerReason": why,
        "consumerAwayMs": round(consumer_away(now) * 1000),
        "consumers": [
            {
                "address": each.address,
                "state": each.link.state,
                "reason": each.link.reason,
                "awayMs": round(each.link.away * 1000),
                "workers": each.workers,
                "inDoubt": each.in_doubt,
            }
            for each in now.consumers
        ],
        "spoolDepth": spool.depth if spool else 0,
        "spoolOldestMs": round(spool.oldest * 1000) if spool else 0,
        "spoolForwarded": spool.forwarded if spool else 0,
        "ackLatencyP50Ms": totals.ack_latency_p50_ms,
        "ackLatencyP99Ms": totals.ack_latency_p99_ms,
    }


def records_stored(store: StoreStats | None, ring: RingStats | None) -> int:
    """Records stored since the start: new ones in the own database, or else acked by the consumer or spooled."""
    return store.stored if store else ring.stored if ring else 0


def layout(now: Snapshot) -> dict[str, Any] | None:
    """The `ring` of `/v1.0/stats`; None for a server that has none."""
    if not now.layout:
        return None
    names = {"in_flight": "inFlight"}
    return {names.get(name, name): value for name, value in now.layout._asdict().items()}
