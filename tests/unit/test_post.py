"""A POST without sockets: the numbers of its records, the integers of each type, and the texts of a 503."""

import uuid

import pytest

from ringolib.web.headers import Refusal
from ringolib.web.post import decode_body, not_stored, parse_numbering
from ringolib.wire import Run

SOURCE = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")


@pytest.mark.parametrize(
    ("query", "first"),
    [
        (f"source={SOURCE}&first=0", 0),
        (f"first=007&source={str(SOURCE).upper()}", 7),
        (f"source={SOURCE}&first={2**63 - 2}", 2**63 - 2),
        (f"%73ource={str(SOURCE).replace('-', '%2D')}&first=%31", 1),
    ],
)
def test_source_and_first_number_the_records(query: str, first: int) -> None:
    numbering = parse_numbering(query)
    assert numbering == (SOURCE.bytes, first, True)
    assert numbering.run(1) == Run(SOURCE.bytes, first, 1)


@pytest.mark.parametrize("query", ["", "a=b", "a", "&", "token=x&token=y", "=", "%"])
def test_request_without_source_and_first_has_a_new_source(query: str) -> None:
    one, other = parse_numbering(query), parse_numbering(query)
    assert (one.first, one.by_client) == (0, False)
    assert one.source != other.source and uuid.UUID(bytes=one.source).version == 7


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        (f"source={SOURCE}", "must have source and first"),
        ("first=0", "must have source and first"),
        ("source", "must have source and first"),
        (f"Source={SOURCE}&First=0", "must have source and first"),
        (f"source={SOURCE}&frist=0", "must have source and first"),
        (f"source={SOURCE}&first=0&last=1", "must have source and first"),
        (f"source={SOURCE}&first=0&first=0", "must have source and first"),
        (f"source={SOURCE}&source={SOURCE}&first=0", "must have source and first"),
        (f"source={SOURCE};first=0", "must have source and first"),
        ("source=&first=0", "source must be a UUID"),
        (f"source={{{SOURCE}}}&first=0", "source must be a UUID"),
        (f"source={SOURCE.hex}&first=0", "source must be a UUID"),
        (f"source={SOURCE}0&first=0", "source must be a UUID"),
        (f"source={SOURCE}&first=", "first must be a whole number"),
        (f"source={SOURCE}&first=-1", "first must be a whole number"),
        (f"source={SOURCE}&first=+1", "first must be a whole number"),
        (f"source={SOURCE}&first=1.0", "first must be a whole number"),
        (f"source={SOURCE}&first=%D9%A1", "first must be a whole number"),
        (f"source={SOURCE}&first={2**63 - 1}", "first must be a whole number"),
        (f"source={SOURCE}&first={'9' * 5000}", "first must be a whole number"),
    ],
)
def test_bad_source_or_first_is_400(query: str, reason: str) -> None:
    with pytest.raises(Refusal, match=reason) as refused:
        parse_numbering(query)
    assert refused.value.status == 400


def test_numbers_end_where_those_of_batches_end() -> None:
    numbering = parse_numbering(f"source={SOURCE}&first={2**63 - 3}")
    assert numbering.run(2).count == 2
    with pytest.raises(Refusal, match=f"is {2**63}: it may be at most") as refused:
        numbering.run(3)
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("", b"\0\0\0\0\0\0\0\1\xff\xff\xff\xff\xff\xff\xff\xfe"),
        ("application/octet-stream", b"\0\0\0\0\0\0\0\1\xff\xff\xff\xff\xff\xff\xff\xfe"),
        ("text/plain", b"1,-2"),
        ("application/x-www-form-urlencoded", b"1\n-2\n"),
        ("application/json", b"[1, -2]"),
        ("application/x-ndjson", b"1\n-2\n"),
        ("application/ndjson", b"1\n-2"),
        ("application/jsonl", b"[1]\n[-2]"),
    ],
)
def test_content_type_decides_how_a_body_is_read(content_type: str, body: bytes) -> None:
    assert list(decode_body(content_type, bytearray(body))) == [1, -2]


def test_digits_without_a_type_are_bytes() -> None:
    assert list(decode_body("", b"1234")) == [825373492]
    for content_type, hint in (("", "Content-Type: text/plain$"), ("application/octet-stream", "multiple of 8$")):
        with pytest.raises(Refusal, match=hint):
            decode_body(content_type, b"123")


@pytest.mark.parametrize(
    ("refusal", "text"),
    [
        (not_stored("full"), "not stored: full: send the whole request again later"),
        (not_stored("full", 0, 5, may_repeat=True), "not stored: full: send the whole request again later"),
        (not_stored("full", 2, 5), "2 of 5 records were accepted: send only the other 3 again later; full"),
        (not_stored("slow", 5, 5), "5 records were accepted and will be stored later: do not send them again; slow"),
        (not_stored("slow", 1, 1, ending=True), "1 record was accepted, but the server may end before it has stored "
         "it; slow"),
        (not_stored("slow", 2, 5, may_repeat=True), "not acknowledged: slow: send the same request again later, which "
         "stores no record twice"),
        (not_stored("slow", 5, 5, True, may_repeat=True), "not acknowledged: slow: send the same request again later, "
         "which stores no record twice"),
    ],
)  # fmt: skip
def test_503_says_which_records_to_send_again(refusal: Refusal, text: str) -> None:
    assert (refusal.status, str(refusal), refusal.headers) == (503, text, {"Retry-After": "5"})
