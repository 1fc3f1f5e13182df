"""`GET /v1.0/ready`: collects the facts about a server, and asks for the missing ones.

Records in flight show whether a consumer stores them. If there were none lately, a publisher asks each consumer for its
own `/v1.0/ready`. A server with a database tries a commit that changes nothing. Each question is a `Probe`, so callers
are answered in time even if the consumer or the disk hangs. The rules are in `readiness_rules.py`.

`Readiness._lock` guards the set of probes. Nothing is asked under it.
"""

import threading
from collections.abc import Sequence
from typing import NamedTuple

from ringbuffer import Ring
from ringolib.forward.destination import Destination
from ringolib.forward.health import HealthStats
from ringolib.forward.spool import Spool, UnopenedStore
from ringolib.forward.workers import Forwarder
from ringolib.net.credentials import Credentials
from ringolib.status import readiness_rules as rules
from ringolib.status.probe import Answer, Probe, answer_deadline, check_consumer, no_answer
from ringolib.status.readiness_rules import Known, Reason
from ringolib.storage.interface import Storage, StoreError

MIN_FREE_BYTES = 1 << 20
"""Free disk space below which a commit would probably fail."""


class ConsumerStats(NamedTuple):
    """A snapshot of one consumer as its publisher sees it."""

    address: str
    health: HealthStats
    workers: int
    in_doubt: int  # records that it has possibly stored, and that wait for it


class Readiness:
    """Knows the parts that a record passes through, and finds out whether they would store one now.

    These are the ring, and then either the server's own store or the consumers of `forwarder`. If it forwards, it may
    have a spool.
    """

    def __init__(
        self,
        ring: Ring | None,
        store: Storage | None,
        spool: Spool | None,
        forwarder: Forwarder | None,
        credentials: Credentials,
    ) -> None:
        self._ring = ring
        self._spool = spool
        self._forwarder = forwarder
        self._credentials = credentials
        self._store = store
        self._disk_probe = Probe("disk", self._check_disk, ("store_failing", f"the database: {no_answer()}"))
        self._lock = threading.Lock()
        self._consumer_probes: dict[Destination, Probe] = {}  # guarded by _lock

    def reasons(self, wait: bool = True) -> list[Reason]:
        """Return the reasons why a record sent now would not be stored now; an empty list if it would.

        If `wait` is false, try a commit only if the last one failed, and take the last answers of the consumers.
        """
        known = self._known(wait)
        return rules.not_ready(known, self._ring.stats() if self._ring else None)

    def consumers(self) -> list[ConsumerStats]:
        """Return the state of each consumer; an empty list if the server forwards to none."""
        if not self._forwarder:
            return []
        destinations = self._forwarder.destinations
        self._refresh(destinations)
        deadline = answer_deadline(wait=False)
        in_doubt = self._forwarder.in_doubt()
        return [
            ConsumerStats(
                str(destination.endpoint),
                self._reported_health(destination, deadline),
                destination.workers,
                in_doubt.get(destination, 0),
            )
            for destination in destinations
        ]

    def absent(self) -> list[Reason]:
        """Ask each consumer that no record has been sent to, and return why some do not store. Waits for answers."""
        destinations = self._forwarder.destinations if self._forwarder else []
        untried = [one for one in destinations if one.consumer.stats().state == "unknown"]
        self._refresh(untried)
        deadline = answer_deadline(wait=True)
        reasons = [self._consumer_reason(destination, True, deadline) for destination in untried]
        return [reason for reason in reasons if reason]

    def _known(self, wait: bool) -> Known:
        """Collect the facts, as far as they can change the result: asking costs a commit or a request."""
        if not self._forwarder:
            return Known(disk=self._disk_reason(wait))
        known = Known(self._consumer_reasons(self._forwarder.destinations, wait))
        if not self._spool or not known.consumers or None in known.consumers:
            return known
        spool_full = self._spool.refuses()
        disk = None if spool_full else self._disk_reason(wait)
        return known._replace(has_spool=True, spool_full=spool_full, disk=disk)

    # Consumers.

    def _consumer_reasons(self, destinations: Sequence[Destination], wait: bool) -> list[Reason | None]:
        """Return why each consumer does not store. Stops with None at the first one that does."""
        if any(map(_has_fresh_ack, destinations)):
            return [None]
        self._refresh(destinations)
        deadline = answer_deadline(wait)
        reasons: list[Reason | None] = []
        for destination in destinations:
            reasons.append(self._consumer_reason(destination, wait, deadline))
            if reasons[-1] is None:
                break
        return reasons

    def _consumer_reason(self, destination: Destination, wait: bool, deadline: float) -> Reason | None:
        health = destination.consumer.stats()
        untried = health.state == "down" and self._is_untried(destination)
        answer = self._probe(destination).reason(wait, deadline) if rules.must_ask(health, untried) else None
        return rules.consumer_reason(health, untried, answer)

    def _reported_health(self, destination: Destination, deadline: float) -> HealthStats:
        health = destination.consumer.stats()
        reason = self._consumer_reason(destination, False, deadline)
        return rules.reported_health(health, reason, self._probe(destination).answered)

    def _is_untried(self, destination: Destination) -> bool:
        """True if there is a link again but no record to try it with, because another consumer took those in doubt."""
        assert self._forwarder
        if self._spool or not self._ring or self._ring.stats().depth:
            return False
        return destination not in self._forwarder.in_doubt() and self._forwarder.linked(destination)

    def _refresh(self, destinations: Sequence[Destination]) -> None:
        """Start to ask all consumers at once, so that the slow ones do not add up."""
        for destination in destinations:
            self._probe(destination).refresh()

    def _probe(self, destination: Destination) -> Probe:
        """Return the probe of a consumer. To create one, also drop the probes of former consumers."""
        assert self._forwarder and destination.endpoint
        with self._lock:
            if destination not in self._consumer_probes:
                endpoint, linked = destination.endpoint, self._forwarder.linked
                self._consumer_probes = {
                    current: self._consumer_probes[current]
                    for current in self._forwarder.destinations
                    if current in self._consumer_probes
                }
                self._consumer_probes[destination] = Probe(
                    "consumer",
                    lambda: check_consumer(endpoint, self._credentials.current, linked(destination)),
                    ("consumer_unreachable", f"{endpoint}: {no_answer()}"),
                )
            return self._consumer_probes[destination]

    # The database.

    def _disk(self) -> Storage | UnopenedStore:
        """Return the store whose disk a record needs: the server's own, or its spool's."""
        if self._store:
            return self._store
        assert self._spool
        return self._spool.store

    def _disk_reason(self, wait: bool) -> Reason | None:
        if wait:
            return self._disk_probe.reason(wait)
        error = self._disk().stats().error
        if not error:
            return None
        # A successful test commit clears the error.
        return self._disk_probe.reason(wait) or Reason("store_failing", error)

    def _check_disk(self) -> Answer:
        """Try a commit. Return why it fails, or None."""
        disk = self._disk()
        free = disk.sizes().disk_free
        if free is not None and free < MIN_FREE_BYTES:
            return "disk_full", f"{disk.path}: only {free} bytes are free on its disk: free some space"
        try:
            disk.check()
        except StoreError as error:
            return "store_failing", str(error)
        failing = disk.stats().error  # of a commit of records, which needs more space than the test
        return ("store_failing", failing) if failing else None


def _has_fresh_ack(destination: Destination) -> bool:
    """True if a recent ack shows that the consumer stores, so that nothing has to be asked."""
    health = destination.consumer
    return not health.down and health.stats().quiet < rules.ACK_FRESH_SECONDS
