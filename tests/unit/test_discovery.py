"""The consumers of a publisher: the list in its options, and the addresses of names, which come and go."""

import logging
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.harness import Blocked, eventually, free_port, server

from ringolib import options
from ringolib.forward import discovery
from ringolib.forward.destination import Destination
from ringolib.forward.discovery import Consumers
from ringolib.net import addresses
from ringolib.net.addresses import AddressError, Endpoint, parse_hosts, resolve_endpoints


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", [("a", 6660)]),
        ("a:1", [("a", 1)]),
        ("a:1,b", [("a", 1), ("b", 6660)]),
        (" a , b:65535 ", [("a", 6660), ("b", 65535)]),
        ("::1", [("::1", 6660)]),
        ("[::1]", [("::1", 6660)]),
        ("[::1]:7,[fe80::1%eth0]:8,2001:db8::1", [("::1", 7), ("fe80::1%eth0", 8), ("2001:db8::1", 6660)]),
        ("unix:/a:b,unix:c,127.0.0.1:1", [("unix:/a:b", 0), ("unix:c", 0), ("127.0.0.1", 1)]),
        ("a,a:1", [("a", 6660), ("a", 1)]),
    ],
)
def test_list_of_hosts_is_parsed(text: str, expected: list[tuple[str, int]]) -> None:
    assert parse_hosts(text, 6660) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,,b", "HOST, HOST:PORT"),
        ("a,", "HOST, HOST:PORT"),
        (":1", "HOST, HOST:PORT"),
        ("a:", "the port ''"),
        ("a:0,b", "the port '0'"),
        ("a:65536", "the port '65536'"),
        ("a:-1", "the port '-1'"),
        ("a:x,b", "the port 'x'"),
        ("[::1]:x", "the port 'x'"),
        ("[::1", "HOST, HOST:PORT"),
        ("[::1]1", "the port '1]1'"),
        ("[a]:1", "HOST, HOST:PORT"),
        ("unix:,b", "unix:PATH"),
        ("a,b,a", "named twice"),
        ("a:6660,a", "named twice"),
    ],
)
def test_malformed_list_of_hosts_is_a_one_line_error(
    text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        options.read_arguments(["-U", text])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert error.startswith("ringoexp: error: argument -U/--consumer_hostname")
    assert f": {text!r} is not accepted: " in error and message in error


def test_settings_contain_consumers_and_show_a_single_one_plainly() -> None:
    for text, shown, expected in [
        ("[::1]", "::1", [("::1", 7)]),
        ("a:1,b", "a:1,b", [("a", 1), ("b", 7)]),
        ("a:1", "a:1", [("a", 1)]),
    ]:
        settings = options.read_arguments(["-U", text, "-T", "7"])
        assert (settings.consumer_hostname, settings.consumers) == (shown, expected)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-U", "a,b", "-S", "s"], "-S/--spool: 's' is not accepted with several consumers"),
        (["-U", "a,b", "-T", "0", "-p", "0"], "-T/--consumer_port: 0 is not accepted"),
        (["-U", "a:6660,a", "-T", "6660"], "named twice"),
    ],
)
def test_options_that_conflict_with_several_consumers_are_refused(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        options.read_arguments(flags)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def fake_names(monkeypatch: pytest.MonkeyPatch, names: dict[str, Sequence[str]]) -> None:
    """Simulate a name service that knows these names, at the time of each query."""

    def getaddrinfo(host: str, port: int, *unused: Any, **more: Any) -> list[Any]:
        if host not in names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port, 0, 0))
            if ":" in address
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in names[host]
        ]

    monkeypatch.setattr(addresses.socket, "getaddrinfo", getaddrinfo)


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (["10.0.0.1"], ["name"]),
        (["::1"], ["name"]),
        (["10.0.0.1", "::1"], ["name"]),  # one server with an address of each family
        (["10.0.0.1", "10.0.0.2"], ["10.0.0.1", "10.0.0.2"]),
        (["fd00::1", "fd00::2", "10.0.0.1"], ["fd00::1", "fd00::2"]),
        (["fd00::1", "fd00::2", "10.0.0.1", "10.0.0.2"], ["10.0.0.1", "10.0.0.2"]),
    ],
)
def test_each_address_of_a_name_is_a_consumer(
    known: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_names(monkeypatch, {"name": known, "localhost": ["127.0.0.1", "127.0.0.2"]})
    assert resolve_endpoints("name", 7) == [Endpoint(address, 7, "name") for address in expected]
    for host in ("localhost", "127.0.0.1", "::1", "unix:x"):
        assert resolve_endpoints(host, 7) == [Endpoint(host, 7, host)], "one consumer, without a query"
    with pytest.raises(AddressError, match="cannot be resolved"):
        resolve_endpoints("other", 7)


class FakeForwarder:
    """In place of a forwarder: records the calls."""

    def __init__(self) -> None:
        self.now: list[str] = []
        self.kept: list[str] = []

    def change(self, added: Sequence[Destination], dropped: Sequence[Destination]) -> None:
        gone = [str(destination.endpoint) for destination in dropped]
        self.now = [address for address in self.now if address not in gone]
        self.now += [str(destination.endpoint) for destination in added]

    def keep(self, destination: Destination) -> bool:
        self.kept.append(str(destination.endpoint))
        return True


def make(endpoint: Endpoint, on_link_lost: Callable[[], None]) -> Destination:
    return Destination(lambda connected: None, endpoint=endpoint, on_link_lost=on_link_lost)  # type: ignore[arg-type,return-value]


def test_names_are_resolved_after_link_failure_and_regularly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(discovery, "MIN_RESOLVE_INTERVAL_SECONDS", 0.01)
    names = {"name": ["10.0.0.1", "10.0.0.2"]}
    fake_names(monkeypatch, names)
    running = Consumers([("name", 7), ("127.0.0.1", 7), ("later", 7)], make)
    assert [record.args for record in caplog.records] == [
        {"reason": "-U later:7: the host's name cannot be resolved ([Errno -2] Name or service not known)"}
    ]
    forwarder = FakeForwarder()
    forwarder.now = [str(destination.endpoint) for destination in running.destinations]
    assert forwarder.now == ["10.0.0.1:7", "10.0.0.2:7", "127.0.0.1:7"]
    running.start(forwarder)
    try:
        names["name"] = ["10.0.0.2", "10.0.0.3"]
        names["later"] = ["10.0.0.9"]
        assert "10.0.0.3:7" not in forwarder.now
        running.destinations[0].on_link_lost()
        eventually(lambda: sorted(forwarder.now) == ["10.0.0.2:7", "10.0.0.3:7", "127.0.0.1:7", "later:7"])
        eventually(lambda: len(running.destinations) == 4)
        del names["name"]  # the name service fails, so the consumers stay the same
        running.on_link_lost()
        kept = len(forwarder.kept)
        eventually(lambda: len(forwarder.kept) > kept and len(running.destinations) == 4)
        monkeypatch.setattr(discovery, "RESOLVE_INTERVAL_SECONDS", 0.01)
        names["name"] = ["10.0.0.3"]
        running.on_link_lost()
        eventually(lambda: sorted(forwarder.now) == ["127.0.0.1:7", "later:7", "name:7"])
        names["name"] = ["10.0.0.3", "10.0.0.4"]
        eventually(lambda: len(forwarder.now) == 4)
    finally:
        running.stop(20)
    assert "resolve" not in [thread.name for thread in threading.enumerate()]
    assert {"added": "10.0.0.3:7 later:7", "gone": "10.0.0.1:7"} in [record.args for record in caplog.records]


def test_hosts_without_names_start_no_thread() -> None:
    running = Consumers([("127.0.0.1", 7), ("localhost", 8), ("unix:x", 0)], make)
    running.start(FakeForwarder())
    assert "resolve" not in [thread.name for thread in threading.enumerate()]
    running.stop(0)


def test_no_resolvable_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_names(monkeypatch, {})
    with pytest.raises(AddressError, match="-U a:1: "):
        Consumers([("a", 1), ("b", 1)], make)


def test_name_is_one_consumer_with_a_spool(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_names(monkeypatch, {"name": ["10.0.0.1", "10.0.0.2"]})
    running = Consumers([("name", 7)], make, by_name=True)
    assert [destination.endpoint for destination in running.destinations] == [Endpoint("name", 7, "name")]
    running.start(FakeForwarder())
    assert "resolve" not in [thread.name for thread in threading.enumerate()]


def test_stop_does_not_wait_for_hanging_name_service(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, go_on = threading.Event(), threading.Event()
    fake_names(monkeypatch, {"name": ["10.0.0.1", "10.0.0.2"]})
    running = Consumers([("name", 7)], make)
    monkeypatch.setattr(discovery, "MIN_RESOLVE_INTERVAL_SECONDS", 0)
    monkeypatch.setattr(discovery, "resolve_endpoints", lambda host, port: (asked.set(), go_on.wait(30), [])[2])
    running.start(FakeForwarder())
    running.on_link_lost()
    assert asked.wait(20)
    Blocked(lambda: running.stop(0.05)).result()
    go_on.set()


def test_own_address_among_several_consumers_is_a_one_line_error(tmp_path: Path) -> None:
    port = free_port()
    with (
        pytest.raises(AssertionError) as failed,
        server(tmp_path, "-p", str(port), "-U", f"localhost:{port},localhost:1"),
    ):
        pass
    assert f"-U localhost:{port}: that is this publisher itself" in str(failed.value)
    assert "Traceback" not in str(failed.value)


def test_single_consumer_may_be_the_publisher_itself(tmp_path: Path) -> None:
    port = free_port()
    with server(tmp_path, "-p", str(port), "-U", f"localhost:{port}") as running:
        assert f"storing in {tmp_path}/ringoexp.db" in running.greeting
        assert running.stats()["consumers"] == []


def test_address_shared_by_two_names_is_one_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_names(monkeypatch, {"a": ["10.0.0.1", "10.0.0.2"], "b": ["10.0.0.2", "10.0.0.3"]})
    running = Consumers([("a", 1), ("b", 1)], make)
    endpoints = [str(destination.endpoint) for destination in running.destinations]
    assert endpoints == ["10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1"]


def test_persistent_unexpected_error_pauses_resolution_and_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(discovery, "MIN_RESOLVE_INTERVAL_SECONDS", 0.1)
    fake_names(monkeypatch, {"a": ["10.0.0.1"]})
    running, calls = Consumers([("a", 1)], make), []

    def broken() -> None:
        calls.append(1)
        running.on_link_lost()
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(running, "step", broken)
    running.start(object())  # type: ignore[arg-type]
    running.on_link_lost()
    threading.Event().wait(0.55)
    running.stop(20)
    assert 2 <= len(calls) <= 6, "at most one turn in 0.1 s"
    assert [record.args for record in caplog.records] == [{"error": "ZeroDivisionError('a bug')"}]
