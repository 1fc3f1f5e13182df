"""Where a server listens: every address of a name on one port, and Unix sockets, their files and their permissions."""

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from support.harness import (
    DEADLINE,
    ROOT,
    Blocked,
    RawClient,
    connected,
    eventually,
    frame,
    free_port,
    in_order,
    not_ready,
    raw_link,
    request,
    rows,
    server,
)

from ringolib.client.producer import Producer
from ringolib.forward.link import LinkSink
from ringolib.forward.sink import NotStored
from ringolib.net import addresses
from ringolib.net import listeners as listeners_module
from ringolib.net.addresses import AddressError, certified_name, resolve
from ringolib.net.listeners import Listeners
from ringolib.options import read_arguments
from ringolib.wire import Block, Run


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
    return Listeners(addresses.format_address(host, port), resolve(host, port))


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

    real = listeners_module._bind
    monkeypatch.setattr(listeners_module, "_bind", bind)
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

    real = listeners_module._bind
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
    with pytest.raises(NotStored, match="this server itself"):
        LinkSink(through, listeners.port, is_own=listeners.is_own).store(a_block())
    answer.result().close()
    listeners.close()


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("example.com", "example.com"),
        ("example.com.", "example.com"),
        ("fe80::1%eth0", "fe80::1"),
        ("127.0.0.1", "127.0.0.1"),
        ("unix:/run/x.", "localhost"),
    ],
)
def test_the_name_in_a_certificate_has_no_last_dot_and_no_zone(host: str, name: str) -> None:
    assert certified_name(host) == name


def a_block() -> Block:
    return Block([Run(bytes(16), 0, 1)], array("q", [1]))


# Unix sockets.


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a path that leaves room for a Unix socket's name, whatever the test is called."""
    with tempfile.TemporaryDirectory(prefix="ringoexp-") as directory:
        yield Path(directory)


def test_with_a_unix_socket_and_no_consumer_named_it_is_a_complete_system(place: Path) -> None:
    """`-H unix:PATH` alone: WebSocket, HTTP and the page; its clients have a name in the log, and no address."""
    with server(place, "-H", "unix:x.sock", "-d") as running:
        assert running.greeting.endswith("publisher on unix:x.sock, storing in ringoexp.db\n")
        assert stat.S_ISSOCK((place / "x.sock").lstat().st_mode)
        with RawClient(running.at) as client:
            client.send(frame(2, struct.pack(">i", 42)))
            assert client.acked(1) == 1
            client.send(frame(8, struct.pack(">H", 1000)))
            assert client.closed()[0] == 1000
        assert request(running.at, "POST", "/v1.0/ingest", bytes(8))[0] == 200
        assert request(running.at, "GET", "/")[0] == 200
        assert request(running.at, "GET", "/nothing")[0] == 404
        assert not_ready(running) == []
        info = json.loads(running.get("/v1.0/stats")[2])["info"]
        assert (info["hostname"], info["port"], info["consumerHostname"]) == ("unix:x.sock", 0, "unix:x.sock")
        assert running.stop() == 0
        assert running.tally == "ringoexp: stopped, 2 stored, 0 unstored"
        log = running.errors.read_text()
        assert "event=connected client=unix kind=plain" in log
        assert "event=refused client=unix status=404" in log
        assert "event=request client=unix" in log
    assert not (place / "x.sock").exists()
    assert [value for _, _, value in rows(place / "ringoexp.db")] == [42, 0]


def test_a_link_to_the_consumer_over_a_unix_socket(place: Path) -> None:
    """Exactly once across a consumer that is killed: its file, left behind, is taken over by the next one."""
    consumer = ("-I", "false", "-H", "unix:consumer.sock", "-D", "numbers.db")
    with server(place, "-H", "unix:x.sock", "-U", f"unix:{place}/consumer.sock") as publisher:
        assert publisher.greeting.endswith(f"publisher on unix:x.sock, forwarding to unix:{place}/consumer.sock\n")
        assert not_ready(publisher) == ["consumer_unreachable"]
        with server(place, *consumer) as first:
            with Producer(f"ws+unix:{publisher.at}:/v1.0/ingest") as producer:
                producer.send(range(1000))
                producer.flush(DEADLINE)
                assert not_ready(publisher) == []
                first.kill()
                assert (place / "consumer.sock").exists()
                producer.send(range(1000, 2000))
                with server(place, *consumer) as second:
                    producer.flush(DEADLINE)
                    assert request(second.at, "GET", "/v1.0/ready")[0] == 200
                    assert publisher.stop() == 0
                    assert second.stop() == 0
        assert f"event=link_up consumer=unix:{place}/consumer.sock" in publisher.errors.read_text()
    assert in_order(place / "numbers.db", producer.source) == list(range(2000))


@pytest.mark.parametrize("url", ["ws+unix:{}:/v1.0/ingest", "ws+unix://{}:/v1.0/ingest"])
def test_send_reaches_a_unix_socket(place: Path, url: str) -> None:
    with server(place, "-H", "unix:x.sock") as running:
        command = [sys.executable, str(ROOT / "ringoexp.py"), "send", "--url", url.format(running.at)]
        done = subprocess.run(command, input=b"1\n2\n3\n", cwd=place, capture_output=True, timeout=DEADLINE)
        assert (done.returncode, done.stderr) == (0, b"")
        assert running.stop() == 0
    assert [value for _, _, value in rows(place / "ringoexp.db")] == [1, 2, 3]


def test_curl_reaches_a_unix_socket(place: Path) -> None:
    """The README's command."""
    if not shutil.which("curl"):
        pytest.skip("no curl")
    with server(place, "-H", "unix:x.sock") as running:
        command = ["curl", "-s", "--unix-socket", "x.sock", "--data-binary", "@-", "http://localhost/v1.0/ingest"]
        done = subprocess.run(command, input=bytes(16), cwd=place, capture_output=True, timeout=DEADLINE)
        assert done.stdout == b'{"stored": 2}\n'
        assert running.stop() == 0


def test_a_server_that_stops_stores_what_came_over_its_unix_socket(place: Path) -> None:
    """Its consumer is away at first: the ring is drained as over TCP, an open WebSocket gets its acks and a Close."""
    with server(place, "-H", "unix:x.sock", "-U", "unix:c.sock") as running:
        with RawClient(running.at) as client, connected(running.at) as idle:
            client.send(b"".join(frame(2, struct.pack(">i", value)) for value in range(100)))
            eventually(lambda: running.stats()["recordsReceived"] == 100)
            running.send_signal(signal.SIGTERM)
            assert idle.recv(1) == b""
            refused = request(running.at, "POST", "/v1.0/ingest", bytes(8))
            assert refused[0] == 503 and b"stopping" in refused[2]
            with server(place, "-I", "false", "-H", "unix:c.sock", "-D", "numbers.db") as consumer:
                assert client.closed() == (1001, "the server is stopping", 100)
                assert running.wait() == 0
                assert consumer.stop() == 0
        assert running.tally == "ringoexp: stopped, 100 stored, 0 unstored"
    assert [path.name for path in place.glob("*.sock")] == []


def test_a_request_that_is_cut_off_by_the_stop_is_answered_all_the_same(place: Path) -> None:
    with server(place, "-H", "unix:x.sock") as running:
        with connected(running.at) as client:
            client.sendall(b"POST /v1.0/ingest HTTP/1.1\r\nHost: localhost\r\nContent-Length: 80\r\n\r\n" + bytes(8))
            eventually(lambda: running.stats()["connections"] == 2)
            running.send_signal(signal.SIGTERM)
            answer = client.recv(65536)
            assert answer.startswith(b"HTTP/1.1 503") and b"stopping" in answer + client.recv(65536)
        assert running.wait() == 0
    assert rows(place / "ringoexp.db") == []


def test_who_does_not_read_its_acks_for_a_while_gets_the_newest(place: Path) -> None:
    """A Unix socket's buffer takes some hundred acks only: the others become one."""
    with server(place, "-H", "unix:x.sock", "-r", "65536") as running, RawClient(running.at) as client:
        for start in range(0, 20_000, 100):
            client.send(b"".join(frame(2, struct.pack(">i", value)) for value in range(start, start + 100)))
        eventually(lambda: running.stats()["recordsStored"] == 20_000)
        assert client.acked(20_000) == 20_000
        assert running.stop() == 0


def test_a_peer_that_binds_its_end_is_unix_too(place: Path) -> None:
    with server(place, "-H", "unix:x.sock", "-d") as running:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(place / "client.sock"))
            sock.connect(str(running.at))
            sock.sendall(b"GET /nothing HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert sock.recv(65536).startswith(b"HTTP/1.1 404")
        assert "event=refused client=unix status=404" in running.errors.read_text()
        assert running.stop() == 0


def test_the_profiler_on_a_unix_socket(place: Path) -> None:
    with server(place, "-H", "unix:x.sock", "-L", "1", "--profiler_host", "unix:p.sock") as running:
        status, _, body = request(place / "p.sock", "GET", "/debug/pprof/cmdline")
        assert status == 200 and b"unix:p.sock" in body
        assert "level=info event=profiling host=unix:p.sock" in running.errors.read_text()
        assert running.stop() == 0
    assert list(place.glob("*.sock")) == []


# Its file.


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_the_file_is_for_its_owner_and_group_whatever_the_umask(place: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        listeners = listen(f"unix:{place}/x.sock")
    finally:
        os.umask(before)
    assert stat.S_IMODE((place / "x.sock").stat().st_mode) == 0o660
    assert listeners.loopback and listeners.port == 0
    listeners.close()


def test_in_a_directory_with_the_setgid_bit_the_group_is_the_directorys(place: Path) -> None:
    """How nginx is let in, says the README. Who is not root has only groups of his own to try it with."""
    group = max(os.getgroups(), default=os.getgid()) if os.getuid() else 12345
    os.chown(place, -1, group)
    place.chmod(0o2750)
    listeners = listen(f"unix:{place}/x.sock")
    assert (place / "x.sock").stat().st_gid == group
    listeners.close()


def test_a_file_whose_server_was_killed_is_taken_over(place: Path) -> None:
    for _ in range(2):
        with server(place, "-H", "unix:x.sock") as running:
            running.kill()
        assert (place / "x.sock").exists()
    with server(place, "-H", "unix:x.sock") as running:
        assert running.get("/v1.0/alive")[0] == 200
        assert running.stop() == 0


def refused(host: str) -> str:
    """Why no server can listen there."""
    with pytest.raises(AddressError) as failed:
        listen(host)
    text = str(failed.value)
    assert text.startswith(f"cannot listen on {host}: ") and "\n" not in text
    return text.removeprefix(f"cannot listen on {host}: ")


def test_a_socket_in_use_is_one_line(place: Path) -> None:
    """By a server of ours, by one whose queue is full, or by a socket of another kind: none of them is disturbed."""
    with server(place, "-H", "unix:x.sock") as running:
        done = subprocess.run(
            [sys.executable, str(ROOT / "ringoexp.py"), "-H", "unix:x.sock", "-D", "other.db"],
            cwd=place,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert done.stderr.startswith("ringoexp: error: cannot listen on unix:x.sock: it is in use, somebody listens")
        assert not (place / "other.db").exists()
        assert running.get("/v1.0/alive")[0] == 200
        assert running.stop() == 0
    with socket.socket(socket.AF_UNIX) as full, ExitStack() as stack:
        full.bind(str(place / "full.sock"))
        full.listen(0)
        with pytest.raises(BlockingIOError):
            for _ in range(100):
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                waiting.setblocking(False)
                waiting.connect(str(place / "full.sock"))
        assert refused(f"unix:{place}/full.sock").startswith("it is in use")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(str(place / "datagrams.sock"))
        assert refused(f"unix:{place}/datagrams.sock").startswith("it is in use")


def test_what_is_no_socket_is_left_alone(place: Path) -> None:
    (place / "file").write_text("precious\n")
    (place / "directory").mkdir()
    (place / "link").symlink_to("file")
    (place / "dangling").symlink_to("nothing")
    for name in ("file", "directory", "link", "dangling"):
        assert refused(f"unix:{place}/{name}").startswith("there is a file, and it is no socket")
    assert (place / "file").read_text() == "precious\n"
    assert sorted(path.name for path in place.iterdir()) == ["dangling", "directory", "file", "link"]


def test_a_path_that_cannot_be_had_is_one_line(place: Path) -> None:
    assert refused(f"unix:{place}/missing/x.sock") == f"the directory {place}/missing: No such file or directory"
    (place / "file").touch()
    assert refused(f"unix:{place}/file/x.sock") == f"the directory {place}/file: Not a directory"
    assert "a Unix socket's at most" in refused(f"unix:{place}/{'x' * 200}")
    longest = f"{place}/".ljust(listeners_module.MAX_PATH, "x")
    listen(f"unix:{longest}").close()
    assert "a Unix socket's at most" in refused(f"unix:{longest}x")
    if os.getuid():
        place.chmod(0o500)
        assert refused(f"unix:{place}/x.sock") == "Permission denied"
        place.chmod(0o700)


def test_a_directory_that_may_not_be_written_is_one_line(place: Path) -> None:
    """Not even root may write into /proc."""
    said = refused("unix:/proc/x.sock")
    assert said in ("No such file or directory", "Permission denied", "Operation not permitted")


def test_what_another_has_put_in_its_place_is_not_removed(place: Path) -> None:
    """Moved away, replaced by another server's, or gone: a stop removes what it made, nothing else."""
    path = place / "x.sock"
    listeners = listen(f"unix:{path}")
    path.unlink()
    listeners.close()
    first = listen(f"unix:{path}")
    path.rename(place / "moved.sock")
    second = listen(f"unix:{path}")
    first.close()
    connected(path).close()
    second.close()
    assert [each.name for each in place.iterdir()] == ["moved.sock"]


def test_of_many_that_start_at_once_one_takes_a_stale_file_over(place: Path) -> None:
    path = place / "x.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    start = threading.Barrier(8)

    def race() -> Listeners | None:
        start.wait()
        try:
            return listen(f"unix:{path}")
        except AddressError as error:
            assert "it is in use" in str(error)
            return None

    racing = [Blocked(race) for _ in range(8)]
    (winner,) = [found for each in racing if (found := each.result())]
    connected(path).close()
    winner.sockets[0].setblocking(True)
    winner.sockets[0].accept()[0].close()
    winner.close()


def test_a_directory_that_somebody_keeps_locked_is_given_up(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners_module, "LOCK_TIMEOUT", 0.1)
    listeners = listen(f"unix:{place}/x.sock")
    with locked(place):
        assert refused(f"unix:{place}/y.sock") == f"somebody keeps the directory {place} locked"
        listeners.close()  # leaves the file: it cannot know that it still is its own
    assert (place / "x.sock").exists()
    listen(f"unix:{place}/x.sock").close()


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Somebody else's lock on a directory."""
    descriptor = os.open(directory, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
    os.close(descriptor)


def test_no_link_leads_to_the_servers_own_unix_socket_whatever_the_path(place: Path) -> None:
    """Found out from the file, as it may have several paths; another server's file is another server's."""
    listeners = listen(f"unix:{place}/x.sock")
    other = listen(f"unix:{place}/y.sock")
    (place / "link.sock").symlink_to("x.sock")
    listeners.sockets[0].setblocking(True)
    for name in ("x.sock", "link.sock"):
        answer = Blocked(lambda: raw_link(listeners.sockets[0]))
        with pytest.raises(NotStored, match="this server itself"):
            LinkSink(f"unix:{place}/{name}", 0, is_own=listeners.is_own).store(a_block())
        answer.result().close()
    assert not listeners.is_own((socket.AF_UNIX, f"{place}/y.sock"))
    assert not listeners.is_own(resolve("127.0.0.1", 1)[0])
    listeners.close()
    other.close()


@pytest.mark.parametrize("host", ["unix:", "unix: "])
def test_a_unix_socket_has_a_path(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("-H", "-U", "--profiler_host"):
        with pytest.raises(SystemExit) as ended:
            read_arguments([flag, host])
        assert ended.value.code == 2
        assert "unix:PATH, the path of a Unix socket" in capsys.readouterr().err


def test_minus_t_zero_is_for_who_asks_for_a_free_port_too(capsys: pytest.CaptureFixture[str]) -> None:
    read_arguments(["-H", "unix:x.sock", "-U", "unix:y.sock", "-T", "0"])
    for words in (["-H", "unix:x.sock", "-T", "0"], ["-H", "unix:x.sock", "-p", "0", "-T", "0"]):
        with pytest.raises(SystemExit):
            read_arguments(words)
        assert "-T/--consumer_port: 0 is not accepted" in capsys.readouterr().err
