"""Encode profiles for `go tool pprof` and other readers of pprof files, such as speedscope.

The format is profile.proto (https://github.com/google/pprof/blob/main/proto/profile.proto), in the Protocol Buffers
wire format (https://protobuf.dev/programming-guides/encoding/), gzipped. Functions only, no state and no threads.
"""

import functools
import gzip
import os
import sys
from collections.abc import Iterable
from typing import NamedTuple

from ringolib.status.sampler import INTERVAL_NS, CodePosition, Profile

# Field numbers of the message Profile.
_SAMPLE_TYPE, _SAMPLE, _MAPPING, _LOCATION, _FUNCTION, _STRING_TABLE = range(1, 7)
_TIME_NANOS, _DURATION_NANOS, _PERIOD_TYPE, _PERIOD = range(9, 13)
_DEFAULT_SAMPLE_TYPE = 14

_MAPPING_ID = 1
"""The id of the only mapping: the program's file."""


class Location(NamedTuple):
    """A line of source code: its function, its file, its number, and the number of the function's first line."""

    function: str
    file: str
    line: int
    first_line: int


def locate(position: CodePosition) -> Location:
    """Return the source line of a position in code."""
    code, instruction = position
    lines = (line for start, end, line in code.co_lines() if start <= instruction < end and line)
    line = next(lines, code.co_firstlineno)
    module = os.path.splitext(os.path.basename(code.co_filename))[0]
    name = getattr(code, "co_qualname", code.co_name)  # Python 3.10 has no qualified names
    return Location(f"{module}.{name}", code.co_filename, line, code.co_firstlineno)


def encode_profile(profile: Profile) -> bytes:
    """Return a profile as a pprof file.

    Each sample has the values samples, cpu and wall, and the name and id of its thread as labels.
    """
    types = [("samples", "count"), ("cpu", "nanoseconds"), ("wall", "nanoseconds")]
    encoder = _Encoder(types, default="cpu")
    cached_locate = functools.cache(locate)
    for (name, native_id, stack), cost in profile.costs.items():
        encoder.add_sample(map(cached_locate, stack), cost, {"thread": name, "thread id": native_id})
    return encoder.finish(profile.started_at, profile.duration, ("cpu", "nanoseconds"), INTERVAL_NS)


def encode_heap(traces: Iterable[tuple[Iterable[tuple[str, int]], int, int]], time_ns: int) -> bytes:
    """Return a heap profile as a pprof file.

    A trace is its files and lines, innermost first, its number of objects, and their bytes. tracemalloc does not
    know functions, so a file and line takes the place of a function's name. `time_ns` is Unix time.
    """
    encoder = _Encoder([("inuse_objects", "count"), ("inuse_space", "bytes")], default="inuse_space")
    for lines, objects, size in traces:
        locations = (Location(f"{os.path.basename(file)}:{line}", file, line, line) for file, line in lines)
        encoder.add_sample(locations, (objects, size), {})
    return encoder.finish(time_ns, 0, ("space", "bytes"), 1)


class _Encoder:
    """Build one pprof file: `add_sample` for each stack, then `finish`.

    Strings, functions and locations are written once and referred to by index or id.
    """

    def __init__(self, types: list[tuple[str, str]], default: str) -> None:
        self._strings: dict[str, int] = {"": 0}
        self._functions: dict[tuple[str, str, int], int] = {}
        self._locations: dict[Location, int] = {}
        self._out = bytearray()
        for value_type in types:
            self._add_message(_SAMPLE_TYPE, self._value_type(value_type))
        self._default = self._string(default)

    def add_sample(self, locations: Iterable[Location], values: Iterable[int], labels: dict[str, str | int]) -> None:
        """Add a stack, innermost call first, with its values in the order of the types, and its labels."""
        ids = [self._location(location) for location in locations]
        message = _bytes_field(1, b"".join(map(_varint, ids))) + _bytes_field(2, b"".join(map(_varint, values)))
        for key, value in labels.items():
            if isinstance(value, str):
                content = _number_field(2, self._string(value))
            else:
                content = _number_field(3, value)
            message += _bytes_field(3, _number_field(1, self._string(key)) + content)
        self._add_message(_SAMPLE, message)

    def finish(self, time_ns: int, duration_ns: int, period_type: tuple[str, str], period: int) -> bytes:
        """Return the gzipped file."""
        encoded_type = self._value_type(period_type)
        program = self._string(sys.executable or "python")
        symbolized = b"".join(_number_field(field, 1) for field in (7, 8, 9))  # has functions, files and lines
        self._add_message(_MAPPING, _number_field(1, _MAPPING_ID) + _number_field(5, program) + symbolized)
        for text in self._strings:  # complete now: nothing below adds a string
            self._add_message(_STRING_TABLE, text.encode(errors="replace"))
        self._out += _number_field(_TIME_NANOS, time_ns) + _number_field(_DURATION_NANOS, duration_ns)
        self._add_message(_PERIOD_TYPE, encoded_type)
        self._out += _number_field(_PERIOD, period) + _number_field(_DEFAULT_SAMPLE_TYPE, self._default)
        return gzip.compress(bytes(self._out), 6)

    def _value_type(self, value_type: tuple[str, str]) -> bytes:
        kind, unit = map(self._string, value_type)
        return _number_field(1, kind) + _number_field(2, unit)

    def _string(self, text: str) -> int:
        """Return the index of a string in the string table."""
        return self._strings.setdefault(text, len(self._strings))

    def _location(self, location: Location) -> int:
        """Return the id of a location, and write the location if it is new."""
        if location not in self._locations:
            self._locations[location] = len(self._locations) + 1
            line = _number_field(1, self._function(location)) + _number_field(2, location.line)
            message = _number_field(1, self._locations[location]) + _number_field(2, _MAPPING_ID)
            self._add_message(_LOCATION, message + _bytes_field(4, line))
        return self._locations[location]

    def _function(self, location: Location) -> int:
        """Return the id of a location's function, and write the function if it is new."""
        key = location.function, location.file, location.first_line
        if key not in self._functions:
            self._functions[key] = len(self._functions) + 1
            name = self._string(location.function)
            # Fields 1 to 5: id, name, system name, file name, first line.
            values = [self._functions[key], name, name, self._string(location.file), location.first_line]
            self._add_message(_FUNCTION, b"".join(_number_field(n, value) for n, value in enumerate(values, 1)))
        return self._functions[key]

    def _add_message(self, field: int, content: bytes) -> None:
        self._out += _bytes_field(field, content)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def _number_field(field: int, number: int) -> bytes:
    return _varint(field << 3) + _varint(number)


def _bytes_field(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content
