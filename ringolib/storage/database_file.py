"""The database file: one server for each, by whatever name, on a file system where SQLite's locks hold.

`DatabaseFile` opens and locks the file before SQLite opens it, and unlocks it after SQLite has closed it. In between
its descriptor stays open: if a process closes any descriptor of a file, it loses all of SQLite's locks on that file
(https://www.sqlite.org/howtocorrupt.html#_posix_advisory_locks_canceled_by_a_separate_thread_doing_close_).

There are two locks. The first is on `PATH-lock`, as in older versions of this program. The second is on the file
itself, and so on all its names: an open file description lock (fcntl(2)) on a byte that SQLite never uses. Other
systems than Linux have only the first. The thread that holds the store's turn calls `check_in_place`; no thread runs
here, and there are no locks within the process.
"""

import errno
import fcntl
import logging
import os
import pwd
import re
import shlex
import stat
import struct
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from time import monotonic
from typing import IO

from ringolib.storage.interface import StoreError
from ringolib.storage.remedies import system_error
from ringolib.timing import deadline_after, remaining

log = logging.getLogger("ringoexp.store")

_PENDING_BYTE = 0x40000000
"""SQLite locks bytes from here on: https://www.sqlite.org/fileformat.html#the_lock_byte_page"""
_SHARED_BYTES = _PENDING_BYTE + 2, 510
"""The start and length of the bytes that each open connection has locked in WAL mode."""
_OUR_BYTE = _PENDING_BYTE + 512, 1
"""The byte that this program locks. It is in SQLite's lock-byte page, which has no data."""
_ROOM = bytes(256 * 1024)
"""What `check_room` writes: the -shm file of a WAL of 64 MiB has 128 KiB."""
_ROOM_SECONDS = 0.1
"""How often a commit checks that there is room. The check takes about a millisecond, and the kernel writes the pages of
a mapping to the disk, which is when they need new room, only every few seconds.
"""
READ_SECONDS = 1.0
"""How long a damaged database is read to find out whether the disk fails instead."""
_NOT_SHARED = re.compile(r"nfs4?|cifs|smb.*|9p|virtiofs|fakeowner|fuse.*|ceph|afs|lustre|vboxsf|prl_fs")
"""File systems that may keep locks, or memory that processes share, from other machines or from their lower layer.

Docker Desktop calls directories of the host "fakeowner".
"""
_NOCOW = 0x00800000  # FS_NOCOW_FL of linux/fs.h: changes are written in place
_GET_FLAGS, _SET_FLAGS = (  # FS_IOC_GETFLAGS and FS_IOC_SETFLAGS
    direction << 30 | struct.calcsize("l") << 16 | ord("f") << 8 | number for direction, number in ((2, 1), (1, 2))
)

_open_here: set[tuple[int, int]] = set()
"""The databases that stores of this process have open. Each change is one step, so it needs no lock."""
_OFD_SETLK: int | None = getattr(fcntl, "F_OFD_SETLK", None) if sys.platform == "linux" else None


class InUse(StoreError):
    """Another server has the file open."""

    def __init__(self, path: str, other: str | None = None) -> None:
        name = f" as {other}" if other else ""
        super().__init__(f"{path} is in use by another ringoexp{name}: stop that one, or use another file")


class DatabaseFile:
    """A database file that this process has locked; it is created if it does not exist. Raises StoreError."""

    def __init__(self, path: str) -> None:
        self.path = path  # for people
        self.real_path = os.path.realpath(path)  # without symbolic links
        self.stopped_in_order = not os.path.exists(f"{self.real_path}-wal")  # SQLite removes it when it closes the file
        with ExitStack() as undo:
            _check_kind_of_file(path)
            self._lock_file = _open_lock_file(path, self.real_path, undo)
            self.fd, has_own_lock = _open_and_lock(path, self.real_path, undo)
            self._inodes = {self.real_path: _inode(os.fstat(self.fd))}
            if not has_own_lock:
                self._inodes[self._lock_file.name] = _inode(os.fstat(self._lock_file.fileno()))
            mount_point, self.file_system = _mount_of(self.fd)
            if mount_point == self.real_path:
                raise StoreError(
                    f"{path} is mounted by itself, so its -wal file would be stored elsewhere: mount its directory"
                )
            self._take_over_leftovers()
            self._room_fd = self._open_room(undo) if self.file_system == "btrfs" else None
            self._room_checked_at = float("-inf")  # monotonic seconds
            self.check_room()
            self._undo = undo.pop_all()

    def close(self) -> None:
        """Unlock the file. SQLite must have closed it."""
        if self._room_fd is not None:
            os.close(self._room_fd)
        _close(self.fd)
        self._lock_file.close()

    def discard(self) -> None:
        """Unlock the file as `close` does; remove it first if it is new. SQLite must have closed it."""
        self._undo.close()

    def check_in_place(self) -> None:
        """Raise StoreError if the file was removed or replaced since it was opened, or the lock file if it counts."""
        try:
            # By path: the status of an open file does not tell that the file was moved.
            in_place = all(_inode(os.stat(name)) == inode for name, inode in self._inodes.items())
        except OSError:
            in_place = False
        if not in_place:
            raise moved_away(self.path)

    def check_room(self) -> None:
        """On Btrfs, raise NoRoom if the disk or a quota is full. Elsewhere, SQLite reports an error itself.

        SQLite changes the -shm file through a mapping, and if Btrfs has no room to change a page, it ends the process
        with SIGBUS. So this writes to another file first, which gets an error instead.
        """
        if self._room_fd is None or monotonic() - self._room_checked_at < _ROOM_SECONDS:
            return
        try:
            os.pwrite(self._room_fd, _ROOM, 0)
            os.ftruncate(self._room_fd, 0)
        except OSError as error:
            self._room_checked_at = float("-inf")  # until there is room
            raise system_error(self.path, error) from error
        self._room_checked_at = monotonic()

    def keep_wal(self) -> None:
        """On Linux, make SQLite leave the WAL as it is when it closes the file: it copies it if no reader is left."""
        with suppress(OSError):
            _lock_bytes(self.fd, fcntl.F_RDLCK, *_SHARED_BYTES)

    def _open_room(self, undo: ExitStack) -> int:
        """Return the descriptor of a file without a name, for `check_room`."""
        try:
            fd = os.open(os.path.dirname(self.real_path), os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise system_error(self.path, error) from error
        undo.callback(os.close, fd)
        return fd

    def warn_of_file_system(self) -> None:
        """Log a warning if the file system may not keep two machines, or two mounts, from corrupting the file."""
        if _NOT_SHARED.fullmatch(self.file_system):
            hint = "locks and shared memory may not hold there: move the file to a local file system"
            log.warning("unsafe_file_system", {"file": self.path, "type": self.file_system, "hint": hint})

    def read_error(self) -> OSError | None:
        """Return the error if the file or its WAL cannot be read, as far as READ_SECONDS allow to find out."""
        deadline = deadline_after(READ_SECONDS)
        try:
            _read_all(self.fd, deadline)
            with open(f"{self.real_path}-wal", "rb") as wal:  # SQLite has no locks on it, so it may be closed
                _read_all(wal.fileno(), deadline)
        except FileNotFoundError:
            pass
        except OSError as error:
            return error
        return None

    def _take_over_leftovers(self) -> None:
        """Remove files beside the database that SQLite could not use, if nothing is in them.

        A reader that runs as another user may leave an empty -wal and a -shm of its own. SQLite makes the -shm again
        from the -wal. Raises StoreError if a file has to stay.
        """
        wal, shm = f"{self.real_path}-wal", f"{self.real_path}-shm"
        foreign = [name for name in (wal, shm) if os.path.exists(name) and not os.access(name, os.W_OK)]
        on_btrfs = self.file_system == "btrfs"
        if not foreign and not on_btrfs:
            return
        with self._readers_kept_out() as alone:
            for name in foreign if alone else ():
                if name == shm or not os.path.getsize(name):  # a -wal with content has records
                    _remove(name)
            if alone and on_btrfs:
                _remove(shm)
                _create_without_copy_on_write(shm, stat.S_IMODE(os.fstat(self.fd).st_mode))
        if left := [name for name in foreign if os.path.exists(name)]:
            names, owner = " and ".join(left), _owner(left[0])
            raise StoreError(
                f"{self.path}: this server may not write {names} of user {owner}: end the programs that "
                f"read the database, then give the server's user these files (chown), or delete them if they are empty"
            )

    @contextmanager
    def _readers_kept_out(self) -> Iterator[bool]:
        """Keep other programs from opening the database. Yields False if one has it open, or if that is unknown."""
        try:
            alone = _lock_bytes(self.fd, fcntl.F_WRLCK, *_SHARED_BYTES)
        except OSError:
            alone = False
        try:
            yield alone
        finally:
            if alone:
                _lock_bytes(self.fd, fcntl.F_UNLCK, *_SHARED_BYTES)


def _check_kind_of_file(path: str) -> None:
    """Raise StoreError unless `path` is a regular file with one name, or does not exist. The file is not opened."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise system_error(f"cannot open {path}", error) from error
    if stat.S_ISDIR(status.st_mode):
        raise StoreError(f"{path} is a directory: name a file in it")
    if not stat.S_ISREG(status.st_mode):
        raise StoreError(f"{path} is not a regular file: use another one")
    if status.st_nlink > 1:
        raise StoreError(
            f"{path} has {status.st_nlink} names (hard links), and SQLite would look for its -wal file beside each: "
            f"delete the other names (find {_mount_point(path)} -xdev -samefile {shlex.quote(path)} lists them)"
        )


def _mount_point(path: str) -> str:
    """Return the top directory of the file system that `path` is on: all names of a file are below it."""
    directory = os.path.dirname(os.path.realpath(path))
    while not os.path.ismount(directory):
        directory = os.path.dirname(directory)
    return shlex.quote(directory)


def _open_lock_file(path: str, real_path: str, undo: ExitStack) -> IO[bytes]:
    """Open and lock `real_path`-lock. `undo` closes it, and removes a new one. Raises StoreError if it is not free."""
    is_new = not os.path.exists(f"{real_path}-lock")
    try:
        file = open(f"{real_path}-lock", "a+b", buffering=0)
    except OSError as error:
        name = path if error.errno == errno.ENOENT else f"{path}-lock"  # without its directory, neither can be made
        raise system_error(f"cannot open {name}", error) from error
    undo.callback(file.close)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InUse(path) from error
    except OSError as error:
        raise StoreError(f"{path} cannot be locked: {error.strerror} (move it to a local file system)") from error
    if is_new:
        undo.callback(_remove, file.name)  # before it is unlocked: then no other server has locked it
    _check_other_name(file, path, real_path)
    return file


def _check_other_name(file: IO[bytes], path: str, real_path: str) -> None:
    """Write the file's path into the lock file. Raise StoreError if a server has it locked by another path.

    One file may have two paths with locks of their own, for example on a FUSE mount and below it. A random number shows
    whether the lock file at the last server's path is the same file or a copy.
    """
    previous = os.pread(file.fileno(), 4096, 0)
    record = b"%s %s\n" % (uuid.uuid4().hex.encode(), os.fsencode(real_path))
    _write_lock_file(file, record)
    other = previous.strip().partition(b" ")[2]
    if not other or other == os.fsencode(real_path):
        return
    try:
        with open(other + b"-lock", "rb") as locked:
            same_inode = os.path.samestat(os.fstat(locked.fileno()), os.fstat(file.fileno()))  # then it is our own lock
            if not same_inode and locked.read() == record:
                fcntl.flock(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _write_lock_file(file, previous)
        raise InUse(path, os.fsdecode(other)) from None
    except OSError:
        pass  # no such file any more


def _write_lock_file(file: IO[bytes], content: bytes) -> None:
    with suppress(OSError):  # for example a full disk; the locks hold without it
        file.truncate(0)
        file.write(content)


def _open_and_lock(path: str, real_path: str, undo: ExitStack) -> tuple[int, bool]:
    """Return a descriptor of the file, and whether all names of the file are locked: not on systems without such locks.

    If the file is new, `undo` removes it. Raises StoreError if another server has it locked.
    """
    try:
        try:
            fd = os.open(real_path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            fd = os.open(real_path, os.O_RDWR | os.O_CLOEXEC | os.O_CREAT | os.O_EXCL, 0o644)  # as SQLite does
            undo.callback(_remove, real_path)
    except OSError as error:
        raise system_error(f"cannot write to {path}", error) from error
    try:
        locked = _lock_bytes(fd, fcntl.F_WRLCK, *_OUR_BYTE)
    except (BlockingIOError, PermissionError) as error:
        if _inode(os.fstat(fd)) not in _open_here:  # otherwise, closing it would unlock the other store
            os.close(fd)
        raise InUse(path) from error
    except OSError as error:
        os.close(fd)
        raise StoreError(f"{path} cannot be locked: {error.strerror} (move it to a local file system)") from error
    undo.callback(_close, fd)
    _open_here.add(_inode(os.fstat(fd)))
    return fd, locked


def _close(fd: int) -> None:
    _open_here.discard(_inode(os.fstat(fd)))
    os.close(fd)


def _lock_bytes(fd: int, kind: int, start: int, length: int) -> bool:
    """Lock or unlock bytes of a file for the open file description, without waiting. False if there are no such locks.

    Raises OSError.
    """
    if _OFD_SETLK is None:
        return False
    try:
        fcntl.fcntl(fd, _OFD_SETLK, struct.pack("hhqqi0q", kind, os.SEEK_SET, start, length, 0))  # struct flock
        return True
    except OSError as error:
        if error.errno != errno.EINVAL:  # which an older kernel returns
            raise
        return False


def _mount_of(fd: int) -> tuple[str, str]:
    """Return the mount point and the type of the file system that an open file is on; empty if unknown."""
    try:
        with open(f"/proc/self/fdinfo/{fd}", "rb") as info:
            mount_id = dict(line.split(b":", 1) for line in info if b":" in line)[b"mnt_id"].strip()
        with open("/proc/self/mountinfo", "rb") as mounts:
            for line in mounts:
                fields = line.split()  # proc_pid_mountinfo(5)
                if fields[0] == mount_id:
                    point = re.sub(rb"\\([0-7]{3})", lambda code: bytes([int(code[1], 8)]), fields[4])
                    return os.fsdecode(point), os.fsdecode(fields[fields.index(b"-") + 1])
    except (OSError, KeyError, ValueError):
        pass  # another system than Linux, or /proc is not mounted
    return "", ""


def _create_without_copy_on_write(path: str, mode: int) -> None:
    """Create a file of btrfs whose blocks are changed in place.

    SQLite maps the -shm file into memory. On a full file system, a write to a page that has to be copied would end the
    process with SIGBUS. An error is ignored: SQLite creates the file then.
    """
    with suppress(OSError):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
        try:
            os.fchmod(fd, mode)
            (flags,) = struct.unpack("l", fcntl.ioctl(fd, _GET_FLAGS, bytes(struct.calcsize("l"))))
            fcntl.ioctl(fd, _SET_FLAGS, struct.pack("l", flags | _NOCOW))
        finally:
            os.close(fd)


def _read_all(fd: int, deadline: float) -> None:
    offset = 0
    while (size := len(os.pread(fd, 1 << 20, offset))) and remaining(deadline):
        offset += size


def moved_away(path: str) -> StoreError:
    """Return the error for a file that is not where it was when it was opened."""
    return StoreError(
        f"{path}: the file or its -wal file was removed or replaced while it was in use: "
        "put it back, or stop this server before you replace it"
    )


def _inode(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _remove(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)


def _owner(path: str) -> str:
    """Return the name or the number of the file's user; "unknown" if the file was just removed."""
    try:
        uid = os.stat(path).st_uid
    except OSError:
        return "unknown"
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
