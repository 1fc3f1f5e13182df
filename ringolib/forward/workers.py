"""Workers: threads that reserve batches from the ring, store them through a sink, and commit them.

Each worker is a thread, `forward-N`, with a sink of its own, and belongs to one destination. The first worker of each
destination starts with the forwarder. A worker that takes a batch starts another one if more values wait, no worker is
idle, and there are fewer than the maximum; the destination with the fewest workers gets it. A worker ends after
IDLE_SECONDS without work, unless it is the last one of its destination.

If a sink fails, its worker becomes the prober of its destination: it retries, with the growing pauses of
`destination.Breaker`. Workers whose links still work go on, and take the batches that the prober requeued. If the link
of another worker fails while there is a prober, that worker ends, unless it is the last one of its destination. No
worker of this destination is started until the prober succeeds, and only the prober makes links. So an outage causes no
storm of reconnects.

If there are several destinations, a worker makes its link before it reserves a batch, so that no batch waits for an
unreachable destination. A batch in doubt is requeued with the pin of its destination, and only workers that accept the
pin get it again. The last worker of a destination stays, so there is always one to retry it.

If a turn fails for an unexpected reason, the worker pauses before the next one, longer after each failure. An error
that leaves a batch in flight without a worker ends the process: the batch would never be stored.

`Forwarder._lock` guards the destinations, the workers and the number of reconnects. Nothing is stored or sent under it.
Threads are started under it: a new worker must be registered before it can end.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from ringbuffer import Batch, Closed, Ring
from ringolib.forward.destination import Destination, Pin
from ringolib.forward.sink import InDoubt, NotStored, Sink
from ringolib.timing import ThreadError, backoff, deadline_after, fatal, log_unexpected, remaining, start_thread
from ringolib.wire import MAX_RUNS, Block

log = logging.getLogger("ringoexp.forward")

BATCH_RECORDS = MAX_RUNS
"""The maximum number of records in a batch. Even if each of them is a run of its own, the message is a valid one."""
QUIET_SECONDS = 1.0
"""A failing link means that the consumer is down only if no link has had an ack for this long."""
IDLE_SECONDS = 10.0
JOIN_SECONDS = 5.0
"""How long a failed start waits for the workers that had started."""


class ForwarderStats(NamedTuple):
    """A snapshot of the workers and their links."""

    workers: int
    most_workers: int  # the largest number at one time
    reconnects: int  # links made after the first one of each worker


class Forwarder:
    """Workers that drain `ring` into `destinations`, in batches of at most `max_records`. They start at once.

    There are at most `max_workers`, but at least one for each destination. A worker starts another one only when it
    takes a batch. Values that arrive while the only worker waits for its sink wait, too. They could not be acked before
    its batch anyway, but they may be acked later than it.
    """

    def __init__(
        self, ring: Ring, destinations: Sequence[Destination], max_workers: int, max_records: int = BATCH_RECORDS
    ) -> None:
        self._ring = ring
        self._max_workers = max_workers
        # At most half of the ring, so that producers can fill the other half meanwhile.
        self._max_batch = min(BATCH_RECORDS, max_records, max(1, ring.capacity // 2))

        self._lock = threading.Lock()
        # Guarded by _lock.
        self._destinations = tuple(destinations)  # replaced as a whole: a thread may read it once without the lock
        self._workers: dict[threading.Thread, tuple[Destination, Sink]] = {}  # all whose thread runs
        self._working: set[threading.Thread] = set()  # without the retiring ones
        self._started = 0
        self._most_workers = 0
        self._reconnects = 0
        self._stopping = False

        try:
            for destination in destinations:
                self._start_first(destination)
        except ThreadError:
            ring.abort()
            self.stop(JOIN_SECONDS)
            raise

    @property
    def destinations(self) -> Sequence[Destination]:
        """The destinations now, including dropped ones whose workers have not ended."""
        return self._destinations

    def linked(self, destination: Destination) -> bool:
        """True while a worker of this destination could store without connecting first."""
        with self._lock:
            return any(sink.ready for owner, sink in self._workers.values() if owner is destination)

    def change(self, added: Sequence[Destination], dropped: Sequence[Destination]) -> None:
        """Add destinations, and drop others: their workers end as soon as nothing is in doubt there."""
        with self._lock:
            if self._stopping:
                return
            for destination in dropped:
                destination.dropped, destination.fixed = True, False
            # The last worker of a dropped destination removes it. One that never had a worker is removed here.
            kept = (destination for destination in self._destinations if destination.workers or not destination.dropped)
            self._destinations = (*kept, *added)
        for destination in added:
            self._try_to_start_first(destination)

    def keep(self, destination: Destination) -> bool:
        """Keep a destination, even if it was dropped before. Return False if its workers have ended since.

        If a destination has no worker because the system had no thread for it, try to start one.
        """
        with self._lock:
            if destination.workers:
                destination.dropped = False
                return True
        if not destination.dropped:
            self._try_to_start_first(destination)
        return not destination.dropped

    def stats(self) -> ForwarderStats:
        """Return a snapshot."""
        with self._lock:
            return ForwarderStats(len(self._working), self._most_workers, self._reconnects)

    def stop(self, timeout: float) -> bool:
        """End all workers and join them, abandoning their batches. Return True if all ended within `timeout` seconds.

        The ring must be closed and drained before, or aborted.
        """
        deadline = deadline_after(timeout)
        with self._lock:
            self._stopping = True
            workers = dict(self._workers)
        for destination in self._destinations:
            destination.breaker.stop()
        drained = self._ring.join(0)
        for _, sink in workers.values():
            if not (drained and sink.ready):  # if all is stored, a worker without a link has nothing to finish
                sink.abort()
        for thread in workers:
            thread.join(remaining(deadline))
        return not any(thread.is_alive() for thread in workers)

    # The turn of a worker. A step that returns a bool returns False if the worker must end.

    def step(self, destination: Destination, sink: Sink) -> bool:
        """Run one turn of a worker: make sure that there is a link, then forward a batch."""
        if not destination.breaker.pause() or self._leave(destination, sink):
            return False
        # A batch in doubt is for one store only. To know which store is here, make a link first.
        link_first = len(self._destinations) > 1 or self._ring.has_marked
        if link_first and not sink.ready:
            if destination.breaker.probed_by_another:
                return not self._retire(destination)
            error = self._connect(destination, sink)
            if error is not None:
                return self._fail(destination, error)
        return self._forward_batch(destination, sink, link_first)

    def _connect(self, destination: Destination, sink: Sink) -> Exception | None:
        """Make a link, or return the error. If the last batch did not fail, report that the destination is up."""
        try:
            sink.connect()
        except Exception as error:
            return error
        if not destination.last_send_failed:
            destination.breaker.record_success()
            if destination.reported_link:
                destination.reported_link.on_connected()
        return None

    def _forward_batch(self, destination: Destination, sink: Sink, link_first: bool) -> bool:
        """Take a batch, store it, and commit it. If `link_first`, the link was made before."""
        accepts = None if destination.only else _filter_of(destination, sink)
        try:
            batch = self._ring.reserve(self._max_batch, IDLE_SECONDS, accepts)
        except TimeoutError:
            return self._idle(destination, sink)
        except Closed:
            return False
        with _fatal_if_it_fails():
            if batch.mark is not None and not sink.ready and not destination.only:
                # It came into doubt during this turn. The next turn makes a link first, to see which store is there.
                self._ring.requeue(batch)
                return True
            breaker = destination.breaker
            # While another worker probes, only a worker whose own link may still work goes on.
            idle = breaker.probed_by_another and (not sink.ready or (link_first and destination.last_send_failed))
            if idle:
                self._ring.requeue(batch)
            else:
                error = self._store(destination, sink, batch)
                if error is None:
                    self._ring.commit(batch)
        if idle:
            return not self._retire(destination)
        if error is not None:
            return self._fail(destination, error)
        self._on_stored(destination)
        return not (link_first and self._has_too_many(destination) and self._retire(destination))

    def _idle(self, destination: Destination, sink: Sink) -> bool:
        """Retire after IDLE_SECONDS without work; if this is the last worker, look after its link instead."""
        if self._retire(destination):
            return False
        sink.idle()
        return True

    def _store(self, destination: Destination, sink: Sink, batch: Batch) -> BaseException | None:
        """Start another worker if one is wanted, and store `batch`. If that fails, requeue it and return the error."""
        try:
            self._start_another()
            sink.store(Block(batch.runs, batch.values))
        except NotStored as error:
            self._ring.requeue(batch)
            return error
        except BaseException as error:  # InDoubt, or unexpected: either way, the batch may be stored
            destination.last_send_failed = True
            store = error.store if isinstance(error, InDoubt) else sink.identity
            if not store and isinstance(batch.mark, Pin):
                store = batch.mark.store
            self._ring.requeue(batch, None if destination.only else destination.pin(store))
            return error
        return None

    def _on_stored(self, destination: Destination) -> None:
        """Report that the destination is up: a batch was stored."""
        destination.last_send_failed, destination.unexpected = False, None
        was_down = destination.breaker.record_success()
        if destination.reported_link:
            destination.reported_link.on_ack()
        elif was_down:
            log.info("sink_up")

    def _fail(self, destination: Destination, error: BaseException) -> bool:
        """Report an error. The prober goes on to retry; another worker retires, unless it is the last one."""
        failures = destination.breaker.record_failure()
        if isinstance(error, (NotStored, InDoubt)):
            self._report_failure(destination, str(error), failures)
        else:
            self._report_unexpected(destination, error)
        destination.on_link_lost()
        return failures > 0 or not self._retire(destination)

    def _report_unexpected(self, destination: Destination, error: BaseException) -> None:
        """Log an unexpected error, once until another one comes up or a batch is stored."""
        text = repr(error)
        log_unexpected(log, "worker_error", error, repeated=text == destination.unexpected)
        destination.unexpected = text

    def _report_failure(self, destination: Destination, reason: str, failures: int) -> None:
        """Log why a sink failed. `failures` is the prober's number of failures in a row, 0 for other workers.

        If other links still have acks, the consumer is not down. It is one link's failure, or the first of many.
        """
        link = destination.reported_link
        if link and failures and link.stats().quiet >= QUIET_SECONDS:
            link.on_failure(reason)
        elif link:
            log.debug("link_failed", {"reason": reason})
        else:
            log.log(logging.WARNING if failures == 1 else logging.DEBUG, "sink_down", {"reason": reason})

    # How workers start and end.

    def _start_first(self, destination: Destination) -> None:
        """Start the first worker of a destination, even beyond the maximum. Raises ThreadError."""
        with self._lock:
            if not self._stopping:
                self._start(destination)

    def _try_to_start_first(self, destination: Destination) -> None:
        try:
            self._start_first(destination)
        except ThreadError:
            pass  # logged by `_start`; `keep` tries again

    def _start_another(self) -> None:
        """Start one more worker if values wait, no worker is idle, and the maximum is not reached."""
        candidates = self._available()
        if not candidates or not self._ring.wants_workers:
            return
        destination = min(candidates, key=lambda candidate: candidate.workers)
        with self._lock:
            if self._stopping or len(self._working) >= self._max_workers:
                return
            try:
                self._start(destination)
            except ThreadError:
                pass  # logged by `_start`; the running workers go on

    def _start(self, destination: Destination) -> None:
        """Start and register a worker. Raises ThreadError, after logging it."""
        assert self._lock.locked()
        self._started += 1
        sink = destination.make_sink(self._link_counter())
        try:
            thread = start_thread(self._run, destination, sink, name=f"forward-{self._started}")
        except ThreadError as error:
            log.error("no_thread", {"error": str(error), "workers": len(self._workers)})
            raise
        self._workers[thread] = destination, sink
        self._working.add(thread)
        destination.workers += 1
        self._most_workers = max(self._most_workers, len(self._working))

    def _link_counter(self) -> Callable[[], None]:
        """Return a function for a sink to call each time it makes a link. It counts all links after the first one."""
        links = 0

        def on_connected() -> None:
            nonlocal links
            links += 1
            if links > 1:
                with self._lock:
                    self._reconnects += 1

        return on_connected

    def _run(self, destination: Destination, sink: Sink) -> None:
        """Run the turns of a worker until one returns False. After an unexpected error, pause, and go on."""
        try:
            self._run_turns(destination, sink)
            try:
                sink.close()
            except Exception as error:
                self._report_unexpected(destination, error)
            with self._lock:
                self._workers.pop(threading.current_thread(), None)
                self._count_out(destination)
        except BaseException:
            fatal(log, "a worker")

    def _run_turns(self, destination: Destination, sink: Sink) -> None:
        failures = 0
        going = True
        while going:
            try:
                going = self.step(destination, sink)
                failures = 0
            except Exception as error:
                failures += 1
                self._report_unexpected(destination, error)
                going = destination.breaker.sleep(backoff(failures))

    def _retire(self, destination: Destination) -> bool:
        """Count the calling worker out, and return True, unless it is the last one of its destination."""
        with self._lock:
            if destination.workers < 2:
                return False
            self._count_out(destination)
        destination.breaker.resign()
        return True

    def _leave(self, destination: Destination, sink: Sink) -> bool:
        """Count the calling worker out, and return True, if its destination was dropped and nothing is in doubt there.

        The check is under the lock: workers that left before have requeued their batches, and `keep` runs either before
        or after it.
        """
        if not destination.dropped:
            return False
        accepts = _filter_of(destination, sink)
        with self._lock:
            if not destination.dropped or self._ring.has_marked_for(accepts):
                return False
            self._count_out(destination)
        destination.breaker.resign()
        return True

    def _has_too_many(self, destination: Destination) -> bool:
        """True if the maximum is reached, and another destination has at least two workers fewer: it was down."""
        if len(self._working) < self._max_workers:
            return False
        return any(other.workers < destination.workers - 1 for other in self._available())

    def _available(self) -> list[Destination]:
        """Return the destinations that may get more workers."""
        return [each for each in self._destinations if not each.breaker.is_open and not each.dropped]

    def _count_out(self, destination: Destination) -> None:
        """Remove the calling worker from `_working`. The last worker of a dropped destination removes it."""
        assert self._lock.locked()
        if threading.current_thread() in self._working:
            self._working.discard(threading.current_thread())
            destination.workers -= 1
            if destination.dropped and not destination.workers:
                self._destinations = tuple(other for other in self._destinations if other is not destination)


@contextmanager
def _fatal_if_it_fails() -> Iterator[None]:
    """End the process if the block raises: the batch in it would stay in flight, and would never be stored."""
    try:
        yield
    except BaseException:
        fatal(log, "a worker with a batch")


def _filter_of(destination: Destination, sink: Sink) -> Callable[[object], bool]:
    """Return the filter for `Ring.reserve`: which marked batches a worker may have, as its sink is now."""
    return lambda mark: destination.accepts(mark, sink.identity)
