"""Fixtures for the tests of the live page."""

from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from support.browser import Browser, chromium


@pytest.fixture(scope="module")
def shared_browser() -> Iterator[Browser]:
    with chromium() as driver:
        yield Browser(driver, poll_ms=200)


@pytest.fixture
def browser(shared_browser: Browser) -> Iterator[Browser]:
    """The shared browser. After a test its console must be empty, and the server must be the only host it contacted."""
    yield shared_browser
    assert shared_browser.errors() == []
    urls = shared_browser.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
    host = urlsplit(shared_browser.driver.current_url).netloc
    assert {urlsplit(url).netloc for url in urls if not url.startswith("data:")} <= {host}
    shared_browser.media()
    shared_browser.cdp("Emulation.clearDeviceMetricsOverride")
    shared_browser.driver.get("about:blank")
