"""Unexpected errors in every place where shared state could become wrong: nothing acked is lost, or doubled.

A message that an error breaks off costs its link only. An error in the ring, in a commit's bookkeeping or in the ingest
loop ends the process with exit status 70; the test starts it again, as a service manager does.
"""

import subprocess
from pathlib import Path
from random import Random

import pytest
from support.broken import EVERY_NTH_MESSAGE
from support.checks import Load, Servers, short_times
from support.harness import DEADLINE, eventually, seeded

from ringolib.timing import EXIT_FATAL


@pytest.fixture(autouse=True)
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    short_times(monkeypatch)


@pytest.mark.parametrize("turns", [20, pytest.param(1000, marks=pytest.mark.long)])
@pytest.mark.parametrize("spooling", [False, True], ids=["link", "spool"])
def test_messages_broken_off_by_errors_keep_exactly_once(tmp_path: Path, spooling: bool, turns: int) -> None:
    """Every third message of a link ends 800 bytes too early, with a MemoryError in the publisher."""
    with Servers(tmp_path, spooling=spooling) as servers:
        servers.kill("publisher")
        servers.start("publisher", patch=f"exec({EVERY_NTH_MESSAGE.format(nth=3)!r})")
        with Load(servers.url, Random(seeded())) as load:
            for turn in range(turns):
                load.goes_on()
                assert not servers.problems(load, still=()), f"turn {turn}"
            load.finish()
            publisher = servers.running["publisher"]
            if spooling:
                eventually(lambda: publisher.stats()["spoolDepth"] == 0)
            assert not load.problems(servers.database, whole=True)
            assert publisher.stats()["linkReconnects"] > turns / 10, "too few messages were broken off"
        errors = publisher.errors.read_text()
    lines = [line for line in errors.splitlines() if "event=worker_error" in line]
    assert lines and all("MemoryError" in line for line in lines)


FAILING = "import itertools; calls = itertools.count(1); real = {owner}.{name}; {owner}.{name} = {function}"
BEFORE = "lambda self, *given: 1 / 0 if next(calls) == 20 else real(self, *given)"
AFTER = "lambda self, *given: (real(self, *given), next(calls) == 20 and 1 / 0)[0]"
PLACES = {
    "ring commit": ("publisher", "ringbuffer.Ring", "commit"),
    "ring free slots": ("publisher", "ringbuffer.Ring", "_advance"),
    "ring try_put": ("publisher", "ringbuffer.Ring", "try_put"),
    "loop acks": ("publisher", "web.loop.IngestLoop", "_settle"),
    "loop reads": ("publisher", "web.loop.IngestLoop", "_offer_backlog"),
    "consumer's loop": ("consumer", "web.loop.IngestLoop", "_settle"),
    "commit thread": ("consumer", "web.intake.StoreIntake", "_commit"),
    "group commit counts": ("consumer", "storage.group_commit.GroupCommit", "_count_commit"),
    "group commit turn": ("consumer", "storage.group_commit.GroupCommit", "_end_turn"),
}


@pytest.mark.parametrize("function", [BEFORE, AFTER], ids=["before", "after"])
@pytest.mark.parametrize("place", PLACES)
def test_error_in_shared_state_ends_the_process_and_loses_nothing(tmp_path: Path, place: str, function: str) -> None:
    role, owner, name = PLACES[place]
    end_by_error(tmp_path, role, FAILING.format(owner=owner, name=name, function=function))


def test_error_in_requeue_ends_the_process_and_loses_nothing(tmp_path: Path) -> None:
    patch = "ringbuffer.Ring.requeue = lambda self, *given: 1 / 0"
    end_by_error(tmp_path, "publisher", patch, then=lambda servers: servers.kill("consumer"))


def end_by_error(directory: Path, role: str, patch: str, then: object = None) -> None:
    """Run both servers, one with `patch`, which makes it end. Start it again, and check what the clients sent."""
    with Servers(directory) as servers:
        servers.kill(role)
        servers.start(role, patch=patch)
        with Load(servers.url, Random(seeded())) as load:
            if callable(then):
                load.goes_on()
                then(servers)
            ended = servers.running[role]
            try:
                assert ended.wait(DEADLINE) == EXIT_FATAL
            except subprocess.TimeoutExpired:
                pytest.fail("the process goes on after an error in shared state")
            dead = role == "consumer" or then is not None
            assert not load.problems(servers.database, dead=dead), "acked before the error"
            errors = ended.errors.read_text()
            (line,) = [line for line in errors.splitlines() if "event=fatal" in line]
            assert "ZeroDivisionError" in line and "place=" in line and "cause=" not in line
            servers.start(role, *(["consumer"] if then else []))
            load.goes_on()
            load.finish()
            assert not load.problems(servers.database, whole=True)
