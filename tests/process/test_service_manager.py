"""What a service manager is told of a server, and when: sd_notify(3), with a socket of ours in the manager's place."""

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.harness import (
    DEADLINE,
    ROOT,
    Blocked,
    RawClient,
    ServerProcess,
    eventually,
    frame,
    free_port,
    request,
    server,
)

import ringoexp
from ringolib.status import systemd as notify


class Manager:
    """The socket that a service manager listens on: its `name`, as in the variable, and what comes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + name[1:] if name.startswith("@") else name)
        self._socket.settimeout(DEADLINE)

    def __enter__(self) -> "Manager":
        return self

    def __exit__(self, *unused: object) -> None:
        self._socket.close()

    def next(self, timeout: float = DEADLINE) -> dict[str, str]:
        """The fields of the next message. Raises TimeoutError."""
        self._socket.settimeout(timeout)
        lines = self._socket.recv(65536).decode().split("\n")
        return dict(line.split("=", 1) for line in lines)

    def until(self, field: str) -> dict[str, str]:
        """The next message with this field; the others on the way are left out."""
        while field not in (message := self.next()):
            pass
        return message


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with Manager(str(tmp_path / "notify")) as made:
        yield made


@contextmanager
def told(directory: Path, manager: Manager, *flags: str, period: float = 0, patch: str = "") -> Iterator[ServerProcess]:
    """A server that tells the manager, and has a watchdog of so many seconds."""
    env = {"NOTIFY_SOCKET": manager.name}
    if period:
        env["WATCHDOG_USEC"] = str(round(period * 1e6))
    with server(directory, *flags, env=env, patch=patch) as running:
        yield running


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_ready_comes_when_connections_are_accepted_and_stopping_before_the_end(tmp_path: Path, kind: str) -> None:
    name = str(tmp_path / "notify") if kind == "path" else f"@ringoexp-test-{os.getpid()}-{time.monotonic_ns()}"
    port = free_port()
    with Manager(name) as manager:
        start = Blocked(lambda: ServerProcess(tmp_path, "-p", str(port), "-T", str(port), env={"NOTIFY_SOCKET": name}))
        message = manager.next()
        assert message["READY"] == "1" and message["STATUS"].endswith("storing in ringoexp.db")
        assert request(port, "GET", "/v1.0/alive")[0] == 200
        running: ServerProcess = start.result()
        try:
            assert running.stop() == 0
        finally:
            running.kill()
        assert manager.next()["STOPPING"] == "1"
        with pytest.raises(TimeoutError):
            manager.next(timeout=0.01)


def test_stopping_comes_before_the_ring_is_drained_and_the_watchdog_goes_on_until_the_end(
    tmp_path: Path, manager: Manager
) -> None:
    flags = "-p", "0", "-U", "localhost", "-T", str(free_port())
    with told(tmp_path, manager, *flags, period=0.4) as running, RawClient(running.port) as client:
        assert "READY" in manager.until("READY")
        client.send(frame(2, bytes(4)))
        eventually(lambda: running.stats()["recordsReceived"] == 1)
        running.send_signal(signal.SIGTERM)
        assert "storing 1 records, for up to 30 s" in manager.until("STOPPING")["STATUS"]
        assert running.process.poll() is None
        for _ in range(3):
            manager.until("WATCHDOG")


def test_the_watchdog_is_told_at_half_its_period_and_by_a_thread_of_its_name(tmp_path: Path, manager: Manager) -> None:
    with told(tmp_path, manager, "-p", "0", "-T", "0", period=0.8):
        manager.until("WATCHDOG")
        times = []
        for _ in range(6):
            manager.until("WATCHDOG")
            times.append(time.monotonic())
        gaps = [after - before for before, after in itertools.pairwise(times)]
        assert 0.3 < sum(gaps) / len(gaps) < 0.6, gaps  # neither a quarter nor the whole; busy machines are late


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({}, False),
        ({"WATCHDOG_USEC": "0"}, False),
        ({"WATCHDOG_USEC": "-5"}, False),
        ({"WATCHDOG_USEC": "soon"}, False),
        ({"WATCHDOG_USEC": "100000", "WATCHDOG_PID": "1"}, False),
        ({"WATCHDOG_USEC": "100000", "WATCHDOG_PID": str(os.getpid())}, True),
        ({"WATCHDOG_USEC": "100000"}, True),
    ],
)
def test_a_watchdog_is_for_the_process_it_is_meant_for(
    manager: Manager, monkeypatch: pytest.MonkeyPatch, env: dict[str, str], told: bool
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with notify.watchdog(lambda: True):
        if told:
            assert manager.next() == {"WATCHDOG": "1"}
        else:
            with pytest.raises(TimeoutError):
                manager.next(timeout=0.2)


@pytest.mark.parametrize("why", ["says no", "fails"])
def test_who_is_not_alive_is_not_vouched_for_until_it_is_again(
    manager: Manager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    """It is logged once."""
    monkeypatch.setenv("NOTIFY_SOCKET", manager.name)
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    answers = iter([True, False, False, False])
    asked = []

    def alive() -> bool:
        asked.append(next(answers, True))
        if not asked[-1] and why == "fails":
            raise MemoryError("no more")
        return asked[-1]

    with notify.watchdog(alive):
        manager.next()
        manager.next()
    assert asked[:5] == [True, False, False, False, True]
    assert [record.msg for record in caplog.records if record.levelname == "ERROR"] == ["not_alive"]


@pytest.mark.parametrize(
    ("stuck", "flags"),
    [
        ("p.ring._lock", ("-T", "0")),
        ("p.store._lock", ("-T", "0")),
        ("p.store._lock", ("-I", "false")),
        ("p.server._lock", ("-T", "0")),
        ("p.totals._lock", ("-I", "false")),
        ("p.forwarder._lock", ("-T", "0")),
    ],
)
def test_a_server_with_a_lock_that_is_never_given_back_is_not_vouched_for(
    tmp_path: Path, manager: Manager, stuck: str, flags: tuple[str, ...]
) -> None:
    """SIGUSR1 makes the main thread take it, and keep it."""
    hang = f"ringoexp.signal.signal({signal.SIGUSR1:d}, lambda *unused: {stuck}.acquire())"
    patch = f"ringoexp._greeting = lambda p: ({hang}, f'x:{{p.server.port}}, x')[1]"
    with told(tmp_path, manager, "-p", "0", *flags, period=0.4, patch=patch) as running:
        manager.until("WATCHDOG")
        running.send_signal(signal.SIGUSR1)

        def silent() -> bool:
            try:
                manager.next(timeout=1.5)
                return False
            except TimeoutError:
                return True

        eventually(silent)


def test_a_disk_that_hangs_is_no_reason_for_a_restart(tmp_path: Path, manager: Manager) -> None:
    """A restart would not mend it, nor a consumer that is away: it goes on to be vouched for."""
    patch = "store.Store._write = lambda self, group: store.time.sleep(600)"
    with told(tmp_path, manager, "-p", "0", "-T", "0", period=0.4, patch=patch) as running:
        with RawClient(running.port) as client:
            client.send(frame(2, bytes(4)))
            eventually(lambda: running.stats()["ringInFlight"] == 1)
            manager.until("READY")
            for _ in range(5):
                assert manager.next() == {"WATCHDOG": "1"}


def test_a_server_whose_acceptor_has_ended_is_not_vouched_for(tmp_path: Path, manager: Manager) -> None:
    patch = "web.connections.Connections._crowded = lambda self: 1 / 0; web.connections.threading.excepthook = print"
    with told(tmp_path, manager, "-p", "0", "-T", "0", period=0.4, patch=patch) as running:
        manager.until("WATCHDOG")
        socket.create_connection(("localhost", running.port)).close()
        eventually(lambda: "event=not_alive" in running.errors.read_text())
        with pytest.raises(TimeoutError):
            while True:
                manager.next(timeout=1.0)


@pytest.mark.parametrize(
    "name", ["/nowhere/at/all", "@nobody-listens-here", "vsock:2:1234", "relative", "/" + "x" * 200]
)
def test_a_manager_that_cannot_be_reached_is_a_line_for_debugging_and_no_more(tmp_path: Path, name: str) -> None:
    env = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "50000"}
    with server(tmp_path, "-p", "0", "-T", "0", "-d", env=env) as running:
        eventually(lambda: running.errors.read_text().count("event=not_notified") > 2)
        assert running.stop() == 0
        said = running.errors.read_text()
        assert set(re.findall(r"level=(\w+) event=not_notified", said)) == {"debug"}


def test_a_manager_that_does_not_read_stops_nobody(tmp_path: Path, manager: Manager) -> None:
    """Its queue is full after a few messages."""
    with told(tmp_path, manager, "-p", "0", "-T", "0", "-d", period=0.002) as running:
        eventually(lambda: "event=not_notified" in running.errors.read_text())
        assert running.get("/v1.0/alive")[0] == 200
        assert running.stop() == 0


def test_without_a_manager_there_is_no_thread_and_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    monkeypatch.setattr(socket, "socket", lambda *unused: pytest.fail("a socket was made"))
    monkeypatch.setattr(notify.threading, "Thread", lambda *unused, **more: pytest.fail("a thread was made"))
    with notify.watchdog(lambda: pytest.fail("asked")):
        notify.ready("there")
        notify.stopping("gone")


def test_a_reload_is_told_with_the_monotonic_time_and_ready_follows(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.name)
    before = time.monotonic_ns() // 1000
    notify.reloading()
    message = manager.next()
    assert message["RELOADING"] == "1" and before <= int(message["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    notify.ready("again")
    assert manager.next() == {"READY": "1", "STATUS": "again"}


def test_what_a_status_says_is_no_field(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database may have any name."""
    monkeypatch.setenv("NOTIFY_SOCKET", manager.name)
    notify.stopping("storing in a\nMAINPID=1\r\nWATCHDOG=trigger\u2028\udcff")
    assert manager.next() == {"STOPPING": "1", "STATUS": "storing in a MAINPID=1 WATCHDOG=trigger \\udcff"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_as_a_containers_first_process_a_second_signal_ends_it(tmp_path: Path, number: signal.Signals) -> None:
    """For which no signal has a default effect."""
    under = first_process()
    with server(tmp_path, "-p", "0", "-T", str(free_port()), under=under) as running:
        (pid,) = map(int, Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children").read_text().split())
        with RawClient(running.port) as client:
            client.send(frame(2, bytes(4)))
            eventually(lambda: running.stats()["recordsReceived"] == 1)
            os.kill(pid, number)
            eventually(lambda: "event=draining" in running.errors.read_text())
            assert Blocked(running.process.wait).still(ringoexp.SAME_SIGNAL_SECONDS)
            os.kill(pid, number)
            assert running.wait() == 128 + number


def test_as_a_containers_first_process_a_signal_while_it_starts_ends_it(tmp_path: Path) -> None:
    """It would be ignored until the server's own handlers are there."""
    slow = "import sys, time; print('there', flush=True); time.sleep(600)"
    (tmp_path / "simple_websocket.py").write_text(slow)  # what is imported after the handlers are set
    command = [*first_process(), sys.executable, str(ROOT / "ringoexp.py"), "-p", "0", "-T", "0"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "there\n"
        (pid,) = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        os.kill(pid, signal.SIGTERM)
        try:
            assert process.wait(DEADLINE) == 128 + signal.SIGTERM
        finally:
            process.kill()


def first_process() -> list[str]:
    """A command that runs another as the first process of its own PID namespace. Skips where there may be none."""
    command = ["unshare", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces are to be had")
    return command


def test_a_stop_that_hangs_gives_up_after_the_drain_and_a_little(tmp_path: Path) -> None:
    """As on a disk that never answers: those who wait for the end kill it not much later."""
    patch = "store.Store.close = lambda self: store.time.sleep(600);"
    patch += "app.DRAIN_SECONDS = 0.2; ringoexp.GIVE_UP_SECONDS = 0.8"
    with server(tmp_path, "-p", "0", "-T", "0", patch=patch) as running:
        began = time.monotonic()
        assert running.stop() == ringoexp.EXIT_UNSTORED
        assert 1.0 <= time.monotonic() - began < 5
        assert "event=stop_given_up" in running.errors.read_text()
