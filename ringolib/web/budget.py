"""The memory of unfinished WebSocket messages and of HTTP bodies: one limit for all clients together.

The ingest loop counts its messages with `add`, which never blocks, and reads on selectively while the budget is `full`.
The thread of an HTTP request calls `hold`, which waits for room. In both groups the oldest large one is always read, so
that something ends and gives its room back. So the memory may exceed the limit by one message and one body, and by
SMALL_SIZE for each connection.

`_lock` guards the sizes. `_freed` is notified when the budget is no longer full, or the oldest body has ended.
"""

import logging
import threading
from collections.abc import Callable

from ringolib.timing import wait_until

log = logging.getLogger("ringoexp.ingest")

MIB = 1024 * 1024
DEFAULT_MIB = 256
SMALL_SIZE = 64 * 1024
"""Bytes of a message or body that are not limited: a body of this size is not counted either."""


class Budget:
    """Counts bytes up to `limit`. `on_room` is called, by any thread, when a full budget has room again."""

    def __init__(self, limit: int = DEFAULT_MIB * MIB) -> None:
        self.limit = limit
        self.on_room: Callable[[], None] = lambda: None  # set once, before there is traffic
        self._lock = threading.Lock()
        self._freed = threading.Condition(self._lock)
        # Guarded by _lock.
        self._held = 0
        self._bodies: dict[object, int] = {}  # bytes of each body, the oldest body first

    @property
    def full(self) -> bool:
        """True if the limit is reached."""
        return self._held >= self.limit  # one read of an int: no lock needed

    @property
    def held(self) -> int:
        """The bytes that are counted now."""
        return self._held

    def add(self, size: int) -> None:
        """Count `size` more bytes, or fewer if it is negative. Never blocks."""
        with self._lock:
            self._change(size)

    def hold(self, body: object, size: int, deadline: float) -> bool:
        """Note that `body` has `size` bytes now. Wait for room unless it is the oldest. False after the deadline."""

        def has_room() -> bool:
            return not self.full or next(iter(self._bodies)) is body

        self.grow(body, size)
        with self._lock:
            if has_room():
                return True
        self.log_waiting()
        with self._lock:
            return wait_until(self._freed, has_room, deadline)

    def grow(self, body: object, size: int) -> None:
        """Note that `body` has `size` bytes now. Never blocks."""
        with self._lock:
            self._change(size - self._bodies.get(body, 0))
            self._bodies[body] = size

    def log_waiting(self) -> None:
        """Log that a client begins to wait for room."""
        hint = "other clients send large messages or bodies slowly; a larger --unfinished admits more at once"
        log.warning("waiting_for_room", {"unfinished": self.held, "limit": self.limit, "hint": hint})

    def release(self, body: object) -> None:
        """Forget a body that is stored, or lost. Does nothing if the body is unknown."""
        if body not in self._bodies:  # a body of this thread: nothing else adds or removes it
            return
        with self._lock:
            was_full = self.full
            self._change(-self._bodies.pop(body))
            self._freed.notify_all()
            has_room = was_full and not self.full
        if has_room:
            self.on_room()

    def _change(self, size: int) -> None:
        assert self._lock.locked()
        was_full = self.full
        self._held += size
        if was_full and not self.full:
            self._freed.notify_all()
