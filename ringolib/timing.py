"""Time and threads: deadlines, waiting, pauses between retries, starting threads, unexpected errors, time formats.

A *deadline* is a reading of `time.monotonic`, so it does not move while a call waits several times, and a change of
the wall clock does not affect it. `math.inf` is the deadline that never comes. The formats are the only readers of the
wall clock here, for people.
"""

import datetime
import logging
import math
import os
import random
import sys
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any, NoReturn

BACKOFF_FIRST_SECONDS = 0.1
BACKOFF_MAX_SECONDS = 5.0
START_TIMEOUT_SECONDS = 5.0
"""How long a new thread may take to begin."""
DEFAULT_STACK_BYTES = 2 * 1024 * 1024
"""The size of a thread's stack if the system does not limit it (glibc, x86-64)."""
THREAD_BYTES = 1024 * 1024
"""Room in the address space that a thread needs besides its stack, at most."""
MEMORY_LIMIT = "ulimit -v limits memory"
EXIT_FATAL = 70
"""The exit status of `fatal`: EX_SOFTWARE of sysexits.h."""


class ThreadError(RuntimeError):
    """No thread could be started. The text names the limit that has probably been reached."""


def deadline_after(seconds: float | None) -> float:
    """Return the deadline that is `seconds` away; None means never."""
    return math.inf if seconds is None else monotonic() + seconds


def remaining(deadline: float) -> float:
    """Return the seconds left until `deadline`, at least 0."""
    return max(0.0, deadline - monotonic())


def wait_until(condition: threading.Condition, predicate: Callable[[], bool], deadline: float = math.inf) -> bool:
    """Wait until `predicate` is true or `deadline` has passed, and return whether it is true.

    The caller holds the condition's lock. The predicate is called at least once, under the lock.
    """
    while not predicate():
        seconds = deadline - monotonic()
        if seconds <= 0:
            return False
        condition.wait(None if seconds == math.inf else seconds)
    return True


def backoff(failures: int) -> float:
    """Return the seconds to wait after `failures` failed attempts in a row: exponential, with full jitter."""
    return random.uniform(0, min(BACKOFF_MAX_SECONDS, BACKOFF_FIRST_SECONDS * 2 ** min(failures, 16)))


class _Begun(threading.Event):
    """Replaces the event for which `Thread.start` waits without a timeout, until the new thread has begun."""

    def wait(self, timeout: float | None = None) -> bool:
        return super().wait(START_TIMEOUT_SECONDS if timeout is None else timeout)


def start(thread: threading.Thread) -> None:
    """Start `thread`. Raises ThreadError if the system has no thread to give, or no memory for it.

    Without memory for its first Python frame, a new thread ends before it begins, and Python does not tell the starter.
    The starter gives up after START_TIMEOUT_SECONDS. If the thread was only slow, it then ends without its work.
    """
    claim = threading.Lock()  # taken by the thread when it begins, or by the starter when it gives up

    def run() -> None:
        del thread.run  # this function, so that the class's own method is called
        if claim.acquire(blocking=False):
            thread.run()

    thread.run = run  # type: ignore[method-assign]
    thread._started = begun = _Begun()  # type: ignore[attr-defined]
    try:
        thread.start()
    except RuntimeError as error:
        raise ThreadError(f"cannot start a thread: {error} ({_thread_limit()})") from error
    if not begun.is_set() and claim.acquire(blocking=False):
        raise ThreadError(f"cannot start a thread: it has not begun after {START_TIMEOUT_SECONDS:g} s ({MEMORY_LIMIT})")


def _thread_limit() -> str:
    """Return the limit that has probably been reached, after the system has refused a thread."""
    try:
        import mmap
        import resource
    except ImportError:  # a Python without them; the program needs them only here
        return f"{MEMORY_LIMIT}, or ulimit -u limits threads"
    soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    stack = DEFAULT_STACK_BYTES if soft == resource.RLIM_INFINITY else soft
    try:
        mmap.mmap(-1, stack + THREAD_BYTES).close()  # takes room in the address space, and no memory
    except (OSError, MemoryError, OverflowError, ValueError):
        return MEMORY_LIMIT
    return "ulimit -u limits threads"


class Runtime:
    """The clock, conditions and threads, for objects that a test must be able to run in an order that it chooses.

    They get `RUNTIME` by default. A test gives them a subclass.
    """

    def monotonic(self) -> float:
        """Return the time in seconds, of a clock that only goes forward."""
        return monotonic()

    def condition(self, lock: threading.Lock) -> threading.Condition:
        """Return a condition on this lock."""
        return threading.Condition(lock)

    def wait_until(
        self, condition: threading.Condition, predicate: Callable[[], bool], deadline: float = math.inf
    ) -> bool:
        """See the function of this name."""
        return wait_until(condition, predicate, deadline)

    def start_thread(self, target: Callable[..., None], *args: Any, name: str) -> threading.Thread:
        """See the function of this name."""
        return start_thread(target, *args, name=name)

    def deadline_after(self, seconds: float | None) -> float:
        """See the function of this name."""
        return math.inf if seconds is None else self.monotonic() + seconds


RUNTIME = Runtime()


def start_thread(target: Callable[..., None], *args: Any, name: str) -> threading.Thread:
    """Start a named daemon thread and return it. Raises ThreadError as `start` does.

    A daemon, because a second signal must end the process without the ordered stop.
    """
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    start(thread)
    return thread


def log_unexpected(log: logging.Logger, event: str, error: BaseException, repeated: bool = False) -> None:
    """Log an error that nothing expected, as `event`; with its cause if the log is in detail.

    An error that is `repeated` is logged in detail only.
    """
    level = logging.DEBUG if repeated else logging.ERROR
    log.log(level, event, {"error": repr(error)}, exc_info=error if log.isEnabledFor(logging.DEBUG) else None)


def fatal(log: logging.Logger, part: str) -> NoReturn:
    """Log the error that is being handled, and end the process at once, with EXIT_FATAL.

    Call it if `part` has failed in a way that may leave state wrong that threads share. Acked records are on disk, so
    the process may end at any time, and a restart is correct. To go on could ack records that are not stored.
    """
    error = sys.exc_info()[1]
    try:
        cause = error if log.isEnabledFor(logging.DEBUG) else None
        log.critical("fatal", {"part": part, "error": repr(error), "place": _place_of(error)}, exc_info=cause)
    finally:
        os._exit(EXIT_FATAL)


def _place_of(error: BaseException | None) -> str | None:
    """Return where an error was raised, for example `store.py:81 append`."""
    trace = error and error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    if not trace:
        return None
    code = trace.tb_frame.f_code
    return f"{os.path.basename(code.co_filename)}:{trace.tb_lineno} {code.co_name}"


def format_utc(moment: datetime.datetime) -> str:
    """Format a moment in UTC as ISO 8601 with milliseconds."""
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def format_unix_time(seconds: float) -> str:
    """Format a Unix time as ISO 8601 in UTC."""
    return format_utc(datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc))


def format_ago(seconds: float) -> str:
    """Format the moment `seconds` ago, by the wall clock, as ISO 8601 in UTC."""
    return format_utc(datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(seconds=seconds))
