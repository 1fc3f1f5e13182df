"""When the system gives no more threads: the log says so, what runs goes on, and nothing is left open."""

import logging
import resource
import socket
import threading
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.harness import DEADLINE, RawClient, eventually, frame, free_port, request, server

from ringbuffer import Ring
from ringolib.app import App, StartupError
from ringolib.forward.destination import Destination
from ringolib.forward.link import LinkSink, LinkState
from ringolib.forward.sink import StoreSink
from ringolib.forward.spool import Spool
from ringolib.forward.workers import Forwarder
from ringolib.net.credentials import Credentials
from ringolib.options import read_arguments
from ringolib.status.readiness import Readiness
from store import Store

NONE_LEFT = "can't start new thread"
SOURCE = b"s" * 16


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Lets no thread start whose name begins so."""
    start = threading.Thread.start

    def refusing(prefix: str) -> None:
        def refused(thread: threading.Thread) -> None:
            if thread.name.startswith(prefix):
                raise RuntimeError(NONE_LEFT)
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refused)

    return refusing


def test_a_connection_is_closed_and_the_next_one_served_when_there_are_threads_again(tmp_path: Path) -> None:
    """Without room for a thread's stack in its address space; really so, not made up."""
    with server(tmp_path, "-p", "0", "-T", "0") as running:
        pid = running.process.pid
        with open(f"/proc/{pid}/statm") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        before = resource.prlimit(pid, resource.RLIMIT_AS, (used + 2**20, resource.RLIM_INFINITY))
        with socket.create_connection(("localhost", running.port), DEADLINE) as client:
            assert client.recv(1) == b"", "closed"
        eventually(lambda: f'event=no_thread error="{NONE_LEFT}"' in running.errors.read_text())
        resource.prlimit(pid, resource.RLIMIT_AS, before)
        assert request(running.port, "GET", "/v1.0/alive")[0] == 200
        assert running.stop() == 0


@pytest.mark.parametrize("thread", ["accept", "profiler"])
def test_a_server_that_cannot_begin_says_so_and_leaves_nothing_open(
    tmp_path: Path, refuse: Callable[[str], None], thread: str
) -> None:
    flags = ["-I", "false", "-p", "0", "-L", str(free_port()), "-D", str(tmp_path / "d")]
    parts = App(read_arguments(flags), flags)
    try:
        refuse(thread)
        with pytest.raises(StartupError, match=f"^cannot start a thread: {NONE_LEFT} "):
            parts.start()
    finally:
        parts.stop()
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


def test_a_stop_needs_no_more_threads(tmp_path: Path) -> None:
    """It is the one thing that has to work when they are used up."""
    patch = f"""threading.begin = threading.Thread.start; threading.error = RuntimeError({NONE_LEFT!r});
        threading.no = lambda self: (each for each in ()).throw(threading.error);
        threading.Thread.start = lambda self: (threading.no if self.name == "signals" else threading.begin)(self)"""
    patch = " ".join(patch.split())
    with server(tmp_path, "-p", "0", "-T", "0", patch=patch) as running:
        with RawClient(running.port) as client:
            client.send(frame(2, bytes(4)))
            client.acked(1)
        assert running.stop() == 0
        assert running.tally == "ringoexp: stopped, 1 stored, 0 unstored"
        said = running.errors.read_text()
        assert f'event=no_thread error="cannot start a thread: {NONE_LEFT} ' in said and "Traceback" not in said


def test_workers_that_run_do_the_work_of_those_that_cannot_start(
    tmp_path: Path, refuse: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    store, ring = Store(str(tmp_path / "d")), Ring(64)
    refuse("forward-2")
    forwarder = Forwarder(ring, [Destination(lambda connected: StoreSink(store))], 8, 1)
    try:
        ring.put(array("q", range(50)), SOURCE, 0, DEADLINE)
        assert ring.wait_committed(49, DEADLINE)
        eventually(lambda: "no_thread" in [record.msg for record in caplog.records])
        (said, *_) = [record for record in caplog.records if record.msg == "no_thread"]
        assert said.levelno == logging.ERROR and said.args == {"error": NONE_LEFT, "workers": 1}
    finally:
        ring.close()
        forwarder.stop(DEADLINE)
        store.close()


def test_a_spool_without_its_thread_is_closed_again(tmp_path: Path, refuse: Callable[[str], None]) -> None:
    path = str(tmp_path / "spool")
    refuse("replay")
    with pytest.raises(RuntimeError, match=NONE_LEFT):
        Spool(path, 1000, LinkSink("localhost", 1), LinkState("localhost:1"))
    refuse("none of these")
    Spool(path, 1000, LinkSink("localhost", 1), LinkState("localhost:1")).stop(DEADLINE)


def test_a_question_that_cannot_be_asked_is_a_reason(tmp_path: Path, refuse: Callable[[str], None]) -> None:
    store = Store(str(tmp_path / "d"))
    try:
        ready = Readiness(None, store, None, None, Credentials())
        refuse("ask-")
        (reason,) = ready.reasons()
        assert reason.detail == f"no thread to be had: {NONE_LEFT}"
    finally:
        store.close()
