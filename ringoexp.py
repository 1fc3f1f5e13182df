"""Ringo Exp receives integers over WebSocket, buffers them in a ring and stores them in SQLite: the command line.

`main` builds a server from the flags and runs it. The main thread waits for signals: SIGHUP reads the token and the
certificates again, SIGINT or SIGTERM starts the ordered stop, which the main thread carries out. A second signal ends
the process at once. If the main thread hangs, the thread `signals` ends the process, at a second signal or after a
timeout.

A SIGINT or SIGHUP that is ignored when the program starts stays ignored. A shell starts the background jobs of a script
like this, because Ctrl-C is meant for the foreground. `nohup` does it, so that the program survives the terminal.
"""

from __future__ import annotations

import os
import signal
import sys

# Before the other imports, which an older Python cannot read.
if sys.version_info < (3, 10):
    sys.exit("ringoexp: error: this is Python %d.%d, Python 3.10 or newer is needed" % sys.version_info[:2])
if sys.platform == "win32":
    sys.exit(
        "ringoexp: error: Windows is not supported: run this program on Linux or macOS, in WSL 2 or in a container; "
        "any WebSocket or HTTP client on Windows can send to it"
    )
if __name__ == "__main__" or os.path.basename(sys.argv[0]) == "ringoexp":  # the program, also by its installed script
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback
    if os.getpid() == 1:  # the first process of a container, for which no signal has a default effect
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(signal_number) != signal.SIG_IGN:
                signal.signal(signal_number, lambda number, frame: os._exit(128 + number))

import logging
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from time import monotonic, sleep
from typing import Any


def _explain_missing(error: ImportError) -> str:
    """Return which module is missing, and the remedy. Raises the error if the module is the program's own."""
    module = (error.name or "").partition(".")[0]
    if module in sys.stdlib_module_names:
        return f"this Python lacks the module {module} ({error}): use a Python that was built with it"
    if module in ("simple_websocket", "wsproto", "h11"):
        return f"the package {module} is missing: pip install simple-websocket, in a venv, or use ringoexp.pyz"
    raise error


_missing: str | None = None  # why this Python cannot run a server
_can_start = False
try:
    from ringolib import __version__
    from ringolib.client.output import print_line
    from ringolib.net.addresses import format_url
    from ringolib.options import Settings, read_arguments, strange_variables
    from ringolib.timing import ThreadError, deadline_after, remaining, start_thread

    _can_start = True
    # The rest is for servers: `send` and `read` work without it, for example in a Python without SQLite.
    from ringolib import app, open_files
    from ringolib.status import log_format, logs, systemd
    from ringolib.storage.clickhouse.url import is_clickhouse_url
    from ringolib.storage.interface import StoreError
except ImportError as error:
    _missing = _explain_missing(error)

log = logging.getLogger("ringoexp")

GIVE_UP_SECONDS = 10.0
"""How long the stop may take beyond the drain. Service managers may kill the server 15 s after the drain's end."""
SAME_SIGNAL_SECONDS = 0.5
"""Signals within this time count as one: a terminal and a wrapper may both send Ctrl-C."""
STUCK_SECONDS = 0.5
"""How long the main thread has to handle a signal before it counts as hanging."""
MANY_CONNECTIONS = 65_536
"""Open files for connections if -n does not limit them, as far as the system allows."""
OTHER_DESCRIPTORS = 256
"""Number of files that the server opens besides the sockets of connections and workers."""
SWITCH_INTERVAL_SECONDS = 0.0005
"""Time after which a thread that computes hands Python's lock to one that waits: sys.setswitchinterval.

A commit takes the lock about ten times. With Python's default of 5 ms it took 50 ms while the ingest loop was busy with
one client that sends fragments; with less than this, streaming is slower.
"""
M_ARENA_MAX = -8  # malloc.h
EXIT_OK, EXIT_FAILED, EXIT_UNSTORED = 0, 1, 3  # and options.EXIT_USAGE


def __getattr__(name: str) -> Any:
    """Import a producer on first use, for `from ringoexp import Producer, AsyncProducer`: the server needs neither."""
    if name == "Producer":
        from ringolib.client.producer import Producer

        return Producer
    if name == "AsyncProducer":
        from ringolib.client.async_producer import AsyncProducer

        return AsyncProducer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def serve(settings: Settings, argv: Sequence[str], log_lines: logs.LineHandler) -> int:
    """Run a server until it is stopped by a signal, and return the exit status. Raises what `App` raises."""
    sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
    _use_one_malloc_arena()
    open_files.raise_limit((settings.connections or MANY_CONNECTIONS) + settings.threads + OTHER_DESCRIPTORS)
    if shortage := open_files.shortage():
        raise app.StartupError(shortage)
    if settings.procs:
        _limit_cores(settings.procs)
    # A socket, not an Event: an Event that is set in a signal handler can deadlock with the wait of the main thread.
    received, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    stop_signals: list[float] = []  # times of the signals that stop the server

    def on_stop_signal(number: int, frame: object) -> None:
        """Note the first signal, which also wakes the main thread through the socket. A later one ends the process."""
        stop_signals.append(monotonic())
        if stop_signals[-1] - stop_signals[0] >= SAME_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
            os._exit(128 + number)  # the first process of a container survives a signal's default effect

    with received, wakeup, ExitStack() as helpers:
        log_lines.start()
        helpers.callback(log_lines.stop)
        signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)  # if it is full, a wakeup is due anyway
        try:
            signal.signal(signal.SIGTERM, on_stop_signal)
            if not _is_ignored(signal.SIGINT):
                signal.signal(signal.SIGINT, on_stop_signal)
            if _can_reload(settings) and not _is_ignored(signal.SIGHUP):
                signal.signal(signal.SIGHUP, lambda number, frame: None)  # only wakes the main thread
            application = app.App(settings, argv)
            try:
                application.start()
                helpers.enter_context(systemd.watchdog(application.alive))
                log.info("started", _describe(application))
                systemd.ready(_status(application))
                while set(received.recv(4096)) == {signal.SIGHUP}:
                    systemd.reloading()
                    application.reload()
                    systemd.ready(_status(application))
                    if stop_signals:  # among many SIGHUPs, the socket may have had no room for it
                        break
                unstored = application.unstored()
                systemd.stopping(f"storing {unstored} records, for up to {app.DRAIN_SECONDS:.0f} s")
                _start_force_exit(received)
            finally:
                application.stop()
        finally:
            signal.set_wakeup_fd(-1)
    unstored = application.unstored()
    tally = {"stored": application.stored(), "unstored": unstored}
    if application.spool:
        tally["spooled"] = application.spool.depth
    log.log(logging.WARNING if unstored else logging.INFO, "stopped", tally)  # the last line
    return EXIT_OK if application.intact and not unstored else EXIT_UNSTORED


def _limit_cores(count: int) -> None:
    """Use at most `count` processor cores. If the system has fewer, or cannot choose cores, use all and log it."""
    if not hasattr(os, "sched_getaffinity"):
        log.warning("few_cores", {"procs": count, "hint": "this system cannot choose cores: the server uses all"})
        return
    cores = sorted(os.sched_getaffinity(0))
    if count > len(cores):
        log.warning("few_cores", {"procs": count, "cores": len(cores), "hint": "the server uses all of them"})
        return
    os.sched_setaffinity(0, cores[:count])


def _is_ignored(number: int) -> bool:
    """True if the program that started this one has made it ignore the signal."""
    return signal.getsignal(number) == signal.SIG_IGN


def _can_reload(settings: Settings) -> bool:
    """True if there are files to read again, or a service manager that may ask for it. Else SIGHUP ends the process."""
    return any((settings.token_file, settings.tls_cert, settings.consumer_ca, systemd.has_manager()))


def _start_force_exit(received: socket.socket) -> None:
    """Start the thread `signals`. Without it the stop goes on: it needs no thread."""
    try:
        start_thread(_force_exit, received, name="signals")
    except ThreadError as error:
        log.error("no_thread", {"error": str(error)})


def _force_exit(received: socket.socket) -> None:
    """The thread `signals`: end the process if the ordered stop hangs.

    The main thread may be in a call that never returns, for example of SQLite on a disk that hangs. Then it does not
    handle signals. This thread runs from the first signal on, and ends the process if a later signal is not handled,
    or if the stop exceeds its time.
    """
    started = monotonic()
    seconds = app.DRAIN_SECONDS + GIVE_UP_SECONDS
    deadline = deadline_after(seconds)
    try:
        while True:
            received.settimeout(max(0.001, remaining(deadline)))  # 0 would not block
            number = received.recv(1)
            if not number:
                return  # the server has stopped
            if number[0] != signal.SIGHUP and monotonic() - started >= SAME_SIGNAL_SECONDS:
                sleep(STUCK_SECONDS)
                os._exit(128 + number[0])
    except TimeoutError:
        log.error("stop_given_up", {"seconds": seconds, "hint": "records that are not acked may not be stored"})
        os._exit(EXIT_UNSTORED)
    except OSError:
        pass  # the socket is closed: the server has stopped


def _use_one_malloc_arena() -> None:
    """Make all threads allocate from one arena, with glibc's mallopt(3).

    With an arena for each thread, every thread would keep the memory that its largest batch once needed. Threads do
    not compete for the single arena: nearly all allocations are made under the GIL.
    """
    try:
        import ctypes  # some Pythons are built without it

        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
    except (ImportError, OSError, AttributeError, MemoryError):
        pass  # another C library; MemoryError: old ctypes needs memory that is writable and executable


def _describe(application: app.App) -> dict[str, Any]:
    """Return the fields of the event `started`: the role, the address and where records go. Paths are absolute."""
    settings, credentials = application.settings, application.credentials.current
    tls = credentials.server is not None
    fields: dict[str, Any] = {
        "version": __version__,
        "role": "publisher" if settings.is_publisher else "consumer",
        "url": format_url(settings.hostname, application.server.port, tls),
        "address": application.address,
    }
    if application.store:
        path = settings.database
        fields["database"] = path if is_clickhouse_url(path) else os.path.abspath(path)
        if settings.retain:
            fields["retain_days"] = settings.retain
    else:
        fields["consumer"] = settings.consumer_names
    if application.spool and settings.spool:
        fields |= {"spool": os.path.abspath(settings.spool), "spooled": application.spool.depth}
    return {**fields, "token": credentials.token is not None, "tls": tls}


def _status(application: app.App) -> str:
    """Return the sentence about a running server for the service manager."""
    return log_format.sentence("started", _describe(application)) or ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return the exit status: 0 stopped in order, 1 cannot run, 2 bad usage, 3 records unstored."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not _can_start:
        sys.exit(f"ringoexp: error: {_missing}")
    if arguments and arguments[0] in ("send", "read"):
        return _run_client(arguments[0], arguments[1:])
    settings = read_arguments(arguments)
    if _missing:
        sys.exit(f"ringoexp: error: {_missing}")
    log_lines = logs.setup(settings.debug, settings.log_json)
    for name, hint in strange_variables(os.environ):
        log.warning("unknown_variable", {"name": name, "hint": f"it is not an option{hint}"})
    try:
        return serve(settings, arguments, log_lines)
    except (app.StartupError, StoreError) as error:
        return _fail(str(error), settings)
    except MemoryError:
        return _fail("not enough memory (ulimit -v limits it)", settings)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _run_client(command: str, arguments: list[str]) -> int:
    """Run `send` or `read`, whose modules a server does not need, and return the exit status."""
    run: Callable[[list[str]], int]
    try:
        if command == "send":
            from ringolib.client.send import main as run
        else:
            from ringolib.client.read import main as run
    except ImportError as error:
        sys.exit(f"ringoexp: error: {_explain_missing(error)}")
    if not _is_ignored(signal.SIGINT):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return run(arguments)


def _fail(message: str, settings: Settings) -> int:
    """Say why the server cannot run, and return the exit status."""
    if settings.log_json:
        log.error("cannot_run", {"error": message}, exc_info=settings.debug)
    else:
        log.debug("cannot_run", exc_info=True)
        print_line(f"ringoexp: error: {message}", error=True)
    return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
