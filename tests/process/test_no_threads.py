"""If the system starts no more threads, the cause is logged, running threads continue, and nothing is left open."""

import logging
import re
import resource
import socket
import threading
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.harness import DEADLINE, RawClient, eventually, frame, free_port, request, server

import ringoexp
from ringbuffer import Ring
from ringolib.app import App, StartupError
from ringolib.forward.destination import Destination
from ringolib.forward.health import Health
from ringolib.forward.link import LinkSink
from ringolib.forward.sink import StoreSink
from ringolib.forward.spool import Spool
from ringolib.forward.workers import Forwarder
from ringolib.net.credentials import Credentials
from ringolib.options import read_arguments
from ringolib.status.readiness import Readiness
from store import Store

NONE_LEFT = "can't start new thread"
NO_THREAD_EVENT = rf'event=no_thread error="[^"]*{NONE_LEFT}'
SOURCE = b"s" * 16


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function: it makes all starts of threads fail whose name has this prefix."""
    start = threading.Thread.start

    def refusing(prefix: str) -> None:
        def refused(thread: threading.Thread) -> None:
            if thread.name.startswith(prefix):
                raise RuntimeError(NONE_LEFT)
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refused)

    return refusing


def test_connection_without_a_thread_is_closed(tmp_path: Path) -> None:
    """The address space has no room for a thread's stack: a real limit, not a simulated one."""
    with server(tmp_path, "-p", "0", "-T", "0") as running:
        pid = running.process.pid
        with open(f"/proc/{pid}/statm") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        before = resource.prlimit(pid, resource.RLIMIT_AS, (used + 2**20, resource.RLIM_INFINITY))
        with socket.create_connection(("localhost", running.port), DEADLINE) as client:
            assert client.recv(1) == b"", "closed"
        eventually(lambda: re.search(NO_THREAD_EVENT, running.errors.read_text()))
        assert "(ulimit -v limits memory)" in running.errors.read_text()
        resource.prlimit(pid, resource.RLIMIT_AS, before)
        assert request(running.port, "GET", "/v1.0/alive")[0] == 200
        assert running.stop() == 0


@pytest.mark.parametrize("thread", ["accept", "profiler"])
def test_failed_start_names_the_cause_and_leaves_nothing_open(
    tmp_path: Path, refuse: Callable[[str], None], thread: str
) -> None:
    flags = ["-I", "false", "-p", "0", "-L", str(free_port()), "-D", str(tmp_path / "d")]
    app = App(read_arguments(flags), flags)
    try:
        refuse(thread)
        with pytest.raises(StartupError, match=NONE_LEFT):
            app.start()
    finally:
        app.stop()
    Store(str(tmp_path / "d")).close()


def test_failed_start_ends_the_workers(monkeypatch: pytest.MonkeyPatch, refuse: Callable[[str], None]) -> None:
    """The thread that resolves names is the last to start, after the workers."""
    getaddrinfo = socket.getaddrinfo

    def resolve(host: str, *rest: Any, **options: Any) -> Any:
        return getaddrinfo("127.0.0.1" if host == "consumer.test" else host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    flags = ["-p", "0", "-U", f"consumer.test:{free_port()}"]
    refuse("resolve")
    with pytest.raises(StartupError, match=NONE_LEFT):
        App(read_arguments(flags), flags)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("forward-")]


def test_failed_second_worker_ends_the_first(refuse: Callable[[str], None]) -> None:
    flags = ["-p", "0", "-U", f"127.0.0.1:{free_port()},127.0.0.1:{free_port()}"]
    refuse("forward-2")
    with pytest.raises(StartupError, match=NONE_LEFT):
        App(read_arguments(flags), flags)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("forward-")]


def test_stop_needs_no_new_thread(tmp_path: Path) -> None:
    """A server must be able to stop when the threads are used up: that is when an operator stops it."""
    patch = f"""threading.begin = threading.Thread.start; threading.error = RuntimeError({NONE_LEFT!r});
        threading.no = lambda self: (nothing for nothing in ()).throw(threading.error);
        threading.Thread.start = lambda self: (threading.no if self.name == "signals" else threading.begin)(self)"""
    patch = " ".join(patch.split())
    with server(tmp_path, "-p", "0", "-T", "0", patch=patch) as running:
        with RawClient(running.port) as client:
            client.send(frame(2, bytes(4)))
            client.acked(1)
        assert running.stop() == 0
        assert running.tally == "ringoexp: stopped, 1 stored, 0 unstored"
        log = running.errors.read_text()
        assert re.search(NO_THREAD_EVENT, log) and "Traceback" not in log


def test_running_workers_drain_the_ring_if_no_more_can_start(
    tmp_path: Path, refuse: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    store, ring = Store(str(tmp_path / "d")), Ring(64)
    refuse("forward-2")
    forwarder = Forwarder(ring, [Destination(lambda connected: StoreSink(store))], 8, 1)
    try:
        ring.put(array("q", range(50)), SOURCE, 0, DEADLINE)
        assert ring.wait_committed(0, 49, DEADLINE)
        eventually(lambda: "no_thread" in [record.msg for record in caplog.records])
        (event, *_) = [record for record in caplog.records if record.msg == "no_thread"]
        error = f"cannot start a thread: {NONE_LEFT} (ulimit -u limits threads)"
        assert event.levelno == logging.ERROR and event.args == {"error": error, "workers": 1}
    finally:
        ring.close()
        forwarder.stop(DEADLINE)
        store.close()


def test_spool_without_its_thread_is_closed(tmp_path: Path, refuse: Callable[[str], None]) -> None:
    path = str(tmp_path / "spool")
    refuse("replay")
    with pytest.raises(RuntimeError, match=NONE_LEFT):
        Spool(path, 1000, LinkSink("localhost", 1), Health("localhost:1"))
    refuse("none of these")
    Spool(path, 1000, LinkSink("localhost", 1), Health("localhost:1")).stop(DEADLINE)


def test_readiness_check_without_a_thread_is_a_reason(tmp_path: Path, refuse: Callable[[str], None]) -> None:
    store = Store(str(tmp_path / "d"))
    try:
        ready = Readiness(None, store, None, None, Credentials())
        refuse("ask-")
        (reason,) = ready.reasons()
        assert reason.detail == f"cannot start a thread: {NONE_LEFT} (ulimit -u limits threads)"
    finally:
        store.close()


def test_server_without_memory_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_memory(*unused: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ringoexp, "serve", no_memory)
    monkeypatch.setattr(ringoexp.logs, "setup", lambda *unused: None)
    assert ringoexp.main([]) == 1
    assert capsys.readouterr().err == "ringoexp: error: not enough memory (ulimit -v limits it)\n"
