"""TODO: ringolib/status/profile_formats.py."""

import functools
import gzip
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterable
from types import CodeType
from typing import Any, NamedTuple

INTERVAL_NS = 10_000_000
"""A hundred samples a second."""
Place = tuple[CodeType, int]
"""A call: its code, and where in it (`f_lasti`)."""
Stack = tuple[Place, ...]
"""Calls, innermost first."""
_NOT_IN_LINES = str.maketrans(";\r\n", ":  ")


class Site(NamedTuple):
    """A place as people read it."""

    function: str
    file: str
    line: int
    first_line: int


class Cost(NamedTuple):
    """What was seen of a stack: in how many samples, and for how many ns of CPU and of wall time."""

    samples: int
    cpu: int
    wall: int


class Profile(NamedTuple):
    """What `sample` has found: costs by thread (name and the system's id) and stack."""

    started_at: int  # Unix time, ns
    duration: int  # ns
    costs: dict[tuple[str, int, Stack], Cost]


def site(place: Place) -> Site:
    """The function, file and line of a place."""
    code, lasti = place
    lines = (line for start, end, line in code.co_lines() if start <= lasti < end and line)
    line = next(lines, code.co_firstlineno)
    module = os.path.splitext(os.path.basename(code.co_filename))[0]
    name = getattr(code, "co_qualname", code.co_name)  # qualified from Python 3.11 on
    return Site(f"{module}.{name}", code.co_filename, line, code.co_firstlineno)


def pprof(profile: Profile) -> bytes:
    """Gzipped profile.proto with the values samples, cpu and wall, and the thread's name and id as labels."""
    types = [("samples", "count"), ("cpu", "nanoseconds"), ("wall", "nanoseconds")]
    encoder, known = _Encoder(types, default="cpu"), functools.cache(site)
    for (name, native_id, stack), cost in profile.costs.items():
        encoder.sample(map(known, stack), cost, {"thread": name, "thread id": native_id})
    return encoder.done(profile.started_at, profile.duration, ("cpu", "nanoseconds"), INTERVAL_NS)


def pprof_heap(traces: Iterable[tuple[Iterable[tuple[str, int]], int, int]], at: int) -> bytes:
    """Gzipped profile.proto of memory: for each trace its (file, line)s, innermost first, objects, and bytes.

    tracemalloc knows no functions: files and lines stand for them. `at` is Unix time, ns.
    """
    encoder = _Encoder([("inuse_objects", "count"), ("inuse_space", "bytes")], default="inuse_space")
    for places, objects, size in traces:
        sites = (Site(f"{os.path.basename(file)}:{line}", file, line, line) for file, line in places)
        encoder.sample(sites, (objects, size), {})
    return encoder.done(at, 0, ("space", "bytes"), 1)


def collapsed(profile: Profile, value: str) -> str:
    """A line a stack: thread, calls from the outermost on, joined by `;`, and `cpu` or `wall` time in µs."""
    totals: dict[str, int] = defaultdict(int)
    known = functools.cache(site)
    for (name, _, stack), cost in profile.costs.items():
        calls = [name, *(known(place).function for place in reversed(stack))]
        totals[";".join(call.translate(_NOT_IN_LINES) for call in calls)] += getattr(cost, value)
    return "".join(f"{calls} {total // 1000}\n" for calls, total in sorted(totals.items()) if total >= 1000)


def speedscope(profile: Profile, name: str) -> str:
    """Speedscope's JSON: a profile of CPU time and one of wall time, threads as the outermost frames."""
    frames: dict[Site, int] = {}
    known = functools.cache(site)

    def index(of: Site) -> int:
        return frames.setdefault(of, len(frames))

    profiles = []
    stacks = [
        [index(Site(thread, "", 0, 0)), *(index(known(place)) for place in reversed(stack))]
        for thread, _, stack in profile.costs
    ]
    for value in ("cpu", "wall"):
        weights = [getattr(cost, value) for cost in profile.costs.values()]
        used = [n for n, weight in enumerate(weights) if weight]
        profiles.append(
            {
                "type": "sampled",
                "name": value,
                "unit": "nanoseconds",
                "startValue": 0,
                "endValue": sum(weights),
                "samples": [stacks[n] for n in used],
                "weights": [weights[n] for n in used],
            }
        )
    told = [{"name": of.function, **({"file": of.file, "line": of.line} if of.file else {})} for of in frames]
    return json.dumps(
        {
            "$schema": "https://www.speedscope.app/file-format-schema.json",
            "name": name,
            "exporter": "ringoexp",
            "activeProfileIndex": 0,
            "shared": {"frames": told},
            "profiles": profiles,
        }
    )


class _Encoder:
    """Writes a profile.proto: `sample` for each, then `done`."""

    def __init__(self, types: list[tuple[str, str]], default: str) -> None:
        self._strings: dict[str, int] = {"": 0}
        self._functions: dict[Any, int] = {}
        self._locations: dict[Site, int] = {}
        self._out = bytearray()
        for kind, unit in types:
            self._message(1, _number(1, self._string(kind)) + _number(2, self._string(unit)))
        self._default = self._string(default)

    def sample(self, sites: Iterable[Site], values: Iterable[int], labels: dict[str, str | int]) -> None:
        """One stack, innermost call first, its values in the order of the types, and its labels."""
        ids = [self._location(each) for each in sites]
        message = _bytes(1, b"".join(map(_varint, ids))) + _bytes(2, b"".join(map(_varint, values)))
        for key, value in labels.items():
            told = _number(2, self._string(value)) if isinstance(value, str) else _number(3, value)
            message += _bytes(3, _number(1, self._string(key)) + told)
        self._message(2, message)

    def done(self, time_ns: int, duration_ns: int, period_type: tuple[str, str], period: int) -> bytes:
        """The whole, gzipped."""
        kind, unit = map(self._string, period_type)
        program = self._string(sys.executable or "python")
        symbolized = b"".join(_number(field, 1) for field in (7, 8, 9))  # it has functions, files and lines
        self._message(3, _number(1, 1) + _number(5, program) + symbolized)
        for text in self._strings:
            self._out += _bytes(6, text.encode(errors="replace"))
        self._out += _number(9, time_ns) + _number(10, duration_ns)
        self._message(11, _number(1, kind) + _number(2, unit))
        self._out += _number(12, period) + _number(14, self._default)
        return gzip.compress(bytes(self._out), 6)

    def _string(self, text: str) -> int:
        return self._strings.setdefault(text, len(self._strings))

    def _location(self, of: Site) -> int:
        """The id of a place, written where it is new, as is its function."""
        if of not in self._locations:
            self._locations[of] = len(self._locations) + 1
            key = of.function, of.file, of.first_line
            if key not in self._functions:
                self._functions[key] = len(self._functions) + 1
                name = self._string(of.function)
                numbers = [self._functions[key], name, name, self._string(of.file), of.first_line]
                self._message(5, b"".join(_number(n, each) for n, each in enumerate(numbers, 1)))
            line = _number(1, self._functions[key]) + _number(2, of.line)
            self._message(4, _number(1, self._locations[of]) + _number(2, 1) + _bytes(4, line))
        return self._locations[of]

    def _message(self, field: int, content: bytes) -> None:
        self._out += _bytes(field, content)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def _number(field: int, number: int) -> bytes:
    return _varint(field << 3) + _varint(number)


def _bytes(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content
