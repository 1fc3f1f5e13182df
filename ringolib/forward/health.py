"""The health of one place to store, a consumer or the local store: up, down or unknown, and the worker that probes it.

The first worker that fails becomes the *prober*: it retries, with pauses that grow exponentially, with full jitter. It
stays the prober until it succeeds or resigns. Other workers whose links still work go on, and no worker starts
meanwhile. So an outage causes no storm of reconnects.

`Health._lock` guards the fields. `_stopped` shares it: the prober waits on it in `pause`, any worker in `sleep`, and
`stop` notifies it. Changes of state are logged under the lock, so that the lines are in order.
"""

import logging
import threading
from typing import NamedTuple

from ringolib.timing import RUNTIME, Runtime, backoff

log = logging.getLogger("ringoexp.link")

QUIET_SECONDS = 1.0
"""One failing or late link means that the consumer is down or late only if no link has had an ack for this long."""


class HealthStats(NamedTuple):
    """A snapshot of a Health."""

    state: str  # "unknown" before the first batch, then "up" or "down"
    reason: str | None  # why it is down
    away: float  # seconds since it went down; 0 if it is not down
    quiet: float  # seconds since the last ack; infinite before the first


class Health:
    """The health of `consumer`, an address for people, or of the local store if that is None."""

    def __init__(self, consumer: str | None = None, runtime: Runtime = RUNTIME) -> None:
        self._consumer = consumer
        self._runtime = runtime
        self._lock = threading.Lock()
        self._stopped = runtime.condition(self._lock)
        # Guarded by _lock, but _acked_at and _needs_ack, which are written without it. Each is also read without it:
        # one read of one value, which another thread may change a moment later in any case.
        self._state = "unknown"
        self._reason: str | None = None
        self._down_since = 0.0  # monotonic seconds, while it is down
        self._acked_at = float("-inf")  # monotonic seconds
        self._needs_ack = False  # a batch was sent without an ack, so a new link alone does not show that it is up
        self._prober: threading.Thread | None = None
        self._failures = 0  # of the prober, in a row
        self._stopping = False

    @property
    def down(self) -> bool:
        """True from the failure of a link until the next ack or link."""
        return self._state == "down"

    @property
    def probed(self) -> bool:
        """True while there is a prober."""
        return self._prober is not None

    def yields(self, linked: bool, several: bool) -> bool:
        """True if the calling worker must leave the next batch to the prober, or to another consumer of `several`.

        A worker that is `linked` may go on while another probes, because its own link may still work. If the consumer
        has left a batch without an ack, and there are others, it gets no new ones.
        """
        prober = self._prober
        if prober is None or prober is threading.current_thread():
            return False
        return not linked or (several and self._needs_ack)

    # What the links of the workers experience.

    def on_ack(self) -> None:
        """Record that a batch is stored. If the calling worker is the prober, its job is done."""
        self._acked_at = self._runtime.monotonic()
        self._needs_ack = False
        if self._state != "up" or self._prober is not None:
            with self._lock:
                self._end_probe()
                self._set_up()

    def on_link(self) -> None:
        """Record that a link was made, which shows that the consumer is up, unless it left a batch without an ack."""
        if not self._needs_ack and (self._prober is not None or self.down):
            with self._lock:
                self._end_probe()
                if self.down:
                    self._set_up()

    def on_late(self) -> None:
        """Record that the ack of the calling worker's batch is late. If there is no prober, this batch is the probe."""
        with self._lock:
            if self._is_quiet() and (self._prober is None or not self._needs_ack):
                self._prober, self._needs_ack = self._prober or threading.current_thread(), True
                log.warning("link_late", {"consumer": self._consumer})

    def on_failure(self, reason: str | None, sent: bool) -> bool:
        """Record that the calling worker failed. Return True if it is the prober, who goes on.

        `sent`: a batch was sent and not acked. If `reason` is None, the error is not the consumer's.
        """
        if sent:
            self._needs_ack = True
        with self._lock:
            if self._prober is None:
                self._prober = threading.current_thread()
            probes = self._prober is threading.current_thread()
            self._failures += probes
            if reason is not None:
                if probes and self._is_quiet():
                    self._set_down(reason)
                else:
                    log.debug("link_failed", {"reason": reason})
            return probes

    def set_down(self, reason: str) -> None:
        """Record that a link without workers failed, so the consumer is down: the spool's, which pauses by itself."""
        with self._lock:
            self._set_down(reason)

    # The prober.

    def resign(self) -> None:
        """If the calling thread is the prober, it ends, so another worker must probe."""
        with self._lock:
            self._end_probe()

    def pause(self) -> bool:
        """If the calling thread is the prober, wait until its next try is due. Return False after `stop`."""
        with self._lock:
            if self._prober is threading.current_thread() and self._failures:
                self._runtime.wait_until(
                    self._stopped, lambda: self._stopping, self._runtime.deadline_after(backoff(self._failures))
                )
            return not self._stopping

    def sleep(self, seconds: float) -> bool:
        """Wait for `seconds`, or until `stop`. Return False after `stop`."""
        with self._lock:
            return not self._runtime.wait_until(
                self._stopped, lambda: self._stopping, self._runtime.deadline_after(seconds)
            )

    def stop(self) -> None:
        """End the pauses. There are no more pauses."""
        with self._lock:
            self._stopping = True
            self._stopped.notify_all()

    def stats(self) -> HealthStats:
        """Return a snapshot."""
        with self._lock:
            away = self._runtime.monotonic() - self._down_since if self.down else 0.0
            return HealthStats(self._state, self._reason, away, self._runtime.monotonic() - self._acked_at)

    # Helpers. The caller of each holds the lock.

    def _is_quiet(self) -> bool:
        """True if no link has had an ack lately. There is one local store, so one failure counts."""
        return self._consumer is None or self._runtime.monotonic() - self._acked_at >= QUIET_SECONDS

    def _end_probe(self) -> None:
        assert self._lock.locked()
        if self._prober is threading.current_thread():
            self._prober, self._failures = None, 0

    def _set_up(self) -> None:
        before, self._state, self._reason = self._state, "up", None
        if before == "up":
            return
        away = {"away_seconds": round(self._runtime.monotonic() - self._down_since, 1)} if before == "down" else {}
        if self._consumer is not None:
            log.info("link_up", {"consumer": self._consumer, **away})
        elif before == "down":
            log.info("sink_up", away)

    def _set_down(self, reason: str) -> None:
        assert self._lock.locked()
        was_down = self.down
        if not was_down:
            self._state, self._down_since = "down", self._runtime.monotonic()
        self._reason = reason
        level = logging.DEBUG if was_down else logging.WARNING
        if self._consumer is not None:
            log.log(level, "link_down", {"consumer": self._consumer, "reason": reason})
        else:
            log.log(level, "sink_down", {"reason": reason})
