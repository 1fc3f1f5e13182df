"""`GET /v1.0/ready`: would a record sent now be stored now? Finds out instead of remembering, where nobody knows.

A server that is asked and has no news of its own asks further: its database with a commit that changes nothing, its
consumer with the same request. It does so at most once every FRESH seconds, in the thread of whoever asks;
`_Fresh._lock` guards the last answer, and `_answered` shares it and is notified when there is one. Nothing is asked
under the lock.
"""

import http.client
import json
import threading
from collections.abc import Callable
from time import monotonic
from typing import NamedTuple

from database import StoreError
from ringbuffer import Ring
from sinks import LinkState
from spool import Spool
from store import Store

FRESH = 1.0
"""Seconds for which an answer holds."""
PATIENCE = 2.0
"""Seconds the consumer has to answer."""
STUCK = 1.0
"""Seconds for which a full ring has to wait for its oldest batch until it counts as full: less is backpressure."""
LITTLE_ROOM = 1 << 20
"""Bytes of free disk below which no commit is to be hoped for."""
THEIR_LIMIT = "connections_full"
"""A consumer's reason that is none of ours: our links are some of its connections."""


class Reason(NamedTuple):
    """Why a record would not be stored now: a word for programs, a text for people, and for how long, if known."""

    code: str
    detail: str
    seconds: float | None = None


class _Fresh:
    """`ask`, called by one thread at a time, and its answer kept for FRESH seconds; with the time it has lasted."""

    def __init__(self, ask: Callable[[], tuple[str, str] | None]) -> None:
        self._ask = ask
        self._lock = threading.Lock()
        self._answered = threading.Condition(self._lock)
        # Guarded by _lock.
        self._asking = False
        self._answer: tuple[str, str] | None = None
        self._at = float("-inf")  # monotonic seconds
        self._since = 0.0  # since when the answer has had this code

    def reason(self) -> Reason | None:
        """The answer, at most FRESH seconds old."""
        deadline = monotonic() + 2 * PATIENCE
        with self._lock:
            while self._asking and (left := deadline - monotonic()) > 0:
                self._answered.wait(left)
            if self._asking or monotonic() - self._at < FRESH:
                return self._told()
            self._asking = True
        answer: tuple[str, str] | None = ("failed", "could not be asked")
        try:
            answer = self._ask()
        finally:
            with self._lock:
                if answer is None or self._answer is None or answer[0] != self._answer[0]:
                    self._since = monotonic()
                self._answer, self._at = answer, monotonic()
                self._asking = False
                self._answered.notify_all()
        with self._lock:
            return self._told()

    def _told(self) -> Reason | None:
        assert self._lock.locked()
        return self._answer and Reason(*self._answer, monotonic() - self._since)


class Readiness:
    """Knows what a record's way goes through: the ring, then the own store, or the link and perhaps the spool."""

    def __init__(
        self,
        ring: Ring | None,
        store: Store | None,
        spool: Spool | None,
        link: LinkState | None,
        consumer: tuple[str, int],
    ) -> None:
        self._ring = ring
        self._spool = spool
        self._link = link
        self._disk = store or (spool.store if spool else None)
        self._ask_disk = _Fresh(self._check_disk)
        self._ask_consumer = _Fresh(lambda: _check_consumer(*consumer))

    def reasons(self) -> list[Reason]:
        """Why a record sent now would not be stored now; none if it would."""
        found = []
        if self._link:
            away = self._consumer_away()
            if away and (not self._spool or (why := self._spool_refuses())):
                found.append(away)
                if self._spool and why:
                    found.append(why)
        elif why := self._ask_disk.reason():
            found.append(why)
        if full := self._ring_full():
            found.append(full)
        return found

    def _consumer_away(self) -> Reason | None:
        assert self._link
        link = self._link.stats()
        if link.state == "down":  # somebody tries all the time: no need to ask
            return Reason("consumer_unreachable", link.reason or "", link.away)
        return self._ask_consumer.reason()

    def _spool_refuses(self) -> Reason | None:
        assert self._spool
        if self._spool.full:
            return Reason("spool_full", f"{self._spool.path}: no room for more records")
        return self._ask_disk.reason()

    def _ring_full(self) -> Reason | None:
        if not self._ring:
            return None
        ring = self._ring.stats()
        if ring.depth < ring.capacity or ring.oldest_in_flight < STUCK:
            return None
        return Reason("ring_full", f"all {ring.capacity} slots are taken", ring.oldest_in_flight)

    def _check_disk(self) -> tuple[str, str] | None:
        assert self._disk
        free = self._disk.sizes().disk_free
        if free is not None and free < LITTLE_ROOM:
            return "disk_full", f"{self._disk.path}: {free} bytes are left on its disk: make room"
        try:
            self._disk.check()
        except StoreError as error:
            return "store_failing", str(error)
        return None


def _check_consumer(host: str, port: int) -> tuple[str, str] | None:
    """What the consumer says when it is asked whether it is ready; nothing if it is."""
    where = f"{host}:{port}"
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE)
    try:
        connection.request("GET", "/v1.0/ready", headers={"Accept": "application/json", "Connection": "close"})
        response = connection.getresponse()
        status, body = response.status, response.read(65536)
    except (OSError, http.client.HTTPException) as error:
        return "consumer_unreachable", f"{where}: {error or type(error).__name__}"
    finally:
        connection.close()
    if status in (200, 404):  # 404: an older one
        return None
    try:
        theirs = [(str(each["code"]), str(each["detail"])) for each in json.loads(body)["reasons"]]
    except (ValueError, KeyError, TypeError):
        return "consumer_unreachable", f"{where}: answered {status}"
    ours = [detail for code, detail in theirs if code != THEIR_LIMIT]
    return ("consumer_not_ready", f"{where}: {'; '.join(ours)}") if ours else None
