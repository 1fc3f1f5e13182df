"""Notify the service manager that the server is ready, reloads, stops, or is still alive (sd_notify(3)).

A notification is one datagram to the socket in `$NOTIFY_SOCKET`, sent by the calling thread. Without that variable
nothing is sent. An unreachable socket is logged at debug level and otherwise ignored. The thread `watchdog` runs if the
manager asks for it (`$WATCHDOG_USEC`, sd_watchdog_enabled(3)). This module does not know the server.
"""

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic, monotonic_ns

from ringolib.timing import ThreadError, remaining, start_thread

log = logging.getLogger("ringoexp.notify")

SEND_TIMEOUT_SECONDS = 1.0
"""Time limit for a notification if the manager's queue is full."""
JOIN_TIMEOUT_SECONDS = 1.0
"""Time limit for the end of the watchdog's thread, whose `alive` call may hang."""


def has_manager() -> bool:
    """True if a service manager waits for notifications."""
    return "NOTIFY_SOCKET" in os.environ


def ready(status: str) -> None:
    """Notify that the server accepts connections: after the start, and after `reloading`.

    `status` is one line for people; the same holds for `stopping`.
    """
    _send(f"READY=1\nSTATUS={_one_line(status)}")


def reloading() -> None:
    """Notify that the server reads its configuration again. `ready` must follow."""
    _send(f"RELOADING=1\nMONOTONIC_USEC={monotonic_ns() // 1000}")


def stopping(status: str) -> None:
    """Notify that the server has begun to stop."""
    _send(f"STOPPING=1\nSTATUS={_one_line(status)}")


@contextmanager
def watchdog(alive: Callable[[], bool]) -> Iterator[None]:
    """Notify twice in each watchdog period that the server is alive, as long as `alive` returns True.

    If `alive` returns False, raises or hangs, notifications stop, and the manager restarts the server.
    """
    period = _watchdog_seconds()
    if not period:
        yield
        return
    ended = threading.Event()
    thread = None
    try:
        # A daemon thread, because `alive` may hang: then the process must be able to end without it.
        thread = start_thread(_run_watchdog, alive, period / 2, ended, name="watchdog")
    except ThreadError as error:
        log.error("no_thread", {"error": str(error)})
    try:
        yield
    finally:
        ended.set()
        if thread:
            thread.join(JOIN_TIMEOUT_SECONDS)


def _run_watchdog(alive: Callable[[], bool], interval: float, ended: threading.Event) -> None:
    """Call `alive` every `interval` seconds until `ended` is set. Runs in the thread `watchdog`."""
    was_alive = True
    due = monotonic()
    while not ended.wait(remaining(due)):
        due = max(due + interval, monotonic())  # missed turns are left out, for example after a suspend
        try:
            is_alive, reason = alive(), "no thread accepts connections, or the ingest loop hangs"
        except Exception as error:
            is_alive, reason = False, repr(error)
        if is_alive:
            _send("WATCHDOG=1")
        elif was_alive:
            log.error("not_alive", {"error": reason})
        was_alive = is_alive


def _watchdog_seconds() -> float:
    """Return the watchdog period in seconds, or 0 if the manager sets none for this process."""
    pid, period = os.environ.get("WATCHDOG_PID", ""), os.environ.get("WATCHDOG_USEC", "")
    if not period or (pid and pid != str(os.getpid())):
        return 0.0
    if not (period.isascii() and period.isdigit()):
        log.debug("not_notified", {"error": f"WATCHDOG_USEC={period} is not a number of microseconds"})
        return 0.0
    return int(period) / 1e6


def _one_line(text: str) -> str:
    """Return `text` without line breaks, which would begin another field of the notification."""
    return " ".join(text.splitlines())


def _send(message: str) -> None:
    """Send a notification if there is a manager. Never raises for a socket that is unreachable or full."""
    name = os.environ.get("NOTIFY_SOCKET", "")
    if not name:
        return
    address = "\0" + name[1:] if name.startswith("@") else name  # @: the abstract namespace of Linux
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(SEND_TIMEOUT_SECONDS)
            sender.sendto(message.encode(errors="backslashreplace"), os.fsencode(address))
    except (OSError, ValueError) as error:
        log.debug("not_notified", {"socket": name, "error": str(error)})
