"""A deterministic scheduler for threads: one thread runs at a time, and a seed decides which one runs next.

`Turns` replaces `threading` and the clock in the modules under test. A thread may lose its turn when it takes a lock,
waits, or calls `switch`, and also before every line of the files in `traced`. Time passes when all threads wait, and
sometimes before. A run fails if all threads wait forever, if it takes more than `max_turns` turns, or if a thread ends
with an exception. The same seed gives the same run.
"""

import math
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any


class Over(BaseException):
    """The run is over: every thread ends where it is."""


class Task:
    """One thread, and the reason why it waits."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.gate = threading.Lock()  # the thread that passes the turn on opens the gate of the next one
        self.gate.acquire()
        self.until: Callable[[], bool] | None = None
        self.deadline: float | None = None
        self.done = False
        self.predicate: Callable[[], bool] | None = None  # of the condition that it waits on


class Turns:
    """The scheduler of a run. The thread that makes it takes part as the first task, `main`."""

    def __init__(self, rng: Random, switch_rate: float, max_turns: int, traced: tuple[str, ...] = ()) -> None:
        self.rng = rng
        self.now = 0.0
        self.over = False
        self.error: BaseException | None = None
        self.may_start: Callable[[str], bool] = lambda name: True
        self.passed = 0
        self._choosing = False  # the scheduler calls predicates, which must not switch
        self._switch_rate = switch_rate  # the share of possible switches that take place
        self._max_turns = max_turns
        self._traced = traced
        self._main = Task("main")
        self._tasks = [self._main]
        self._threads: list[threading.Thread] = []
        self._task_of: dict[threading.Thread, Task] = {threading.current_thread(): self._main}

    # In place of `threading` and the clock.

    TIMEOUT_MAX = threading.TIMEOUT_MAX
    current_thread = staticmethod(threading.current_thread)

    def Lock(self) -> "Lock":
        return Lock(self)

    def Condition(self, lock: "Lock") -> "Condition":
        return Condition(self, lock)

    def Thread(self, target: Callable[..., None], args: Any = (), name: str = "", daemon: bool = True) -> "Thread":
        return Thread(self, target, args, name)

    def monotonic(self) -> float:
        return self.now

    # Called by the threads of the run.

    def switch(self, rate: float | None = None) -> None:
        """Let another thread run, with the probability `rate`."""
        if self.over:
            raise Over
        if self.rng.random() < (self._switch_rate if rate is None else rate):
            self._pass(self._task_of[threading.current_thread()])

    def block(self, until: Callable[[], bool], timeout: float | None = None) -> bool:
        """Let others run until `until` is true or the time is up. Return whether it is true."""
        if self.over:
            raise Over
        if not until() and (timeout is None or timeout > 0):
            task = self._task_of[threading.current_thread()]
            task.until, task.deadline = until, None if timeout is None else self.now + timeout
            self._pass(task)
            task.until = task.deadline = None
        return until()

    def watched(self, wait_until: Callable[..., bool]) -> Callable[..., bool]:
        """Wrap `timing.wait_until`: the run fails if all threads wait although the predicate of one is true."""

        def wait(condition: Condition, predicate: Callable[[], bool], deadline: float = math.inf) -> bool:
            task = self._task_of[threading.current_thread()]
            task.predicate = predicate
            try:
                return wait_until(condition, predicate, deadline)
            finally:
                task.predicate = None

        return wait

    def sleep(self, seconds: float) -> None:
        self.block(lambda: False, seconds)

    def start(self, thread: "Thread") -> None:
        task = self._task_of[thread] = thread.task
        self._tasks.append(task)
        self._threads.append(thread)

    def run(self, thread: "Thread") -> None:
        """Run a thread from its first turn to its last."""
        thread.task.gate.acquire()
        try:
            if self.over:
                return
            if self._traced:
                sys.settrace(self._trace)
            try:
                thread.work()
            finally:
                if self._traced:
                    sys.settrace(None)
            thread.task.done = True
            self._tasks.remove(thread.task)
            self._next().gate.release()
        except Over:
            pass
        except BaseException as error:
            if not self.over:  # this thread has the turn
                self.error, self.over = error, True
                self._main.gate.release()

    def fail(self, reason: str) -> None:
        """End the run as failed. The modules under test cannot catch it."""
        if not self.over:
            self.error, self.over = AssertionError(reason), True
            if self._task_of[threading.current_thread()] is not self._main:
                self._main.gate.release()
        raise Over

    def end(self) -> None:
        """End all threads, wherever they are. Called by the first thread."""
        self.over = True
        for task in self._tasks:
            if task is not self._main and task.gate.locked():
                task.gate.release()
        for thread in self._threads:
            threading.Thread.join(thread, 20)
            assert not threading.Thread.is_alive(thread)

    def describe(self) -> str:
        """Return the names of the threads, and which of them wait, for messages."""
        return ", ".join(f"{task.name}{' waits' if task.until else ''}" for task in self._tasks)

    def _pass(self, task: Task) -> None:
        following = self._next()
        if following is not task:
            following.gate.release()
            task.gate.acquire()
            if self.over:
                raise Over

    def _next(self) -> Task:
        """Choose the task that runs next. If all wait, move the clock to the next deadline."""
        self.passed += 1
        if self.passed > self._max_turns:
            self.fail(f"no end after {self.passed} turns, {self.now:.1f} s: {self.describe()}")
        self._choosing = True
        self.now += self.rng.random() * 0.002
        if self.rng.random() < 0.02:
            self._leap(60)
        while not (ready := [task for task in self._tasks if self._is_ready(task)]):
            if forgotten := [task.name for task in self._tasks if task.predicate and task.predicate()]:
                self.fail(f"not notified: {', '.join(forgotten)}")
            if not self._leap():
                self.fail(f"deadlock after {self.now:.1f} s: {self.describe()}")
        self._choosing = False
        return self.rng.choice(ready)

    def _is_ready(self, task: Task) -> bool:
        return task.until is None or (task.deadline is not None and task.deadline <= self.now) or task.until()

    def _leap(self, limit: float = float("inf")) -> bool:
        """Move the clock to the next deadline within `limit` seconds. Return False if there is no such deadline."""
        ahead = [
            task.deadline
            for task in self._tasks
            if task.deadline is not None and self.now < task.deadline < self.now + limit
        ]
        if ahead:
            self.now = min(ahead)
        return bool(ahead)

    def _trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._trace_line if Path(frame.f_code.co_filename).name in self._traced else None

    def _trace_line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line" and not self._choosing:
            self.switch(0.03)
        return self._trace_line


class Lock:
    """A `threading.Lock` with a possible switch before it is taken."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._held = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if not blocking:  # the start of a thread, which has no turn yet
            is_free, self._held = not self._held, True
            return is_free
        self._turns.switch()
        is_free = self._turns.block(lambda: not self._held, None if timeout < 0 else timeout)
        self._held = True
        return is_free

    def release(self) -> None:
        self._held = False

    def locked(self) -> bool:
        return self._held

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *unused: object) -> None:
        self.release()


class Condition:
    """A `threading.Condition` that notifies a random one of the waiting threads."""

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
    """A real thread that runs only when it has the turn."""

    def __init__(self, turns: Turns, target: Callable[..., None], args: Any, name: str) -> None:
        super().__init__(name=name, daemon=True)  # daemon: a failed test must not keep the process alive
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
