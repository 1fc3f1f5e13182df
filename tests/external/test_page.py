"""The live page: how it is served, and what it shows and does in a real browser, Debian's Chromium, headless.

The browser is driven by `selenium`; where one of the two is missing, the browser's tests are skipped.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipapp
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from support.certificates import Authority, tls
from support.harness import ROOT, RawClient, ServerProcess, eventually, frame, free_port, request, rows, server
from support.nginx import nginx, room

from ringolib.status.numbers import NUMBERS, STATS
from ringolib.web import page
from ringolib.wire import SUBPROTOCOL, Run, encode_batch, encode_plain

PAGE = (ROOT / "ringolib/web/dashboard.html").read_text()
CHROMIUM = [shutil.which("chromium"), shutil.which("chromedriver")]
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-default-apps --window-size=1280,900"
).split()
UNREACHABLE = ("net::ERR_CONNECTION_REFUSED", "net::ERR_EMPTY_RESPONSE", "net::ERR_CONNECTION_RESET")
"""What Chromium itself writes to its console while a server is away; the page cannot prevent it."""


# How it is served.


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with server(tmp_path_factory.mktemp("own"), "-p", "0", "-T", "0", "-N", "Ringo the 1st") as process:
        yield process


def test_the_page_has_strict_headers(running: ServerProcess) -> None:
    status, headers, body = running.get("/", Accept="text/html,application/xhtml+xml,*/*;q=0.8")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-cache"
    assert headers["Server"] == "Ringo the 1st"
    assert body.decode() == PAGE


def test_the_policy_admits_the_pages_own_blocks_and_nothing_else(running: ServerProcess) -> None:
    policy = running.get("/")[1]["Content-Security-Policy"]
    directives = dict(part.split(" ", 1) for part in policy.split("; "))
    hashes = {}
    for tag in "script", "style":
        (block,) = re.findall(f"<{tag}[^>]*>(.*?)</{tag}>", PAGE, re.DOTALL)
        hashes[tag] = f"'sha256-{base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()}'"
    assert directives == {
        "default-src": "'none'",
        "script-src": hashes["script"],
        "style-src": hashes["style"],
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }


def test_the_page_is_one_file_without_inline_attributes() -> None:
    addresses = re.findall(r"\b(?:https?|wss?)://[^\s'\"`<>]*", PAGE)
    assert set(addresses) == {"http://www.w3.org/2000/svg"}, "a name space, not an address"
    assert set(re.findall(r"\s(?:src|href|action|data)=\"([^#\"][^\"]*)\"", PAGE)) <= {
        "/v1.0/stats",
        "/v1.0/ready",
        "/metrics",
        *re.findall(r'href="(data:image/svg\+xml,[^"]*)"', PAGE),
    }
    markup = re.sub(r"<(script|style)>.*?</\1>", "", PAGE, flags=re.DOTALL)
    assert not re.search(r"\s(on\w+|style)\s*=", markup)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", PAGE)


def test_a_browser_that_has_the_page_does_not_get_it_again(running: ServerProcess) -> None:
    etag = running.get("/")[1]["ETag"]
    status, headers, body = running.get("/", **{"If-None-Match": f'"other", W/{etag}'})
    assert (status, headers["ETag"], body) == (304, etag, b"")
    assert running.get("/", **{"If-None-Match": '"other"'})[0] == 200


def test_head_and_wrong_methods(running: ServerProcess) -> None:
    status, headers, body = request(running.port, "HEAD", "/?now")
    assert (status, body) == (200, b"") and headers["Content-Length"] == str(len(PAGE.encode()))
    status, headers, body = request(running.port, "POST", "/", b"")
    assert (status, headers["Allow"]) == (405, "GET, HEAD") and "error" in json.loads(body)


def test_the_page_is_there_beyond_the_limit_of_connections(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", "-n", "1") as full, RawClient(full.port):
        assert full.get("/v1.0/ingest")[0] == 503
        assert full.get("/")[0] == 200


def serves_the_page(directory: Path, *command: str, env: dict[str, str] | None = None) -> None:
    process = subprocess.Popen(
        [*command, "-p", "0", "-T", "0"],
        cwd=directory,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    try:
        port = int(re.findall(r":(\d+),", process.stdout.readline())[0])
        assert request(port, "GET", "/")[::2] == (200, PAGE.encode())
    finally:
        process.kill()
        process.communicate()


def copied(directory: Path, *more: str) -> Path:
    """The program without its tests."""
    directory.mkdir()
    for path in [*ROOT.glob("*.py"), *(ROOT / name for name in more)]:
        shutil.copy(path, directory)
    shutil.copytree(ROOT / "ringolib", directory / "ringolib", ignore=shutil.ignore_patterns("__pycache__"))
    return directory


def test_a_zipapp_serves_the_page(tmp_path: Path) -> None:
    source = copied(tmp_path / "source")
    (source / "__main__.py").write_text("import sys\nimport ringoexp\nsys.exit(ringoexp.main())\n")
    zipapp.create_archive(source, tmp_path / "ringoexp.pyz")
    shutil.rmtree(source)
    serves_the_page(tmp_path, sys.executable, "ringoexp.pyz")


def test_what_pip_installs_serves_the_page(tmp_path: Path) -> None:
    source = copied(tmp_path / "source", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-compile",
        "--disable-pip-version-check",
    ]
    pip += ["--target", str(tmp_path / "installed")]
    done = subprocess.run([*pip, str(source)], capture_output=True, text=True)
    if "No matching distribution found for setuptools" in done.stderr:
        pytest.skip("pip cannot get setuptools: no package index")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(source)
    env = {"PYTHONPATH": str(tmp_path / "installed")}
    serves_the_page(tmp_path, sys.executable, "-m", "ringoexp", env=env)


def test_without_its_file_the_server_says_so_and_serves_the_rest(tmp_path: Path) -> None:
    (copied(tmp_path / "source") / "ringolib/web/dashboard.html").unlink()
    script = str(tmp_path / "source" / "ringoexp.py")
    process = subprocess.Popen(
        [sys.executable, script, "-p", "0", "-T", "0"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout
    try:
        port = int(re.findall(rb":(\d+),", process.stdout.readline())[0])
        status, _, body = request(port, "GET", "/")
        assert status == 404 and "dashboard.html" in json.loads(body)["error"]
        assert request(port, "GET", "/v1.0/stats")[0] == 200
    finally:
        process.kill()
        errors = process.communicate()[1].decode()
    assert "dashboard_missing" in errors and "Traceback" not in errors


# In a browser.


class Browser:
    """Chromium with one page, and what a reader of it would see. With `poll` the page looks so often, in ms."""

    def __init__(self, driver: Any, poll: int = 1000) -> None:
        self.driver = driver
        self.poll = poll

    def open(self, port: int) -> None:
        """Loads the page, and waits until it shows numbers."""
        self.driver.get(f"http://localhost:{port}/")
        eventually(lambda: self.looks() > 0, "the page has not seen the stats")
        self.run("TIMES.poll = arguments[0]; look()", self.poll)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def cdp(self, command: str, **parameters: Any) -> Any:
        """A command of the Chrome DevTools protocol."""
        return self.driver.execute_cdp_cmd(command, parameters)

    def looks(self) -> int:
        return int(self.run("return document.body.dataset.looks"))

    def looked_again(self) -> None:
        """Waits until the page has had another answer."""
        seen = self.looks()
        eventually(lambda: self.looks() > seen)

    def stop_looking(self) -> None:
        """From here on the page shows what `shows` gives it, and nothing else."""
        eventually(
            lambda: self.run("if (asking) return false; clearTimeout(timer); TIMES.poll = 1000; return asking = true")
        )

    def shows(
        self, later: float, ring: dict[str, Any] | None = None, info: dict[str, Any] | None = None, **stats: Any
    ) -> None:
        """The last report with these changes, as if it had come so many seconds later."""
        self.run(
            "const report = structuredClone(before.report), [later, ...changes] = arguments;"
            "['ring', 'info', 'stats'].forEach((part, i) => report[part] && Object.assign(report[part], changes[i]));"
            "show(report, before.at + later * 1000)",
            later,
            ring,
            info,
            stats,
        )

    def chart(self, name: str) -> str:
        """What is to be read as the present value of a chart."""
        return str(self.run("return document.getElementById(`chart-${arguments[0]}`).innerText", name))

    def drawn(self, name: str, what: str) -> str:
        """The path of a chart's line or dots: `.line.first`, say."""
        return str(
            self.run(
                "return document.querySelector(`[data-chart=${arguments[0]}] ${arguments[1]}`).getAttribute('d')",
                name,
                what,
            )
        )

    def value(self, name: str) -> str:
        """The exact number with this id; empty where the page has none."""
        return str(self.run("return document.getElementById(arguments[0]).value", name))

    def text(self, name: str) -> str:
        """What is to be read of the element with this id."""
        return str(self.run("return document.getElementById(arguments[0]).innerText", name))

    def state(self) -> str:
        return str(self.run("return document.body.dataset.state"))

    def click(self, name: str) -> None:
        self.run("document.getElementById(arguments[0]).click()", name)

    def write(self, words: str) -> None:
        self.run("document.getElementById('integers').value = arguments[0]", words)

    def sent(self) -> str:
        """What the box says in the end."""
        return str(eventually(lambda: self.text("sent"), "the box says nothing"))

    def media(self, **features: str) -> None:
        """As for a user who prefers this: `prefers_color_scheme="dark"`, say."""
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.cdp("Emulation.setEmulatedMedia", features=named)

    def errors(self) -> list[str]:
        """What the console has, but for the browser's own words on a server that is away."""
        messages = [entry["message"] for entry in self.driver.get_log("browser")]
        return [text for text in messages if not any(known in text for known in UNREACHABLE)]


@contextmanager
def chromium() -> Iterator[Any]:
    """A driver of Debian's Chromium that never asks the network for anything."""
    if not all(CHROMIUM):
        pytest.skip("no chromium and chromedriver (Debian: apt install chromium chromium-driver)")
    pytest.importorskip("selenium", reason="no selenium (pip install '.[browser]')")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM[0])
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in [*FLAGS, f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        service = Service(CHROMIUM[1], env={**os.environ, "SE_OFFLINE": "true", "SE_AVOID_STATS": "true"})
        driver = webdriver.Chrome(options=options, service=service)
        try:
            yield driver
        finally:
            driver.quit()


@pytest.fixture(scope="module")
def shared_browser() -> Iterator[Browser]:
    with chromium() as driver:
        yield Browser(driver, poll=200)


@pytest.fixture
def browser(shared_browser: Browser) -> Iterator[Browser]:
    """The browser; afterwards its console must be clean, and it must have asked nobody but the server."""
    yield shared_browser
    assert shared_browser.errors() == []
    asked = shared_browser.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
    host = urlsplit(shared_browser.driver.current_url).netloc
    assert {urlsplit(url).netloc for url in asked if not url.startswith("data:")} <= {host}
    shared_browser.media()
    shared_browser.cdp("Emulation.clearDeviceMetricsOverride")
    shared_browser.driver.get("about:blank")


class Pair:
    """A consumer, and a publisher in front of it; each can be started again on its port."""

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
    made = Pair(tmp_path_factory.mktemp("pair"))
    try:
        yield made
    finally:
        for process in made.servers.values():
            process.kill()
    for process in made.servers.values():
        assert "Traceback" not in process.errors.read_text()


CHANGING = {"connections", "totalConnections", "diskFreeBytes", "workers", "ringOldestInFlightMs", "consumerAwayMs"}
"""Stats that change by themselves, or by asking for them."""


def same_as_stats(browser: Browser, process: ServerProcess) -> bool:
    """True when each number that the page shows is the stats', exactly; fails when the page lacks one."""
    stats = process.stats()
    names = browser.run("return [...document.querySelectorAll('#numbers data')].map(element => element.id)")
    assert {"recordsReceived", "recordsStored", "recordsAcked", "clients", "publishers", "commits"} <= set(names)
    told = {name: "" if stats[name] is None else str(stats[name]) for name in names if name in stats}
    shown = {name: browser.value(name) for name in told}
    numbers = {name for name in told if name not in CHANGING}
    assert len(numbers) > 20
    return all(shown[name] == told[name] or as_number(shown[name]) == as_number(told[name]) for name in numbers)


def as_number(value: str) -> float:
    """Of a number or, in Python or JavaScript, of whether something is so; -1 for none."""
    return float({"": "-1", "true": "1", "false": "0"}.get(value.lower(), value))


def test_after_a_known_load_the_numbers_are_those_of_the_stats(browser: Browser, running: ServerProcess) -> None:
    browser.open(running.port)
    assert browser.value("recordsStored") == "0"
    with RawClient(running.port) as client:
        for _ in range(5):
            client.send(frame(2, encode_plain(range(2469))))
        client.acked(12345)
        eventually(lambda: browser.value("recordsAcked") == "12345" and browser.value("clients") == "1")
        assert same_as_stats(browser, running)
    assert browser.text("recordsReceived") == "12,345"
    assert browser.value("recordsStored") == "12345"
    assert browser.value("ringCursor") == browser.value("ringCommitted") == "12345"
    assert float(browser.run("return document.querySelector('[data-chart=in] data').value")) >= 0
    assert "own database" in browser.text("stateDetail") and browser.state() == "well"
    assert int(browser.value("barFreeBytes")) > 0
    eventually(lambda: browser.value("clients") == "0", "the client has gone")


def test_a_consumers_page_counts_duplicates_and_publishers(browser: Browser, tmp_path: Path) -> None:
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
        assert not browser.run("return document.getElementById('ring').checkVisibility()")
        charts = browser.run("return [...document.querySelectorAll('[data-chart]')].map(row => row.dataset.chart)")
        assert {"stored", "duplicates", "commit"} <= set(charts)
        assert browser.value("databaseBytes") == str(consumer.stats()["databaseBytes"])


def in_the_picture(browser: Browser, kind: str, slot: int, capacity: int) -> bool:
    """True when the middle of a slot's place on the ring is painted as this kind, near its inner edge."""
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
    """How many segments have slots of each kind."""
    kinds = ("flying", "waiting", "finished")
    return {
        kind: int(browser.run("return document.getElementById(arguments[0]).dataset.segments", kind)) for kind in kinds
    }


def ring_text(browser: Browser) -> str:
    return str(browser.run("return document.getElementById('ringPicture').ariaLabel"))


def test_the_ring_shows_what_is_in_flight_while_the_consumer_is_stopped(browser: Browser, pair: Pair) -> None:
    browser.open(pair.publisher.port)
    browser.run("TIMES.slow = 300")
    assert ring_text(browser) == "Ring: 1,000 slots, 0 waiting, 0 in flight, 1,000 free"
    pair.consumer.send_signal(signal.SIGSTOP)
    try:
        with RawClient(pair.publisher.port) as client:
            client.send(frame(2, encode_plain(range(300))))
            eventually(lambda: browser.value("ringFlying") == "300")
            assert browser.value("ringFlying") == str(pair.publisher.stats()["ringInFlight"])
            assert ring_text(browser) == "Ring: 1,000 slots, 0 waiting, 300 in flight, 700 free"
            assert in_the_picture(browser, "flying", 154, 1000) and not in_the_picture(browser, "flying", 604, 1000)
            assert segments(browser) == {"flying": 36, "waiting": 0, "finished": 0}, "of 120"
            eventually(lambda: browser.state() == "away", "it is slow")
            assert "The consumer is slow" in browser.text("stateText")
            pair.consumer.send_signal(signal.SIGCONT)
            client.acked(300)
    finally:
        pair.consumer.send_signal(signal.SIGCONT)
    eventually(lambda: browser.value("ringFlying") == "0" and browser.state() == "well")
    assert ring_text(browser).endswith(" 1,000 free")
    assert not in_the_picture(browser, "flying", 154, 1000)
    assert same_as_stats(browser, pair.publisher)


def test_a_consumer_that_is_away_is_told_in_words_and_so_is_its_return(browser: Browser, pair: Pair) -> None:
    browser.open(pair.publisher.port)
    pair.consumer.kill()
    browser.write("7")
    browser.click("sendThem")
    eventually(lambda: browser.state() == "away")
    assert re.match(r"The consumer is away, since \d\d:\d\d:\d\d\.", browser.text("stateText"))
    assert f"localhost:{pair.ports['consumer']}: " in browser.text("stateDetail")
    assert browser.text("passing") == "1 sent, 0 stored"
    eventually(lambda: segments(browser) == {"flying": 0, "waiting": 1, "finished": 0}, "it was given back")
    assert ring_text(browser) == "Ring: 1,000 slots, 1 waiting, 0 in flight, 999 free"
    assert browser.value("ringTaken") == browser.value("ringWaiting") == "1"
    pair.start("consumer")
    assert re.fullmatch(r"1 sent, all stored in [\d.,]+ ms\.", browser.sent())
    eventually(lambda: browser.state() == "well")
    assert pair.values()[-1] == 7


def test_waiting_for_the_acks_can_be_stopped(browser: Browser, pair: Pair) -> None:
    browser.open(pair.publisher.port)
    pair.consumer.send_signal(signal.SIGSTOP)
    try:
        browser.write("1 2")
        browser.click("sendThem")
        eventually(lambda: browser.text("passing") == "2 sent, 0 stored")
        browser.click("sendMany")  # does nothing: one at a time
        browser.click("sendStop")
        assert browser.sent() == "Stopped waiting: 2 sent, 0 stored. The other 2 may still be stored."
    finally:
        pair.consumer.send_signal(signal.SIGCONT)
    eventually(lambda: pair.publisher.stats()["clients"] == 0, "the connection is closed")


def test_the_page_says_that_the_server_is_gone_and_comes_back_by_itself(browser: Browser, pair: Pair) -> None:
    browser.open(pair.publisher.port)
    browser.run("window.unchanged = true")
    pair.consumer.send_signal(signal.SIGSTOP)
    browser.write("5 6")
    browser.click("sendThem")
    eventually(lambda: browser.text("passing") == "2 sent, 0 stored")
    eventually(lambda: browser.value("ringTaken") == "2" and int(browser.value("recordsReceived")) >= 2)
    pair.publisher.kill()
    pair.consumer.send_signal(signal.SIGCONT)
    assert re.match(r"The connection ended early: 2 sent, 0 stored\..* Code 1006", browser.sent())
    eventually(lambda: browser.state() == "gone")
    assert re.fullmatch(r"The server is gone, since \d\d:\d\d:\d\d\.", browser.text("stateText"))
    browser.click("sendThem")
    eventually(lambda: "Nothing was sent" in browser.text("sent"))
    pair.start("publisher")
    eventually(lambda: browser.state() == "well")
    assert "another run" in browser.text("stateDetail")
    browser.looked_again()
    assert browser.run("return window.unchanged") is True, "it was not loaded again"
    rates = browser.run("return past.flatMap(({values}) => values ? [values.in, values.stored, values.acked] : [])")
    assert all(rate is None or rate >= 0 for rate, _ in rates)
    assert same_as_stats(browser, pair.publisher)


def test_the_box_stores_what_is_written_in_it(browser: Browser, pair: Pair) -> None:
    browser.open(pair.publisher.port)
    for written in "1 -2 3", "4,5,\n6", "+9223372036854775807; -9223372036854775808":
        numbers = [int(word) for word in re.findall(r"[+-]?\d+", written)]
        browser.write(written)
        browser.click("sendThem")
        assert re.fullmatch(rf"{len(numbers)} sent, all stored in [\d.,]+ ms\.", browser.sent())
        assert pair.values()[-len(numbers) :] == numbers
    eventually(lambda: pair.publisher.stats()["clients"] == 0, "the connections are closed")


def test_ten_thousand_numbers_pass_through_a_ring_of_a_thousand(browser: Browser, pair: Pair) -> None:
    before = len(pair.values())
    browser.open(pair.publisher.port)
    browser.click("sendMany")
    assert re.fullmatch(r"10,000 sent, all stored in [\d.,]+ ms\.", browser.sent())
    assert sorted(pair.values()[before:]) == list(range(1, 10001))
    assert browser.run("return document.getElementById('sendProgress').value") == 1


NO_INTEGERS = {
    "": "There is no number yet",
    "1 two 3": "“two” is not a whole number",
    "1.5": "“1.5” is not a whole number",
    "0x10": "“0x10” is not a whole number",
    "<b>1</b>": "“<b>1</b>” is not a whole number",
    "9223372036854775808": "“9223372036854775808” does not fit",
    "-9223372036854775809": "“-9223372036854775809” does not fit",
    "9" * 100000: f"“{'9' * 40}…” does not fit",
}


def test_what_is_no_integer_is_named_and_nothing_is_sent(browser: Browser, running: ServerProcess) -> None:
    browser.open(running.port)
    before = running.stats()
    for written, said in NO_INTEGERS.items():
        browser.write(written)
        browser.click("sendThem")
        assert browser.text("wrong").startswith(said)
        assert browser.run("return [document.activeElement.id, document.activeElement.ariaInvalid]") == [
            "integers",
            "true",
        ]
        assert browser.run("return sending") is None and browser.text("sent") == ""
    assert browser.run("return document.getElementById('integers').getAttribute('aria-describedby')") == "wrong"
    after = running.stats()
    assert after["recordsReceived"] == before["recordsReceived"]
    assert after["recordsRefused"] == before["recordsRefused"]
    browser.write("42")
    browser.click("sendThem")
    browser.sent()
    assert (
        browser.text("wrong") == "" and browser.run("return document.getElementById('integers').ariaInvalid") == "false"
    )


def test_a_connection_that_is_refused_is_said_to_be(browser: Browser, tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", "-n", "1") as full:
        with RawClient(full.port):
            browser.open(full.port)
            browser.click("sendThem")
            assert "Nothing was sent: the connection was refused" in browser.sent()
            assert "WebSocket connection to" in browser.errors()[0]
    eventually(lambda: browser.state() == "gone")


def test_a_hidden_page_asks_seldom_and_looks_at_once_when_it_is_seen_again(
    browser: Browser, running: ServerProcess
) -> None:
    browser.open(running.port)
    browser.run(
        "window.delays = []; const real = setTimeout;"
        "window.setTimeout = (call, ms) => { delays.push(ms); return real(call, ms); };"
        "window.hide = on => { Object.defineProperty(document, 'hidden', {value: on, configurable: true});"
        " document.dispatchEvent(new Event('visibilitychange')); }"
    )
    browser.run("hide(true)")
    eventually(lambda: browser.run("return delays.at(-1)") == 10000)
    seen = browser.looks()
    browser.run("TIMES.poll = 1000; hide(false)")
    eventually(lambda: browser.looks() > seen, deadline=5)
    assert browser.run("return delays.at(-1)") <= 1000


# What it makes of a report, whatever the servers do meanwhile.


def test_a_rate_is_never_taken_over_a_short_time(browser: Browser, running: ServerProcess) -> None:
    """A look right after a send: 10,000 records were not sent at 77,700 a second."""
    browser.open(running.port)
    browser.stop_looking()
    browser.shows(10)
    received = int(browser.value("recordsReceived"))
    browser.shows(0.13, recordsReceived=received + 10_000)
    assert browser.chart("in") == "0" and browser.value("recordsReceived") == str(received + 10_000)
    browser.shows(1)
    assert 8000 < float(browser.chart("in").replace(",", "")) < 9000, "10,000 in 1.13 s"
    for more in range(1, 9):  # looks that are all short
        browser.shows(0.3, recordsReceived=received + 10_000 + 300 * more)
        assert browser.chart("in") in ("1,000", "8,850")
    assert browser.chart("in") == "1,000"


def test_where_nothing_was_acked_the_latency_has_a_gap_and_a_lone_sample_is_a_dot(
    browser: Browser, running: ServerProcess
) -> None:
    browser.open(running.port)
    browser.stop_looking()
    browser.shows(100)
    acked = int(browser.value("recordsAcked"))
    for more, said in (0, "no acks"), (1, "1.5"), (1, "no acks"):
        browser.shows(1, recordsAcked=acked + more, ackLatencyP50Ms=1.5, ackLatencyP99Ms=4)
        assert browser.chart("latency") == said
    assert "no acks" in browser.run("return document.querySelector('[data-chart=latency] svg').ariaLabel")
    assert browser.drawn("latency", ".line.first") == browser.drawn("latency", ".area") == ""
    assert browser.drawn("latency", ".dots.first") == "M59.00 62.50h0"
    assert browser.drawn("latency", ".dots.second") == "M59.00 0.00h0"
    for more in 2, 3:
        browser.shows(1, recordsAcked=acked + more)
    assert browser.drawn("latency", ".line.first") == "M59.00 62.50L60.00 62.50"
    assert browser.drawn("latency", ".dots.first") == "M57.00 62.50h0"
    assert "latest 4,096 reads" in browser.text("chartsNote") and "4,096 reads" in browser.text("acksTitle")


NOT_READY = {
    "consumer_unreachable": r"The consumer is away, since [\d:]+\.",
    "consumer_not_ready": r"The consumer cannot store\.",
    "ring_full": r"The ring is full, and clients wait\.",
    "disk_full": r"The disk of the database is full\.",
    "store_failing": r"The database fails, and stores nothing\.",
    "spool_full": r"The consumer takes nothing, and the spool has no room\.",
    "something_new": r"A record sent now would not be stored\.",
}


def test_all_is_well_only_where_a_record_sent_now_would_be_stored(browser: Browser, pair: Pair) -> None:
    browser.open(pair.publisher.port)
    browser.stop_looking()
    for code, said in NOT_READY.items():
        browser.shows(1, consumerState="up", notReady=[code])
        assert re.fullmatch(said, browser.text("stateText")) and browser.state() in ("away", "failing")
        assert browser.driver.title.startswith("▲")
        browser.shows(1, notReady=[])
        assert browser.text("stateText") == "All is well." and not browser.driver.title.startswith("▲")
    browser.shows(1, notReady=None)
    assert browser.text("stateText") == "All is well.", "an older server does not tell"
    browser.shows(1, consumerState="unknown")
    assert browser.text("stateText") == "Nothing was sent yet." and browser.state() == "idle"
    assert "not known yet" in browser.text("stateDetail")


def test_several_consumers_are_listed_and_one_that_is_away_is_named(browser: Browser, pair: Pair) -> None:
    browser.open(pair.publisher.port)
    browser.stop_looking()
    assert not browser.run("return document.getElementById('consumers').checkVisibility()"), "one needs no list"
    up = {"address": "a:1", "state": "up", "reason": None, "awayMs": 0, "workers": 3, "inDoubt": 0}
    away = {"address": "b:2", "state": "down", "reason": "b:2: refused", "awayMs": 5000, "workers": 1, "inDoubt": 1234}
    browser.shows(1, consumerState="up", notReady=[], consumers=[up, away])
    assert browser.run("return document.getElementById('consumers').checkVisibility()")
    assert browser.text("consumers").split("\n") == [
        "a:1",
        "there, 3 workers",
        "b:2",
        "away for 5 s, 1 worker, 1,234 records in doubt",
    ]
    assert browser.text("stateText") == "All is well."
    assert "1 consumer of 2 there" in browser.text("stateDetail") and "b:2 is away" in browser.text("stateDetail")
    assert "forwarding to a:1, b:2" in browser.text("who")
    browser.shows(
        1, consumerState="down", consumerReason="a:1: gone; b:2: refused", consumers=[{**up, "state": "down"}, away]
    )
    assert browser.text("stateText").startswith("All consumers are away, since")
    assert browser.text("stateDetail").endswith("a:1: gone; b:2: refused")


def test_a_ring_with_something_in_it_is_not_at_rest(browser: Browser, pair: Pair) -> None:
    browser.open(pair.publisher.port)
    browser.stop_looking()
    cursor, none = int(browser.value("ringCursor")), {"inFlight": [], "finished": []}
    for committed, put, said in (
        (cursor, cursor, "at rest"),
        (cursor, cursor + 3, "turning slowly"),
        (cursor, cursor + 3, "stands still"),
        (cursor + 1, cursor + 3, "emptying"),
        (cursor + 1, cursor + 1001, "full, clients wait"),
    ):
        browser.shows(1, ring={"committed": committed, "reserved": committed, "cursor": put, **none})
        assert browser.text("speed") == said


IN_WORDS = {"storeError", "notReady", "consumerState", "consumerReason", "consumers", "startTime"}
"""Stats that the page tells in other ways than as a number of its list."""


def test_all_numbers_are_on_the_page() -> None:
    listed = PAGE[PAGE.index('id="numbers"') : PAGE.index("</main>")]
    shown = set(re.findall(r'<data id="(\w+)"', listed))
    assert {number.key for number in STATS if number.key} - shown == IN_WORDS
    assert shown <= {number.key for number in NUMBERS}


def test_what_only_some_servers_have_is_shown_for_those(browser: Browser, running: ServerProcess) -> None:
    def seen() -> list[bool]:
        names = ["recordsExpired", "oldestRecordMs", "unauthorizedRequests", "tlsFailures", "certificateExpires"]
        return [browser.run(f"return document.getElementById('{name}').checkVisibility()") for name in names]

    browser.open(running.port)
    browser.stop_looking()
    assert seen() == [False] * 5 and browser.text("powerSafe") == "yes"
    more = {"retain": 30, "tokenFile": "token", "tlsCert": "cert.pem"}
    browser.shows(1, info=more, oldestRecordMs=60_000, certificateExpires="2027-03-09T12:00:00.000Z", powerSafe=False)
    assert seen() == [True] * 5
    assert browser.text("oldestRecordMs").endswith(" ago")
    assert browser.text("certificateExpires") == "9 March 2027" and browser.text("powerSafe") == "no"
    browser.shows(1, info=more, oldestRecordMs=0)
    assert browser.text("oldestRecordMs") == "–", "there is none"
    browser.shows(1, info={**more, "database": "clickhouse://h:8123/numbers"})
    assert seen()[:2] == [False] * 2, "the servers do it, and nobody counts"


def test_the_page_in_the_one_file_works_as_well(browser: Browser, tmp_path: Path) -> None:
    """There it has no indentation, and fewer comments."""
    made = tmp_path / "ringoexp.pyz"
    subprocess.run([sys.executable, str(ROOT / "tools/build_pyz.py"), str(made)], check=True, stdout=subprocess.DEVNULL)
    one = ServerProcess(tmp_path, "-p", "0", "-T", "0", program=[sys.executable, str(made)])
    try:
        browser.open(one.port)
        browser.write("1 2 -3")
        browser.click("sendThem")
        assert "3 sent, all stored" in browser.sent()
        eventually(lambda: browser.value("recordsAcked") == "3")
        assert same_as_stats(browser, one)
        assert one.stop() == 0
    finally:
        one.kill()


def test_words_that_would_mislead_are_not_there(browser: Browser, running: ServerProcess, pair: Pair) -> None:
    hidden = "return ['linkReconnects', 'consumerAwayMs'].map(id => !document.getElementById(id).checkVisibility())"
    browser.open(pair.publisher.port)
    assert browser.run(hidden) == [False, False]
    browser.open(running.port)
    assert browser.run(hidden) == [True, True], "it is its own consumer"
    numbers = browser.text("numbers")
    assert "oldest not stored" in numbers and "batch connections" in numbers
    assert re.search(r"since the start, .+ (UTC|GMT|[A-Z]{3,4})", browser.text("since"))


def test_the_disk_is_summed_up_and_a_bar_that_is_not_to_scale_says_so(browser: Browser, running: ServerProcess) -> None:
    browser.open(running.port)
    browser.stop_looking()
    browser.shows(1, databaseBytes=4096, walBytes=900_000, diskFreeBytes=79_000_000_000)
    assert browser.value("barUsedBytes") == "904096" and "Not to scale" in browser.text("barNote")
    browser.shows(1, databaseBytes=4_000_000_000, walBytes=0)
    assert not browser.run("return document.getElementById('barNote').checkVisibility()")


def test_of_a_database_on_other_machines_only_its_size_is_shown(browser: Browser, running: ServerProcess) -> None:
    def seen(name: str) -> bool:
        return bool(browser.run(f"return document.getElementById('{name}').checkVisibility()"))

    browser.open(running.port)
    browser.stop_looking()
    parts = ("barUsedBytes", "barDatabaseBytes", "barWalBytes", "barFreeBytes", "diskBar", "barNote")
    browser.shows(1, databaseBytes=4096, walBytes=900_000, diskFreeBytes=79_000_000_000)
    assert [seen(name) for name in parts] == [True] * 6
    there = "clickhouse://h:8123/numbers"
    browser.shows(1, info={"database": there}, databaseBytes=4096, walBytes=0, diskFreeBytes=None)
    assert [seen(name) for name in parts] == [True] + [False] * 5
    assert browser.text("diskPath") == there and browser.value("barUsedBytes") == "4096"


def test_what_was_said_of_the_last_send_goes_with_a_wrong_input(browser: Browser, running: ServerProcess) -> None:
    browser.open(running.port)
    browser.click("sendThem")
    browser.sent()
    browser.write("x")
    browser.click("sendThem")
    assert browser.text("wrong") and browser.text("sent") == browser.text("passing") == ""
    assert not browser.run("return document.getElementById('sendProgress').checkVisibility()")


# For everybody.


MOVES = """
window.moves = 0;
new MutationObserver(seen => { window.moves += seen.length; })
  .observe(document.getElementById('turning'), {attributes: true, attributeFilter: ['transform']});
"""


@pytest.mark.parametrize("preference", ["no-preference", "reduce"])
def test_nothing_moves_for_who_prefers_it_so(browser: Browser, running: ServerProcess, preference: str) -> None:
    browser.media(prefers_reduced_motion=preference)
    browser.open(running.port)
    browser.run(MOVES)
    cursor = browser.value("ringCursor")
    browser.write("1 " * 999)
    browser.click("sendThem")
    browser.sent()
    eventually(lambda: browser.value("ringCursor") != cursor)
    if preference == "reduce":
        browser.looked_again()
        assert browser.run("return window.moves") == 0
        assert browser.run("return document.getAnimations().length") == 0
    else:
        eventually(lambda: browser.run("return window.moves") > 2, "the ring turns")
        eventually(lambda: browser.run("return document.getElementById('turning').getAttribute('transform')") is None)


@pytest.mark.parametrize("role", ["publisher", "consumer"])
def test_the_page_fits_a_small_phone(browser: Browser, pair: Pair, role: str) -> None:
    browser.cdp("Emulation.setDeviceMetricsOverride", width=320, height=640, deviceScaleFactor=2, mobile=True)
    browser.open(pair.ports[role])
    browser.write("not_a_number" * 20)
    browser.click("sendThem")
    assert browser.run("return innerWidth") == 320
    assert browser.run("return document.scrollingElement.scrollWidth") <= 320
    clipped = browser.run(
        "return [...document.querySelectorAll('main *')].filter(each => each.checkVisibility()"
        " && !each.closest('svg, .away') && each.getBoundingClientRect().right > 320.5).map(each => each.outerHTML)"
    )
    assert clipped == []


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
const found = [];
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim()) || element.value;
  if (!own || !element.checkVisibility() || element.closest("svg, progress, noscript, .away")) continue;
  const [a, b] = [light(parse(getComputedStyle(element).color)), light(behind(element))].sort((x, y) => y - x);
  found.push([(a + .05) / (b + .05), element.id || element.outerHTML.slice(0, 80)]);
}
return found;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(browser: Browser, running: ServerProcess, scheme: str) -> None:
    browser.media(prefers_color_scheme=scheme)
    browser.open(running.port)
    browser.write("x")
    browser.click("sendThem")
    found = browser.run(CONTRAST)
    assert len(found) > 60
    assert [pair for pair in found if pair[0] < 4.5] == []
    (background,) = {browser.run("return getComputedStyle(document.documentElement).backgroundColor")}
    assert (sum(map(int, re.findall(r"\d+", background))) < 200) == (scheme == "dark")


def test_a_screen_reader_finds_its_way(browser: Browser, running: ServerProcess) -> None:
    browser.open(running.port)
    browser.click("sendThem")
    browser.sent()
    nodes = [node for node in browser.cdp("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    named = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes]
    roles = [role for role, _ in named]
    assert roles.count("main") == roles.count("banner") == roles.count("contentinfo") == 1
    assert {"The ring", "The last minute", "Send integers", "All numbers", "The database"} <= {
        name for role, name in named if role == "region"
    }
    for role in "button", "textbox", "link", "image", "progressbar":
        names = [name for of, name in named if of == role]
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
    assert live == ["stateText", "tokenWrong", "wrong", "sent"], "nothing that changes every second is read aloud"


def test_the_keyboard_reaches_everything_and_shows_where_it_is(browser: Browser, running: ServerProcess) -> None:
    browser.open(running.port)
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
    assert reached == ["#numbers", "integers", "sendThem", "sendMany", "/v1.0/stats", "/v1.0/ready", "/metrics"]


def test_the_page_asks_for_the_token_once_and_keeps_it_to_itself(browser: Browser, tmp_path: Path) -> None:
    """Until it has one it does not ask the server again; the box sends with it; a reload forgets it."""
    token = "s3cret+/=="

    def give(text: str) -> None:
        browser.run("document.getElementById('tokenText').value = arguments[0]", text)
        browser.run("document.getElementById('tokenForm').requestSubmit()")

    def asked() -> int:
        answered = locked.get("/v1.0/stats", Authorization=f"Bearer {token}")[2]
        return int(json.loads(answered)["stats"]["unauthorizedRequests"])

    with server(tmp_path, "-p", "0", "-T", "0", "-D", "a.db", env={"RINGOEXP_TOKEN": token}) as locked:
        browser.driver.get(f"http://localhost:{locked.port}/")
        eventually(lambda: browser.state() == "locked")
        assert browser.text("stateWords") == "This server wants its token."
        assert browser.run("return document.activeElement.id") == "tokenText"
        assert browser.run("return document.getElementById('parts').hidden")
        browser.run("TIMES.poll = 10; look()")
        before = asked()
        give("")
        assert browser.text("tokenWrong") == "Type the token."
        give("caf\xe9")
        assert browser.text("tokenWrong").startswith("That is no token")
        assert asked() == before
        give("wrong")
        eventually(lambda: browser.text("tokenWrong") == "That is not the token.")
        assert asked() == before + 1
        give(f" {token} ")
        eventually(lambda: browser.looks() > 0)
        assert not browser.run("return document.getElementById('tokenForm').checkVisibility()")
        browser.write("5 6 7")
        browser.click("sendThem")
        assert browser.sent().startswith("3 sent, all stored")
        assert asked() == before + 1
        kept = "return JSON.stringify([localStorage, sessionStorage, document.cookie, location.href, history.state])"
        assert token not in browser.run(kept)
        assert token not in browser.run("return document.documentElement.outerHTML")
        browser.driver.refresh()
        eventually(lambda: browser.state() == "locked")
    assert [value for _, _, value in rows(tmp_path / "a.db")] == [5, 6, 7]
    told = browser.driver.get_log("browser")  # the browser itself says 401
    assert all("401 (Unauthorized)" in entry["message"] for entry in told)
    browser.driver.get("about:blank")


def test_the_page_works_over_tls(browser: Browser, tmp_path: Path) -> None:
    """Its WebSocket too, which is wss:// then."""
    authority = Authority(tmp_path)
    browser.cdp("Security.setIgnoreCertificateErrors", ignore=True)
    try:
        with server(tmp_path, "-p", "0", "-T", "0", "-D", "a.db", *tls(authority.issue())) as running:
            browser.driver.get(f"https://localhost:{running.port}/")
            eventually(lambda: browser.looks() > 0)
            browser.write("8")
            browser.click("sendThem")
            assert browser.sent().startswith("1 sent, all stored")
            browser.driver.get("about:blank")
    finally:
        browser.cdp("Security.setIgnoreCertificateErrors", ignore=False)
    assert [value for _, _, value in rows(tmp_path / "a.db")] == [8]


def test_it_works_through_nginx(browser: Browser) -> None:
    """Its WebSocket too, whose Origin is the address of nginx."""
    with room() as directory, server(directory, "-H", "unix:x.sock") as behind, nginx(directory, behind.at) as port:
        browser.open(port)
        browser.write("1 2 3")
        browser.click("sendThem")
        browser.sent()
        assert [value for _, _, value in rows(directory / "ringoexp.db")] == [1, 2, 3]


def test_a_page_that_cannot_be_read_once_is_read_the_next_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when the server is out of descriptors for a while."""
    page._read.cache_clear()

    def no_descriptor(*unused: object) -> bytes:
        raise OSError("Too many open files")

    with monkeypatch.context() as short:
        short.setattr(page.pkgutil, "get_data", no_descriptor)
        assert page.page() is None
    assert [record.msg for record in caplog.records] == ["dashboard_missing"]
    found = page.page()
    assert found and b"<h1" in found.content
