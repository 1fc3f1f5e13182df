"""The state machine of the producers, with values and bytes only: numbering, reconnects, acks, refusals, stalls."""

import math
import random
import uuid
from array import array

import pytest
from support.harness import seeded
from support.short_times import short_times  # noqa: F401  # a fixture for each test

from ringolib import timing
from ringolib.client import outbox as module
from ringolib.client.outbox import Chunk, Outbox, ProducerError, RecordsRefused, is_permanent_status, split
from ringolib.net.tls_socket import TLSError
from ringolib.net.websocket import HandshakeError
from ringolib.wire import MAX_SEQUENCE, Run, WireError, decode_batch, encode_ack

SOURCE = uuid.UUID(int=7)
URL = "ws://server/"


def filled(*sizes: int, first: int = 0) -> Outbox:
    """Return an outbox with blocks of these sizes, connected at 0 s. Each value is the number of its record."""
    outbox = Outbox(URL, SOURCE, first)
    for size in sizes:
        outbox.add([array("q", range(outbox.next, outbox.next + size))])
    outbox.connect(0.0)
    return outbox


def taken(outbox: Outbox) -> list[tuple[int, int]]:
    """Take all chunks that are to be sent; return the first number and the size of each."""
    return [(chunk.first, len(chunk.values)) for chunk in iter(outbox.next_chunk, None)]


def test_values_of_all_kinds_are_split_and_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_RECORDS", 2)
    given = array("q", [1, 2, 3])
    blocks = list(split(given))
    given[0] = 9
    assert blocks == list(split(iter([1, 2, 3]))) == [array("q", [1, 2]), array("q", [3])]
    assert list(split([])) == []


def test_value_beyond_64_bits_is_refused_before_the_first_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_RECORDS", 1)
    with pytest.raises(OverflowError):
        split([1, 2**63])


def test_integer_alone_is_refused_with_the_remedy() -> None:
    with pytest.raises(TypeError, match=r"for example a list or a range: send\(\[5\]\)"):
        split(5)  # type: ignore[arg-type]


def test_message_has_the_source_the_number_and_the_values() -> None:
    outbox = filled(3, first=40)
    chunk = outbox.next_chunk()
    assert chunk == Chunk(40, array("q", [40, 41, 42]))
    block = decode_batch(outbox.encode(chunk))
    assert (block.runs, block.values) == ([Run(SOURCE.bytes, 40, 3)], array("q", [40, 41, 42]))
    assert chunk.values == array("q", [40, 41, 42])


def test_small_blocks_share_a_message_until_it_is_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_RECORDS", 10)
    outbox = filled(4, 6, 1, 10, 3)
    assert taken(outbox) == [(0, 10), (10, 1), (11, 10), (21, 3)]
    outbox.add([array("q", [24])])
    assert taken(outbox) == [(24, 1)]


def test_new_connection_hands_out_all_unacked_records_again() -> None:
    outbox = filled(3)
    assert taken(outbox) == [(0, 3)]
    outbox.add([array("q", [3, 4])])
    assert taken(outbox) == [(3, 2)]
    outbox.receive(encode_ack(3), 1.0)
    outbox.connect(2.0)
    outbox.add([array("q", [5])])
    assert taken(outbox) == [(3, 3)]
    assert outbox.connections == 2


def test_acks_count_from_the_first_record_of_the_connection() -> None:
    outbox = filled(10)
    taken(outbox)
    outbox.receive(encode_ack(4), 1.0)
    assert (outbox.acked, outbox.unacked) == (4, 6)
    outbox.connect(2.0)
    assert taken(outbox) == [(0, 10)], "the message is sent again as a whole"
    outbox.receive(encode_ack(3), 3.0)
    assert outbox.acked == 4
    outbox.receive(encode_ack(10), 3.0)
    assert outbox.unacked == 0
    outbox.connect(4.0)
    outbox.add([array("q", [10])])
    assert taken(outbox) == [(10, 1)]
    outbox.receive(encode_ack(1), 5.0)
    assert outbox.acked == 11


@pytest.mark.parametrize("ack", [encode_ack(4), encode_ack(2**64 - 1), b"", bytes(7), bytes(9)])
def test_ack_that_cannot_be_right_changes_nothing(ack: bytes) -> None:
    outbox = filled(3)
    taken(outbox)
    outbox.add([array("q", [3])])  # not sent yet
    with pytest.raises(WireError):
        outbox.receive(ack, 1.0)
    assert (outbox.acked, outbox.unacked) == (0, 4)


def test_numbers_end_with_the_largest_one_and_none_is_added_beyond() -> None:
    outbox = Outbox(URL, SOURCE, MAX_SEQUENCE - 2)
    with pytest.raises(ValueError, match="sequences end"):
        outbox.add([array("q", [1]), array("q", [2, 3])])
    assert outbox.unacked == 0
    outbox.add([array("q", [1, 2])])
    assert outbox.next == MAX_SEQUENCE


def test_outbox_is_full_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_UNACKED", 3)
    outbox = filled(2)
    assert not outbox.is_full
    outbox.add([array("q", [2])])
    assert outbox.is_full
    taken(outbox)
    outbox.receive(encode_ack(1), 0.0)
    assert not outbox.is_full


def test_connection_without_acks_and_progress_stalls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STALL_TIMEOUT", 10.0)
    outbox = filled(1, 1)
    taken(outbox)
    assert outbox.stall_deadline(9.0) == 10.0
    outbox.note_progress(9.0)
    assert outbox.stall_deadline(12.0) == 19.0
    outbox.receive(encode_ack(1), 18.0)
    assert outbox.stall_deadline(20.0) == 28.0
    with pytest.raises(TimeoutError, match="no ack arrived, and nothing could be sent, within 10 s"):
        outbox.stall_deadline(28.1)


def test_idle_time_does_not_count_as_a_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STALL_TIMEOUT", 10.0)
    outbox = filled()
    assert outbox.stall_deadline(0.0) == math.inf
    outbox.add([array("q", [0])])
    taken(outbox)
    assert outbox.stall_deadline(100.0) == 110.0
    outbox.receive(encode_ack(1), 105.0)
    assert outbox.stall_deadline(106.0) == math.inf
    outbox.add([array("q", [1])])
    assert outbox.stall_deadline(200.0) == 210.0


@pytest.mark.parametrize("status", [None, 408, 500, 503])
def test_lost_connection_is_trouble_and_no_error(status: int | None) -> None:
    outbox = filled(1)
    outbox.fail(HandshakeError("busy", status))
    assert (outbox.trouble, outbox.error) == ("busy", None)
    outbox.check_usable()
    outbox.connect(0.0)
    taken(outbox)
    outbox.receive(encode_ack(1), 0.0)
    assert outbox.trouble is None


@pytest.mark.parametrize("error", [HandshakeError("no", 404), RecordsRefused("no")])
def test_permanent_refusal_ends_the_outbox(error: Exception) -> None:
    outbox = filled(1)
    outbox.fail(error)
    assert outbox.is_over
    with pytest.raises(ProducerError, match=f"^{URL}: no$"):
        outbox.check_usable()


def test_tls_failure_is_permanent_before_the_first_connection_only() -> None:
    outbox = filled(1)  # it has a connection
    outbox.fail(TLSError("no"))
    assert not outbox.is_over
    outbox = Outbox(URL, SOURCE, 0)
    outbox.fail(TLSError("no"))
    assert outbox.is_over


@pytest.mark.parametrize(
    ("code", "at_fault", "permanent"),
    [(1007, False, True), (1008, False, True), (1007, True, False), (1001, False, False), (1006, False, False)],
)
def test_close_code_says_whether_the_records_are_refused(code: int, at_fault: bool, permanent: bool) -> None:
    outbox = filled(1)
    outbox.fail(outbox.close_error(code, at_fault, "text"))
    assert (outbox.is_over, outbox.trouble) == (permanent, "text")


def test_pauses_grow_until_an_attempt_brings_an_ack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "backoff", float)
    outbox = filled(5)
    assert [outbox.fail(OSError()) for _ in range(3)] == [1.0, 2.0, 3.0]
    outbox.connect(0.0)
    assert outbox.fail(OSError()) == 4.0, "a connection alone is no success"
    outbox.connect(0.0)
    taken(outbox)
    outbox.receive(encode_ack(1), 0.0)
    assert [outbox.fail(OSError()) for _ in range(2)] == [0.0, 1.0]


def test_pause_is_the_one_of_all_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "BACKOFF_MAX_SECONDS", 0.0)
    assert filled(1).fail(OSError()) == 0.0


def test_unexpected_error_ends_the_outbox_with_its_name() -> None:
    outbox = filled(1)
    outbox.break_down(ZeroDivisionError("a bug"))
    assert outbox.error == f"{URL}: ZeroDivisionError: a bug"
    outbox.break_down(MemoryError())
    assert outbox.error == "not enough memory (ulimit -v limits it)"


def test_closed_outbox_is_unusable() -> None:
    outbox = filled(1)
    outbox.closed = True
    with pytest.raises(ValueError, match="closed"):
        outbox.check_usable()


def test_resumption_names_the_number_and_the_cause() -> None:
    outbox = filled(5, first=100)
    assert outbox.resumption() == (
        f"5 of 5 records are not acked by {URL}: send all values again with source {SOURCE} and first 100"
    )
    taken(outbox)
    outbox.receive(encode_ack(2), 0.0)
    outbox.fail(OSError("lost"))
    assert outbox.resumption() == (
        f"3 of 5 records are not acked by {URL} (lost): "
        f"send the values after the first 2 with source {SOURCE} and first 102"
    )


PERMANENT = (101, 200, 204, 301, 307, 400, 401, 403, 404, 405, 406, 407, 409, 410, 411, 413, 414, 415, 418, 421, 426,
             428, 431, 451, 499, 501, 505)  # fmt: skip
RETRYABLE = (408, 425, 429, 500, 502, 503, 504, 507, 508, 511, 599)


@pytest.mark.parametrize("status", [*PERMANENT, *RETRYABLE])
def test_statuses_that_repetition_cannot_change_are_permanent(status: int) -> None:
    assert is_permanent_status(status) is (status in PERMANENT)


class Server:
    """A server that keeps each (source, sequence) once."""

    def __init__(self) -> None:
        self.stored: dict[int, int] = {}
        self.received = 0  # records of this connection

    def store(self, message: bytes) -> None:
        block = decode_batch(message)
        (run,) = block.runs
        assert run.source == SOURCE.bytes
        for number, value in enumerate(block.values, run.first):
            assert self.stored.setdefault(number, value) == value, "a number was used for two values"
        self.received += run.count


@pytest.mark.parametrize("turn", range(20))
def test_random_losses_and_acks_keep_every_record_once(turn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages and acks are lost with their connection. Acked records are stored at any time, and all at the end."""
    rng = random.Random(seeded() + turn)
    monkeypatch.setattr(module, "CHUNK_RECORDS", 8)
    outbox, server = Outbox(URL, SOURCE, 0), Server()
    given = array("q")

    def reconnect() -> None:
        outbox.connect(0.0)
        server.received = 0

    def exchange(lossy: bool) -> None:
        kind = rng.choice(["add", "send", "send", "ack", "lose"] if lossy else ["send", "ack"])
        if kind == "add":
            blocks = [array("q", rng.randbytes(8 * rng.choice((1, 3, 8)))) for _ in range(rng.choice((1, 1, 3)))]
            for block in blocks:
                given.extend(block)
            outbox.add(blocks)
        elif kind == "send" and (chunk := outbox.next_chunk()):
            message = outbox.encode(chunk)
            if not lossy or rng.random() < 0.9:
                server.store(message)
            else:  # the connection is lost with this message
                outbox.fail(OSError("lost"))
                reconnect()
        elif kind == "ack":
            outbox.receive(encode_ack(rng.randint(0, server.received) if lossy else server.received), 0.0)
        elif kind == "lose":
            outbox.fail(OSError("lost"))
            reconnect()
        assert server.stored.keys() >= set(range(outbox.acked)), "an acked record is not stored"

    reconnect()
    for _ in range(400):
        exchange(lossy=True)
    reconnect()
    while outbox.unacked:
        exchange(lossy=False)
    assert [server.stored[number] for number in range(len(given))] == list(given)
    assert len(server.stored) == len(given)
