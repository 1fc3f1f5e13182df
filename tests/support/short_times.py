"""Short pauses and timeouts for tests whose links and retries run in this process.

A test module that imports the fixture `short_times` has it applied to each of its tests.
"""

import pytest

from ringolib import timing
from ringolib.net import sockets


def shorten_times(monkeypatch: pytest.MonkeyPatch, first_pause: float = 0.001, max_pause: float = 0.01) -> None:
    """Set the backoff to these seconds, and the closing handshake to at most 0.2 s."""
    monkeypatch.setattr(timing, "BACKOFF_FIRST_SECONDS", first_pause)
    monkeypatch.setattr(timing, "BACKOFF_MAX_SECONDS", max_pause)
    monkeypatch.setattr(sockets, "CLOSE_TIMEOUT", 0.2)


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the times for each test of the module."""
    shorten_times(monkeypatch)
