"""The live page between two looks: the ring's bursts, the latest records, and other servers' pages."""

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.browser import Browser
from support.harness import ROLES, ROOT, RawClient, ServerProcess, eventually, frame, request, rows, server

from ringolib.wire import encode_plain


@pytest.fixture(scope="module")
def standalone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A publisher that stores in its own database."""
    with server(tmp_path_factory.mktemp("own"), *ROLES["publisher"]) as process:
        yield process


# Bursts.


def test_ring_shows_a_burst_between_two_looks(browser: Browser, standalone: ServerProcess) -> None:
    """Other readers of the stats and the metrics, in between, take nothing of it away."""
    browser.open(standalone.port)
    browser.stop_polling()
    before = int(browser.value("ringCursor"))
    with RawClient(standalone.port) as client:
        client.send(frame(2, encode_plain(range(3000))))
        client.acked(3000)
    for path in ("/v1.0/stats", "/metrics", f"/v1.0/stats?since={before}"):
        assert standalone.get(path)[0] == 200
    eventually(lambda: browser.run("return performance.now() - rateBase.at > TIMES.poll"), "the next look has rates")
    browser.run("polling = false; poll()")
    eventually(lambda: browser.value("ringMoved") == browser.value("ringHighest") == "3000")
    assert browser.value("ringUsed") == "0"
    arcs = "return ['moved', 'highest'].map(id => document.getElementById(id).getAttribute('d') !== '')"
    assert browser.run(arcs) == [True, True]
    assert browser.chart("used") == "3,000"
    browser.stop_polling()
    browser.show(2, ring={"highest": 0})
    assert browser.value("ringMoved") == browser.value("ringHighest") == "0" and browser.run(arcs) == [False, False]


def test_ten_thousand_numbers_are_seen_in_the_ring(browser: Browser, standalone: ServerProcess) -> None:
    browser.open(standalone.port)
    browser.run("TIMES.poll = 1000")
    eventually(lambda: browser.value("ringMoved") == "0")
    browser.click("sendMany")
    browser.send_result()
    eventually(lambda: int(browser.value("ringMoved") or 0) > 0 and int(browser.value("ringHighest")) > 0)


# The latest records.

EXACT = (
    '{"records": [\n'
    '{"id": "9", "source": "5c2e1f0a-8a0e-4b6e-9d0c-2f1f7a3c9b10", "sequence": 9007199254740993,'
    ' "value": -9223372036854775808, "received_at": "2020-11-28T09:20:00.123Z"},\n'
    '{"id": "8", "source": "12345678-9012-4b6e-9d0c-2f1f7a3c9b10", "sequence": 0,'
    ' "value": 9223372036854775807, "received_at": "2020-11-28T09:19:00.000Z"}\n'
    '],\n"next": null}'
)
EMPTY = '{"records": [\n],\n"next": null}'
CELLS = (
    "return [...document.querySelectorAll('#latestRows tr')].map(row => [...row.cells].map(cell => cell.textContent))"
)


def test_latest_records_are_shown_exactly(browser: Browser, standalone: ServerProcess) -> None:
    browser.open(standalone.port)
    browser.answer_records(EXACT)
    eventually(lambda: browser.is_visible("latestTable"))
    assert browser.run(CELLS) == [
        ["-9223372036854775808", "28 Nov 2020", "5c2e1f0a…", "9007199254740993"],
        ["9223372036854775807", "28 Nov 2020", "12345678…", "0"],
    ]
    assert browser.text("latestTitle") == "The latest records" and not browser.is_visible("firstCommands")
    browser.answer_records(502, EXACT)
    eventually(lambda: len(browser.run("return asked")) == 1)
    browser.wait_for_poll()
    assert browser.is_visible("latestTable"), "a server that is busy keeps the list"


@pytest.mark.parametrize("status", [404, 501])
def test_server_without_the_latest_records_is_asked_once(
    browser: Browser, standalone: ServerProcess, status: int
) -> None:
    browser.open(standalone.port)
    browser.answer_records(status)
    eventually(lambda: len(browser.run("return asked")) == 1)
    browser.run("TIMES.latest = 0")
    for _ in range(3):
        browser.wait_for_poll()
    assert len(browser.run("return asked")) == 1
    assert not browser.is_visible("latest") and browser.state() == "ok"


def test_latest_records_come_from_all_consumers(browser: Browser, standalone: ServerProcess) -> None:
    """Two of them share a store, so they have the same records. One does not answer."""

    def answer(*records: tuple[str, int, str]) -> str:
        fields = ("source", "value", "received_at")
        return json.dumps({"records": [{**dict(zip(fields, one, strict=True)), "sequence": one[1]} for one in records]})

    browser.open(standalone.port)
    old, new = ("a" * 36, 1, "2020-01-01T00:00:00.000Z"), ("b" * 36, 2, "2020-01-02T00:00:00.000Z")
    browser.answer_records(
        {"error": "name one", "consumers": ["h:1", "h:2", "[::1]:3"]}, answer(old), answer(new, old), 502
    )
    eventually(lambda: browser.is_visible("latestTable"))
    assert [row[0] for row in browser.run(CELLS)] == ["2", "1"]
    queries = [url.split("limit=10")[1] for url in browser.run("return asked")]
    named = ["&consumer=h%3A1", "&consumer=h%3A2", "&consumer=%5B%3A%3A1%5D%3A3"]
    assert queries == ["", *named], "the answer to the first one names the consumers"
    browser.run("TIMES.latest = 0; answers = arguments[0]", [{"error": "unknown consumer"}] * 3 + [answer(old)])
    eventually(lambda: len(browser.run("return asked")) > 7, "the publisher has other consumers now")
    eventually(lambda: [row[0] for row in browser.run(CELLS)] == ["1"])
    assert browser.run("return asked.at(-1)").endswith("limit=10")


def test_latest_records_are_those_of_the_database(browser: Browser, tmp_path: Path) -> None:
    """Ten of twelve, newest first; on a server without the route there is no list."""
    with server(tmp_path, *ROLES["publisher"]) as process:
        browser.open(process.port)
        if process.get("/v1.0/records?limit=1")[0] == 404:
            browser.wait_for_poll()
            assert not browser.is_visible("latest")
            return
        eventually(lambda: browser.is_visible("firstCommands"), "the database is empty")
        browser.write(" ".join(map(str, range(2**63 - 12, 2**63))))
        browser.click("sendButton")
        browser.send_result()
        newest = [str(value) for _, _, value in rows(tmp_path / "ringoexp.db")][:1:-1]
        eventually(lambda: [row[0] for row in browser.run(CELLS)] == newest)
        assert not browser.is_visible("firstCommands")


def test_commands_for_an_empty_database_have_the_real_address(browser: Browser, tmp_path: Path) -> None:
    with server(tmp_path, *ROLES["publisher"]) as process:
        browser.open(process.port)
        browser.answer_records(EMPTY)
        eventually(lambda: browser.is_visible("firstCommands"))
        base = f"://localhost:{process.port}/v1.0"
        assert not browser.is_visible("latestTable") and not browser.is_visible("tokenVariable")
        assert browser.text("commandPost") == f"curl -d 42 http{base}/ingest"
        assert browser.text("commandRead") == f"curl -N 'http{base}/records?follow=1&format=text'"
        send = browser.text("commandSend")
        assert send == f"seq 1 1000 | ringoexp send --url ws{base}/ingest"
        command = send.replace("ringoexp send", f"{sys.executable} {ROOT / 'ringoexp.py'} send")
        assert subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, timeout=60).returncode == 0
        assert [value for _, _, value in rows(tmp_path / "ringoexp.db")] == list(range(1, 1001))
        browser.cdp("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
        browser.run("document.querySelector('[data-copy=commandSend]').click()")
        button = "return document.querySelector('[data-copy=commandSend]').textContent"
        eventually(lambda: browser.run(button) == "Copied")
        browser.run("TIMES.latest = 0")
        browser.run("answers[0] = arguments[0]", EXACT)
        eventually(lambda: browser.is_visible("latestTable"))
        assert not browser.is_visible("firstCommands")


def test_commands_name_the_variable_of_the_token_and_quote_the_address(
    browser: Browser, standalone: ServerProcess
) -> None:
    browser.open(standalone.port)
    browser.answer_records(EMPTY)
    eventually(lambda: browser.is_visible("firstCommands"))
    browser.run('BASE.pathname = "/a b\'s/(x)/"; showCommands(true)')
    assert browser.is_visible("tokenVariable")
    base = f"http://localhost:{standalone.port}/a%20b%27s/(x)/v1.0"
    header = '-H "Authorization: Bearer $RINGOEXP_TOKEN"'
    assert browser.text("commandPost") == f"curl {header} -d 42 '{base}/ingest'"
    assert browser.text("commandRead").startswith(f"curl -N {header} 'http")


# The pages of consumers.


def test_publishers_page_links_to_its_consumers(browser: Browser, tmp_path: Path) -> None:
    with (
        server(tmp_path, *ROLES["consumer"], "-D", "consumer.db") as consumer,
        server(tmp_path, "-p", "0", "-T", str(consumer.port)) as publisher,
    ):
        browser.open(publisher.port)
        link = "return document.querySelector('#serverAddress a')"
        assert browser.run(f"{link}.href") == f"http://localhost:{consumer.port}/"
        assert browser.text("serverAddress").endswith(f"forwarding to localhost:{consumer.port}")
        browser.run(link.replace("return ", "") + ".click()")
        eventually(lambda: browser.driver.title.endswith("consumer"))


LINKS = [
    # the consumer's address, the URL of the publisher's page, and the link, if there is one
    ("localhost:6661", "http://localhost:6660/", "http://localhost:6661/"),
    ("localhost:6661", "http://127.0.0.1:6660/", "http://127.0.0.1:6661/"),
    ("127.0.0.2:6661", "http://localhost:6660/", "http://127.0.0.2:6661/"),
    ("[::1]:6661", "http://[::1]:6660/", "http://[::1]:6661/"),
    ("localhost:6661", "http://edge-1.example:6660/", None),  # it is the browser's own machine there
    ("localhost:6661", "http://192.168.1.5:6660/", None),
    ("unix:/run/consumer.sock", "http://localhost:6660/", None),
    ("192.168.1.9:6661", "http://192.168.1.5:6660/", "http://192.168.1.9:6661/"),
    ("[fd00::9]:6661", "http://edge-1:6660/", "http://[fd00::9]:6661/"),
    ("store.example:6661", "http://edge-1.example:6660/", "http://store.example:6661/"),
    ("store.example:6661", "http://localhost:6660/", "http://store.example:6661/"),
    ("store.internal:6661", "http://edge-1.example:6660/", None),
    ("edge-1:6661", "http://edge-1:6660/", "http://edge-1:6661/"),
    ("consumer:6661", "http://localhost:6660/", None),  # a name within containers
    ("192.168.1.9:6661", "http://proxy.example/", None),  # another port than the publisher's: a proxy
    ("192.168.1.9:6661", "http://192.168.1.5:6660/numbers/", None),
]


@pytest.mark.parametrize("tls", [False, True])
def test_consumer_is_linked_only_if_the_browser_can_reach_it(
    browser: Browser, standalone: ServerProcess, tls: bool
) -> None:
    browser.open(standalone.port)
    for address, page, link in LINKS:
        info = {"port": 6660, "consumerTls": tls}
        found = browser.run("return pageOf(arguments[0], arguments[1], new URL(arguments[2]))", address, info, page)
        assert found == (link.replace("http:", "https:") if link and tls else link), (address, page)


# Pages of other origins.

ELSEWHERE = """<!doctype html><meta charset="utf-8"><title>elsewhere</title><script>
window.use = async (server, token) => {
  const headers = {"Content-Type": "application/octet-stream", Authorization: `Bearer ${token}`};
  const post = fetch(`http://${server}/v1.0/ingest`, {method: "POST", body: new Uint8Array([0, 0, 0, 42]), headers})
    .then(answer => answer.json().then(body => [answer.status, body.stored ?? null]), error => error.name);
  const stats = fetch(`http://${server}/v1.0/stats`, {headers: {Authorization: `Bearer ${token}`}})
    .then(answer => answer.status, error => error.name);
  const socket = new WebSocket(`ws://${server}/v1.0/ingest`, ["ringoexp.plain.v1", `bearer.${token}`]);
  const acked = new Promise(resolve => {
    socket.onopen = () => socket.send(new Uint8Array([0, 0, 0, 43]));
    socket.onmessage = ({data}) => { socket.close(); resolve("acked"); };
    socket.onclose = ({code}) => resolve(code);
  });
  window.result = await Promise.all([post, stats, acked]);
};
</script>"""


@contextmanager
def website() -> Iterator[int]:
    """Serve a page that uses the server given to its function, and yield the port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(ELSEWHERE.encode())

        def log_message(self, *unused: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as site:
        thread = threading.Thread(target=site.serve_forever)
        thread.start()
        try:
            yield site.server_port
        finally:
            site.shutdown()
            thread.join()


def test_page_of_an_allowed_origin_may_use_the_server(shared_browser: Browser, tmp_path: Path) -> None:
    """With the token, which needs a preflight. Another page may not, nor may one at an unknown name of the server."""
    browser = shared_browser

    def use(page: int, at: str) -> object:
        browser.driver.get(f"http://127.0.0.1:{page}/")
        browser.run("window.use(arguments[0], 'secret')", at)
        return eventually(lambda: browser.run("return window.result"))

    with website() as ours, website() as theirs:
        flags = ("--allow_origin", f"http://127.0.0.1:{ours}", "--allow_host", "numbers.localhost", "-D", "a.db")
        with server(tmp_path, *ROLES["publisher"], *flags, env={"RINGOEXP_TOKEN": "secret"}) as process:
            for name in ("localhost", "numbers.localhost"):
                assert use(ours, f"{name}:{process.port}") == [[200, 1], 200, "acked"]
            assert use(theirs, f"localhost:{process.port}") == ["TypeError", "TypeError", 1006]
            assert use(ours, f"other.localhost:{process.port}") == ["TypeError", "TypeError", 1006]
            assert sorted(value for _, _, value in rows(tmp_path / "a.db")) == [42, 42, 43, 43]
            refused = {"Host": f"other.localhost:{process.port}"}
            assert request(process.port, "GET", "/v1.0/alive", headers=refused)[0] == 421
    browser.driver.get_log("browser")  # Chromium's own messages about the refusals
    browser.driver.get("about:blank")
