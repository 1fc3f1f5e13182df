"""Reads and writes of connected sockets with timeouts."""

import socket
from collections.abc import Iterator

import pytest
from support.harness import DEADLINE, Blocked, eventually

from ringolib.net import sockets
from ringolib.net.sockets import Stream


@pytest.fixture(params=[True, False])
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Stream, socket.socket]]:
    """A stream and its peer, where the system's timeout can be used, and where it cannot."""
    monkeypatch.setattr(sockets, "HAS_KNOWN_TIMEVAL", request.param)
    own, peer = socket.socketpair()
    with own, peer:
        yield Stream(own), peer


def test_read_returns_what_is_there_and_times_out(pair: tuple[Stream, socket.socket]) -> None:
    stream, peer = pair
    for timeout in (0.01, 0.01, 0.02):
        peer.sendall(b"ab")
        assert stream.read(10, 5) == b"ab"
        with pytest.raises(TimeoutError):
            stream.read(10, timeout)
    with pytest.raises(TimeoutError):
        stream.read(10, -1)
    peer.close()
    assert stream.read(10, 5) == b""


def test_write_times_out_if_the_peer_does_not_read(pair: tuple[Stream, socket.socket]) -> None:
    stream, peer = pair
    with pytest.raises(TimeoutError):
        stream.write(bytes(10_000_000), 0.01)
    peer.sendall(b"c")
    assert stream.read(1, 5) == b"c"
    with pytest.raises(TimeoutError):
        stream.read(1, 0.01)


@pytest.mark.parametrize("ends", [False, True])
def test_write_to_a_peer_that_pauses_fails_only_at_the_end(ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that stops does not wait for a client that has paused its output. Otherwise nothing is lost."""
    monkeypatch.setattr(sockets, "CLOSE_TIMEOUT", 0.05)
    looks: list[bool] = []

    def ending() -> bool:
        looks.append(ends)
        return ends

    own, peer = socket.socketpair()
    data = bytes(range(256)) * 8192
    with own, peer:
        written = Blocked(lambda: Stream(own, ending).write(data, DEADLINE))
        eventually(lambda: looks)
        if ends:
            with pytest.raises(TimeoutError):
                written.result()
            return
        received = b""
        while len(received) < len(data):
            received += peer.recv(65536)
        written.result()
        assert received == data


def test_stream_does_not_depend_on_the_size_of_a_timeval(monkeypatch: pytest.MonkeyPatch) -> None:
    """On 32-bit systems with 64-bit times, a value of 8 bytes is an error."""
    monkeypatch.setattr(sockets, "HAS_KNOWN_TIMEVAL", False)

    class Socket(socket.socket):
        def setsockopt(self, *option: object) -> None:  # type: ignore[override]
            raise OSError("Invalid argument")

    own, peer = socket.socketpair()
    with Socket(fileno=own.detach()) as refusing, peer:
        peer.sendall(b"a")
        assert Stream(refusing).read(1, 5) == b"a"
