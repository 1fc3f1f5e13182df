"""What a store has to be, whatever it stores in: the face that the other rooms know.

`store.Store` is the one on SQLite, `clickhouse.ClickHouse` the one on a cluster. No thread runs here,
and nothing is guarded.
"""

from array import array
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from ringolib.counters import HistogramSnapshot
from ringolib.wire import Run


class StoreStats(NamedTuple):
    """A snapshot. Totals are since the store was opened, and of records where they do not say otherwise."""

    stored: int
    duplicates: int
    commits: int
    failed_commits: int
    error: str | None  # why the last commit failed, None if it did not
    held: int  # records in the file now
    commit_times: HistogramSnapshot  # of those that succeeded
    power_safe: bool = True  # what is committed outlasts a power cut


class Sizes(NamedTuple):
    """Bytes of the database file, of its WAL, and of free room on its disk, None if that cannot be told."""

    database: int
    wal: int
    disk_free: int | None


class Storage(Protocol):
    """Keeps each (source, sequence) at most once. Any thread may call any of it at any time, also once it is closed.

    What fails raises `database.StoreError`, with a text that says what happened and what to do; nothing else is raised.
    """

    @property
    def path(self) -> str:
        """Its name, for people: it begins what errors say."""

    @property
    def identity(self) -> str:
        """A UUID of the database's own: two servers that have the same one store in the same database."""

    def append(self, runs: Sequence[Run], values: "array[int]") -> None:
        """Returns when every record of the block is on disk, its own or another machine's, now or from an earlier time,
        and stays there.

        `values` are those of all runs, in order; they are left as they were. Of what is stored already the first value
        stays. Waits as long as it takes, but not for who only reads. Raises StoreError when that cannot be said,
        for all of the block: it may be tried again, and the next one may succeed.
        """

    def check(self) -> None:
        """Returns when a record sent now would be stored now, and has cost little. Raises StoreError when not."""

    def stats(self) -> StoreStats:
        """What there is now, and the totals since it was opened: one moment's, without waiting for a commit.

        `error` is why the last commit, or check, failed; None once one succeeded. `held` is the records in it now.
        """

    def sizes(self) -> Sizes:
        """The bytes it takes, on whatever disk, and what is left there: None if that cannot be told."""

    def close(self) -> None:
        """Waits for the commit that runs, then gives back what it holds. Does nothing the second time."""


class StoreError(Exception):
    """The database cannot be opened, or a commit failed. The text says what happened and what to do."""
