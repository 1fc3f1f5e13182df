"""Notifications to a service manager, sd_notify(3): a socket of the test takes the manager's place."""

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
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
from ringolib.status import systemd


class Manager:
    """A service manager's socket. `name` is its address, as in `$NOTIFY_SOCKET`."""

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
        """Return the fields of the next message. Raises TimeoutError."""
        self._socket.settimeout(timeout)
        lines = self._socket.recv(65536).decode().split("\n")
        return dict(line.split("=", 1) for line in lines)

    def until(self, field: str) -> dict[str, str]:
        """Return the next message with this field, and skip others."""
        while field not in (message := self.next()):
            pass
        return message


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with Manager(str(tmp_path / "notify")) as manager:
        yield manager


@contextmanager
def managed_server(
    directory: Path, manager: Manager, *flags: str, period: float = 0, patch: str = ""
) -> Iterator[ServerProcess]:
    """Run a server that notifies the manager; `period` is the watchdog's, in seconds."""
    env = {"NOTIFY_SOCKET": manager.name}
    if period:
        env["WATCHDOG_USEC"] = str(round(period * 1e6))
    with server(directory, *flags, env=env, patch=patch) as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_ready_is_sent_when_accepting_and_stopping_before_the_end(tmp_path: Path, kind: str) -> None:
    name = str(tmp_path / "notify") if kind == "path" else f"@ringoexp-test-{os.getpid()}-{time.monotonic_ns()}"
    port = free_port()
    with Manager(name) as manager:
        start = Blocked(lambda: ServerProcess(tmp_path, "-p", str(port), "-T", str(port), env={"NOTIFY_SOCKET": name}))
        message = manager.next()
        assert message["READY"] == "1" and f"storing in {tmp_path}/ringoexp.db, " in message["STATUS"]
        assert request(port, "GET", "/v1.0/alive")[0] == 200
        running: ServerProcess = start.result()
        try:
            assert running.stop() == 0
        finally:
            running.kill()
        assert manager.next()["STOPPING"] == "1"
        with pytest.raises(TimeoutError):
            manager.next(timeout=0.01)


@pytest.mark.slow
def test_stopping_is_sent_before_the_drain_and_watchdog_continues(tmp_path: Path, manager: Manager) -> None:
    flags = "-p", "0", "-U", "localhost", "-T", str(free_port())
    with managed_server(tmp_path, manager, *flags, period=0.4) as running, RawClient(running.port) as client:
        assert "READY" in manager.until("READY")
        client.send(frame(2, bytes(4)))
        eventually(lambda: running.stats()["recordsReceived"] == 1)
        running.send_signal(signal.SIGTERM)
        assert "storing 1 records, for up to 30 s" in manager.until("STOPPING")["STATUS"]
        assert running.process.poll() is None
        for _ in range(3):
            manager.until("WATCHDOG")


@pytest.mark.quiet
def test_watchdog_notifies_twice_per_period(tmp_path: Path, manager: Manager) -> None:
    with managed_server(tmp_path, manager, "-p", "0", "-T", "0", period=0.8):
        manager.until("WATCHDOG")
        times = []
        for _ in range(6):
            manager.until("WATCHDOG")
            times.append(time.monotonic())
        gaps = [after - before for before, after in itertools.pairwise(times)]
        assert 0.3 < sum(gaps) / len(gaps) < 0.6, gaps  # not a quarter and not the whole


@pytest.mark.parametrize(
    ("env", "runs"),
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
def test_watchdog_runs_only_if_meant_for_this_process(
    manager: Manager, monkeypatch: pytest.MonkeyPatch, env: dict[str, str], runs: bool
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with systemd.watchdog(lambda: True):
        if runs:
            assert manager.next() == {"WATCHDOG": "1"}
        else:
            with pytest.raises(TimeoutError):
                manager.next(timeout=0.2)


@pytest.mark.parametrize("failure", ["returns False", "raises"])
def test_watchdog_is_silent_while_the_server_is_not_alive(
    manager: Manager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failure: str
) -> None:
    """The failure is logged once, and notifications resume when the server is alive again."""
    monkeypatch.setenv("NOTIFY_SOCKET", manager.name)
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    answers = iter([True, False, False, False])
    returned = []

    def alive() -> bool:
        returned.append(next(answers, True))
        if not returned[-1] and failure == "raises":
            raise MemoryError("no more")
        return returned[-1]

    with systemd.watchdog(alive):
        manager.next()
        manager.next()
    assert returned[:5] == [True, False, False, False, True]
    assert [record.msg for record in caplog.records if record.levelname == "ERROR"] == ["not_alive"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stuck", "flags"),
    [
        ("p.ring._lock", ("-T", "0")),
        ("p.store._lock", ("-T", "0")),
        ("p.store._lock", ("-I", "false")),
        ("p.server.table._lock", ("-T", "0")),
        ("p.totals._lock", ("-I", "false")),
        ("p.forwarder._pool._lock", ("-T", "0")),
        ("p.server.loop._lock", ("-T", "0")),
        ("p.server.loop._lock", ("-I", "false")),
    ],
)
def test_watchdog_is_silent_if_a_lock_is_never_released(
    tmp_path: Path, manager: Manager, stuck: str, flags: tuple[str, ...]
) -> None:
    """SIGUSR1 makes the main thread acquire the lock and keep it."""
    hang = f"ringoexp.signal.signal({signal.SIGUSR1:d}, lambda *unused: {stuck}.acquire())"
    patch = f"ringoexp._status = lambda p: ({hang}, 'started')[1]"
    with managed_server(tmp_path, manager, "-p", "0", *flags, period=0.4, patch=patch) as running:
        manager.until("WATCHDOG")
        running.send_signal(signal.SIGUSR1)

        def silent() -> bool:
            try:
                manager.next(timeout=1.5)
                return False
            except TimeoutError:
                return True

        eventually(silent)


def test_watchdog_is_silent_if_the_ingest_loop_hangs(tmp_path: Path, manager: Manager) -> None:
    """It hangs in the work for a client. Other clients would wait for ever; HTTP is still answered."""
    patch = "app.LOOP_TIMEOUT_SECONDS = 0.5; web.session.Session.receive = lambda *unused: threading.Event().wait()"
    with managed_server(tmp_path, manager, "-p", "0", "-T", "0", period=0.4, patch=patch) as running:
        manager.until("WATCHDOG")
        with RawClient(running.port) as client:
            client.send(frame(2, bytes(4)))
            eventually(lambda: "event=not_alive" in running.errors.read_text())
            assert running.get("/v1.0/alive")[0] == 200
            with pytest.raises(TimeoutError):
                while True:
                    manager.next(timeout=1.5)


@pytest.mark.slow
def test_watchdog_continues_while_the_disk_hangs(tmp_path: Path, manager: Manager) -> None:
    """A restart does not repair a disk."""
    patch = "store.Store._write = lambda self, group: store.time.sleep(600)"
    with managed_server(tmp_path, manager, "-p", "0", "-T", "0", period=0.4, patch=patch) as running:
        with RawClient(running.port) as client:
            client.send(frame(2, bytes(4)))
            eventually(lambda: running.stats()["ringInFlight"] == 1)
            manager.until("READY")
            for _ in range(5):
                assert manager.next() == {"WATCHDOG": "1"}


@pytest.mark.slow
def test_watchdog_is_silent_after_the_acceptor_has_ended(tmp_path: Path, manager: Manager) -> None:
    patch = "web.table.ConnectionTable._is_full = lambda self: 1 / 0; web.connections.threading.excepthook = print"
    with managed_server(tmp_path, manager, "-p", "0", "-T", "0", period=0.4, patch=patch) as running:
        manager.until("WATCHDOG")
        socket.create_connection(("localhost", running.port)).close()
        eventually(lambda: "event=not_alive" in running.errors.read_text())
        with pytest.raises(TimeoutError):
            while True:
                manager.next(timeout=1.0)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "@no-such-socket", "vsock:2:1234", "relative", "/" + "x" * 200])
def test_unreachable_manager_is_logged_at_debug_level_only(tmp_path: Path, name: str) -> None:
    env = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "50000"}
    with server(tmp_path, "-p", "0", "-T", "0", "-d", env=env) as running:
        eventually(lambda: running.errors.read_text().count("event=not_notified") > 2)
        assert running.stop() == 0
        log = running.errors.read_text()
        assert set(re.findall(r"level=(\w+) event=not_notified", log)) == {"debug"}


@pytest.mark.slow
def test_manager_that_does_not_read_does_not_block_the_server(tmp_path: Path, manager: Manager) -> None:
    """The socket's queue is full after a few messages."""
    with managed_server(tmp_path, manager, "-p", "0", "-T", "0", "-d", period=0.002) as running:
        eventually(lambda: "event=not_notified" in running.errors.read_text())
        assert running.get("/v1.0/alive")[0] == 200
        assert running.stop() == 0


def test_without_manager_no_thread_runs_and_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    monkeypatch.setattr(socket, "socket", lambda *unused: pytest.fail("created a socket"))
    monkeypatch.setattr(threading, "Thread", lambda *unused, **more: pytest.fail("created a thread"))
    with systemd.watchdog(lambda: pytest.fail("called alive")):
        systemd.ready("there")
        systemd.stopping("gone")


def test_watchdog_without_a_thread_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The server runs on without a watchdog thread if the system has no thread left."""
    monkeypatch.setenv("WATCHDOG_USEC", "20000")

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    entered = False
    with systemd.watchdog(lambda: pytest.fail("called alive")):
        entered = True
    assert entered
    (record,) = [record for record in caplog.records if record.msg == "no_thread"]
    assert record.levelname == "ERROR" and "can't start new thread" in str(record.args)


def test_reloading_is_sent_with_monotonic_time_before_ready(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.name)
    before = time.monotonic_ns() // 1000
    systemd.reloading()
    message = manager.next()
    assert message["RELOADING"] == "1" and before <= int(message["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    systemd.ready("again")
    assert manager.next() == {"READY": "1", "STATUS": "again"}


def test_line_breaks_in_a_status_add_no_fields(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    """A status contains the name of the database, which is arbitrary text."""
    monkeypatch.setenv("NOTIFY_SOCKET", manager.name)
    systemd.stopping("storing in a\nMAINPID=1\r\nWATCHDOG=trigger\u2028\udcff")
    assert manager.next() == {"STOPPING": "1", "STATUS": "storing in a MAINPID=1 WATCHDOG=trigger \\udcff"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_ends_the_first_process_of_a_container(tmp_path: Path, number: signal.Signals) -> None:
    """For the first process of a PID namespace, signals have no default action."""
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


def test_signal_during_start_ends_the_first_process_of_a_container(tmp_path: Path) -> None:
    """Without a handler the signal would be ignored."""
    slow = "import sys, time; print('importing', flush=True); time.sleep(600)"
    (tmp_path / "simple_websocket.py").write_text(slow)  # imported after the signal handlers are set
    command = [*first_process(), sys.executable, str(ROOT / "ringoexp.py"), "-p", "0", "-T", "0"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "importing\n"
        (pid,) = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        os.kill(pid, signal.SIGTERM)
        try:
            assert process.wait(DEADLINE) == 128 + signal.SIGTERM
        finally:
            process.kill()


def first_process() -> list[str]:
    """Return a command that runs another one as the first process of a PID namespace. Skips if that is forbidden."""
    command = ["unshare", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to create namespaces")
    return command


@pytest.mark.slow
def test_stop_that_hangs_ends_soon_after_the_drain_timeout(tmp_path: Path) -> None:
    """For example on a disk that hangs: a service manager kills the server only a little later."""
    patch = "store.Store.close = lambda self: store.time.sleep(600);"
    patch += "app.DRAIN_SECONDS = 0.2; ringoexp.GIVE_UP_SECONDS = 0.8"
    with server(tmp_path, "-p", "0", "-T", "0", patch=patch) as running:
        began = time.monotonic()
        assert running.stop() == ringoexp.EXIT_UNSTORED
        assert 1.0 <= time.monotonic() - began < 5
        assert "event=stop_given_up" in running.errors.read_text()
