"""Fixtures of the store tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from store import Store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The path of a database that does not exist yet."""
    return tmp_path / "numbers.db"


@pytest.fixture
def opened(path: Path) -> Iterator[Store]:
    """An open store at `path`."""
    opened = Store(str(path))
    yield opened
    opened.close()
