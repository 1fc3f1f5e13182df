"""Destinations: each is one place where workers store batches, a consumer or the local store.

A batch that was sent to a consumer and not acked is *in doubt*: the consumer may have stored it. Another consumer, with
a database of its own, would not recognise it as a duplicate. So the worker requeues the batch with a `Pin` as its mark
in the ring. Only a worker whose link leads to the same consumer, or to the same store, accepts the pin.

`Breaker._lock` guards which worker probes. Some fields of a `Destination` are guarded by the lock of the `Forwarder`.
The others are single values that workers read and write without a lock.
"""

import threading
from collections.abc import Callable
from typing import NamedTuple

from ringolib.forward.link import LinkState
from ringolib.forward.sink import Sink
from ringolib.net.addresses import Endpoint
from ringolib.timing import backoff, deadline_after, wait_until


class Breaker:
    """A circuit breaker: while it is open, one worker, the *prober*, retries the destination, with pauses.

    The first worker that fails becomes the prober. It stays the prober until it succeeds or resigns. The pauses grow
    exponentially, with full jitter. `_lock` guards all fields. `_stopped` shares it: the prober waits on it in `pause`,
    any worker in `sleep`, and `stop` notifies it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stopped = threading.Condition(self._lock)
        # Guarded by _lock.
        self._prober: threading.Thread | None = None
        self._failures = 0  # of the prober, in a row
        self._stopping = False

    @property
    def is_open(self) -> bool:
        """True while there is a prober."""
        return self._prober is not None  # one read: no lock needed

    @property
    def probed_by_another(self) -> bool:
        """True while another thread than the calling one is the prober."""
        prober = self._prober
        return prober is not None and prober is not threading.current_thread()

    def record_failure(self) -> int:
        """Record that the calling thread failed. Return its failures in a row if it is the prober, else 0."""
        with self._lock:
            if self._prober is None:
                self._prober = threading.current_thread()
            if self._prober is not threading.current_thread():
                return 0
            self._failures += 1
            return self._failures

    def record_success(self) -> bool:
        """Record that the calling thread succeeded. If it was the prober, close the breaker and return True."""
        with self._lock:
            return self._close()

    def resign(self) -> None:
        """Close the breaker if the calling thread is the prober: that thread ends, so another one must probe."""
        with self._lock:
            self._close()

    def pause(self) -> bool:
        """If the calling thread is the prober, wait until its next try is due. Return False after `stop`."""
        with self._lock:
            if self._prober is threading.current_thread() and self._failures:
                wait_until(self._stopped, lambda: self._stopping, deadline_after(backoff(self._failures)))
            return not self._stopping

    def sleep(self, seconds: float) -> bool:
        """Wait for `seconds`, or until `stop`. Return False after `stop`."""
        with self._lock:
            return not wait_until(self._stopped, lambda: self._stopping, deadline_after(seconds))

    def stop(self) -> None:
        """End the pause. There are no more pauses."""
        with self._lock:
            self._stopping = True
            self._stopped.notify_all()

    def _close(self) -> bool:
        assert self._lock.locked()
        if self._prober is not threading.current_thread():
            return False
        self._prober, self._failures = None, 0
        return True


class Pin(NamedTuple):
    """The mark of a batch in doubt: it was sent to this destination, and the store with this identity may have it.

    `store` is None if the consumer did not report an identity.
    """

    destination: "Destination"
    store: str | None


class Destination:
    """One place to store batches, through the sinks that `make_sink` makes, one for each worker.

    `make_sink` gets a callback for the sink to call each time it makes a link. If the sinks are links, `link` is the
    state of the consumer at `endpoint`. The workers report to it, unless the destination is `spooled`, because then the
    spool does. When a worker fails, it calls `on_link_lost`.

    The destination is `fixed` if the user named this very address, which then always means the same consumer, even with
    another store. An address that a name resolved to may become another consumer's, and so may a name that has other
    addresses later; then it is no longer fixed.

    If it is the `only` destination, now and later, a batch in doubt needs no pin.
    """

    def __init__(
        self,
        make_sink: Callable[[Callable[[], None]], Sink],
        link: LinkState | None = None,
        endpoint: Endpoint | None = None,
        fixed: bool = True,
        on_link_lost: Callable[[], None] = lambda: None,
        spooled: bool = False,
        only: bool = True,
    ) -> None:
        self.make_sink = make_sink
        self.link = link
        self.reported_link = None if spooled else link  # the state that workers report to
        self.endpoint = endpoint
        self.on_link_lost = on_link_lost
        self.only = only
        self.breaker = Breaker()
        self.unexpected: str | None = None  # the last error that nothing expected, until a batch is stored
        self.last_send_failed = False  # if so, a new link alone does not show that the consumer is up again
        # Guarded by the forwarder's lock.
        self.fixed = fixed  # never again True once it is False
        self.workers = 0  # without the retiring ones
        self.dropped = False  # no name or option leads here any more: the workers end

    def pin(self, store: str | None) -> Pin:
        """Return the mark for a batch that was sent to this destination, and that this store may have."""
        return Pin(self, store)

    def accepts(self, mark: object, store: str | None) -> bool:
        """True if a batch with this mark may be sent over a link of this destination that leads to this store."""
        assert isinstance(mark, Pin)
        if mark.store is not None and mark.store == store:
            return True
        return mark.destination is self and (self.fixed or mark.store is None or store is None)
