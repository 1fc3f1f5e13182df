"""The cost of an open page: the server's processor time for one poll of `/v1.0/stats` and of the latest records.

`python bench/page_cost.py` polls for a minute like the page, once a second on one connection, and subtracts the time of
a minute without polls. It measures an idle server with a full window of ack latencies, then a server under a steady
load of about 50,000 records a second. It prints both as a share of one core, and the size of the page. Linux only.
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
BATCH_RECORDS = 1000  # sent 50 times a second
PATHS = ("/v1.0/stats?since=0", "/v1.0/records?order=desc&limit=10")
"""What a poll requests. The page asks an idle server for records only every 10 s."""


def measure(process: Process, seconds: int, polls: bool) -> tuple[float, int]:
    """Return the processor time in these seconds, with or without a poll in each, and the size of its responses."""
    connection = http.client.HTTPConnection("localhost", process.port, timeout=30)
    size, started, before = 0, time.monotonic(), cpu_seconds(process.pid)
    for number in range(1, seconds + 1):
        if polls:
            size = 0
            for path in PATHS:
                connection.request("GET", path, headers={"Accept": "application/json"})
                size += len(connection.getresponse().read())
        time.sleep(max(0.0, started + number - time.monotonic()))
    connection.close()
    return cpu_seconds(process.pid) - before, size


def compare(process: Process, seconds: int, state: str) -> None:
    """Print the processor time that the polls add."""
    idle, _ = measure(process, seconds, polls=False)
    polled, size = measure(process, seconds, polls=True)
    cost = (polled - idle) / seconds
    print(
        f"{state}: {cost * 1000:.2f} ms of processor time a poll, {cost * 100:.2f} % of a core"
        f" ({polled:.2f} s in {seconds} s, {idle:.2f} s without); the responses have {size} bytes"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="length of each of the four parts (default 60)")
    seconds = parser.parse_args().seconds
    page = (ROOT / "ringolib/web/dashboard.html").read_bytes()
    print(f"page: {len(page)} bytes ({len(gzip.compress(page))} compressed), sent once, then 304")
    with own_consumer() as (process, _), Producer(f"ws://localhost:{process.port}/v1.0/ingest") as producer:
        for _ in range(LATENCIES):
            producer.send([1])
            producer.flush()
        compare(process, seconds, "idle")
        stop = threading.Event()

        def load() -> None:
            while not stop.wait(0.02):
                producer.send(range(BATCH_RECORDS))

        thread = threading.Thread(target=load)
        thread.start()
        try:
            compare(process, seconds, "under load")
        finally:
            stop.set()
            thread.join()


if __name__ == "__main__":
    main()
