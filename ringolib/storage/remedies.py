"""Errors of the disk and of SQLite in one line for people: the true cause, and the remedy.

SQLite reports a full disk, a quota or a lack of descriptors in several ways, and some of them name another cause. So
after an error that is unclear, a small file is written in its directory, and the system's own error tells the cause.
Functions only; no thread runs here.
"""

import errno
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from ringolib.storage.interface import StoreError

_PROBE_BYTES = 64 * 1024
"""The size of the file that is written after an error: more than SQLite needs to open a database."""
_UNCLEAR = (
    "disk I/O error",
    "unable to open database file",
    "database or disk is full",
    "database disk image is malformed",
)
"""SQLite's messages that may have several causes."""
_REMEDIES = {
    errno.ENOENT: "check that its directory exists",
    errno.EACCES: "check the permissions of the file and its directory",
    errno.EPERM: "check the permissions of the file and its directory",
    errno.EROFS: "the file system is mounted read-only: check the kernel's log, or use another directory",
    errno.EDQUOT: "the disk quota of its owner is used up: raise the quota, or make room",
    errno.EMFILE: "this process may open no more files: raise the limit (ulimit -n)",
    errno.ENFILE: "the system has no file descriptors left: end other programs, or raise fs.file-max",
    errno.EFBIG: "a file may not be that large: raise the limit of its size (ulimit -f, LimitFSIZE of systemd), or "
    "move it to a file system that takes larger files",
    errno.EIO: "the disk or its file system fails; this does not show that the database is corrupt: check the disk and "
    "the kernel's log before you restore a backup",
}


class NoRoom(StoreError):
    """The disk, its inodes or a quota are used up. The same call may succeed once there is room."""


class OpenFile(Protocol):
    """What an explanation needs to know of a database file; see `database_file.DatabaseFile`."""

    path: str
    real_path: str

    def read_error(self) -> OSError | None: ...


def system_error(what: str, error: OSError) -> StoreError:
    """Return the error for a system call that failed, with its remedy. `what` begins the line."""
    remedy = _REMEDIES.get(error.errno or 0)
    if error.errno == errno.ENOSPC:
        remedy = "the disk is full, or has no free inodes (df, df -i): make room"
    text = f"{what}: {error.strerror}" + (f" ({remedy})" if remedy else "")
    return NoRoom(text) if error.errno in (errno.ENOSPC, errno.EDQUOT) else StoreError(text)


@contextmanager
def store_errors(file: OpenFile) -> Iterator[None]:
    """Convert SQLite's errors to StoreError."""
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise explain(file, error) from error


def explain(file: OpenFile, cause: BaseException) -> StoreError:
    """Return an error with one line for people: SQLite's message, the system's if it says more, and the remedy."""
    if isinstance(cause, StoreError):
        return cause
    message = str(cause)
    # SQLite quotes the damaged part of a schema, which may be no text; in Python 3.10 the message is empty then.
    if isinstance(cause, UnicodeDecodeError) or not message or message.startswith("malformed database schema"):
        message = "database disk image is malformed"
    if message in _UNCLEAR and (error := _write_error(file.real_path) or file.read_error()):
        return system_error(f"{file.path}: {message}", error)
    remedy = {
        "file is not a database": "its header is damaged: restore it from a backup",
        "database disk image is malformed": "it is corrupt: restore it from a backup",
        "database or disk is full": "make room; the waiting records are stored then",
        "disk I/O error": _REMEDIES[errno.EIO],
        "unable to open database file": "check that its directory exists and is writable",
        "attempt to write a readonly database": "check the permissions of the file and its directory",
        "database is locked": "another program holds a write lock: end its transaction",
    }.get(message)
    text = f"{file.path}: {message}" + (f" ({remedy})" if remedy else "")
    return NoRoom(text) if message == "database or disk is full" else StoreError(text)


def _write_error(path: str) -> OSError | None:
    """Return the error of writing a small file without a name beside `path`; None if that succeeds.

    Then the file gets a hole of the size of the database or its -wal, so that a limit of the size shows.
    """
    try:
        with tempfile.TemporaryFile(dir=os.path.dirname(path)) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            sizes = [os.stat(name).st_size for name in (path, f"{path}-wal") if os.path.exists(name)]
            file.truncate(max(sizes, default=0) + _PROBE_BYTES)
    except OSError as error:
        return error
    return None
