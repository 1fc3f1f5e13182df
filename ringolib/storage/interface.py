"""The interface of a store: the only thing that other packages need to know about one.

`store.Store` implements it with SQLite, `storage.clickhouse.store.ClickHouse` with a ClickHouse server or cluster.
This module starts no thread and holds no lock.
"""

from array import array
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from ringolib.counters import HistogramSnapshot
from ringolib.wire import Run


class StoreStats(NamedTuple):
    """A snapshot. Totals count from the opening of the store, in records unless the name says otherwise."""

    stored: int
    duplicates: int
    commits: int
    failed_commits: int
    error: str | None  # the reason why the last commit or check failed; None if it succeeded
    held: int  # records in the database now
    commit_times: HistogramSnapshot  # of successful commits
    power_safe: bool = True  # committed records survive a power cut


class Sizes(NamedTuple):
    """Sizes in bytes. `disk_free` is None if the free space on the database's disk is unknown."""

    database: int
    wal: int
    disk_free: int | None


PAGE_RECORDS = 2048
"""Records of a page, at most."""
FORMS = ("ndjson", "csv", "text")
"""The forms of a line: a JSON object; id, source, sequence, value and time with commas between them; the value."""


class Query(NamedTuple):
    """Which records to read: in the order of their arrival, or with `descending` the newest first."""

    form: str  # of the lines, one of FORMS
    limit: int  # at least 1
    after: str | None = None  # the id of a record; only records that follow it, in the order of the query
    source: bytes | None = None  # only records of this source
    since_ms: int | None = None  # only from the first record that arrived then or later, Unix time
    descending: bool = False


class Page(NamedTuple):
    """Some of the records of a query."""

    lines: bytes  # one for each record, each with its line feed
    count: int  # type: ignore[assignment]  # hides tuple.count
    last: str  # with this `after`, the query continues where the page ends
    more: bool  # false if no more records are stored now


class Storage(Protocol):
    """A store keeps each (source, sequence) at most once.

    Any thread may call any method at any time, even after `close`. Methods raise StoreError and nothing else.
    """

    @property
    def path(self) -> str:
        """The name of the store for people, for error messages."""

    @property
    def identity(self) -> str:
        """A UUID that is stored in the database. Two servers with the same identity write to the same database."""

    def append(self, runs: Sequence[Run], values: "array[int]") -> None:
        """Return when every record of the block is durable: on disk, or on the disks of several machines.

        `values` holds the values of all runs, in order; it is not changed. If a record is already stored, its first
        value stays. The call has no time limit; readers of the database hardly delay it. Raises StoreError if any
        record may not be durable. Then the caller may retry the whole block, and a later call may succeed.
        """

    def read(self, query: Query) -> Page:
        """Return the first records that the query finds: at most PAGE_RECORDS, and possibly fewer, or none.

        Raises ValueError if `after` is no id that this store has given to a record, or StoreError.
        """

    def check(self) -> None:
        """Return if a record would be stored now. The check is cheap. Raises StoreError if it would not."""

    def stats(self) -> StoreStats:
        """Return a consistent snapshot, without waiting for a running commit."""

    def sizes(self) -> Sizes:
        """Return the sizes of the database and the free space on its disk."""

    def close(self) -> bool:
        """Wait for the running commit, then release all resources. A second call does nothing.

        Return False if another program has damaged the database meanwhile, so that acked records may be lost.
        """


class StoreError(Exception):
    """The database cannot be opened, or a commit failed. The text names the cause and the remedy."""
