"""The publisher's workers: reserve from the ring, store through a sink, commit.

Each worker is a thread, `forward-N`, with a sink of its own, of one destination. The first one of each destination starts with
the forwarder; more start when one has taken its batch, values are left and no worker is idle, up to the maximum, and
retire after IDLE_SECONDS without work. The last of each destination stays.

When a sink fails, its worker becomes the prober of its destination: it tries again, each time after a longer pause. Until
it succeeds no worker of that destination is started and none makes a link but the prober, and whoever fails too retires:
no storm of reconnects. Workers whose own links work go on with what the prober gave back.

With several destinations a worker makes its link before it takes a batch: one that is away holds nothing up. New workers
go where there are fewest. A batch in doubt goes back to the ring with its destination's pin: only workers that take that
get it again, and as the last worker of an destination stays there is always one, which probes.

`Forwarder._lock` guards the destinations, the workers and the count of reconnects. Nothing is stored or sent under it.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from time import monotonic
from typing import NamedTuple

from ringbuffer import Closed, Ring
from ringolib.forward.destination import Destination
from ringolib.forward.sink import InDoubt, Sink, SinkError
from ringolib.wire import MAX_RUNS, Block

log = logging.getLogger("ringoexp.forward")

BATCH_RECORDS = MAX_RUNS
"""Most records in a batch: with a run for each it still is a message that wire takes."""
QUIET_SECONDS = 1.0
"""Seconds without an ack on any link after which a failing one means that the consumer is away."""
IDLE_SECONDS = 10.0


class ForwarderStats(NamedTuple):
    """A snapshot of the workers and their links."""

    workers: int
    most_workers: int  # the most there were at once
    reconnects: int  # links made beyond each worker's first


class Forwarder:
    """Workers that drain `ring` into `destinations`, at most `most` at once, but one for each destination, in batches of at
    most `most_records`. Starts at once.

    Workers start workers, as they take a batch: what comes while the only one waits for its sink waits with it, and
    could not be acked before that batch anyway.
    """

    def __init__(
        self, ring: Ring, destinations: Sequence[Destination], most: int, most_records: int = BATCH_RECORDS
    ) -> None:
        self._ring = ring
        self._most = most
        # Half a ring at the most, so that producers fill the other half meanwhile.
        self._limit = min(BATCH_RECORDS, most_records, max(1, ring.capacity // 2))

        self._lock = threading.Lock()
        # Guarded by _lock.
        self._destinations = tuple(destinations)  # replaced as a whole; who only reads it reads it once
        self._workers: dict[threading.Thread, tuple[Destination, Sink]] = {}  # all whose thread runs
        self._working: set[threading.Thread] = set()  # those of them that are not retiring
        self._started = 0
        self._most_workers = 0
        self._reconnects = 0
        self._stopping = False

        for destination in destinations:
            self._start_worker(destination)

    @property
    def destinations(self) -> Sequence[Destination]:
        """Where the workers store now, those included that only finish what they have begun."""
        return self._destinations

    def linked(self, destination: Destination) -> bool:
        """True while a worker of this destination could store without connecting first."""
        with self._lock:
            return any(sink.ready for of, sink in self._workers.values() if of is destination)

    def change(self, added: Sequence[Destination], dropped: Sequence[Destination]) -> None:
        """Stores in these too, and in those no more, once nothing is in doubt there."""
        with self._lock:
            if self._stopping:
                return
            for destination in dropped:
                destination.leaving, destination.fixed = True, False
            # One that leaves without a worker, as there was no thread to be had, nobody else counts out.
            there = (each for each in self._destinations if each.workers or not each.leaving)
            self._destinations = (*there, *added)
        for destination in added:
            self._start_first(destination)

    def keep(self, destination: Destination) -> bool:
        """True when this destination, if it was dropped, could be taken back, as it has workers still."""
        with self._lock:
            if destination.workers:
                destination.leaving = False
                return True
        if not destination.leaving:
            self._start_first(destination)
        return not destination.leaving

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
        for destination in self._destinations:
            destination.breaker.stop()
        drained = self._ring.join(0)
        for _, sink in workers.values():
            if not (drained and sink.ready):  # who only connects has nothing to store
                sink.abort()
        for thread in workers:
            thread.join(max(0.0, deadline - monotonic()))
        return not any(thread.is_alive() for thread in workers)

    def step(self, destination: Destination, sink: Sink) -> bool:
        """One turn of a worker: takes a batch, stores it, and commits or requeues it. False when it should end."""

        def takes(mark: object) -> bool:
            return destination.takes(mark, sink.identity)

        if not destination.breaker.pause() or self._leaves(destination, takes):
            return False
        # What waits for one store must not go to another, though there is only one destination by now.
        several = len(self._destinations) > 1 or self._ring.has_marked
        if several and not sink.ready:
            if destination.breaker.probed_by_another:
                return not self._retire(destination)
            try:
                sink.connect()
            except Exception as error:
                return self._failed(destination, error)
            if not destination.doubted:
                self._answers(destination)
        try:
            batch = self._ring.reserve(self._limit, IDLE_SECONDS, None if destination.alone else takes)
        except TimeoutError:
            if self._retire(destination):
                return False
            sink.idle()
            return True
        except Closed:
            return False
        if batch.mark is not None and not sink.ready and not destination.alone:
            self._ring.requeue(batch)  # it came into doubt meanwhile: first a link, to know which store is there
            return True
        if destination.breaker.probed_by_another and (not sink.ready or (several and destination.doubted)):
            self._ring.requeue(batch)
            return not self._retire(destination)
        try:
            self._start_worker()
            sink.store(Block(batch.runs, batch.values))
        except Exception as error:
            if isinstance(error, SinkError) and not isinstance(error, InDoubt):
                self._ring.requeue(batch)
            else:
                destination.doubted = True
                store = getattr(error, "store", sink.identity) or getattr(batch.mark, "store", None)
                self._ring.requeue(batch, None if destination.alone else destination.pin(store))
            return self._failed(destination, error)
        self._ring.commit(batch)
        destination.doubted = False
        back = destination.breaker.succeeded()
        if destination.told:
            destination.told.works()
        elif back:
            log.info("sink_up")
        return not (several and self._crowds(destination) and self._retire(destination))

    def _answers(self, destination: Destination) -> None:
        """The calling worker has a link, and nothing is known against it."""
        destination.breaker.succeeded()
        if destination.told:
            destination.told.answers()

    def _failed(self, destination: Destination, error: Exception) -> bool:
        """The calling worker's sink failed. False when it should end."""
        failures = destination.breaker.failed()
        if isinstance(error, SinkError):
            self._say_down(destination, str(error), failures)
        else:
            _log_unexpected(error)
        destination.lost()
        return failures > 0 or not self._retire(destination)

    def _say_down(self, destination: Destination, reason: str, failures: int) -> None:
        """Says why the sink failed; `failures` counts the prober's, in a row, others do not count."""
        if destination.told and failures and destination.told.stats().quiet >= QUIET_SECONDS:
            destination.told.failed(reason)
        elif destination.told:  # others store: this is one link's trouble, or the first sign of all of them
            log.debug("link_failed", {"reason": reason})
        else:
            log.log(logging.WARNING if failures == 1 else logging.DEBUG, "sink_down", {"reason": reason})

    def _run(self, destination: Destination, sink: Sink) -> None:
        """A worker's thread: `step` until it should retire. Logs what it did not expect, and goes on."""
        going = True
        while going:
            try:
                going = self.step(destination, sink)
            except Exception as error:
                _log_unexpected(error)
        sink.close()
        with self._lock:
            self._workers.pop(threading.current_thread(), None)
            self._count_out(destination)

    def _start_worker(self, first_of: Destination | None = None) -> None:
        """Starts one more worker if values wait, nobody is there to take them, and there may be one more.

        The destination that has the fewest gets it. Or else, without any condition, the first one of an destination.
        """
        destination = first_of
        if destination is None:
            there = [each for each in self._destinations if not each.breaker.away and not each.leaving]
            if not there or not self._ring.wants_workers:
                return
            destination = min(there, key=lambda each: each.workers)
        with self._lock:
            if self._stopping or (not first_of and len(self._working) >= self._most):
                return
            self._started += 1
            links = 0

            def connected() -> None:
                nonlocal links
                links += 1
                if links > 1:
                    with self._lock:
                        self._reconnects += 1

            sink = destination.make_sink(connected)
            # Daemon: a second signal ends the process at once, whatever a worker waits for.
            thread = threading.Thread(
                target=self._run, args=(destination, sink), name=f"forward-{self._started}", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:  # no more threads to be had: those that run go on
                log.error("no_thread", {"error": str(error), "workers": len(self._workers)})
                if first_of:
                    raise
                return
            self._workers[thread] = destination, sink
            self._working.add(thread)
            destination.workers += 1
            self._most_workers = max(self._most_workers, len(self._working))

    def _start_first(self, destination: Destination) -> None:
        try:
            self._start_worker(destination)
        except RuntimeError:
            pass  # it is logged, and `keep` tries again

    def _retire(self, destination: Destination) -> bool:
        """Counts the calling worker out, unless it is the last of its destination. True when it should end."""
        with self._lock:
            if destination.workers < 2:
                return False
            self._count_out(destination)
        destination.breaker.left()
        return True

    def _leaves(self, destination: Destination, takes: Callable[[object], bool]) -> bool:
        """Counts the calling worker out if nobody names its destination any more, and nothing is in doubt there."""
        if not destination.leaving:
            return False
        with self._lock:  # looks under it: who left before has given back what it had, and `keep` comes before or after
            if not destination.leaving or self._ring.has_for(takes):
                return False
            self._count_out(destination)
        destination.breaker.left()
        return True

    def _crowds(self, destination: Destination) -> bool:
        """True when there are as many workers as there may be, and another destination has two fewer: it was away."""
        if len(self._working) < self._most:
            return False
        there = (each for each in self._destinations if not each.breaker.away and not each.leaving)
        return any(each.workers < destination.workers - 1 for each in there)

    def _count_out(self, destination: Destination) -> None:
        assert self._lock.locked()
        if threading.current_thread() in self._working:
            self._working.discard(threading.current_thread())
            destination.workers -= 1
            if destination.leaving and not destination.workers:
                self._destinations = tuple(each for each in self._destinations if each is not destination)


def _log_unexpected(error: Exception) -> None:
    log.error("worker_error", {"error": repr(error)}, exc_info=log.isEnabledFor(logging.DEBUG))
