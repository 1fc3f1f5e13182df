"""Sessions: bytes and times in; blocks, acks, pings and close frames out. No socket, no thread, no clock."""

import struct
import tracemalloc
import uuid
from array import array
from collections.abc import Callable
from math import inf

import pytest
from support.harness import frame

from ringolib.net import protocol
from ringolib.net.frames import MAX_MESSAGE
from ringolib.web import session as module
from ringolib.web.session import GOING_AWAY, LOST, Session
from ringolib.wire import Run, encode_batch

CLOSE = frame(8, struct.pack(">H", 1000))


def plain(*values: int) -> bytes:
    """One frame for each value, of 4 bytes."""
    return b"".join(frame(2, struct.pack(">i", value)) for value in values)


def ack(count: int) -> bytes:
    return b"\x82\x08" + struct.pack(">Q", count)


def close_frame(code: int, reason: str = "") -> bytes:
    payload = struct.pack(">H", code) + reason.encode()
    return bytes((0x88, len(payload))) + payload


@pytest.fixture
def session() -> Session:
    return Session(batches=False, now=0.0)


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_values_come_out_in_order_however_the_data_is_cut(session: Session, size: int) -> None:
    data = plain(1, -2, 3) + frame(2, struct.pack(">qq", 2**40, -5)) + frame(9, b"x") + plain(-(2**31))
    values, runs = array("q"), []
    for at in range(0, len(data), size):
        block = session.receive(data[at : at + size], 0.0)
        values += block.values
        runs += block.runs
    assert list(values) == [1, -2, 3, 2**40, -5, -(2**31)]
    assert [(run.first, run.count) for run in runs][0][0] == 0 and sum(run.count for run in runs) == 6
    assert len({run.source for run in runs}) == 1
    assert session.data_to_send() == b"\x8a\x01x", "the pong"
    assert session.received == 6 and session.ending is None


@pytest.mark.parametrize("value", [0, 1, -1, 2**31 - 1, -(2**31), 0x01020304])
def test_single_integer_is_decoded_with_any_mask(session: Session, value: int) -> None:
    for number, mask in enumerate((bytes(4), b"\xff" * 4, b"\x80\x01\x7f\xfe")):
        block = session.receive(frame(2, struct.pack(">i", value), mask=mask), 0.0)
        assert list(block.values) == [value] and block.runs == [Run(block.runs[0].source, number, 1)]


def test_single_integer_behind_half_a_frame_is_not_taken_alone(session: Session) -> None:
    first, second = plain(1), plain(2)
    assert not session.receive(first[:4], 0.0).values
    assert list(session.receive(first[4:] + second, 0.0).values) == [1, 2]


def test_batches_keep_their_sources() -> None:
    session = Session(batches=True, now=0.0)
    runs = [Run(uuid.uuid4().bytes, 7, 2), Run(uuid.uuid4().bytes, 0, 1)]
    block = session.receive(frame(2, encode_batch(runs, array("q", (1, 2, 3)))), 0.0)
    assert (block.runs, list(block.values)) == (runs, [1, 2, 3])


def test_acks_are_cumulative_and_sent_once(session: Session) -> None:
    session.receive(plain(1, 2, 3), 0.0)
    assert session.data_to_send() == b""
    session.stored(1)
    session.stored(3)
    assert session.data_to_send() == ack(3)
    assert session.data_to_send() == b"" and session.acked == 3


@pytest.mark.parametrize(
    ("data", "code", "reason"),
    [
        (frame(1, b"text"), 1003, "text is not accepted"),
        (frame(2, b"12345"), 1007, "5 bytes"),
        (frame(2, b""), 1007, "0 bytes"),
        (frame(2, bytes(4), mask=None), 1002, ""),
        (frame(2, bytes(4), rsv=4), 1002, ""),
        (frame(3, b""), 1002, ""),
        (frame(0, bytes(4)), 1002, ""),
    ],
)
def test_invalid_frame_ends_the_session_after_what_came_before(
    session: Session, data: bytes, code: int, reason: str
) -> None:
    block = session.receive(plain(7) + data + plain(8), 0.0)
    assert list(block.values) == [7]
    assert session.ending and session.ending[0] == code and reason in session.ending[1]
    assert session.refused and not session.by_client
    assert not session.receive(plain(9), 0.0).values, "what follows is ignored"
    session.stored(1)
    session.close(0.0)
    sent = session.data_to_send()
    assert sent.startswith(ack(1)) and sent[10] == 0x88 and struct.unpack(">H", sent[12:14]) == (code,)


def test_message_over_the_limit_ends_with_1009(session: Session) -> None:
    session.receive(frame(2, bytes(MAX_MESSAGE), fin=False), 0.0)
    session.receive(frame(0, bytes(8)), 0.0)
    assert session.ending and session.ending[0] == 1009


def test_client_close_is_answered_with_its_code_after_the_last_ack(session: Session) -> None:
    session.receive(plain(1) + CLOSE, 0.0)
    assert session.ending == (1000, "") and session.by_client and not session.lost
    session.stored(1)
    session.close(1.0)
    assert session.data_to_send() == ack(1) + close_frame(1000)
    assert session.next_deadline == 1.0 + module.CLOSE_TIMEOUT_SECONDS


def test_owner_ends_the_session_with_its_own_code(session: Session) -> None:
    session.end(*GOING_AWAY)
    session.end(1011, "too late: an ending is set")
    session.close(0.0)
    assert session.data_to_send() == close_frame(*GOING_AWAY)


def test_half_closed_client_still_gets_acks_for_a_moment(session: Session) -> None:
    session.receive(plain(1), 0.0)
    session.end_of_stream(5.0)
    assert session.lost and session.ending == LOST
    assert session.next_deadline == 5.0 + module.PATIENCE_SECONDS
    session.stored(1)
    assert session.data_to_send() == ack(1)


def test_client_that_closed_in_order_may_end_its_side_and_wait(session: Session) -> None:
    """But not for ever: a client that has left looks the same."""
    session.receive(plain(1) + CLOSE, 0.0)
    session.end_of_stream(5.0)
    assert session.ending == (1000, "") and session.by_client
    assert session.next_deadline == 5.0 + module.STALL_TIMEOUT_SECONDS


def test_silent_client_is_pinged_and_then_given_up(session: Session) -> None:
    due = module.PING_AFTER_SECONDS
    assert session.next_deadline == due
    session.expire(due - 0.001)
    assert session.data_to_send() == b""
    session.expire(due)
    assert session.data_to_send() == protocol.PING
    due += module.PING_TIMEOUT_SECONDS
    assert session.next_deadline == due
    session.expire(due)
    assert session.lost and session.ending and "no answer to a ping" in session.ending[1]


def test_pong_or_any_other_data_resets_the_silence(session: Session) -> None:
    session.expire(module.PING_AFTER_SECONDS)
    session.receive(frame(10, b""), 30.0)
    assert session.next_deadline == 30.0 + module.PING_AFTER_SECONDS
    session.receive(plain(1)[:3], 40.0)
    assert session.next_deadline == 40.0 + module.PING_AFTER_SECONDS


def test_unstored_records_do_not_suspend_the_timeouts(session: Session) -> None:
    session.receive(plain(1), 0.0)
    session.expire(module.PING_AFTER_SECONDS)
    assert session.data_to_send() == protocol.PING
    session.expire(module.PING_AFTER_SECONDS + module.PING_TIMEOUT_SECONDS)
    assert session.lost


@pytest.mark.parametrize("begin", [plain(1)[:5], frame(2, bytes(4), fin=False), frame(2, bytes(200), fin=False)[:50]])
def test_unfinished_message_is_given_up_even_with_pongs(session: Session, begin: bytes) -> None:
    session.receive(begin, 1.0)
    limit = 1.0 + module.MESSAGE_TIMEOUT_SECONDS
    if not begin.startswith(b"\x82"):  # between fragments, or within one, control frames may come
        at = 10.0
        while at < limit and begin == frame(2, bytes(4), fin=False):
            session.receive(frame(10, b""), at)
            at += 10.0
    session.expire(min(session.next_deadline, limit))
    session.expire(limit)
    assert session.lost


def test_finished_message_ends_its_timeout(session: Session) -> None:
    session.receive(plain(1)[:5], 1.0)
    session.receive(plain(1)[5:], 100.0)
    session.receive(frame(10, b""), 1.0 + module.MESSAGE_TIMEOUT_SECONDS - 1)
    session.expire(1.0 + module.MESSAGE_TIMEOUT_SECONDS)
    assert session.ending is None


def test_silent_client_with_half_a_frame_is_given_up(session: Session) -> None:
    session.receive(frame(2, bytes(1000))[:500], 1.0)
    session.expire(1.0 + module.PING_AFTER_SECONDS)
    session.expire(session.next_deadline)
    assert session.lost and session.ending and "no answer to a ping" in session.ending[1]


def test_messages_finished_in_time_keep_the_connection_open(session: Session) -> None:
    """Every read ends within a frame, so a message is unfinished at any time."""
    whole = plain(1)
    session.receive(whole[:5], 0.0)
    for now in range(10, 1000, 10):
        session.expire(now)
        assert list(session.receive(whole[5:] + whole[:5], now).values) == [1]
    assert session.ending is None and session.received == 99


def test_ping_in_two_pieces_is_not_an_unfinished_message(session: Session) -> None:
    ping = frame(9, b"two pieces")
    session.receive(ping[:5], 1.0)
    session.receive(ping[5:], 2.0)
    assert session.data_to_send().endswith(b"two pieces")
    for now in range(20, 400, 10):
        session.receive(frame(10, b""), now)
        session.expire(now)
    assert session.ending is None


def test_client_that_reads_nothing_is_given_up(session: Session) -> None:
    session.sent(progress=False, rest=10, now=1.0)
    session.sent(progress=False, rest=10, now=5.0)
    assert session.next_deadline <= 1.0 + module.STALL_TIMEOUT_SECONDS
    session.receive(frame(10, b""), 60.0)
    session.expire(1.0 + module.STALL_TIMEOUT_SECONDS)
    assert session.lost and session.ending and "has read nothing" in session.ending[1]


def test_progress_in_sending_resets_the_stall(session: Session) -> None:
    session.sent(progress=False, rest=10, now=1.0)
    session.sent(progress=True, rest=5, now=50.0)
    session.receive(frame(10, b""), 70.0)
    session.expire(80.0)
    assert session.ending is None


def test_unread_pongs_are_bounded(session: Session) -> None:
    data = frame(9, bytes(100)) * 100
    for _ in range(20):
        session.receive(data, 0.0)
        while session.has_input:
            session.receive(b"", 0.0)
        session.sent(progress=False, rest=1, now=0.0)
    assert session.lost and session.ending and "does not read" in session.ending[1]


def test_pause_of_the_owner_is_not_the_silence_of_the_client(session: Session) -> None:
    session.receive(plain(1)[:5], 0.0)
    session.paused(1000.0, 1000.0)
    session.expire(1000.0)
    assert session.ending is None and session.data_to_send() == b""
    assert session.next_deadline == 1000.0 + module.PING_AFTER_SECONDS


def test_client_is_pinged_and_not_given_up_while_the_owner_does_not_read(session: Session) -> None:
    session.receive(plain(1)[:5], 0.0)
    sent = b""
    for now in range(1000):
        session.expire(now, reading=False)
        sent += session.data_to_send()
    pings = (999 - module.PING_AFTER_SECONDS) // module.PING_TIMEOUT_SECONDS + 1
    assert sent == protocol.PING * int(pings) and session.ending is None
    session.paused(1000.0, 1000.0)
    assert session.next_deadline == 1000.0 + module.PING_TIMEOUT_SECONDS, "the last ping may be answered now"
    session.expire(1000.0 + module.PING_TIMEOUT_SECONDS)
    assert session.lost


def test_client_that_reads_nothing_is_given_up_during_a_pause(session: Session) -> None:
    session.sent(progress=False, rest=10, now=1.0)
    session.expire(1.0 + module.STALL_TIMEOUT_SECONDS, reading=False)
    assert session.lost


def test_slow_frames_are_bounded_in_one_call(session: Session) -> None:
    data = frame(9, b"") * (3 * protocol.SLOW_FRAMES_PER_CALL) + plain(1, 2)
    assert not session.receive(data, 0.0).values and session.has_input
    calls = 1
    values = array("q")
    while session.has_input:
        values += session.receive(b"", 0.0).values
        calls += 1
    assert list(values) == [1, 2] and calls == 4
    assert session.data_to_send() == b"\x8a\x00" * (3 * protocol.SLOW_FRAMES_PER_CALL)


def test_idle_session_has_no_deadline_but_the_ping(session: Session) -> None:
    assert session.next_deadline == module.PING_AFTER_SECONDS < inf


def test_idle_session_takes_little_memory() -> None:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        sessions = [Session(batches=False, now=0.0) for _ in range(1000)]
        for session in sessions:
            session.receive(plain(1), 0.0)
            session.stored(1)
            session.data_to_send()
        each = (tracemalloc.get_traced_memory()[0] - before) / 1000
    finally:
        tracemalloc.stop()
    assert each < 1500


def test_large_message_leaves_no_memory_behind(session: Session) -> None:
    session.receive(frame(2, bytes(1_000_000)), 0.0)
    session.receive(frame(2, bytes(999_992), fin=False) + frame(0, bytes(8)), 0.0)
    assert session.held == 0


@pytest.mark.parametrize("begin", [frame(2, bytes(2_000_000))[:-1], frame(2, bytes(1_000_000), fin=False)])
@pytest.mark.parametrize(
    "ends", [lambda s: s.end(*GOING_AWAY), lambda s: s.end_of_stream(0.0), lambda s: s.expire(1e9)]
)
def test_unfinished_message_is_freed_at_the_end(
    session: Session, begin: bytes, ends: Callable[[Session], None]
) -> None:
    session.receive(begin, 0.0)
    assert session.held >= 1_000_000
    session.expire(module.PING_AFTER_SECONDS)
    ends(session)
    assert session.ending and session.held == 0 and not session.has_input


def test_message_in_tiny_fragments_needs_its_own_size_only(session: Session) -> None:
    data = frame(2, b"1", fin=False) + frame(0, b"2", fin=False) * 50_000
    session.receive(data, 0.0)
    while session.has_input:
        session.receive(b"", 0.0)
    assert session.held < 60_000
    block = session.receive(frame(0, b"2" * 7), 0.0)
    assert len(block.values) == 50_008 // 8
