"""The store on a ClickHouse server or cluster: the same face as the one on SQLite, over HTTP, with group commit.

Each (source, sequence) counts once, however often it is inserted: the table forgets the others, and the view never
shows them. So what is known already is not looked for, and not counted, and to insert again is harmless, with the
identical bytes above all. What came first stays, by the clocks of the consumers that took it.

Any thread may `append`. As in `store`, the first to come leads: it waits until MANY records have gathered, or a second
has passed since the insert before, as servers choke on many small ones; then it inserts all and wakes the others. Who
comes meanwhile is for the next leader. `_lock` guards the queue, the leadership and the totals; on it, `_turn` is
notified when an insert ends, and `_gathered` when there is enough, or no reason to wait any more: the leader alone
waits on that. The servers and what is known of them belong to the leader, without a lock; `check` asks by connections
of its own, and reads no more than which host is in use.
"""

import functools
import logging
import sys
import threading
import time
import uuid
from array import array
from collections.abc import Iterable, Sequence
from struct import Struct
from time import monotonic, sleep
from typing import NamedTuple

import clickhouse_tables as tables
import tls
from clickhouse_http import Again, Final, Server, Target
from database import StoreError
from stats import Histogram
from store import Sizes, StoreStats
from wire import Run

log = logging.getLogger("ringoexp.clickhouse")

INTERVAL = 1.0
"""Seconds between the beginnings of two inserts, unless there are MANY records."""
MANY = 100_000
MOST_GROUPED = 500_000
"""Records after which an insert takes no more blocks along; a run counts as RUN_COST."""
RUN_COST = 16
GIVE_UP_SECONDS = 20.0
"""How long records wait at most before they are given back to who sent them; a link waits 30 s for its ack."""
LEAST_OF_IT = 0.4
"""The part of that for which an insert is tried in any case, if its records have waited for one before that failed."""
CHECK_SECONDS = 1.5
"""How long a check waits for each answer."""
BACKOFF_LEAST, BACKOFF_MOST = 0.1, 2.0
SLOW_INSERT = 5.0
"""Seconds from which on an insert is said to be slow."""
TRUST_SECONDS = 3.0
"""For how long an insert that succeeded shows that the next one would."""
DOUBT_SECONDS = 15.0
"""For how long one that failed, and is not being tried again, is not made good by a check."""
SIZES_SECONDS = 10.0
"""How old the size of the tables, as the stats say it, may be while records come in."""

WORDS = 5
"""Of 8 bytes, in a row: two of the source, then sequence, value, version."""
_SOURCE = Struct(">qq")
_BIG_ENDIAN = sys.byteorder == "big"
_LOW_16_BITS = 2 * 4 + (3 if _BIG_ENDIAN else 0)  # of the sequence, in shorts from the row's beginning
_SHORT_RUN = 4
"""Records up to which a run is written one by one, which is faster then."""


@functools.cache
def _ramp() -> "array[int]":
    """All shorts, in order."""
    return array("H", range(1 << 16))


def encode(blocks: Iterable[tuple[Sequence[Run], "array[int]"]], arrived_ns: int) -> "array[int]":
    """The rows of blocks as RowBinary, `arrived_ns` being when the first run came, and each other one a ns later.

    By strides, not record by record. A row is (UUID, UInt64, Int64, UInt64), little-endian, and ClickHouse's UUID is
    two of 64 bits, the first half first.
    """
    rows = array("q")
    version = tables.LATEST - arrived_ns
    for runs, values in blocks:
        at = 0
        for run in runs:
            high, low = _SOURCE.unpack(run.source)
            if run.count <= _SHORT_RUN:
                for sequence in range(run.first, run.first + run.count):
                    rows.extend((high, low, sequence, values[at], version))
                    at += 1
            else:
                first, end = run.first, run.first + run.count
                while first < end:
                    # As far as only the sequence's last 16 bits change.
                    base = first & ~0xFFFF
                    count = min(end, base + 0x10000) - first
                    part = array("q", (high, low, base, 0, version)) * count
                    part[3::WORDS] = values[at : at + count]
                    with memoryview(part).cast("B").cast("H") as shorts, memoryview(_ramp()) as ramp:
                        shorts[_LOW_16_BITS :: 4 * WORDS] = ramp[first - base : first - base + count]
                    rows += part
                    first, at = first + count, at + count
            version -= 1
    if _BIG_ENDIAN:
        rows.byteswap()
    return rows


class _Waiting:
    """One caller's block on its way into an insert; `done` and `error` are guarded by the store's lock."""

    __slots__ = ("runs", "values", "since", "done", "error")

    def __init__(self, runs: Sequence[Run], values: "array[int]") -> None:
        self.runs = runs
        self.values = values
        self.since = monotonic()
        self.done = False
        self.error: StoreError | None = None

    @property
    def cost(self) -> int:
        """What it counts for in a group."""
        return len(self.values) + RUN_COST * (len(self.runs) - 1)


class _Size(NamedTuple):
    """What the tables hold, as far as the servers count it without reading them."""

    records: int  # with those that are there more than once, until they are merged
    bytes: int


class ClickHouse:
    """A database on the target's hosts, its tables made if they are missing. Raises StoreError if it cannot be had.

    `cluster` is where they are made, and over whose shards they are spread. `retain` is after how many days the servers
    may delete a record.
    """

    def __init__(self, target: Target, cluster: str | None = None, retain: float | None = None) -> None:
        self.path = target.shown
        self._target = target
        self._cluster = cluster

        self._lock = threading.Lock()
        self._turn = threading.Condition(self._lock)
        self._gathered = threading.Condition(self._lock)
        # Guarded by _lock.
        self._queue: list[_Waiting] = []
        self._queued = 0  # their cost
        self._leading = False
        self._closed = False
        self._stored = 0
        self._commits = 0
        self._failed_commits = 0
        self._error: str | None = None
        self._commit_times = Histogram()
        self._committed_at = self._failed_at = float("-inf")  # inserts, monotonic seconds
        self._size = _Size(0, 0)

        # The leader's.
        self._at = 0  # the host in use
        self._known: tables.Tables | None = None  # of that host; None after a failure
        self._began_at = float("-inf")  # the last insert, monotonic seconds
        self._sized_at = float("-inf")  # monotonic seconds
        self._last_ns = 0  # when the last run came
        self._failing_since = 0.0  # monotonic seconds, 0 while inserts succeed
        self._servers: list[Server] = []
        try:
            self._servers = [Server(target, *host) for host in target.hosts]
            found = self._open(retain)
        except (Again, Final, tls.BadFile) as error:
            for server in self._servers:
                server.close()
            raise self._explained(error) from None
        self._known = found
        self.identity = found.identity
        self.power_safe = found.power_safe
        self._measure(self._servers[self._at])
        if not found.power_safe:
            reason = "neither fsync_after_insert nor replicas are to be had there: a power cut may lose what was acked"
            log.warning("not_power_safe", {"database": self.path, "reason": reason})

    def append(self, runs: Sequence[Run], values: "array[int]") -> None:
        """Returns when every record of the block is in the database, now or from an earlier time.

        Raises StoreError when that cannot be said; the block may be tried again.
        """
        mine = _Waiting(runs, values)
        with self._lock:
            if self._closed:
                raise StoreError(f"{self.path} is closed")
            self._queue.append(mine)
            self._queued += mine.cost
            if self._queued >= MANY:
                self._gathered.notify()
        while True:
            with self._lock:
                while self._leading and not mine.done:
                    self._turn.wait()
                if mine.done:
                    break
                self._leading = True
                while self._queued < MANY and not self._closed:
                    if (left := self._began_at + INTERVAL - monotonic()) <= 0:
                        break
                    self._gathered.wait(left)
                group = self._next_group()
            self._commit(group)
        if mine.error:
            # A new one for each caller: a traceback grows on whatever is raised.
            raise StoreError(str(mine.error)) from mine.error

    def check(self) -> None:
        """Returns when an insert of nothing has succeeded, at the host in use or one that may take its place.

        Raises StoreError when none has. Leaves the error of the stats as it is while the last insert of records failed,
        and its successor has not succeeded.
        """
        with self._lock:
            if self._closed:
                raise StoreError(f"{self.path} is closed")
            if monotonic() - self._committed_at < TRUST_SECONDS and not self._error:
                return
            at = self._at
        error: StoreError | None = None
        for turn in range(len(self._servers)):
            server = Server(self._target, *self._target.hosts[(at + turn) % len(self._servers)])
            try:
                found = tables.look(server, self._target.database, self._cluster, CHECK_SECONDS)
                if not found or found.identity != self.identity:
                    raise Final(f"{server.name}: the tables are gone, or others: start again")
                server.post(found.insert, b"", CHECK_SECONDS, found.settings)
                error = None
                break
            except (Again, Final) as failed:
                error = error or self._explained(failed)
            finally:
                server.close()
        with self._lock:
            # As long as records are on their way, it is they that show whether it goes on.
            doubt = self._leading or monotonic() - self._failed_at < DOUBT_SECONDS
            if error or not doubt:
                self._error = str(error) if error else None
        if error:
            raise error

    def stats(self) -> StoreStats:
        """What there is now, and the totals since the store was opened. Records known already count as stored."""
        with self._lock:
            return StoreStats(
                self._stored,
                0,
                self._commits,
                self._failed_commits,
                self._error,
                self._size.records,
                self._commit_times.snapshot(),
                self.power_safe,
            )

    def sizes(self) -> Sizes:
        """What the tables took on the servers' disks a while ago; nothing is known of the room that is left there."""
        return Sizes(self._size.bytes, 0, None)

    def close(self) -> None:
        """Has what waits inserted, waits for that, and gives up the connections. Does nothing the second time."""
        with self._lock:
            already, self._closed = self._closed, True
            self._gathered.notify_all()
            while self._leading or self._queue:
                self._turn.wait()
        if not already:
            for server in self._servers:
                server.close()

    def _open(self, retain: float | None) -> tables.Tables:
        """Finds a host that answers, and makes there what is missing. Raises Again or Final."""
        failed: Again | None = None
        for at, server in enumerate(self._servers):
            try:
                found = tables.look(server, self._target.database, self._cluster)
                if not found:
                    tables.make(server, self._target.database, self._cluster)
                    found = tables.look(server, self._target.database, self._cluster)
                    if not found:
                        raise Final(f"{server.name}: the tables were made, and are not there")
                if len(self._servers) > 1 and not found.shared:
                    raise Final("several hosts need --clickhouse_cluster, or replicated tables: each has its own now")
                if retain:
                    tables.expire(server, self._target.database, self._cluster, found, retain)
                self._at = at
                return found
            except Again as error:
                failed = failed or error
        assert failed
        raise failed

    def _next_group(self) -> list[_Waiting]:
        """Takes the oldest of the queue, up to MOST_GROUPED, or one."""
        assert self._lock.locked()
        count, cost = 0, 0
        while count < len(self._queue) and cost < MOST_GROUPED:
            cost += self._queue[count].cost
            count += 1
        group, self._queue = self._queue[:count], self._queue[count:]
        self._queued -= cost
        return group

    def _commit(self, group: list[_Waiting]) -> None:
        """Inserts `group`, says so to each of it and gives up the lead."""
        error = None
        self._began_at = started = monotonic()
        records = sum(len(waiting.values) for waiting in group)
        try:
            # A block that comes later never has an earlier time, whatever becomes of the clock meanwhile.
            arrived_ns = max(time.time_ns(), self._last_ns + 1)
            self._last_ns = arrived_ns + sum(len(waiting.runs) for waiting in group)
            deadline = max(group[0].since + GIVE_UP_SECONDS, started + GIVE_UP_SECONDS * LEAST_OF_IT)
            self._insert(encode(((waiting.runs, waiting.values) for waiting in group), arrived_ns), deadline)
        except BaseException as cause:
            log.debug("insert_failed", exc_info=True)
            error = self._explained(cause)
            error.__cause__ = cause.with_traceback(None)  # whose frames hold the blocks, and those this error
        finally:
            self._note(error)
            seconds = monotonic() - started
            if seconds >= SLOW_INSERT:
                log.warning("slow_commit", {"seconds": round(seconds, 3), "records": records})
            with self._lock:
                if error:
                    self._failed_commits += 1
                    self._failed_at = monotonic()
                else:
                    self._stored += records
                    self._commits += 1
                    self._commit_times.add(seconds)
                    self._committed_at = monotonic()
                self._error = str(error) if error else None
                for waiting in group:
                    waiting.done, waiting.error = True, error
                self._leading = False
                self._turn.notify_all()

    def _insert(self, rows: "array[int]", deadline: float) -> None:
        """Returns when the rows are in the database. Raises Again if they may not be, soon after `deadline`, or Final.

        The identical bytes, by the same token, are tried at the same host, a second time at once, and elsewhere only
        where the same records are to be had too.
        """
        token = str(uuid.uuid4())
        pause, turn = 0.0, 0
        with memoryview(rows).cast("B") as body:
            while True:
                server = self._servers[self._at]
                try:
                    known = self._known = self._known or self._look_again(server)
                    settings = (
                        {**known.settings, "insert_deduplication_token": token} if known.token else known.settings
                    )
                    left = max(1.0, deadline - monotonic())
                    if len(self._servers) > 1:  # a host that hangs is to leave time for the next
                        left = min(left, GIVE_UP_SECONDS / 3)
                    said = server.post(known.insert, body, left, settings)
                    if said:
                        raise Again(f"{server.name}: answered an insert with {said[:100]!r}")
                    if monotonic() - self._sized_at > SIZES_SECONDS or not self._size.records:
                        self._measure(server)
                    return
                except (Again, Final) as error:
                    self._known = None  # it may be another server by now
                    turn += 1
                    if turn > 1:  # all have the same tables, or else they were refused at the start
                        self._at = (self._at + 1) % len(self._servers)
                    final = isinstance(error, Final) and (len(self._servers) == 1 or turn > len(self._servers))
                    if final or deadline - monotonic() <= pause:
                        raise
                    log.debug("insert_again", {"host": server.name, "reason": str(error)})
                    if turn > 1:  # so that it is known now, not when it is given up
                        with self._lock:
                            self._error = str(self._explained(error))
                    sleep(pause)
                    pause = min(BACKOFF_MOST, max(BACKOFF_LEAST, 2 * pause))

    def _look_again(self, server: Server) -> tables.Tables:
        """What a server has and knows, after something failed. Raises Again, or Final, also for another database."""
        found = tables.look(server, self._target.database, self._cluster)
        if not found or found.identity != self.identity:
            raise Final(f"{server.name}: the tables are gone, or others: start again to make them anew")
        return found

    def _measure(self, server: Server) -> None:
        """Asks how much there is; raises nothing, as nothing depends on it."""
        parts = f"cluster({tables.text(self._cluster)}, system, parts)" if self._cluster else "system.parts"
        sql = (
            f"SELECT sum(rows), sum(bytes_on_disk) FROM {parts} "
            f"WHERE active AND database = {tables.text(self._target.database)} AND table = 'record'"
        )
        self._sized_at = monotonic()
        try:
            ((records, size),) = server.rows(sql, CHECK_SECONDS)
            self._size = _Size(int(records), int(size))
        except (Again, Final, ValueError) as error:
            log.debug("not_measured", {"reason": str(error)})

    def _explained(self, cause: BaseException) -> StoreError:
        """One line: the database, the host if there are several, and what is wrong."""
        said = str(cause) or type(cause).__name__
        if len(self._target.hosts) == 1:
            said = said.removeprefix(f"{self._servers[0].name}: " if self._servers else "")
        return StoreError(f"{self.path}: {said}")

    def _note(self, error: StoreError | None) -> None:
        """Says in the log when inserts begin to fail, and when they succeed again: not once for each."""
        if error and not self._failing_since:
            self._failing_since = monotonic()
            log.error("store_failing", {"reason": str(error)})
        elif self._failing_since and not error:
            log.info("store_ok", {"failing_seconds": round(monotonic() - self._failing_since, 1)})
            self._failing_since = 0.0
