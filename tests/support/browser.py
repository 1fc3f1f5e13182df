"""Debian's Chromium with the live page, driven by selenium. Tests are skipped if one of them is missing."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from support.harness import eventually

CHROMIUM = [shutil.which("chromium"), shutil.which("chromedriver")]
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-default-apps --window-size=1280,900"
).split()
REFUSED = tuple(
    f"net::ERR_{reason}"
    for reason in ("CONNECTION_REFUSED", "EMPTY_RESPONSE", "CONNECTION_RESET", "SOCKET_NOT_CONNECTED")
)
RECORDS = "/v1.0/records?order=desc&limit=10"
"""What the page asks for to show the latest records. Not every server can answer it at every time."""
UNREACHABLE = (*REFUSED, f"{RECORDS} - Failed to load resource", f"{RECORDS}&consumer=")
"""Messages that Chromium writes to its console if a server does not answer. The page cannot prevent them."""


class Browser:
    """Chromium with one page, and the parts of the page that a reader sees. The page polls every `poll_ms`."""

    def __init__(self, driver: Any, poll_ms: int = 1000) -> None:
        self.driver = driver
        self.poll_ms = poll_ms

    def open(self, port: int, path: str = "/") -> None:
        """Load the page, and wait until it shows numbers."""
        self.driver.get(f"http://localhost:{port}{path}")
        eventually(lambda: self.polls() > 0, "the page has no stats")
        self.run("TIMES.poll = arguments[0]; poll()", self.poll_ms)

    def run(self, script: str, *arguments: Any) -> Any:
        """Return the result of a script in the page."""
        return self.driver.execute_script(script, *arguments)

    def cdp(self, command: str, **parameters: Any) -> Any:
        """Return the result of a command of the Chrome DevTools protocol."""
        return self.driver.execute_cdp_cmd(command, parameters)

    def polls(self) -> int:
        """Return the number of reports that the page has shown."""
        return int(self.run("return document.body.dataset.polls"))

    def wait_for_poll(self) -> None:
        """Wait until the page has shown another report."""
        polls = self.polls()
        eventually(lambda: self.polls() > polls)

    def stop_polling(self) -> None:
        """Stop the page's polls: from here on it shows only the reports that `show` makes."""
        eventually(
            lambda: self.run("if (polling) return false; clearTimeout(timer); TIMES.poll = 1000; return polling = true")
        )

    def show(
        self, later: float, ring: dict[str, Any] | None = None, info: dict[str, Any] | None = None, **stats: Any
    ) -> None:
        """Show the last report with these changes, as if it had arrived so many seconds later."""
        self.run(
            "const report = structuredClone(previous.report), [later, ...changes] = arguments;"
            "['ring', 'info', 'stats'].forEach((part, i) => report[part] && Object.assign(report[part], changes[i]));"
            "showReport(report, previous.at + later * 1000)",
            later,
            ring,
            info,
            stats,
        )

    def answer_records(self, *answers: str | int | dict[str, Any]) -> None:
        """Answer requests for the latest records with these texts or statuses; the last one is repeated.

        An object is an answer with status 400.
        """
        self.run(
            "window.answers = [...arguments]; window.asked = []; window.realFetch ??= window.fetch;"
            "window.fetch = (url, options) => {"
            " if (!String(url).includes('/v1.0/records')) return realFetch(url, options);"
            " asked.push(String(url)); const answer = answers.length > 1 ? answers.shift() : answers[0];"
            " return Promise.resolve(typeof answer === 'number' ? new Response('{}', {status: answer})"
            " : typeof answer === 'object' ? new Response(JSON.stringify(answer), {status: 400})"
            " : new Response(answer)); };"
            "latestKey = latestMissing = ''; latestQueries = ONE_SOURCE; poll();",
            *answers,
        )

    def chart(self, name: str) -> str:
        """Return the present value of a chart, as it is shown."""
        return str(self.run("return document.getElementById(`chart-${arguments[0]}`).innerText", name))

    def path(self, chart: str, element: str) -> str:
        """Return the path of a chart's line or dots: `.line.first`, for example."""
        return str(
            self.run(
                "return document.querySelector(`[data-chart=${arguments[0]}] ${arguments[1]}`).getAttribute('d')",
                chart,
                element,
            )
        )

    def value(self, name: str) -> str:
        """Return the exact number of the element with this id; empty if the number is unknown."""
        return str(self.run("return document.getElementById(arguments[0]).value", name))

    def text(self, name: str) -> str:
        """Return the visible text of the element with this id."""
        return str(self.run("return document.getElementById(arguments[0]).innerText", name))

    def is_visible(self, name: str) -> bool:
        """True if the element with this id is visible."""
        return bool(self.run("return document.getElementById(arguments[0]).checkVisibility()", name))

    def state(self) -> str:
        return str(self.run("return document.body.dataset.state"))

    def click(self, name: str) -> None:
        self.run("document.getElementById(arguments[0]).click()", name)

    def write(self, text: str) -> None:
        """Write into the field for integers."""
        self.run("document.getElementById('integers').value = arguments[0]", text)

    def send_result(self) -> str:
        """Wait for the result of a send, and return it."""
        return str(eventually(lambda: self.text("sendResult"), "the page shows no result"))

    def media(self, **features: str) -> None:
        """Set the user's preferences: `prefers_color_scheme="dark"`, for example."""
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.cdp("Emulation.setEmulatedMedia", features=named)

    def errors(self) -> list[str]:
        """Return the console's messages, without Chromium's own about an unreachable server."""
        messages = [entry["message"] for entry in self.driver.get_log("browser")]
        return [text for text in messages if not any(known in text for known in UNREACHABLE)]


@contextmanager
def chromium() -> Iterator[Any]:
    """Run Debian's Chromium without any request to the Internet, and yield its driver."""
    if not all(CHROMIUM):
        pytest.skip("no chromium and chromedriver (Debian: apt install chromium chromium-driver)")
    pytest.importorskip("selenium", reason="no selenium (pip install '.[ci]')")
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
