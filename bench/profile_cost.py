"""Measure the profiler's cost: of an idle port, of a profile with many threads, of a profile and tracing under load.

`python bench/profile_cost.py` prints medians of 3, each beside its baseline from the same run:

- CPU time of an idle server, with `-L` and without;
- the sampler's own CPU time with 1,000 waiting threads, as a share of one core, and samples per second;
- records per second while the server is profiled, and while memory is traced, compared to neither.

`--quick` takes a few seconds and shows only that everything works. Linux only: it reads /proc.
"""

import argparse
import http.client
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]


from bench import Process, cpu_seconds, generate  # noqa: E402
from ringolib.status import sampler  # noqa: E402


class Sizes(NamedTuple):
    """How much is measured."""

    rounds: int
    idle_seconds: int
    threads: int
    sampling_seconds: int
    records: int


FULL = Sizes(rounds=3, idle_seconds=10, threads=1000, sampling_seconds=10, records=4_000_000)
QUICK = Sizes(rounds=1, idle_seconds=1, threads=1000, sampling_seconds=1, records=200_000)


@contextmanager
def server(port: int = 0) -> Iterator[Process]:
    """Run a server with a database, and with a profiler on `port` unless it is 0."""
    with tempfile.TemporaryDirectory(prefix="ringoexp-bench-") as directory:
        process = Process(directory, "-p", "0", "-T", "0", "-L", str(port))
        try:
            yield process
        finally:
            process.stop()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def get(port: int, path: str) -> bytes:
    """Return the body of the profiler's response. An error ends the program."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("GET", f"/debug/pprof/{path}")
    response = connection.getresponse()
    body = response.read()
    connection.close()
    if response.status != 200:
        raise SystemExit(f"{path}: {response.status} {body!r}")
    return body


def measure_idle(seconds: int, port: int) -> float:
    """Return the CPU seconds of an idle server."""
    with server(port) as process:
        before = cpu_seconds(process.pid)
        time.sleep(seconds)
        return cpu_seconds(process.pid) - before


def measure_sampler(threads: int, seconds: int) -> tuple[float, float]:
    """Return the sampler's share of a core and samples per second, with waiting threads that are ten calls deep."""
    ended = threading.Event()

    def wait_deep(depth: int) -> None:
        if depth:
            wait_deep(depth - 1)
        else:
            ended.wait()

    waiting = [threading.Thread(target=wait_deep, args=(6,)) for _ in range(threads)]
    for thread in waiting:
        thread.start()
    try:
        pause = threading.Event()
        cpu, started = time.thread_time(), time.monotonic()
        profile = sampler.sample(seconds, pause.wait)
        cpu, duration = time.thread_time() - cpu, time.monotonic() - started
    finally:
        ended.set()
        for thread in waiting:
            thread.join()
    samples: dict[str, int] = {}
    for (name, _, _), cost in profile.costs.items():
        samples[name] = samples.get(name, 0) + cost.samples
    return cpu / duration, samples[waiting[0].name] / duration


def measure_throughput(records: int, mode: str) -> float:
    """Return the records per second in 4-byte messages on four connections.

    `mode` is "plain", "profiled" (one profile after the other) or "traced" (tracing memory).
    """
    port = free_port()
    with server(port) as process:
        if mode == "traced":
            get(port, "heap?start=1")
        ended = threading.Event()

        def profile() -> None:
            while not ended.is_set():
                get(port, "profile?seconds=1")

        profiling = threading.Thread(target=profile)
        if mode == "profiled":
            profiling.start()
        try:
            result = generate(process.port, 4, records // 4, 4)
        finally:
            ended.set()
            if mode == "profiled":
                profiling.join()
    return result["records"] / result["seconds"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds: shows only that everything works")
    sizes = QUICK if parser.parse_args().quick else FULL
    idle: dict[str, list[float]] = {"without -L": [], "with -L": []}
    for _ in range(sizes.rounds):
        idle["without -L"].append(measure_idle(sizes.idle_seconds, 0))
        idle["with -L"].append(measure_idle(sizes.idle_seconds, free_port()))
    for mode, measured in idle.items():
        print(f"idle, {mode}: {statistics.median(measured):.2f} s of CPU time in {sizes.idle_seconds} s")
    rounds = [measure_sampler(sizes.threads, sizes.sampling_seconds) for _ in range(sizes.rounds)]
    shares, rates = zip(*rounds, strict=True)
    print(
        f"sampler, {sizes.threads} waiting threads: {statistics.median(shares):.1%} of a core,"
        f" {statistics.median(rates):.0f} samples/s"
    )
    load: dict[str, list[float]] = {"plain": [], "profiled": [], "traced": []}
    for _ in range(sizes.rounds):
        for mode, measured in load.items():
            records = sizes.records // (8 if mode == "traced" else 1)  # tracing is slow
            measured.append(measure_throughput(records, mode))
    plain = statistics.median(load["plain"])
    for mode, measured in load.items():
        median = statistics.median(measured)
        print(f"under load, {mode}: {median / 1e6:.2f} million records/s, {median / plain:.2f} of plain")


if __name__ == "__main__":
    main()
