"""The memory that unfinished messages and HTTP bodies share."""

import tracemalloc
from types import SimpleNamespace

from support.harness import Blocked, eventually

from ringolib.counters import Totals
from ringolib.timing import deadline_after
from ringolib.web.budget import Budget
from wsserver import Handler


def test_body_waits_until_another_one_ends_but_not_the_oldest() -> None:
    budget = Budget(100)
    assert budget.hold("oldest", 90, deadline_after(5))
    waiting = Blocked(lambda: budget.hold("other", 20, deadline_after(20)))
    assert waiting.still()
    assert budget.hold("oldest", 200, deadline_after(5)), "the oldest body goes on"
    budget.release("oldest")
    assert waiting.result() and budget.held == 20
    budget.release("other")
    budget.release("other")
    assert budget.held == 0


def test_decoded_body_counts_without_waiting() -> None:
    """Its integers are in memory already."""
    budget = Budget(100)
    assert budget.hold("oldest", 90, deadline_after(5))
    budget.grow("other", 50)
    budget.grow("other", 60)
    assert budget.full and budget.held == 150
    budget.release("other")
    assert budget.held == 90


def test_body_gives_up_at_its_deadline() -> None:
    budget = Budget(100)
    budget.add(100)
    assert budget.hold("oldest", 10, deadline_after(5))
    assert not budget.hold("other", 10, deadline_after(0.01))


def test_messages_and_bodies_make_room_for_each_other() -> None:
    budget, rooms = Budget(100), []
    budget.on_room = lambda: rooms.append(budget.held)
    budget.add(60)
    budget.hold("oldest", 60, deadline_after(5))
    assert budget.full
    budget.release("oldest")
    assert rooms == [60], "the loop is notified"
    budget.hold("oldest", 10, deadline_after(5))
    budget.add(40)
    waiting = Blocked(lambda: budget.hold("other", 1, deadline_after(20)))
    assert waiting.still()
    budget.add(-60)
    assert waiting.result()
    eventually(lambda: budget.held == 51)


def test_body_in_tiny_pieces_needs_little_more_than_its_bytes() -> None:
    handler, size = object.__new__(Handler), 60_000
    handler.server = SimpleNamespace(budget=Budget(), totals=Totals())  # type: ignore[assignment]
    pieces = (bytes((at % 251, 1)) for at in range(size // 2))
    handler.read_piece = lambda deadline: next(pieces, b"")  # type: ignore[method-assign]
    tracemalloc.start()
    try:
        body = handler._read_body(size)
        assert len(body) == size and tracemalloc.get_traced_memory()[1] < 2 * size
    finally:
        tracemalloc.stop()
