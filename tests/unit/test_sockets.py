"""Connecting: one deadline for all addresses of a name, and a share of it for each."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from time import monotonic

import pytest
from support.harness import DEADLINE

from ringolib.net.sockets import connect
from ringolib.timing import deadline_after


@pytest.fixture
def silent_port() -> Iterator[int]:
    """The port of a listener whose queue is full: the system drops further connections without an answer."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(20):
            waiting = stack.enter_context(socket.socket())
            waiting.settimeout(0.2)
            try:
                waiting.connect(listener.getsockname())
            except TimeoutError:
                yield listener.getsockname()[1]
                return
        pytest.skip("this system answers connections beyond the queue of a listener")


def resolve_to(monkeypatch: pytest.MonkeyPatch, *ports: int) -> None:
    """Let each name have one address for each of these ports."""
    entries = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in ports]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *unused, **more: entries)


def test_silent_addresses_share_one_deadline(silent_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, *[silent_port] * 10)
    started = monotonic()
    with pytest.raises(TimeoutError):
        connect("name.example", 1, deadline_after(0.5))
    assert 0.4 < monotonic() - started < 4, "less than the 5 s of ten deadlines"


def test_silent_address_leaves_time_for_the_next(silent_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        resolve_to(monkeypatch, silent_port, listener.getsockname()[1])
        with connect("name.example", 1, deadline_after(1)) as sock:
            assert sock.getpeername() == listener.getsockname()
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_error_of_the_last_address_is_raised(silent_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed_port = listener.getsockname()[1]
    resolve_to(monkeypatch, silent_port, closed_port)
    with pytest.raises(ConnectionRefusedError):
        connect("name.example", 1, deadline_after(0.5))


@pytest.mark.parametrize("host", ["127.0.0.1", "unix:/nowhere"])
def test_passed_deadline_is_a_timeout(host: str) -> None:
    with pytest.raises(TimeoutError):
        connect(host, 1, deadline_after(0))


def test_addresses_after_a_late_name_service_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        resolve_to(monkeypatch, listener.getsockname()[1])
        with pytest.raises(TimeoutError):
            connect("name.example", 1, deadline_after(-DEADLINE))
