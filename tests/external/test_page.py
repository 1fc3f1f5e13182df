"""The live page in a real browser: its contents, its behaviour and its accessibility."""

import json
import re
import signal
import subprocess
import sys
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from support.browser import Browser
from support.certificates import Authority, tls
from support.harness import ROOT, RawClient, ServerProcess, eventually, frame, free_port, request, rows, server
from support.nginx import nginx, socket_directory

from ringolib.status.numbers import NUMBERS, STATS
from ringolib.wire import SUBPROTOCOL, Run, encode_batch, encode_plain

PAGE = (ROOT / "ringolib/web/dashboard.html").read_text()


@pytest.fixture(scope="module")
def standalone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A publisher that stores in its own database."""
    with server(tmp_path_factory.mktemp("own"), "-p", "0", "-T", "0", "-N", "Ringo the 1st") as process:
        yield process


class Pair:
    """A consumer and a publisher that forwards to it. Each can be started again on its port."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ports = {"consumer": free_port(), "publisher": free_port()}
        self.servers: dict[str, ServerProcess] = {}
        self.start("consumer")
        self.start("publisher")

    def start(self, role: str) -> None:
        directory = self.directory / role
        directory.mkdir(exist_ok=True)
        flags = ["-I", "false"] if role == "consumer" else ["-T", str(self.ports["consumer"]), "-r", "1000"]
        self.servers[role] = ServerProcess(directory, "-p", str(self.ports[role]), *flags)

    @property
    def consumer(self) -> ServerProcess:
        return self.servers["consumer"]

    @property
    def publisher(self) -> ServerProcess:
        return self.servers["publisher"]

    def values(self) -> list[int]:
        return [value for _, _, value in rows(self.directory / "consumer" / "ringoexp.db")]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    servers = Pair(tmp_path_factory.mktemp("pair"))
    try:
        yield servers
    finally:
        for process in servers.servers.values():
            process.kill()
    for process in servers.servers.values():
        assert "Traceback" not in process.errors.read_text()


CHANGING = {"connections", "totalConnections", "diskFreeBytes", "workers", "ringOldestInFlightMs", "consumerAwayMs"}
"""Stats that change by themselves, or because they are requested."""


def same_as_stats(browser: Browser, process: ServerProcess) -> bool:
    """True if every number on the page is exactly the one in the stats. Fails if the page lacks an important number."""
    stats = process.stats()
    names = browser.run("return [...document.querySelectorAll('#numbers data')].map(element => element.id)")
    assert {"recordsReceived", "recordsStored", "recordsAcked", "clients", "publishers", "commits"} <= set(names)
    expected = {name: "" if stats[name] is None else str(stats[name]) for name in names if name in stats}
    shown = {name: browser.value(name) for name in expected}
    numbers = {name for name in expected if name not in CHANGING}
    assert len(numbers) > 20
    return all(shown[name] == expected[name] or as_number(shown[name]) == as_number(expected[name]) for name in numbers)


def as_number(value: str) -> float:
    """Return a number or a truth value, as Python or JavaScript writes it, as a number; -1 for an empty text."""
    return float({"": "-1", "true": "1", "false": "0"}.get(value.lower(), value))


def test_page_shows_the_numbers_of_the_stats(browser: Browser, standalone: ServerProcess) -> None:
    browser.open(standalone.port)
    assert browser.value("recordsStored") == "0"
    with RawClient(standalone.port) as client:
        for _ in range(5):
            client.send(frame(2, encode_plain(range(2469))))
        client.acked(12345)
        eventually(lambda: browser.value("recordsAcked") == "12345" and browser.value("clients") == "1")
        assert same_as_stats(browser, standalone)
    assert browser.text("recordsReceived") == "12,345"
    assert browser.value("recordsStored") == "12345"
    assert browser.value("ringCursor") == browser.value("ringCommitted") == "12345"
    assert float(browser.run("return document.querySelector('[data-chart=in] data').value")) >= 0
    assert "own database" in browser.text("stateDetail") and browser.state() == "ok"
    assert int(browser.value("barFreeBytes")) > 0
    eventually(lambda: browser.value("clients") == "0", "the client has disconnected")


def test_consumer_page_counts_duplicates_and_publishers(browser: Browser, tmp_path: Path) -> None:
    values = array("q", range(1000))
    with server(tmp_path, "-p", "0", "-I", "false") as consumer, ExitStack() as clients:
        browser.open(consumer.port)
        for _ in range(3):  # each sends the same records of the same source
            client = clients.enter_context(RawClient(consumer.port, {"Sec-WebSocket-Protocol": SUBPROTOCOL}))
            client.send(frame(2, encode_batch([Run(bytes(16), 0, 1000)], values)))
            client.acked(1000)
        eventually(lambda: browser.value("recordsDuplicate") == "2000" and browser.value("publishers") == "3")
        assert same_as_stats(browser, consumer)
        assert browser.value("storedTotal") == "1000" and "3 batch connections" in browser.text("storedNote")
        assert not browser.is_visible("ring")
        charts = browser.run("return [...document.querySelectorAll('[data-chart]')].map(row => row.dataset.chart)")
        assert {"stored", "duplicates", "commit"} <= set(charts)
        assert browser.value("databaseBytes") == str(consumer.stats()["databaseBytes"])


def is_painted(browser: Browser, kind: str, slot: int, capacity: int) -> bool:
    """True if the ring shows this kind at the middle of a slot, near the inner edge."""
    return bool(
        browser.run(
            "const [kind, slot, capacity] = arguments, angle = (slot + .5) / capacity * 2 * Math.PI;"
            "return document.getElementById(kind).isPointInFill("
            "new DOMPoint(200 + 128 * Math.sin(angle), 200 - 128 * Math.cos(angle)))",
            kind,
            slot,
            capacity,
        )
    )


def segments(browser: Browser) -> dict[str, int]:
    """Return the number of segments with slots of each kind."""
    kinds = ("inFlight", "waiting", "finished")
    return {
        kind: int(browser.run("return document.getElementById(arguments[0]).dataset.segments", kind)) for kind in kinds
    }


def ring_text(browser: Browser) -> str:
    return str(browser.run("return document.getElementById('ringPicture').ariaLabel"))


def test_ring_shows_records_in_flight_while_the_consumer_is_stopped(browser: Browser, pair: Pair) -> None:
    browser.open(pair.publisher.port)
    browser.run("TIMES.slow = 300")
    assert ring_text(browser) == "Ring: 1,000 slots, 0 waiting, 0 in flight, 1,000 free"
    pair.consumer.send_signal(signal.SIGSTOP)
    try:
        with RawClient(pair.publisher.port) as client:
            client.send(frame(2, encode_plain(range(300))))
            eventually(lambda: browser.value("ringInFlightSlots") == "300")
            assert browser.value("ringInFlightSlots") == str(pair.publisher.stats()["ringInFlight"])
            assert ring_text(browser) == "Ring: 1,000 slots, 0 waiting, 300 in flight, 700 free"
            assert is_painted(browser, "inFlight", 154, 1000) and not is_painted(browser, "inFlight", 604, 1000)
            assert segments(browser) == {"inFlight": 36, "waiting": 0, "finished": 0}, "of 120"
            eventually(lambda: browser.state() == "degraded", "the consumer is slow")
            assert "The consumer is slow" in browser.text("stateText")
            pair.consumer.send_signal(signal.SIGCONT)
            client.acked(300)
    finally:
        pair.consumer.send_signal(signal.SIGCONT)
    eventually(lambda: browser.value("ringInFlightSlots") == "0" and browser.state() == "ok")
    assert ring_text(browser).endswith(" 1,000 free")
    assert not is_painted(browser, "inFlight", 154, 1000)
    assert same_as_stats(browser, pair.publisher)


def test_unreachable_consumer_is_shown_until_it_returns(browser: Browser, pair: Pair) -> None:
    browser.open(pair.publisher.port)
    pair.consumer.kill()
    browser.write("7")
    browser.click("sendButton")
    eventually(lambda: browser.state() == "degraded")
    assert re.match(r"The consumer has been unreachable since \d\d:\d\d:\d\d\.", browser.text("stateText"))
    assert f"localhost:{pair.ports['consumer']}: " in browser.text("stateDetail")
    assert browser.text("sendStatus") == "1 sent, 0 stored"
    eventually(lambda: segments(browser) == {"inFlight": 0, "waiting": 1, "finished": 0}, "the batch was given back")
    assert ring_text(browser) == "Ring: 1,000 slots, 1 waiting, 0 in flight, 999 free"
    assert browser.value("ringUsed") == browser.value("ringWaitingSlots") == "1"
    pair.start("consumer")
    assert re.fullmatch(r"1 sent, all stored in [\d.,]+ ms\.", browser.send_result())
    eventually(lambda: browser.state() == "ok")
    assert pair.values()[-1] == 7


def test_waiting_for_acks_can_be_stopped(browser: Browser, pair: Pair) -> None:
    browser.open(pair.publisher.port)
    pair.consumer.send_signal(signal.SIGSTOP)
    try:
        browser.write("1 2")
        browser.click("sendButton")
        eventually(lambda: browser.text("sendStatus") == "2 sent, 0 stored")
        browser.click("sendMany")  # has no effect: one send at a time
        browser.click("sendStop")
        assert browser.send_result() == "Stopped waiting: 2 sent, 0 stored. The other 2 may still be stored."
    finally:
        pair.consumer.send_signal(signal.SIGCONT)
    eventually(lambda: pair.publisher.stats()["clients"] == 0, "the connection is closed")


def test_page_shows_an_unreachable_server_and_recovers(browser: Browser, pair: Pair) -> None:
    browser.open(pair.publisher.port)
    browser.run("window.unchanged = true")
    pair.consumer.send_signal(signal.SIGSTOP)
    browser.write("5 6")
    browser.click("sendButton")
    eventually(lambda: browser.text("sendStatus") == "2 sent, 0 stored")
    eventually(lambda: browser.value("ringUsed") == "2" and int(browser.value("recordsReceived")) >= 2)
    pair.publisher.kill()
    pair.consumer.send_signal(signal.SIGCONT)
    assert re.match(r"The connection ended early, at [\d:]+: 2 sent, 0 stored\..* Code 1006", browser.send_result())
    eventually(lambda: browser.state() == "unreachable")
    assert re.fullmatch(r"The server has been unreachable since \d\d:\d\d:\d\d\.", browser.text("stateText"))
    browser.click("sendButton")
    eventually(lambda: "Nothing was sent" in browser.text("sendResult"))
    assert browser.driver.title == "▲ no answer – Ringo Exp, publisher"
    pair.start("publisher")
    eventually(lambda: browser.state() == "ok")
    assert browser.text("sendResult") == "", "the server is back"
    assert "it was restarted" in browser.text("stateDetail")
    browser.wait_for_poll()
    assert browser.run("return window.unchanged") is True, "the page was not reloaded"
    rates = browser.run("return samples.flatMap(({values}) => values ? [values.in, values.stored, values.acked] : [])")
    assert all(rate is None or rate >= 0 for rate, _ in rates)
    assert same_as_stats(browser, pair.publisher)


def test_send_form_stores_the_integers(browser: Browser, pair: Pair) -> None:
    browser.open(pair.publisher.port)
    for written in "1 -2 3", "4,5,\n6", "+9223372036854775807; -9223372036854775808":
        numbers = [int(word) for word in re.findall(r"[+-]?\d+", written)]
        browser.write(written)
        browser.click("sendButton")
        assert re.fullmatch(rf"{len(numbers)} sent, all stored in [\d.,]+ ms\.", browser.send_result())
        assert pair.values()[-len(numbers) :] == numbers
    eventually(lambda: pair.publisher.stats()["clients"] == 0, "the connections are closed")


def test_ten_thousand_numbers_pass_through_a_smaller_ring(browser: Browser, pair: Pair) -> None:
    before = len(pair.values())
    browser.open(pair.publisher.port)
    browser.click("sendMany")
    assert re.fullmatch(r"10,000 sent, all stored in [\d.,]+ ms\.", browser.send_result())
    assert sorted(pair.values()[before:]) == list(range(1, 10001))
    assert browser.run("return document.getElementById('sendProgress').value") == 1


INVALID_INPUT = {
    "": "Enter a number",
    "1 two 3": "“two” is not a whole number",
    "1.5": "“1.5” is not a whole number",
    "0x10": "“0x10” is not a whole number",
    "<b>1</b>": "“<b>1</b>” is not a whole number",
    "9223372036854775808": "“9223372036854775808” is out of range",
    "-9223372036854775809": "“-9223372036854775809” is out of range",
    "9" * 100000: f"“{'9' * 40}…” is out of range",
}


def test_invalid_integer_is_named_and_nothing_is_sent(browser: Browser, standalone: ServerProcess) -> None:
    browser.open(standalone.port)
    before = standalone.stats()
    for written, message in INVALID_INPUT.items():
        browser.write(written)
        browser.click("sendButton")
        assert browser.text("inputError").startswith(message)
        assert browser.run("return [document.activeElement.id, document.activeElement.ariaInvalid]") == [
            "integers",
            "true",
        ]
        assert browser.run("return sending") is None and browser.text("sendResult") == ""
    assert browser.run("return document.getElementById('integers').getAttribute('aria-describedby')") == "inputError"
    after = standalone.stats()
    assert after["recordsReceived"] == before["recordsReceived"]
    assert after["recordsRefused"] == before["recordsRefused"]
    browser.write("42")
    browser.click("sendButton")
    browser.send_result()
    assert (
        browser.text("inputError") == ""
        and browser.run("return document.getElementById('integers').ariaInvalid") == "false"
    )


def test_refused_connection_is_reported(browser: Browser, tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", "-n", "1") as full:
        with RawClient(full.port):
            browser.open(full.port)
            browser.click("sendButton")
            assert "Nothing was sent: the connection was refused" in browser.send_result()
            assert "WebSocket connection to" in browser.errors()[0]
    eventually(lambda: browser.state() == "unreachable")


def test_hidden_page_polls_rarely_and_at_once_when_visible(browser: Browser, standalone: ServerProcess) -> None:
    browser.open(standalone.port)
    browser.run(
        "window.delays = []; const real = setTimeout;"
        "window.setTimeout = (call, ms) => { delays.push(ms); return real(call, ms); };"
        "window.hide = on => { Object.defineProperty(document, 'hidden', {value: on, configurable: true});"
        " document.dispatchEvent(new Event('visibilitychange')); }"
    )
    browser.run("hide(true)")
    eventually(lambda: browser.run("return delays.at(-1)") == 10000)
    seen = browser.polls()
    browser.run("TIMES.poll = 1000; hide(false)")
    eventually(lambda: browser.polls() > seen, deadline=5)
    assert browser.run("return delays.at(-1)") <= 1000


# What the page shows for given reports.


def test_rate_is_not_computed_over_a_short_time(browser: Browser, standalone: ServerProcess) -> None:
    """A poll right after a send must not show 10,000 records in 0.13 s as 77,000 per second."""
    browser.open(standalone.port)
    browser.stop_polling()
    browser.show(10)
    received = int(browser.value("recordsReceived"))
    browser.show(0.13, recordsReceived=received + 10_000)
    assert browser.chart("in") == "0" and browser.value("recordsReceived") == str(received + 10_000)
    browser.show(1)
    assert 8000 < float(browser.chart("in").replace(",", "")) < 9000, "10,000 in 1.13 s"
    for more in range(1, 9):  # polls that are all too early
        browser.show(0.3, recordsReceived=received + 10_000 + 300 * more)
        assert browser.chart("in") in ("1,000", "8,850")
    assert browser.chart("in") == "1,000"


def test_latency_chart_has_gaps_without_acks_and_dots_for_lone_samples(
    browser: Browser, standalone: ServerProcess
) -> None:
    browser.open(standalone.port)
    browser.stop_polling()
    browser.show(100)
    acked = int(browser.value("recordsAcked"))
    for more, shown in (0, "no acks"), (1, "1.5"), (1, "no acks"):
        browser.show(1, recordsAcked=acked + more, ackLatencyP50Ms=1.5, ackLatencyP99Ms=4)
        assert browser.chart("latency") == shown
    assert "no acks" in browser.run("return document.querySelector('[data-chart=latency] svg').ariaLabel")
    assert browser.path("latency", ".line.first") == browser.path("latency", ".area") == ""
    assert browser.path("latency", ".dots.first") == "M59.00 62.50h0"
    assert browser.path("latency", ".dots.second") == "M59.00 0.00h0"
    for more in 2, 3:
        browser.show(1, recordsAcked=acked + more)
    assert browser.path("latency", ".line.first") == "M59.00 62.50L60.00 62.50"
    assert browser.path("latency", ".dots.first") == "M57.00 62.50h0"
    assert "latest 4,096 reads" in browser.text("chartsNote") and "4,096 reads" in browser.text("acksTitle")


NOT_READY = {
    "consumer_unreachable": r"The consumer has been unreachable since [\d:]+\.",
    "consumer_not_ready": r"The consumer cannot store records\.",
    "ring_full": r"The ring is full, and clients wait\.",
    "disk_full": r"The disk of the database is full\.",
    "store_failing": r"The database cannot store records\.",
    "spool_full": r"The consumer is unreachable, and the spool is full\.",
    "something_new": r"A record sent now would not be stored\.",
}


def test_all_is_well_only_if_a_record_would_be_stored(browser: Browser, pair: Pair) -> None:
    browser.open(pair.publisher.port)
    browser.stop_polling()
    for code, sentence in NOT_READY.items():
        browser.show(1, consumerState="up", notReady=[code])
        assert re.fullmatch(sentence, browser.text("stateText")) and browser.state() in ("degraded", "failing")
        assert re.match("▲ (degraded|failing)", browser.driver.title)
        browser.show(1, notReady=[])
        assert browser.text("stateText") == "All is well." and not browser.driver.title.startswith("▲")
    browser.show(1, notReady=None)
    assert browser.text("stateText") == "All is well.", "an older server has no notReady"
    browser.show(1, consumerState="unknown")
    assert browser.text("stateText") == "No record has been sent yet." and browser.state() == "idle"
    assert "not been contacted yet" in browser.text("stateDetail")


def test_consumers_are_listed_and_unreachable_ones_named(browser: Browser, pair: Pair) -> None:
    browser.open(pair.publisher.port)
    browser.stop_polling()
    assert not browser.is_visible("consumers"), "one consumer needs no list"
    up = {"address": "a:1", "state": "up", "reason": None, "awayMs": 0, "workers": 3, "inDoubt": 0}
    down = {"address": "b:2", "state": "down", "reason": "b:2: refused", "awayMs": 5000, "workers": 1, "inDoubt": 1234}
    browser.show(1, consumerState="up", notReady=[], consumers=[up, down])
    assert browser.is_visible("consumers")
    assert browser.text("consumers").split("\n") == [
        "a:1",
        "reachable, 3 workers",
        "b:2",
        "unreachable for 5 s, 1 worker, 1,234 records in doubt",
    ]
    assert browser.text("stateText") == "All is well."
    assert "Reachable consumers: 1 of 2." in browser.text("stateDetail") and "b:2 is unreachable" in browser.text(
        "stateDetail"
    )
    assert "forwarding to a:1, b:2" in browser.text("serverAddress")
    browser.show(
        1, consumerState="down", consumerReason="a:1: gone; b:2: refused", consumers=[{**up, "state": "down"}, down]
    )
    assert browser.text("stateText").startswith("All consumers have been unreachable since")
    assert browser.text("stateDetail").endswith("a:1: gone; b:2: refused")


def test_ring_that_holds_records_is_not_idle(browser: Browser, pair: Pair) -> None:
    browser.open(pair.publisher.port)
    browser.stop_polling()
    cursor, none = int(browser.value("ringCursor")), {"inFlight": [], "finished": []}
    for committed, put, activity in (
        (cursor, cursor, "idle"),
        (cursor, cursor + 3, "turning slowly"),
        (cursor, cursor + 3, "stalled"),
        (cursor + 1, cursor + 3, "emptying"),
        (cursor + 1, cursor + 1001, "full, clients wait"),
    ):
        browser.show(1, ring={"committed": committed, "reserved": committed, "cursor": put, **none})
        assert browser.text("speed") == activity


IN_WORDS = {"storeError", "notReady", "consumerState", "consumerReason", "consumers", "startTime"}
"""Stats that the page shows in other ways than as a number of its list."""


def test_all_numbers_are_on_the_page() -> None:
    listed = PAGE[PAGE.index('id="numbers"') : PAGE.index("</main>")]
    shown = set(re.findall(r'<data id="(\w+)"', listed))
    assert {number.key for number in STATS if number.key} - shown == IN_WORDS
    assert shown <= {number.key for number in NUMBERS}


def test_optional_numbers_are_shown_only_if_configured(browser: Browser, standalone: ServerProcess) -> None:
    def visible() -> list[bool]:
        names = ["recordsExpired", "oldestRecordMs", "unauthorizedRequests", "tlsFailures", "certificateExpires"]
        return [browser.is_visible(name) for name in names]

    browser.open(standalone.port)
    browser.stop_polling()
    assert visible() == [False] * 5 and browser.text("powerSafe") == "yes"
    more = {"retain": 30, "tokenFile": "token", "tlsCert": "cert.pem"}
    browser.show(1, info=more, oldestRecordMs=60_000, certificateExpires="2027-03-09T12:00:00.000Z", powerSafe=False)
    assert visible() == [True] * 5
    assert browser.text("oldestRecordMs").endswith(" ago")
    assert browser.text("certificateExpires") == "9 March 2027" and browser.text("powerSafe") == "no"
    browser.show(1, info=more, oldestRecordMs=0)
    assert browser.text("oldestRecordMs") == "–", "the database is empty"
    browser.show(1, info={**more, "database": "clickhouse://h:8123/numbers"})
    assert visible()[:2] == [False] * 2, "ClickHouse deletes them without a count"


def test_page_of_the_single_file_works(browser: Browser, tmp_path: Path) -> None:
    archive = tmp_path / "ringoexp.pyz"
    subprocess.run(
        [sys.executable, str(ROOT / "tools/build_pyz.py"), str(archive)], check=True, stdout=subprocess.DEVNULL
    )
    one = ServerProcess(tmp_path, "-p", "0", "-T", "0", program=[sys.executable, str(archive)])
    try:
        browser.open(one.port)
        browser.write("1 2 -3")
        browser.click("sendButton")
        assert "3 sent, all stored" in browser.send_result()
        eventually(lambda: browser.value("recordsAcked") == "3")
        eventually(lambda: same_as_stats(browser, one))
        assert one.stop() == 0
    finally:
        one.kill()


def test_link_numbers_are_hidden_without_a_link(browser: Browser, standalone: ServerProcess, pair: Pair) -> None:
    hidden = "return ['linkReconnects', 'consumerAwayMs'].map(id => !document.getElementById(id).checkVisibility())"
    browser.open(pair.publisher.port)
    assert browser.run(hidden) == [False, False]
    browser.open(standalone.port)
    assert browser.run(hidden) == [True, True], "a publisher with its own database has no links"
    numbers = browser.text("numbers")
    assert "oldest not stored" in numbers and "batch connections" in numbers
    assert re.search(r"since the start, .+ (UTC|GMT|[A-Z]{3,4})", browser.text("since"))


def test_disk_usage_is_summed_and_a_bar_not_to_scale_is_marked(browser: Browser, standalone: ServerProcess) -> None:
    browser.open(standalone.port)
    browser.stop_polling()
    browser.show(1, databaseBytes=4096, walBytes=900_000, diskFreeBytes=79_000_000_000)
    assert browser.value("barUsedBytes") == "904096" and "Not to scale" in browser.text("barNote")
    browser.show(1, databaseBytes=4_000_000_000, walBytes=0)
    assert not browser.is_visible("barNote")


def test_remote_database_shows_only_its_size(browser: Browser, standalone: ServerProcess) -> None:
    browser.open(standalone.port)
    browser.stop_polling()
    parts = ("barUsedBytes", "barDatabaseBytes", "barWalBytes", "barFreeBytes", "diskBar", "barNote")
    browser.show(1, databaseBytes=4096, walBytes=900_000, diskFreeBytes=79_000_000_000)
    assert [browser.is_visible(name) for name in parts] == [True] * 6
    url = "clickhouse://h:8123/numbers"
    browser.show(1, info={"database": url}, databaseBytes=4096, walBytes=0, diskFreeBytes=None)
    assert [browser.is_visible(name) for name in parts] == [True] + [False] * 5
    assert browser.text("diskPath") == url and browser.value("barUsedBytes") == "4096"


def test_invalid_input_clears_the_previous_result(browser: Browser, standalone: ServerProcess) -> None:
    browser.open(standalone.port)
    browser.click("sendButton")
    browser.send_result()
    browser.write("x")
    browser.click("sendButton")
    assert browser.text("inputError") and browser.text("sendResult") == browser.text("sendStatus") == ""
    assert not browser.is_visible("sendProgress")


def test_successful_send_clears_the_previous_error(browser: Browser, standalone: ServerProcess) -> None:
    browser.open(standalone.port)
    browser.write("x")
    browser.click("sendButton")
    assert browser.text("inputError")
    browser.click("sendMany")
    assert browser.send_result().startswith("10,000 sent, all stored")
    assert browser.text("inputError") == ""
    assert browser.run("return document.getElementById('integers').ariaInvalid") == "false"


def test_title_has_the_state_the_rate_and_the_name(browser: Browser, standalone: ServerProcess) -> None:
    browser.open(standalone.port)
    browser.stop_polling()
    browser.show(10)
    received = int(browser.value("recordsReceived"))
    browser.show(1, recordsReceived=received + 12_345)
    assert browser.driver.title == "ok, 12,345/s – Ringo the 1st, publisher"
    browser.show(1, notReady=["disk_full"])
    assert browser.driver.title == "▲ failing, 0/s – Ringo the 1st, publisher"


def test_recovery_is_told_for_a_minute(browser: Browser, standalone: ServerProcess) -> None:
    browser.open(standalone.port)
    browser.stop_polling()
    browser.run("showNoAnswer('The connection failed.')")
    browser.show(1)
    assert "reachable again since" in browser.text("stateDetail")
    browser.show(50)
    assert "reachable again since" in browser.text("stateDetail")
    browser.show(11)
    assert browser.text("stateDetail") == "This publisher stores records in its own database."


# Accessibility and small screens.


MOVES = """
window.moves = 0;
new MutationObserver(seen => { window.moves += seen.length; })
  .observe(document.getElementById('rotating'), {attributes: true, attributeFilter: ['transform']});
"""


@pytest.mark.parametrize("preference", ["no-preference", "reduce"])
def test_reduced_motion_stops_the_animation(browser: Browser, standalone: ServerProcess, preference: str) -> None:
    browser.media(prefers_reduced_motion=preference)
    browser.open(standalone.port)
    browser.run(MOVES)
    cursor = browser.value("ringCursor")
    browser.write("1 " * 999)
    browser.click("sendButton")
    browser.send_result()
    eventually(lambda: browser.value("ringCursor") != cursor)
    if preference == "reduce":
        browser.wait_for_poll()
        assert browser.run("return window.moves") == 0
        assert browser.run("return document.getAnimations().length") == 0
    else:
        eventually(lambda: browser.run("return window.moves") > 2, "the ring turns")
        eventually(lambda: browser.run("return document.getElementById('rotating').getAttribute('transform')") is None)


WIDEST = [
    {"id": "1", "source": "f" * 36, "sequence": 2**63 - 1, "value": -(2**63), "received_at": "2020-12-28T23:59:59.999Z"}
]


@pytest.mark.parametrize("records", [WIDEST, []])
@pytest.mark.parametrize("role", ["publisher", "consumer"])
def test_page_fits_a_small_phone(browser: Browser, pair: Pair, role: str, records: list[object]) -> None:
    browser.cdp("Emulation.setDeviceMetricsOverride", width=320, height=640, deviceScaleFactor=2, mobile=True)
    browser.open(pair.ports[role])
    browser.answer_records(json.dumps({"records": records}))
    eventually(lambda: browser.is_visible("latest"))
    browser.write("not_a_number" * 20)
    browser.click("sendButton")
    assert browser.run("return innerWidth") == 320
    assert browser.run("return document.scrollingElement.scrollWidth") <= 320
    clipped = browser.run(
        "return [...document.querySelectorAll('main *')].filter(element =>"
        " element.checkVisibility() && !element.closest('svg, .visually-hidden')"
        " && element.getBoundingClientRect().right > 320.5).map(element => element.outerHTML)"
    )
    assert clipped == []


@pytest.mark.parametrize("role", ["publisher", "consumer"])
def test_send_form_is_on_the_second_screen_of_a_phone(browser: Browser, pair: Pair, role: str) -> None:
    browser.cdp("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=2, mobile=True)
    browser.open(pair.ports[role])
    bottom = browser.run("return document.getElementById('sendForm').getBoundingClientRect().bottom + scrollY")
    assert bottom <= 2 * 844


CONTRAST = """
const channel = c => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
const parse = color => (color.match(/[\\d.]+/g) ?? []).map(Number);
const light = ([r, g, b]) => .2126 * channel(r) + .7152 * channel(g) + .0722 * channel(b);
const behind = element => {
  for (; element; element = element.parentElement) {
    const color = parse(getComputedStyle(element).backgroundColor);
    if (color.length === 3 || color[3] === 1) return color;
  }
};
const contrasts = [];
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim()) || element.value;
  if (!own || !element.checkVisibility() || element.closest("svg, progress, noscript, .visually-hidden")) continue;
  const [a, b] = [light(parse(getComputedStyle(element).color)), light(behind(element))].sort((x, y) => y - x);
  contrasts.push([(a + .05) / (b + .05), element.id || element.outerHTML.slice(0, 80)]);
}
return contrasts;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_contrast_is_sufficient(browser: Browser, standalone: ServerProcess, scheme: str) -> None:
    browser.media(prefers_color_scheme=scheme)
    browser.open(standalone.port)
    browser.write("x")
    browser.click("sendButton")
    contrasts = browser.run(CONTRAST)
    assert len(contrasts) > 60
    assert [pair for pair in contrasts if pair[0] < 4.5] == []
    (background,) = {browser.run("return getComputedStyle(document.documentElement).backgroundColor")}
    assert (sum(map(int, re.findall(r"\d+", background))) < 200) == (scheme == "dark")


def test_screen_reader_finds_regions_and_names(browser: Browser, standalone: ServerProcess) -> None:
    browser.open(standalone.port)
    browser.click("sendButton")
    browser.send_result()
    nodes = [node for node in browser.cdp("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    named = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes]
    roles = [role for role, _ in named]
    assert roles.count("main") == roles.count("banner") == roles.count("contentinfo") == 1
    assert {"The ring", "The last minute", "Send integers", "All numbers", "The database"} <= {
        name for role, name in named if role == "region"
    }
    for role in "button", "textbox", "link", "image", "progressbar":
        names = [name for node_role, name in named if node_role == role]
        assert names and "" not in names, (role, names)
    assert any(name.startswith("Ring: 4,096 slots") for role, name in named if role == "image")
    assert any(re.match(r"Records in, per second: now ", name) for role, name in named if role == "image")
    levels = browser.run(
        "return [...document.querySelectorAll('h1, h2, h3')].filter(h => h.checkVisibility()).map(h => h.tagName)"
    )
    assert levels.count("H1") == 1 and levels[0] == "H1"
    live = browser.run(
        "return [...document.querySelectorAll('[aria-live], [role=status], [role=alert], output')].map(e => e.id)"
    )
    assert live == ["stateText", "tokenError", "inputError", "sendResult"], (
        "nothing that changes every second is read aloud"
    )


def test_keyboard_reaches_everything_with_visible_focus(browser: Browser, standalone: ServerProcess) -> None:
    browser.open(standalone.port)
    reached: list[str] = []
    for _ in range(7):
        for kind in "rawKeyDown", "keyUp":
            browser.cdp("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
        at, outline, width = browser.run(
            "const at = document.activeElement, style = getComputedStyle(at);"
            "return [at.id || at.getAttribute('href'), style.outlineStyle, at.getBoundingClientRect().width]"
        )
        reached.append(at)
        assert outline == "solid" and width > 20, reached
    assert reached == ["#numbers", "integers", "sendButton", "sendMany", "v1.0/stats", "v1.0/ready", "metrics"]


def test_page_asks_for_the_token_once_and_keeps_it_in_memory(browser: Browser, tmp_path: Path) -> None:
    """Without a token it sends no request. The send form uses the token. A reload deletes it."""
    token = "s3cret+/=="

    def give(text: str) -> None:
        browser.run("document.getElementById('tokenText').value = arguments[0]", text)
        browser.run("document.getElementById('tokenForm').requestSubmit()")

    def unauthorized() -> int:
        stats = locked.get("/v1.0/stats", Authorization=f"Bearer {token}")[2]
        return int(json.loads(stats)["stats"]["unauthorizedRequests"])

    with server(tmp_path, "-p", "0", "-T", "0", "-D", "a.db", env={"RINGOEXP_TOKEN": token}) as locked:
        browser.driver.get(f"http://localhost:{locked.port}/")
        eventually(lambda: browser.state() == "locked")
        assert browser.text("stateWords") == "This server requires a token."
        assert browser.run("return document.activeElement.id") == "tokenText"
        assert browser.run("return document.getElementById('content').hidden")
        browser.run("TIMES.poll = 10; poll()")
        before = unauthorized()
        give("")
        assert browser.text("tokenError") == "Enter the token."
        give("caf\xe9")
        assert browser.text("tokenError").startswith("Not a token")
        assert unauthorized() == before
        give("wrong")
        eventually(lambda: browser.text("tokenError") == "The token is wrong.")
        assert unauthorized() == before + 1
        give(f" {token} ")
        eventually(lambda: browser.polls() > 0)
        assert not browser.is_visible("tokenForm")
        browser.write("5 6 7")
        browser.click("sendButton")
        assert browser.send_result().startswith("3 sent, all stored")
        assert unauthorized() == before + 1
        kept = "return JSON.stringify([localStorage, sessionStorage, document.cookie, location.href, history.state])"
        assert token not in browser.run(kept)
        assert token not in browser.run("return document.documentElement.outerHTML")
        browser.driver.refresh()
        eventually(lambda: browser.state() == "locked")
    assert [value for _, _, value in rows(tmp_path / "a.db")] == [5, 6, 7]
    assert all("401 (Unauthorized)" in message for message in browser.errors()), "Chromium itself logs the 401"
    browser.driver.get("about:blank")


def test_page_works_over_tls(browser: Browser, tmp_path: Path) -> None:
    """Its WebSocket uses TLS as well."""
    authority = Authority(tmp_path)
    browser.cdp("Security.setIgnoreCertificateErrors", ignore=True)
    try:
        with server(tmp_path, "-p", "0", "-T", "0", "-D", "a.db", *tls(authority.issue())) as standalone:
            browser.driver.get(f"https://localhost:{standalone.port}/")
            eventually(lambda: browser.polls() > 0)
            browser.write("8")
            browser.click("sendButton")
            assert browser.send_result().startswith("1 sent, all stored")
            browser.driver.get("about:blank")
    finally:
        browser.cdp("Security.setIgnoreCertificateErrors", ignore=False)
    assert [value for _, _, value in rows(tmp_path / "a.db")] == [8]


UNDER_A_PATH = (
    (
        "        location / {\n            proxy_pass http://ringoexp;\n",
        "        location = /numbers { proxy_pass http://ringoexp/; }\n"
        "        location /numbers/ {\n            proxy_pass http://ringoexp/;\n",
    ),
    (
        "        location = /v1.0/ingest {\n            proxy_pass http://ringoexp;\n",
        "        location = /numbers/v1.0/ingest {\n            proxy_pass http://ringoexp/v1.0/ingest;\n",
    ),
)


@pytest.mark.parametrize("path", ["/", "/numbers/", "/numbers"])
def test_page_works_through_nginx(browser: Browser, path: str) -> None:
    """The Origin of its WebSocket is the address of nginx. The page may have a path there, with or without a slash."""
    with (
        socket_directory() as directory,
        server(directory, "-H", "unix:x.sock") as behind,
        nginx(directory, behind.at, *(UNDER_A_PATH if path != "/" else ())) as port,
    ):
        browser.open(port, path)
        browser.write("1 2 3")
        browser.click("sendButton")
        browser.send_result()
        assert [value for _, _, value in rows(directory / "ringoexp.db")] == [1, 2, 3]
        links = browser.run("return [...document.querySelectorAll('footer a')].map(link => link.href)")
        base = f"http://localhost:{port}{path.rstrip('/')}"
        assert links == [f"{base}/v1.0/stats", f"{base}/v1.0/ready", f"{base}/metrics"]
        for link in links:
            assert request(port, "GET", urlsplit(link).path)[0] == 200
