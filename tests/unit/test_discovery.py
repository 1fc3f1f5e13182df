"""Which consumers a publisher has: the list of its flags, and the addresses of names, which come and go."""

import logging
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.harness import Blocked, eventually, free_port, server

from ringolib import options
from ringolib.forward import discovery as consumers
from ringolib.forward.destination import Destination
from ringolib.forward.discovery import Consumers
from ringolib.net import addresses
from ringolib.net.addresses import AddressError, Endpoint, parse_hosts, resolve_endpoints


@pytest.mark.parametrize(
    ("text", "found"),
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
def test_a_list_of_hosts(text: str, found: list[tuple[str, int]]) -> None:
    assert parse_hosts(text, 6660) == found


@pytest.mark.parametrize(
    ("text", "said"),
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
def test_what_is_no_list_of_hosts_is_one_line(text: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        options.read_arguments(["-U", text])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert error.startswith("ringoexp: error: argument -U/--consumer_hostname")
    assert f": {text!r} is not accepted: " in error and said in error


def test_the_settings_know_the_consumers_and_one_is_written_as_ever() -> None:
    for text, shown, found in [
        ("[::1]", "::1", [("::1", 7)]),
        ("a:1,b", "a:1,b", [("a", 1), ("b", 7)]),
        ("a:1", "a:1", [("a", 1)]),
    ]:
        settings = options.read_arguments(["-U", text, "-T", "7"])
        assert (settings.consumer_hostname, settings.consumers) == (shown, found)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["-U", "a,b", "-S", "s"], "-S/--spool: 's' is not accepted with several consumers"),
        (["-U", "a,b", "-T", "0", "-p", "0"], "-T/--consumer_port: 0 is not accepted"),
        (["-U", "a:6660,a", "-T", "6660"], "named twice"),
    ],
)
def test_flags_that_do_not_go_together_with_several(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        options.read_arguments(flags)
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def answers(monkeypatch: pytest.MonkeyPatch, names: dict[str, Sequence[str]]) -> None:
    """A name service that knows these, as they are when it is asked."""

    def getaddrinfo(host: str, port: int, *unused: Any, **more: Any) -> list[Any]:
        if host not in names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (each, port, 0, 0))
            if ":" in each
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port))
            for each in names[host]
        ]

    monkeypatch.setattr(addresses.socket, "getaddrinfo", getaddrinfo)


@pytest.mark.parametrize(
    ("known", "found"),
    [
        (["10.0.0.1"], ["name"]),
        (["::1"], ["name"]),
        (["10.0.0.1", "::1"], ["name"]),  # one server that has both
        (["10.0.0.1", "10.0.0.2"], ["10.0.0.1", "10.0.0.2"]),
        (["fd00::1", "fd00::2", "10.0.0.1"], ["fd00::1", "fd00::2"]),
        (["fd00::1", "fd00::2", "10.0.0.1", "10.0.0.2"], ["10.0.0.1", "10.0.0.2"]),
    ],
)
def test_each_address_of_a_name_with_several_is_a_consumer(
    known: list[str], found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, {"name": known, "localhost": ["127.0.0.1", "127.0.0.2"]})
    assert resolve_endpoints("name", 7) == [Endpoint(each, 7, "name") for each in found]
    for host in ("localhost", "127.0.0.1", "::1", "unix:x"):
        assert resolve_endpoints(host, 7) == [Endpoint(host, 7, host)], "one, and nobody is asked"
    with pytest.raises(AddressError, match="cannot be resolved"):
        resolve_endpoints("other", 7)


class Told:
    """In place of a forwarder: notes what it is told."""

    def __init__(self) -> None:
        self.now: list[str] = []
        self.kept: list[str] = []

    def change(self, added: Sequence[Destination], dropped: Sequence[Destination]) -> None:
        self.now = [each for each in self.now if each not in [str(gone.place) for gone in dropped]]
        self.now += [str(each.place) for each in added]

    def keep(self, destination: Destination) -> bool:
        self.kept.append(str(destination.place))
        return True


def destination(place: Endpoint, lost: Callable[[], None]) -> Destination:
    return Destination(lambda connected: None, place=place, lost=lost)  # type: ignore[arg-type,return-value]


def test_names_are_resolved_again_when_a_link_fails_and_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(consumers, "SOON", 0.01)
    names = {"name": ["10.0.0.1", "10.0.0.2"]}
    answers(monkeypatch, names)
    running = Consumers([("name", 7), ("127.0.0.1", 7), ("later", 7)], destination)
    assert [record.args for record in caplog.records] == [
        {"reason": "-U later:7: the host's name cannot be resolved ([Errno -2] Name or service not known)"}
    ]
    told = Told()
    told.now = [str(each.place) for each in running.destinations]
    assert told.now == ["10.0.0.1:7", "10.0.0.2:7", "127.0.0.1:7"]
    running.start(told)
    try:
        names["name"] = ["10.0.0.2", "10.0.0.3"]
        names["later"] = ["10.0.0.9"]
        assert "10.0.0.3:7" not in told.now
        running.destinations[0].lost()
        eventually(lambda: sorted(told.now) == ["10.0.0.2:7", "10.0.0.3:7", "127.0.0.1:7", "later:7"])
        eventually(lambda: len(running.destinations) == 4)
        del names["name"]  # the name service fails: all stays as it is
        running.lost()
        kept = len(told.kept)
        eventually(lambda: len(told.kept) > kept and len(running.destinations) == 4)
        monkeypatch.setattr(consumers, "NOW_AND_THEN", 0.01)
        names["name"] = ["10.0.0.3"]
        running.lost()
        eventually(lambda: sorted(told.now) == ["127.0.0.1:7", "later:7", "name:7"])
        names["name"] = ["10.0.0.3", "10.0.0.4"]
        eventually(lambda: len(told.now) == 4)
    finally:
        running.stop(20)
    assert "resolve" not in [thread.name for thread in threading.enumerate()]
    assert {"added": "10.0.0.3:7 later:7", "gone": "10.0.0.1:7"} in [record.args for record in caplog.records]


def test_without_names_nobody_is_asked_and_no_thread_runs() -> None:
    running = Consumers([("127.0.0.1", 7), ("localhost", 8), ("unix:x", 0)], destination)
    running.start(Told())
    assert "resolve" not in [thread.name for thread in threading.enumerate()]
    running.stop(0)


def test_if_no_name_resolves_that_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, {})
    with pytest.raises(AddressError, match="-U a:1: "):
        Consumers([("a", 1), ("b", 1)], destination)


def test_with_a_spool_a_name_is_one_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, {"name": ["10.0.0.1", "10.0.0.2"]})
    running = Consumers([("name", 7)], destination, by_name=True)
    assert [each.place for each in running.destinations] == [Endpoint("name", 7, "name")]
    running.start(Told())
    assert "resolve" not in [thread.name for thread in threading.enumerate()]


def test_a_name_service_that_hangs_holds_no_stop_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, go_on = threading.Event(), threading.Event()
    answers(monkeypatch, {"name": ["10.0.0.1", "10.0.0.2"]})
    running = Consumers([("name", 7)], destination)
    monkeypatch.setattr(consumers, "SOON", 0)
    monkeypatch.setattr(consumers, "resolve_endpoints", lambda host, port: (asked.set(), go_on.wait(30), [])[2])
    running.start(Told())
    running.lost()
    assert asked.wait(20)
    Blocked(lambda: running.stop(0.05)).result()
    go_on.set()


def test_an_own_address_among_several_is_one_line(tmp_path: Path) -> None:
    port = free_port()
    with (
        pytest.raises(AssertionError) as failed,
        server(tmp_path, "-p", str(port), "-U", f"localhost:{port},localhost:1"),
    ):
        pass
    assert f"-U localhost:{port}: that is this publisher itself" in str(failed.value)
    assert "Traceback" not in str(failed.value)


def test_one_consumer_with_its_port_may_be_its_own(tmp_path: Path) -> None:
    port = free_port()
    with server(tmp_path, "-p", str(port), "-U", f"localhost:{port}") as running:
        assert "storing in ringoexp.db" in running.greeting
        assert running.stats()["consumers"] == []


def test_one_address_that_two_names_have_is_one_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, {"a": ["10.0.0.1", "10.0.0.2"], "b": ["10.0.0.2", "10.0.0.3"]})
    found = [str(each.place) for each in Consumers([("a", 1), ("b", 1)], destination).destinations]
    assert found == ["10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1"]
