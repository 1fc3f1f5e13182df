"""What cannot be a database is refused before anything is changed, in one line that says what to do."""

import os
import sqlite3
import uuid
from contextlib import closing
from pathlib import Path

import pytest

from ringolib.storage.interface import StoreError
from store import Store


def test_a_file_of_before_there_was_an_identity_gets_one(tmp_path: Path) -> None:
    path = tmp_path / "numbers.db"
    Store(str(path)).close()
    with closing(sqlite3.connect(path)) as writer, writer:
        writer.execute("DROP TABLE identity")
    found = []
    for _ in range(2):
        store = Store(str(path))
        found.append(store.identity)
        store.close()
    assert found[0] == found[1] and str(uuid.UUID(found[0])) == found[0]


def test_a_named_pipe_is_not_a_file(tmp_path: Path) -> None:
    """And is not opened, which would wait for whoever writes into it."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StoreError, match="pipe is not a file: name another one"):
        Store(str(tmp_path / "pipe"))


def test_links_in_a_circle_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(StoreError, match="a: .*symbolic links"):
        Store(str(tmp_path / "a"))


def test_a_sqlite_that_is_too_old_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 31, 1))
    with pytest.raises(StoreError, match=r"SQLite 3.* is too old: use a Python built with 3\.32 or newer"):
        Store(str(tmp_path / "d"))
