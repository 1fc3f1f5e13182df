"""What a server says of itself: one snapshot of all its rooms, as the JSON of `/v1.0/stats`.

No thread runs here and nothing is guarded: each room locks for its own snapshot.
"""

import datetime
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from ringbuffer import Ring
from ringolib import __version__
from ringolib.counters import Totals
from ringolib.forward.spool import Spool
from ringolib.forward.workers import Forwarder
from ringolib.net.credentials import Credentials
from ringolib.options import Settings
from ringolib.status import prometheus
from ringolib.status.probe import Reason
from ringolib.status.process import memory
from ringolib.status.readiness import Readiness
from ringolib.status.snapshot import Snapshot, consumer_away, consumer_state, records_stored
from ringolib.storage.interface import Storage
from ringolib.storage.retention import Retention
from ringolib.timing import format_unix_time, format_utc
from ringolib.web.connections import Connections


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
        "certificateExpires": None if now.certificate_ends is None else format_unix_time(now.certificate_ends),
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


def layout(now: Snapshot) -> dict[str, Any] | None:
    """The `ring` of `/v1.0/stats`; None for a server that has none."""
    if not now.layout:
        return None
    names = {"in_flight": "inFlight"}
    return {names.get(name, name): value for name, value in now.layout._asdict().items()}


class Sources(NamedTuple):
    """The parts of a running server that a report reads; None for those that it does not have."""

    settings: Settings
    argv: Sequence[str]
    totals: Totals
    server: Connections
    credentials: Credentials
    ring: Ring | None
    store: Storage | None
    spool: Spool | None
    forwarder: Forwarder | None
    forwards: bool  # the forwarder's destinations are consumers, not the own store
    retention: Retention | None


class Report:
    """What a server says about itself, at any time and in any thread: stats, metrics, readiness, identity."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._uuid = str(uuid.uuid4()).upper()
        self._started = datetime.datetime.now(datetime.timezone.utc)
        forwarder = sources.forwarder if sources.forwards else None
        self._readiness = Readiness(sources.ring, sources.store, sources.spool, forwarder, sources.credentials)

    def snapshot(self) -> Snapshot:
        """What all the parts say now."""
        parts = self._sources
        totals = parts.totals.snapshot()  # first: what is acked is stored
        database = parts.store or (parts.spool.store if parts.spool else None)
        disk = database.stats() if database else None
        valid = parts.credentials.current.valid
        return Snapshot(
            version=__version__,
            started_at=self._started.timestamp(),
            totals=totals,
            connections=parts.server.stats(),
            ring=parts.ring.stats() if parts.ring else None,
            layout=parts.ring.layout() if parts.ring else None,
            forwarder=parts.forwarder.stats() if parts.forwarder else None,
            consumers=self._readiness.consumers(),
            store=disk if parts.store else None,
            spool=parts.spool.stats() if parts.spool else None,
            retention=parts.retention.stats() if parts.retention else None,
            disk=disk,
            sizes=database.sizes() if database else None,
            certificate_ends=valid[1] if valid else None,
            not_ready=[reason.code for reason in self._readiness.reasons(wait=False)],
        )

    def report(self) -> dict[str, Any]:
        """The JSON of `/v1.0/stats`. The README explains each key."""
        settings = {_camel(key): value for key, value in asdict(self._sources.settings).items()}
        settings["port"] = self._sources.server.port
        now = self.snapshot()
        return {
            "info": {"version": __version__, "uuid": self._uuid, **settings},
            "options": self._sources.argv,
            "stats": {"startTime": format_utc(self._started), **stats(now)},
            "ring": layout(now),
            "memStats": memory(),
        }

    def metrics(self) -> str:
        """The text of `/metrics`."""
        return prometheus.text(self.snapshot())

    def reasons(self) -> list[Reason]:
        """Why a record sent now would not be stored, as far as the connections are not the reason."""
        return self._readiness.reasons()

    def identity(self) -> str | None:
        """The UUID of the database that records go to without a link in between; None if there is none."""
        return self._sources.store.identity if self._sources.store else None


def _camel(name: str) -> str:
    head, *tail = name.split("_")
    return head + "".join(word.capitalize() for word in tail)
