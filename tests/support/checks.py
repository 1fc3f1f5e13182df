"""Parts of the fault tests: servers to kill, a load of producers, and a check of the database.

The check compares a database with the records that the producers sent and the number of acked records.
"""

import os
import random
import shutil
import signal
import sqlite3
import uuid
from array import array
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

import pytest

from ringolib import timing
from ringolib.client import outbox, producer
from ringolib.net import sockets, websocket_client
from support.both_producers import MakeProducer
from support.harness import DEADLINE, Blocked, ServerProcess, eventually, free_port
from support.proxy import Proxy

TIMEOUT = 0.5
"""Seconds after which either end drops a silent link, with SHORT_TIMES and `short_times`."""
SHORT_TIMES = (
    f"forward.link.ACK_TIMEOUT_SECONDS = {TIMEOUT}; forward.spool.ACK_TIMEOUT_SECONDS = {TIMEOUT};"
    "timing.BACKOFF_MAX_SECONDS = 0.2;"
    f"net.websocket_client.CONNECT_TIMEOUT = {TIMEOUT}; net.sockets.CLOSE_TIMEOUT = {TIMEOUT}"
)
"""The patch for servers."""


def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the same times for producers in this process, and a lower limit of unacked records."""
    monkeypatch.setattr(outbox, "STALL_TIMEOUT", TIMEOUT)
    monkeypatch.setattr(timing, "BACKOFF_MAX_SECONDS", 0.2)
    monkeypatch.setattr(outbox, "MAX_UNACKED", 20_000)
    monkeypatch.setattr(websocket_client, "CONNECT_TIMEOUT", TIMEOUT)
    monkeypatch.setattr(sockets, "CLOSE_TIMEOUT", TIMEOUT)


LINKS = ("client to publisher", "publisher to consumer")
VICTIMS = (("consumer",), ("publisher",), ("consumer", "publisher"))


class Servers:
    """A publisher and its consumer, with short timeouts. They keep their ports when they are killed and started again.

    If `proxied`, each is reached through a proxy, which `proxies` holds by the name of its link. If `spooling`, the
    publisher has a spool.
    """

    def __init__(self, directory: Path, proxied: bool = False, spooling: bool = False) -> None:
        self.database = directory / "c.db"
        self.spool = directory / "p.spool" if spooling else None
        self._directory = directory
        self._stack = ExitStack()
        ports = [free_port() for _ in range(2)]
        self.proxies: dict[str, Proxy] = {}
        front = ports
        if proxied:
            self.proxies = {link: Proxy(port) for link, port in zip(LINKS, ports, strict=True)}
            front = [self._stack.enter_context(proxy).port for proxy in self.proxies.values()]
        self.url = f"ws://localhost:{front[0]}/v1.0/ingest"
        self._flags = {
            "consumer": ["-I", "false", "-p", str(ports[1]), "-D", self.database.name],
            "publisher": ["-p", str(ports[0]), "-T", str(front[1])],
        }
        if self.spool:
            self._flags["publisher"] += ["-S", self.spool.name]
        self.running: dict[str, ServerProcess] = {}

    def __enter__(self) -> "Servers":
        self.start("consumer", "publisher")
        return self

    def __exit__(self, *unused: object) -> None:
        self.kill(*self.running)
        self._stack.close()
        for errors in self._directory.glob("stderr-*"):
            assert "Traceback" not in errors.read_text()

    def start(self, *roles: str, patch: str = "pass") -> None:
        """Start the servers of these roles. `patch` is run in them first."""
        for role in roles:
            self.running[role] = ServerProcess(self._directory, *self._flags[role], patch=f"{SHORT_TIMES}; {patch}")

    def problems(self, load: "Load", still: Collection[str]) -> list[str]:
        """Return how the databases break the promise for the records acked now. The servers in `still` do not run."""
        acked = load.acked()  # before the databases are read
        # Read the spool first: a record that leaves it later is already at the consumer.
        spooled = spans(self.spool, "publisher" in still) if self.spool else {}
        return problems(self.database, load.sent, acked, "consumer" in still, whole=False, elsewhere=spooled)

    def kill(self, *roles: str) -> None:
        """Kill the servers of these roles. Signal all of them before waiting for the first."""
        for role in roles:
            self.running[role].send_signal(signal.SIGKILL)
        for role in roles:
            self.running[role].kill()

    def stop(self, *roles: str) -> None:
        """Stop all threads of these servers until `go_on`, and return when they are stopped."""
        for role in roles:
            self.running[role].send_signal(signal.SIGSTOP)
        for role in roles:
            os.waitid(os.P_PID, self.running[role].process.pid, os.WSTOPPED)

    def go_on(self, *roles: str) -> None:
        """Continue stopped servers."""
        for role in roles:
            self.running[role].send_signal(signal.SIGCONT)


class Load:
    """Producers that send a few random values at a time until `finish`. `sent` holds the values by source."""

    def __init__(
        self, url: str, rng: random.Random, producers: int = 3, make_producer: MakeProducer = producer.Producer
    ) -> None:
        self.sent: dict[uuid.UUID, array[int]] = {}
        self.producers = [make_producer(url) for _ in range(producers)]
        self._done = Event()
        self._feeders = []
        for sender in self.producers:
            self.sent[sender.source] = array("q")
            seed = rng.getrandbits(64)
            self._feeders.append(Blocked(partial(self._feed, sender, random.Random(seed))))

    def _feed(self, sender: Any, rng: random.Random) -> None:
        while not self._done.wait(rng.uniform(0, 0.03)):  # the rate of the load
            values = array("q", rng.randbytes(8 * rng.choice((1, 10, 100, 300))))
            self.sent[sender.source] += values
            sender.send(values)

    def __enter__(self) -> "Load":
        return self

    def __exit__(self, *unused: object) -> None:
        self._done.set()
        for sender, feeder in zip(self.producers, self._feeders, strict=True):
            sender.close()
            assert not feeder.still(DEADLINE)

    def acked(self) -> dict[uuid.UUID, int]:
        """Return the number of acked records by source."""
        return {sender.source: sender.acked for sender in self.producers}

    def reconnects(self) -> int:
        """Return the number of reconnects of all producers."""
        return sum(sender.reconnects for sender in self.producers)

    def goes_on(self) -> None:
        """Wait until every producer has received new acks."""
        before = self.acked()

        def all_acked_more() -> bool:
            for feeder in self._feeders:
                assert feeder.still(0) or feeder.result(), "a producer has failed"
            return all(count > before[source] for source, count in self.acked().items())

        eventually(all_acked_more, "new acks for every producer")

    def finish(self) -> None:
        """Stop sending, and wait until all records are acked."""
        self._done.set()
        for feeder in self._feeders:
            feeder.result(60)
        for sender in self.producers:
            sender.flush(60)
        assert self.acked() == {source: len(values) for source, values in self.sent.items()}

    def problems(self, database: Path, dead: bool = False, whole: bool = False) -> list[str]:
        """Return how the database breaks the promise for the records acked now."""
        acked = self.acked()  # before the database is read
        return problems(database, self.sent, acked, dead, whole)


def problems(
    database: Path,
    sent: Mapping[uuid.UUID, "array[int]"],
    acked: Mapping[uuid.UUID, int],
    dead: bool = False,
    whole: bool = True,
    elsewhere: Mapping[uuid.UUID, Sequence[tuple[int, int]]] | None = None,
) -> list[str]:
    """Return how the database breaks the promise: the first `acked` records of each source are stored, once, as sent.

    If its writer is `dead`, killed or stopped, a copy of the files is read, so that recovery does not change them.
    `whole` checks the values and the file as well; it takes ten times as long. Records `elsewhere`, in a spool, are not
    missing.
    """
    errors = []
    with _reader(database, dead) as reader:
        batches = reader.execute(
            "SELECT uuid, sequence, count, first_id FROM batch LEFT JOIN source ON source.id = source_id"
            " ORDER BY first_id"
        ).fetchall()
        records, highest = reader.execute("SELECT count(*), coalesce(max(id), 0) FROM record").fetchone()
        if whole:
            errors += [message for (message,) in reader.execute("PRAGMA quick_check") if message != "ok"]
            values = array("q", (value for (value,) in reader.execute("SELECT value FROM record ORDER BY id")))
    at = 0
    stored: dict[uuid.UUID, list[tuple[int, int]]] = defaultdict(list)
    for name, sequence, count, first_id in batches:
        source = uuid.UUID(bytes=name or bytes(16))
        stored[source].append((sequence, sequence + count))
        if first_id != at + 1:
            errors.append(f"ids: a batch begins at {first_id}, not {at + 1}")
        if whole and values[at : at + count] != sent.get(source, array("q"))[sequence : sequence + count]:
            errors.append(f"{source}: of the records from {sequence} on, {count}, some were never sent")
        at += count
    if not at == records == highest:
        errors.append(f"ids: {at} records in batches, {records} in all, the last is {highest}")
    for source in {*stored, *acked}:
        end = 0
        for first, after in sorted(stored[source]):
            if first < end:
                errors.append(f"{source}: records {first} to {min(end, after) - 1} are stored twice")
            end = max(end, after)
        end = 0
        anywhere = [*stored[source], *(elsewhere or {}).get(source, ())]
        for first, after in [*sorted(anywhere), (acked.get(source, 0), 0)]:
            if first > end < acked.get(source, 0):
                errors.append(f"{source}: records {end} to {min(first, acked[source]) - 1} are acked and not stored")
            end = max(end, after)
    return errors


def spans(database: Path, dead: bool) -> dict[uuid.UUID, list[tuple[int, int]]]:
    """Return the records of each source in a database as intervals `[first, end)`."""
    intervals: dict[uuid.UUID, list[tuple[int, int]]] = defaultdict(list)
    with _reader(database, dead) as reader:
        for name, sequence, count in reader.execute(
            "SELECT uuid, sequence, count FROM batch JOIN source ON source.id = source_id"
        ):
            intervals[uuid.UUID(bytes=name)].append((sequence, sequence + count))
    return intervals


@contextmanager
def _reader(database: Path, dead: bool) -> Iterator[sqlite3.Connection]:
    """Open a connection that sees one state of the database."""
    with TemporaryDirectory(dir=database.parent) as copies:
        if dead:
            for path in database.parent.glob(f"{database.name}*"):
                if not path.name.endswith(("-shm", "-lock")):
                    shutil.copy(path, copies)
            database = Path(copies) / database.name
        with closing(sqlite3.connect(f"file:{database}?mode={'rw' if dead else 'ro'}", uri=True)) as reader:
            reader.execute("BEGIN")
            yield reader
