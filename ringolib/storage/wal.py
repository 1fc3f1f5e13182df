"""The write-ahead log: it is emptied when it is large, and checked before each commit.

No thread runs here, and there are no locks: see `Wal`.
"""

import logging
import os
import sqlite3
from time import monotonic

from ringolib.storage import sqlite_file
from ringolib.storage.database_file import DatabaseFile, moved_away
from ringolib.storage.interface import StoreError
from ringolib.storage.remedies import system_error

log = logging.getLogger("ringoexp.store")

LARGE_WAL_BYTES = 64 * 1024 * 1024
"""A WAL of this size is emptied. A file without records is shrunk if it has as much free space."""
INODE_CHECK_SECONDS = 1.0
"""How often a commit checks that the WAL is still the same file: reading its inode makes the next write slower."""
READER_WAIT_MS = 100
"""How long a commit waits for readers that keep a large WAL from being emptied: once for every LARGE_WAL_BYTES."""
HEADER_BYTES = 32
"""The header has random numbers, which change when the WAL starts over.

https://www.sqlite.org/fileformat.html#the_wal_file
"""


class WalCut(StoreError):
    """The WAL was truncated. It must not be changed: the next start reads the commits that are still complete."""

    def __init__(self, path: str) -> None:
        super().__init__(
            f"{path}: its -wal file was truncated while it was in use, so acked records may be lost: "
            "stop this server and start it again, which checks the file"
        )


class Wal:
    """The write-ahead log of a database: empties it when it is large, and logs if a reader prevents that.

    SQLite itself restarts the WAL only if a commit finds no reader, which may never happen:
    https://www.sqlite.org/wal.html#avoiding_excessively_large_wal_files. Any thread may call `size`; everything else
    belongs to the thread that holds the turn.
    """

    def __init__(self, db: sqlite3.Connection, file: DatabaseFile) -> None:
        self.path = f"{file.real_path}-wal"
        self.limit = LARGE_WAL_BYTES  # the size at which the WAL is emptied the next time
        self._file = file
        self._db = db
        try:
            self._wal_file = open(self.path, "rb", buffering=0)
        except OSError as error:
            raise system_error(f"cannot read {file.path}-wal", error) from error
        self._seen_size = self.size()  # before the last commit
        self._min_size = self._seen_size  # after it; then the WAL may not be shorter
        self._header = self._read_header()  # after it
        self._inode_checked_at = monotonic()
        self._held_by_reader = False  # this is logged

    def size(self) -> int:
        """Return the size of the WAL file: commits that are not yet in the database file, and reusable space.

        Not from `stat`: on Linux 6.13 and newer, the first write after a `stat` stores an exact time of change, and a
        commit takes a third longer (https://docs.kernel.org/filesystems/multigrain-ts.html).
        """
        try:
            return self._wal_file.seek(0, os.SEEK_END)
        except ValueError:  # it is closed
            return 0

    def close(self) -> None:
        """Close the descriptor. SQLite locks other files, so this takes no lock from it."""
        self._wal_file.close()

    def check_in_place(self) -> None:
        """Raise StoreError if the WAL was removed, replaced or truncated since the last commit.

        No transaction may be open.
        """
        if not self._is_in_place():
            raise moved_away(self._file.path)
        self._seen_size = self.size()
        if self._seen_size < self._min_size and not self._is_complete():
            raise WalCut(self._file.path)
        self._min_size = self._seen_size

    def _is_in_place(self) -> bool:
        """True if there is a file with the WAL's name. Now and then, also look whether it is the same file."""
        now = monotonic()
        if now - self._inode_checked_at < INODE_CHECK_SECONDS:
            return os.access(self.path, os.F_OK)
        self._inode_checked_at = now
        try:
            in_place = os.path.samestat(os.stat(self.path), os.fstat(self._wal_file.fileno()))
        except OSError:
            in_place = False
        if not in_place:
            self._inode_checked_at = float("-inf")  # until it is put back
        return in_place

    def on_commit(self) -> None:
        """Note the size and the header after a commit."""
        self._min_size = self.size()
        self._header = self._read_header()

    def _read_header(self) -> bytes:
        """Return the header; it is empty as long as the file is empty, or if the disk fails."""
        try:
            return os.pread(self._wal_file.fileno(), HEADER_BYTES, 0)
        except OSError:
            return b""

    def _is_complete(self) -> bool:
        """True if a WAL that has become shorter has all that SQLite needs of it.

        Any program that has the database open may copy all of the WAL into the database file and then empty it. If it
        then writes, the WAL gets a new header. A checkpoint of a WAL that was cut would copy a part of a commit and so
        damage the database; from an empty WAL, it can copy nothing.
        """
        if header := self._read_header():
            return len(header) == HEADER_BYTES and header != self._header
        try:
            (busy, pages, copied) = self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        except sqlite3.Error as error:  # it could not read a page
            log.debug("wal_incomplete", {"reason": str(error)})
            return False
        return bool(busy) or pages == copied  # busy: another program copies it, so it was empty for a moment only

    def empty_if_large(self) -> None:
        """Empty a large WAL. If a reader still needs it, let it grow by LARGE_WAL_BYTES before the next attempt."""
        size = self._seen_size
        if self._held_by_reader and size <= LARGE_WAL_BYTES:
            self.limit, self._held_by_reader = LARGE_WAL_BYTES, False
            log.info("wal_cut", {"bytes": size})
        if size < self.limit:
            return
        needed = self.empty()
        self._min_size = self.size()
        self.limit = self._min_size + LARGE_WAL_BYTES
        if needed and not self._held_by_reader and size > LARGE_WAL_BYTES:
            self._held_by_reader = True
            reason = "a reader holds a transaction open: the WAL grows until it ends"
            log.warning("wal_large", {"bytes": size, "reason": reason})

    def empty(self) -> bool:
        """Copy the WAL into the database file and truncate it. True if a reader still needs it after READER_WAIT_MS.

        https://www.sqlite.org/pragma.html#pragma_wal_checkpoint
        """
        self._db.execute(f"PRAGMA busy_timeout = {READER_WAIT_MS}")
        try:
            (busy, _, _) = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            return bool(busy)
        except sqlite3.Error as error:  # no record is lost: the WAL still has them, and the commit reports the cause
            log.debug("wal_not_cut", {"reason": str(error)})
            return False
        finally:
            self._db.execute(f"PRAGMA busy_timeout = {sqlite_file.BUSY_TIMEOUT_MS}")
