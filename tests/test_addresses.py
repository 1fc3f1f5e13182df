"""Where a server listens: every address of a name on one port, and Unix sockets, their files and their permissions."""

import errno
import os
import socket
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import DEADLINE, Blocked, free_port, raw_link, server

import addresses
from addresses import AddressError, Listeners, resolve
from sinks import LinkSink, SinkError
from wire import Block, Run


def has_ipv6() -> bool:
    """True when this machine has ::1."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


IPV6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


def accepts(host: str, port: int) -> bool:
    """True when something listens there."""
    try:
        socket.create_connection((host, port), DEADLINE).close()
    except ConnectionRefusedError:
        return False
    return True


def listen(host: str, port: int = 0) -> Listeners:
    return Listeners(addresses.shown(host, port), resolve(host, port))


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory whose paths are short enough for Unix sockets."""
    yield tmp_path_factory.mktemp("s")


# IPv4 and IPv6.


@IPV6
@pytest.mark.parametrize(
    ("host", "ipv4", "ipv6"),
    [
        ("localhost", True, True),
        ("::", True, True),
        ("[::]", True, True),
        ("0.0.0.0", True, False),
        ("127.0.0.1", True, False),
        ("::1", False, True),
        ("[::1]", False, True),
    ],
)
def test_every_address_of_the_name_listens_on_one_port(tmp_path: Path, host: str, ipv4: bool, ipv6: bool) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", "-H", host) as running:
        assert accepts("127.0.0.1", running.port) is ipv4
        assert accepts("::1", running.port) is ipv6
        written = f"[{host.strip('[]')}]" if ":" in host else host
        assert f" on {written}:{running.port}, " in running.greeting
        assert running.stop() == 0
    for each in ("127.0.0.1", "::1"):
        assert not accepts(each, running.port)


@IPV6
def test_the_profiler_listens_on_both_too(tmp_path: Path) -> None:
    port = free_port()
    with server(tmp_path, "-p", "0", "-T", "0", "-L", str(port)) as running:
        assert accepts("127.0.0.1", port) and accepts("::1", port)
        assert "level=info event=profiling" in running.errors.read_text()
        assert running.stop() == 0


@IPV6
def test_clients_of_one_address_do_not_keep_those_of_the_other_waiting(tmp_path: Path) -> None:
    """One accepted from each in turn, while those of one come all the time; and all beyond the limit are answered."""
    with server(tmp_path, "-p", "0", "-T", "0", "-n", "4") as running:
        ended = threading.Event()

        def flood() -> None:
            while not ended.is_set():
                socket.create_connection(("127.0.0.1", running.port), DEADLINE).close()

        floods = [Blocked(flood) for _ in range(3)]
        for _ in range(20):
            with socket.create_connection(("::1", running.port), DEADLINE) as sock:
                sock.sendall(b"GET /v1.0/alive HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        ended.set()
        for each in floods:
            each.result()
        assert running.stop() == 0


@IPV6
def test_a_free_port_is_free_on_every_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts over where another address has the port taken, and leaves nothing open."""
    tried = []

    def bind(family: int, address: tuple[str, int]) -> socket.socket:
        tried.append(address)
        if address[0] == "::1" and len(tried) < 6:
            raise OSError(errno.EADDRINUSE, "Address already in use")
        return real(family, address)

    real = addresses._bind
    monkeypatch.setattr(addresses, "_bind", bind)
    listeners = listen("localhost")
    assert [address[0] for address in tried] == ["127.0.0.1", "::1"] * 3
    assert {sock.getsockname()[1] for sock in listeners.sockets} == {listeners.port}
    assert [sock.family for sock in listeners.sockets] == [socket.AF_INET, socket.AF_INET6]
    listeners.close()


@IPV6
def test_a_port_that_is_taken_on_one_address_is_an_error_that_names_it() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AddressError) as failed:
            listen("localhost", port)
        assert str(failed.value) == f"cannot listen on localhost:{port}: Address already in use at [::1]:{port}"
        assert not accepts("127.0.0.1", port)
        with pytest.raises(AddressError) as failed:
            listen("::1", port)
        assert str(failed.value) == f"cannot listen on [::1]:{port}: Address already in use"


@pytest.mark.parametrize("number", [errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT])
def test_an_address_that_the_machine_does_not_have_is_left_out(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def bind(family: int, address: tuple[str, int]) -> socket.socket:
        if address[0] == absent:
            raise OSError(number, os.strerror(number))
        return real(family, address)

    real = addresses._bind
    monkeypatch.setattr(addresses, "_bind", bind)
    absent = "::1"
    listeners = listen("localhost")
    assert [address[0] for _, address in listeners.addresses] == ["127.0.0.1"]
    listeners.close()
    with pytest.raises(AddressError, match=rf"cannot listen on \[::1\]:0: {os.strerror(number)}"):
        listen("::1")
    absent = "127.0.0.1"
    if has_ipv6():
        listeners = listen("localhost")
        assert [address[0] for _, address in listeners.addresses] == ["::1"] and listeners.port
        listeners.close()


@IPV6
@pytest.mark.parametrize(
    ("listening", "mine", "not_mine"),
    [
        ("localhost", ["127.0.0.1", "::1"], ["127.0.0.2"]),
        ("127.0.0.1", ["127.0.0.1"], ["127.0.0.2", "::1"]),
        ("0.0.0.0", ["127.0.0.1", "127.0.0.2"], ["::1", "192.0.2.1"]),
        ("::", ["127.0.0.1", "127.0.0.2", "::1"], ["192.0.2.1", "2001:db8::1"]),
    ],
)
def test_a_server_knows_its_own_addresses(listening: str, mine: list[str], not_mine: list[str]) -> None:
    listeners = listen(listening)
    for host in mine:
        assert listeners.is_own(resolve(host, listeners.port)[0])
        assert not listeners.is_own(resolve(host, listeners.port - 1)[0])
    for host in not_mine:
        assert not listeners.is_own(resolve(host, listeners.port)[0])
    assert not listeners.is_own((socket.AF_UNIX, "/tmp/socket"))
    assert listeners.loopback is (listening in ("localhost", "127.0.0.1"))
    listeners.close()


@IPV6
@pytest.mark.parametrize("through", ["127.0.0.1", "127.0.0.2", "::1", "::ffff:127.0.0.1", "0.0.0.0"])
def test_no_link_leads_to_the_server_itself_whatever_the_address(through: str) -> None:
    listeners = listen("::")
    (sock,) = listeners.sockets
    sock.setblocking(True)
    answer = Blocked(lambda: raw_link(sock))
    with pytest.raises(SinkError, match="this server itself"):
        LinkSink(through, listeners.port, is_own=listeners.is_own).store(a_block())
    answer.result().close()
    listeners.close()


def a_block() -> Block:
    return Block([Run(bytes(16), 0, 1)], array("q", [1]))
