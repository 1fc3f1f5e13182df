"""Workers: threads that take batches from the ring, store them through a sink, and commit them.

Each worker is a thread, `forward-N`, with a sink of its own, and belongs to one destination. The first worker of each
destination starts with the forwarder. A worker that takes a batch starts another one if more values wait, no worker is
idle, and there are fewer than the maximum; the destination with the fewest workers gets it. A worker ends after
IDLE_SECONDS without work, unless it is the last one of its destination.

A worker's turn: take a batch, one in doubt before a new one, store it, and commit it. If there may be several
consumers, it makes its link before. If a batch is surely not stored, the worker requeues it, for any worker. If it may
be stored, it is in doubt (`doubts`): it is set aside, and goes to the same consumer, or the same store, again. If its
ack is late, it is set aside at once, while the worker goes on to wait. So the records of other clients are acked.

If a sink fails, its worker becomes the prober of its destination (`health`). If the link of another worker fails
meanwhile, that worker ends, unless it is the last one of its destination. The last worker stays, so there is always one
to retry.

If a turn fails for an unexpected reason, the worker pauses before the next one, longer after each failure. An error
that leaves a batch in flight without a worker ends the process: the batch would never be stored.

The thread `resolve` follows the addresses of names (`discovery`), which add destinations and drop them.

`Forwarder._lock` guards the destinations, the workers and the number of reconnects. Nothing is stored or sent under it.
Threads are started under it: a new worker must be registered before it can end.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from ringbuffer import Batch, Closed, Interrupted, Ring
from ringolib.forward.destination import Destination
from ringolib.forward.discovery import Discovery
from ringolib.forward.doubts import Doubts
from ringolib.forward.sink import InDoubt, NotStored, Sink, ignore_late
from ringolib.net.addresses import Endpoint
from ringolib.timing import RUNTIME, Runtime, ThreadError, backoff, fatal, log_unexpected
from ringolib.wire import MAX_RUNS, Block

log = logging.getLogger("ringoexp.forward")

BATCH_RECORDS = MAX_RUNS
"""The maximum number of records in a batch. Even if each of them is a run of its own, the message is a valid one."""
IDLE_SECONDS = 10.0
JOIN_SECONDS = 5.0
"""How long a failed start waits for the workers that had started."""
RESOLVER_JOIN_SECONDS = 1.0
"""How long a stop waits for the thread that resolves names: a slow name service must not delay it."""


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
        self,
        ring: Ring,
        destinations: Sequence[Destination],
        max_workers: int,
        max_records: int = BATCH_RECORDS,
        runtime: Runtime = RUNTIME,
    ) -> None:
        self._ring = ring
        self._runtime = runtime
        self._max_workers = max_workers
        # At most half of the ring, so that producers can fill the other half meanwhile.
        self._max_batch = min(BATCH_RECORDS, max_records, max(1, ring.capacity // 2))
        self._doubts = Doubts()
        # Set once, by `follow`.
        self._discovery: Discovery | None = None
        self._make: Callable[[Endpoint], Destination]
        self._resolver: threading.Thread | None = None

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

    def in_doubt(self) -> dict[Destination, int]:
        """Return the number of records in doubt at each destination that has any."""
        return self._doubts.records()

    def follow(self, discovery: Discovery, make: Callable[[Endpoint], Destination]) -> None:
        """Have the destinations follow the addresses of names; `make` makes new ones. Raises ThreadError."""
        self._make, self._discovery = make, discovery
        if discovery.has_names:
            self._resolver = self._runtime.start_thread(self._run_discovery, discovery, name="resolve")

    def change(self, endpoints: Sequence[Endpoint]) -> None:
        """Have a destination for each of these addresses. The workers of others end once nothing is in doubt there."""
        with self._lock:
            if self._stopping:
                return
            before = {each.endpoint: each for each in self._destinations if each.endpoint and not each.dropped}
            dropped = [destination for endpoint, destination in before.items() if endpoint not in endpoints]
            for destination in dropped:
                destination.dropped, destination.fixed = True, False
            # The last worker of a dropped destination removes it. One that never had a worker is removed here.
            current = [each for each in self._destinations if each.workers or not each.dropped]
            added = [endpoint for endpoint in endpoints if endpoint not in before]
            for endpoint in added:
                back = next((destination for destination in current if destination.endpoint == endpoint), None)
                if back:
                    back.dropped = False
                else:
                    current.append(self._make(endpoint))
            self._destinations = tuple(current)
        if added or dropped:
            addresses = {"added": map(str, added), "gone": (str(destination.endpoint) for destination in dropped)}
            log.info("consumers", {key: text for key, value in addresses.items() if (text := " ".join(value))})
            self._ring.interrupt()  # the workers of dropped destinations end
        for destination in current:
            if not destination.workers:  # it is new, or the system had no thread for it
                self._try_to_start_first(destination)

    def stats(self) -> ForwarderStats:
        """Return a snapshot."""
        with self._lock:
            return ForwarderStats(len(self._working), self._most_workers, self._reconnects)

    def stop(self, timeout: float) -> bool:
        """End all workers and join them, abandoning their batches. Return True if all ended within `timeout` seconds.

        The ring must be closed and drained before, or aborted.
        """
        deadline = self._runtime.deadline_after(timeout)
        with self._lock:
            self._stopping = True
            workers = dict(self._workers)
        if self._discovery:
            self._discovery.stop()
        for destination in self._destinations:
            destination.health.stop()
        drained = self._ring.join(0)
        for _, sink in workers.values():
            if not (drained and sink.ready):  # if all is stored, a worker without a link has nothing to finish
                sink.abort()
        for thread in workers:
            thread.join(max(0.0, deadline - self._runtime.monotonic()))
        if self._resolver:
            self._resolver.join(RESOLVER_JOIN_SECONDS)
        return not any(thread.is_alive() for thread in workers)

    # The turn of a worker. A step that returns a bool returns False if the worker must end.

    def turn(self, destination: Destination, sink: Sink) -> bool:
        """Take a batch, store it, and commit it."""
        if not destination.health.pause() or self._leave(destination, sink):
            return False
        try:
            if self._yields(destination, sink):
                return not self._retire(destination)
            if not destination.only:
                sink.connect()
                destination.health.on_link()
            batch, in_doubt = self._take(destination, sink)
        except NotStored as error:
            return self._fail(destination, error)
        except TimeoutError:
            return self._idle(destination, sink)
        except Interrupted:
            return True
        except Closed:
            return False
        failure: BaseException | None = None
        with _fatal_if_it_fails():
            yields = self._yields(destination, sink)  # now, after the wait for a batch
            if yields:
                self._give_back(destination, sink, batch, NotStored(), in_doubt)
            else:
                failure = self._store(destination, sink, batch, in_doubt)
        if yields:
            return not self._retire(destination)
        if failure is not None:
            return self._fail(destination, failure)
        destination.health.on_ack()
        destination.unexpected = None
        return not (self._has_too_many(destination) and self._retire(destination))

    def _yields(self, destination: Destination, sink: Sink) -> bool:
        return destination.health.yields(sink.ready, several=not destination.only)

    def _take(self, destination: Destination, sink: Sink) -> tuple[Batch, bool]:
        """Return the next batch, and whether it is in doubt. Raises as Ring.reserve."""
        interrupts = self._ring.interrupts
        if not destination.only and (batch := self._doubts.take(destination, sink.identity)):
            return batch, True
        return self._ring.reserve(self._max_batch, IDLE_SECONDS, interrupts), False

    def _store(self, destination: Destination, sink: Sink, batch: Batch, in_doubt: bool) -> BaseException | None:
        """Store a batch, and commit it. If it cannot be stored, give it back, and return the error."""

        def on_late() -> None:
            destination.health.on_late()
            self._doubts.hold(batch, destination, sink.identity)
            self._ring.set_aside(batch)

        try:
            self._start_another()
            sink.store(Block(batch.runs, batch.values), ignore_late if destination.only else on_late)
        except BaseException as error:
            self._give_back(destination, sink, batch, error, in_doubt)
            return error
        self._doubts.settle(batch)
        self._ring.commit(batch)
        return None

    def _give_back(
        self, destination: Destination, sink: Sink, batch: Batch, error: BaseException, in_doubt: bool
    ) -> None:
        """Requeue a batch that is surely not stored. Keep one that may be stored for its destination.

        If it was `in_doubt` before, it is so now, unless a retry goes to the same place in any case.
        """
        not_sent = isinstance(error, NotStored)
        if destination.only or (not_sent and not in_doubt):
            self._doubts.settle(batch)
            self._ring.requeue(batch)
            return
        if not not_sent:  # InDoubt, or unexpected
            store = error.store if isinstance(error, InDoubt) else sink.identity
            self._doubts.hold(batch, destination, store)
        self._ring.set_aside(batch)
        self._doubts.release(batch)
        self._ring.interrupt()

    def _idle(self, destination: Destination, sink: Sink) -> bool:
        """Retire after IDLE_SECONDS without work; if this is the last worker, look after its link instead."""
        if self._retire(destination):
            return False
        sink.idle()
        return True

    def _fail(self, destination: Destination, error: BaseException) -> bool:
        """Report an error. The prober goes on to retry; another worker retires, unless it is the last one."""
        reason = str(error) if isinstance(error, (NotStored, InDoubt)) else None
        if reason is None:
            self._report_unexpected(destination, error)
        probes = destination.health.on_failure(reason, sent=not isinstance(error, NotStored))
        if self._discovery:
            self._discovery.hurry()
        return probes or not self._retire(destination)

    def _report_unexpected(self, destination: Destination, error: BaseException) -> None:
        """Log an unexpected error, once until another one comes up or a batch is stored."""
        text = repr(error)
        log_unexpected(log, "worker_error", error, repeated=text == destination.unexpected)
        destination.unexpected = text

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
            thread = self._runtime.start_thread(self._run, destination, sink, name=f"forward-{self._started}")
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

    def _run_discovery(self, discovery: Discovery) -> None:
        """Follow the addresses of names until `stop`. `wait` pauses between two turns, whether they fail or not."""
        unexpected = None  # the last error, until a turn succeeds
        going = True
        while going:
            try:
                endpoints = discovery.wait()
                going = endpoints is not None
                if endpoints is not None:
                    self.change(endpoints)
                unexpected = None
            except Exception as error:
                log_unexpected(log, "worker_error", error, repeated=repr(error) == unexpected)
                unexpected = repr(error)

    def _run_turns(self, destination: Destination, sink: Sink) -> None:
        failures = 0
        going = True
        while going:
            try:
                going = self.turn(destination, sink)
                failures = 0
            except Exception as error:
                failures += 1
                self._report_unexpected(destination, error)
                going = destination.health.sleep(backoff(failures))

    def _retire(self, destination: Destination) -> bool:
        """Count the calling worker out, and return True, unless it is the last one of its destination."""
        with self._lock:
            if destination.workers < 2:
                return False
            self._count_out(destination)
        destination.health.resign()
        return True

    def _leave(self, destination: Destination, sink: Sink) -> bool:
        """Count the calling worker out, and return True, if its destination was dropped and nothing is in doubt there.

        The check is under the lock: workers that left before have released their batches, and `change` runs either
        before or after it.
        """
        if not destination.dropped:
            return False
        with self._lock:
            if not destination.dropped or self._doubts.has_for(destination, sink.identity):
                return False
            self._count_out(destination)
        destination.health.resign()
        return True

    def _has_too_many(self, destination: Destination) -> bool:
        """True if the maximum is reached, and another destination has at least two workers fewer: it was down."""
        if destination.only or len(self._working) < self._max_workers:
            return False
        return any(other.workers < destination.workers - 1 for other in self._available())

    def _available(self) -> list[Destination]:
        """Return the destinations that may get more workers."""
        return [each for each in self._destinations if not each.health.probed and not each.dropped]

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
