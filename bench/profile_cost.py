"""What the profiler costs: an open port that nobody asks, a profile of many threads, a profile and tracing under load.

`python bench/profile_cost.py` prints, each measured in the same run with what it is compared to, medians of 3:

- processor time of a server at rest, with `-L` and without;
- the sampler's own processor time, with 1,000 threads that wait, as a share of one core; and samples a second;
- records a second that a server takes while it is profiled, and while memory is traced, as a share of what it takes
  otherwise.

`--quick` is a few seconds, and shows that all of it works. Linux only: it reads /proc.
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
from ringolib.status import sampler as sampling  # noqa: E402


class Sizes(NamedTuple):
    """How much of everything."""

    rounds: int
    rest: int  # seconds
    threads: int
    sampled: int  # seconds
    records: int


WHOLE = Sizes(rounds=3, rest=10, threads=1000, sampled=10, records=4_000_000)
QUICK = Sizes(rounds=1, rest=1, threads=1000, sampled=1, records=200_000)


@contextmanager
def server(port: int = 0) -> Iterator[Process]:
    """A server that stores for itself, with a profiler on `port`, or none."""
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
    """What the profiler answers; ends the program where it is an error."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("GET", f"/debug/pprof/{path}")
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    if answer.status != 200:
        raise SystemExit(f"{path}: {answer.status} {body!r}")
    return body


def at_rest(seconds: int, port: int) -> float:
    """Processor seconds of a server that nobody asks for anything."""
    with server(port) as process:
        before = cpu_seconds(process.pid)
        time.sleep(seconds)
        return cpu_seconds(process.pid) - before


def sampler(threads: int, seconds: int) -> tuple[float, float]:
    """The sampler's share of a core, and samples a second, with threads that wait, ten calls deep."""
    over = threading.Event()

    def deep(left: int) -> None:
        if left:
            deep(left - 1)
        else:
            over.wait()

    waiting = [threading.Thread(target=deep, args=(6,)) for _ in range(threads)]
    for thread in waiting:
        thread.start()
    try:
        pause = threading.Event()
        used, started = time.thread_time(), time.monotonic()
        profile = sampling.sample(seconds, pause.wait)
        used, taken = time.thread_time() - used, time.monotonic() - started
    finally:
        over.set()
        for thread in waiting:
            thread.join()
    totals: dict[str, int] = {}
    for (name, _, _), cost in profile.costs.items():
        totals[name] = totals.get(name, 0) + cost.samples
    return used / taken, totals[waiting[0].name] / taken


def throughput(records: int, how: str) -> float:
    """Records a second, of 4-byte messages on four connections: plainly, while "profiled", or while "traced"."""
    port = free_port()
    with server(port) as process:
        if how == "traced":
            get(port, "heap?start=1")
        over = threading.Event()

        def profile() -> None:
            while not over.is_set():
                get(port, "profile?seconds=1")

        asking = threading.Thread(target=profile)
        if how == "profiled":
            asking.start()
        try:
            result = generate(process.port, 4, records // 4, 4)
        finally:
            over.set()
            if how == "profiled":
                asking.join()
    return result["records"] / result["seconds"]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds: shows that all of it works, not how much")
    sizes = QUICK if parser.parse_args().quick else WHOLE
    rest: dict[str, list[float]] = {"without -L": [], "with -L": []}
    for _ in range(sizes.rounds):
        rest["without -L"].append(at_rest(sizes.rest, 0))
        rest["with -L"].append(at_rest(sizes.rest, free_port()))
    for how, found in rest.items():
        print(f"at rest, {how}: {statistics.median(found):.2f} s of processor time in {sizes.rest} s")
    sampled = [sampler(sizes.threads, sizes.sampled) for _ in range(sizes.rounds)]
    shares, rates = zip(*sampled, strict=True)
    print(
        f"sampler, {sizes.threads} threads that wait: {statistics.median(shares):.1%} of a core,"
        f" {statistics.median(rates):.0f} samples a second"
    )
    load: dict[str, list[float]] = {"plain": [], "profiled": [], "traced": []}
    for _ in range(sizes.rounds):
        for how, measured in load.items():
            records = sizes.records // (8 if how == "traced" else 1)  # it takes so much longer
            measured.append(throughput(records, how))
    plain = statistics.median(load["plain"])
    for how, measured in load.items():
        median = statistics.median(measured)
        print(f"under load, {how}: {median / 1e6:.2f} million records/s, {median / plain:.2f} of plain")


if __name__ == "__main__":
    main()
