"""WebSocket sessions: which messages are accepted, how others are refused, and which records are stored."""

import struct
import uuid
from array import array
from collections.abc import Iterator

import pytest
from support.harness import ROLES, RawClient, ServerProcess, eventually, frame, rows, server

from ringolib.net.frames import MAX_MESSAGE
from ringolib.wire import SUBPROTOCOL, Run, encode_batch, encode_plain

GOOD = b"".join(frame(2, struct.pack(">i", value)) for value in (1, 2, 3))
BATCH = {"Sec-WebSocket-Protocol": SUBPROTOCOL}
RUN = Run(bytes(range(16)), 5, 2)
VALUES = array("q", [7, -7])


@pytest.fixture(scope="module", params=["publisher", "consumer"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp(request.param)
    with server(directory, *ROLES[request.param]) as process:
        process.database = directory / "ringoexp.db"  # type: ignore[attr-defined]
        yield process
        eventually(lambda: process.stats()["connections"] <= 1, "every connection has ended")


def stored_by(running: ServerProcess, before: int) -> list[tuple[str, int, int]]:
    """Return the records stored after the first `before` ones."""
    return rows(running.database)[before:]  # type: ignore[attr-defined]


def count(running: ServerProcess) -> int:
    return len(rows(running.database))  # type: ignore[attr-defined]


def lying_batch(runs: int, tail: bytes = b"") -> bytes:
    return struct.pack(">I", runs) + struct.pack(">16sQI", *RUN) + VALUES.tobytes() + tail


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        pytest.param(frame(1, b"42"), 1003, id="text"),
        *(pytest.param(frame(2, bytes(size)), 1007, id=f"{size} bytes") for size in (0, 3, 5, 12)),
        pytest.param(frame(2, bytes(MAX_MESSAGE + 8)), 1009, id="oversize"),
        pytest.param(frame(2, bytes(MAX_MESSAGE), fin=False) + frame(0, bytes(8)), 1009, id="oversize in fragments"),
        pytest.param(frame(2, bytes(4), mask=None), 1002, id="unmasked"),
        pytest.param(frame(2, bytes(4), rsv=4), 1002, id="reserved bit"),
        pytest.param(frame(3, bytes(4)), 1002, id="reserved opcode"),
        pytest.param(frame(9, bytes(4), fin=False), 1002, id="fragmented ping"),
        pytest.param(frame(0, bytes(4)), 1002, id="continuation of nothing"),
        pytest.param(frame(2, bytes(4), fin=False) + frame(2, bytes(4)), 1002, id="message within a message"),
    ],
)
def test_invalid_message_is_refused_after_earlier_ones_are_acked(running: ServerProcess, bad: bytes, code: int) -> None:
    before, refused = count(running), running.stats()["recordsRefused"]
    with RawClient(running.port) as client:
        client.send(GOOD + bad + GOOD)
        closed_with, reason, acked = client.closed()
    assert (closed_with, acked) == (code, 3)
    assert len(reason) > 5
    assert [(sequence, value) for _, sequence, value in stored_by(running, before)] == [(0, 1), (1, 2), (2, 3)]
    assert running.stats()["recordsRefused"] == refused + 1


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(b"", id="empty"),
        pytest.param(bytes(4), id="no runs"),
        pytest.param(lying_batch(2), id="one run too many in the count"),
        pytest.param(lying_batch(2**32 - 1), id="the largest count of runs"),
        pytest.param(lying_batch(1)[:-1], id="truncated"),
        pytest.param(lying_batch(1, b"\0"), id="a byte too many"),
        pytest.param(encode_batch([RUN._replace(count=3)], VALUES), id="a value too few"),
        pytest.param(encode_batch([RUN._replace(count=2**32 - 1)], VALUES), id="count overflows the message"),
        pytest.param(encode_batch([RUN._replace(first=2**63 - 2)], VALUES), id="sequence overflows"),
        pytest.param(encode_batch([RUN._replace(first=2**64 - 1)], VALUES), id="sequence overflows 64 bits"),
        pytest.param(encode_batch([RUN, RUN._replace(count=0)], VALUES), id="an empty run"),
    ],
)
def test_invalid_batch_is_refused_after_earlier_ones_are_acked(running: ServerProcess, bad: bytes) -> None:
    good = Run(uuid.uuid4().bytes, 0, 2)
    before = count(running)
    with RawClient(running.port, BATCH) as client:
        client.send(frame(2, encode_batch([good], VALUES)) + frame(2, bad))
        code, reason, acked = client.closed()
    assert (code, acked) == (1007, 2) and len(reason) > 5
    source = str(uuid.UUID(bytes=good.source))
    assert stored_by(running, before) == [(source, 0, 7), (source, 1, -7)]


def test_fragments_around_a_ping_are_one_message(running: ServerProcess) -> None:
    before = count(running)
    payload = encode_plain([2**63 - 1, -(2**63)])
    with RawClient(running.port) as client:
        client.send(frame(2, payload[:5], fin=False) + frame(9, b"are you there") + frame(0, b"", fin=False))
        assert client.read() == (10, b"are you there")
        client.send(frame(0, payload[5:]))
        client.acked(2)
    assert [value for _, _, value in stored_by(running, before)] == [2**63 - 1, -(2**63)]


def test_frames_may_arrive_byte_by_byte(running: ServerProcess) -> None:
    before = count(running)
    with RawClient(running.port) as client:
        for byte in GOOD:
            client.send(bytes([byte]))
        client.acked(3)
    assert [value for _, _, value in stored_by(running, before)] == [1, 2, 3]


def test_frames_sent_with_the_handshake_are_not_lost(running: ServerProcess) -> None:
    for frames in (GOOD, GOOD * 2000):  # within what http.server buffers, and beyond
        with RawClient(running.port, behind=frames) as client:
            client.acked(3 * (len(frames) // len(GOOD)))


def test_acks_grow_and_count_only_their_own_connection(running: ServerProcess) -> None:
    with RawClient(running.port) as first, RawClient(running.port) as second:
        for number in range(1, 50):
            first.send(GOOD)
            assert first.acked(3 * number) == 3 * number
        second.send(GOOD)
        assert second.acked(3) == 3


def test_plain_messages_of_all_sizes_keep_their_order(running: ServerProcess) -> None:
    before = count(running)
    messages = [struct.pack(">i", -5), struct.pack(">q", -6), encode_plain([1, 2]), struct.pack(">i", 2**31 - 1)]
    with RawClient(running.port) as client:
        client.send(b"".join(frame(2, message) for message in messages))
        client.acked(5)
    records = stored_by(running, before)
    assert [record[1:] for record in records] == [(0, -5), (1, -6), (2, 1), (3, 2), (4, 2**31 - 1)]
    assert uuid.UUID(records[0][0]).version == 7


@pytest.mark.parametrize("code", [1000, 1001, 3999, 4999])
def test_close_frame_follows_the_last_ack_and_echoes_the_code(running: ServerProcess, code: int) -> None:
    with RawClient(running.port) as client:
        client.send(GOOD + frame(8, struct.pack(">H", code)))
        assert client.closed() == (code, "", 3)


def test_records_of_a_vanished_client_are_stored(running: ServerProcess) -> None:
    before = count(running)
    with RawClient(running.port) as client:
        client.send(GOOD + frame(2, bytes(8))[:-1])
    eventually(lambda: count(running) == before + 3)
    eventually(lambda: running.stats()["connections"] <= 1, "the connection has ended")


def test_batches_keep_their_sources_and_are_stored_once(running: ServerProcess) -> None:
    connect = pytest.importorskip("websockets.sync.client").connect
    before, duplicates = count(running), running.stats()["recordsDuplicate"]
    ours, theirs = uuid.uuid4(), uuid.uuid4()
    runs = [Run(ours.bytes, 0, 2), Run(theirs.bytes, 2**62, 1), Run(ours.bytes, 2, 1)]
    message = encode_batch(runs, array("q", [10, 11, 99, 12]))
    for _ in range(2):
        with connect(running.url, subprotocols=[SUBPROTOCOL]) as client:
            assert client.subprotocol == SUBPROTOCOL
            for number in (1, 2):
                client.send(message)
                assert struct.unpack(">Q", client.recv(timeout=30)) == (4 * number,)
    assert stored_by(running, before) == [
        (str(ours), 0, 10),
        (str(ours), 1, 11),
        (str(theirs), 2**62, 99),
        (str(ours), 2, 12),
    ]
    assert running.stats()["recordsDuplicate"] == duplicates + 12


def test_compression_and_unknown_subprotocols_are_never_negotiated(running: ServerProcess) -> None:
    offers = {"Sec-WebSocket-Extensions": "permessage-deflate", "Sec-WebSocket-Protocol": "chat, superchat"}
    with RawClient(running.port, offers) as client:
        assert client.status == 101
        assert "extensions" not in client.head.lower() and "sec-websocket-protocol" not in client.head.lower()
        client.send(frame(2, bytes(4), rsv=4))
        assert client.closed()[0] == 1002


@pytest.mark.slow
def test_largest_message_is_accepted(running: ServerProcess) -> None:
    values = array("q", range(MAX_MESSAGE // 8))
    with RawClient(running.port) as client:
        client.send(frame(2, encode_plain(values)))
        assert client.acked(len(values)) == len(values)
