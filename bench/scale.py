"""What a record costs each process on its way into ClickHouse, beside SQLite, and with several consumers at once.

`python bench/scale.py` sends messages of one integer through publishers (`-r 1048576`) and consumers, one publisher for
each consumer, all of them on this machine, and prints medians of the rounds: records acked a second, and the processor
time of each kind of process for a record. On few cores the rate says little, as all share them; the cost of a record
does: it is what a core of a machine of one's own can take. `--quick` is a few seconds, and shows that all of it works.
Needs Debian's clickhouse-server.
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


class Found(NamedTuple):
    """Of one run: records a second, and microseconds of processor time for each in each kind of process."""

    rate: float
    publisher: float
    consumer: float
    database: float
    load: float


def run(records: int, pairs: int, house: ClickHouseServer | None) -> Found:
    """So many records, through so many publishers and their consumers, into one ClickHouse, or a SQLite file each."""
    with tempfile.TemporaryDirectory(prefix="ringoexp-bench-") as directory, ExitStack() as stack:
        url = house.url(house.create_database()) if house else ""
        consumers, publishers = [], []
        for pair in range(pairs):
            consumers.append(Process(directory, "-I", "false", "-p", "0", "-D", url or f"bench-{pair}.db"))
            stack.callback(consumers[-1].stop)
            publishers.append(Process(directory, "-p", "0", "-T", str(consumers[-1].port), "-r", RING))
            stack.callback(publishers[-1].stop)
        kinds = [[each.pid for each in kind] for kind in (publishers, consumers)]
        kinds.append([house.process.pid] if house else [])
        before = [sum(map(cpu_seconds, pids)) for pids in kinds]
        each = records // pairs
        generators = [
            subprocess.Popen(
                [sys.executable, str(ROOT / "bench" / "load.py"), str(publisher.port), "1", str(each), "4"],
                stdout=subprocess.PIPE,
                text=True,
            )
            for publisher in publishers
        ]
        said = []
        for generator in generators:
            out, _ = generator.communicate()
            if generator.returncode:
                raise SystemExit(f"the load generator failed: {out}")
            said.append(json.loads(out))
        after = [sum(map(cpu_seconds, pids)) for pids in kinds]
        costs = [(late - early) / records * 1e6 for early, late in zip(before, after, strict=True)]
        return Found(
            records / max(one["seconds"] for one in said),
            *costs,
            sum(one["cpuSeconds"] for one in said) / records * 1e6,
        )


def main() -> None:
    """Measures, and prints."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--records", type=int, default=12_000_000)
    arguments.add_argument("--rounds", type=int, default=3)
    given = arguments.parse_args()
    records, rounds = (400_000, 1) if given.quick else (given.records, given.rounds)
    say(
        f"{records} messages of one integer, {rounds} rounds; us of processor time for a record of each kind of process"
    )
    say(f"{'':24}{'million/s':>12}{'publisher':>12}{'consumer':>12}{'database':>12}{'load':>12}")
    cases = [(store, pairs) for pairs in (1, 2, 4) for store in ("SQLite", "ClickHouse")]
    with tempfile.TemporaryDirectory(prefix="ringoexp-bench-") as directory:
        try:
            house = ClickHouseServer(Path(directory, "clickhouse"))
        except pytest.skip.Exception as missing:  # as the tests do without it
            raise SystemExit(f"{missing}: apt install clickhouse-server, or have it in the PATH") from None
        try:
            found: dict[tuple[str, int], list[Found]] = {case: [] for case in cases}
            for _ in range(rounds):
                for store, pairs in cases:
                    found[store, pairs].append(run(records, pairs, house if store == "ClickHouse" else None))
        finally:
            house.kill()
    for (store, pairs), runs in found.items():
        rate, *costs = (statistics.median(figures) for figures in zip(*runs, strict=True))
        shown = "".join(f"{cost:12.3f}" for cost in costs)
        say(f"{store + ', ' + str(pairs) + ' consumer' + 's' * (pairs > 1):24}{rate / 1e6:12.2f}{shown}")


if __name__ == "__main__":
    main()
