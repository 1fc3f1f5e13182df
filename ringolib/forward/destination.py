"""Destinations: each is one place where workers store, a consumer or the own store, with what its workers found out of it.

A batch that a consumer may have stored, and has not acked, is *in doubt*: another consumer, with a database of its
own, would not know it for a duplicate. It gets a `Pin`, the ring's mark, and waits for a worker of an destination that
takes that: the same consumer's, or one's with the same store.

`Breaker._lock` guards who probes. The rest of an destination is the forwarder's, under the forwarder's lock, or is one value
that workers read and write as they are.
"""

import threading
from collections.abc import Callable
from time import monotonic
from typing import NamedTuple

from ringolib.forward.link import LinkState
from ringolib.forward.sink import Sink
from ringolib.net.addresses import Endpoint
from ringolib.timing import backoff


class Breaker:
    """Remembers that a sink failed, and which one worker, the *prober*, is to try again, after a pause.

    The first worker to fail is the prober until it succeeds or retires; the pauses are exponential with full
    jitter. `_lock` guards everything, `_stopped` shares it and is notified by `stop`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stopped = threading.Condition(self._lock)
        self._failures = 0  # of the prober, in a row
        self._prober: threading.Thread | None = None
        self._stopping = False

    @property
    def away(self) -> bool:
        """True while there is a prober."""
        return self._prober is not None  # one read: no lock needed

    @property
    def probed_by_another(self) -> bool:
        """True while another thread than the calling one is the prober."""
        prober = self._prober
        return prober is not None and prober is not threading.current_thread()

    def failed(self) -> int:
        """The calling thread's sink failed. How often in a row, if it is now the prober; 0 if another one is."""
        with self._lock:
            if self._prober is None:
                self._prober = threading.current_thread()
            if self._prober is not threading.current_thread():
                return 0
            self._failures += 1
            return self._failures

    def succeeded(self) -> bool:
        """The calling thread's sink works. True when it was the prober, and is no more."""
        with self._lock:
            return self._leave()

    def left(self) -> None:
        """The calling thread retires: it probes no more."""
        with self._lock:
            self._leave()

    def pause(self) -> bool:
        """Returns after the prober's pause, and to others at once: True, or False once stopped."""
        with self._lock:
            if self._prober is threading.current_thread() and self._failures:
                until = monotonic() + backoff(self._failures)
                while not self._stopping and (left := until - monotonic()) > 0:
                    self._stopped.wait(left)
            return not self._stopping

    def stop(self) -> None:
        """Ends the pause; there are no more."""
        with self._lock:
            self._stopping = True
            self._stopped.notify_all()

    def _leave(self) -> bool:
        assert self._lock.locked()
        if self._prober is not threading.current_thread():
            return False
        self._prober, self._failures = None, 0
        return True


class Pin(NamedTuple):
    """Who may have a batch: it was sent to this destination, where this store may have it (None: it does not say which)."""

    destination: "Destination"
    store: str | None


class Destination:
    """Where the sinks that `make_sink` makes store. `make_sink` gets a callback, to be called when a link is made.

    `link` is what is known of the consumer at `place`, where the sinks are links; `told` is the same, if the workers
    are to tell it what they find out, and not the spool. If it is `fixed`, that is the same consumer for ever,
    whatever store it has: somebody gave it this address. Other addresses may become another one's, as may a name that
    has got others; then it is `fixed` no more. `lost` is called when a link fails. It is `alone` if there never will
    be another destination: then nothing needs a pin.
    """

    def __init__(
        self,
        make_sink: Callable[[Callable[[], None]], Sink],
        link: LinkState | None = None,
        place: Endpoint | None = None,
        fixed: bool = True,
        lost: Callable[[], None] = lambda: None,
        spooled: bool = False,
        alone: bool = True,
    ) -> None:
        self.make_sink = make_sink
        self.link = link
        self.told = None if spooled else link
        self.alone = alone
        self.place = place
        self.lost = lost
        self.breaker = Breaker()
        self.doubted = False  # the last batch that was sent failed: a link alone proves nothing
        # The forwarder's, under its lock.
        self.fixed = fixed  # never again once it is not
        self.workers = 0  # not counting those that retire
        self.leaving = False  # nobody names it any more: its workers end

    def pin(self, store: str | None) -> Pin:
        """The mark of a batch that was sent here, and that this store may have."""
        return Pin(self, store)

    def takes(self, mark: object, store: str | None) -> bool:
        """True when a batch with this mark may be sent on a link to here, at whose end is this store."""
        assert isinstance(mark, Pin)
        if mark.store is not None and mark.store == store:
            return True
        return mark.destination is self and (self.fixed or mark.store is None or store is None)
