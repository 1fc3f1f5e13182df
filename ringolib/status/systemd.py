"""What a service manager is told: that the server is ready, reloads, stops, and is still alive (sd_notify(3)).

Each message is one datagram to the socket that `$NOTIFY_SOCKET` names, from whoever calls. Without one nothing is done,
and a socket that cannot be reached is a line in the debug log: to be told nothing is the manager's trouble. The thread
`watchdog` is there if the manager asks for it (`$WATCHDOG_USEC`, sd_watchdog_enabled(3)). Knows nothing of servers.
"""

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic, monotonic_ns

log = logging.getLogger("ringoexp.notify")

SEND_TIMEOUT = 1.0
"""Seconds a message waits for a manager whose queue is full."""
JOIN_TIMEOUT = 1.0
"""Seconds the end waits for the watchdog: what it asks may hang."""


def wanted() -> bool:
    """True when there is a manager to be told."""
    return "NOTIFY_SOCKET" in os.environ


def ready(status: str) -> None:
    """The server accepts connections, for the first time or again after `reloading`; `status` is a line for people."""
    _send(f"READY=1\nSTATUS={_line(status)}")


def reloading() -> None:
    """The server reads its configuration again; `ready` follows."""
    _send(f"RELOADING=1\nMONOTONIC_USEC={monotonic_ns() // 1000}")


def stopping(status: str) -> None:
    """The server has begun to stop; `status` is a line for people."""
    _send(f"STOPPING=1\nSTATUS={_line(status)}")


@contextmanager
def watchdog(alive: Callable[[], bool]) -> Iterator[None]:
    """Tells the manager twice in each of its periods that the server is alive, while `alive` returns True.

    When it returns False, raises, or does not return, the manager hears nothing, and restarts the server.
    """
    period = _period()
    if not period:
        yield
        return
    ended = threading.Event()
    # Daemon: `alive` may hang, which is what it is for; then nobody waits for it.
    thread = threading.Thread(target=_ping, args=(alive, period / 2, ended), name="watchdog", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:  # no more threads to be had
        log.error("no_thread", {"error": str(error)})
    try:
        yield
    finally:
        ended.set()
        if thread.is_alive():
            thread.join(JOIN_TIMEOUT)


def _ping(alive: Callable[[], bool], interval: float, ended: threading.Event) -> None:
    """The thread: asks every `interval` seconds."""
    was = True
    due = monotonic()
    while not ended.wait(max(0.0, due - monotonic())):
        due = max(due + interval, monotonic())  # a machine that slept does not make up for it
        try:
            now, why = alive(), "no thread accepts connections"
        except Exception as error:
            now, why = False, repr(error)
        if now:
            _send("WATCHDOG=1")
        elif was:
            log.error("not_alive", {"error": why})
        was = now


def _period() -> float:
    """The manager's period in seconds; 0 if it has none for this process."""
    pid, period = os.environ.get("WATCHDOG_PID", ""), os.environ.get("WATCHDOG_USEC", "")
    if not period or (pid and pid != str(os.getpid())):
        return 0.0
    if not (period.isascii() and period.isdigit()):
        log.debug("not_notified", {"error": f"WATCHDOG_USEC={period} is no number of microseconds"})
        return 0.0
    return int(period) / 1e6


def _line(text: str) -> str:
    """Text without what would end its line, and begin another message's field."""
    return " ".join(text.splitlines())


def _send(message: str) -> None:
    """One message, if there is somebody to be told."""
    name = os.environ.get("NOTIFY_SOCKET", "")
    if not name:
        return
    address = "\0" + name[1:] if name.startswith("@") else name
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(SEND_TIMEOUT)
            sender.sendto(message.encode(errors="backslashreplace"), os.fsencode(address))
    except (OSError, ValueError) as error:
        log.debug("not_notified", {"socket": name, "error": str(error)})
