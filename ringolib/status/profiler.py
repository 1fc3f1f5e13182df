"""The profiler's own HTTP port (`-L`): the counterpart of Go's net/http/pprof, for `go tool pprof`, curl and browsers.

A `Profiler` owns its `Connections`: the thread `profiler` accepts, `profiler-N` serves one connection, and samples in
it. `Profiler.busy` is held by who samples: one at a time. While nobody asks, nothing runs but the blocked acceptor.
Who can connect can see the code's names, its stacks and its arguments: it listens on the loopback address by default.
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
from urllib.parse import parse_qsl, urlsplit

from ringolib.net.addresses import is_loopback
from ringolib.net.credentials import Credentials
from ringolib.net.listeners import Listeners
from ringolib.status import profile_formats
from ringolib.status import sampler as sampling
from ringolib.web.connections import Connections
from ringolib.web.handler import GET_OR_HEAD, Routes, WebHandler
from ringolib.web.headers import Refusal
from ringolib.web.table import Limits

MAX_CONNECTIONS = 32
"""At once; the next ones wait to be accepted. --threads leaves that many."""
MAX_SECONDS = 60
DEFAULT_SECONDS = 30
"""As Go's."""
HEAP_FRAMES = 1
"""Calls that are kept of each allocation, where ?frames= does not say otherwise."""
MAX_FRAMES = 100
LOOK_SECONDS = 0.25
"""How often a request that samples looks whether its client is still there."""
_CLOSED: int = getattr(select, "POLLRDHUP", select.POLLIN)
"""What a connection has when the client has closed its side, whatever it has sent before; Linux knows the former."""
TEXT = "text/plain; charset=utf-8"
PROTO = "application/octet-stream"
PAGES = {
    "profile?seconds=5": "CPU and wall time of all threads, sampled for 5 s (default 30, most 60), for go tool pprof",
    "profile?seconds=5&format=collapsed": "the same in lines for flame graphs: CPU time in µs; &value=wall: wall time",
    "profile?seconds=5&format=speedscope": "the same for speedscope.app",
    "threads": "where each thread is now",
    "heap?start=1": "begins to trace memory, which slows a busy server down a lot; &frames=N keeps N calls for each",
    "heap": "memory that was allocated since then and is not freed, for go tool pprof",
    "heap?format=text": "the same as a list",
    "heap?stop=1": "traces no more",
    "cmdline": "the arguments this program was started with, a NUL between them",
}


class Profiler(Connections):
    """Listens from the beginning, as `host`, and answers from `start` on. Owns `listeners`."""

    acceptor_name = connection_name = "profiler"

    def __init__(self, listeners: Listeners, host: str, name: str, credentials: Credentials) -> None:
        super().__init__(listeners, Handler, name, Limits(MAX_CONNECTIONS, refused=0), credentials)
        self.busy = threading.Lock()
        self.busy_until = 0.0  # monotonic seconds; the holder of `busy` writes it
        self.hosts = {host.lower()}
        self.loopback = listeners.loopback


class Handler(WebHandler):
    """One connection to the profiler."""

    server: Profiler

    def routes(self) -> Routes:
        """What there is, for who may ask."""
        self._check_who()
        read = {
            "/debug/pprof/": self._index,
            "/debug/pprof": self._redirect,
            "/": self._redirect,
            "/debug/pprof/threads": self._threads,
            "/debug/pprof/cmdline": self._cmdline,
        }
        work = {"/debug/pprof/profile": self._profile, "/debug/pprof/heap": self._heap}
        return {
            **{path: dict.fromkeys(GET_OR_HEAD, answer) for path, answer in read.items()},
            **{path: {"GET": answer} for path, answer in work.items()},
        }

    # Routes.

    def _redirect(self) -> None:
        self.reply(301, b"", TEXT, {"Location": "/debug/pprof/"})

    def _index(self) -> None:
        self._parameters()
        rows = "".join(
            f'<dt><a href="{html.escape(page)}">{html.escape(page)}</a></dt><dd>{html.escape(text)}</dd>\n'
            for page, text in PAGES.items()
        )
        content = (
            '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>/debug/pprof/</title>\n'
            f"<h1>/debug/pprof/</h1>\n<p>{threading.active_count()} threads.</p>\n<dl>\n{rows}</dl>\n</html>\n"
        )
        policy = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        self._tell(content.encode(), "text/html; charset=utf-8", {"Content-Security-Policy": policy})

    def _cmdline(self) -> None:
        self._parameters()
        self._tell("\0".join(sys.orig_argv).encode(errors="surrogateescape"), TEXT)

    def _threads(self) -> None:
        """All stacks, most recent call last; threads in the same place together."""
        self._parameters()
        threads = {thread.ident: thread for thread in threading.enumerate()}
        places: dict[tuple[tuple[CodeType, int], ...], list[int]] = defaultdict(list)
        for ident, frame in sys._current_frames().items():
            places[_position(frame)].append(ident)
        del frame
        blocks = []
        for place, idents in sorted(places.items(), key=lambda each: len(each[1]), reverse=True):
            told = [_about(threads.get(ident), ident) for ident in idents]
            calls = [traceback.FrameSummary(code.co_filename, line, code.co_name) for code, line in reversed(place)]
            count = "1 thread" if len(idents) == 1 else f"{len(idents)} threads"
            blocks.append("\n".join([count, *told, "".join(traceback.format_list(calls))]))
        self._tell("\n".join(blocks).encode(errors="replace"), TEXT)

    def _profile(self) -> None:
        """Samples, and answers in the format asked for."""
        asked = self._parameters(seconds=str(DEFAULT_SECONDS), format="pprof", value="cpu")
        seconds = self._whole("seconds", asked["seconds"], 1, MAX_SECONDS)
        self._one_of("format", asked["format"], ("pprof", "collapsed", "speedscope"))
        self._one_of("value", asked["value"], ("cpu", "wall"))
        profile = self._sample(seconds)
        name = f"{self.server.name or 'ringoexp'}, {profile.duration / 1e9:.1f} s"
        if asked["format"] == "collapsed":
            self._tell(profile_formats.collapsed(profile, asked["value"]).encode(errors="replace"), TEXT)
        elif asked["format"] == "speedscope":
            attachment = {"Content-Disposition": 'attachment; filename="profile.speedscope.json"'}
            self._tell(profile_formats.speedscope(profile, name).encode(), "application/json", attachment)
        else:
            self._tell(
                profile_formats.pprof(profile), PROTO, {"Content-Disposition": 'attachment; filename="profile.pb.gz"'}
            )

    def _heap(self) -> None:
        """Starts or stops tracemalloc, or tells what it has seen."""
        asked = self._parameters(start="", stop="", frames=str(HEAP_FRAMES), format="pprof", seconds="")
        frames = self._whole("frames", asked["frames"], 1, MAX_FRAMES)
        self._one_of("start", asked["start"], ("", "1"))
        self._one_of("stop", asked["stop"], ("", "1"))
        self._one_of("format", asked["format"], ("pprof", "text"))
        if asked["start"] and asked["stop"]:
            raise Refusal(400, "start=1 or stop=1, not both")
        if asked["start"]:
            tracemalloc.start(frames)  # does nothing where it has been started
            frames = tracemalloc.get_traceback_limit()
            self._tell(f"tracing memory, {frames} calls of each allocation; ?stop=1 ends it\n".encode(), TEXT)
            return
        if asked["stop"]:
            tracemalloc.stop()
            self._tell(b"not tracing memory\n", TEXT)
            return
        try:
            snapshot = tracemalloc.take_snapshot()
        except RuntimeError:
            raise Refusal(
                409, "memory is not traced: ask for /debug/pprof/heap?start=1 first, and a little later again"
            ) from None
        if asked["format"] == "text":
            now, peak = tracemalloc.get_traced_memory()
            lines = [f"{now} bytes now, {peak} at the peak, since the tracing began\n"]
            lines += [
                f"{stat.size:>12} bytes {stat.count:>9} objects  {stat.traceback}\n"
                for stat in snapshot.statistics("lineno")
            ]
            self._tell("".join(lines).encode(errors="replace"), TEXT)
            return
        traces = (
            ([(frame.filename, frame.lineno) for frame in reversed(stat.traceback)], stat.count, stat.size)
            for stat in snapshot.statistics("traceback")
        )
        content = profile_formats.pprof_heap(traces, time.time_ns())
        self._tell(content, PROTO, {"Content-Disposition": 'attachment; filename="heap.pb.gz"'})

    # Helpers.

    def _sample(self, seconds: int) -> profile_formats.Profile:
        """A profile of so many seconds; gives up when the client leaves or the server stops."""
        if not self.server.busy.acquire(blocking=False):
            left = max(1, round(self.server.busy_until - monotonic()))
            raise Refusal(503, "one profile at a time: another one is being made", {"Retry-After": str(left)})
        try:
            self.server.busy_until = monotonic() + seconds
            profile = sampling.sample(seconds, self._wait)
        finally:
            self.server.busy.release()
        if self.server.stopping.is_set():
            raise Refusal(503, "the server is stopping")
        if self._is_gone():
            raise ConnectionResetError("the client has left")
        return profile

    def _wait(self, seconds: float) -> bool:
        """Sleeps; True when sampling is to end before its time."""
        if self.server.stopping.wait(seconds):
            return True
        now = monotonic()
        if now < self._looked_at + LOOK_SECONDS:
            return False
        self._looked_at = now
        return self._is_gone()

    _looked_at = 0.0

    def _is_gone(self) -> bool:
        """True when the client has closed its side."""
        poll = select.poll()
        poll.register(self.connection, _CLOSED)
        if not poll.poll(0):
            return False
        try:  # where the system does not tell, this is the next request, perhaps
            return _CLOSED != select.POLLIN or not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def _check_who(self) -> None:
        """Web pages from elsewhere may not ask; nor, on the loopback address, under another name than its own."""
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin") or "Origin" in self.headers:
            raise Refusal(403, "web pages from elsewhere may not ask the profiler")
        given = self.headers.get("Host") or "localhost"
        try:
            host = urlsplit(f"//{given}").hostname or ""
        except ValueError:
            host = ""
        if self.server.loopback and not is_loopback(host) and host not in self.server.hosts:
            raise Refusal(403, f"this is not {given[:100]}: ask for localhost")

    def _parameters(self, **defaults: str) -> dict[str, str]:
        """The query's parameters, with defaults; unknown ones are refused."""
        given = parse_qsl(self.path.partition("?")[2], keep_blank_values=True)
        for name, _ in given:
            if name not in defaults:
                known = ", ".join(defaults) or "none"
                raise Refusal(400, f"{name[:40]!r} is not a parameter here: {known}")
        return {**defaults, **dict(given)}

    def _whole(self, name: str, text: str, low: int, high: int) -> int:
        value = int(text) if text.isascii() and text.isdigit() and len(text) < 9 else low - 1
        if not low <= value <= high:
            raise Refusal(400, f"{name}={text[:40]} is not accepted: a whole number, {low} to {high}")
        return value

    def _one_of(self, name: str, text: str, known: tuple[str, ...]) -> None:
        if text not in known:
            raise Refusal(400, f"{name}={text[:40]} is not accepted: {' or '.join(filter(None, known))}")

    def _tell(self, content: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.reply(
            200, content, kind, {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", **(headers or {})}
        )


def _position(frame: FrameType | None) -> tuple[tuple[CodeType, int], ...]:
    """Where a thread is, innermost call first: equal for threads whose stacks read the same."""
    places = []
    while frame:
        places.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return tuple(places)


def _about(thread: threading.Thread | None, ident: int) -> str:
    """A thread's name, the system's id, and its CPU time."""
    if thread is None:
        return f"  thread-{ident}, not Python's own"
    cpu = sampling.thread_cpu(thread.native_id or 0)
    told = f"  {thread.name}, id {thread.native_id}"
    return told + ("" if cpu is None else f", {cpu / 1e9:.3f} s of CPU") + (", daemon" if thread.daemon else "")
