"""Workers: threads that take batches from the ring, store them through a sink, and commit them.

A worker's turn: take a batch, one in doubt before a new one, make sure that there is a link, store the batch, and
commit it. If there may be several consumers, the link comes first: it decides which batches the worker may take.

If a batch is surely not stored, the worker requeues it, for any worker. If it may be stored, it is in doubt (`doubts`):
it is set aside, and goes to the same consumer, or the same store, again. If its ack is late, it is set aside at once,
while the worker goes on to wait. So the records of other clients are acked.

If a sink fails, its worker becomes the prober of its destination (`health`). If the link of another worker fails
meanwhile, that worker retires, unless it is the last one (`pool`). So there is always one to retry. A worker also
retires after IDLE_SECONDS without work.

If a turn fails for an unexpected reason, the worker pauses before the next one, longer after each failure. An error
that leaves a batch in flight without a worker ends the process: the batch would never be stored.

The thread `resolve` follows the addresses of names (`discovery`).
"""

import logging
import threading
from collections.abc import Callable, Sequence

from ringbuffer import Batch, Closed, Interrupted, Ring
from ringolib.forward.destination import Destination
from ringolib.forward.discovery import Discovery
from ringolib.forward.doubts import Doubts
from ringolib.forward.pool import ForwarderStats, Pool, Worker
from ringolib.forward.sink import InDoubt, NotStored, ignore_late
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


class _Yielded(NotStored):
    """The worker leaves the batch to the prober, or to another consumer."""


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
        # At most half of the ring, so that producers can fill the other half meanwhile.
        self._max_batch = min(BATCH_RECORDS, max_records, max(1, ring.capacity // 2))
        self._doubts = Doubts()
        # Set once, by `follow`.
        self._discovery: Discovery | None = None
        self._make: Callable[[Endpoint], Destination]
        self._resolver: threading.Thread | None = None

        self._pool = Pool(destinations, max_workers, self._run, runtime)
        self.linked = self._pool.linked
        self.stats: Callable[[], ForwarderStats] = self._pool.stats
        self.in_doubt = self._doubts.records
        try:
            self._pool.start_first()
        except ThreadError:
            ring.abort()
            self.stop(JOIN_SECONDS)
            raise

    @property
    def destinations(self) -> Sequence[Destination]:
        """The destinations now, including dropped ones whose workers have not ended."""
        return self._pool.destinations

    def follow(self, discovery: Discovery, make: Callable[[Endpoint], Destination]) -> None:
        """Have the destinations follow the addresses of names; `make` makes new ones. Raises ThreadError."""
        self._make, self._discovery = make, discovery
        if discovery.has_names:
            self._resolver = self._runtime.start_thread(self._run_discovery, discovery, name="resolve")

    def change(self, endpoints: Sequence[Endpoint]) -> None:
        """Have a destination for each of these addresses. The workers of others end once nothing is in doubt there."""
        if self._pool.change(endpoints, self._make):
            self._ring.interrupt()  # the workers of dropped destinations end
        try:
            self._pool.start_first()  # of new destinations, and of those for which the system had no thread
        except ThreadError:
            pass  # logged by the pool; the next change tries again

    def stop(self, timeout: float) -> bool:
        """End all workers and join them, abandoning their batches. Return True if all ended within `timeout` seconds.

        The ring must be closed and drained before, or aborted.
        """
        deadline = self._runtime.deadline_after(timeout)
        workers = self._pool.stop()
        if self._discovery:
            self._discovery.stop()
        for destination in self.destinations:
            destination.health.stop()
        drained = self._ring.join(0)
        for worker in workers.values():
            if not (drained and worker.sink.ready):  # if all is stored, a worker without a link has nothing to finish
                worker.sink.abort()
        for thread in workers:
            thread.join(max(0.0, deadline - self._runtime.monotonic()))
        if self._resolver:
            self._resolver.join(RESOLVER_JOIN_SECONDS)
        return not any(thread.is_alive() for thread in workers)

    # The turn of a worker. A step that returns a bool returns False if the worker must end.

    def turn(self, worker: Worker) -> bool:
        """Take a batch, store it, and commit it."""
        destination = worker.destination
        if not destination.health.pause() or self._leave(worker):
            return False
        try:
            self._connect(worker)
            batch, in_doubt = self._take(worker)
        except NotStored as error:
            return self._fail(worker, error)
        except TimeoutError:
            return self._idle(worker)
        except Interrupted:
            return True
        except Closed:
            return False
        try:
            failure = self._store(worker, batch, in_doubt)
        except BaseException:  # the batch would stay in flight, and would never be stored
            fatal(log, "a worker with a batch")
        if failure is not None:
            return self._fail(worker, failure)
        destination.health.on_ack()
        destination.unexpected = None
        return not self._pool.retire_if_too_many(worker)

    def _leave(self, worker: Worker) -> bool:
        """Count the worker out, and return True, if its destination was dropped and nothing is in doubt there."""
        destination, sink = worker
        return self._pool.leave(worker, lambda: self._doubts.has_for(destination, sink.identity))

    def _connect(self, worker: Worker) -> None:
        """Make a link if it is needed to know which batches the worker may take. Raises NotStored."""
        if worker.must_yield:
            raise _Yielded
        if not worker.destination.only:
            worker.sink.connect()
            worker.destination.health.on_link()

    def _take(self, worker: Worker) -> tuple[Batch, bool]:
        """Return the next batch, and whether it is in doubt. Raises as Ring.reserve."""
        interrupts = self._ring.interrupts
        destination, sink = worker
        if not destination.only and (batch := self._doubts.take(destination, sink.identity)):
            return batch, True
        return self._ring.reserve(self._max_batch, IDLE_SECONDS, interrupts), False

    def _store(self, worker: Worker, batch: Batch, in_doubt: bool) -> BaseException | None:
        """Store a batch, and commit it. If it cannot be stored, give it back, and return the error."""
        destination, sink = worker

        def on_late() -> None:
            destination.health.on_late()
            self._doubts.hold(batch, destination, sink.identity)
            self._ring.set_aside(batch)

        try:
            if worker.must_yield:  # now, after the wait for a batch
                raise _Yielded
            if self._ring.wants_workers:
                self._pool.start_another()
            sink.store(Block(batch.runs, batch.values), ignore_late if destination.only else on_late)
        except BaseException as error:
            self._give_back(worker, batch, error, in_doubt)
            return error
        self._doubts.settle(batch)
        self._ring.commit(batch)
        return None

    def _give_back(self, worker: Worker, batch: Batch, error: BaseException, in_doubt: bool) -> None:
        """Requeue a batch that is surely not stored. Keep a batch that may be stored for its destination.

        If it was `in_doubt` before, it still is. If there is only one destination, a retry goes there in any case.
        """
        destination, sink = worker
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

    def _idle(self, worker: Worker) -> bool:
        """Retire after IDLE_SECONDS without work; if this is the last worker, look after its link instead."""
        if self._pool.retire(worker):
            return False
        worker.sink.idle()
        return True

    def _fail(self, worker: Worker, error: BaseException) -> bool:
        """Report an error. The prober goes on to retry; another worker retires, unless it is the last one."""
        if isinstance(error, _Yielded):
            return not self._pool.retire(worker)
        reason = str(error) if isinstance(error, (NotStored, InDoubt)) else None
        if reason is None:
            self._report_unexpected(worker.destination, error)
        probes = worker.destination.health.on_failure(reason, sent=not isinstance(error, NotStored))
        if self._discovery:
            self._discovery.hurry()
        return probes or not self._pool.retire(worker)

    def _report_unexpected(self, destination: Destination, error: BaseException) -> None:
        """Log an unexpected error, once until another one comes up or a batch is stored."""
        text = repr(error)
        log_unexpected(log, "worker_error", error, repeated=text == destination.unexpected)
        destination.unexpected = text

    # The threads.

    def _run(self, worker: Worker) -> None:
        """Run the turns of a worker until one returns False. After an unexpected error, pause, and go on."""
        try:
            self._run_turns(worker)
            try:
                worker.sink.close()
            except Exception as error:
                self._report_unexpected(worker.destination, error)
            self._pool.end(worker)
        except BaseException:
            fatal(log, "a worker")

    def _run_turns(self, worker: Worker) -> None:
        failures = 0
        going = True
        while going:
            try:
                going = self.turn(worker)
                failures = 0
            except Exception as error:
                failures += 1
                self._report_unexpected(worker.destination, error)
                going = worker.destination.health.sleep(backoff(failures))

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
