"""Reads a gzipped profile.proto, by the format's definition and not by what wrote it."""

import gzip
from collections import defaultdict
from typing import Any, NamedTuple


class Call(NamedTuple):
    function: str
    file: str
    line: int
    start: int


class Sample(NamedTuple):
    calls: tuple[Call, ...]  # innermost first
    values: tuple[int, ...]
    labels: dict[str, str | int]


class Read(NamedTuple):
    types: list[tuple[str, str]]
    samples: list[Sample]
    mappings: list[str]
    time_ns: int
    duration_ns: int
    period: tuple[tuple[str, str], int]
    default: str


def _varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[at]
        number |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            assert shift <= 70
            return number, at


def _fields(data: bytes) -> dict[int, list[Any]]:
    """Field number -> values; only the two wire types that the format uses."""
    found: dict[int, list[Any]] = defaultdict(list)
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        assert key & 7 in (0, 2), "a varint or bytes"
        value, at = _varint(data, at)
        if key & 7 == 2:
            assert at + value <= len(data)
            found[key >> 3].append(data[at : at + value])
            at += value
        else:
            found[key >> 3].append(value)
    return found


def _packed(values: list[Any]) -> tuple[int, ...]:
    numbers = []
    for value in values:
        if isinstance(value, int):
            numbers.append(value)
            continue
        at = 0
        while at < len(value):
            number, at = _varint(value, at)
            numbers.append(number)
    return tuple(numbers)


def read_profile(content: bytes) -> Read:
    """The profile; fails where ids or indices lead nowhere."""
    top = _fields(gzip.decompress(content))
    assert top.keys() <= set(range(1, 15))
    strings = [text.decode() for text in top[6]]
    assert strings[0] == "" and len(set(strings)) == len(strings)

    def one(message: dict[int, list[Any]], field: int) -> Any:
        (value,) = message.get(field) or [0]
        return value

    def kind(message: bytes) -> tuple[str, str]:
        fields = _fields(message)
        return strings[one(fields, 1)], strings[one(fields, 2)]

    mappings = {}
    for message in top[3]:
        fields = _fields(message)
        mappings[one(fields, 1)] = strings[one(fields, 5)]
        assert [one(fields, each) for each in (7, 8, 9)] == [1, 1, 1], "it has functions, files and lines"
    functions = {}
    for message in top[5]:
        fields = _fields(message)
        assert one(fields, 1) not in functions and one(fields, 1) != 0
        functions[one(fields, 1)] = (strings[one(fields, 2)], strings[one(fields, 4)], one(fields, 5))
    locations = {}
    for message in top[4]:
        fields = _fields(message)
        assert one(fields, 1) not in locations and one(fields, 1) != 0 and one(fields, 2) in mappings
        line = _fields(one(fields, 4))
        name, file, start = functions[one(line, 1)]
        locations[one(fields, 1)] = Call(name, file, one(line, 2), start)
    types = [kind(message) for message in top[1]]
    samples = []
    for message in top[2]:
        fields = _fields(message)
        labels: dict[str, str | int] = {}
        for each in fields.get(3, []):
            label = _fields(each)
            assert (2 in label) != (3 in label), "a label is a text or a number"
            labels[strings[one(label, 1)]] = strings[one(label, 2)] if 2 in label else one(label, 3)
        values = _packed(fields[2])
        assert len(values) == len(types)
        samples.append(Sample(tuple(locations[n] for n in _packed(fields[1])), values, labels))
    period = kind(one(top, 11)), one(top, 12)
    return Read(types, samples, list(mappings.values()), one(top, 9), one(top, 10), period, strings[one(top, 14)])


def check_speedscope(file: dict[str, object]) -> None:
    """Fails where https://www.speedscope.app/file-format-schema.json, or what it says in words, is not kept."""
    assert file.keys() <= {"$schema", "shared", "profiles", "name", "activeProfileIndex", "exporter"}
    assert file["$schema"] == "https://www.speedscope.app/file-format-schema.json"
    assert isinstance(file["shared"], dict) and isinstance(file["profiles"], list)
    assert file["activeProfileIndex"] in range(len(file["profiles"]))
    frames = file["shared"]["frames"]
    for frame in frames:
        assert isinstance(frame["name"], str) and frame.keys() <= {"name", "file", "line", "col"}
        assert isinstance(frame.get("file", ""), str) and isinstance(frame.get("line", 1), int)
    for profile in file["profiles"]:
        assert profile.keys() == {"type", "name", "unit", "startValue", "endValue", "samples", "weights"}
        assert profile["type"] == "sampled" and profile["unit"] == "nanoseconds" and profile["startValue"] == 0
        assert len(profile["samples"]) == len(profile["weights"]) and profile["endValue"] == sum(profile["weights"])
        assert all(n in range(len(frames)) for stack in profile["samples"] for n in stack)
        assert all(weight > 0 for weight in profile["weights"])
