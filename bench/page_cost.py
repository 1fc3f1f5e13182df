"""What an open page costs the server: its processor time for one poll of `/v1.0/stats`, at the page's pace.

`python bench/page_cost.py` polls for a minute as the page does, once a second on one connection, after a minute without
polls, which is subtracted; first a server at rest, with its window of ack latencies full, then one that takes a steady
load, some 50,000 records a second. It prints both, as a share of one core, and the size of the page. Linux only.
"""

import argparse
import gzip
import http.client
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from bench import Process, cpu_seconds, own_consumer  # noqa: E402
from ringolib.client.producer import Producer  # noqa: E402

LATENCIES = 4096
PIECE = 1000  # records, 50 times a second


def spent(process: Process, seconds: int, polls: bool) -> tuple[float, int]:
    """Processor time in these seconds, with a poll in each or without, and the bytes of the last answer."""
    connection = http.client.HTTPConnection("localhost", process.port, timeout=30)
    size, started, before = 0, time.monotonic(), cpu_seconds(process.pid)
    for number in range(1, seconds + 1):
        if polls:
            connection.request("GET", "/v1.0/stats", headers={"Accept": "application/json"})
            size = len(connection.getresponse().read())
        time.sleep(max(0.0, started + number - time.monotonic()))
    connection.close()
    return cpu_seconds(process.pid) - before, size


def compare(process: Process, seconds: int, what: str) -> None:
    """Prints what the polls add."""
    idle, _ = spent(process, seconds, polls=False)
    polled, size = spent(process, seconds, polls=True)
    each = (polled - idle) / seconds
    print(
        f"{what}: {each * 1000:.2f} ms of processor time a poll, {each * 100:.2f} % of a core"
        f" ({polled:.2f} s in {seconds} s, {idle:.2f} s without); an answer has {size} bytes"
    )


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="how long each of four parts takes (default 60)")
    seconds = parser.parse_args().seconds
    page = (ROOT / "dashboard.html").read_bytes()
    print(f"page: {len(page)} bytes ({len(gzip.compress(page))} if it were compressed), sent once, then 304")
    with own_consumer() as (process, _), Producer(f"ws://localhost:{process.port}/v1.0/ingest") as producer:
        for _ in range(LATENCIES):
            producer.send([1])
            producer.flush()
        compare(process, seconds, "at rest")
        over = threading.Event()

        def load() -> None:
            while not over.wait(0.02):
                producer.send(range(PIECE))

        thread = threading.Thread(target=load)
        thread.start()
        try:
            compare(process, seconds, "under load")
        finally:
            over.set()
            thread.join()


if __name__ == "__main__":
    main()
