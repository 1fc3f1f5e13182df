"""The largest depth of the ring between looks: each reader sees it since its own last look."""

import threading
from array import array
from contextlib import suppress

from support.harness import DEADLINE, Blocked

from ringbuffer import Ring, RingLayout
from ringolib.status import peaks
from ringolib.status.peaks import Peaks

SOURCE = bytes(16)


def fill(ring: Ring, count: int) -> None:
    """Put so many values, and take them out again."""
    ring.put(array("q", range(count)), SOURCE, ring.cursor)
    with suppress(TimeoutError):
        while True:
            ring.commit(ring.reserve(count, timeout=0))


def test_two_readers_see_the_same_burst() -> None:
    ring, looks = Ring(100), Peaks()
    first = looks.look(ring).cursor
    second = looks.look(ring).cursor
    fill(ring, 40)
    for reader in (first, second):
        layout = looks.look(ring)
        assert (layout.cursor - layout.committed, looks.since(reader)) == (0, 40)
    assert looks.since(layout.cursor) == 0, "it was before the last look"


def test_reader_misses_no_burst_between_other_readers_looks() -> None:
    ring, looks = Ring(100), Peaks()
    fill(ring, 90)
    slow = looks.look(ring).cursor
    for count in (5, 60, 7):
        fill(ring, count)
        looks.look(ring)
        looks.look(ring)  # nothing was put in between
    assert looks.since(slow) == 60


def test_cursor_of_an_earlier_run_covers_all_looks() -> None:
    ring, looks = Ring(100), Peaks()
    fill(ring, 30)
    looks.look(ring)
    assert looks.since(10**18) == looks.since(0) == 30
    assert Peaks().since(5) == 0


def test_old_looks_are_merged_and_not_forgotten() -> None:
    ring, looks = Ring(100), Peaks()
    fill(ring, 80)
    for _ in range(2 * peaks.MAX_LOOKS):
        fill(ring, 1)
        looks.look(ring)
    assert len(looks._looks) == peaks.MAX_LOOKS
    assert looks.since(0) == 80
    assert looks.since(looks.look(ring).cursor - 2) == 1


class SlowRing(Ring):
    """Its first layout returns only when the test allows it."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.looked, self.allowed = threading.Event(), threading.Event()

    def layout(self) -> RingLayout:
        layout = super().layout()
        if not self.looked.is_set():
            self.looked.set()
            assert self.allowed.wait(DEADLINE)
        return layout


def test_look_waits_until_the_one_before_is_noted() -> None:
    """Otherwise the second reader would miss the measurement that the first one ended."""
    ring, looks = SlowRing(100), Peaks()
    fill(ring, 70)
    first = Blocked(lambda: looks.look(ring))
    assert ring.looked.wait(DEADLINE)
    second = Blocked(lambda: (looks.look(ring), looks.since(0)))
    assert second.still()
    ring.allowed.set()
    assert first.result().highest == second.result()[1] == 70
