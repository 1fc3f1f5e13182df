"""A POST of records, without I/O: the numbers of its records, the integers in its body, and the error if it fails."""

import re
from array import array
from typing import NamedTuple
from urllib.parse import parse_qsl
from uuid import UUID

from ringolib.decimals import IntegerError, decode_json, decode_text
from ringolib.net.frames import MAX_MESSAGE
from ringolib.web.headers import FORM_TYPE, JSON_TYPES, TEXT_TYPE, Refusal
from ringolib.web.uuids import new_source
from ringolib.wire import MAX_SEQUENCE, Buffer, Run, WireError, decode_plain

MAX_INTEGERS = MAX_MESSAGE // 8
"""Integers of a body, at most: as many as fit into a binary one."""
_UUID = re.compile(r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
_FIRST = re.compile(r"[0-9]{1,19}")
_EXAMPLE = "for example ?source=00112233-4455-6677-8899-aabbccddeeff&first=0"


class Numbering(NamedTuple):
    """The source of a request's records, and the number of the first one.

    `by_client` is true if the client has chosen both, so that it may repeat the request.
    """

    source: bytes
    first: int
    by_client: bool

    def run(self, count: int) -> Run:
        """Return the run of the request's records. Raises Refusal if their numbers are too large."""
        if self.first + count > MAX_SEQUENCE:
            raise Refusal(400, f"first + the number of integers is {self.first + count}: it may be at most 2**63 - 1")
        return Run(self.source, self.first, count)


def parse_numbering(query: str) -> Numbering:
    """Return the numbering that the query asks for: `source=UUID&first=N`, or a new source. Raises Refusal.

    Without the two parameters, others are ignored.
    """
    pairs = parse_qsl(query, keep_blank_values=True) if query else []
    given = dict(pairs)
    if not {name.lower() for name in given} & {"source", "first"}:
        return Numbering(new_source(), 0, False)
    if sorted(name for name, _ in pairs) != ["first", "source"]:
        raise Refusal(400, f"the query must have source and first, each once, and nothing else: {_EXAMPLE}")
    if not _UUID.fullmatch(given["source"]):
        raise Refusal(400, f"source must be a UUID: {_EXAMPLE}")
    if not _FIRST.fullmatch(given["first"]) or int(given["first"]) >= MAX_SEQUENCE:
        raise Refusal(400, f"first must be a whole number from 0 to 2**63 - 2: {_EXAMPLE}")
    return Numbering(UUID(given["source"]).bytes, int(given["first"]), True)


def decode_body(content_type: str, body: Buffer) -> "array[int]":
    """Return the integers of a body of this type. Raises Refusal."""
    try:
        if content_type in (TEXT_TYPE, FORM_TYPE):
            return decode_text(body, MAX_INTEGERS, is_form=content_type == FORM_TYPE)
        if content_type in JSON_TYPES:
            return decode_json(body, MAX_INTEGERS)
        return decode_plain(body)
    except IntegerError as error:
        raise Refusal(error.status, str(error), fields={"index": error.index}) from error
    except WireError as error:
        hint = "" if content_type else f"; for decimal text, send Content-Type: {TEXT_TYPE}"
        raise Refusal(error.status, f"{error}{hint}") from error


def not_stored(
    cause: str, accepted: int = 0, total: int = 0, ending: bool = False, may_repeat: bool = False
) -> Refusal:
    """Return the error for a POST of which at most `accepted` records are stored, or will be, unless the server ends.

    If the client has numbered its records, it may repeat the request. Otherwise the text says which of the records the
    client may send again.
    """
    record, was, them = ("record", "was", "it") if accepted == 1 else ("records", "were", "them")
    if may_repeat and accepted:
        again = "send the same request again later, which stores no record twice"
        text = f"not acknowledged: {cause}: {again}"
    elif not accepted:
        text = f"not stored: {cause}: send the whole request again later"
    elif accepted < total:
        rest = total - accepted
        text = f"{accepted} of {total} records {was} accepted: send only the other {rest} again later; {cause}"
    elif ending:
        text = f"{accepted} {record} {was} accepted, but the server may end before it has stored {them}; {cause}"
    else:
        text = f"{accepted} {record} {was} accepted and will be stored later: do not send {them} again; {cause}"
    return Refusal(503, text, {"Retry-After": "5"}, {"accepted": accepted})
