"""Read pprof files (gzipped profile.proto) by the format's definition, independently of the encoder."""

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


class DecodedProfile(NamedTuple):
    types: list[tuple[str, str]]
    samples: list[Sample]
    mappings: list[str]
    time_ns: int
    duration_ns: int
    period: tuple[tuple[str, str], int]
    default: str


def _varint(data: bytes, offset: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[offset]
        number |= (byte & 127) << shift
        offset, shift = offset + 1, shift + 7
        if byte < 128:
            assert shift <= 70
            return number, offset


def _fields(data: bytes) -> dict[int, list[Any]]:
    """Return the values of each field number. Only two wire types are allowed, as the format uses no others."""
    fields: dict[int, list[Any]] = defaultdict(list)
    offset = 0
    while offset < len(data):
        key, offset = _varint(data, offset)
        assert key & 7 in (0, 2), "a varint or bytes"
        value, offset = _varint(data, offset)
        if key & 7 == 2:
            assert offset + value <= len(data)
            fields[key >> 3].append(data[offset : offset + value])
            offset += value
        else:
            fields[key >> 3].append(value)
    return fields


def _packed(values: list[Any]) -> tuple[int, ...]:
    """Return the numbers of a repeated field, packed or not."""
    numbers = []
    for value in values:
        if isinstance(value, int):
            numbers.append(value)
            continue
        offset = 0
        while offset < len(value):
            number, offset = _varint(value, offset)
            numbers.append(number)
    return tuple(numbers)


def _single(fields: dict[int, list[Any]], field: int) -> Any:
    """Return the value of a field that occurs at most once; 0 if it is missing."""
    (value,) = fields.get(field) or [0]
    return value


def read_profile(content: bytes) -> DecodedProfile:
    """Return the profile. Fails if an id or an index refers to nothing."""
    top = _fields(gzip.decompress(content))
    assert top.keys() <= set(range(1, 15))
    strings = [text.decode() for text in top[6]]
    assert strings[0] == "" and len(set(strings)) == len(strings)

    def value_type(message: bytes) -> tuple[str, str]:
        fields = _fields(message)
        return strings[_single(fields, 1)], strings[_single(fields, 2)]

    mappings = {}
    for message in top[3]:
        fields = _fields(message)
        mappings[_single(fields, 1)] = strings[_single(fields, 5)]
        assert [_single(fields, flag) for flag in (7, 8, 9)] == [1, 1, 1], "has functions, files and lines"
    functions = {}
    for message in top[5]:
        fields = _fields(message)
        assert _single(fields, 1) not in functions and _single(fields, 1) != 0
        functions[_single(fields, 1)] = (strings[_single(fields, 2)], strings[_single(fields, 4)], _single(fields, 5))
    locations = {}
    for message in top[4]:
        fields = _fields(message)
        assert _single(fields, 1) not in locations and _single(fields, 1) != 0 and _single(fields, 2) in mappings
        line = _fields(_single(fields, 4))
        name, file, start = functions[_single(line, 1)]
        locations[_single(fields, 1)] = Call(name, file, _single(line, 2), start)
    types = [value_type(message) for message in top[1]]
    samples = []
    for message in top[2]:
        fields = _fields(message)
        values = _packed(fields[2])
        assert len(values) == len(types)
        calls = tuple(locations[number] for number in _packed(fields[1]))
        samples.append(Sample(calls, values, _labels(fields.get(3, []), strings)))
    return DecodedProfile(
        types,
        samples,
        list(mappings.values()),
        time_ns=_single(top, 9),
        duration_ns=_single(top, 10),
        period=(value_type(_single(top, 11)), _single(top, 12)),
        default=strings[_single(top, 14)],
    )


def _labels(messages: list[bytes], strings: list[str]) -> dict[str, str | int]:
    labels: dict[str, str | int] = {}
    for message in messages:
        label = _fields(message)
        assert (2 in label) != (3 in label), "a label is a text or a number"
        labels[strings[_single(label, 1)]] = strings[_single(label, 2)] if 2 in label else _single(label, 3)
    return labels
