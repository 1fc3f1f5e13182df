"""Listening sockets: every address of a name on one port; the file of a Unix socket and its permissions."""

import errno
import fcntl
import os
import socket
import stat
import threading
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from support.harness import Blocked, connected, raw_link
from support.network import IPV6, accepts, has_ipv6

from ringolib.forward.link import LinkSink, dialer
from ringolib.forward.sink import NotStored
from ringolib.net import listeners as listeners_module
from ringolib.net.addresses import AddressError, format_address, resolve
from ringolib.net.listeners import Listeners
from ringolib.wire import Block, Run

BLOCK = Block([Run(bytes(16), 0, 1)], array("q", [1]))


def listen(host: str, port: int = 0) -> Listeners:
    return Listeners(format_address(host, port), resolve(host, port))


def refused(host: str) -> str:
    """Return the reason why a server cannot listen on `host`."""
    with pytest.raises(AddressError) as failed:
        listen(host)
    text = str(failed.value)
    assert text.startswith(f"cannot listen on {host}: ") and "\n" not in text
    return text.removeprefix(f"cannot listen on {host}: ")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Lock a directory, as another process would."""
    descriptor = os.open(directory, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
    os.close(descriptor)


# IPv4 and IPv6.


@IPV6
def test_free_port_is_free_on_every_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """If another address has the port in use, the search starts again, and no socket stays open."""
    attempts = []

    def bind(family: int, address: tuple[str, int]) -> socket.socket:
        attempts.append(address)
        if address[0] == "::1" and len(attempts) < 6:
            raise OSError(errno.EADDRINUSE, "Address already in use")
        return bind_really(family, address)

    bind_really = listeners_module._bind
    monkeypatch.setattr(listeners_module, "_bind", bind)
    listeners = listen("localhost")
    assert [address[0] for address in attempts] == ["127.0.0.1", "::1"] * 3
    assert {sock.getsockname()[1] for sock in listeners.sockets} == {listeners.port}
    assert [sock.family for sock in listeners.sockets] == [socket.AF_INET, socket.AF_INET6]
    listeners.close()


@IPV6
def test_error_names_address_whose_port_is_in_use() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as busy:
        port = busy.getsockname()[1]
        with pytest.raises(AddressError) as failed:
            listen("localhost", port)
        assert str(failed.value) == f"cannot listen on localhost:{port}: Address already in use at [::1]:{port}"
        assert not accepts("127.0.0.1", port)
        with pytest.raises(AddressError) as failed:
            listen("::1", port)
        assert str(failed.value) == f"cannot listen on [::1]:{port}: Address already in use"


@pytest.mark.parametrize("number", [errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT])
def test_address_the_machine_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def bind(family: int, address: tuple[str, int]) -> socket.socket:
        if address[0] == absent:
            raise OSError(number, os.strerror(number))
        return bind_really(family, address)

    bind_really = listeners_module._bind
    monkeypatch.setattr(listeners_module, "_bind", bind)
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
    ("listening", "own", "foreign"),
    [
        ("localhost", ["127.0.0.1", "::1"], ["127.0.0.2"]),
        ("127.0.0.1", ["127.0.0.1"], ["127.0.0.2", "::1"]),
        ("0.0.0.0", ["127.0.0.1", "127.0.0.2"], ["::1", "192.0.2.1"]),
        ("::", ["127.0.0.1", "127.0.0.2", "::1"], ["192.0.2.1", "2001:db8::1"]),
    ],
)
def test_listeners_know_their_own_addresses(listening: str, own: list[str], foreign: list[str]) -> None:
    listeners = listen(listening)
    for host in own:
        assert listeners.is_own(resolve(host, listeners.port)[0])
        assert not listeners.is_own(resolve(host, listeners.port - 1)[0])
    for host in foreign:
        assert not listeners.is_own(resolve(host, listeners.port)[0])
    assert not listeners.is_own((socket.AF_UNIX, "/tmp/socket"))
    assert listeners.loopback is (listening in ("localhost", "127.0.0.1"))
    listeners.close()


@IPV6
@pytest.mark.parametrize("through", ["127.0.0.1", "127.0.0.2", "::1", "::ffff:127.0.0.1", "0.0.0.0"])
def test_link_to_own_address_is_refused(through: str) -> None:
    listeners = listen("::")
    (sock,) = listeners.sockets
    sock.setblocking(True)
    answer = Blocked(lambda: raw_link(sock))
    with pytest.raises(NotStored, match="this server itself"):
        LinkSink(through, listeners.port, dial=dialer(is_own=listeners.is_own)).store(BLOCK)
    answer.result().close()
    listeners.close()


# The file of a Unix socket.


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_unix_socket_is_for_owner_and_group_with_any_umask(short_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        listeners = listen(f"unix:{short_path}/x.sock")
    finally:
        os.umask(before)
    assert stat.S_IMODE((short_path / "x.sock").stat().st_mode) == 0o660
    assert listeners.loopback and listeners.port == 0
    listeners.close()


def test_unix_socket_has_group_of_setgid_directory(short_path: Path) -> None:
    """nginx connects in this way (docs/deploy.md). Without root, the test can use only its own groups."""
    group = max(os.getgroups(), default=os.getgid()) if os.getuid() else 12345
    os.chown(short_path, -1, group)
    short_path.chmod(0o2750)
    listeners = listen(f"unix:{short_path}/x.sock")
    assert (short_path / "x.sock").stat().st_gid == group
    listeners.close()


def test_socket_in_use_is_not_taken_over(short_path: Path) -> None:
    """A socket whose backlog is full is in use, and so is a socket of another type."""
    with socket.socket(socket.AF_UNIX) as full, ExitStack() as stack:
        full.bind(str(short_path / "full.sock"))
        full.listen(0)
        with pytest.raises(BlockingIOError):
            for _ in range(100):
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                waiting.setblocking(False)
                waiting.connect(str(short_path / "full.sock"))
        assert refused(f"unix:{short_path}/full.sock").startswith("the socket is in use")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(str(short_path / "datagrams.sock"))
        assert refused(f"unix:{short_path}/datagrams.sock").startswith("the socket is in use")


def test_file_that_is_not_a_socket_is_kept(short_path: Path) -> None:
    (short_path / "file").write_text("precious\n")
    (short_path / "directory").mkdir()
    (short_path / "link").symlink_to("file")
    (short_path / "dangling").symlink_to("nothing")
    for name in ("file", "directory", "link", "dangling"):
        assert refused(f"unix:{short_path}/{name}").startswith("the file exists and is not a socket")
    assert (short_path / "file").read_text() == "precious\n"
    assert sorted(path.name for path in short_path.iterdir()) == ["dangling", "directory", "file", "link"]


def test_unusable_path_is_an_error_of_one_line(short_path: Path) -> None:
    assert (
        refused(f"unix:{short_path}/missing/x.sock") == f"the directory {short_path}/missing: No such file or directory"
    )
    (short_path / "file").touch()
    assert refused(f"unix:{short_path}/file/x.sock") == f"the directory {short_path}/file: Not a directory"
    assert "the path of a Unix socket has at most" in refused(f"unix:{short_path}/{'x' * 200}")
    longest = f"{short_path}/".ljust(listeners_module.MAX_PATH, "x")
    listen(f"unix:{longest}").close()
    assert "the path of a Unix socket has at most" in refused(f"unix:{longest}x")
    if os.getuid():
        short_path.chmod(0o500)
        assert refused(f"unix:{short_path}/x.sock") == "Permission denied"
        short_path.chmod(0o700)


def test_read_only_directory_is_an_error_of_one_line(short_path: Path) -> None:
    """Even root cannot create files in /proc."""
    assert refused("unix:/proc/x.sock") in ("No such file or directory", "Permission denied", "Operation not permitted")


def test_close_removes_only_its_own_file(short_path: Path) -> None:
    """The file is gone, moved away, or replaced by another server's file."""
    path = short_path / "x.sock"
    listeners = listen(f"unix:{path}")
    path.unlink()
    listeners.close()
    first = listen(f"unix:{path}")
    path.rename(short_path / "moved.sock")
    second = listen(f"unix:{path}")
    first.close()
    connected(path).close()
    second.close()
    assert [path.name for path in short_path.iterdir()] == ["moved.sock"]


def test_one_of_many_servers_takes_over_stale_file(short_path: Path) -> None:
    path = short_path / "x.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    start = threading.Barrier(8)

    def race() -> Listeners | None:
        start.wait()
        try:
            return listen(f"unix:{path}")
        except AddressError as error:
            assert "the socket is in use" in str(error)
            return None

    racing = [Blocked(race) for _ in range(8)]
    (winner,) = [listeners for attempt in racing if (listeners := attempt.result())]
    connected(path).close()
    winner.sockets[0].setblocking(True)
    winner.sockets[0].accept()[0].close()
    winner.close()


def test_locked_directory_is_given_up_after_timeout(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners_module, "LOCK_TIMEOUT", 0.1)
    listeners = listen(f"unix:{short_path}/x.sock")
    with locked(short_path):
        assert refused(f"unix:{short_path}/y.sock") == f"another process keeps the directory {short_path} locked"
        listeners.close()  # leaves the file: without the lock it may be another server's
    assert (short_path / "x.sock").exists()
    listen(f"unix:{short_path}/x.sock").close()


def test_link_to_own_unix_socket_is_refused_on_any_path(short_path: Path) -> None:
    """The file decides, as it may have several paths. Another server's file is not our own."""
    listeners = listen(f"unix:{short_path}/x.sock")
    other = listen(f"unix:{short_path}/y.sock")
    (short_path / "link.sock").symlink_to("x.sock")
    listeners.sockets[0].setblocking(True)
    for name in ("x.sock", "link.sock"):
        link = Blocked(lambda: raw_link(listeners.sockets[0]))
        with pytest.raises(NotStored, match="this server itself"):
            LinkSink(f"unix:{short_path}/{name}", 0, dial=dialer(is_own=listeners.is_own)).store(BLOCK)
        link.result().close()
    assert not listeners.is_own((socket.AF_UNIX, f"{short_path}/y.sock"))
    assert not listeners.is_own(resolve("127.0.0.1", 1)[0])
    listeners.close()
    other.close()
