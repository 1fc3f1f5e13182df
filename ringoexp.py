"""Ringo Exp: integers over WebSocket, through a ring buffer, into SQLite. This room is the command line.

It has a server put together as the flags say, and runs it. The main thread only waits for a signal; SIGHUP makes it
read token and certificates again, SIGINT or SIGTERM starts the ordered stop, which it does itself. A second signal has
its default effect and ends the process, and so does, in the thread `signals`, a stop that takes too long.
"""

import os
import signal
import sys

if sys.version_info < (3, 10):  # as far as an older one can read this file
    sys.exit("ringoexp: error: this is Python %d.%d, Python 3.10 or newer is needed" % sys.version_info[:2])
if __name__ == "__main__" or sys.argv[0].endswith("ringoexp"):  # the program, also by its installed script
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the imports run: end, without a traceback
    if os.getpid() == 1:  # a container's first process, for which no signal has a default effect
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, lambda number, frame: os._exit(128 + number))

import logging
import resource
import socket
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from time import monotonic, sleep
from typing import Any

try:
    import simple_websocket  # noqa: F401  # only to see that it is there
except ModuleNotFoundError as missing:
    if __name__ != "__main__":
        raise
    sys.exit(
        f"ringoexp: error: no package {missing.name}: pip install simple-websocket, in a venv, or use ringoexp.pyz"
    )

from ringolib import __version__
from ringolib import app as assembly
from ringolib.app import App, StartupError
from ringolib.client import send
from ringolib.client.send import say
from ringolib.net.addresses import format_address
from ringolib.options import Settings, read_arguments
from ringolib.status import logs
from ringolib.status import systemd as notify
from ringolib.storage.interface import StoreError

log = logging.getLogger("ringoexp")

GIVE_UP_SECONDS = 10.0
"""How much longer the whole stop takes at most: who runs the server may kill it 15 s after the drain's end."""
M_ARENA_MAX = -8  # malloc.h
OTHER_DESCRIPTORS = 256
"""Open files that are neither a connection's nor a worker's."""
SAME_SIGNAL = 0.5
"""Seconds within which another signal is the same one: a Ctrl-C may come from the terminal and from a wrapper."""
STUCK_SECONDS = 0.5
"""Seconds that the main thread has to handle a signal."""
EXIT_OK, EXIT_FAILED, EXIT_UNSTORED = 0, 1, 3  # and options.EXIT_USAGE


def __getattr__(name: str) -> Any:
    """`from ringoexp import Producer`, imported on first use: the server does not need it."""
    if name == "Producer":
        from ringolib.client.producer import Producer

        return Producer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def serve(settings: Settings, argv: Sequence[str]) -> int:
    """Runs a server until a signal comes, and returns the exit status. Raises what `App` raises."""
    _share_one_heap()
    _allow_descriptors(settings.threads + OTHER_DESCRIPTORS)
    if settings.procs:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: settings.procs])
    # Not an Event: setting one in a handler can deadlock with the main thread's wait for it.
    woken, wake = socket.socketpair()
    wake.setblocking(False)

    first: list[float] = []
    reloads = any((settings.token_file, settings.tls_cert, settings.consumer_ca, notify.has_manager()))

    def end(number: int, frame: object) -> None:
        """The first signal wakes the main thread, by the descriptor; another one ends the process at once."""
        first.append(monotonic())
        if first[-1] - first[0] >= SAME_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
            os._exit(128 + number)  # a container's first process survives a signal's default effect

    with woken, wake, ExitStack() as ending:
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)  # it has been told often enough
        try:
            for each in (signal.SIGINT, signal.SIGTERM):
                signal.signal(each, end)
            if reloads:  # or else it ends the process, as ever
                signal.signal(signal.SIGHUP, lambda number, frame: None)
            parts = App(settings, argv)
            try:
                parts.start()
                ending.enter_context(notify.watchdog(parts.alive))
                say(_greeting(parts))
                notify.ready(_greeting(parts))
                while set(woken.recv(4096)) == {signal.SIGHUP}:  # however many came meanwhile
                    notify.reloading()
                    parts.reload()
                    notify.ready(_greeting(parts))
                    if first:  # it may have found no room among many
                        break
                notify.stopping(f"storing {parts.unstored()} records, for up to {assembly.DRAIN_SECONDS:.0f} s")
                # Daemon: it is there for when the main thread does nothing any more.
                try:
                    threading.Thread(target=_end_anyway, args=(woken,), name="signals", daemon=True).start()
                except RuntimeError as error:  # no more threads to be had: the stop needs none
                    log.error("no_thread", {"error": str(error)})
            finally:
                parts.stop()
        finally:
            signal.set_wakeup_fd(-1)
    stored, unstored = parts.stored(), parts.unstored()
    tally = f"ringoexp: stopped, {stored} stored, {unstored} unstored"
    say(f"{tally}, {parts.spool.depth} in the spool" if parts.spool else tally)
    return EXIT_UNSTORED if unstored else EXIT_OK


def _end_anyway(woken: socket.socket) -> None:
    """A thread, from the first signal on: ends the process at a later one that the main thread does not get to handle,
    and when the stop takes too long.

    The main thread may be in a call that never returns, of SQLite's on a disk that hangs, say.
    """
    first = monotonic()
    most = assembly.DRAIN_SECONDS + GIVE_UP_SECONDS
    try:
        while True:
            woken.settimeout(max(0.001, first + most - monotonic()))
            number = woken.recv(1)
            if not number:
                return  # the server has stopped
            if number[0] != signal.SIGHUP and monotonic() - first >= SAME_SIGNAL:
                sleep(STUCK_SECONDS)
                os._exit(128 + number[0])
    except TimeoutError:
        log.error("stop_given_up", {"seconds": most, "hint": "what was not acked may not be stored"})
        os._exit(EXIT_UNSTORED)
    except OSError:
        pass  # closed: the server has stopped


def _allow_descriptors(most: int) -> None:
    """Raises the soft limit of open files towards `most`, as far as the hard one allows: 1,024 is less than a crowd.

    The soft one is low for programs that use select(2), which this one does not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    if soft == resource.RLIM_INFINITY or most <= soft:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (OSError, ValueError):
        pass  # the system's own limit is lower: then that is it


def _share_one_heap() -> None:
    """Has all threads allocate from one heap: each would keep for itself what its largest batch once took.

    glibc only (mallopt(3)). Threads do not get in each other's way there: nearly all allocate under the GIL.
    """
    try:
        import ctypes  # not every Python is built with it

        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
    except (ImportError, OSError, AttributeError, MemoryError):
        pass  # another C library; MemoryError: old ones of ctypes want memory to write and execute, which may be denied


def _greeting(parts: App) -> str:
    settings = parts.settings
    role = "publisher" if settings.is_publisher else "consumer"
    where = (
        f"storing in {settings.database}" + (f" for {settings.retain:g} days" if settings.retain else "")
        if parts.store
        else f"forwarding to {assembly.named(settings)}"
    )
    if parts.spool:
        depth = parts.spool.depth
        where += f", spooling in {settings.spool}" + (f" ({depth} records are in it)" if depth else "")
    return f"ringoexp {__version__}: {role} on {format_address(settings.hostname, parts.server.port)}, {where}"


def main(argv: Sequence[str] | None = None) -> int:
    """The program: returns its exit status. 0 ended well, 1 could not run, 2 bad usage, 3 something stayed unstored."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["send"]:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return send.main(arguments[1:])
    settings = read_arguments(arguments)
    logs.setup(settings.debug, settings.log_json)
    try:
        return serve(settings, arguments)
    except (StartupError, StoreError) as error:
        log.debug("cannot_run", exc_info=True)
        say(f"ringoexp: error: {error}", error=True)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
