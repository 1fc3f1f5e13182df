"""The spool: a local database that stores records durably while the consumer is down.

If the link of a worker fails, the worker stores its block here. The block then counts as stored, because it is on disk.
Until the consumer acks again, workers without a link store here at once. The thread `replay` forwards the spooled
records, oldest first, over a link of its own, and deletes each record that the consumer has acked. Records keep their
sources and sequences, so the consumer recognises a record that is forwarded twice, and stores it once.

The file is a `Store` with its own locks. `Spool._lock` guards the other shared fields. `_changed` shares it: the thread
`replay` waits on it, and `append` and `stop` notify it. Nothing is stored or sent under the lock.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from ringolib.counters import Histogram
from ringolib.forward.health import Health
from ringolib.forward.link import LinkSink
from ringolib.forward.sink import InDoubt, NotStored, ignore_late
from ringolib.forward.workers import BATCH_RECORDS
from ringolib.storage.interface import Sizes, StoreError, StoreStats
from ringolib.storage.remedies import NoRoom
from ringolib.storage.sqlite_file import SPOOL_APPLICATION_ID
from ringolib.storage.wal import LARGE_WAL_BYTES
from ringolib.timing import ThreadError, backoff, deadline_after, fatal, start_thread, wait_until
from ringolib.wire import Block
from store import Store

log = logging.getLogger("ringoexp.spool")

ACK_TIMEOUT_SECONDS = 5.0
"""As in `link`, for a publisher with a spool: shorter, because the spool stores the block meanwhile."""
MIN_FREE_BYTES = 2 * LARGE_WAL_BYTES
"""The spool leaves this much of its disk free: deleting records needs some space, too."""


class SpoolStats(NamedTuple):
    """A snapshot."""

    depth: int  # records in the spool
    oldest: float  # seconds since the oldest of them was received, by the wall clock; 0 if the spool is empty
    forwarded: int  # records that the consumer has acked from the spool, since the start


class UnopenedStore:
    """Stands for the file of a spool that cannot be opened yet: no record is known, and none can be stored."""

    def __init__(self, path: str, error: StoreError) -> None:
        self.path = path
        self.reason = str(error)

    def check(self) -> None:
        """Raise StoreError with the reason why the file is not open."""
        raise StoreError(self.reason)

    def stats(self) -> StoreStats:
        """Return zeros and the reason."""
        return StoreStats(0, 0, 0, 0, self.reason, 0, Histogram().snapshot())

    def sizes(self) -> Sizes:
        """Return no sizes."""
        return Sizes(0, 0, None)

    def close(self) -> bool:
        """Do nothing. Return True: no file is damaged."""
        return True


class Spool:
    """The spool in the file `path`, for at most `max_records`, forwarded over `link`. `health` is the consumer's.

    The thread starts at once. If the disk has no room to open the file, the thread opens it later; until then, records
    go only over links. Raises StoreError if the file cannot be opened for another reason or is no spool, and
    ThreadError.
    """

    def __init__(self, path: str, max_records: int, link: LinkSink, health: Health) -> None:
        self.path = path
        self._max_records = max_records
        self.health = health
        # Replaced by the thread when it opens the file. Other threads read the attribute once.
        self.store: Store | UnopenedStore
        try:
            self.store = Store(path, SPOOL_APPLICATION_ID)
        except NoRoom as error:
            log.error("spool_unopened", {"reason": str(error)})
            self.store = UnopenedStore(path, error)

        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        # Guarded by _lock.
        self._incoming = 0  # records that `append` is storing
        self._forwarded = 0
        self._refused = 0  # records of the last block, if it was refused and nothing was deleted since; else 0
        self._stopping = False

        self.intact = True  # False after `stop` if another program has damaged the file meanwhile
        # Written by the thread only. Other threads read _broken and _oldest_ms, each in one step.
        self._link = link
        self._failures = 0  # in a row
        self._broken = isinstance(self.store, UnopenedStore)  # the last turn failed on the file, or unexpectedly
        self._error: str | None = None  # how, while it is broken
        self._oldest_ms: int | None = None  # when the oldest record was received, Unix time

        try:
            self._thread = start_thread(self._run, name="replay")
        except ThreadError:
            self.store.close()
            raise

    @property
    def away(self) -> bool:
        """True from the failure of a link until the consumer acks again.

        False while the spool cannot forward because of an error of its own: then only the workers' links can find out
        whether the consumer is up.
        """
        return self.health.down and not self._broken  # one read each: no lock needed

    @property
    def full(self) -> bool:
        """True while there is no room."""
        return self._refused > 0  # one read: no lock needed

    @property
    def depth(self) -> int:
        """How many records are in the spool."""
        return self.store.stats().held

    def append(self, block: Block) -> None:
        """Return when the block is on disk. Raises NotStored if there is no room, or if the commit failed."""
        size, store = len(block.values), self.store
        free = store.sizes().disk_free
        with self._lock:
            reason = self._why_full(store, size, free)
            self._refused = size if reason else 0
            if reason or isinstance(store, UnopenedStore):
                raise NotStored(reason)
            self._incoming += size
        try:
            store.append(*block)
        except StoreError as error:
            raise NotStored(str(error)) from error
        finally:
            with self._lock:
                self._incoming -= size
                self._changed.notify()

    def refuses(self) -> str | None:
        """Return why there is no room now, or None if there is room.

        Workers store whole blocks. So after a refused block, there must be room for a block of its size.
        """
        store = self.store
        free = store.sizes().disk_free
        with self._lock:
            return self._why_full(store, max(1, self._refused), free)

    def stats(self) -> SpoolStats:
        """Return a snapshot."""
        oldest, depth = self._oldest_ms, self.depth
        with self._lock:
            age = max(0.0, time.time() - oldest / 1000) if depth and oldest else 0.0
            return SpoolStats(depth, age, self._forwarded)

    def stop(self, timeout: float) -> bool:
        """End the thread and close the file. Return False if the thread has not ended within `timeout` seconds.

        A block that is being forwarded is abandoned. After the next start, all records in the spool are forwarded.
        """
        with self._lock:
            self._stopping = True
            self._changed.notify()
        self._link.abort()
        self._thread.join(timeout)
        if self._thread.is_alive():
            return False
        self.intact = self.store.close()
        return True

    def _why_full(self, store: Store | UnopenedStore, size: int, free: int | None) -> str | None:
        """Return why there is no room for `size` records, with `free` bytes left on the disk, or None."""
        assert self._lock.locked()
        if isinstance(store, UnopenedStore):
            return store.reason
        if store.stats().held + self._incoming + size > self._max_records:
            return (
                f"{self.path}: the spool is full, it has at most {self._max_records} records (--spool_max): start the "
                "consumer, or raise this limit"
            )
        if free is not None and free < MIN_FREE_BYTES:
            return f"{self.path}: less than {MIN_FREE_BYTES >> 20} MiB of its disk are free: make room"
        return None

    # The thread.

    def _run(self) -> None:
        """Run turns until `stop`, then close the link."""
        try:
            while self.step():
                pass
            self._link.close()
        except BaseException:
            fatal(log, "the thread that forwards the spool")

    def step(self) -> bool:
        """Run one turn: wait for records, forward the oldest and delete them. Pause after a failure. False to end."""
        try:
            with self._lock:
                wait_until(self._changed, lambda: self._stopping or self._has_work())
                if self._stopping:
                    return False
            if isinstance(self.store, UnopenedStore):
                self._open()
            else:
                self._record_success(self._forward_oldest())
        except (NotStored, InDoubt) as error:
            self._broken = False
            self.health.set_down(str(error))
            self._pause()
        except Exception as error:
            self._log_error(error)
            self._broken, self._error = True, repr(error)
            self._pause()
        return True

    def _has_work(self) -> bool:
        """True if there are records to forward, or there may be: the file is not open yet."""
        return isinstance(self.store, UnopenedStore) or self.depth > 0

    def _open(self) -> None:
        """Open the file. Raises StoreError; the first time that the reason is another one, it is logged."""
        try:
            self.store = Store(self.path, SPOOL_APPLICATION_ID)
        except StoreError as error:
            if not isinstance(error, NoRoom) and str(error) != self.store.stats().error:
                log.error("spool_unopened", {"reason": str(error)})
            self.store = UnopenedStore(self.path, error)
            raise
        log.info("spool_opened", {"records": self.depth})
        with self._lock:
            self._refused = 0
        self._failures, self._broken = 0, False

    def _forward_oldest(self) -> int:
        """Forward the oldest records and delete them. Return how many; 0 if they were deleted in an earlier turn.

        After failures the block is smaller: over a slow link a large one may never be acked in time.
        """
        store = self.store
        assert not isinstance(store, UnopenedStore)
        oldest = store.oldest(max(1, BATCH_RECORDS >> min(self._failures, 16)))
        if oldest is None:
            if self.depth:
                raise StoreError(f"{self.path} is corrupt: it has records that belong to no batch")
            return 0
        self._oldest_ms = oldest.received_at_ms
        self._link.store(oldest.block)
        self.health.on_ack()
        store.delete(oldest)
        return len(oldest.block.values)

    def _record_success(self, count: int) -> None:
        """Count the forwarded records. If the spool is empty now, close the link, as it is not needed."""
        with self._lock:
            self._forwarded += count
            self._refused = 0
        self._failures, self._broken = 0, False
        if not self.depth:
            log.info("spool_empty", {"forwarded": self._forwarded})
            self._oldest_ms = None
            self._link.close()

    def _log_error(self, error: Exception) -> None:
        """Log an error of the file, or an unexpected one. If the file fails repeatedly, only the first time counts.

        The same holds for an unexpected error that stays the same.
        """
        repeated = self._broken and (isinstance(error, StoreError) or repr(error) == self._error)
        level = logging.DEBUG if repeated else logging.ERROR
        log.log(level, "replay_error", {"error": str(error) or repr(error)}, exc_info=log.isEnabledFor(logging.DEBUG))

    def _pause(self) -> None:
        """Wait before the next try, longer after each failure. `stop` ends the pause."""
        self._failures += 1
        with self._lock:
            wait_until(self._changed, lambda: self._stopping, deadline_after(backoff(self._failures)))


class SpoolSink:
    """The sink of a worker with a spool: a link to the consumer, and the spool while the consumer is down."""

    identity = None  # the records may be in either of two stores

    def __init__(self, link: LinkSink, spool: Spool) -> None:
        self._link = link
        self._spool = spool

    @property
    def ready(self) -> bool:
        """True while there is a link, or room in the spool."""
        return self._link.ready or not self._spool.full

    def connect(self) -> None:
        """Do nothing: `store` makes a link if it needs one."""

    def store(self, block: Block, on_late: Callable[[], None] = ignore_late) -> None:
        """Return when the consumer has acked the block, or when it is in the spool.

        Raises NotStored or InDoubt if both fail.
        """
        had_link = self._link.ready
        if not had_link and self._spool.away:
            try:
                self._spool.append(block)
                return
            except NotStored:
                pass  # the spool is full or fails, but the consumer may be up again
        try:
            self._link.store(block)
        except (NotStored, InDoubt) as error:
            self._spool.health.set_down(str(error))
            try:
                self._spool.append(block)
            except NotStored as full:
                raise (error if isinstance(error, InDoubt) else full) from full
        else:
            if not had_link or not self._spool.health.down:
                self._spool.health.on_ack()

    def idle(self) -> None:
        """Look after the link. Close it if the spool needs one: the consumer may have no room for two links."""
        if self._spool.away and self._spool.depth:
            self._link.close()
        else:
            self._link.idle()

    def abort(self) -> None:
        """Make a `store` over the link fail. The block still goes to the spool."""
        self._link.abort()

    def close(self) -> None:
        """Close the link, if there is one."""
        self._link.close()
