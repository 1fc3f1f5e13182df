"""Deletes what is older than `--retain`, a little at a time, while records come in.

The thread `retain` has the store delete the oldest records for STEP_SECONDS, then leaves the database to the commits
for PAUSE times as long as that took, its own wait for them included, and so on; when nothing is too old any more it
looks again once something will be, each second at most. `Retention._lock` guards its figures; `_changed` shares it, is
notified by `stop`, and the thread alone waits on it. Nothing is deleted under the lock.

A record's age is by `received_at_ms`, the wall clock when it came. This is the only room in which a wrong clock could
do harm: set ahead by a year, it would have everything deleted. So a clock that leaps ahead, of itself or of the newest
record at the start, is believed only when it has stayed there for TRUST_SECONDS; one that goes back, at once.

The rows of `batch`, by which duplicates are known, stay for REMEMBERED_SECONDS more: a publisher may have been cut off
before it saw an ack, and send its spool only when the link is back. To know the numbers of a source for ever would take
a row of each: clients without a source of their own have a new one each time, and its rows are larger than its records.
"""

import logging
import threading
import time
from time import monotonic
from typing import NamedTuple

from store import Expired, Store

log = logging.getLogger("ringoexp.retain")

DAY = 86_400.0
STEP_SECONDS = 0.005
"""For how long it deletes before it commits: a commit of records that comes meanwhile waits for it."""
MAX_STEP = 0.1
"""The same, where commits are long: then it has to wait for each of them, and would fall behind with steps so short."""
PAUSE = 3.0
"""For how many times as long as a step took it leaves the database to others."""
LEAST_WAIT, MAX_WAIT = 1.0, 60.0
"""Seconds between looks, when nothing is left to delete."""
RETRY_SECONDS = 5.0
"""How long it waits after an error."""
REMEMBERED_SECONDS = 7 * DAY
"""For how long a deleted record's number is known, and not stored again."""
TRUST_SECONDS = DAY
"""How long a clock that has leapt ahead must stay there: time for somebody, or for NTP, to put it right."""
LEAP_SECONDS = 60.0
"""By how much a clock may be ahead of what was to be expected; less is no leap."""
SAY_SECONDS = 3600.0
"""Between two lines of the log that say how much was deleted; the stop says the rest."""


class RetentionStats(NamedTuple):
    """A snapshot."""

    expired: int  # records deleted since the start
    oldest: float  # seconds since the oldest record came, by the wall clock; 0 if there is none


class Clock:
    """The wall clock, in Unix time, but that a leap ahead of `seen`, or later of itself, has to last TRUST_SECONDS."""

    def __init__(self, seen: float | None) -> None:
        wall = time.time()
        self._now = wall if seen is None else min(wall, seen)
        self._at = monotonic()
        self._leapt: float | None = None  # when it was first found ahead, monotonic seconds

    def now(self) -> float:
        """What time it is believed to be."""
        wall, at = time.time(), monotonic()
        expected = self._now + at - self._at
        if wall <= expected + LEAP_SECONDS:
            self._leapt = None
        else:
            self._leapt = at if self._leapt is None else self._leapt
            if at - self._leapt < TRUST_SECONDS:
                wall = expected
        self._now, self._at = wall, at
        return wall


class Retention:
    """Keeps the records of `store` for `days`, which may be less than one. Starts at once.

    Raises RuntimeError when there is no thread to be had.
    """

    def __init__(self, store: Store, days: float) -> None:
        self._store = store
        self._keep = days * DAY

        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        # Guarded by _lock.
        self._stopping = False
        self._expired = 0
        self._oldest_ms: int | None = None  # when the oldest record came, Unix time

        # The thread's.
        self._clock: Clock | None = None  # from the first look on
        self._step_seconds = STEP_SECONDS  # of the next step
        self._failing = False
        self._waiting = False  # and the log says why
        self._records = self._batches = 0  # deleted and forgotten since the log said so
        self._said_at = monotonic()

        # Daemon: a second signal ends the process at once, whatever it waits for.
        self._thread = threading.Thread(target=self._run, name="retain", daemon=True)
        self._thread.start()

    def stats(self) -> RetentionStats:
        """What there is now, and the total since the start."""
        with self._lock:
            age = 0.0 if self._oldest_ms is None else max(0.0, time.time() - self._oldest_ms / 1000)
            return RetentionStats(self._expired, age)

    def stop(self, timeout: float) -> bool:
        """Ends the thread after the step that runs; True if it ended within `timeout` seconds."""
        with self._lock:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # The thread.

    def step(self) -> float:
        """One turn: deletes what is too old, for STEP_SECONDS. Returns how many seconds to wait before the next one."""
        try:
            if self._clock is None:
                newest_ms = self._store.expire(0, 0, 0).newest_ms
                self._clock = Clock(None if newest_ms is None else newest_ms / 1000)
            now = self._clock.now()
            before = now - self._keep
            began = monotonic()
            done = self._store.expire(int(before * 1000), int((before - REMEMBERED_SECONDS) * 1000), self._step_seconds)
            # Where commits are long, so is the wait between two of them: a third of it is its quarter of the time.
            waited = monotonic() - began - done.seconds
            self._step_seconds = min(MAX_STEP, max(STEP_SECONDS, waited / PAUSE))
        except Exception as error:  # a full disk, say: the store has rolled back
            level = logging.DEBUG if self._failing else logging.ERROR
            log.log(level, "retain_error", {"error": str(error)}, exc_info=log.isEnabledFor(logging.DEBUG))
            self._failing = True
            return RETRY_SECONDS
        self._failing = False
        with self._lock:
            self._expired += done.records
            self._oldest_ms = done.oldest_ms
        self._records, self._batches = self._records + done.records, self._batches + done.batches
        if monotonic() - self._said_at >= SAY_SECONDS:
            self._say()
        if done.more:
            return max(0.0, PAUSE * done.seconds - waited)
        self._say_why_not(done, now)
        due = (done.oldest_ms or 0) / 1000 + self._keep - now
        return min(max(due, LEAST_WAIT), MAX_WAIT)

    def _say(self) -> None:
        """Says in the log what was deleted since it said so."""
        if self._records or self._batches:
            log.info("expired", {"records": self._records, "batches_forgotten": self._batches})
            self._records = self._batches = 0
            self._said_at = monotonic()

    def _say_why_not(self, done: Expired, now: float) -> None:
        """Says in the log, once, that a clock keeps records which would be too old by it, or which it dated."""
        oldest, wall = (done.oldest_ms or 0) / 1000, time.time()
        reason = None
        if oldest > wall + LEAP_SECONDS:
            reason = "the oldest records came when the clock was ahead of now"
        elif wall - now > LEAP_SECONDS and oldest < wall - self._keep and done.oldest_ms != done.newest_ms:
            reason = "the clock is ahead of the newest record, or has leapt: it is believed after a day"
        if reason and not self._waiting:
            log.warning("retention_paused", {"reason": reason, "oldest_age_seconds": round(wall - oldest)})
        self._waiting = reason is not None

    def _run(self) -> None:
        """`step` until it should end."""
        stopping = False
        while not stopping:
            until = monotonic() + self.step()
            with self._lock:
                while not self._stopping and (left := until - monotonic()) > 0:
                    self._changed.wait(left)
                stopping = self._stopping
        self._say()
