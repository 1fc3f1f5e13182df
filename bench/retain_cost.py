"""Measure the cost of `--retain`: throughput and ack latency while the server deletes millions of old records.

`python bench/retain_cost.py` fills a database and backdates its records. Each run uses a copy of it. A publisher
(`-r 65536`) sends a full load to the consumer, while another client sends one record at a time to the consumer and
waits for its ack. The output has the medians of all rounds: each figure with retention, without it, and their ratio.
`--quick` takes a few seconds; it shows that the benchmark works.
"""

import argparse
import json
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from array import array
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import load  # noqa: E402

from bench import Process, say  # noqa: E402
from ringolib.wire import Run  # noqa: E402
from store import Store  # noqa: E402

BLOCK = 65_536
DAY_MS = 86_400_000


class Sizes(NamedTuple):
    """The size of the benchmark."""

    rounds: int
    old: int  # records
    seconds: float


WHOLE = Sizes(rounds=3, old=40_000_000, seconds=12)
QUICK = Sizes(rounds=1, old=1_000_000, seconds=2)


class Figures(NamedTuple):
    """The results of one run."""

    rate: float  # records stored a second
    p50: float  # of acks, in ms
    p99: float
    expired: float  # records deleted a second


def prepare(path: Path, old: int) -> None:
    """Create a database with `old` records that arrived ten days ago, and one that arrived now."""
    with closing(Store(str(path))) as store:
        source = uuid.uuid4().bytes
        for first in range(0, old, BLOCK):
            store.append([Run(source, first, BLOCK)], array("q", range(first, first + BLOCK)))
    with closing(sqlite3.connect(path)) as writer, writer:
        writer.execute(f"UPDATE batch SET received_at_ms = received_at_ms - {10 * DAY_MS}")
    with closing(Store(str(path))) as store:
        store.append([Run(uuid.uuid4().bytes, 0, 1)], array("q", [0]))


def stats(port: int) -> dict[str, float]:
    """Return the statistics of a server."""
    with urllib.request.urlopen(f"http://localhost:{port}/v1.0/stats", timeout=30) as response:
        return dict(json.load(response)["stats"])


def measure_acks(port: int, over: threading.Event, times: list[float]) -> None:
    """Send one record at a time and wait for its ack, until `over`; append each time in ms to `times`."""
    message = load.frames(4, 1)
    with load.connect(port) as sock:
        while not over.is_set():
            started = time.perf_counter()
            sock.sendall(message)
            if len(sock.recv(10)) < 10:
                raise SystemExit("no ack")
            times.append((time.perf_counter() - started) * 1000)


def run(prepared: Path, seconds: float, loaded: bool, *flags: str) -> Figures:
    """Run the servers for `seconds`, with full load or with single records only, and return the figures."""
    with tempfile.TemporaryDirectory(prefix="ringoexp-bench-") as directory, ExitStack() as stack:
        shutil.copy(prepared, Path(directory, "bench.db"))
        consumer = Process(directory, "-I", "false", "-p", "0", "-D", "bench.db", *flags)
        stack.callback(consumer.stop)
        publisher = Process(directory, "-p", "0", "-T", str(consumer.port), "-r", "65536")
        stack.callback(publisher.stop)
        if loaded:  # more records than fit into the time; the generator is killed at the end
            generator = subprocess.Popen(
                [sys.executable, str(ROOT / "bench" / "load.py"), str(publisher.port), "1", str(10**9), "4"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            stack.callback(generator.wait)
            stack.callback(generator.kill)
        over = threading.Event()
        times: list[float] = []
        acks = threading.Thread(target=measure_acks, args=(consumer.port, over, times))
        acks.start()
        before, started = stats(consumer.port), time.monotonic()
        time.sleep(seconds)
        after, elapsed = stats(consumer.port), time.monotonic() - started
        over.set()
        acks.join()
    times.sort()
    return Figures(
        (after["recordsStored"] - before["recordsStored"]) / elapsed,
        times[len(times) // 2],
        times[len(times) * 99 // 100],
        (after["recordsExpired"] - before["recordsExpired"]) / elapsed,
    )


def show(load_name: str, without: Sequence[Figures], retaining: Sequence[Figures]) -> None:
    """Print the medians, and the median ratio. A ratio compares the two runs of one round, which are close in time."""
    plain, kept = (
        Figures(*(statistics.median(values) for values in zip(*runs, strict=True))) for runs in (without, retaining)
    )
    ratio = Figures(
        *(
            statistics.median(with_it / plainly for plainly, with_it in zip(*pair, strict=True)) if all(pair[0]) else 0
            for pair in zip(zip(*without, strict=True), zip(*retaining, strict=True), strict=True)
        )
    )
    print(
        f"{load_name}: {kept.rate:,.0f} records/s with --retain, {plain.rate:,.0f} without: {ratio.rate:.2f};"
        f" {kept.expired / 1e6:.2f} million/s deleted"
    )
    print(
        f"{load_name}: ack p50 {kept.p50:.2f} ms, {plain.p50:.2f} without: {ratio.p50:.2f};"
        f" p99 {kept.p99:.2f} ms, {plain.p99:.2f} without: {ratio.p99:.2f}"
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="take a few seconds, to show that the benchmark works")
    sizes = QUICK if parser.parse_args().quick else WHOLE
    with tempfile.TemporaryDirectory(prefix="ringoexp-bench-") as directory:
        prepared = Path(directory, "prepared.db")
        say(f"{sizes.old} old records")
        prepare(prepared, sizes.old)
        for load_name, loaded in (("full load", True), ("one record at a time", False)):
            without, retaining = [], []
            for turn in range(sizes.rounds):
                without.append(run(prepared, sizes.seconds, loaded))
                retaining.append(run(prepared, sizes.seconds, loaded, "--retain", "5"))
                say(f"{load_name}, round {turn + 1}: {without[-1]}, {retaining[-1]}")
            show(load_name, without, retaining)


if __name__ == "__main__":
    main()
