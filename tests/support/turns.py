"""Threads that take turns: one runs at a time, and who goes on is drawn at random. The same draws, the same run.

`Turns` stands in for `threading` and for the clock in the rooms under test. A thread may lose its turn where it takes
a lock, waits, or calls `switch`; with `fine`, before every line of these rooms. Time passes when all wait, and now and
then before. When all wait for ever, or it does not end after `most` turns, that is an error, as is what ends a thread.
"""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any


class Over(BaseException):
    """This run is over: every thread ends where it is."""


class Task:
    """One thread, and what it waits for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.gate = threading.Lock()  # who holds the turn opens the next one's
        self.gate.acquire()
        self.until: Callable[[], bool] | None = None
        self.deadline: float | None = None
        self.done = False
        self.wants: Callable[[], bool] | None = None  # what it waits for, when somebody is to notify it


class Turns:
    """The threads, their clock, and whose turn it is. Made by the thread that is to take part as the first."""

    def __init__(self, rng: Random, often: float, most: int, fine: tuple[str, ...] = ()) -> None:
        self.rng = rng
        self.now = 0.0
        self.over = False
        self.error: BaseException | None = None
        self.may_start: Callable[[str], bool] = lambda name: True
        self.passed = 0
        self._choosing = False  # who is next: what is asked for that is nobody's turn
        self._often = often  # of all points where a turn may end, this part
        self._most = most
        self._fine = fine
        self._main = Task("main")
        self._tasks = [self._main]
        self._threads: list[threading.Thread] = []
        self._of: dict[threading.Thread, Task] = {threading.current_thread(): self._main}

    # In place of `threading`.

    current_thread = staticmethod(threading.current_thread)

    def Lock(self) -> "Lock":
        return Lock(self)

    def Condition(self, lock: "Lock") -> "Condition":
        return Condition(self, lock)

    def Thread(self, target: Callable[..., None], args: Any = (), name: str = "", daemon: bool = True) -> "Thread":
        return Thread(self, target, args, name)

    def monotonic(self) -> float:
        return self.now

    # What threads do.

    def switch(self, often: float | None = None) -> None:
        """Another thread may go on here."""
        if self.over:
            raise Over
        if self.rng.random() < (self._often if often is None else often):
            self._pass(self._of[threading.current_thread()])

    def block(self, until: Callable[[], bool], timeout: float | None = None) -> bool:
        """Others go on until this is true or time is up; whether it is."""
        if self.over:
            raise Over
        if not until() and (timeout is None or timeout > 0):
            task = self._of[threading.current_thread()]
            task.until, task.deadline = until, None if timeout is None else self.now + timeout
            self._pass(task)
            task.until = task.deadline = None
        return until()

    def noting(self, wait_until: Callable[..., bool]) -> Callable[..., bool]:
        """A function that waits on a condition for a predicate, which must not be true when all threads wait."""

        def noted(condition: Condition, predicate: Callable[[], bool], deadline: float | None) -> bool:
            task = self._of[threading.current_thread()]
            task.wants = predicate
            try:
                return wait_until(condition, predicate, deadline)
            finally:
                task.wants = None

        return noted

    def sleep(self, seconds: float) -> None:
        self.block(lambda: False, seconds)

    def start(self, thread: "Thread") -> None:
        task = self._of[thread] = thread.task
        self._tasks.append(task)
        self._threads.append(thread)

    def run(self, thread: "Thread") -> None:
        """A thread's life, from its first turn to its last."""
        thread.task.gate.acquire()
        try:
            if self.over:
                return
            if self._fine:
                sys.settrace(self._trace)
            try:
                thread.work()
            finally:
                if self._fine:
                    sys.settrace(None)
            thread.task.done = True
            self._tasks.remove(thread.task)
            self._next().gate.release()
        except Over:
            pass
        except BaseException as error:
            if not self.over:  # it had the turn
                self.error, self.over = error, True
                self._main.gate.release()

    def fail(self, what: str) -> None:
        """The run is over, as this was found: no room under test has a say in it."""
        if not self.over:
            self.error, self.over = AssertionError(what), True
            if self._of[threading.current_thread()] is not self._main:
                self._main.gate.release()
        raise Over

    def end(self) -> None:
        """Ends all threads, wherever they are. For the first one."""
        self.over = True
        for task in self._tasks:
            if task is not self._main and task.gate.locked():
                task.gate.release()
        for thread in self._threads:
            threading.Thread.join(thread, 20)
            assert not threading.Thread.is_alive(thread)

    def waiting(self) -> str:
        """Who is there, for people."""
        return ", ".join(f"{each.name}{' waits' if each.until else ''}" for each in self._tasks)

    def _pass(self, task: Task) -> None:
        following = self._next()
        if following is not task:
            following.gate.release()
            task.gate.acquire()
            if self.over:
                raise Over

    def _next(self) -> Task:
        """Whose turn it is now."""
        self.passed += 1
        if self.passed > self._most:
            self.fail(f"no end after {self.passed} turns, {self.now:.1f} s: {self.waiting()}")
        self._choosing = True
        self.now += self.rng.random() * 0.002
        if self.rng.random() < 0.02:
            self._leap(60)
        while not (ready := [each for each in self._tasks if self._is_ready(each)]):
            if lost := [each.name for each in self._tasks if each.wants and each.wants()]:
                self.fail(f"nobody has woken {', '.join(lost)}")
            if not self._leap():
                self.fail(f"nobody goes on after {self.now:.1f} s: {self.waiting()}")
        self._choosing = False
        return self.rng.choice(ready)

    def _is_ready(self, task: Task) -> bool:
        return task.until is None or (task.deadline is not None and task.deadline <= self.now) or task.until()

    def _leap(self, most: float = float("inf")) -> bool:
        """It is later now, at most by so many seconds, so that somebody's time is up; False when nobody's is."""
        ahead = [
            each.deadline
            for each in self._tasks
            if each.deadline is not None and self.now < each.deadline < self.now + most
        ]
        if ahead:
            self.now = min(ahead)
        return bool(ahead)

    def _trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._line if Path(frame.f_code.co_filename).name in self._fine else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line" and not self._choosing:
            self.switch(0.03)
        return self._line


class Lock:
    """A `threading.Lock`, before and after which another thread may go on."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._held = False

    def acquire(self) -> bool:
        self._turns.switch()
        self._turns.block(lambda: not self._held)
        self._held = True
        return True

    def release(self) -> None:
        self._held = False

    def locked(self) -> bool:
        return self._held

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *unused: object) -> None:
        self.release()


class Condition:
    """A `threading.Condition`: who of those that wait is notified is drawn."""

    def __init__(self, turns: Turns, lock: Lock) -> None:
        self._turns = turns
        self._lock = lock
        self._waiting: list[object] = []

    def wait(self, timeout: float | None = None) -> bool:
        token = object()
        self._waiting.append(token)
        self._lock.release()
        notified = self._turns.block(lambda: token not in self._waiting, timeout)
        if not notified:
            self._waiting.remove(token)
        self._turns.block(lambda: not self._lock.locked())
        self._lock.acquire()
        return notified

    def notify(self) -> None:
        assert self._lock.locked()
        if self._waiting:
            self._waiting.remove(self._turns.rng.choice(self._waiting))

    def notify_all(self) -> None:
        assert self._lock.locked()
        self._waiting.clear()


class Thread(threading.Thread):
    """A thread that goes on when it is its turn."""

    def __init__(self, turns: Turns, target: Callable[..., None], args: Any, name: str) -> None:
        super().__init__(name=name, daemon=True)  # daemon: so that a test that fails ends
        self._turns = turns
        self.work = lambda: target(*args)
        self.task = Task(name)

    def start(self) -> None:
        if not self._turns.may_start(self.name):
            raise RuntimeError("can't start new thread")
        super().start()
        self._turns.start(self)

    def run(self) -> None:
        self._turns.run(self)

    def join(self, timeout: float | None = None) -> None:
        self._turns.block(lambda: self.task.done, timeout)

    def is_alive(self) -> bool:
        return not self.task.done
