"""Sample the stacks of all threads of this process, and count wall time and CPU time for each stack.

`sample` runs in the thread that calls it, one call at a time, and leaves that thread out. It shares nothing but
Python's switch interval, which it shortens while it runs.

Moves. A sample costs little because most threads have not moved since the previous one. The sampler keeps no frames to
compare: a frame keeps the variables of its call alive, and a bytearray cannot be resized while one of them is a view
of it. Instead it remembers the address of each thread's innermost frame and the position in that frame. If either
differs, the thread has moved. A new frame can lie at the address of an old one, so a thread whose CPU clock has
advanced counts as moved too.

Wall time. The time between two samples belongs to the stack that the second sample finds.

CPU time. Only the total of a thread is known, from its CPU clock; the stacks in which it was spent are not.
1. When a thread has moved, the CPU time since the last reading of its clock becomes *unassigned*.
2. The sampler waits for PROBE_NS and reads the clock again. If the clock has advanced by more than half of that, the
   thread is running in its new stack, and the unassigned time is counted for this stack.
3. Otherwise the thread waits there, and it has used the CPU before it came there. The time stays unassigned until a
   sample finds the thread running.
4. When the thread or the sampling ends, unassigned time is counted for the last stack in which the thread was found
   running, or for the current stack if the thread was never found running.
"""

import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from time import monotonic_ns, thread_time_ns
from types import CodeType, FrameType
from typing import NamedTuple

INTERVAL_NS = 10_000_000
"""Time between two samples: a hundred samples a second."""
PAUSE_FACTOR = 11
"""The time between two samples is at least the CPU time of the first one multiplied by this: expensive samples are
taken less often, and the sampler uses less than a tenth of a core."""
SWITCH_INTERVAL_SECONDS = 0.0005
"""Python's switch interval while sampling. A running thread keeps the interpreter lock for one switch interval before
the sampler gets it. With the usual 5 ms most threads finish their work within that time and are found waiting."""
PROBE_NS = 100_000
"""Time between the two readings of the CPU clock that show whether a thread is running."""
IDLE_AFTER_NS = 3 * INTERVAL_NS
"""A thread that is not running and has not moved for this time is idle."""
IDLE_CHECK_SAMPLES = 20
"""The CPU clock of an idle thread is read in one of this many samples; the clocks of all others in each sample."""

CodePosition = tuple[CodeType, int]
"""The code object of a call, and the index of its current instruction (`f_lasti`)."""
Stack = tuple[CodePosition, ...]
"""The calls of a thread, innermost first."""


class Cost(NamedTuple):
    """The samples that found a stack, and its CPU time and wall time in nanoseconds."""

    samples: int
    cpu: int
    wall: int


class Profile(NamedTuple):
    """The result of `sample`: a cost for each thread (name and the system's id) and stack."""

    started_at: int  # Unix time, ns
    duration: int  # ns
    costs: dict[tuple[str, int, Stack], Cost]


def sample(seconds: float, wait: Callable[[float], bool]) -> Profile:
    """Sample all threads except the calling one for `seconds`, and return the profile.

    `wait` sleeps for the seconds it is given. If it returns True, the sampling ends early.
    """
    usual = sys.getswitchinterval()
    sys.setswitchinterval(min(usual, SWITCH_INTERVAL_SECONDS))
    try:
        return _sample_all(seconds, wait)
    finally:
        sys.setswitchinterval(usual)


def thread_cpu(native_id: int) -> int | None:
    """Return the CPU time of a thread of this process in ns, or None if it has ended or the system is not Linux.

    `time.pthread_getcpuclockid` may crash for a thread that has ended. So the clock's number is computed here, as the
    kernel's MAKE_THREAD_CPUCLOCK does, and an ended thread is an OSError.
    """
    if not native_id or sys.platform != "linux":
        return None
    try:
        return time.clock_gettime_ns((~native_id << 3) | 6)
    except OSError:
        return None


def _sample_all(seconds: float, wait: Callable[[float], bool]) -> Profile:
    started_at, started = time.time_ns(), monotonic_ns()
    sampler = _Sampler(started)
    due, end = started, started + int(seconds * 1e9)
    while not wait(max(0, due - monotonic_ns()) / 1e9):
        now, cpu = monotonic_ns(), thread_time_ns()
        sampler.take_sample(now)
        if now >= end:
            break
        # Missed samples are not made up for: a burst of samples would count one moment several times.
        due = min(max(due + INTERVAL_NS, now + (thread_time_ns() - cpu) * PAUSE_FACTOR), end)
    costs = sampler.finish()
    return Profile(started_at, max(1, sampler.last_sample_at - started), costs)


class _Positions(NamedTuple):
    """For each thread its ident, the address of its innermost frame, and the position in that frame."""

    idents: list[int]
    frames: list[int]
    instructions: list[int]

    def moved_since(self, before: "_Positions") -> set[int]:
        """Return the idents of threads that are new or in another position than `before`."""
        if before == self:
            return set()
        if before.idents == self.idents:
            pairs = zip(self.idents, before.frames, self.frames, before.instructions, self.instructions, strict=True)
            return {ident for ident, frame, frame_now, at, at_now in pairs if frame != frame_now or at != at_now}
        known = dict(zip(before.idents, zip(before.frames, before.instructions, strict=True), strict=True))
        positions = zip(self.idents, zip(self.frames, self.instructions, strict=True), strict=True)
        return {ident for ident, position in positions if known.get(ident) != position}


class _ThreadState:
    """A sampled thread and its current stay: the time for which it has not moved."""

    __slots__ = ("native_id", "cpu", "unassigned", "running", "cost", "last_running_cost", "first_sample", "since")

    def __init__(self, native_id: int, cpu: int) -> None:
        self.native_id = native_id
        self.cpu = cpu  # ns, at the last reading of the clock
        self.unassigned = 0  # ns of CPU time that belong to no stack yet
        self.last_running_cost: list[int] | None = None  # of the last stack in which the thread was found running

        # The current stay.
        self.running = False
        self.cost = [0, 0, 0]  # of the current stack: samples, cpu, wall
        self.first_sample = 0  # number of the sample that found it here first
        self.since = 0  # monotonic ns of the sample before that one

    def begin_stay(self, cost: list[int], sample_number: int, since: int) -> None:
        """Begin a stay in the stack that `cost` belongs to."""
        self.cost = cost
        self.first_sample = sample_number
        self.since = since

    def end_stay(self, sample_number: int, until: int) -> None:
        """Count the current stay, which lasted `until` the sample before `sample_number`, and read the clock."""
        self.cost[0] += sample_number - self.first_sample
        self.cost[2] += until - self.since
        self.read_clock()

    def read_clock(self) -> None:
        """Add the CPU time since the last reading to the unassigned time."""
        cpu = thread_cpu(self.native_id)
        if cpu is not None:
            self.unassigned += max(0, cpu - self.cpu)
            self.cpu = cpu

    def has_run(self) -> bool:
        """True if the thread has used CPU time since the last reading. Then it may have moved."""
        return thread_cpu(self.native_id) != self.cpu

    def check_running(self) -> None:
        """Find out if the thread is running, PROBE_NS after `begin_stay`; if it is, assign the unassigned time."""
        cpu = thread_cpu(self.native_id)
        self.running = cpu is not None and cpu > self.cpu + PROBE_NS // 2
        if self.running:
            self.last_running_cost = self.cost
            self.cost[1] += self.unassigned
            self.unassigned = 0

    def assign_rest(self) -> None:
        """Assign the unassigned time at the end of the thread or of the sampling."""
        cost = self.cost if self.last_running_cost is None else self.last_running_cost
        cost[1] += self.unassigned

    def is_idle(self, now: int) -> bool:
        """True if the thread is not running and has not moved for IDLE_AFTER_NS."""
        return not self.running and now - self.since >= IDLE_AFTER_NS


class _Sampler:
    """The samples of one `sample` call. Belongs to the calling thread."""

    def __init__(self, started: int) -> None:
        self.last_sample_at = started  # monotonic ns
        self._own_ident = threading.get_ident()
        self._sample_number = 0
        self._costs: dict[tuple[str, int, Stack], list[int]] = defaultdict(lambda: [0, 0, 0])
        self._threads: dict[int, _ThreadState] = {}  # by ident
        self._active: set[int] = set()  # idents of threads that are not idle
        self._positions = _Positions([], [], [])

    def take_sample(self, now: int) -> None:
        """Take one sample at `now` (monotonic ns)."""
        stacks = self._moved_stacks()
        threads = {thread.ident: thread for thread in threading.enumerate()} if stacks else {}
        for ident, stack in stacks.items():
            self._move(ident, stack, threads.get(ident), now)
        self._remove_ended()
        if stacks:
            time.sleep(PROBE_NS / 1e9)
            for ident in stacks:
                self._threads[ident].check_running()
        self._active = {
            ident
            for ident in self._active.union(stacks)
            if ident in self._threads and not self._threads[ident].is_idle(now)
        }
        self.last_sample_at = now
        self._sample_number += 1

    def finish(self) -> dict[tuple[str, int, Stack], Cost]:
        """End the stays of all threads and return the costs."""
        for thread in self._threads.values():
            thread.end_stay(self._sample_number, self.last_sample_at)
            thread.assign_rest()
        return {key: Cost(*cost) for key, cost in self._costs.items()}

    def _moved_stacks(self) -> dict[int, Stack]:
        """Return the stacks of the threads that have moved. All frames are released on return."""
        frames = sys._current_frames()
        del frames[self._own_ident]
        # This is done for every thread, so it decides how much a sample costs.
        instructions = [frame.f_lasti for frame in frames.values()]
        before = self._positions
        self._positions = _Positions(list(frames), list(map(id, frames.values())), instructions)
        moved = self._positions.moved_since(before)
        idents = self._positions.idents
        checked = self._active.union(idents[self._sample_number % IDLE_CHECK_SAMPLES :: IDLE_CHECK_SAMPLES])
        moved.update(ident for ident in checked - moved if ident in frames and self._threads[ident].has_run())
        return {ident: _stack(frames[ident]) for ident in moved}

    def _move(self, ident: int, stack: Stack, thread: threading.Thread | None, now: int) -> None:
        """Begin a stay of a thread in another stack. `thread` is None if Python did not start the thread."""
        native_id = (thread and thread.native_id) or 0
        state = self._threads.get(ident)
        if state is not None:
            state.end_stay(self._sample_number, self.last_sample_at)
            if state.native_id != native_id:  # that thread has ended, and a new one has its ident
                state.assign_rest()
                state = None
        if state is None:
            state = self._threads[ident] = self._new_thread(native_id, now)
        name = thread.name if thread else f"thread-{ident}"
        state.begin_stay(self._costs[name, native_id, stack], self._sample_number, self.last_sample_at)

    def _new_thread(self, native_id: int, now: int) -> _ThreadState:
        """Return the state of a new thread.

        The previous sample did not find it, so of its CPU time at most the time since that sample is counted.
        """
        cpu_before = (thread_cpu(native_id) or 0) - (now - self.last_sample_at)
        state = _ThreadState(native_id, max(0, cpu_before))
        state.read_clock()
        return state

    def _remove_ended(self) -> None:
        """End the stays of threads that the current sample did not find."""
        if len(self._threads) == len(self._positions.idents):
            return
        for ident in self._threads.keys() - set(self._positions.idents):
            state = self._threads.pop(ident)
            state.end_stay(self._sample_number, self.last_sample_at)
            state.assign_rest()


def _stack(frame: FrameType | None) -> Stack:
    positions = []
    while frame:
        positions.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return tuple(positions)
