"""The message formats, byte by byte, and the errors of malformed messages."""

import random
import struct
from array import array

import pytest
from support.harness import seeded

from ringolib.net.frames import MAX_MESSAGE, MessageGroup, Messages, MixedMessages
from ringolib.wire import (
    MAX_RUNS,
    Block,
    Rest,
    Run,
    WireError,
    decode_ack,
    decode_batch,
    decode_batch_messages,
    decode_plain,
    decode_plain_messages,
    encode_ack,
    encode_batch,
    encode_plain,
)

UUID = bytes.fromhex("00112233445566778899aabbccddeeff")
# The example in docs/protocol.md.
BATCH = bytes.fromhex(
    "00000001 00112233445566778899aabbccddeeff 0000000000000000 00000002 0000000000000007 ffffffffffffffff"
)


@pytest.mark.parametrize(
    ("payload", "values"),
    [
        ("0000002a", [42]),
        ("ffffffff", [-1]),
        ("7fffffff", [2**31 - 1]),
        ("80000000", [-(2**31)]),
        ("000000000000002a", [42]),
        ("fffffffffffffffe", [-2]),
        ("7fffffffffffffff", [2**63 - 1]),
        ("8000000000000000", [-(2**63)]),
        ("0000000000000001ffffffffffffffff0000000000000002", [1, -1, 2]),
    ],
)
def test_decode_plain_returns_signed_integers(payload: str, values: list[int]) -> None:
    for kind in (bytes, bytearray):
        decoded = decode_plain(kind(bytes.fromhex(payload)))
        assert (decoded.typecode, list(decoded)) == ("q", values)
    if len(payload) > 8:
        assert encode_plain(values).hex() == payload


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 7, 9, 12, 15, 20])
def test_plain_message_of_other_length_is_refused(size: int) -> None:
    with pytest.raises(WireError, match=f"^{size} bytes") as refused:
        decode_plain(bytes(size))
    assert (refused.value.close_code, refused.value.status) == (1007, 400)


def grouped(messages: list[bytes], rng: random.Random | None = None) -> list[MessageGroup]:
    """Group messages of one size as a connection does, with `rng` only some of them, and some of mixed sizes."""
    groups: list[MessageGroup] = []
    for message in messages:
        size = len(message)
        last = groups[-1] if groups else None
        if size and isinstance(last, MixedMessages):
            if rng is None or rng.randrange(30):
                groups[-1] = MixedMessages(last.payloads + message, [*last.sizes, size])
                continue
        elif size and last and last.size == size and (rng is None or rng.randrange(4)):
            groups[-1] = Messages(last.payloads + message, size)
            continue
        mixed = size and rng and not rng.randrange(4)
        groups.append(MixedMessages(message, [size]) if mixed else Messages(message, size))
    return groups


def mixed(*messages: bytes) -> MixedMessages:
    return MixedMessages(b"".join(messages), [len(message) for message in messages])


def test_grouped_plain_messages_decode_as_single_ones() -> None:
    seed = seeded()
    rng = random.Random(seed)
    for sizes in ([4], [8], [4, 8], [8, 16, 800], [4, 8, 24]):
        for count in (0, 1, 2, 50, 50, 50):
            messages = [rng.randbytes(rng.choice(sizes)) for _ in range(count)]
            expected = [value for message in messages for value in decode_plain(message)]
            for groups in (grouped(messages), grouped(messages, rng), [mixed(*messages)]):
                values, error = decode_plain_messages(groups)
                assert (list(values), values.typecode, error) == (expected, "q", None)


def test_mixed_plain_messages_keep_signs_and_order() -> None:
    numbers = [2**31 - 1, -1, 5, -(2**31), 0, -(2**63), 2**63 - 1, -6]
    narrow = {2**31 - 1, -(2**31), -1, 0}
    messages = [struct.pack(">i" if number in narrow else ">q", number) for number in numbers]
    values, error = decode_plain_messages([mixed(*messages)])
    assert (list(values), error) == (numbers, None)


@pytest.mark.parametrize("valid", [[bytes(4)], [bytes(8)] * 2, [bytes(4), bytes(8)]])
def test_plain_messages_before_a_malformed_one_count(valid: list[bytes]) -> None:
    for malformed in (b"", bytes(12)):
        values, error = decode_plain_messages(grouped([*valid, malformed, bytes(4)]))
        assert len(values) == len(valid)
        assert error and error.close_code == 1007


@pytest.mark.parametrize("before", [[], [bytes(4)], [bytes(8)], [bytes(4), bytes(16), bytes(4)]])
def test_first_malformed_message_of_mixed_ones_is_named(before: list[bytes]) -> None:
    group = mixed(*before, bytes(20), bytes(4), bytes(12), bytes(8))
    for groups in ([group], [Messages(bytes(8), 4), group, Messages(b"", 0)]):
        values, error = decode_plain_messages(groups)
        assert len(values) == sum(len(decode_plain(message)) for message in before) + len(groups) // 2 * 2
        assert error and str(error).startswith("20 bytes:") and error.close_code == 1007


def test_batch_message_is_the_example_of_the_document() -> None:
    values = array("q", [7, -1])
    assert encode_batch([Run(UUID, 0, 2)], values) == BATCH
    assert list(values) == [7, -1], "encoding does not change the values"
    assert decode_batch(BATCH) == Block([Run(UUID, 0, 2)], values)


def test_batch_messages_round_trip() -> None:
    seed = seeded()
    rng = random.Random(seed)
    for _ in range(100):
        runs = [Run(rng.randbytes(16), rng.randrange(2**62), rng.randrange(1, 9)) for _ in range(rng.randrange(1, 9))]
        values = array("q", (rng.randrange(-(2**63), 2**63) for _ in range(sum(run.count for run in runs))))
        assert decode_batch(encode_batch(runs, values)) == (runs, values)


def test_run_may_end_at_the_last_sequence() -> None:
    last = Run(UUID, 2**63 - 2, 1)
    assert decode_batch(encode_batch([last], array("q", [5]))).runs == [last]


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        pytest.param(b"", "begins with", id="empty"),
        pytest.param(b"\0\0\0", "begins with", id="count cut"),
        pytest.param(bytes(4), "0 runs", id="no runs"),
        pytest.param(struct.pack(">I", 2) + BATCH[4:], "runs need", id="one run more, taken from the values"),
        pytest.param(b"\xff" * 4 + BATCH[4:], "runs need", id="most runs"),
        pytest.param(BATCH[:20], "runs need", id="run cut"),
        pytest.param(BATCH[:-1], "not 16", id="values cut"),
        pytest.param(BATCH + b"\0", "not 16", id="one byte more"),
        pytest.param(BATCH + bytes(8), "not 16", id="one value more"),
        pytest.param(BATCH[:28] + b"\xff" * 4 + BATCH[32:], "values of 8 bytes", id="most records"),
        pytest.param(BATCH[:28] + bytes(4), "no records", id="no records"),
        pytest.param(encode_batch([Run(UUID, 2**63 - 2, 2)], array("q", [1, 2])), "2\\*\\*63", id="one too far"),
        pytest.param(encode_batch([Run(UUID, 2**64 - 1, 2)], array("q", [1, 2])), "2\\*\\*63", id="beyond 64 bits"),
    ],
)
def test_malformed_batch_is_refused(payload: bytes, reason: str) -> None:
    with pytest.raises(WireError, match=reason) as refused:
        decode_batch(payload)
    assert refused.value.close_code == 1007
    assert len(str(refused.value)) <= 123, "the reason fits into a Close frame"


def test_batch_has_a_limited_number_of_runs() -> None:
    runs = [Run(UUID, n, 1) for n in range(MAX_RUNS + 1)]
    values = array("q", range(MAX_RUNS + 1))
    assert len(decode_batch(encode_batch(runs[:-1], values[:-1])).runs) == MAX_RUNS
    with pytest.raises(WireError, match="65537 runs: a batch message has at most 65536"):
        decode_batch(encode_batch(runs, values))


def test_batches_are_joined_up_to_the_first_malformed_one() -> None:
    one, two = Block([Run(UUID, 0, 1)], array("q", [1])), Block([Run(UUID, 1, 2)], array("q", [2, 3]))
    messages = [encode_batch(*one), encode_batch(*two)]
    assert decode_batch_messages(grouped(messages)) == (Block(one.runs + two.runs, array("q", [1, 2, 3])), None)
    assert decode_batch_messages([mixed(*messages)]) == (Block(one.runs + two.runs, array("q", [1, 2, 3])), None)
    for groups in (grouped([messages[0], b"", messages[1]]), [mixed(messages[0], bytes(8), messages[1])]):
        block, error = decode_batch_messages(groups)
        assert block == one and error is not None
    assert decode_batch_messages(grouped(messages[:1])) == (one, None)


def test_rest_skips_records() -> None:
    runs = [Run(UUID, 10, 2), Run(bytes(16), 0, 3)]
    block = Block(runs[:], array("q", range(5)))

    def rest(*counts: int) -> tuple[list[Run], list[int]]:
        rest = Rest(block)
        for count in counts:
            rest.skip(count)
        return list(rest.runs), list(rest.values)

    assert rest() == rest(0) == (runs, [0, 1, 2, 3, 4])
    assert rest(1) == ([Run(UUID, 11, 1), Run(bytes(16), 0, 3)], [1, 2, 3, 4])
    assert rest(2) == rest(1, 1) == ([Run(bytes(16), 0, 3)], [2, 3, 4])
    assert rest(4) == rest(1, 0, 3) == rest(3, 1) == ([Run(bytes(16), 2, 1)], [4])
    assert rest(5) == rest(4, 1) == ([], [])
    assert block == (runs, array("q", range(5))), "the block does not change"


def test_ack_has_eight_bytes() -> None:
    assert encode_ack(3).hex() == "0000000000000003"
    assert decode_ack(b"\xff" * 8) == 2**64 - 1
    for size in (0, 7, 9):
        with pytest.raises(WireError, match="an ack has 8"):
            decode_ack(bytes(size))


def test_largest_batch_of_a_worker_fits_into_a_message() -> None:
    from ringolib.forward.workers import BATCH_RECORDS

    runs = [Run(UUID, 0, 1)] * BATCH_RECORDS
    assert len(encode_batch(runs, array("q", bytes(8 * BATCH_RECORDS)))) < MAX_MESSAGE
