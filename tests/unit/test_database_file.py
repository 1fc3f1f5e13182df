"""Tests of the database file's lock, of its place, and of the files that others leave beside it."""

import fcntl
import logging
import os
import shlex
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from support.databases import A, append, query
from support.harness import ROOT, eventually
from support.users import NOBODY, as_user, let_others_in

from ringolib.storage import database_file, sqlite_file
from ringolib.storage.interface import StoreError
from ringolib.storage.sqlite_file import APPLICATION_ID, SPOOL_APPLICATION_ID
from store import Store

OPEN_AND_CLOSE = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1])
print(db.execute("SELECT count(*) FROM record").fetchone()[0])
db.close()
"""
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's locks of open file descriptions")


def records_seen_by_program(path: Path) -> int:
    """Return how many records a program sees that opens the file for writing, and closes it again."""
    run = subprocess.run([sys.executable, "-c", OPEN_AND_CLOSE, str(path)], capture_output=True, text=True, check=True)
    return int(run.stdout)


@linux_only
@pytest.mark.parametrize("name", ["the same", "hard link", "hard link, then the first name removed"])
def test_lock_holds_for_all_names_without_lock_file(path: Path, name: str) -> None:
    other = path
    with closing(Store(str(path))) as first:
        append(first, A, 0, 5)
        if name != "the same":
            other = path.with_name("other.db")
            other.hardlink_to(path)
        path.with_name("numbers.db-lock").unlink()
        if name.endswith("removed"):
            path.rename(path.with_name("away.db"))
            path.with_name("away.db").unlink()
        with pytest.raises(StoreError, match="in use by another ringoexp|has 2 names"):
            Store(str(other))
        if name.endswith("removed"):
            return
        # The refused store has not dropped the locks of SQLite: a program that closes the file leaves the WAL alone.
        assert records_seen_by_program(path) == 5
        assert os.path.getsize(f"{path}-wal") > 0
        append(first, A, 5, 10)
    assert query(path, "SELECT count(*) FROM record") == [(10,)]


def test_file_with_two_names_is_refused(path: Path) -> None:
    """SQLite finds the WAL by name: two names would have a WAL each."""
    Store(str(path)).close()
    link = path.with_name("link.db")
    link.hardlink_to(path)
    for name in (path, link):
        with pytest.raises(StoreError, match=r"has 2 names \(hard links\).*find /\S* -xdev -samefile"):
            Store(str(name))
    link.unlink()
    Store(str(path)).close()


@linux_only
def test_names_of_a_file_on_another_file_system_are_found(path: Path) -> None:
    """The command in the error searches the file system of the file, which may be another one than "/"."""
    directory = Path("/dev/shm")
    if not os.access(directory, os.W_OK):
        pytest.skip("needs /dev/shm")
    with tempfile.TemporaryDirectory(dir=directory, prefix="with blank ") as name:
        first, second = Path(name, "a.db"), Path(name, "b.db")
        first.touch()
        second.hardlink_to(first)
        with pytest.raises(StoreError) as refused:
            Store(str(first))
        command = str(refused.value).partition("other names (")[2].removesuffix(" lists them)")
        found = subprocess.run(shlex.split(command), capture_output=True, text=True).stdout.splitlines()
        assert sorted(found) == [str(first), str(second)]


@linux_only
def test_refused_store_leaves_no_descriptor_open(path: Path) -> None:
    program = f"import sys; sys.path[0] = {str(ROOT)!r}; import store; s = store.Store(sys.argv[1]); input()"
    with subprocess.Popen([sys.executable, "-c", program, path], stdin=subprocess.PIPE) as other:
        try:
            eventually(lambda: Path(f"{path}-wal").exists())
            path.with_name("numbers.db-lock").unlink()
            before = os.listdir("/proc/self/fd")
            with pytest.raises(StoreError, match="in use by another ringoexp"):
                Store(str(path))
            assert len(os.listdir("/proc/self/fd")) == len(before)
        finally:
            other.kill()


def test_lock_is_held_until_sqlite_has_closed(path: Path) -> None:
    opened = Store(str(path))
    order = []

    class Connection:
        def close(self) -> None:
            with pytest.raises(StoreError, match="in use"):
                Store(str(path))
            order.append("closed")
            db.close()

    db, opened._db = opened._db, Connection()  # type: ignore[assignment]
    opened.close()
    Store(str(path)).close()
    assert order == ["closed"]


def test_directory_may_be_renamed_and_linked_to(tmp_path: Path) -> None:
    """The lock file names the path of the last server. That may lead to the same lock file."""
    (tmp_path / "a").mkdir()
    Store(str(tmp_path / "a" / "numbers.db")).close()
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    Store(str(tmp_path / "a" / "numbers.db")).close()


def test_copy_may_be_used_beside_running_original(tmp_path: Path) -> None:
    """The copied lock file names the path of the original, which is locked."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with closing(Store(str(tmp_path / "one" / "numbers.db"))):
        for suffix in ("", "-lock", "-wal"):
            name = f"numbers.db{suffix}"
            (tmp_path / "two" / name).write_bytes((tmp_path / "one" / name).read_bytes())
        Store(str(tmp_path / "two" / "numbers.db")).close()


def test_refused_file_leaves_no_new_files(path: Path) -> None:
    path.write_bytes(b"a user's notes\n" * 100)
    with pytest.raises(StoreError, match="is not a SQLite file"):
        Store(str(path))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_new_lock_file_is_removed_before_it_is_unlocked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, another server could lock it in between, and a third one could lock a new one."""
    removed = []

    def remove(name: str) -> None:
        with open(name, "rb") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        removed.append(name)

    path.write_bytes(b"a user's notes\n" * 100)
    monkeypatch.setattr(database_file, "_remove", remove)
    with pytest.raises(StoreError, match="is not a SQLite file"):
        Store(str(path))
    assert removed == [f"{os.path.realpath(path)}-lock"]


def test_file_that_is_mounted_by_itself_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_file, "_mount_of", lambda fd: (os.path.realpath(path), "ext4"))
    with pytest.raises(StoreError, match="is mounted by itself.*mount its directory"):
        Store(str(path))
    assert not list(path.parent.iterdir())


@linux_only
def test_mount_of_an_open_file_is_found(path: Path) -> None:
    with path.open("w") as file:
        mount_point, file_system = database_file._mount_of(file.fileno())
    assert os.path.ismount(mount_point) and path.is_relative_to(mount_point) and file_system


@pytest.mark.parametrize(
    ("file_system", "warned"),
    [
        ("nfs4", 1),
        ("cifs", 1),
        ("fuse.bindfs", 1),
        ("virtiofs", 1),
        ("fakeowner", 1),
        ("9p", 1),
        ("ext4", 0),
        ("tmpfs", 0),
        ("", 0),
    ],
)
def test_file_system_without_shared_memory_is_warned_of(
    path: Path, file_system: str, warned: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(database_file, "_mount_of", lambda fd: ("/", file_system))
    with closing(Store(str(path))) as opened:
        append(opened, A, 0, 1)
    assert [record.getMessage() for record in caplog.records] == ["unsafe_file_system"] * warned


@pytest.mark.parametrize("kind", [APPLICATION_ID, SPOOL_APPLICATION_ID])
def test_syncs_reach_the_medium_on_macos(path: Path, kind: int) -> None:
    with closing(Store(str(path), kind)) as opened:
        for pragma in ("fullfsync", "checkpoint_fullfsync"):
            assert opened._db.execute(f"PRAGMA {pragma}").fetchone() == (1,)


# The WAL.


@pytest.mark.parametrize("commits", [1, 5])
@pytest.mark.parametrize("size", ["empty", "half", "one byte less"])
def test_truncated_wal_is_noticed_at_next_commit(path: Path, commits: int, size: str) -> None:
    with closing(Store(str(path))) as opened:
        for n in range(commits):
            append(opened, A, n, n + 1)
        wal = f"{path}-wal"
        before = os.path.getsize(wal)
        os.truncate(wal, {"empty": 0, "half": before // 2, "one byte less": before - 1}[size])
        for _ in range(2):
            with pytest.raises(StoreError, match="-wal file was truncated.*stop this server and start it again"):
                append(opened, A, 100, 101)
        with pytest.raises(StoreError, match="truncated"):
            opened.check()
        assert os.path.getsize(wal) < before, "nothing was written"


@linux_only
@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.9])
def test_truncated_wal_does_not_damage_what_was_stored_before(path: Path, part: float) -> None:
    """A checkpoint would copy the first pages of the last commit, and leave the others out."""
    with closing(Store(str(path))) as opened:
        append(opened, A, 0, 30_000)
        opened._wal.empty()
        append(opened, A, 30_000, 60_000)
        os.truncate(f"{path}-wal", int(part * os.path.getsize(f"{path}-wal")))
        with pytest.raises(StoreError, match="truncated"):
            append(opened, A, 60_000, 60_001)
    with closing(Store(str(path))) as opened:
        assert opened.stats().held == 30_000
    assert query(path, "PRAGMA integrity_check") == [("ok",)]


def test_wal_started_over_by_another_program_is_no_error(path: Path) -> None:
    """The other program empties the WAL and then writes, as a replication program does."""
    with closing(Store(str(path))) as opened, closing(sqlite3.connect(path, isolation_level=None)) as other:
        append(opened, A, 0, 30_000)
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        other.execute("CREATE TABLE other(value)")
        assert 0 < os.path.getsize(f"{path}-wal") < opened._wal._min_size
        append(opened, A, 30_000, 30_001)
    assert query(path, "SELECT count(*) FROM record") == [(30_001,)]


def test_wal_truncated_after_last_commit_is_noticed_at_stop(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened = Store(str(path))
    append(opened, A, 0, 10)
    os.truncate(f"{path}-wal", 0)
    opened.close()
    (record,) = caplog.records
    assert record.getMessage() == "store_failing" and "truncated" in str(record.args)


def test_wal_emptied_by_another_program_is_no_error(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(Store(str(path))) as opened, closing(sqlite3.connect(path, isolation_level=None)) as shell:
        for n in range(20):
            append(opened, A, 10 * n, 10 * n + 10)
            if n % 4 == 0:
                assert shell.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() == (0, 0, 0)
                assert os.path.getsize(f"{path}-wal") == 0
            if n % 4 == 1:
                shell.execute("VACUUM")
        assert opened.stats().failed_commits == 0 and not caplog.records
    assert query(path, "SELECT count(*) FROM record") == [(200,)]


def test_wal_that_a_reader_made_anew_is_noticed(path: Path) -> None:
    """The server's own WAL was removed before: its records would be lost by a kill."""
    with closing(Store(str(path))) as opened:
        append(opened, A, 0, 10)
        os.unlink(f"{path}-wal")
        Path(f"{path}-wal").touch()
        opened._wal._inode_checked_at = float("-inf")  # as after a second
        for _ in range(2):
            with pytest.raises(StoreError, match="removed or replaced"):
                append(opened, A, 10, 20)


# A file that was not closed in order.


def crashed(path: Path) -> None:
    """Leave a database with a WAL, as after a kill."""
    with closing(Store(str(path))) as opened:
        append(opened, A, 0, 100_000)
        opened._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        append(opened, A, 100_000, 100_010)
        files = {name: Path(f"{path}{name}").read_bytes() for name in ("", "-wal")}
    for name, content in files.items():
        Path(f"{path}{name}").write_bytes(content)


def test_damage_is_found_at_start_after_a_kill(path: Path) -> None:
    crashed(path)
    content = bytearray(path.read_bytes())
    content[50 * 4096 : 51 * 4096] = bytes(4096)
    path.write_bytes(content)
    with pytest.raises(StoreError, match="database disk image is malformed .it is corrupt: restore it from a backup"):
        Store(str(path))


@pytest.mark.parametrize("seconds", [5.0, 0.0])
def test_check_at_start_is_limited_in_time(
    path: Path, seconds: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sqlite_file, "CHECK_SECONDS", seconds)
    crashed(path)
    with closing(Store(str(path))) as opened:
        assert opened.stats().held == 100_010
    checks = [record.args for record in caplog.records if record.getMessage() == "database_checked"]
    assert len(checks) == 1 and isinstance(checks[0], dict) and (checks[0]["complete"] or not seconds)
    caplog.clear()
    Store(str(path)).close()
    assert not caplog.records, "no check after an ordered stop"


# Files that another user has left.


@pytest.fixture
def others(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database in a directory that the user of `as_user` may write."""
    Store(str(path)).close()
    for file in (path, Path(f"{path}-lock"), path.parent):
        if os.getuid() == 0:
            os.chown(file, NOBODY, NOBODY)
    let_others_in(path, tmp_path_factory.getbasetemp())
    return path


def left_by_reader(path: Path) -> list[Path]:
    """Create the files that a reader without write permission leaves."""
    files = [Path(f"{path}-wal"), Path(f"{path}-shm")]
    for file in files:
        file.touch()
        file.chmod(0o444)
    return files


@linux_only
def test_empty_files_of_another_user_are_taken_over(others: Path) -> None:
    left_by_reader(others)

    def work() -> None:
        with closing(Store(str(others))) as opened:
            append(opened, A, 0, 10)

    assert as_user(work) == "done"
    assert not Path(f"{others}-wal").exists()
    assert query(others, "SELECT count(*) FROM record") == [(10,)]


def test_wal_of_another_user_with_records_is_not_touched(others: Path) -> None:
    wal, _ = left_by_reader(others)
    wal.chmod(0o644)
    wal.write_bytes(b"records")
    wal.chmod(0o444)
    message = as_user(lambda: Store(str(others)))
    assert f"may not write {wal}" in message and "of user" in message and "chown" in message, message
    assert wal.read_bytes() == b"records"


def test_files_that_their_reader_removes_meanwhile_stop_no_start(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader ends after the server has found its files."""
    Store(str(path)).close()
    Path(f"{path}-wal").touch()
    monkeypatch.setattr(os, "access", lambda name, mode: not str(name).endswith("-wal"))
    monkeypatch.setattr(
        database_file, "_lock_bytes", lambda fd, kind, start, length: start != database_file._SHARED_BYTES[0]
    )
    exists = os.path.exists

    def removed_once_seen(name: str) -> bool:
        seen = exists(name)
        if name.endswith("-wal") and seen and next(looks) == 2:
            os.unlink(name)
        return seen

    looks = iter(range(10))
    monkeypatch.setattr(os.path, "exists", removed_once_seen)
    with pytest.raises(StoreError, match="may not write .*-wal of user unknown"):
        Store(str(path))


def test_files_of_another_user_in_use_are_named(others: Path) -> None:
    with closing(sqlite3.connect(others)) as reader:
        assert reader.execute("SELECT count(*) FROM record").fetchone() == (0,)
        for name in ("-wal", "-shm"):
            Path(f"{others}{name}").chmod(0o444)
        message = as_user(lambda: Store(str(others)))
        assert f"{others}-wal and {others}-shm" in message and "end the programs that read the database" in message
        assert Path(f"{others}-shm").exists()
