"""Where the threads of this process are, and what they cost: samples of all stacks, and the formats for them.

Runs in the thread of whoever calls `sample`, one at a time, which is left out itself. Nothing is shared but Python's
switch interval, which is shorter meanwhile. No frame is kept for longer than it takes to look at it: it would keep
what its call worked with, and a bytearray with a view of it cannot be resized. So whether a thread has moved is seen by
the address of its innermost frame, by the position in it, and, as another frame may come to lie there, by its clock.

Formats: pprof's profile.proto (https://github.com/google/pprof/blob/main/proto/profile.proto), gzipped; collapsed
stacks, a line each, for flame graphs; speedscope's JSON (https://www.speedscope.app/file-format-schema.json).
"""

import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from time import monotonic_ns, thread_time_ns
from types import FrameType
from typing import NamedTuple

from ringolib.status.profile_formats import INTERVAL_NS, Cost, Profile, Stack

MAX_COST = 11
"""Where a sample takes long, the next one waits for so many times as long: less than a tenth of a core is used."""
SWITCH_SECONDS = 0.0005
"""How soon a thread at work lets go of Python's lock while there is sampling. After Python's usual 5 ms, most have done
what they had to do, and are found where they wait for more: their work would never be seen."""
AWHILE_NS = 3 * INTERVAL_NS
RECHECK = 20
"""The clock of a thread that has been still for AWHILE_NS is looked at in one of so many samples, others' in each."""
MOMENT_NS = 100_000
"""How long to see whether a thread is at work: then it uses CPU for half of it. One that begins to wait uses less."""


class _Places(NamedTuple):
    """Where all threads are: idents, the addresses of the innermost frames, and the positions in them."""

    idents: list[int]
    frames: list[int]
    positions: list[int]


class _Seen:
    """A thread, and where it is: in the same place since it arrived there."""

    __slots__ = ("native_id", "cost", "worked", "number", "since", "cpu", "pending", "runs")

    def __init__(self, native_id: int, cpu: int) -> None:
        self.native_id = native_id
        self.cpu = cpu  # ns, when it was last looked at
        self.pending = 0  # ns of CPU that were spent before it came where it is, nobody has seen where
        self.runs = False  # it used CPU where it is
        self.cost = [0, 0, 0]  # of its stack: samples, cpu, wall
        self.worked: list[int] | None = None  # the same of the last stack in which it was found at work
        self.number = 0  # of the sample that found it there first
        self.since = 0  # monotonic ns of the sample before that one


def sample(seconds: float, wait: Callable[[float], bool]) -> Profile:
    """Samples all threads but the calling one for `seconds`, or until `wait`, which sleeps, returns True.

    Wall time is that between samples. The CPU time that a thread has used since it was last looked at goes to the stack
    it is found in, if it is at work there; if it is not, it waits, and has used its time elsewhere: that goes to the
    next stack in which it is found at work, or else to the last one.
    """
    usual = sys.getswitchinterval()
    sys.setswitchinterval(min(usual, SWITCH_SECONDS))
    try:
        return _sample(seconds, wait)
    finally:
        sys.setswitchinterval(usual)


def _sample(seconds: float, wait: Callable[[float], bool]) -> Profile:
    """See `sample`."""
    me = threading.get_ident()
    found: dict[tuple[str, int, Stack], list[int]] = defaultdict(lambda: [0, 0, 0])
    seen: dict[int, _Seen] = {}
    places = _Places([], [], [])
    restless: set[int] = set()  # who has moved lately, or is at work
    started_at, started = time.time_ns(), monotonic_ns()
    last, end, due, number = started, started + int(seconds * 1e9), started, 0
    while not wait(max(0, due - monotonic_ns()) / 1e9):
        now, cost = monotonic_ns(), thread_time_ns()
        before = places
        frames = sys._current_frames()
        del frames[me]
        # Most threads are still: what is done for each of them is what a sample costs.
        positions = [frame.f_lasti for frame in frames.values()]
        places = _Places(list(frames), list(map(id, frames.values())), positions)
        moved = _moved(before, places)
        asked = restless.union(places.idents[number % RECHECK :: RECHECK])
        moved.update(ident for ident in asked - moved if ident in frames and _has_run(seen[ident]))
        stacks = {ident: _stack(frames[ident]) for ident in moved}
        del frames
        threads = {each.ident: each for each in threading.enumerate()} if moved else {}
        for ident, stack in stacks.items():
            thread, known = seen.get(ident), threads.get(ident)
            native_id = (known and known.native_id) or 0
            if thread is not None:
                _leave(thread, last, number)
            if thread is None or thread.native_id != native_id:  # the ident of one that has ended, perhaps
                if thread is not None:
                    _end(thread)
                born = (thread_cpu(native_id) or 0) - (now - last)  # at most: it was not there at the last sample
                thread = seen[ident] = _Seen(native_id, max(0, born))
                _look(thread)
            thread.number, thread.since = number, last
            thread.cost = found[known.name if known else f"thread-{ident}", native_id, stack]
        if len(seen) > len(places.idents):
            for ident in seen.keys() - set(places.idents):
                gone = seen.pop(ident)
                _leave(gone, last, number)
                _end(gone)
        if moved:
            time.sleep(MOMENT_NS / 1e9)
            for ident in moved:
                _arrive(seen[ident])
        restless = {each for each in restless | moved if each in seen and _is_restless(seen[each], now)}
        last, number = now, number + 1
        if now >= end:
            break
        # What is missed stays missed.
        due = min(max(due + INTERVAL_NS, now + (thread_time_ns() - cost) * MAX_COST), end)
    for thread in seen.values():
        _leave(thread, last, number)
        _end(thread)
    return Profile(started_at, max(1, last - started), {key: Cost(*cost) for key, cost in found.items()})


def _moved(before: _Places, now: _Places) -> set[int]:
    """The idents of the threads that are elsewhere now, or new."""
    if before == now:
        return set()
    if before.idents == now.idents:
        pairs = zip(now.idents, before.frames, now.frames, before.positions, now.positions, strict=True)
        return {ident for ident, a, b, c, d in pairs if a != b or c != d}
    known = dict(zip(before.idents, zip(before.frames, before.positions, strict=True), strict=True))
    places = zip(now.idents, zip(now.frames, now.positions, strict=True), strict=True)
    return {ident for ident, place in places if known.get(ident) != place}


def _is_restless(thread: _Seen, now: int) -> bool:
    """True for a thread whose clock is to be looked at in each sample."""
    return thread.runs or now - thread.since < AWHILE_NS


def _has_run(thread: _Seen) -> bool:
    """True when a thread has used CPU since the last look, so that it may be elsewhere."""
    return thread_cpu(thread.native_id) != thread.cpu


def _leave(thread: _Seen, last: int, number: int) -> None:
    """Counts the time of a thread in its place, where it was until the `last` sample, the one before `number`."""
    thread.cost[0] += number - thread.number
    thread.cost[2] += last - thread.since
    _look(thread)


def _look(thread: _Seen) -> None:
    """Takes note of the CPU time that a thread has used since the last look."""
    cpu = thread_cpu(thread.native_id)
    if cpu is not None:
        thread.pending += max(0, cpu - thread.cpu)
        thread.cpu = cpu


def _arrive(thread: _Seen) -> None:
    """Finds out whether a thread is at work where it is; if so, what nobody has seen it do counts for that place."""
    cpu = thread_cpu(thread.native_id)
    thread.runs = cpu is not None and cpu > thread.cpu + MOMENT_NS // 2
    if thread.runs:
        thread.worked = thread.cost
        thread.cost[1] += thread.pending
        thread.pending = 0


def _end(thread: _Seen) -> None:
    """Nobody will look at this thread any more: what it did unseen counts for where it was last seen at work."""
    (thread.worked or thread.cost)[1] += thread.pending


def _stack(frame: FrameType | None) -> Stack:
    places = []
    while frame:
        places.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return tuple(places)


def thread_cpu(native_id: int) -> int | None:
    """CPU time of a thread of this process in ns; None if it has ended, or the system does not tell.

    Linux only. Not by `time.pthread_getcpuclockid`, which may crash for a thread that has ended: this is the clock's
    number, made as the kernel's MAKE_THREAD_CPUCLOCK does, and an unknown one is an error.
    """
    if not native_id or sys.platform != "linux":
        return None
    try:
        return time.clock_gettime_ns((~native_id << 3) | 6)
    except OSError:
        return None


# Formats.


# https://protobuf.dev/programming-guides/encoding/
