"""The store on a ClickHouse server or cluster, over HTTP, with group commit.

Each (source, sequence) counts once, however often it is inserted: the table drops duplicates when it merges, and the
view `records` never shows them. So the store does not look for duplicates and does not count them, and a repeated
insert is harmless. The first value is kept, by the clocks of the consumers that received the records.

Any thread may call any method. `group_commit` decides which thread inserts: the leader. It first waits until
FULL_INSERT_RECORDS are queued or INSERT_INTERVAL_SECONDS have passed since the previous insert began, because many
small inserts overload ClickHouse. The servers and their state belong to the leader, without a lock. `check` and `read`
open their own connections, and read only the index of the current host and since when an insert runs.
"""

import functools
import logging
import math
import sys
import time
import uuid
from array import array
from collections.abc import Iterable, Sequence
from struct import Struct
from time import monotonic, sleep

from ringolib.net import tls
from ringolib.storage.clickhouse import schema
from ringolib.storage.clickhouse.http import ClickHouseError, PermanentError, RetryableError, Server
from ringolib.storage.clickhouse.reading import Reading
from ringolib.storage.clickhouse.url import Target
from ringolib.storage.group_commit import CommitResult, GroupCommit, PendingBlock, Turn
from ringolib.storage.interface import Page, Query, Sizes, StoreError
from ringolib.timing import deadline_after
from ringolib.wire import Run

log = logging.getLogger("ringoexp.clickhouse")

INSERT_INTERVAL_SECONDS = 1.0
"""Between the beginnings of two inserts, unless FULL_INSERT_RECORDS are queued."""
FULL_INSERT_RECORDS = 100_000
INSERT_TIMEOUT_SECONDS = 20.0
"""How long a record waits at most until its insert fails. It is less than the 30 s that a link waits for an ack."""
MIN_TIMEOUT_SHARE = 0.4
"""The share of INSERT_TIMEOUT_SECONDS that an insert always has, even if its records have waited for a failed one."""
CHECK_TIMEOUT_SECONDS = 1.5
"""For each answer that a check waits for."""
BACKOFF_FIRST_SECONDS, BACKOFF_MAX_SECONDS = 0.1, 2.0
SUCCESS_VALID_SECONDS = 3.0
"""How long a successful insert counts as a successful check."""
FAILURE_VALID_SECONDS = 15.0
"""How long the error of a failed insert stays in the stats, although checks succeed."""
SIZES_CACHE_SECONDS = 10.0
"""The maximum age of the table sizes in the stats while records arrive."""

ROW_WORDS = 5
"""The 8-byte words of a row: two of the source, then sequence, value and version."""
_SOURCE = Struct(">qq")
_BIG_ENDIAN = sys.byteorder == "big"
_LOW_16_BITS = 2 * 4 + (3 if _BIG_ENDIAN else 0)
"""Position in a row of the sequence's lowest 16 bits, in units of 16 bits."""
_SHORT_RUN = 4
"""Runs of up to this many records are written one by one, which is faster for them."""


@functools.cache
def _all_shorts() -> "array[int]":
    """Return all unsigned 16-bit numbers, in order."""
    return array("H", range(1 << 16))


def encode(blocks: Iterable[tuple[Sequence[Run], "array[int]"]], arrived_ns: int) -> "array[int]":
    """Return the rows of blocks as RowBinary.

    The first run arrived at `arrived_ns`, a Unix time in nanoseconds; each following run counts as 1 ns later. A row is
    (UUID, UInt64, Int64, UInt64), little-endian, and ClickHouse's UUID is two 64-bit numbers, the first half first.
    """
    rows = array("q")
    version = schema.MAX_VERSION - arrived_ns
    for runs, values in blocks:
        position = 0
        for run in runs:
            if run.count <= _SHORT_RUN:
                high, low = _SOURCE.unpack(run.source)
                for sequence in range(run.first, run.first + run.count):
                    rows.extend((high, low, sequence, values[position], version))
                    position += 1
            else:
                _append_run(rows, run, values, position, version)
                position += run.count
            version -= 1
    if _BIG_ENDIAN:
        rows.byteswap()
    return rows


def _append_run(rows: "array[int]", run: Run, values: "array[int]", position: int, version: int) -> None:
    """Append the rows of a run, whose values start at `position`.

    It writes by strides, not record by record: within a piece only the lowest 16 bits of the sequence differ.
    """
    high, low = _SOURCE.unpack(run.source)
    first, end = run.first, run.first + run.count
    while first < end:
        base = first & ~0xFFFF
        count = min(end, base + 0x10000) - first
        piece = array("q", (high, low, base, 0, version)) * count
        piece[3::ROW_WORDS] = values[position : position + count]
        with memoryview(piece).cast("B").cast("H") as shorts, memoryview(_all_shorts()) as numbers:
            shorts[_LOW_16_BITS :: 4 * ROW_WORDS] = numbers[first - base : first - base + count]
        rows += piece
        first, position = first + count, position + count


class ClickHouse(GroupCommit):
    """A database on the hosts of `target`. Its tables are created if they are missing.

    They are created on the servers of `cluster`, and spread over its shards. `retain_days` is the age from which the
    servers may delete a record. Raises StoreError if the database is not available.
    """

    MAX_GROUP_COST = 500_000
    RUN_COST = 16
    SLOW_COMMIT_SECONDS = 5.0

    def __init__(self, target: Target, cluster: str | None = None, retain_days: float | None = None) -> None:
        super().__init__(target.display_url)
        self._target = target
        self._cluster = cluster
        self._reading = Reading(target, schema.insert_table(cluster))

        # The leader's.
        self._current = 0  # the index of the current host; `check` and `read` read it
        self._tables: schema.Tables | None = None  # of the current host; None after a failure
        self._records = self._bytes = 0  # the size of the tables, duplicates included
        self._sized_at = float("-inf")  # monotonic seconds
        self._last_ns = 0  # the arrival time of the last run
        self._inserting_since = math.inf  # monotonic seconds; `check` reads it
        self._servers: list[Server] = []
        try:
            self._servers = [Server(target, *host) for host in target.hosts]
            tables = self._open(retain_days)
        except (ClickHouseError, tls.CredentialFileError) as error:
            for server in self._servers:
                server.close()
            raise self._store_error(error) from None
        self._tables = tables
        self.identity = tables.identity
        self.power_safe = tables.power_safe
        self._measure(self._servers[self._current])
        self._held = self._records
        if not tables.power_safe:
            reason = (
                "the server supports no fsync_after_insert and has no replicas: "
                "a power failure may lose acknowledged records"
            )
            log.warning("not_power_safe", {"database": self.path, "reason": reason})

    def check(self) -> None:
        """Return if an empty insert succeeds at the current host, or at a host that may replace it.

        Raises StoreError if all of them fail, or if an insert of records has taken SLOW_COMMIT_SECONDS so far. While
        the last insert of records failed and no later one succeeded, its error stays in the stats.
        """
        if self._committed_within(SUCCESS_VALID_SECONDS):
            return
        inserting_for = monotonic() - self._inserting_since  # one read: no lock needed
        if inserting_for >= self.SLOW_COMMIT_SECONDS:
            raise StoreError(f"{self.path}: an insert has had no complete answer for {inserting_for:.0f} s")
        error = self._check_hosts()
        with self._lock:
            # While records are being inserted, only they show whether inserts succeed.
            doubtful = self._turn is Turn.COMMIT or monotonic() - self._failed_at < FAILURE_VALID_SECONDS
            if error or not doubtful:
                self._error = str(error) if error else None
        if error:
            raise error

    def read(self, query: Query) -> Page:
        """Return a page of records, over a connection of its own: see `storage.clickhouse.reading`."""
        if self._closed:  # one read: no lock needed
            raise StoreError(f"{self.path} is closed")
        try:
            return self._reading.read(query, self._current)
        except (StoreError, ClickHouseError) as error:
            raise self._store_error(error) from None

    def sizes(self) -> Sizes:
        """Return the size of the tables on the servers' disks, a while ago. The free space there is unknown."""
        return Sizes(self._bytes, 0, None)

    def close(self) -> bool:
        """Insert the queued records, then close the connections. Does nothing the second time. Return True."""
        if self._close():
            for server in self._servers:
                server.close()
        return True

    def _open(self, retain_days: float | None) -> schema.Tables:
        """Find a host that answers, and create the missing tables. Raises RetryableError or PermanentError."""
        first_error: RetryableError | None = None
        for index, server in enumerate(self._servers):
            try:
                tables = self._open_host(server)
                if retain_days:
                    schema.set_retention(server, self._target.database, self._cluster, tables, retain_days)
                self._current = index
                return tables
            except RetryableError as error:
                first_error = first_error or error
        assert first_error
        raise first_error

    def _open_host(self, server: Server) -> schema.Tables:
        """Return the tables of a host, and create the missing ones. Raises RetryableError or PermanentError."""
        database = self._target.database
        tables = schema.inspect_tables(server, database, self._cluster)
        if not tables:
            schema.create_tables(server, database, self._cluster)
            tables = schema.inspect_tables(server, database, self._cluster)
        if not tables:
            raise PermanentError(f"{server.name}: the tables were created, but do not exist: check the server's log")
        if len(self._servers) > 1 and not tables.is_shared:
            raise PermanentError(
                "several hosts require --clickhouse_cluster or replicated tables: these have separate tables"
            )
        return tables

    def _check_hosts(self) -> StoreError | None:
        """Try an empty insert at each host, from the current one on. Return the first error if all of them fail."""
        first_error: StoreError | None = None
        current = self._current
        for turn in range(len(self._servers)):
            server = Server(self._target, *self._target.hosts[(current + turn) % len(self._servers)])
            try:
                tables = self._inspect_same(server, CHECK_TIMEOUT_SECONDS)
                server.post(tables.insert, b"", CHECK_TIMEOUT_SECONDS, tables.settings)
                return None
            except ClickHouseError as error:
                first_error = first_error or self._store_error(error)
            finally:
                server.close()
        return first_error

    def _gather_seconds(self) -> float:
        assert self._lock.locked()
        return (
            0.0
            if self._queued_cost >= FULL_INSERT_RECORDS
            else self._started_at + INSERT_INTERVAL_SECONDS - monotonic()
        )

    def _write(self, group: list[PendingBlock]) -> CommitResult:
        """Insert `group`. Duplicates count as stored."""
        started = monotonic()
        # A later block never gets an earlier time, even if the clock goes back.
        arrived_ns = max(time.time_ns(), self._last_ns + 1)
        self._last_ns = arrived_ns + sum(len(block.runs) for block in group)
        deadline = max(
            group[0].arrived_at + INSERT_TIMEOUT_SECONDS, started + INSERT_TIMEOUT_SECONDS * MIN_TIMEOUT_SHARE
        )
        self._inserting_since = started
        try:
            self._insert(encode(((block.runs, block.values) for block in group), arrived_ns), deadline)
        finally:
            self._inserting_since = math.inf
        return CommitResult(sum(len(block.values) for block in group), 0, self._records)

    def _insert(self, rows: "array[int]", deadline: float) -> None:
        """Insert the rows, with retries until shortly after `deadline`.

        All attempts send identical bytes and the same token. The second attempt follows at once at the same host;
        later ones go to the next host, which has the same tables. Raises PermanentError, or RetryableError if the rows
        may or may not be stored.
        """
        token = str(uuid.uuid4())
        pause, failures = 0.0, 0
        with memoryview(rows).cast("B") as body:
            while True:
                server = self._servers[self._current]
                try:
                    self._insert_once(server, body, token, deadline)
                    return
                except ClickHouseError as error:
                    self._tables = None  # another server may answer at this address by now
                    failures += 1
                    if failures > 1:
                        self._current = (self._current + 1) % len(self._servers)
                    hosts = len(self._servers)
                    permanent = isinstance(error, PermanentError) and (hosts == 1 or failures > hosts)
                    if permanent or deadline - monotonic() <= pause:
                        raise
                    log.debug("insert_again", {"host": server.name, "reason": str(error)})
                    if failures > 1:  # the stats report the error while the retries go on
                        with self._lock:
                            self._error = str(self._store_error(error))
                sleep(pause)
                pause = min(BACKOFF_MAX_SECONDS, max(BACKOFF_FIRST_SECONDS, 2 * pause))

    def _insert_once(self, server: Server, body: memoryview, token: str, deadline: float) -> None:
        """Insert the rows at one host. Raises RetryableError or PermanentError."""
        timeout = max(1.0, deadline - monotonic())
        if len(self._servers) > 1:  # a host that hangs must leave time for the next one
            timeout = min(timeout, INSERT_TIMEOUT_SECONDS / 3)
        server.deadline = deadline_after(timeout)  # for the inspection and the insert together
        tables = self._tables = self._tables or self._inspect_same(server)
        settings = tables.settings
        if tables.accepts_token:
            settings = {**settings, "insert_deduplication_token": token}
        response = server.post(tables.insert, body, timeout, settings)
        if response:
            raise RetryableError(f"{server.name}: unexpected answer to an insert: {response[:100]!r}")
        if monotonic() - self._sized_at > SIZES_CACHE_SECONDS or not self._records:
            self._measure(server)

    def _inspect_same(self, server: Server, timeout: float | None = None) -> schema.Tables:
        """Return the tables of a host. Raises PermanentError if this store opened other tables, or RetryableError."""
        tables = schema.inspect_tables(server, self._target.database, self._cluster, timeout)
        if not tables or tables.identity != self.identity:
            raise PermanentError(
                f"{server.name}: the tables were deleted or replaced: restart to create them or to use the new ones"
            )
        return tables

    def _measure(self, server: Server) -> None:
        """Read the size of the tables. Raises nothing: an insert must not fail for it."""
        parts = f"cluster({schema.quote_text(self._cluster)}, system, parts)" if self._cluster else "system.parts"
        sql = (
            f"SELECT sum(rows), sum(bytes_on_disk) FROM {parts} "
            f"WHERE active AND database = {schema.quote_text(self._target.database)} AND table = 'record'"
        )
        self._sized_at = monotonic()
        try:
            ((records, size),) = server.query(sql, CHECK_TIMEOUT_SECONDS)
            self._records, self._bytes = int(records), int(size)
        except (ClickHouseError, ValueError) as error:
            log.debug("not_measured", {"reason": str(error)})

    def _describe_failure(self, cause: BaseException) -> StoreError:
        return self._store_error(cause)

    def _store_error(self, cause: BaseException) -> StoreError:
        """Return the error as one line: the database, the host if there are several, and the cause."""
        text = str(cause) or type(cause).__name__
        if len(self._target.hosts) == 1 and self._servers:
            text = text.removeprefix(f"{self._servers[0].name}: ")
        return StoreError(f"{self.path}: {text}")
