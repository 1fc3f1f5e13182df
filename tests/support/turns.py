"""A deterministic runtime: one thread runs at a time, a seed decides which one is next, and the clock is simulated.

`Turns` is given to the objects under test in place of `timing.RUNTIME`. A thread loses its turn when it waits on a
condition, or where the test's own network calls `switch` or `block`; never while it holds a lock. Time passes when all
threads wait, and sometimes before. A run fails if all threads wait for ever, if one waits although its predicate is
true and nothing else happens, or if the run takes too many turns. The same seed gives the same run.
"""

import math
import threading
from collections.abc import Callable
from random import Random
from typing import Any

from ringolib.timing import Runtime, ThreadError


class Task:
    """One thread, and the reason why it waits."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.gate = threading.Lock()  # the thread that passes the turn on opens the gate of the next one
        self.gate.acquire()
        self.until: Callable[[], bool] | None = None
        self.deadline = math.inf
        self.predicate: Callable[[], bool] | None = None  # of the condition that it waits on
        self.done = False


class Turns(Runtime):
    """The runtime of one run. The thread that makes it takes part as the first task, `main`; it gets the errors."""

    def __init__(self, rng: Random, max_turns: int) -> None:
        self.rng = rng
        self.now = 0.0
        self.error: AssertionError | None = None
        self.may_start: Callable[[str], bool] = lambda name: True
        self.turns_left = max_turns
        self._main = Task("main")
        self._tasks = [self._main]
        self._task_of = {threading.current_thread(): self._main}

    # The runtime.

    def monotonic(self) -> float:
        return self.now

    def condition(self, lock: threading.Lock) -> Any:
        return Condition(self, lock)

    def wait_until(self, condition: Any, predicate: Callable[[], bool], deadline: float = math.inf) -> bool:
        task = self._task_of[threading.current_thread()]
        while not predicate():
            if self.now >= deadline:
                return False
            task.predicate = predicate
            condition.wait(deadline - self.now)
            task.predicate = None
        return True

    def start_thread(self, target: Callable[..., None], *args: Any, name: str) -> "Thread":
        if not self.may_start(name):
            raise ThreadError("there is no thread")
        thread = Thread(self, lambda: target(*args), name)
        self._task_of[thread] = thread.task
        self._tasks.append(thread.task)
        thread.start()
        return thread

    # For the test.

    def switch(self, rate: float) -> None:
        """Let another thread run, with the probability `rate`."""
        if self.rng.random() < rate:
            self._pass()

    def block(self, until: Callable[[], bool], seconds: float = math.inf) -> bool:
        """Let others run until `until` is true or the time is up. Return whether it is true."""
        task = self._task_of[threading.current_thread()]
        if not until() and seconds > 0:
            task.until, task.deadline = until, self.now + seconds
            self._pass()
            task.until, task.deadline = None, math.inf
        return until()

    def sleep(self, seconds: float) -> None:
        self.block(lambda: False, seconds)

    def fail(self, reason: str) -> None:
        """Note the error. The thread goes on; `main` raises the error when it has its turn."""
        self.error = self.error or AssertionError(reason)

    def forgive(self, turns: int) -> None:
        """After an error: let all threads go on, for at most so many turns, so that they can end."""
        self.error, self.turns_left = None, turns

    def run(self, thread: "Thread") -> None:
        """Run a thread from its first turn to its last."""
        thread.task.gate.acquire()
        try:
            thread.work()
        except BaseException as error:
            self.fail(f"{thread.name} ended with {error!r}")
        thread.task.done = True
        self._tasks.remove(thread.task)
        self._next().gate.release()

    def _pass(self) -> None:
        task = self._task_of[threading.current_thread()]
        following = self._next()
        if following is not task:
            following.gate.release()
            task.gate.acquire()
        if self.error and task is self._main:
            raise self.error

    def _next(self) -> Task:
        """Choose the task that runs next. If all wait, move the clock to the next deadline."""
        self.turns_left -= 1
        if self.turns_left < 0:
            self.fail(f"no end after {self.now:.1f} s: {self._describe()}")
        self.now += self.rng.random() * 0.002
        if self.rng.random() < 0.02:
            self._leap(60)
        while not self.error and not (ready := [task for task in self._tasks if self._is_ready(task)]):
            if forgotten := [task.name for task in self._tasks if task.predicate and task.predicate()]:
                self.fail(f"not notified: {', '.join(forgotten)}")
            elif not self._leap(math.inf):
                self.fail(f"deadlock after {self.now:.1f} s: {self._describe()}")
        return self._main if self.error else self.rng.choice(ready)

    def _is_ready(self, task: Task) -> bool:
        return task.until is None or task.deadline <= self.now or task.until()

    def _leap(self, limit: float) -> bool:
        """Move the clock to the next deadline within `limit` seconds. Return False if no thread has one."""
        ahead = [task.deadline for task in self._tasks if self.now < task.deadline < self.now + limit]
        if ahead:
            self.now = min(ahead)
        return bool(ahead)

    def _describe(self) -> str:
        return ", ".join(f"{task.name}{' waits' if task.until else ''}" for task in self._tasks)


class Condition:
    """A condition that notifies a random one of the waiting threads."""

    def __init__(self, turns: Turns, lock: threading.Lock) -> None:
        self._turns = turns
        self._lock = lock
        self._waiting: list[object] = []

    def wait(self, timeout: float) -> None:
        token = object()
        self._waiting.append(token)
        self._lock.release()
        try:
            self._turns.block(lambda: token not in self._waiting, timeout)
        finally:
            if token in self._waiting:
                self._waiting.remove(token)
            assert self._lock.acquire(blocking=False), "a thread gave its turn away with a lock"

    def notify(self) -> None:
        assert self._lock.locked()
        if self._waiting:
            self._waiting.remove(self._turns.rng.choice(self._waiting))

    def notify_all(self) -> None:
        assert self._lock.locked()
        self._waiting.clear()


class Thread(threading.Thread):
    """A real thread that runs only when it has the turn."""

    def __init__(self, turns: Turns, work: Callable[[], None], name: str) -> None:
        super().__init__(name=f"turns: {name}", daemon=True)  # daemon: a failed run must not keep the process alive
        self._turns = turns
        self.work = work
        self.task = Task(name)

    def run(self) -> None:
        self._turns.run(self)

    def join(self, timeout: float | None = None) -> None:
        self._turns.block(lambda: self.task.done, math.inf if timeout is None else timeout)

    def is_alive(self) -> bool:
        return not self.task.done
