"""The store on a ClickHouse server or cluster: the same face as the one on SQLite, over HTTP, with group commit.

Each (source, sequence) counts once, however often it is inserted: the table forgets the others, and the view never
shows them. So what is known already is not looked for, and not counted, and to insert again is harmless, with the
identical bytes above all. What came first stays, by the clocks of the consumers that took it.

Any thread may call any of it; `group_commit` says who inserts. The leader first waits until MANY records have gathered,
or a second has passed since the insert before, as servers choke on many small ones. The servers and what is known of
them belong to the leader, without a lock; `check` asks by connections of its own, and reads no more than which host is
in use.
"""

import functools
import logging
import sys
import time
import uuid
from array import array
from collections.abc import Iterable, Sequence
from struct import Struct
from time import monotonic, sleep

from ringolib.net import tls
from ringolib.storage.clickhouse import schema as tables
from ringolib.storage.clickhouse.http import PermanentError, RetryableError, Server, Target
from ringolib.storage.group_commit import CommitResult, GroupCommit, PendingBlock, Turn
from ringolib.storage.interface import Sizes, StoreError
from ringolib.wire import Run

log = logging.getLogger("ringoexp.clickhouse")

INTERVAL = 1.0
"""Seconds between the beginnings of two inserts, unless there are MANY records."""
MANY = 100_000
GIVE_UP_SECONDS = 20.0
"""How long records wait at most before they are given back to who sent them; a link waits 30 s for its ack."""
LEAST_OF_IT = 0.4
"""The part of that for which an insert is tried in any case, if its records have waited for one before that failed."""
CHECK_SECONDS = 1.5
"""How long a check waits for each answer."""
BACKOFF_LEAST, BACKOFF_MAX_SECONDS = 0.1, 2.0
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


class ClickHouse(GroupCommit):
    """A database on the target's hosts, its tables made if they are missing. Raises StoreError if it cannot be had.

    `cluster` is where they are made, and over whose shards they are spread. `retain` is after how many days the servers
    may delete a record.
    """

    MAX_GROUP_COST = 500_000
    RUN_COST = 16
    SLOW_COMMIT_SECONDS = 5.0

    def __init__(self, target: Target, cluster: str | None = None, retain: float | None = None) -> None:
        super().__init__(target.shown)
        self._target = target
        self._cluster = cluster

        # The leader's.
        self._at = 0  # the host in use
        self._known: tables.Tables | None = None  # of that host; None after a failure
        self._records = self._bytes = 0  # what the tables hold, as far as the servers count it without reading them
        self._sized_at = float("-inf")  # monotonic seconds
        self._last_ns = 0  # when the last run came
        self._servers: list[Server] = []
        try:
            self._servers = [Server(target, *host) for host in target.hosts]
            found = self._open(retain)
        except (RetryableError, PermanentError, tls.CredentialFileError) as error:
            for server in self._servers:
                server.close()
            raise self._explained(error) from None
        self._known = found
        self.identity = found.identity
        self.power_safe = found.power_safe
        self._measure(self._servers[self._at])
        self._held = self._records
        if not found.power_safe:
            reason = "neither fsync_after_insert nor replicas are to be had there: a power cut may lose what was acked"
            log.warning("not_power_safe", {"database": self.path, "reason": reason})

    def check(self) -> None:
        """Returns when an insert of nothing has succeeded, at the host in use or one that may take its place.

        Raises StoreError when none has. Leaves the error of the stats as it is while the last insert of records failed,
        and its successor has not succeeded.
        """
        if self._committed_within(TRUST_SECONDS):
            return
        at = self._at
        error: StoreError | None = None
        for turn in range(len(self._servers)):
            server = Server(self._target, *self._target.hosts[(at + turn) % len(self._servers)])
            try:
                found = tables.look(server, self._target.database, self._cluster, CHECK_SECONDS)
                if not found or found.identity != self.identity:
                    raise PermanentError(f"{server.name}: the tables are gone, or others: start again")
                server.post(found.insert, b"", CHECK_SECONDS, found.settings)
                error = None
                break
            except (RetryableError, PermanentError) as failed:
                error = error or self._explained(failed)
            finally:
                server.close()
        with self._lock:
            # As long as records are on their way, it is they that show whether it goes on.
            doubt = self._turn is Turn.COMMIT or monotonic() - self._failed_at < DOUBT_SECONDS
            if error or not doubt:
                self._error = str(error) if error else None
        if error:
            raise error

    def sizes(self) -> Sizes:
        """What the tables took on the servers' disks a while ago; nothing is known of the room that is left there."""
        return Sizes(self._bytes, 0, None)

    def close(self) -> None:
        """Has what waits inserted, waits for that, and gives up the connections. Does nothing the second time."""
        if self._close():
            for server in self._servers:
                server.close()

    def _open(self, retain: float | None) -> tables.Tables:
        """Finds a host that answers, and makes there what is missing. Raises RetryableError or PermanentError."""
        failed: RetryableError | None = None
        for at, server in enumerate(self._servers):
            try:
                found = tables.look(server, self._target.database, self._cluster)
                if not found:
                    tables.make(server, self._target.database, self._cluster)
                    found = tables.look(server, self._target.database, self._cluster)
                    if not found:
                        raise PermanentError(f"{server.name}: the tables were made, and are not there")
                if len(self._servers) > 1 and not found.shared:
                    raise PermanentError(
                        "several hosts need --clickhouse_cluster, or replicated tables: each has its own now"
                    )
                if retain:
                    tables.expire(server, self._target.database, self._cluster, found, retain)
                self._at = at
                return found
            except RetryableError as error:
                failed = failed or error
        assert failed
        raise failed

    def _gather_seconds(self) -> float:
        assert self._lock.locked()
        return 0.0 if self._queued_cost >= MANY else self._started_at + INTERVAL - monotonic()

    def _write(self, group: list[PendingBlock]) -> CommitResult:
        """Inserts `group`; what is known already counts as stored."""
        started = monotonic()
        # A block that comes later never has an earlier time, whatever becomes of the clock meanwhile.
        arrived_ns = max(time.time_ns(), self._last_ns + 1)
        self._last_ns = arrived_ns + sum(len(waiting.runs) for waiting in group)
        deadline = max(group[0].arrived_at + GIVE_UP_SECONDS, started + GIVE_UP_SECONDS * LEAST_OF_IT)
        self._insert(encode(((waiting.runs, waiting.values) for waiting in group), arrived_ns), deadline)
        return CommitResult(sum(len(waiting.values) for waiting in group), 0, self._records)

    def _insert(self, rows: "array[int]", deadline: float) -> None:
        """Returns when the rows are in the database. Raises RetryableError if they may not be, soon after `deadline`, or PermanentError.

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
                        raise RetryableError(f"{server.name}: answered an insert with {said[:100]!r}")
                    if monotonic() - self._sized_at > SIZES_SECONDS or not self._records:
                        self._measure(server)
                    return
                except (RetryableError, PermanentError) as error:
                    self._known = None  # it may be another server by now
                    turn += 1
                    if turn > 1:  # all have the same tables, or else they were refused at the start
                        self._at = (self._at + 1) % len(self._servers)
                    final = isinstance(error, PermanentError) and (len(self._servers) == 1 or turn > len(self._servers))
                    if final or deadline - monotonic() <= pause:
                        raise
                    log.debug("insert_again", {"host": server.name, "reason": str(error)})
                    if turn > 1:  # so that it is known now, not when it is given up
                        with self._lock:
                            self._error = str(self._explained(error))
                    sleep(pause)
                    pause = min(BACKOFF_MAX_SECONDS, max(BACKOFF_LEAST, 2 * pause))

    def _look_again(self, server: Server) -> tables.Tables:
        """What a server has and knows, after something failed. Raises RetryableError, or PermanentError, also for another database."""
        found = tables.look(server, self._target.database, self._cluster)
        if not found or found.identity != self.identity:
            raise PermanentError(f"{server.name}: the tables are gone, or others: start again to make them anew")
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
            self._records, self._bytes = int(records), int(size)
        except (RetryableError, PermanentError, ValueError) as error:
            log.debug("not_measured", {"reason": str(error)})

    def _describe_failure(self, cause: BaseException) -> StoreError:
        return self._explained(cause)

    def _explained(self, cause: BaseException) -> StoreError:
        """One line: the database, the host if there are several, and what is wrong."""
        said = str(cause) or type(cause).__name__
        if len(self._target.hosts) == 1:
            said = said.removeprefix(f"{self._servers[0].name}: " if self._servers else "")
        return StoreError(f"{self.path}: {said}")
