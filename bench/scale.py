"""Measure the cost of a record in each process on its way into ClickHouse and into SQLite, with up to four consumers.

`python bench/scale.py` sends messages of one integer through publishers (`-r 1048576`) and consumers, one publisher for
each consumer, all on this machine. It prints the medians of the rounds: the records acked per second, and the processor
time for each record in each kind of process. On a machine with few cores all processes share them, so the rate means
little. The processor time shows how many records a core can take if each process has a machine of its own. `--quick`
takes a few seconds, and shows only that everything works. The ClickHouse part needs Debian's clickhouse-server.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "tests")]

import pytest  # noqa: E402
from support.clickhouses import ClickHouseServer  # noqa: E402

from bench import Process, cpu_seconds, say  # noqa: E402

RING = "1048576"


class Result(NamedTuple):
    """One run: records per second, and the microseconds of processor time for a record in each kind of process."""

    rate: float
    publisher: float
    consumer: float
    database: float
    load: float


def run(records: int, pairs: int, house: ClickHouseServer | None) -> Result:
    """Send records through `pairs` publishers and their consumers, into one ClickHouse or one SQLite file each."""
    with tempfile.TemporaryDirectory(prefix="ringoexp-bench-") as directory, ExitStack() as stack:
        url = house.url(house.create_database()) if house else ""
        consumers, publishers = [], []
        for pair in range(pairs):
            consumers.append(Process(directory, "-I", "false", "-p", "0", "-D", url or f"bench-{pair}.db"))
            stack.callback(consumers[-1].stop)
            publishers.append(Process(directory, "-p", "0", "-T", str(consumers[-1].port), "-r", RING))
            stack.callback(publishers[-1].stop)
        kinds = [[process.pid for process in kind] for kind in (publishers, consumers)]
        kinds.append([house.process.pid] if house else [])
        before = [sum(map(cpu_seconds, pids)) for pids in kinds]
        share = records // pairs
        generators = [
            subprocess.Popen(
                [sys.executable, str(ROOT / "bench" / "load.py"), str(publisher.port), "1", str(share), "4"],
                stdout=subprocess.PIPE,
                text=True,
            )
            for publisher in publishers
        ]
        outputs = []
        for generator in generators:
            out, _ = generator.communicate()
            if generator.returncode:
                raise SystemExit(f"the load generator failed: {out}")
            outputs.append(json.loads(out))
        after = [sum(map(cpu_seconds, pids)) for pids in kinds]
        costs = [(late - early) / records * 1e6 for early, late in zip(before, after, strict=True)]
        return Result(
            records / max(output["seconds"] for output in outputs),
            *costs,
            sum(output["cpuSeconds"] for output in outputs) / records * 1e6,
        )


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--records", type=int, default=12_000_000)
    arguments.add_argument("--rounds", type=int, default=3)
    options = arguments.parse_args()
    records, rounds = (400_000, 1) if options.quick else (options.records, options.rounds)
    say(f"{records} messages of one integer, {rounds} rounds; microseconds of processor time per record and process")
    say(f"{'':24}{'million/s':>12}{'publisher':>12}{'consumer':>12}{'database':>12}{'load':>12}")
    cases = [(store, pairs) for pairs in (1, 2, 4) for store in ("SQLite", "ClickHouse")]
    with tempfile.TemporaryDirectory(prefix="ringoexp-bench-") as directory:
        try:
            house = ClickHouseServer(Path(directory, "clickhouse"))
        except pytest.skip.Exception as missing:  # raised by the tests' helper
            raise SystemExit(f"{missing}: apt install clickhouse-server, or add it to the PATH") from None
        try:
            results: dict[tuple[str, int], list[Result]] = {case: [] for case in cases}
            for _ in range(rounds):
                for store, pairs in cases:
                    results[store, pairs].append(run(records, pairs, house if store == "ClickHouse" else None))
        finally:
            house.kill()
    for (store, pairs), runs in results.items():
        rate, *costs = (statistics.median(figures) for figures in zip(*runs, strict=True))
        columns = "".join(f"{cost:12.3f}" for cost in costs)
        say(f"{store + ', ' + str(pairs) + ' consumer' + 's' * (pairs > 1):24}{rate / 1e6:12.2f}{columns}")


if __name__ == "__main__":
    main()
