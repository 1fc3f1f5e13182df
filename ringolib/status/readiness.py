"""`GET /v1.0/ready`: would a record sent now be stored now? Finds out instead of remembering, where nobody knows.

A server that is asked and has no news of its own asks further: its database with a commit that changes nothing, its
consumers with the same request. It does so at most once every FRESH seconds, in the threads `ask-disk` and `ask-
consumer`, one for each question, so that who asks is answered in time, whatever hangs. `_Question._lock` guards the
last answer; `_answered` shares it and is notified when there is one. Nothing is asked under the lock.
"""

import logging
import threading
from time import monotonic
from typing import NamedTuple

from ringbuffer import Ring
from ringolib.forward.destination import Destination, Pin
from ringolib.forward.link import LinkStats
from ringolib.forward.spool import Spool
from ringolib.forward.workers import Forwarder
from ringolib.net.credentials import Credentials
from ringolib.status.probe import BRIEFLY, FRESH, PATIENCE, Answer, Reason, _check_consumer, _late, _Question
from ringolib.storage.interface import Storage, StoreError

log = logging.getLogger("ringoexp.ready")

STUCK = 1.0
"""Seconds for which a full ring has to wait for its oldest batch until it counts as full: less is backpressure."""
LITTLE_ROOM = 1 << 20
"""Bytes of free disk below which no commit is to be hoped for."""


class ConsumerStats(NamedTuple):
    """A snapshot of one consumer, as its publisher sees it."""

    address: str
    link: LinkStats
    workers: int
    in_doubt: int  # records that it may have stored, and that wait for it


class Readiness:
    """Knows what a record's way goes through: the ring, then the own store, or the links, those of `forwarder`, and
    perhaps the spool.

    One consumer that would store is enough.
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
        self._disk: Storage | None = store or (spool.store if spool else None)
        self._ask_disk = _Question("disk", self._check_disk, ("store_failing", f"the database: {_late()}"))
        self._lock = threading.Lock()
        self._ask_consumer: dict[Destination, _Question] = {}  # guarded by _lock

    def reasons(self, wait: bool = True) -> list[Reason]:
        """Why a record sent now would not be stored now; none if it would.

        Without `wait` the database is not asked, and of the consumer the last answer is taken.
        """
        found = []
        if self._forwarder:
            away = self._consumers_away(wait)
            if away and (not self._spool or (why := self._spool_refuses(wait))):
                found += away
                if self._spool and why:
                    found.append(why)
        elif why := self._disk_fails(wait):
            found.append(why)
        if full := self._ring_full():
            found.append(full)
        return found

    def consumers(self) -> list[ConsumerStats]:
        """What records on their way have shown of each consumer, or else its last answer; none for an own store."""
        if not self._forwarder:
            return []
        destinations = self._forwarder.destinations
        for destination in destinations:
            self._question(destination).begin()
        deadline = monotonic() + BRIEFLY
        doubts = self._doubts()
        return [
            ConsumerStats(str(each.endpoint), self._known(each, deadline), each.workers, doubts.get(each, 0))
            for each in destinations
        ]

    def _known(self, destination: Destination, deadline: float) -> LinkStats:
        assert destination.link
        link, away = destination.link.stats(), self._consumer_away(destination, False, deadline)
        if away and away.code == "consumer_unreachable":
            return link._replace(state="down", reason=away.detail, away=away.seconds or 0.0)
        answered = self._question(destination).answered
        if link.state == "unknown" and answered and (not away or away.code == "consumer_not_ready"):
            return link._replace(state="up")
        return link

    def _consumers_away(self, wait: bool) -> list[Reason]:
        """Why no consumer takes anything, each of them; nothing if one does."""
        assert self._forwarder
        destinations = self._forwarder.destinations
        if any(each.link and not each.link.down and each.link.stats().quiet < FRESH for each in destinations):
            return []
        for destination in destinations:
            self._question(destination).begin()
        deadline = monotonic() + (PATIENCE if wait else BRIEFLY)
        found = []
        for destination in destinations:
            away = self._consumer_away(destination, wait, deadline)
            if not away:
                return []
            found.append(away)
        return found

    def _consumer_away(self, destination: Destination, wait: bool, deadline: float) -> Reason | None:
        assert destination.link
        link = destination.link.stats()
        if link.state == "down" and not self._untried(
            destination
        ):  # a worker, or the spool's thread, tries all the time
            return Reason("consumer_unreachable", link.reason or "", link.away)
        return (
            None if link.quiet < FRESH and link.state != "down" else self._question(destination).reason(wait, deadline)
        )

    def _untried(self, destination: Destination) -> bool:
        """True when there is a link again, and nothing to try it with: another took over what was in doubt there."""
        assert self._forwarder
        if self._spool or not self._ring or self._ring.stats().depth:
            return False
        return destination not in self._doubts() and self._forwarder.linked(destination)

    def _question(self, destination: Destination) -> _Question:
        assert self._forwarder and destination.endpoint
        with self._lock:
            if destination not in self._ask_consumer:
                place, linked = destination.endpoint, self._forwarder.linked
                self._ask_consumer = {
                    each: self._ask_consumer[each]
                    for each in self._forwarder.destinations
                    if each in self._ask_consumer
                }
                self._ask_consumer[destination] = _Question(
                    "consumer",
                    lambda: _check_consumer(place, self._credentials.current, linked(destination)),
                    ("consumer_unreachable", f"{place}: {_late()}"),
                )
            return self._ask_consumer[destination]

    def _doubts(self) -> dict[Destination, int]:
        """How many records are in doubt at each consumer that has some, and wait for it."""
        found: dict[Destination, int] = {}
        for mark, size in self._ring.marks() if self._ring else ():
            assert isinstance(mark, Pin)
            found[mark.destination] = found.get(mark.destination, 0) + size
        return found

    def _spool_refuses(self, wait: bool) -> Reason | None:
        assert self._spool
        if why := self._spool.refuses():
            return Reason("spool_full", why)
        return self._disk_fails(wait)

    def _disk_fails(self, wait: bool) -> Reason | None:
        if wait:
            return self._ask_disk.reason(wait)
        assert self._disk
        error = self._disk.stats().error
        if not error:
            return None
        return self._ask_disk.reason(wait) or Reason("store_failing", error)  # a check may make it good

    def _ring_full(self) -> Reason | None:
        if not self._ring:
            return None
        ring = self._ring.stats()
        if ring.depth < ring.capacity or ring.oldest_in_flight < STUCK:
            return None
        return Reason("ring_full", f"all {ring.capacity} slots are taken", ring.oldest_in_flight)

    def _check_disk(self) -> Answer:
        assert self._disk
        free = self._disk.sizes().disk_free
        if free is not None and free < LITTLE_ROOM:
            return "disk_full", f"{self._disk.path}: {free} bytes are left on its disk: make room"
        try:
            self._disk.check()
        except StoreError as error:
            return "store_failing", str(error)
        failing = self._disk.stats().error  # of records: a check needs less
        return ("store_failing", failing) if failing else None
