"""The client's end of a WebSocket on a real socket: queued pongs, an unanswerable ping, reading, finish and abort."""

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support.harness import DEADLINE, Blocked, raw_link
from support.short_times import short_times  # noqa: F401  # a fixture for each test

from ringolib.net import websocket_client as module
from ringolib.net.addresses import Endpoint
from ringolib.net.frames import Messages
from ringolib.net.websocket_client import ClientConnection
from ringolib.wire import SUBPROTOCOL


def server_frame(opcode: int, payload: bytes) -> bytes:
    return bytes((0x80 | opcode, len(payload))) + payload


@contextmanager
def connected() -> Iterator[tuple[ClientConnection, socket.socket]]:
    """Connect a client to a socket that the test reads and writes as its server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = Endpoint("127.0.0.1", listener.getsockname()[1], "127.0.0.1")
        connecting = Blocked(lambda: ClientConnection(endpoint, "/", SUBPROTOCOL))
        with raw_link(listener) as peer:
            peer.settimeout(DEADLINE)
            connection = connecting.result()
            try:
                yield connection, peer
            finally:
                connection.sock.close()


def read_frame(peer: socket.socket) -> tuple[int, bytes]:
    """Read a short masked frame; return opcode and payload."""
    data = peer.recv(6, socket.MSG_WAITALL)
    size = data[1] & 0x7F
    masked = peer.recv(size, socket.MSG_WAITALL) if size else b""
    return data[0] & 15, bytes(byte ^ data[2 + i % 4] for i, byte in enumerate(masked))


def test_pong_is_queued_behind_a_large_message() -> None:
    with connected() as (connection, peer):
        connection.sock.setblocking(False)
        connection.begin_bytes(bytes(8_000_000))
        connection.flush()
        assert connection.unsent > 64 * 1024
        connection.parse(server_frame(9, b""))
        assert connection.ending is None
        received = 0
        while not connection.flush() or received < 8_000_014 + 6:
            received += len(peer.recv(1 << 20))
        assert received == 8_000_014 + 6 and connection.unsent == 0


def test_messages_before_an_unanswerable_ping_count() -> None:
    with connected() as (connection, _):
        connection.abort()
        data = server_frame(2, bytes(8)) + server_frame(9, b"")
        assert connection.parse(data) == [Messages(bytes(8), 8)]
        assert connection.ending and connection.ending[0] == 1006 and not connection.at_fault


def test_server_that_reads_no_pongs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_UNSENT", 64 * 1024)
    with connected() as (connection, _):
        connection.sock.setblocking(False)
        for _ in range(100_000):
            connection.parse(server_frame(9, bytes(100)) * 10)
            if connection.ending:
                break
        assert connection.ending == (1006, "connection lost: the peer does not read")
        assert connection.unsent < 70_000


def test_bytes_behind_the_handshake_are_the_first_ones() -> None:
    with connected() as (connection, _):
        connection._rest = server_frame(2, b"first")
        assert connection.parse(server_frame(2, b"later")) == [Messages(b"first", 5), Messages(b"later", 5)]
        assert connection.parse(b"") == []


def test_read_without_waiting_returns_none_if_nothing_has_come() -> None:
    with connected() as (connection, peer):
        connection.sock.settimeout(None)
        assert connection.read(wait=False) is None
        peer.sendall(b"data")
        assert connection.read() == b"data"
        peer.shutdown(socket.SHUT_WR)
        assert connection.read() == b""


def test_send_bytes_sends_what_was_queued_first() -> None:
    with connected() as (connection, peer):
        connection.begin_bytes(b"first")
        connection.send_bytes(b"second", lambda: None)
        assert [read_frame(peer), read_frame(peer)] == [(2, b"first"), (2, b"second")]
        assert connection.unsent == 0
        connection.ping()
        assert read_frame(peer) == (9, b"")


def test_finish_sends_queued_bytes_and_the_close_frame_and_waits() -> None:
    with connected() as (connection, peer):
        connection.begin_bytes(b"last")
        finishing = Blocked(lambda: connection.finish(1000, "done"))
        assert [read_frame(peer), read_frame(peer)] == [(2, b"last"), (8, struct.pack(">H", 1000) + b"done")]
        assert peer.recv(1) == b""
        peer.sendall(server_frame(8, struct.pack(">H", 1000)))
        peer.shutdown(socket.SHUT_WR)
        finishing.result()
        assert connection.sock.fileno() == -1


def test_finish_answers_the_servers_close_frame_with_its_code() -> None:
    with connected() as (connection, peer):
        connection.parse(server_frame(8, struct.pack(">H", 1001) + b"stop"))
        assert connection.ending == (1001, "stop")
        Blocked(lambda: connection.finish(*connection.ending or (0, ""))).result()
        assert read_frame(peer) == (8, struct.pack(">H", 1001) + b"stop")


def test_reason_of_the_server_cannot_control_a_terminal() -> None:
    with connected() as (connection, _):
        reason = "no\x1b]0;title\x07\n\u202ela"
        connection.parse(server_frame(8, struct.pack(">H", 1008) + reason.encode()))
        assert connection.ending == (1008, reason)
        assert connection.ending_text == r"closed with 1008 no\x1b]0;title\x07\n\u202ela"


def test_finish_does_not_wait_for_a_silent_server_for_long() -> None:
    with connected() as (connection, _):
        Blocked(lambda: connection.finish(1000, "")).result(5)
        assert connection.sock.fileno() == -1


def test_finish_of_a_lost_connection_closes_the_socket() -> None:
    with connected() as (connection, _):
        connection.abort()
        connection.finish(1000, "")
        assert connection.sock.fileno() == -1


def test_abort_ends_a_read_in_another_thread() -> None:
    with connected() as (connection, _):
        reading = Blocked(connection.read)
        assert reading.still(0.05)
        connection.abort()
        assert reading.result() == b""
        with pytest.raises(OSError):
            connection.send_bytes(b"data", lambda: None)
