"""Decimal text and JSON as integers: the formats, the position of a fault, limits, and the cuts between pieces."""

import json
import random
import re
from array import array
from collections.abc import Callable
from time import monotonic

import pytest
from support.harness import seeded

from ringolib import decimals
from ringolib.decimals import IntegerError, decode_json, decode_text

LIMIT = 1_048_576
OCTETS = "; for integers as bytes, send Content-Type: application/octet-stream"


def text(body: bytes, limit: int = LIMIT) -> list[int]:
    return list(decode_text(bytearray(body), limit))


def from_json(body: bytes, limit: int = LIMIT) -> list[int]:
    return list(decode_json(bytearray(body), limit))


def fault(decode: Callable[[bytes], object], body: bytes) -> tuple[int, str]:
    with pytest.raises(IntegerError) as refused:
        decode(body)
    assert refused.value.status == 400
    return refused.value.index, str(refused.value)


@pytest.mark.parametrize(
    ("body", "values"),
    [
        (b"42", [42]),
        (b"1 2\t3,4 ,5, 6\r\n7\n\n8\n", [1, 2, 3, 4, 5, 6, 7, 8]),
        (b"\xef\xbb\xbf 1", [1]),
        (b"+5 -0 -007", [5, 0, -7]),
        (b"9223372036854775807 -9223372036854775808", [2**63 - 1, -(2**63)]),
        (b"0" * 100_000 + b"1,2", [1, 2]),
        (b"1" + b" " * 100_000 + b"2", [1, 2]),
        (b"1" + b" " * 100_000 + b"," + b"\n" * 100_000 + b"2", [1, 2]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_text_is_separated_by_white_space_or_a_comma(body: bytes, values: list[int]) -> None:
    assert text(body) == values


@pytest.mark.parametrize(
    ("body", "values"),
    [
        (b"42", [42]),
        (b" [1, -2,\n\t3 ] \r\n", [1, -2, 3]),
        (b"1\n[2,3]\r\n\n[]\n  4", [1, 2, 3, 4]),
        (b"-0", [0]),
        (b"[9223372036854775807,-9223372036854775808]", [2**63 - 1, -(2**63)]),
        (b"[1" + b" " * 100_000 + b",2]\n" + b"\n" * 100_000 + b"3", [1, 2, 3]),
        (b"[" + b",".join([b"7"] * 50_000) + b"]\n8\n[9]", [7] * 50_000 + [8, 9]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_json_is_integers_and_arrays_on_lines(body: bytes, values: list[int]) -> None:
    assert from_json(body) == values


EXPECTED = "expected a decimal integer"
FRACTION = "a fraction or an exponent is not supported"
NOT_JSON = "a leading zero or plus sign is not valid JSON"
TOO_LARGE = "does not fit into 64 bits"


@pytest.mark.parametrize(
    ("body", "index", "reason"),
    [
        (b"", 0, "the body has no integers: send at least one"),
        (b" \n", 0, "the body has no integers: send at least one"),
        (b"1 2\n3 x", 3, f"integer 4 (line 2, byte 3): {EXPECTED}"),
        (b"x", 0, f"integer 1 (line 1, byte 1): {EXPECTED}"),
        (b"1x", 0, f"integer 1 (line 1, byte 1): {EXPECTED}"),
        (b"0x10", 0, f"integer 1 (line 1, byte 1): {EXPECTED}"),
        (b"1 1_0", 1, f"integer 2 (line 1, byte 3): {EXPECTED}"),
        (b"1;2", 0, f"integer 1 (line 1, byte 1): {EXPECTED}"),
        (b"- 1", 0, f"integer 1 (line 1, byte 1): {EXPECTED}"),
        (b"1 --2", 1, f"integer 2 (line 1, byte 3): {EXPECTED}"),
        (b"1]", 0, f"integer 1 (line 1, byte 1): {EXPECTED}"),
        (b"1e3", 0, f"integer 1 (line 1, byte 1): {FRACTION}"),
        (b"1 -.5", 1, f"integer 2 (line 1, byte 3): {FRACTION}"),
        (b",1", 0, f"integer 1 (line 1, byte 1): {EXPECTED} before this comma"),
        (b"1,,2", 1, f"integer 2 (line 1, byte 3): {EXPECTED} before this comma"),
        (b"1, \n,2", 1, f"integer 2 (line 2, byte 1): {EXPECTED} before this comma"),
        (b"1,2, ", 2, f"integer 3 (line 1, byte 6): {EXPECTED} after the comma"),
        (b"1\n9223372036854775808\n3", 1, f"integer 2 (line 2, byte 1): {TOO_LARGE}"),
        (b"1 -9223372036854775809", 1, f"integer 2 (line 1, byte 3): {TOO_LARGE}"),
        (b"1" * 100_000, 0, f"integer 1 (line 1, byte 1): {TOO_LARGE}"),
        (b"5 " * 30_000 + b"x", 30_000, f"integer 30001 (line 1, byte 60001): {EXPECTED}"),
        (b"[1,2]", 0, f"integer 1 (line 1, byte 1): {EXPECTED}; for JSON, send Content-Type: application/json"),
        (b"\xff\xfe1\0", 0, "the text is UTF-16: send UTF-8"),
        (b"1\0 \x002\0", 0, f"integer 1 (line 1, byte 1): {EXPECTED}; the text seems to be UTF-16: send UTF-8"),
        (b"\0\0\0\x2a", 0, f"integer 1 (line 1, byte 1): {EXPECTED}{OCTETS}"),
        ("1 \u0662".encode(), 1, f"integer 2 (line 1, byte 3): {EXPECTED}{OCTETS}"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_text_says_where_the_first_fault_is(body: bytes, index: int, reason: str) -> None:
    assert fault(text, body) == (index, reason)


@pytest.mark.parametrize(
    ("body", "index", "reason"),
    [
        (b"", 0, "the body has no integers: send at least one"),
        (b"[]\n", 0, "the body has no integers: send at least one"),
        (b"true", 0, f"integer 1 (line 1, byte 1): {EXPECTED}"),
        (b"[1, NaN]", 1, f"integer 2 (line 1, byte 5): {EXPECTED}"),
        (b'["1"]', 0, f"integer 1 (line 1, byte 2): {EXPECTED}"),
        (b'1\n{"value": 2}', 1, f"integer 2 (line 2, byte 1): {EXPECTED}"),
        (b"[[1]]", 0, f"integer 1 (line 1, byte 2): {EXPECTED}"),
        (b"[" * 1_000_000, 0, f"integer 1 (line 1, byte 2): {EXPECTED}"),
        (b"]", 0, f"integer 1 (line 1, byte 1): {EXPECTED}"),
        (b"[1.0]", 0, f"integer 1 (line 1, byte 2): {FRACTION}"),
        (b"1E3", 0, f"integer 1 (line 1, byte 1): {FRACTION}"),
        (b"01", 0, f"integer 1 (line 1, byte 1): {NOT_JSON}"),
        (b"[1,+2]", 1, f"integer 2 (line 1, byte 4): {NOT_JSON}"),
        (b"[,1]", 0, f"integer 1 (line 1, byte 2): {EXPECTED} before this comma"),
        (b"[1,]", 1, f"integer 2 (line 1, byte 4): {EXPECTED} after the comma"),
        (b"[1 2]", 1, "integer 2 (line 1, byte 4): expected a comma"),
        (b"[1\n2]", 1, "integer 2 (line 2, byte 1): expected a comma"),
        (b"[1", 1, "integer 2 (line 1, byte 3): expected ]"),
        (b"3\n[", 1, "integer 2 (line 2, byte 2): expected ]"),
        (b"1 2", 1, "integer 2 (line 1, byte 3): expected a new line"),
        (b"1,2", 1, "integer 2 (line 1, byte 3): expected a new line"),
        (b"1\r2", 1, "integer 2 (line 1, byte 3): expected a new line"),
        (b"[1][2]", 1, "integer 2 (line 1, byte 4): expected a new line"),
        (b"[1]]", 1, "integer 2 (line 1, byte 4): expected a new line"),
        (b"[1,9223372036854775808,3]", 1, f"integer 2 (line 1, byte 4): {TOO_LARGE}"),
        (b"\xff\xfe1\0", 0, "the text is UTF-16: send UTF-8"),
        (b"\0\0\0\x2a", 0, f"integer 1 (line 1, byte 1): {EXPECTED}{OCTETS}"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_json_says_where_the_first_fault_is(body: bytes, index: int, reason: str) -> None:
    assert fault(from_json, body) == (index, reason)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"value=42", f"integer 1 (line 1, byte 1): {EXPECTED}{OCTETS}"),
        (b"\0\0\0\x2a", f"integer 1 (line 1, byte 1): {EXPECTED}{OCTETS}"),
        (b"1.5", f"integer 1 (line 1, byte 1): {FRACTION}{OCTETS}"),
        (b"1" * 20, f"integer 1 (line 1, byte 1): {TOO_LARGE}; curl -d @FILE removes the ends of lines: "
         "use --data-binary @FILE"),
    ],
)  # fmt: skip
def test_form_is_told_what_curl_does(body: bytes, reason: str) -> None:
    assert fault(lambda body: decode_text(body, LIMIT, is_form=True), body) == (0, reason)


def test_body_of_too_many_integers_is_413() -> None:
    assert text(b"1 2 3", 3) == from_json(b"[1,2,3]", 3) == [1, 2, 3]
    for decode, body in ((text, b"1 2 3 4"), (from_json, b"[1,2,3,4]"), (from_json, b"1\n2\n3\n4\n")):
        with pytest.raises(IntegerError, match="more than 3 integers: send several smaller requests") as refused:
            decode(body, 3)
        assert refused.value.status == 413


def reference(body: bytes) -> list[int] | None:
    """Return the integers of a JSON body, as the `json` module reads them; None if it is invalid."""
    decoder, body_text, values, at = json.JSONDecoder(), body.decode(), [], 0
    while match := re.compile(r"[ \t\r\n]*(?=[^ \t\r\n])").match(body_text, at):
        try:
            value, at = decoder.raw_decode(body_text, match.end())
        except ValueError:
            return None
        items = value if isinstance(value, list) else [value]
        if not all(type(item) is int and -(2**63) <= item < 2**63 for item in items):
            return None
        if not (line_end := re.compile(r"[ \t\r]*(\n|$)").match(body_text, at)):
            return None
        values += items
        at = line_end.end()
    return values or None


TOKENS = [b"0", b"7", b"-12", b"12345678901234567890", b",", b",", b" ", b"\n", b"\n", b"[", b"]", b"1.5", b"x", b"\r"]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 17, decimals.PIECE_SIZE])
def test_json_agrees_with_the_json_module(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(decimals, "PIECE_SIZE", size)
    rng = random.Random(seeded())
    valid = 0
    for _ in range(3000):
        body = b"".join(rng.choices(TOKENS, k=rng.randrange(1, 9)))
        expected = reference(body)
        valid += expected is not None
        if expected is None:
            with pytest.raises(IntegerError):
                from_json(body)
        else:
            assert from_json(body) == expected, body
    assert valid > 100


@pytest.mark.parametrize("size", [1, 2, 3, 5, 17, decimals.PIECE_SIZE])
def test_pieces_of_any_size_give_the_same_integers(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    rng = random.Random(seeded())
    separators = [b" ", b"\n", b",", b" , ", b"\r\n", b" ,\n\t", b"   "]
    values = [rng.randrange(-(2**63), 2**63) >> rng.randrange(64) for _ in range(300)]
    body = b"".join(b"%d%b" % (value, rng.choice(separators)) for value in values[:-1]) + b"%d" % values[-1]
    bad = body.replace(b"%d" % values[200], b"?", 1)
    where = fault(text, bad)
    monkeypatch.setattr(decimals, "PIECE_SIZE", size)
    assert text(body) == values
    assert fault(text, bad) == where
    array_body = json.dumps(values).encode()
    assert from_json(array_body) == from_json(array_body.replace(b", ", b"\n ,\n")) == values
    assert from_json(b"\n".join(b"[%d]\n%d" % (value, value) for value in values)) == [v for v in values for _ in "xy"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        b" " * 2_000_000 + b"1",
        (b"1" + b" " * 40_000) * 50,
        b"1," * 1_000_000 + b"x",
        b"0" * 2_000_000 + b"x",
        b"-" * 2_000_000,
        b"[" + b"1," * 1_000_000,
        b"[\n" + b"[]\n" * 500_000,
        b"[]\n" * 500_000 + b"[",
        (b"[1,\n2]\n" + b"\n" * 40_000) * 50 + b"x",
    ],
    ids=lambda body: body[:10].decode(),
)
def test_hostile_body_takes_time_in_proportion_to_its_size(body: bytes) -> None:
    """2 MB take less than a second. A pattern that goes back would take minutes."""
    for decode in (text, from_json):
        started = monotonic()
        try:
            decode(body)
        except IntegerError:
            pass
        assert monotonic() - started < 10


def test_body_is_not_changed() -> None:
    body = bytearray(b"\xef\xbb\xbf[1, 2]\n")
    assert decode_json(body, LIMIT) == array("q", [1, 2]) and body == b"\xef\xbb\xbf[1, 2]\n"
