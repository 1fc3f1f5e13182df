"""The progress of `ringoexp send`: lines for terminals of any width, the present rate, the time left, and waiting."""

import threading
from array import array
from contextlib import ExitStack
from typing import Any

import pytest

from ringolib.client import progress
from ringolib.client.numbers_input import Input
from ringolib.client.output import own_hints
from ringolib.client.progress import (
    MARGIN,
    Counts,
    Progress,
    Wait,
    Window,
    final_line,
    format_count,
    format_time,
    fraction_acked,
    plain_reason,
    progress_line,
    waiting_line,
)
from ringolib.timing import ThreadError

HALF = Counts(12_420_000, 12_410_000, 12_400_000, 0.429)
SMALL = Counts(3, 2, 1, 1 / 3)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (9_999, "9,999"),
        (10_000, "10.0k"),
        (123_456, "123.4k"),
        (999_999, "999.9k"),
        (1_000_000, "1.00M"),
        (12_409_999, "12.40M"),
        (999_999_999, "999.99M"),
        (5_000_000_000, "5.00G"),
    ],
)
def test_counts_are_short_and_rounded_down(count: int, text: str) -> None:
    assert format_count(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.9, "0:00"), (61, "1:01"), (3599, "59:59"), (3661, "1:01:01")])
def test_times_have_minutes_and_hours(seconds: float, text: str) -> None:
    assert format_time(seconds) == text


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (91, " 42% [####------] 12,420,000 read, 12,410,000 sent, 12,400,000 acked, 52.0k/s, 1:15 left"),
        (80, " 42% [####-------] 12.42M read, 12.41M sent, 12.40M acked, 52.0k/s, 1:15 left"),
        (60, " 42% [#######----------] 12.40M acked, 52.0k/s, 1:15 left"),
        (40, " 42% [##----] 12.40M acked, 1:15 left"),
        (24, " 42% 12.40M acked"),
        (12, " 42% 1..."),
    ],
)  # fmt: skip
def test_line_with_a_known_size_fits_the_terminal(columns: int, line: str) -> None:
    shown = progress_line(HALF, 52_000, 75, columns)
    assert len(shown) <= columns - MARGIN
    assert shown == line


@pytest.mark.parametrize("counts", [HALF, HALF._replace(fraction=None), SMALL, Counts(0, 0, 0), Counts(9, 9, 9, 1.0)])
def test_no_line_is_longer_than_the_terminal(counts: Counts) -> None:
    for columns in range(1, 200):
        lines = [
            progress_line(counts, None, None, columns),
            progress_line(counts, 1e9, 1e6, columns),
            waiting_line(False, 12, 30, "connection refused", counts, columns),
            waiting_line(True, 1e6, None, "x" * 100, counts, columns),
        ]
        assert all(len(line) <= max(3, columns - MARGIN) for line in lines), columns


def test_line_without_a_size_has_no_bar() -> None:
    line = progress_line(HALF._replace(fraction=None), 52_000, None, 80)
    assert line == "12,420,000 read, 12,410,000 sent, 12,400,000 acked, 52.0k/s"


@pytest.mark.parametrize(
    ("connected", "timeout", "reason", "columns", "line"),
    [
        (False, None, "no route", 80, "waiting for the server, 12 s: no route (3 read, 2 sent, 1 acked)"),
        (False, None, "connection refused", 70, "waiting for the server, 12 s: connection refused (1 of 3 acked)"),
        (False, None, "connection refused", 55, "waiting for the server, 12 s: connection refused"),
        (False, None, "connection refused", 40, "waiting, 12 s: connection refused"),
        (False, None, "connection refused", 30, "waiting, 12 s: connectio..."),
        (False, 30, "", 80, "waiting for the server, 12 of 30 s (3 read, 2 sent, 1 acked)"),
        (True, 1.5, "", 80, "waiting for acks, 12 of 1.5 s (3 read, 2 sent, 1 acked)"),
    ],
)  # fmt: skip
def test_waiting_line_has_time_and_reason(
    connected: bool, timeout: float | None, reason: str, columns: int, line: str
) -> None:
    assert waiting_line(connected, 12.9, timeout, reason, SMALL, columns) == line


@pytest.mark.parametrize(
    ("reconnects", "seconds", "line"),
    [
        (0, 0.04, "90 read, 90 sent, 90 acked in 0.0 s"),
        (1, 2, "90 read, 90 sent, 90 acked in 2.0 s, 45/s, 1 reconnect"),
        (2, 60, "90 read, 90 sent, 90 acked in 60.0 s, 2 reconnects"),
    ],
)
def test_final_line_has_the_average_of_a_run_that_took_a_while(reconnects: int, seconds: float, line: str) -> None:
    assert final_line(Counts(90, 90, 90), reconnects, seconds) == line


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[Errno 111] Connection refused", "connection refused"),
        ("[Errno -2] Name or service not known", "name or service not known"),
        ("TLS is not possible", "TLS is not possible"),
        ("closed with 1011 \x1b[2Jgone\n", r"closed with 1011 \x1b[2Jgone\n"),
        ("it needs one (--tls_cert, send: --cert)", "it needs one (--cert)"),
        ("", ""),
    ],
)
def test_reason_is_the_end_of_a_sentence(text: str, reason: str) -> None:
    assert plain_reason(text) == reason


def test_hints_without_a_part_for_send_stay() -> None:
    assert own_hints("wrong (--token_file, or RINGOEXP_TOKEN)") == "wrong (--token_file, or RINGOEXP_TOKEN)"


@pytest.mark.parametrize(
    ("share", "skipped", "read", "acked", "fraction"),
    [
        (None, 0, 10, 5, None),
        (0.0, 0, 0, 0, 0.0),
        (0.5, 0, 100, 50, 0.25),
        (1.0, 0, 100, 99, 0.99),
        (1.0, 0, 100, 100, 1.0),
        (0.5, 100, 0, 0, 0.5),
        (1.0, 50, 50, 25, 0.75),
        (1.0, 0, 0, 0, 1.0),
    ],
)
def test_fraction_is_the_acked_part_of_the_input(
    share: float | None, skipped: int, read: int, acked: int, fraction: float | None
) -> None:
    assert fraction_acked(share, skipped, read, acked) == fraction


def test_rate_is_the_present_one_not_the_average() -> None:
    """1,000 a second for a minute, then 10 a second."""
    window = Window()
    for second in range(61):
        window.add(second, Counts(0, 0, second * 1000, second / 200))
    assert window.rate() == 1000 and window.seconds_left() == pytest.approx(140)
    for second in range(61, 70):
        window.add(second, Counts(0, 0, 60_000 + (second - 60) * 10, 0.3))
    assert window.rate() == 10 and window.seconds_left() is None


def test_first_sample_has_no_rate() -> None:
    window = Window()
    window.add(0, Counts(5, 5, 5, 0.5))
    assert window.rate() is None and window.seconds_left() is None


def test_wait_counts_from_the_last_ack_or_the_first_record() -> None:
    wait = Wait(0)
    assert wait.seconds(100, 0, 0) == 0, "nothing waits"
    assert wait.seconds(101, 5, 0) == 1
    assert wait.seconds(105, 50, 0) == 5
    assert wait.seconds(106, 50, 49) == 0, "an ack arrived"
    assert wait.seconds(109, 50, 49) == 3
    assert wait.seconds(110, 50, 50) == 0


class FakeProducer:
    """A producer in a state that a test chooses."""

    url = "ws://x/"
    sent = transmitted = acked = reconnects = 0
    connected = False
    trouble: str | None = None


def make_progress(timeout: float | None = None) -> Progress:
    with ExitStack() as stack:
        source = Input("", array("q", [1, 2]), stack, False, 0)
    return Progress(FakeProducer(), source, lambda: "", timeout)  # type: ignore[arg-type]


def test_send_works_without_a_progress_thread_unless_it_has_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    without, timed = make_progress(), make_progress(1)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with without:
        pass
    with pytest.raises(ThreadError), timed:
        pass


def test_reason_of_a_lost_connection_does_not_outlive_the_next_one() -> None:
    tested: Any = make_progress()
    tested._producer.trouble = "[Errno 111] Connection refused"
    tested._update_reason(0, 1)
    assert tested.reason == "connection refused"
    tested._producer.connected = True
    tested._update_reason(1, 2)
    assert tested.reason == ""
    tested._producer.connected = False
    tested._update_reason(2, 0)
    assert tested.reason == "", "no record waits"


def test_server_is_asked_only_while_records_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    tested: Any = make_progress()
    monkeypatch.setattr(progress, "start_thread", lambda target, name: target())
    asked: list[int] = []
    tested._ask = lambda: asked.append(1) or "disk full"
    tested._update_reason(0, 0)
    tested._update_reason(1, progress.WAITING_SECONDS / 2)
    assert (asked, tested.reason) == ([], "")
    tested._update_reason(2, progress.WAITING_SECONDS)
    tested._update_reason(2.1, progress.WAITING_SECONDS)
    assert (len(asked), tested.reason) == (1, "disk full")
    tested._update_reason(3, 0)
    assert tested.reason == "", "an ack arrived"
