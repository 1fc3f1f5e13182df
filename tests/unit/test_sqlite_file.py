"""Tests of opening a database file: unsuitable files are refused before anything in them changes."""

import os
import sqlite3
import uuid
from contextlib import closing
from pathlib import Path

import pytest

from ringolib.storage.interface import StoreError
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
