"""The publisher's spool: a local database that takes over, durably, while the consumer is away.

A worker whose link fails stores its block here, and that counts as stored: it is on disk. From then on, until the
consumer answers again, workers without a link store here at once. The thread `replay` forwards what is here,
the oldest first, over a link of its own, and deletes what the consumer has acked. Sources and sequences stay as they
are, so what is forwarded twice the consumer stores once; nothing more is needed.

The file is a `Store` of its own kind, which locks for itself. `Spool._lock` guards the rest; `_changed` shares it, is
notified when records come and by `stop`, and `replay` alone waits on it. Nothing is stored or sent under the lock.
"""

import logging
import threading
import time
from time import monotonic
from typing import NamedTuple

from ringolib.forward.link import LinkSink, LinkState
from ringolib.forward.sink import SinkError
from ringolib.forward.workers import BATCH_RECORDS
from ringolib.storage.interface import StoreError
from ringolib.storage.sqlite_file import SPOOL_APPLICATION_ID
from ringolib.timing import backoff
from ringolib.wire import Block
from store import LARGE_WAL_BYTES, Store

log = logging.getLogger("ringoexp.spool")

PATIENCE = 5.0
"""Seconds a consumer has to take a block, and as many again to ack it, before the spool does: less than without one."""
ROOM = 2 * LARGE_WAL_BYTES
"""Bytes of disk that the spool leaves free: it needs some to delete what was forwarded."""


class SpoolStats(NamedTuple):
    """A snapshot."""

    depth: int  # records in the spool
    oldest: float  # seconds since the oldest of them came, by the wall clock; 0 if there is none
    forwarded: int  # records the consumer has acked from here, since the start


class Spool:
    """The file at `path`, of at most `most` records, forwarded over `link`, whose state is `state`. Starts at once.

    Raises StoreError when the file cannot be opened or is not a spool.
    """

    def __init__(self, path: str, most: int, link: LinkSink, state: LinkState) -> None:
        self.path = path
        self._most = most
        self.state = state
        self.store = Store(path, SPOOL_APPLICATION_ID)  # others read its stats

        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        # Guarded by _lock.
        self._coming = 0  # records on their way into the store
        self._forwarded = 0
        self._full = False  # the last block was refused, and nothing was deleted since
        self._stopping = False

        # The thread's.
        self._link = link
        self._failures = 0  # in a row
        self._broken = False  # the file cannot be read, or not be written; others read it
        self._oldest_ms: int | None = None  # when the oldest record came, Unix time; others read it

        # Daemon: a second signal ends the process at once, whatever it waits for.
        self._thread = threading.Thread(target=self._run, name="replay", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no more threads to be had
            self.store.close()
            raise

    @property
    def away(self) -> bool:
        """True from a link's failure until the consumer has acked something again.

        Not while nothing can be forwarded for reasons of our own: then only the workers' links can tell.
        """
        return self.state.down and not self._broken  # no lock needed

    @property
    def full(self) -> bool:
        """True while there is no room."""
        return self._full  # one read: no lock needed

    @property
    def depth(self) -> int:
        """Records in the spool."""
        return self.store.stats().held

    def append(self, block: Block) -> None:
        """Returns when the block is on disk. Raises SinkError when there is no room, or it could not be stored."""
        size = len(block.values)
        free = self.store.sizes().disk_free
        with self._lock:
            why = self._refuses(size, free)
            self._full = why is not None
            if why:
                raise SinkError(why)
            self._coming += size
        try:
            self.store.append(*block)
        except StoreError as error:
            raise SinkError(str(error)) from error
        finally:
            with self._lock:
                self._coming -= size
                self._changed.notify()

    def refuses(self) -> str | None:
        """Why it would not take a record now; None if it would, as far as room goes."""
        free = self.store.sizes().disk_free
        with self._lock:
            return self._refuses(1, free)

    def _refuses(self, size: int, free: int | None) -> str | None:
        """Why there is no room for `size` records, with so many bytes of disk free."""
        assert self._lock.locked()
        if self.store.stats().held + self._coming + size > self._most:
            return f"{self.path}: the spool is full, it has at most {self._most} records (--spool_max)"
        if free is not None and free < ROOM:
            return f"{self.path}: less than {ROOM >> 20} MiB of its disk are free: make room"
        return None

    def stats(self) -> SpoolStats:
        """What there is now, and the total since the start."""
        oldest, depth = self._oldest_ms, self.depth
        with self._lock:
            age = max(0.0, time.time() - oldest / 1000) if depth and oldest else 0.0
            return SpoolStats(depth, age, self._forwarded)

    def stop(self, timeout: float) -> bool:
        """Ends the thread, giving up what is under way, and closes the file; True if it ended within `timeout` seconds.

        What is in the spool is forwarded after the next start.
        """
        with self._lock:
            self._stopping = True
            self._changed.notify()
        self._link.abort()
        self._thread.join(timeout)
        if self._thread.is_alive():
            return False
        self.store.close()
        return True

    # The thread.

    def step(self) -> bool:
        """One turn: waits for records, forwards the oldest and deletes them, or pauses. False when it should end."""
        with self._lock:
            while not self._stopping and not self.depth:
                self._changed.wait()
            if self._stopping:
                return False
        try:
            # Ever less after failures: a slow link may have no time for more.
            oldest = self.store.oldest(max(1, BATCH_RECORDS >> min(self._failures, 16)))
            if oldest is None and self.depth:
                raise StoreError(f"{self.path} is corrupt: it has records that belong to no batch")
            if oldest:
                self._oldest_ms = oldest.received_at_ms
                self._link.store(oldest.block)
                self.state.works()
                self.store.delete(oldest)
        except SinkError as error:
            self._broken = False
            self.state.failed(str(error))
        except Exception as error:
            known = self._broken and isinstance(error, StoreError)
            level = logging.DEBUG if known else logging.ERROR
            log.log(level, "replay_error", {"error": str(error)}, exc_info=log.isEnabledFor(logging.DEBUG))
            self._broken = True
        else:
            with self._lock:
                self._forwarded += len(oldest.block.values) if oldest else 0  # None: deleted before, with an error
                self._full = False
            self._failures, self._broken = 0, False
            if not self.depth:
                log.info("spool_empty", {"forwarded": self._forwarded})
                self._oldest_ms = None
                self._link.close()
            return True
        self._failures += 1
        until = monotonic() + backoff(self._failures)
        with self._lock:
            while not self._stopping and (left := until - monotonic()) > 0:
                self._changed.wait(left)
        return True

    def _run(self) -> None:
        """`step` until it should end; then closes the link."""
        while self.step():
            pass
        self._link.close()


class SpoolSink:
    """A worker's sink: a link to the consumer, and the spool while the consumer is away."""

    identity = None  # of two

    def __init__(self, link: LinkSink, spool: Spool) -> None:
        self._link = link
        self._spool = spool

    @property
    def ready(self) -> bool:
        """True while there is a link, or room in the spool."""
        return self._link.ready or not self._spool.full

    def connect(self) -> None:
        """Does nothing: a link is made when a block needs it."""

    def store(self, block: Block) -> None:
        """Returns when the block is on the consumer's disk, or in the spool. Raises SinkError when it is in neither."""
        fresh = not self._link.ready
        if fresh and self._spool.away:
            try:
                self._spool.append(block)
                return
            except SinkError:
                pass  # full, or broken: the consumer may be back all the same
        try:
            self._link.store(block)
        except SinkError as error:
            self._spool.state.failed(str(error))
            self._spool.append(block)
        else:
            if fresh or not self._spool.state.down:
                self._spool.state.works()

    def idle(self) -> None:
        """Looks after the link; ends it when the spool cannot get one of its own: the consumer may have no room."""
        if self._spool.away and self._spool.depth:
            self._link.close()
        else:
            self._link.idle()

    def abort(self) -> None:
        """Makes a `store` over the link fail; the spool still takes the block."""
        self._link.abort()

    def close(self) -> None:
        """Says goodbye to the consumer, if connected."""
        self._link.close()
