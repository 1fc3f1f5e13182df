"""A publisher's look at its consumers, soon after its start: one line says which do not answer.

The thread `look` waits LOOK_DELAY_SECONDS, because consumer and publisher may be started together. It leaves out the
consumers that records have been sent to meanwhile: their links log for themselves.
"""

import logging
import threading
from collections.abc import Callable, Sequence

from ringolib.options import Settings
from ringolib.status.readiness_rules import Reason
from ringolib.timing import ThreadError, log_unexpected, start_thread

log = logging.getLogger("ringoexp.ready")

LOOK_DELAY_SECONDS = 1.0
"""How long after the start the publisher looks for its consumers."""
JOIN_SECONDS = 1.0
"""How long the stop waits for the thread: a consumer that hangs must not delay it."""


class Look:
    """Looks once. `absent` asks, and returns why consumers do not store; `hint` is the remedy."""

    def __init__(self, absent: Callable[[], Sequence[Reason]], hint: str) -> None:
        self._absent = absent
        self._hint = hint
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread. Without a thread, the publisher does not look."""
        try:
            self._thread = start_thread(self._run, name="look")
        except ThreadError as error:
            log.error("no_thread", {"error": str(error)})

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        if self._thread:
            self._thread.join(JOIN_SECONDS)

    def _run(self) -> None:
        """Run in the thread `look`."""
        if self._stopped.wait(LOOK_DELAY_SECONDS):
            return
        try:
            reasons = self._absent()
        except Exception as error:
            log_unexpected(log, "worker_error", error)
            return
        if reasons and not self._stopped.is_set():
            log.warning("consumer_away", {"reason": "; ".join(r.detail for r in reasons), "hint": self._hint})


def hint_for(settings: Settings) -> str:
    """Return what to do if the consumers of a publisher do not answer."""
    if settings.spool:
        return "start the consumer there; until it answers, records go into the spool"
    if settings.consumer_tls:
        return "start the consumer there"
    flags = settings.own_consumer_flags
    return f"start the consumer there, or store here: with {flags} this publisher is its own consumer"
