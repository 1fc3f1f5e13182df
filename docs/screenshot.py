"""Take docs/dashboard.png and docs/dashboard-dark.png: the live page of a publisher at work.

`python docs/screenshot.py` starts a consumer and a publisher, sends records for a minute at a changing rate, and takes
the pictures when the ring has waiting slots and slots in flight. It needs the same as the browser tests
(`pip install '.[ci]'`, Debian's chromium and chromium-driver), and Pillow to make the pictures small.
"""

import base64
import io
import math
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from PIL import Image  # noqa: E402
from support.browser import Browser, chromium  # noqa: E402
from support.harness import server  # noqa: E402

from ringolib.client.producer import Producer  # noqa: E402

SECONDS = 64
WIDTH, SCALE, COLOURS = 1120, 1.25, 128


def load(port: int, stop: threading.Event) -> None:
    """Send 40,000 to 160,000 records a second, in waves. Two threads run this."""
    with Producer(f"ws://localhost:{port}/v1.0/ingest") as producer:
        while not stop.wait(0.02):
            now = time.monotonic()
            producer.send(range(int(2000 + 900 * math.sin(now / 6) + 300 * math.sin(now * 1.7))))


LAST_POLL = """
const done = arguments[arguments.length - 1];
polling = true;  // stops the page's own polls
clearTimeout(timer);
(async () => {
  for (;;) {
    const report = await (await fetch("/v1.0/stats")).json(), {ring} = report;
    const inFlight = lengths(ring.inFlight), waiting = ring.cursor - ring.committed - inFlight - lengths(ring.finished);
    if (inFlight < 400 || waiting < 400 || ring.capacity - inFlight - waiting < 400) continue;
    showReport(report, performance.now());
    return done();
  }
})();
"""
"""Polls until the ring has enough slots of each kind, and shows that report."""


def take(browser: Browser, scheme: str, path: Path) -> None:
    """Take a picture of the page, from its top to the beginning of the numbers."""
    browser.media(prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
    height = browser.run("return document.getElementById('numbers').offsetTop - 24")
    browser.cdp("Emulation.setDeviceMetricsOverride", width=WIDTH, height=height, deviceScaleFactor=SCALE, mobile=False)
    png = base64.b64decode(browser.cdp("Page.captureScreenshot", format="png")["data"])
    picture = (
        Image.open(io.BytesIO(png))
        .convert("RGB")
        .quantize(COLOURS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    )
    picture.save(path, optimize=True)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size} bytes")


def main() -> None:
    """Take both pictures."""
    stop = threading.Event()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        directories = [Path(name, role) for role in ("consumer", "publisher")]
        for directory in directories:
            directory.mkdir()
        consumer = stack.enter_context(server(directories[0], "-I", "false", "-p", "0"))
        publisher = stack.enter_context(server(directories[1], "-p", "0", "-T", str(consumer.port), "-N", "edge-1"))
        browser = Browser(stack.enter_context(chromium()))
        browser.media(prefers_reduced_motion="reduce")
        browser.cdp("Emulation.setScrollbarsHidden", hidden=True)
        browser.cdp("Emulation.setDeviceMetricsOverride", width=WIDTH, height=900, deviceScaleFactor=1, mobile=False)
        threads = [threading.Thread(target=load, args=(publisher.port, stop)) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            time.sleep(5)  # the first acks take longer
            browser.open(publisher.port)
            time.sleep(SECONDS)
            browser.driver.set_script_timeout(120)
            browser.driver.execute_async_script(LAST_POLL)
            take(browser, "light", ROOT / "docs" / "dashboard.png")
            take(browser, "dark", ROOT / "docs" / "dashboard-dark.png")
        finally:
            stop.set()
            for thread in threads:
                thread.join()


if __name__ == "__main__":
    main()
