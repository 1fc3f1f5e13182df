"""`Peaks`: the largest depth of the ring since any earlier look at it.

The live page looks once a second at a ring that may fill and empty a hundred times in between. The ring measures its
largest depth from one look to the next. Several pages and Prometheus look at the same ring, each at its own times, so
this module keeps the measurement of each look. A reader names its own earlier look by the cursor that the ring had
then.

Any thread may use it. `_lock` guards the looks, and is held while the ring is looked at: if two looks could be noted in
the wrong order, a reader would miss the first one's measurement.
"""

import threading
from collections import deque

from ringbuffer import Ring, RingLayout

MAX_LOOKS = 256
"""How many looks are kept. Older ones are merged into the oldest one that is kept."""


class Peaks:
    """The latest looks at a ring, oldest first: its cursor, and its largest depth since the look before."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._looks: deque[tuple[int, int]] = deque()

    def look(self, ring: Ring) -> RingLayout:
        """Return the ring's layout, and keep its measurement."""
        with self._lock:
            layout = ring.layout()
            if not self._looks or self._looks[-1][0] < layout.cursor:  # else nothing was put: no depth was larger
                self._looks.append((layout.cursor, layout.highest))
            if len(self._looks) > MAX_LOOKS:
                _, merged = self._looks.popleft()
                cursor, highest = self._looks[0]
                self._looks[0] = cursor, max(merged, highest)
        return layout

    def since(self, cursor: int) -> int:
        """Return the largest depth since the look at which the ring had this cursor, up to the last look.

        If the look is too old to be known, or is one of an earlier run, the time covered is longer.
        """
        with self._lock:
            newest = self._looks[-1][0] if self._looks else 0
            return max((highest for at, highest in self._looks if at > cursor or cursor > newest), default=0)
