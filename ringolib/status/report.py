"""`Report`: everything that a server reports about itself, read from its parts.

Any thread may use it. It has no lock and starts no threads: each part takes its own snapshot under its own lock.
"""

import datetime
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

from ringbuffer import Ring, RingLayout
from ringolib import __version__
from ringolib.counters import Totals
from ringolib.forward.spool import Spool
from ringolib.forward.workers import Forwarder
from ringolib.net.credentials import Credentials
from ringolib.options import OPTIONS, Settings
from ringolib.status import process
from ringolib.status.numbers import MEMORY_STATS, STATS, to_json
from ringolib.status.peaks import Peaks
from ringolib.status.prometheus import metrics_text
from ringolib.status.readiness import Readiness
from ringolib.status.readiness_rules import Reason
from ringolib.status.snapshot import Snapshot
from ringolib.storage.interface import Storage
from ringolib.storage.retention import Retention
from ringolib.web.budget import Budget
from ringolib.web.connections import Connections


class Sources(NamedTuple):
    """The parts of a running server that a report reads. A part that the server does not have is None."""

    settings: Settings
    argv: Sequence[str]
    totals: Totals
    server: Connections
    budget: Budget
    credentials: Credentials
    ring: Ring | None
    store: Storage | None
    spool: Spool | None
    forwarder: Forwarder | None
    forwards: bool  # true if the forwarder's destinations are consumers, false if they are the server's own store
    retention: Retention | None


class Report:
    """Stats, metrics, readiness and identity of a server, at any time."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._uuid = str(uuid.uuid4()).upper()
        self._peaks = Peaks()
        self._started = datetime.datetime.now(datetime.timezone.utc)
        forwarder = sources.forwarder if sources.forwards else None
        self._readiness = Readiness(sources.ring, sources.store, sources.spool, forwarder, sources.credentials)

    def snapshot(self) -> Snapshot:
        """Return a snapshot of all parts."""
        parts = self._sources
        totals = parts.totals.snapshot()  # before the ring and the store, so that acked records are stored records
        database = parts.store or (parts.spool.store if parts.spool else None)
        disk = database.stats() if database else None
        valid = parts.credentials.current.valid
        return Snapshot(
            version=__version__,
            started_at=self._started.timestamp(),
            memory=process.memory(),
            totals=totals,
            connections=parts.server.stats(),
            unfinished=parts.budget.held,
            ring=parts.ring.stats() if parts.ring else None,
            layout=self._peaks.look(parts.ring) if parts.ring else None,
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

    def report(self, since: int | None = None) -> dict[str, Any]:
        """Return the JSON of `/v1.0/stats`. docs/http.md explains each key.

        The `highest` of its `ring` covers the time since the ring's cursor was `since`, or since the start.
        """
        settings = {_camel_case(option.long): getattr(self._sources.settings, option.long) for option in OPTIONS}
        settings["port"] = self._sources.server.port
        snapshot = self.snapshot()
        layout = snapshot.layout
        if layout and snapshot.ring:
            highest = snapshot.ring.high_water if since is None else self._peaks.since(since)
            layout = layout._replace(highest=max(layout.highest, highest))
        return {
            "info": {"version": __version__, "uuid": self._uuid, **settings},
            "options": self._sources.argv,
            "stats": to_json(STATS, snapshot),
            "ring": _layout_json(layout),
            "memStats": to_json(MEMORY_STATS, snapshot),
        }

    def metrics(self) -> str:
        """Return the text of `/metrics`."""
        return metrics_text(self.snapshot())

    def reasons(self, wait: bool = True) -> list[Reason]:
        """Return why a record sent now would not be stored now. The HTTP server adds its own reasons."""
        return self._readiness.reasons(wait)

    def absent_consumers(self) -> list[Reason]:
        """Ask each consumer that no record has been sent to, and return why some do not store."""
        return self._readiness.absent()

    def identity(self) -> str | None:
        """Return the UUID of the server's own database, or None if it has none."""
        return self._sources.store.identity if self._sources.store else None


def _layout_json(layout: RingLayout | None) -> dict[str, Any] | None:
    """Return the `ring` of `/v1.0/stats`, None for a server without a ring."""
    return {_camel_case(name): value for name, value in layout._asdict().items()} if layout else None


def _camel_case(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(word.capitalize() for word in others)
