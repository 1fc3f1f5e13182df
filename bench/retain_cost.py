"""What `--retain` costs: records a second, and acks, with it and without it, while millions of old records go.

`python bench/retain_cost.py` fills a database, dates its records back, and lets a consumer behind a publisher
(`-r 65536`) take a full load, each time of a copy of it; beside it a client of the consumer's own sends one record at a
time and waits for its ack. It prints medians of the rounds: each figure with retention, without it, and their ratio.
`--quick` is a few seconds, and shows that all of it works.
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
    """How much of everything."""

    rounds: int
    old: int  # records
    seconds: float


WHOLE = Sizes(rounds=3, old=40_000_000, seconds=12)
QUICK = Sizes(rounds=1, old=1_000_000, seconds=2)


class Found(NamedTuple):
    """Of one run."""

    rate: float  # records stored a second
    p50: float  # of acks, in ms
    p99: float
    expired: float  # records deleted a second


def prepare(path: Path, old: int) -> None:
    """A database with so many records that came ten days ago, and one that came now."""
    with closing(Store(str(path))) as store:
        source = uuid.uuid4().bytes
        for first in range(0, old, BLOCK):
            store.append([Run(source, first, BLOCK)], array("q", range(first, first + BLOCK)))
    with closing(sqlite3.connect(path)) as writer, writer:
        writer.execute(f"UPDATE batch SET received_at_ms = received_at_ms - {10 * DAY_MS}")
    with closing(Store(str(path))) as store:
        store.append([Run(uuid.uuid4().bytes, 0, 1)], array("q", [0]))


def stats(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://localhost:{port}/v1.0/stats", timeout=30) as answer:
        return dict(json.load(answer)["stats"])


def pings(port: int, over: threading.Event, taken: list[float]) -> None:
    """Sends one record at a time and waits for its ack, until `over`."""
    message = load.frames(4, 1)
    with load.connect(port) as sock:
        while not over.is_set():
            started = time.perf_counter()
            sock.sendall(message)
            if len(sock.recv(10)) < 10:
                raise SystemExit("no ack")
            taken.append((time.perf_counter() - started) * 1000)


def run(prepared: Path, seconds: float, loaded: bool, *flags: str) -> Found:
    """A run of so long, with full load or with none but the single records."""
    with tempfile.TemporaryDirectory(prefix="ringoexp-bench-") as directory, ExitStack() as stack:
        shutil.copy(prepared, Path(directory, "bench.db"))
        consumer = Process(directory, "-I", "false", "-p", "0", "-D", "bench.db", *flags)
        stack.callback(consumer.stop)
        publisher = Process(directory, "-p", "0", "-T", str(consumer.port), "-r", "65536")
        stack.callback(publisher.stop)
        if loaded:  # more than it can take in that time: it is cut off
            generator = subprocess.Popen(
                [sys.executable, str(ROOT / "bench" / "load.py"), str(publisher.port), "1", str(10**9), "4"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            stack.callback(generator.wait)
            stack.callback(generator.kill)
        over = threading.Event()
        taken: list[float] = []
        pinging = threading.Thread(target=pings, args=(consumer.port, over, taken))
        pinging.start()
        before, started = stats(consumer.port), time.monotonic()
        time.sleep(seconds)
        after, took = stats(consumer.port), time.monotonic() - started
        over.set()
        pinging.join()
    taken.sort()
    return Found(
        (after["recordsStored"] - before["recordsStored"]) / took,
        taken[len(taken) // 2],
        taken[len(taken) * 99 // 100],
        (after["recordsExpired"] - before["recordsExpired"]) / took,
    )


def show(what: str, without: Sequence[Found], retaining: Sequence[Found]) -> None:
    """Prints the medians, and those of each round's ratios: a round's two runs are the nearest in time."""
    plain, kept = (
        Found(*(statistics.median(values) for values in zip(*found, strict=True))) for found in (without, retaining)
    )
    ratio = Found(
        *(
            statistics.median(with_it / plainly for plainly, with_it in zip(*pair, strict=True)) if all(pair[0]) else 0
            for pair in zip(zip(*without, strict=True), zip(*retaining, strict=True), strict=True)
        )
    )
    print(
        f"{what}: {kept.rate:,.0f} records/s with --retain, {plain.rate:,.0f} without: {ratio.rate:.2f};"
        f" {kept.expired / 1e6:.2f} million/s deleted"
    )
    print(
        f"{what}: ack p50 {kept.p50:.2f} ms, {plain.p50:.2f} without: {ratio.p50:.2f};"
        f" p99 {kept.p99:.2f} ms, {plain.p99:.2f} without: {ratio.p99:.2f}"
    )


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds: shows that all of it works, not how much")
    sizes = QUICK if parser.parse_args().quick else WHOLE
    with tempfile.TemporaryDirectory(prefix="ringoexp-bench-") as directory:
        prepared = Path(directory, "prepared.db")
        say(f"{sizes.old} old records")
        prepare(prepared, sizes.old)
        for what, loaded in (("full load", True), ("one record at a time", False)):
            without, retaining = [], []
            for turn in range(sizes.rounds):
                without.append(run(prepared, sizes.seconds, loaded))
                retaining.append(run(prepared, sizes.seconds, loaded, "--retain", "5"))
                say(f"{what}, round {turn + 1}: {without[-1]}, {retaining[-1]}")
            show(what, without, retaining)


if __name__ == "__main__":
    main()
