"""The profiler's HTTP port (`-L`): profiles for `go tool pprof`, like Go's net/http/pprof, and pages for people.

The thread `profiler` accepts connections, and a thread `profiler-N` serves each of them. A profile is sampled in the
thread of its connection, one at a time: the thread holds `Profiler.sampling_lock` meanwhile. Between requests the
profiler costs nothing but the blocked acceptor. Clients see the names, stacks and arguments of the program, so the
profiler listens on the loopback address by default.
"""

import html
import select
import socket
import sys
import threading
import time
import traceback
import tracemalloc
from collections import defaultdict
from time import monotonic
from types import CodeType, FrameType
from urllib.parse import parse_qsl

from ringolib.net.credentials import Credentials
from ringolib.net.listeners import Listeners
from ringolib.status import pprof, sampler
from ringolib.timing import deadline_after, remaining
from ringolib.web.connections import Connections
from ringolib.web.handler import GET_OR_HEAD, Routes, WebHandler
from ringolib.web.headers import Refusal
from ringolib.web.names import Names
from ringolib.web.table import Limits

MAX_CONNECTIONS = 32
"""Connections at the same time; more wait to be accepted. `--threads` leaves room for this many threads."""
MAX_SECONDS = 60
DEFAULT_SECONDS = 30
"""As in Go's net/http/pprof."""
DEFAULT_FRAMES = 1
"""Calls kept for each memory allocation."""
MAX_FRAMES = 100
CLIENT_CHECK_SECONDS = 0.25
"""Time between two checks, during sampling, that the client is still connected."""
_CLIENT_CLOSED: int = getattr(select, "POLLRDHUP", select.POLLIN)
"""The poll event of a connection whose client has closed its side. POLLRDHUP exists on Linux only; it is set even if
data that the client sent before is still unread."""
_PROBE = b"HTTP/1.1 100 Continue\r\n\r\n"
"""Sent to a client that has closed its side. A client that waits for the answer ignores it. If the client has left, its
system answers with a reset."""

INDEX = "/debug/pprof/"
TEXT = "text/plain; charset=utf-8"
PPROF_TYPE = "application/octet-stream"
PAGES = {
    "profile?seconds=5": "CPU and wall time of all threads in 5 s (default 30, at most 60), for go tool pprof",
    "threads": "the current stacks of all threads",
    "heap?start=1": "start tracing memory; a busy server gets much slower; &frames=N keeps N calls per allocation",
    "heap": "memory allocated since then and not freed, for go tool pprof",
    "heap?format=text": "the same as text",
    "heap?stop=1": "stop tracing memory",
    "cmdline": "the command line of this program, separated by NUL bytes",
}
"""Links of the index page, relative to it, and their descriptions."""


class Profiler(Connections):
    """The profiler's server. Owns `listeners`."""

    acceptor_name = connection_name = "profiler"

    def __init__(self, listeners: Listeners, name: str, credentials: Credentials, names: Names) -> None:
        super().__init__(listeners, Handler, name, Limits(MAX_CONNECTIONS, refused=0), credentials, names)
        self.loopback = listeners.loopback
        self.sampling_lock = threading.Lock()
        self.sampling_ends_at = 0.0  # monotonic seconds; written by the holder of sampling_lock


class Handler(WebHandler):
    """One connection to the profiler."""

    server: Profiler

    _client_checked_at = 0.0  # monotonic seconds
    _half_closed = False  # the client has closed its side, and _PROBE was sent

    def make_routes(self) -> Routes:
        """Return the table of routes."""
        pages = {
            INDEX: self._index,
            INDEX.rstrip("/"): self._redirect,
            "/": self._redirect,
            f"{INDEX}threads": self._threads,
            f"{INDEX}cmdline": self._cmdline,
        }
        actions = {f"{INDEX}profile": self._profile, f"{INDEX}heap": self._heap}
        return {
            **{path: dict.fromkeys(GET_OR_HEAD, page) for path, page in pages.items()},
            **{path: dict.fromkeys(GET_OR_HEAD, action) for path, action in actions.items()},
        }

    # Pages.

    def _redirect(self) -> None:
        self.reply(301, b"", TEXT, {"Location": INDEX})

    def _index(self) -> None:
        self._query()
        rows = "".join(
            f'<dt><a href="{html.escape(page)}">{html.escape(page)}</a></dt><dd>{html.escape(text)}</dd>\n'
            for page, text in PAGES.items()
        )
        content = (
            f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{INDEX}</title>\n'
            f"<h1>{INDEX}</h1>\n<p>{threading.active_count()} threads.</p>\n<dl>\n{rows}</dl>\n</html>\n"
        )
        policy = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        self._reply_ok(content.encode(), "text/html; charset=utf-8", {"Content-Security-Policy": policy})

    def _cmdline(self) -> None:
        self._query()
        self._reply_ok("\0".join(sys.orig_argv).encode(errors="surrogateescape"), TEXT)

    def _threads(self) -> None:
        """Send the stacks of all threads. Threads with the same stack share one block."""
        self._query()
        _check_stacks_readable()
        threads = {thread.ident: thread for thread in threading.enumerate()}
        idents_by_stack: dict[tuple[tuple[CodeType, int], ...], list[int]] = defaultdict(list)
        for ident, frame in sys._current_frames().items():
            idents_by_stack[_stack_lines(frame)].append(ident)
        del frame
        blocks = []
        for stack, idents in sorted(idents_by_stack.items(), key=lambda item: len(item[1]), reverse=True):
            count = "1 thread" if len(idents) == 1 else f"{len(idents)} threads"
            names = [_describe_thread(threads.get(ident), ident) for ident in idents]
            calls = [traceback.FrameSummary(code.co_filename, line, code.co_name) for code, line in reversed(stack)]
            blocks.append("\n".join([count, *names, "".join(traceback.format_list(calls))]))
        self._reply_ok("\n".join(blocks).encode(errors="replace"), TEXT)

    # CPU and wall time.

    def _profile(self) -> None:
        """Take a profile and send it."""
        query = self._query(seconds=str(DEFAULT_SECONDS), format="pprof")
        seconds = self._parse_integer("seconds", query["seconds"], 1, MAX_SECONDS)
        self._check_choice("format", query["format"], ("pprof",))
        if self.command == "HEAD":
            self._reply_pprof(None, "profile")
            return
        _check_stacks_readable()
        self._reply_pprof(pprof.encode_profile(self._take_profile(seconds)), "profile")

    def _take_profile(self, seconds: int) -> sampler.Profile:
        """Return a profile of `seconds`.

        Raises Refusal if another request is sampling or the server stops, ConnectionResetError if the client leaves.
        """
        if not self.server.sampling_lock.acquire(blocking=False):
            retry_after = max(1, round(remaining(self.server.sampling_ends_at)))
            raise Refusal(503, "one profile at a time: another request is sampling", {"Retry-After": str(retry_after)})
        try:
            self.server.sampling_ends_at = deadline_after(seconds)
            profile = sampler.sample(seconds, self._wait)
        finally:
            self.server.sampling_lock.release()
        if self.server.stopping.is_set():
            raise Refusal(503, "the server is stopping")
        if self._is_client_gone():
            raise ConnectionResetError("the client has left")
        return profile

    def _wait(self, seconds: float) -> bool:
        """Sleep, and return True if the sampling must end early."""
        if self.server.stopping.wait(seconds):
            return True
        now = monotonic()
        if now < self._client_checked_at + CLIENT_CHECK_SECONDS:
            return False
        self._client_checked_at = now
        return self._is_client_gone()

    def _is_client_gone(self) -> bool:
        """True if the client has closed the connection. A client that has only ended its side waits for the answer."""
        poll = select.poll()
        poll.register(self.connection, 0 if self._half_closed else _CLIENT_CLOSED)
        events = poll.poll(0)
        if not events:
            return False
        if events[0][1] & (select.POLLERR | select.POLLHUP):
            return True
        try:
            # POLLIN can also mean that the next request has arrived.
            if _CLIENT_CLOSED == select.POLLIN and self.connection.recv(1, socket.MSG_PEEK):
                return False
            if self.parsed.version == "1.0":  # it knows no 100 Continue
                return True
            self.stream.write(_PROBE, CLIENT_CHECK_SECONDS)
        except OSError:
            return True
        self._half_closed = True
        return False

    # Memory.

    def _heap(self) -> None:
        """Start or stop tracing memory, or send the traced memory."""
        # go tool pprof -seconds adds `seconds`; it is ignored.
        query = self._query(start="", stop="", frames=str(DEFAULT_FRAMES), format="pprof", seconds="")
        frames = self._parse_integer("frames", query["frames"], 1, MAX_FRAMES)
        self._check_choice("start", query["start"], ("", "1"))
        self._check_choice("stop", query["stop"], ("", "1"))
        self._check_choice("format", query["format"], ("pprof", "text"))
        if query["start"] and query["stop"]:
            raise Refusal(400, "use either start=1 or stop=1, not both")
        if self.command == "HEAD":  # without its effects
            is_text = query["start"] or query["stop"] or query["format"] == "text"
            self._reply_ok(None, TEXT if is_text else PPROF_TYPE)
        elif query["start"]:
            tracemalloc.start(frames)  # does nothing if it is already started
            kept = _count_calls(tracemalloc.get_traceback_limit())
            if kept != _count_calls(frames):
                raise Refusal(409, f"memory is traced already, with {kept} per allocation: use ?stop=1 first")
            self._reply_ok(f"tracing memory, {kept} kept per allocation; ?stop=1 ends it\n".encode(), TEXT)
        elif query["stop"]:
            tracemalloc.stop()
            self._reply_ok(b"not tracing memory\n", TEXT)
        elif query["format"] == "text":
            self._reply_ok(_format_heap(_take_snapshot()).encode(errors="replace"), TEXT)
        else:
            traces = (
                ([(frame.filename, frame.lineno) for frame in reversed(stat.traceback)], stat.count, stat.size)
                for stat in _take_snapshot().statistics("traceback")
            )
            self._reply_pprof(pprof.encode_heap(traces, time.time_ns()), "heap")

    # Requests and responses.

    def check_site(self) -> None:
        """Raise Refusal if a page of another website makes the request: a GET has effects here."""
        if self.cors.get("Access-Control-Allow-Origin"):
            return
        self.server.names.check_origin(self.parsed)
        if self.parsed.headers.get_all("sec-fetch-site") not in ([], ["none"], ["same-origin"]):
            raise Refusal(403, "the profiler refuses requests from other websites: open its pages themselves")

    def _query(self, **defaults: str) -> dict[str, str]:
        """Return the query's parameters, with defaults. Raises Refusal if a parameter has none."""
        given = parse_qsl(self.parsed.query, keep_blank_values=True)
        for name, _ in given:
            if name not in defaults:
                known = ", ".join(defaults) or "none"
                raise Refusal(400, f"unknown parameter {name[:40]!r}, known are: {known}")
        return {**defaults, **dict(given)}

    def _parse_integer(self, name: str, text: str, low: int, high: int) -> int:
        value = int(text) if text.isascii() and text.isdigit() and len(text) < 9 else low - 1
        if not low <= value <= high:
            raise Refusal(400, f"{name}={text[:40]} is invalid: expected a whole number from {low} to {high}")
        return value

    def _check_choice(self, name: str, text: str, choices: tuple[str, ...]) -> None:
        if text not in choices:
            raise Refusal(400, f"{name}={text[:40]} is invalid: expected {' or '.join(filter(None, choices))}")

    def _reply_pprof(self, content: bytes | None, name: str) -> None:
        disposition = f'attachment; filename="{name}.pb.gz"'
        self._reply_ok(content, PPROF_TYPE, {"Content-Disposition": disposition})

    def _reply_ok(self, content: bytes | None, kind: str, headers: dict[str, str] | None = None) -> None:
        common = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
        self.reply(200, content, kind, {**common, **(headers or {})})


def _check_stacks_readable() -> None:
    """Raise Refusal in a Python without the GIL: reading the frames of threads that run can crash the process."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        raise Refusal(501, "this Python runs without the GIL: stacks can be read only with it (PYTHON_GIL=1)")


def _count_calls(frames: int) -> str:
    return "1 call" if frames == 1 else f"{frames} calls"


def _take_snapshot() -> tracemalloc.Snapshot:
    """Return the traced memory. Raises Refusal if memory is not traced."""
    try:
        return tracemalloc.take_snapshot()
    except RuntimeError:
        reason = f"memory is not traced: request {INDEX}heap?start=1 first, then repeat this request a little later"
        raise Refusal(409, reason) from None


def _format_heap(snapshot: tracemalloc.Snapshot) -> str:
    """Return a line for each line of code that has allocated memory, the largest first, below a line of totals."""
    now, peak = tracemalloc.get_traced_memory()
    lines = [f"{now} bytes now, {peak} at the peak, since tracing started\n"]
    lines += [
        f"{stat.size:>12} bytes {stat.count:>9} objects  {stat.traceback}\n" for stat in snapshot.statistics("lineno")
    ]
    return "".join(lines)


def _stack_lines(frame: FrameType | None) -> tuple[tuple[CodeType, int], ...]:
    """Return the code and line of each call, innermost first. Stacks that print the same are equal."""
    lines = []
    while frame:
        lines.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return tuple(lines)


def _describe_thread(thread: threading.Thread | None, ident: int) -> str:
    """Return a thread's name, the system's id and the CPU time."""
    if thread is None:
        return f"  thread-{ident}, not started by Python"
    cpu = sampler.thread_cpu(thread.native_id or 0)
    parts = [f"  {thread.name}", f"id {thread.native_id}"]
    if cpu is not None:
        parts.append(f"{cpu / 1e9:.3f} s of CPU")
    if thread.daemon:
        parts.append("daemon")
    return ", ".join(parts)
