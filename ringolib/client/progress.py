"""What `ringoexp send` shows on stderr while it sends: the progress on a terminal, and troubles elsewhere.

The functions, `Window` and `Wait` do no I/O. The thread `progress` samples the producer's counts and prints. It starts
the thread `ask-ready` while records wait, because the server's answer may take seconds. Each attribute has one writer,
so there is no lock.
"""

import os
import re
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import NamedTuple

from ringolib.client.numbers_input import Input
from ringolib.client.output import is_drawable, is_in_foreground, own_hints, print_line
from ringolib.client.producer import Producer
from ringolib.printable import escape_controls
from ringolib.timing import ThreadError, start, start_thread

PROGRESS_SECONDS = 0.25
"""How often the counts are sampled, and the line is drawn."""
WINDOW_SECONDS = 5.0
"""The time over which the present rate is measured."""
WAITING_SECONDS = 2.0
"""How long no ack may arrive before the line says that records wait."""
ASK_SECONDS = 3.0
"""The pause between two questions to the server why it stores nothing."""
TYPING_SECONDS = 1.0
"""How long after Enter a line may be printed without getting into the next line that is typed."""
DEFAULT_COLUMNS = 80
MIN_BAR, GOOD_BAR, MAX_BAR = 5, 10, 30
"""Characters of the bar between its brackets. For a good one, counts are shortened or left out."""
MARGIN = 3
"""Columns left free. In the last one, some terminals begin a new line. A terminal shows Ctrl-C as two characters."""
ERASE_LINE = "\r\x1b[K"


class Counts(NamedTuple):
    """Integers read, sent and acked. `fraction` is the part of the input that is acked, or None if it is not known."""

    read: int
    sent: int
    acked: int
    fraction: float | None = None


def fraction_acked(share: float | None, skipped: int, read: int, acked: int) -> float | None:
    """Return the part of the input that is acked, from 0 to 1. `share` is the part that was read, None if unknown.

    It is 1 only if all of the input is acked. Integers of text differ in length, so the part is an estimate before.
    """
    if share is None:
        return None
    return share * (skipped + acked) / (skipped + read) if skipped + read else share


def format_count(count: int) -> str:
    """Format a count with at most seven characters, rounded down."""
    for unit, size, scale in (("G", 10**9, 100), ("M", 10**6, 100), ("k", 10**3, 10)):
        if count >= max(size, 10_000):
            return f"{count * scale // size / scale:.{len(str(scale)) - 1}f}{unit}"
    return f"{count:,}"


def format_time(seconds: float) -> str:
    """Format a time as minutes and seconds, with hours if there are any."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def plain_reason(text: str) -> str:
    """Return an error text as the end of a sentence, without error number, and with control characters escaped."""
    text = re.sub(r"\[Errno -?\d+\] ", "", escape_controls(own_hints(text)))
    return text[:1].lower() + text[1:] if re.match("[A-Z][a-z]", text) else text


def progress_line(counts: Counts, rate: float | None, seconds_left: float | None, columns: int) -> str:
    """Return the line for a terminal that is this wide: as much as fits, the most important last to go."""
    exact = f"{counts.read:,} read, {counts.sent:,} sent, {counts.acked:,} acked"
    short = ", ".join(
        f"{format_count(count)} {word}"
        for count, word in ((counts.read, "read"), (counts.sent, "sent"), (counts.acked, "acked"))
    )
    acked = f"{format_count(counts.acked)} acked"
    speed = "" if rate is None else f"{format_count(int(rate))}/s"
    left = "" if seconds_left is None else f"{format_time(seconds_left)} left"
    percent = "" if counts.fraction is None else f"{int(counts.fraction * 100):3}% "
    width = columns - MARGIN
    forms = [(exact, speed, left), (short, speed, left), (acked, speed, left), (acked, left), (acked,)]
    for parts in forms:
        text = ", ".join(filter(None, parts))
        bar = min(MAX_BAR, width - len(percent) - len(text) - 3)
        if counts.fraction is not None and bar >= (GOOD_BAR if parts in forms[:3] else MIN_BAR):
            filled = int(counts.fraction * bar)
            return f"{percent}[{'#' * filled}{'-' * (bar - filled)}] {text}"
        if counts.fraction is None and len(text) <= width:
            return text
    return cut(percent + text, width)


def waiting_line(
    connected: bool, seconds: float, timeout: float | None, reason: str, counts: Counts, columns: int
) -> str:
    """Return the line for a terminal that is this wide, while records wait for their acks.

    With a timeout, the line says how long the run will wait.
    """
    time = f"{int(seconds)}{f' of {timeout:g}' if timeout else ''} s{f': {reason}' if reason else ''}"
    text = f"waiting for {'acks' if connected else 'the server'}, {time}"
    forms = [
        f"{text} ({counts.read:,} read, {counts.sent:,} sent, {counts.acked:,} acked)",
        f"{text} ({format_count(counts.acked)} of {format_count(counts.read)} acked)",
        text,
        f"waiting, {time}",
    ]
    width = columns - MARGIN
    return next((form for form in forms if len(form) <= width), cut(forms[-1], width))


def final_line(counts: Counts, reconnects: int, seconds: float) -> str:
    """Return the line that stays on the terminal: the counts, and the average rate of a run that took a while."""
    line = f"{counts.read:,} read, {counts.sent:,} sent, {counts.acked:,} acked in {seconds:.1f} s"
    if seconds >= 1 and counts.acked >= 10 * seconds:
        line += f", {counts.acked / seconds:,.0f}/s"
    if reconnects:
        line += f", {reconnects} reconnect{'s' if reconnects > 1 else ''}"
    return line


def cut(text: str, width: int) -> str:
    """Return the text, cut to the width."""
    return text if len(text) <= width else text[: max(0, width - 3)] + "..."


class Window:
    """The latest samples of a run, for its present rate."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, Counts]] = deque()

    def add(self, now: float, counts: Counts) -> None:
        """Add a sample, and forget samples older than WINDOW_SECONDS."""
        self._samples.append((now, counts))
        while len(self._samples) > 2 and self._samples[1][0] <= now - WINDOW_SECONDS:
            self._samples.popleft()

    def rate(self) -> float | None:
        """Return the acks per second; None if there is one sample only."""
        (then, before), (now, latest) = self._samples[0], self._samples[-1]
        return (latest.acked - before.acked) / (now - then) if now > then else None

    def seconds_left(self) -> float | None:
        """Return how long the rest of the input takes at the present rate; None if that is not known."""
        (then, before), (now, latest) = self._samples[0], self._samples[-1]
        if before.fraction is None or latest.fraction is None or latest.fraction <= before.fraction or now <= then:
            return None
        return (1 - latest.fraction) * (now - then) / (latest.fraction - before.fraction)


class Wait:
    """How long records have waited without an ack."""

    def __init__(self, now: float) -> None:
        self._since = now
        self._acked = 0

    def seconds(self, now: float, accepted: int, acked: int) -> float:
        """Return the seconds since the last ack, or since the first record began to wait; 0 if none waits."""
        if acked != self._acked or acked >= accepted:
            self._acked, self._since = acked, now
        return now - self._since


class Progress:
    """Prints to stderr while the integers of `source` are sent.

    On a terminal one line is drawn again and again, except while the input is typed there, and while this process is a
    background job. Elsewhere each new reason to wait is one line. `ask` returns why the server stores nothing, or "".
    If no ack arrives for `timeout` seconds while records wait, the main thread gets SIGALRM.
    """

    def __init__(self, producer: Producer, source: Input, ask: Callable[[], str], timeout: float | None) -> None:
        self._producer = producer
        self._source = source
        self._ask = ask
        self._timeout = timeout
        self._is_drawable = is_drawable(sys.stderr)
        self._done = threading.Event()
        # A daemon: after a Ctrl-C during the start of the thread, `__exit__` may never be called.
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self.reason = ""
        """Why records wait; empty if none waits, or the reason is not known."""
        self._answer = ""  # the server's; written by the thread `ask-ready`
        # Used by the thread `progress` only.
        self._asking: threading.Thread | None = None
        self._ask_at = 0.0
        self._drawn = False
        self._told = ""  # the reason printed last

    def __enter__(self) -> "Progress":
        try:
            start(self._thread)
        except ThreadError:
            if self._timeout:
                raise
        return self  # without a thread: send without progress

    def __exit__(self, *unused: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def counts(self) -> Counts:
        """Return how far the run is."""
        acked = self._producer.acked  # first, and `read` last, so that acked <= sent <= read
        sent = self._producer.transmitted
        share, skipped = self._source.share, self._source.skipped
        read = self._source.read
        return Counts(read, sent, acked, fraction_acked(share, skipped, read, acked))

    def _run(self) -> None:
        started = monotonic()
        window, wait = Window(), Wait(started)
        if self._source.is_typed and self._is_drawable:
            print_line("ringoexp send: type integers, one a line; Ctrl-D on an empty line ends the input", error=True)
        while not self._done.wait(PROGRESS_SECONDS):
            now, counts = monotonic(), self.counts()
            waited = wait.seconds(now, self._producer.sent, counts.acked)
            self._update_reason(now, waited)
            if self._timeout and waited >= self._timeout:
                # Again and again: a signal that arrives just before a system call does not interrupt it.
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
            if waited >= WAITING_SECONDS:
                window = Window()  # the pause does not count in the rate after it
            window.add(now, counts)
            self._show(counts, window, waited)
        if self._is_drawable and is_in_foreground(sys.stderr):
            line = final_line(self.counts(), self._producer.reconnects, monotonic() - started)
            print_line(ERASE_LINE + line, error=True)

    def _update_reason(self, now: float, waited: float) -> None:
        """Find out why records wait: the last failure to connect, or the server's own answer."""
        if not waited:
            self.reason = self._answer = ""
            return
        if waited >= WAITING_SECONDS and now >= self._ask_at and not (self._asking and self._asking.is_alive()):
            self._ask_at = now + ASK_SECONDS
            try:
                self._asking = start_thread(self._keep_answer, name="ask-ready")
            except ThreadError:
                pass  # without the server's answer
        trouble = None if self._producer.connected else self._producer.trouble
        reasons = [plain_reason(text) for text in (trouble, self._answer) if text]
        self.reason = "; ".join(dict.fromkeys(reasons))

    def _keep_answer(self) -> None:
        self._answer = self._ask()

    def _show(self, counts: Counts, window: Window, waited: float) -> None:
        """Draw the line, or print the reason once."""
        connected = self._producer.connected
        waits = waited >= WAITING_SECONDS or bool(waited and self.reason)
        is_typing = self._source.is_typed and not self._source.ended
        if not self._is_drawable or is_typing or not is_in_foreground(sys.stderr):
            if self.reason != self._told and not (is_typing and monotonic() > self._source.arrived_at + TYPING_SECONDS):
                self._tell(connected)
            return
        columns = _columns()
        if not waits:
            line = progress_line(counts, window.rate(), window.seconds_left(), columns)
        else:
            line = waiting_line(connected, waited, self._timeout, self.reason, counts, columns)
            if line.endswith("...") and self.reason != self._told:
                self._tell(connected)
        print_line(ERASE_LINE + line, error=True, end="")
        self._drawn = True

    def _tell(self, connected: bool) -> None:
        """Print the reason as a line of its own, above the line that is drawn.

        A user who types integers is also told when there is no reason any more.
        """
        self._told = self.reason
        if self.reason:
            text = f"{self.reason}; {'waiting' if connected else 'trying again'}"
        elif self._source.is_typed:
            text = "all integers so far are acked"
        else:
            return
        start = ERASE_LINE if self._drawn else ""
        print_line(f"{start}ringoexp send: {self._producer.url}: {text}", error=True)


def _columns() -> int:
    """Return the width of the terminal. It may change at any time."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or DEFAULT_COLUMNS
    except OSError:
        return DEFAULT_COLUMNS
