"""The publisher's workers: reserve from the ring, store through a sink, commit.

Each worker is a thread, `forward-N`, with a sink of its own. The first worker starts with the forwarder; more
start when one has taken its batch, values are left and no worker is idle, up to the maximum, and retire after
IDLE_SECONDS without work.

When a sink fails, its worker becomes the prober: it tries again, each time after a longer pause. Until it
succeeds no worker is started and none makes a link but the prober, and whoever fails too retires: no storm
of reconnects. Workers whose own links work go on with what the prober gave back.

`Forwarder._lock` guards the workers and the count of reconnects, `Breaker._lock` who probes.
Nothing is stored or sent under either.
"""

import logging
import threading
from collections.abc import Callable
from time import monotonic
from typing import NamedTuple

from ringbuffer import Closed, Ring
from sinks import LinkState, Sink, SinkError
from websock import backoff
from wire import MAX_RUNS, Block

log = logging.getLogger("ringoexp.forward")

BATCH_RECORDS = MAX_RUNS
"""Most records in a batch: with a run for each it still is a message that wire takes."""
QUIET_SECONDS = 1.0
"""Seconds without an ack on any link after which a failing one means that the consumer is away."""
IDLE_SECONDS = 10.0


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


class ForwarderStats(NamedTuple):
    """A snapshot of the workers and their links."""

    workers: int
    most_workers: int  # the most there were at once
    reconnects: int  # links made beyond each worker's first


class Forwarder:
    """Workers that drain `ring` into sinks that `make_sink` makes, at most `most` at once, in batches of at
    most `most_records`. `link` is told what they find out, where their sinks are links. Starts at once.

    `make_sink` gets a callback, to be called when a link is made. Workers start workers, as they take a batch: what
    comes while the only one waits for its sink waits with it, and could not be acked before that batch anyway.
    """

    def __init__(
        self,
        ring: Ring,
        make_sink: Callable[[Callable[[], None]], Sink],
        most: int,
        most_records: int = BATCH_RECORDS,
        link: LinkState | None = None,
    ) -> None:
        self._ring = ring
        self._make_sink = make_sink
        self._most = most
        self._link = link
        # Half a ring at the most, so that producers fill the other half meanwhile.
        self._limit = min(BATCH_RECORDS, most_records, max(1, ring.capacity // 2))
        self._breaker = Breaker()

        self._lock = threading.Lock()
        # Guarded by _lock.
        self._workers: dict[threading.Thread, Sink] = {}  # all whose thread runs
        self._working: set[threading.Thread] = set()  # those of them that are not retiring
        self._started = 0
        self._most_workers = 0
        self._reconnects = 0
        self._stopping = False

        self._start_worker(first=True)

    @property
    def linked(self) -> bool:
        """True while a worker could store without connecting first."""
        with self._lock:
            return any(sink.ready for sink in self._workers.values())

    def stats(self) -> ForwarderStats:
        """The workers now and the totals since the start."""
        with self._lock:
            return ForwarderStats(len(self._working), self._most_workers, self._reconnects)

    def stop(self, timeout: float) -> bool:
        """Ends all workers, giving up what is under way, and joins them. True when all ended within `timeout` seconds.

        Before it, the ring must be closed and drained, or aborted.
        """
        deadline = monotonic() + timeout
        with self._lock:
            self._stopping = True
            workers = dict(self._workers)
        self._breaker.stop()
        if not self._ring.join(0):
            for sink in workers.values():
                sink.abort()
        for thread in workers:
            thread.join(max(0.0, deadline - monotonic()))
        return not any(thread.is_alive() for thread in workers)

    def step(self, sink: Sink) -> bool:
        """One turn of a worker: takes a batch, stores it, and commits or requeues it. False when it should end."""
        if not self._breaker.pause():
            return False
        try:
            batch = self._ring.reserve(self._limit, IDLE_SECONDS)
        except TimeoutError:
            if self._retire():
                return False
            sink.idle()
            return True
        except Closed:
            return False
        if self._breaker.probed_by_another and not sink.ready:
            self._ring.requeue(batch)
            return not self._retire()
        try:
            self._start_worker()
            sink.store(Block(batch.runs, batch.values))
        except Exception as error:
            self._ring.requeue(batch)
            failures = self._breaker.failed()
            if isinstance(error, SinkError):
                self._say_down(str(error), failures)
            else:
                _log_unexpected(error)
            return failures > 0 or not self._retire()
        self._ring.commit(batch)
        back = self._breaker.succeeded()
        if self._link:
            self._link.works()
        elif back:
            log.info("sink_up")
        return True

    def _say_down(self, reason: str, failures: int) -> None:
        """Says why the sink failed; `failures` counts the prober's, in a row, others do not count."""
        if self._link and failures and self._link.stats().quiet >= QUIET_SECONDS:
            self._link.failed(reason)
        elif self._link:  # others store: this is one link's trouble, or the first sign of all of them
            log.debug("link_failed", {"reason": reason})
        else:
            log.log(logging.WARNING if failures == 1 else logging.DEBUG, "sink_down", {"reason": reason})

    def _run(self, sink: Sink) -> None:
        """A worker's thread: `step` until it should retire. Logs what it did not expect, and goes on."""
        going = True
        while going:
            try:
                going = self.step(sink)
            except Exception as error:
                _log_unexpected(error)
        sink.close()
        with self._lock:
            self._workers.pop(threading.current_thread(), None)
            self._working.discard(threading.current_thread())

    def _start_worker(self, first: bool = False) -> None:
        """Starts one more worker if values wait, nobody is there to take them, and there may be one more."""
        if not first and (self._breaker.away or not self._ring.wants_workers):
            return
        with self._lock:
            if self._stopping or len(self._working) >= self._most:
                return
            self._started += 1
            links = 0

            def connected() -> None:
                nonlocal links
                links += 1
                if links > 1:
                    with self._lock:
                        self._reconnects += 1

            sink = self._make_sink(connected)
            # Daemon: a second signal ends the process at once, whatever a worker waits for.
            thread = threading.Thread(target=self._run, args=(sink,), name=f"forward-{self._started}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # no more threads to be had: those that run go on
                log.error("no_thread", {"error": str(error), "workers": len(self._workers)})
                if first:
                    raise
                return
            self._workers[thread] = sink
            self._working.add(thread)
            self._most_workers = max(self._most_workers, len(self._working))

    def _retire(self) -> bool:
        """Counts the calling worker out, unless it is the last. True when it should end."""
        with self._lock:
            if len(self._working) < 2:
                return False
            self._working.discard(threading.current_thread())
        self._breaker.left()
        return True


def _log_unexpected(error: Exception) -> None:
    log.error("worker_error", {"error": repr(error)}, exc_info=log.isEnabledFor(logging.DEBUG))
