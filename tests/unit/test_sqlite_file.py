"""Tests of opening a database file: unsuitable files are refused before anything in them changes."""

import os
import sqlite3
import uuid
from contextlib import closing
from pathlib import Path

import pytest
from support.databases import A, block
from support.users import as_user, let_others_in

from ringolib.storage.interface import StoreError
from ringolib.storage.sqlite_file import APPLICATION_ID, SPOOL_APPLICATION_ID
from store import Store


def test_file_without_identity_gets_one(tmp_path: Path) -> None:
    path = tmp_path / "numbers.db"
    Store(str(path)).close()
    with closing(sqlite3.connect(path)) as writer, writer:
        writer.execute("DROP TABLE identity")
    identities = []
    for _ in range(2):
        store = Store(str(path))
        identities.append(store.identity)
        store.close()
    assert identities[0] == identities[1] and str(uuid.UUID(identities[0])) == identities[0]


def test_named_pipe_is_refused_without_opening_it(tmp_path: Path) -> None:
    """Opening it would wait for a writer."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StoreError, match="pipe is not a regular file: use another one"):
        Store(str(tmp_path / "pipe"))


def test_circular_symbolic_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(StoreError, match="a: .*symbolic links"):
        Store(str(tmp_path / "a"))


def test_old_sqlite_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 31, 1))
    with pytest.raises(StoreError, match=r"SQLite 3.* is too old: use a Python built with SQLite 3\.32 or newer"):
        Store(str(tmp_path / "d"))


@pytest.mark.parametrize(
    ("kind", "other", "message"),
    [
        (APPLICATION_ID, SPOOL_APPLICATION_ID, "is a consumer's database, not a publisher's spool"),
        (SPOOL_APPLICATION_ID, APPLICATION_ID, "is a publisher's spool, not a consumer's database"),
    ],
)
def test_spool_and_database_refuse_files_of_each_other(path: Path, kind: int, other: int, message: str) -> None:
    Store(str(path), kind).close()
    with pytest.raises(StoreError, match=message):
        Store(str(path), other)


def test_second_server_is_refused_until_first_closes(path: Path) -> None:
    first = Store(str(path))
    link = path.with_name("link.db")
    link.symlink_to(path)
    for name in (path, link):
        with pytest.raises(StoreError, match="in use by another ringoexp"):
            Store(str(name))
    first.close()
    Store(str(path)).close()


def other_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE theirs(x)")


def newer_database(path: Path) -> None:
    Store(str(path)).close()
    with closing(sqlite3.connect(path)) as ours:
        ours.execute("PRAGMA user_version = 2")


def corrupt_database(path: Path) -> None:
    Store(str(path)).close()
    content = bytearray(path.read_bytes())
    content[100:4096] = b"\xff" * 3996
    path.write_bytes(content)


def changed_database(path: Path) -> None:
    Store(str(path)).close()
    with closing(sqlite3.connect(path)) as ours:
        ours.execute("INSERT INTO record(value) VALUES (1)")
        ours.commit()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda path: path.mkdir(), "is a directory", id="directory"),
        pytest.param(lambda path: path.write_text("not a database\n" * 100), "not a SQLite file", id="text file"),
        pytest.param(other_database, "another application's", id="another application's"),
        pytest.param(newer_database, "schema version 2", id="newer"),
        pytest.param(corrupt_database, "corrupt", id="corrupt"),
        pytest.param(changed_database, "corrupt, or another program has changed it", id="records without a batch"),
    ],
)
def test_foreign_file_is_refused_and_unchanged(path: Path, make: object, message: str) -> None:
    make(path)  # type: ignore[operator]
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(StoreError, match=message) as refused:
        Store(str(path))
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)
    assert (path.read_bytes() if path.is_file() else b"") == before


@pytest.mark.parametrize("other", ["-wal", "-journal"])
def test_foreign_wal_and_journal_are_unchanged(path: Path, other: str) -> None:
    beside = Path(f"{path}{other}")
    for file in (path, beside):
        file.write_bytes(b"a user's notes\n" * 1000)
    with pytest.raises(StoreError, match="is not a SQLite file"):
        Store(str(path))
    assert path.read_bytes() == beside.read_bytes() == b"a user's notes\n" * 1000


def test_text_file_beside_valid_wal_is_not_taken_for_torn_database(path: Path) -> None:
    with closing(Store(str(path))) as opened:
        opened.append(*block(A, 0, 1000))
        wal = Path(f"{path}-wal").read_bytes()
    path.write_bytes(b"a user's notes\n" * 1000)
    Path(f"{path}-wal").write_bytes(wal)
    with pytest.raises(StoreError, match="is not a SQLite file"):
        Store(str(path))
    assert path.read_bytes() == b"a user's notes\n" * 1000


def test_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No such file or directory"):
        Store(str(tmp_path / "nowhere" / "numbers.db"))


@pytest.mark.parametrize("read_only", ["directory", "file"])
def test_file_without_write_permission_is_refused(
    path: Path, tmp_path_factory: pytest.TempPathFactory, read_only: str
) -> None:
    """In a child process. If the tests run as root, the child drops its privileges."""
    Store(str(path)).close()
    path.with_name("numbers.db-lock").chmod(0o666)
    path.chmod(0o444)
    if read_only == "directory":
        path.unlink()
        path.with_name("numbers.db-lock").unlink()
        path.parent.chmod(0o555)
    let_others_in(path, tmp_path_factory.getbasetemp())
    message = as_user(lambda: Store(str(path)))
    path.parent.chmod(0o755)
    assert str(path) in message and ("Permission denied" in message or "permissions" in message), message


def test_schema_with_invalid_text_is_refused_as_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "numbers.db"
    Store(str(path)).close()
    content = path.read_bytes()
    assert content.count(b"tablerecordrecord") == 1
    damaged = content.replace(b"tablerecordrecord", b"table\xfa\xffcordrecord")
    path.write_bytes(damaged.replace(b"CREATE TABLE record", b"CREATE TABLX record"))
    with pytest.raises(StoreError, match="restore it from a backup") as refused:
        Store(str(path))
    assert "\n" not in str(refused.value)
