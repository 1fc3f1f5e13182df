"""Tests with files that get other names, places, sizes and owners, and with disks that are full at the start.

What needs a mount is skipped where the test may not mount, or where the program that makes the file system is missing.
"""

import errno
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from support import NOT_PERMITTED
from support.harness import ServerProcess, eventually, in_order, request, server

from ringolib.client.producer import Producer
from ringolib.storage import remedies
from ringolib.storage.interface import StoreError
from ringolib.wire import encode_plain
from store import Store

MEBIBYTE = 1024 * 1024
QUICK = "timing.BACKOFF_MAX_SECONDS = 0.2"
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")

Mount = Callable[..., Path]


def run_or_skip(*command: str | Path) -> None:
    """Run a command that needs privileges; skip the test if it fails or is missing."""
    if not shutil.which(str(command[0])):
        pytest.skip(f"needs {command[0]}")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{command[0]}: {NOT_PERMITTED}: {done.stderr.strip()}")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """A function that mounts a file system, unmounted after the test. It takes the arguments of mount(8)."""
    with ExitStack() as stack:

        def make(*arguments: str | Path, target: Path | None = None) -> Path:
            if target is None:
                target = tmp_path / "mounted"
                target.mkdir()
            run_or_skip("mount", *arguments, target)
            stack.callback(subprocess.run, ["umount", "--lazy", target], check=True)
            return target

        yield make


def tmpfs(mount: Mount, options: str) -> Path:
    return mount("-t", "tmpfs", "-o", options, "tmpfs")


def fill(directory: Path) -> Path:
    """Fill the disk with a file and return it."""
    ballast = directory / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            for size in (MEBIBYTE, 4096, 1):
                while True:
                    if file.write(bytes(size)) < size:
                        break
        except OSError as error:
            assert error.errno in (errno.ENOSPC, errno.EDQUOT)
    return ballast


def use_all_inodes(directory: Path) -> None:
    with pytest.raises(OSError):
        for n in range(100_000):
            (directory / f"used-{n}").touch()


def refusal(directory: Path, *flags: str) -> str:
    """Start a server that must not start, and return its one line."""
    with pytest.raises(AssertionError) as refused:
        ServerProcess(directory, "-p", "0", *flags).kill()
    text = str(refused.value)
    assert text.count("ringoexp: error: ") == 1 and "Traceback" not in text, text
    return text


def post(running: ServerProcess, first: int, count: int) -> int:
    return request(running.port, "POST", "/v1.0/ingest", encode_plain(range(first, first + count)))[0]


def values(database: Path) -> list[int]:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as reader:
        assert reader.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return [value for (value,) in reader.execute("SELECT value FROM record ORDER BY id")]


# One server for a database, by whatever name.


@linux_only
@pytest.mark.parametrize("name", ["hard link", "bind mount", "lock file removed", "FUSE mount", "below a FUSE mount"])
def test_second_server_by_another_name_is_refused(tmp_path: Path, mount: Mount, name: str) -> None:
    """The first server goes on, and no record is lost after both have ended."""
    first = second = tmp_path / "a" / "numbers.db"
    first.parent.mkdir()
    (tmp_path / "b").mkdir()
    with ExitStack() as stack:
        if "FUSE" in name:
            run_or_skip("bindfs", first.parent, tmp_path / "b")
            stack.callback(subprocess.run, ["umount", "--lazy", tmp_path / "b"], check=True)
            second = tmp_path / "b" / first.name
            if name.startswith("below"):
                first, second = second, first
        running = stack.enter_context(server(tmp_path, "-I", "false", "-p", "0", "-D", str(first)))
        assert post(running, 0, 1000) == 200
        if name == "hard link":
            second = tmp_path / "b" / "other.db"
            second.hardlink_to(first)
        elif name == "bind mount":
            second = tmp_path / "b" / "other.db"
            second.touch()
            mount("--bind", first, target=second)
        elif name == "lock file removed":
            first.with_name("numbers.db-lock").unlink()
        for _ in range(2):
            line = refusal(tmp_path, "-I", "false", "-D", str(second))
            assert "in use by another ringoexp" in line or name == "hard link" and "has 2 names" in line
        assert post(running, 1000, 1000) == 200
        assert running.stop() == 0
        assert values(first) == list(range(2000))
        if name == "hard link":
            second.unlink()
        with server(tmp_path, "-I", "false", "-p", "0", "-D", str(first)) as running:
            assert post(running, 2000, 10) == 200 and running.stop() == 0


@linux_only
@pytest.mark.parametrize("flag", ["-D", "-S"])
def test_file_mounted_by_itself_is_refused(tmp_path: Path, mount: Mount, flag: str) -> None:
    """Its WAL would stay outside the mount, for example in the layer of a container."""
    (tmp_path / "outside.db").touch()
    (tmp_path / "data with blanks").mkdir()
    target = tmp_path / "data with blanks" / "numbers.db"
    target.touch()
    mount("--bind", tmp_path / "outside.db", target=target)
    role = ["-I", "false"] if flag == "-D" else ["-T", "1"]
    assert "is mounted by itself" in refusal(tmp_path, *role, flag, str(target))
    assert (tmp_path / "outside.db").stat().st_size == 0


# Full at the start.


@pytest.mark.parametrize("lack", ["room", "inodes"])
def test_full_disk_at_start_is_named(tmp_path: Path, mount: Mount, lack: str) -> None:
    """After an ordered stop SQLite has removed the WAL; the next start needs room for a new one."""
    disk = tmpfs(mount, "size=2m" if lack == "room" else "size=2m,nr_inodes=20")
    flags = ["-I", "false", "-D", str(disk / "numbers.db")]
    with server(tmp_path, "-p", "0", *flags) as running:
        assert post(running, 0, 1000) == 200 and running.stop() == 0
    if lack == "room":
        ballast = fill(disk)
    else:
        use_all_inodes(disk)
    assert "the disk is full, or has no free inodes" in refusal(tmp_path, *flags)
    if lack == "room":
        ballast.unlink()
    else:
        (disk / "used-0").unlink()
        (disk / "used-1").unlink()
    with server(tmp_path, "-p", "0", *flags) as running:
        assert post(running, 1000, 10) == 200 and running.stop() == 0
    assert values(disk / "numbers.db") == list(range(1010))


@pytest.mark.slow
@pytest.mark.parametrize("lack", ["room", "inodes"])
def test_publisher_forwards_while_its_spool_has_no_room(tmp_path: Path, mount: Mount, lack: str) -> None:
    """It has records in the spool from before. They are forwarded once there is room."""
    disk = tmpfs(mount, "size=200m" if lack == "room" else "size=200m,nr_inodes=20")
    with server(tmp_path, "-I", "false", "-p", "0", "-D", "numbers.db", patch=QUICK) as consumer, ExitStack() as stack:
        flags = ["-p", "0", "-T", str(consumer.port), "-S", str(disk / "p.spool")]
        with server(tmp_path, *flags, patch=QUICK) as publisher:
            consumer.send_signal(signal.SIGSTOP)
            stack.callback(consumer.send_signal, signal.SIGCONT)
            producer = stack.enter_context(closing(Producer(publisher.url)))
            producer.send(range(1000))
            producer.flush(30)
            producer.close()
            assert publisher.stop() == 0
        if lack == "room":
            ballast = [fill(disk)]
        else:
            use_all_inodes(disk)
            ballast = [disk / f"used-{n}" for n in range(4)]
        consumer.send_signal(signal.SIGCONT)
        with server(tmp_path, *flags, patch=QUICK) as publisher:
            assert "the disk is full, or has no free inodes" in publisher.errors.read_text()
            assert post(publisher, 5000, 100) == 200
            assert consumer.stats()["recordsStored"] == 100
            for file in ballast:
                file.unlink()
            eventually(lambda: consumer.stats()["recordsStored"] == 1100, "the spool is forwarded")
            eventually(lambda: publisher.stats()["spoolDepth"] == 0)
            assert publisher.stop() == 0
        assert consumer.stop() == 0
    assert in_order(tmp_path / "numbers.db", producer.source) == list(range(1000))


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EDQUOT, "quota of its owner is used up"),
        (errno.ENOSPC, "the disk is full, or has no free inodes"),
        (errno.EMFILE, r"may open no more files: raise the limit \(ulimit -n\)"),
        (errno.EROFS, "mounted read-only"),
        (errno.EIO, "does not show that the database is corrupt: check the disk"),
    ],
)
@pytest.mark.parametrize(
    "reported", ["disk I/O error", "unable to open database file", "database disk image is malformed"]
)
def test_error_of_sqlite_names_the_systems_cause(
    tmp_path: Path, number: int, message: str, reported: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remedies, "_write_error", lambda path: OSError(number, os.strerror(number)))
    with closing(Store(str(tmp_path / "numbers.db"))) as opened:
        error = remedies.explain(opened._file, sqlite3.OperationalError(reported))
    with pytest.raises(StoreError, match=f"numbers.db: {reported}: {os.strerror(number)} .*{message}"):
        raise error
    assert "restore it from" not in str(error)
    assert isinstance(error, remedies.NoRoom) == (number in (errno.EDQUOT, errno.ENOSPC))


def test_limit_of_file_sizes_is_named(tmp_path: Path) -> None:
    """SQLite calls it a disk I/O error, as it calls a failing disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with closing(Store(str(tmp_path / "numbers.db"))) as opened:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (65 * 1024, hard))  # the probe writes 64 KiB
            error = remedies.explain(opened._file, sqlite3.OperationalError("disk I/O error"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "disk I/O error: File too large (" in str(error) and "ulimit -f" in str(error)
    assert "check the disk" not in str(error)


def test_search_for_the_cause_touches_no_other_file(tmp_path: Path) -> None:
    """A file of the user may have any name."""
    files = [tmp_path / f"numbers.db-{name}" for name in ("probe", "test", "tmp")]
    with closing(Store(str(tmp_path / "numbers.db"))) as opened:
        for file in files:
            file.write_text("a user's notes")
        before = set(tmp_path.iterdir())
        remedies.explain(opened._file, sqlite3.OperationalError("disk I/O error"))
        assert set(tmp_path.iterdir()) == before and {file.read_text() for file in files} == {"a user's notes"}


@pytest.mark.parametrize("spare", range(6))
def test_lack_of_descriptors_at_start_is_named(tmp_path: Path, spare: int) -> None:
    Store(str(tmp_path / "numbers.db")).close()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(tmp_path, os.O_RDONLY)
    os.close(lowest)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + spare, hard))
        with pytest.raises(StoreError, match=r"may open no more files: raise the limit \(ulimit -n\)"):
            Store(str(tmp_path / "numbers.db"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    Store(str(tmp_path / "numbers.db")).close()


@pytest.mark.slow
def test_file_system_that_was_shut_down_is_not_called_corrupt(tmp_path: Path, mount: Mount) -> None:
    """As after an error of its disk. The program for XFS shuts down ext4, too."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(64 * MEBIBYTE)
    run_or_skip("mkfs.ext4", "-q", image)
    disk = mount("-o", "loop", image)
    with server(tmp_path, "-I", "false", "-p", "0", "-D", str(disk / "numbers.db"), patch=QUICK) as running:
        assert post(running, 0, 50_000) == 200
        run_or_skip("xfs_io", "-x", "-c", "shutdown", disk)
        assert post(running, 50_000, 1000) == 503
        errors = {running.stats()["storeError"] for _ in range(3) if post(running, 50_000, 10) == 503}
        assert all("Input/output error" in error and "restore it from" not in error for error in errors), errors
    assert "Input/output error" in refusal(tmp_path, "-I", "false", "-D", str(disk / "numbers.db"))


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["disk", "quota"])
def test_full_btrfs_does_not_end_the_server(tmp_path: Path, mount: Mount, limit: str) -> None:
    """A write to a mapped page that has to be copied raises SIGBUS if there is no room for the copy."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(128 * MEBIBYTE)
    run_or_skip("mkfs.btrfs", "-q", image)
    disk = mount("-o", "loop", image)
    directory = disk / "sub"
    run_or_skip("btrfs", "subvolume", "create", directory)
    if limit == "quota":
        run_or_skip("btrfs", "quota", "enable", disk)
        run_or_skip("btrfs", "qgroup", "limit", "40M", directory)
    database = directory / "numbers.db"
    acked = 0
    with server(tmp_path, "-I", "false", "-p", "0", "-D", str(database), patch=QUICK) as running:
        for _ in range(20):
            assert post(running, acked, 1000) == 200
            acked += 1000
        os.sync()
        ballast = fill(directory)
        os.sync()
        for _ in range(30):
            acked += 1000 * (post(running, acked, 1000) == 200)
        assert running.get("/v1.0/alive")[0] == 200
        if limit == "quota":
            assert "Disk quota exceeded" in running.stats()["storeError"]
            assert running.stop() == 0
            run_or_skip("btrfs", "qgroup", "limit", "none", directory)
        else:
            ballast.unlink()
            os.sync()
            eventually(lambda: post(running, acked, 1000) == 200, "there is room again")
            acked += 1000
            assert running.stop() == 0
    with server(tmp_path, "-I", "false", "-p", "0", "-D", str(database), patch=QUICK) as running:
        assert post(running, acked, 1000) == 200 and running.stop() == 0
    assert len(set(values(database))) == acked + 1000


# Busy elsewhere.


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.6, 1.4, pytest.param(8, marks=pytest.mark.long)])
def test_write_lock_held_by_another_program_delays_acks_only(tmp_path: Path, seconds: float) -> None:
    """Commits wait for the lock for a second here, and for 5 s otherwise. Later ones fail and are sent again."""
    database = tmp_path / "numbers.db"
    flags = ["-I", "false", "-p", "0", "-D", str(database)]
    patch = f"storage.sqlite_file.BUSY_TIMEOUT_MS = 1000; {QUICK}"
    with server(tmp_path, *flags, patch=patch) as running, closing(Producer(running.url)) as producer:
        producer.send(range(1000))
        producer.flush(30)
        with closing(sqlite3.connect(database, isolation_level=None)) as shell:
            shell.execute("BEGIN IMMEDIATE")
            producer.send(range(1000, 2000))
            with pytest.raises(TimeoutError):
                producer.flush(seconds)
            shell.execute("ROLLBACK")
        producer.flush(30)
        stats = running.stats()
        assert bool(stats["failedCommits"]) == (seconds > 1) and stats["storeError"] is None
        assert running.stop() == 0
    assert in_order(database, producer.source) == list(range(2000))


@pytest.mark.slow
def test_maintenance_by_another_program_disturbs_no_commit(tmp_path: Path) -> None:
    """VACUUM, checkpoints, and an attempt to change the journal mode, between commits."""
    database = tmp_path / "numbers.db"
    with server(tmp_path, "-I", "false", "-p", "0", "-D", str(database)) as running:
        with closing(Producer(running.url)) as producer:
            for n in range(30):
                producer.send(range(100 * n, 100 * n + 100))
                producer.flush(30)
                with closing(sqlite3.connect(database, isolation_level=None)) as shell:
                    if n % 5 == 0:
                        shell.execute("VACUUM")
                    elif n % 5 == 4:
                        shell.execute("PRAGMA busy_timeout = 0")
                        with pytest.raises(sqlite3.OperationalError, match="locked"):
                            shell.execute("PRAGMA journal_mode = DELETE")
                    else:
                        mode = ("PASSIVE", "RESTART", "TRUNCATE")[n % 5 - 1]
                        assert shell.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()[0] == 0
            assert running.stats()["failedCommits"] == 0
        assert running.stop() == 0
    assert in_order(database, producer.source) == list(range(3000))


def test_wal_truncated_before_the_stop_is_told_by_exit_status(tmp_path: Path) -> None:
    database = tmp_path / "numbers.db"
    with server(tmp_path, "-I", "false", "-p", "0", "-D", str(database)) as running:
        assert post(running, 0, 1000) == 200
        Path(f"{database}-wal").write_bytes(b"")
        assert running.stop() == 3
        assert running.errors.read_text().count("event=store_failing") == 1


def test_truncated_wal_fails_commits_and_restart_checks_file(tmp_path: Path) -> None:
    database = tmp_path / "numbers.db"
    flags = ["-I", "false", "-p", "0", "-D", str(database)]
    with server(tmp_path, *flags) as running:
        assert post(running, 0, 1000) == 200
        Path(f"{database}-wal").write_bytes(b"")
        assert post(running, 1000, 1000) == 503
        assert "truncated" in running.stats()["storeError"]
        assert running.stop() == 3
        assert running.errors.read_text().count("event=store_failing") == 1
    with server(tmp_path, *flags) as running:
        assert "event=database_checked" in running.errors.read_text()
        assert post(running, 0, 10) == 200 and running.stop() == 0
