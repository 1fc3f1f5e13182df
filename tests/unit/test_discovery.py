"""The consumers of a publisher: the list in its options, and the addresses of names, which come and go."""

import logging
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.harness import eventually, free_port, server

from ringbuffer import Ring
from ringolib import options
from ringolib.forward import discovery as discovery_module
from ringolib.forward import workers
from ringolib.forward.destination import Destination
from ringolib.forward.discovery import Discovery
from ringolib.forward.link import LinkSink
from ringolib.forward.pool import Worker
from ringolib.forward.sink import NotStored
from ringolib.forward.workers import Forwarder
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


@contextmanager
def following(discovery: Discovery) -> Iterator[Forwarder]:
    """Run a forwarder whose destinations follow the names. Their links cannot be made."""

    def make(endpoint: Endpoint) -> Destination:
        return Destination(lambda connected: LinkSink("localhost", 1), endpoint=endpoint)

    ring = Ring(1)
    running = Forwarder(ring, [make(endpoint) for endpoint in discovery.endpoints], 8)
    try:
        running.follow(discovery, make)
        yield running
    finally:
        ring.abort()
        assert running.stop(20)


def addresses_of(running: Forwarder) -> list[str]:
    return [str(destination.endpoint) for destination in running.destinations]


def test_names_are_resolved_after_link_failure_and_regularly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(discovery_module, "MIN_RESOLVE_INTERVAL_SECONDS", 0.01)
    names = {"name": ["10.0.0.1", "10.0.0.2"]}
    fake_names(monkeypatch, names)
    discovery = Discovery([("name", 7), ("127.0.0.1", 7), ("later", 7)])
    assert [record.args for record in caplog.records] == [
        {"reason": "-U later:7: the host's name cannot be resolved ([Errno -2] Name or service not known)"}
    ]
    with following(discovery) as running:
        assert addresses_of(running) == ["10.0.0.1:7", "10.0.0.2:7", "127.0.0.1:7"]
        names["name"] = ["10.0.0.2", "10.0.0.3"]
        names["later"] = ["10.0.0.9"]
        running._fail(Worker(running.destinations[0], LinkSink("localhost", 1)), NotStored("gone"))
        eventually(lambda: sorted(addresses_of(running)) == ["10.0.0.2:7", "10.0.0.3:7", "127.0.0.1:7", "later:7"])
        del names["name"]  # the name service fails, so the consumers stay the same
        caplog.set_level(logging.DEBUG)
        discovery.hurry()
        eventually(lambda: any("-U name:7" in str(record.args) for record in caplog.records))
        assert len(addresses_of(running)) == 4
        monkeypatch.setattr(discovery_module, "RESOLVE_INTERVAL_SECONDS", 0.01)
        names["name"] = ["10.0.0.3"]
        discovery.hurry()
        eventually(lambda: sorted(addresses_of(running)) == ["127.0.0.1:7", "later:7", "name:7"])
        names["name"] = ["10.0.0.3", "10.0.0.4"]
        eventually(lambda: len(addresses_of(running)) == 4)
    assert "resolve" not in [thread.name for thread in threading.enumerate()]
    assert {"added": "10.0.0.3:7 later:7", "gone": "10.0.0.1:7"} in [record.args for record in caplog.records]


def test_hosts_without_names_start_no_thread() -> None:
    with following(Discovery([("127.0.0.1", 7), ("localhost", 8), ("unix:x", 0)])):
        assert "resolve" not in [thread.name for thread in threading.enumerate()]


def test_no_resolvable_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_names(monkeypatch, {})
    with pytest.raises(AddressError, match="-U a:1: "):
        Discovery([("a", 1), ("b", 1)])


def test_name_is_one_consumer_with_a_spool(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_names(monkeypatch, {"name": ["10.0.0.1", "10.0.0.2"]})
    discovery = Discovery([("name", 7)], by_name=True)
    assert discovery.endpoints == [Endpoint("name", 7, "name")] and not discovery.has_names


def test_stop_does_not_wait_for_hanging_name_service(monkeypatch: pytest.MonkeyPatch) -> None:
    queries: list[int] = []
    asked, go_on = threading.Event(), threading.Event()

    def resolve(host: str, port: int) -> list[Endpoint]:
        queries.append(1)
        if len(queries) > 1:
            asked.set()
            go_on.wait(30)
        return [Endpoint("10.0.0.1", port, host)]

    discovery = Discovery([("name", 7)], resolve=resolve)
    monkeypatch.setattr(discovery_module, "MIN_RESOLVE_INTERVAL_SECONDS", 0)
    monkeypatch.setattr(workers, "RESOLVER_JOIN_SECONDS", 0.05)
    with following(discovery):
        discovery.hurry()
        assert asked.wait(20)
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
    endpoints = Discovery([("a", 1), ("b", 1)]).endpoints
    assert [str(endpoint) for endpoint in endpoints] == ["10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1"]


def test_persistent_unexpected_error_pauses_resolution_and_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(discovery_module, "MIN_RESOLVE_INTERVAL_SECONDS", 0.1)
    fake_names(monkeypatch, {"a": ["10.0.0.1"]})
    discovery, calls = Discovery([("a", 1)]), []

    def broken(*unused: object) -> None:
        calls.append(1)
        discovery.hurry()
        raise ZeroDivisionError("a bug")

    with following(discovery) as running:
        monkeypatch.setattr(running, "change", broken)
        discovery.hurry()
        threading.Event().wait(0.55)
    assert 2 <= len(calls) <= 6, "at most one turn in 0.1 s"
    assert [record.args for record in caplog.records] == [{"error": "ZeroDivisionError('a bug')"}]
