"""Deadlines, waiting on conditions, retry pauses, thread start and time formats."""

import datetime
import logging
import math
import subprocess
import sys
import threading
from time import monotonic

import pytest
from support.broken import ProcessEnded, raise_instead_of_exit
from support.harness import DEADLINE, ROOT, Blocked, eventually

from ringolib import timing
from ringolib.timing import ThreadError, backoff, deadline_after, remaining, start_thread, wait_until


def test_deadline_without_a_limit_never_comes() -> None:
    assert deadline_after(None) == math.inf
    assert remaining(deadline_after(None)) == math.inf


def test_remaining_time_is_never_negative() -> None:
    assert remaining(monotonic() - 1) == 0.0
    assert 9 < remaining(deadline_after(10)) <= 10


def test_wait_returns_at_the_deadline_with_false() -> None:
    condition = threading.Condition()
    with condition:
        assert wait_until(condition, lambda: False, deadline_after(0.01)) is False
        assert wait_until(condition, lambda: True, deadline_after(-1)) is True, "the predicate is called at least once"


def test_wait_without_a_deadline_returns_once_it_is_notified() -> None:
    condition, state = threading.Condition(), [False]

    def wait() -> bool:
        with condition:
            return wait_until(condition, lambda: state[0])

    call = Blocked(wait)
    assert call.still()
    with condition:
        condition.notify_all()  # without the predicate: it waits on
    assert call.still()
    with condition:
        state[0] = True
        condition.notify_all()
    assert call.result() is True


def test_backoff_grows_to_its_limit_and_never_overflows() -> None:
    for failures in (0, 1, 5, 16, 10_000):
        limit = min(timing.BACKOFF_MAX_SECONDS, timing.BACKOFF_FIRST_SECONDS * 2 ** min(failures, 16))
        assert all(0 <= backoff(failures) <= limit for _ in range(50))


def test_started_thread_is_a_named_daemon() -> None:
    done = threading.Event()
    thread = start_thread(done.set, name="worker")
    thread.join(20)
    assert done.is_set() and thread.daemon and thread.name == "worker"


def test_missing_thread_is_one_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(ThreadError, match=r"can't start new thread \(ulimit -u"):
        start_thread(lambda: None, name="worker")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and a limit of the address space")
@pytest.mark.parametrize("spare", [0, 4096, 8192, 16384])
def test_thread_without_memory_is_an_error_and_does_not_hang_its_starter(spare: int) -> None:
    """There is memory for the stack at most: the thread ends before it begins, or is refused."""
    script = f"""
import resource, sys, threading
from ringolib import timing
timing.START_TIMEOUT_SECONDS = 0.5
with open("/proc/self/statm") as statm:
    used = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_STACK, (2**23, resource.RLIM_INFINITY))
before = resource.getrlimit(resource.RLIMIT_AS)
done = threading.Event()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**23 + {spare}, before[1]))
try:
    timing.start_thread(done.set, name="worker").join()
    error = None
except timing.ThreadError as caught:
    error = caught
resource.setrlimit(resource.RLIMIT_AS, before)
assert done.is_set() or str(error).endswith("(ulimit -v limits memory)"), error
done.clear()
timing.start_thread(done.set, name="worker").join()
assert done.is_set()
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr


def test_thread_that_begins_too_late_does_not_do_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its starter has given up, and may have started another one."""
    monkeypatch.setattr(timing, "START_TIMEOUT_SECONDS", 0.01)
    gate, done = threading.Event(), threading.Event()
    begin = threading.Thread._bootstrap  # type: ignore[attr-defined]

    def begin_late(thread: threading.Thread) -> None:
        gate.wait()
        begin(thread)

    monkeypatch.setattr(threading.Thread, "_bootstrap", begin_late)
    thread = threading.Thread(target=done.set, daemon=True)
    with pytest.raises(ThreadError, match=r"it has not begun after 0.01 s \(ulimit -v limits memory\)"):
        timing.start(thread)
    gate.set()
    eventually(lambda: thread.ident and not thread.is_alive())
    assert not done.is_set()


@pytest.mark.parametrize("level", [logging.INFO, logging.DEBUG])
def test_unexpected_error_is_logged_with_its_cause_in_detail(level: int, caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("ringoexp.test")
    with caplog.at_level(level, "ringoexp.test"):
        timing.log_unexpected(log, "worker_error", ZeroDivisionError("a bug"))
    (record,) = caplog.records
    assert (record.msg, record.args) == ("worker_error", {"error": "ZeroDivisionError('a bug')"})
    assert bool(record.exc_info) == (level == logging.DEBUG)


def test_repeated_unexpected_error_is_logged_in_detail_only(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("ringoexp.test")
    with caplog.at_level(logging.DEBUG, "ringoexp.test"):
        timing.log_unexpected(log, "worker_error", ZeroDivisionError("a bug"), repeated=True)
    assert [record.levelno for record in caplog.records] == [logging.DEBUG]


@pytest.mark.parametrize("level", [logging.INFO, logging.DEBUG])
def test_fatal_logs_the_cause_and_ends_the_process(
    level: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    statuses = raise_instead_of_exit(monkeypatch)
    log = logging.getLogger("ringoexp.test")
    with caplog.at_level(level, "ringoexp.test"), pytest.raises(ProcessEnded):
        try:
            raise ZeroDivisionError("a bug")
        except ZeroDivisionError:
            timing.fatal(log, "the ring")
    (record,) = caplog.records
    assert record.msg == "fatal" and record.levelno == logging.CRITICAL and isinstance(record.args, dict)
    place = record.args.pop("place")
    assert record.args == {"part": "the ring", "error": "ZeroDivisionError('a bug')"}
    assert place.startswith("test_timing.py:") and place.endswith("test_fatal_logs_the_cause_and_ends_the_process")
    assert bool(record.exc_info) == (level == logging.DEBUG)
    assert statuses == [70]


def test_fatal_ends_the_process_even_if_nothing_can_be_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*unused: object, **more: object) -> None:
        raise MemoryError

    statuses = raise_instead_of_exit(monkeypatch)
    log = logging.getLogger("ringoexp.test")
    monkeypatch.setattr(log, "critical", no_memory)
    with pytest.raises(ProcessEnded):
        timing.fatal(log, "the ring")
    assert statuses == [timing.EXIT_FATAL]


def test_times_are_iso_8601_in_utc() -> None:
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5, 678_900, datetime.timezone.utc)
    assert timing.format_utc(moment) == "2026-01-02T03:04:05.678Z"
    assert timing.format_unix_time(moment.timestamp()) == "2026-01-02T03:04:05.678Z"
    before = datetime.datetime.now(datetime.timezone.utc)
    ago = datetime.datetime.fromisoformat(timing.format_ago(3600).replace("Z", "+00:00"))
    assert abs((before - ago).total_seconds() - 3600) < 5
