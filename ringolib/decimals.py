"""Integers as people write them: decimal text and JSON to integers.

Pure functions, no I/O, no threads, no locks. They decode a body in pieces of PIECE_SIZE bytes, so that a large one does
not hold Python's lock for long. A pattern matches the integers that are complete in a piece. The next piece begins
behind them.
"""

import re
from array import array

from ringolib.wire import Buffer, WireError

PIECE_SIZE = 32 * 1024
"""Bytes that are decoded at once."""
MAX_DIGITS = 19
"""Digits of a 64-bit integer, without leading zeros."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")

_BLANK = rb"[ \t\r\n]*"
_JSON_INTEGER = rb"-?(?:0|[1-9][0-9]*)"
_JSON_ARRAY = rb"\[%b(?:%b(?:%b,%b%b)*%b)?\]" % (_BLANK, _JSON_INTEGER, _BLANK, _BLANK, _JSON_INTEGER, _BLANK)
_JSON_LINES = re.compile(rb"(?:%b(?:%b|%b)[ \t\r]*\n)*" % (_BLANK, _JSON_INTEGER, _JSON_ARRAY))
"""Integers and arrays, each with the end of its line."""
_LINE_END = re.compile(rb"[ \t\r]*(?:\n|\Z)")
_BLANKS = re.compile(_BLANK)
_SEPARATOR = re.compile(rb"%b,?%b" % (_BLANK, _BLANK))
_TO_BLANKS = bytes.maketrans(b",[]", b"   ")
_TOKEN = re.compile(rb"[^ \t\r\n,]{0,100}")
_DECIMAL = re.compile(rb"[+-]?[0-9]+")
_FRACTION = re.compile(rb"[+-]?[0-9]*\.?[0-9]*(?:[eE][+-]?[0-9]+)?")
_NOT_TEXT = re.compile(rb"[^ -~]")
_OCTETS_HINT = "for integers as bytes, send Content-Type: application/octet-stream"


def parse_integer(text: bytes) -> int:
    """Return a decimal integer of 64 bits. It may have any number of leading zeros, which `int` limits.

    Raises ValueError or OverflowError for other texts.
    """
    sign, digits = (text[:1], text[1:]) if text[:1] in (b"-", b"+") else (b"", text)
    digits = digits.lstrip(b"0") or digits[-1:]
    if not digits.isdigit() or len(digits) > MAX_DIGITS:
        raise ValueError
    return array("q", [int(sign + digits)])[0]


class IntegerError(WireError):
    """A body is not a list of integers. `index` is the number of valid integers before the first fault."""

    def __init__(self, reason: str, index: int, status: int = 400) -> None:
        super().__init__(reason, status=status)
        self.index = index


class _Syntax:
    """The patterns of a list of integers.

    `one` matches an integer and its separator, up to the next integer. `many` matches any number of them. `last`
    matches the last integer.
    """

    def __init__(self, integer: bytes, separator: bytes) -> None:
        one = rb"%b(?:%b)(?=[0-9+-])" % (integer, separator)  # looks ahead, so that it never ends within a separator
        self.one = re.compile(one)
        self.many = re.compile(rb"(?:%b)*" % one)
        self.last = re.compile(integer + _BLANK)


_TEXT = _Syntax(rb"[+-]?[0-9]+", rb"%b,%b|[ \t\r\n]+" % (_BLANK, _BLANK))
_JSON_ITEMS = _Syntax(_JSON_INTEGER, rb"%b,%b" % (_BLANK, _BLANK))


def decode_text(body: Buffer, limit: int, is_form: bool = False) -> "array[int]":
    """Return the integers of a text: decimal, separated by white space, or by a comma with or without white space.

    `limit` is the maximum number of integers. `is_form` is true for the type of a form, which `curl` sends by
    itself. Raises IntegerError.
    """
    decoder = _Decoder(body, limit, is_form=is_form)
    decoder.take_list(_TEXT, decoder.begin(), len(body))
    return decoder.finish()


def decode_json(body: Buffer, limit: int) -> "array[int]":
    """Return the integers of a JSON value, or of several values on lines of their own (NDJSON).

    A value is an integer, or an array of integers. Blank lines are skipped. `limit` is the maximum number of integers.
    Raises IntegerError.
    """
    decoder = _Decoder(body, limit, is_json=True)
    at, end = decoder.begin(), len(body)
    while at < end:
        match = _JSON_LINES.match(body, at, at + PIECE_SIZE)
        if match and match.end() > at:
            decoder.convert(match)
            at = match.end()
        else:  # the last value, or one that is larger than a piece, or an invalid one
            at = decoder.take_value(_end_of(_BLANKS, body, at))
    return decoder.finish()


class _Decoder:
    """The integers of one body so far."""

    def __init__(self, body: Buffer, limit: int, is_form: bool = False, is_json: bool = False) -> None:
        self._values = array("q")
        self._body = body
        self._limit = limit
        self._is_form = is_form
        self._is_json = is_json

    def begin(self) -> int:
        """Return the offset behind a byte order mark and white space. Raises IntegerError for the mark of UTF-16."""
        if self._body[:2] in UTF_16_MARKS:
            raise IntegerError("the text is UTF-16: send UTF-8", 0)
        return _end_of(_BLANKS, self._body, len(BYTE_ORDER_MARK) if self._body.startswith(BYTE_ORDER_MARK) else 0)

    def finish(self) -> "array[int]":
        """Return the integers. Raises IntegerError if the body has no integers."""
        if not self._values:
            raise IntegerError("the body has no integers: send at least one", 0)
        return self._values

    def take_list(self, syntax: _Syntax, at: int, end: int) -> None:
        """Decode the integers between two offsets. The first one begins at `at`."""
        if at >= end:
            return
        while True:
            match = syntax.many.match(self._body, at, min(at + PIECE_SIZE, end))
            if not match or match.end() == at:  # the last one, or one larger than a piece, or an invalid one
                match = syntax.one.match(self._body, at, end)
            if not match:
                break
            self.convert(match)
            at = match.end()
        match = syntax.last.match(self._body, at, end)
        if not match:
            raise self._fault(at)
        if match.end() < end:
            raise self._fault_behind(match)
        self.convert(match)

    def take_value(self, at: int) -> int:
        """Decode the JSON value at an offset. Return the offset behind its line."""
        body = self._body
        if body[at : at + 1] == b"[":
            close = body.find(b"]", at)
            self.take_list(_JSON_ITEMS, _end_of(_BLANKS, body, at + 1), len(body) if close < 0 else close)
            if close < 0:
                raise self._fault(len(body), "expected ]")
            value_end = close + 1
        elif at < len(body):
            match = _JSON_ITEMS.last.match(body, at)
            if not match:
                raise self._fault(at)
            value_end = len(match[0].rstrip()) + at
            if not _LINE_END.match(body, value_end):
                raise self._fault_behind(match, "expected a new line")
            self.convert(match)
        else:
            return at
        if not _LINE_END.match(body, value_end):
            raise self._fault(_end_of(_BLANKS, body, value_end), "expected a new line")
        return _end_of(_LINE_END, body, value_end)

    def convert(self, match: "re.Match[bytes]") -> None:
        """Append the integers of a match."""
        tokens = match[0].translate(_TO_BLANKS).split()
        try:
            if len(match[0]) > 2 * PIECE_SIZE:
                raise ValueError
            self._values.extend(array("q", list(map(int, tokens))))
        except (ValueError, OverflowError):  # beyond 64 bits, or with more leading zeros than `int` accepts
            self._convert_each(tokens, match.start())
        if len(self._values) > self._limit:
            reason = f"the body has more than {self._limit} integers: send several smaller requests"
            raise IntegerError(reason, self._limit, 413)

    def _convert_each(self, tokens: list[bytes], at: int) -> None:
        for token in tokens:
            at = self._body.index(token, at)
            try:
                self._values.append(parse_integer(token))
            except (ValueError, OverflowError):
                hint = "; curl -d @FILE removes the ends of lines: use --data-binary @FILE" if self._is_form else ""
                raise self._fault(at, f"does not fit into 64 bits{hint}") from None
            at += len(token)

    def _fault_behind(self, match: "re.Match[bytes]", fault: str = "") -> IntegerError:
        """Return the error for an integer, or for what follows it."""
        integer_end = match.start() + len(match[0].rstrip())
        separator_end = _end_of(_SEPARATOR, self._body, integer_end)
        if separator_end == integer_end:
            return self._fault(match.start())
        self.convert(match)
        return self._fault(separator_end, fault)

    def _fault(self, at: int, fault: str = "") -> IntegerError:
        """Return the error for the bytes at an offset. The text does not repeat them, because errors are logged."""
        body = self._body
        match = _TOKEN.match(body, at)
        token = match[0] if match else b""
        if self._is_json:
            token = token.partition(b"]")[0]
        line, start = body.count(b"\n", 0, at) + 1, body.rfind(b"\n", 0, at) + 1
        where = f"integer {len(self._values) + 1} (line {line}, byte {at - start + 1})"
        hint = ""
        if token[:1] in (b"[", b"{") and not self._is_json:
            hint = "; for JSON, send Content-Type: application/json"
        elif b"\0" in token and _DECIMAL.fullmatch(token.replace(b"\0", b"")):
            hint = "; the text seems to be UTF-16: send UTF-8"
        elif self._is_form and not fault or _NOT_TEXT.search(token):
            hint = f"; {_OCTETS_HINT}"
        return IntegerError(f"{where}: {fault or self._describe(at, token)}{hint}", len(self._values))

    def _describe(self, at: int, token: bytes) -> str:
        if self._body[at : at + 1] == b",":
            return "expected a decimal integer before this comma"
        comma = self._body.rfind(b",", 0, at)
        if not token and comma >= 0 and not self._body[comma + 1 : at].strip():
            return "expected a decimal integer after the comma"
        if self._is_json and _JSON_ITEMS.last.fullmatch(token):
            return "expected a comma"
        if self._is_json and _DECIMAL.fullmatch(token):
            return "a leading zero or plus sign is not valid JSON"
        if _FRACTION.fullmatch(token) and token.strip(b"+-."):
            return "a fraction or an exponent is not supported"
        return "expected a decimal integer"


def _end_of(pattern: "re.Pattern[bytes]", body: Buffer, at: int) -> int:
    match = pattern.match(body, at)
    return match.end() if match else at
