"""The pool: which destinations there are, and which workers each of them has.

A worker is a thread, `forward-N`, with a sink of its own, and belongs to one destination. The first worker of each
destination starts with the destination, even beyond the maximum. Others start while values wait; the destination with
the fewest workers gets the next one. The last worker of a destination stays until the destination is dropped.

`Pool._lock` guards the destinations, the workers and the counts. Nothing is stored or sent under it. Threads are
started under it: a new worker must be registered before it can end.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ringolib.forward.destination import Destination
from ringolib.forward.sink import Sink
from ringolib.net.addresses import Endpoint
from ringolib.timing import Runtime, ThreadError

log = logging.getLogger("ringoexp.forward")


class Worker(NamedTuple):
    """A worker's destination, and its sink there."""

    destination: Destination
    sink: Sink

    @property
    def must_yield(self) -> bool:
        """True if the worker must leave the next batch to others; see Health."""
        return self.destination.health.yields(self.sink.ready, several=not self.destination.only)


class ForwarderStats(NamedTuple):
    """A snapshot of the workers and their links."""

    workers: int
    most_workers: int  # the largest number at one time
    reconnects: int  # links made after the first one of each worker


class Pool:
    """The workers of `destinations`, at most `max_workers`. Each runs `run` until that returns."""

    def __init__(
        self, destinations: Sequence[Destination], max_workers: int, run: Callable[[Worker], None], runtime: Runtime
    ) -> None:
        self._max_workers = max_workers
        self._run = run
        self._runtime = runtime
        self._lock = threading.Lock()
        # Guarded by _lock.
        self._destinations = tuple(destinations)  # replaced as a whole: a thread may read it once without the lock
        self._workers: dict[threading.Thread, Worker] = {}  # all whose thread runs
        self._working: set[threading.Thread] = set()  # without the retiring ones
        self._started = 0
        self._most_workers = 0
        self._reconnects = 0
        self._stopping = False

    @property
    def destinations(self) -> Sequence[Destination]:
        """The destinations now, including dropped ones whose workers have not ended."""
        return self._destinations

    def linked(self, destination: Destination) -> bool:
        """True while a worker of this destination could store without connecting first."""
        with self._lock:
            return any(worker.sink.ready for worker in self._workers.values() if worker.destination is destination)

    def stats(self) -> ForwarderStats:
        """Return a snapshot."""
        with self._lock:
            return ForwarderStats(len(self._working), self._most_workers, self._reconnects)

    def stop(self) -> dict[threading.Thread, Worker]:
        """Start no more workers. Return all whose threads run."""
        with self._lock:
            self._stopping = True
            return dict(self._workers)

    # Destinations.

    def change(self, endpoints: Sequence[Endpoint], make: Callable[[Endpoint], Destination]) -> bool:
        """Have a destination for each of these addresses, made by `make`, and drop the others. True if any changed."""
        with self._lock:
            before = {each.endpoint: each for each in self._destinations if each.endpoint and not each.dropped}
            dropped = [before[endpoint] for endpoint in before if endpoint not in endpoints]
            added = [endpoint for endpoint in endpoints if endpoint not in before]
            for destination in dropped:
                destination.dropped, destination.fixed = True, False
            # The last worker of a dropped destination removes it. One that never had a worker is removed here.
            current = {each.endpoint: each for each in self._destinations if each.workers or not each.dropped}
            for endpoint in added:
                if endpoint in current:
                    current[endpoint].dropped = False
                else:
                    current[endpoint] = make(endpoint)
            self._destinations = tuple(current.values())
        if added or dropped:
            addresses = {"added": map(str, added), "gone": (str(destination.endpoint) for destination in dropped)}
            log.info("consumers", {key: text for key, value in addresses.items() if (text := " ".join(value))})
        return bool(added or dropped)

    def _available(self) -> list[Destination]:
        """Return the destinations that may get more workers."""
        return [each for each in self._destinations if not each.health.probed and not each.dropped]

    # How workers start and end.

    def start_first(self) -> None:
        """Start a worker of each destination that has none, even beyond the maximum. Raises ThreadError."""
        for destination in self._destinations:
            with self._lock:
                if not destination.workers and not self._stopping:
                    self._start(destination)

    def start_another(self) -> None:
        """Start one more worker, if the maximum is not reached and a destination may get it."""
        candidates = self._available()
        if not candidates:
            return
        with self._lock:
            if not self._stopping and len(self._working) < self._max_workers:
                try:
                    self._start(min(candidates, key=lambda candidate: candidate.workers))
                except ThreadError:
                    pass  # logged by `_start`; the running workers go on

    def retire(self, worker: Worker) -> bool:
        """Count the calling worker out, and return True, unless it is the last one of its destination."""
        with self._lock:
            if worker.destination.workers < 2:
                return False
            self._count_out(worker)
        worker.destination.health.resign()
        return True

    def retire_if_too_many(self, worker: Worker) -> bool:
        """As `retire`, if the maximum is reached and another destination, which was down, has at least two fewer."""
        if worker.destination.only or len(self._working) < self._max_workers:
            return False
        fewest = min((other.workers for other in self._available()), default=worker.destination.workers)
        return fewest < worker.destination.workers - 1 and self.retire(worker)

    def leave(self, worker: Worker, is_needed: Callable[[], bool]) -> bool:
        """Count the calling worker out, and return True, if its destination was dropped and the worker is not needed.

        `is_needed` is called under the lock: workers that left before have released their batches, and `change` runs
        either before or after it.
        """
        if not worker.destination.dropped:
            return False
        with self._lock:
            if not worker.destination.dropped or is_needed():
                return False
            self._count_out(worker)
        worker.destination.health.resign()
        return True

    def end(self, worker: Worker) -> None:
        """Forget the calling worker: its thread ends."""
        with self._lock:
            self._workers.pop(threading.current_thread(), None)
            self._count_out(worker)

    def _start(self, destination: Destination) -> None:
        """Start and register a worker. Raises ThreadError, after logging it."""
        assert self._lock.locked()
        self._started += 1
        worker = Worker(destination, destination.make_sink(self._link_counter()))
        try:
            thread = self._runtime.start_thread(self._run, worker, name=f"forward-{self._started}")
        except ThreadError as error:
            log.error("no_thread", {"error": str(error), "workers": len(self._workers)})
            raise
        self._workers[thread] = worker
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

    def _count_out(self, worker: Worker) -> None:
        """Remove the calling worker from `_working`. The last worker of a dropped destination removes it."""
        assert self._lock.locked()
        destination = worker.destination
        if threading.current_thread() in self._working:
            self._working.discard(threading.current_thread())
            destination.workers -= 1
            if destination.dropped and not destination.workers:
                self._destinations = tuple(other for other in self._destinations if other is not destination)
