"""A model of records in doubt: the real ring, forwarder, destinations, links and discovery, in a simulated world.

The threads take turns (`support.turns`), the stores are in memory, and a seed decides about the network and the faults.

A record that was sent to a store may be there. From then on it must not be sent to a store that is certainly another
one. If it is unknown whether it is another one, only the same destination may send the record there. In no other way
may a record get into two stores.
"""

import inspect
import socket
import sys
import textwrap
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from random import Random
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
from support.harness import MEASURED, seeded
from support.turns import Turns

import ringbuffer
from ringbuffer import Closed, Full, Ring
from ringolib import timing
from ringolib.app import make_destination
from ringolib.forward import destination as destination_module
from ringolib.forward import discovery, workers
from ringolib.forward import link as link_module
from ringolib.forward.destination import Destination
from ringolib.forward.discovery import Consumers
from ringolib.forward.link import LinkSink
from ringolib.forward.workers import Forwarder
from ringolib.net import addresses
from ringolib.net.addresses import Endpoint
from ringolib.net.credentials import Credentials
from ringolib.net.websocket import HandshakeError
from ringolib.wire import Block, decode_batch, encode_ack

MODULES = ringbuffer, workers, destination_module, discovery, timing, link_module
"""The modules under test. In all but the last, a thread may lose its turn before every line."""
Record = tuple[bytes, int]


class Database:
    """A store behind one consumer or several. If `identity` is None, its consumers report no identity."""

    def __init__(self, name: str, identity: str | None) -> None:
        self.name = name
        self.identity = identity
        self.records: dict[Record, int] = {}
        self.late: list[dict[Record, int]] = []  # sent and not stored yet; the sender may have given up

    def __repr__(self) -> str:
        return f"{self.name} ({self.identity})"


class Sent(NamedTuple):
    """A record was sent to this store by this destination, so it may be there."""

    store: Database
    destination: Destination

    def __repr__(self) -> str:
        return f"{self.store} by {self.destination.endpoint}"


def records_of(block: Block) -> dict[Record, int]:
    values = iter(block.values)
    return {(run.source, run.first + n): next(values) for run in block.runs for n in range(run.count)}


class Wire:
    """A connection of the simulated world, in place of `websocket.ClientConnection`."""

    at_fault = False

    def __init__(self, world: "World", host: str, opened: Callable[[Any], None]) -> None:
        self.cut = False
        self.ending: tuple[int, str] | None = None
        self._world = world
        self._data = b""
        self._sent = 0
        self._timeout: float | None = None
        opened(self)
        world.turns.switch(0.3)
        self.database = world.connected(self, host)
        self.store = self.database.identity

    # As a socket.

    @property
    def sock(self) -> "Wire":
        return self

    def settimeout(self, seconds: float) -> None:
        self._timeout = seconds

    def setblocking(self, blocking: bool) -> None: ...

    def close(self) -> None:
        self.cut = True

    def shutdown(self, how: int) -> None:
        self.cut = True

    # As a connection.

    def abort(self) -> None:
        self.cut = True

    def finish(self, code: int, reason: str) -> None:
        self.cut = True

    def ping(self) -> None:
        if self.cut:
            raise BrokenPipeError

    def send_bytes(self, message: bytes) -> None:
        world, block = self._world, decode_batch(message)
        records = records_of(block)
        world.turns.switch(0.3)
        fate = world.fate()
        world.on_sent(self.database, records, stays=fate != "goodbye" or self.cut)
        if self.cut:
            raise BrokenPipeError  # the sender cannot know that nothing has arrived
        self._sent += len(records)
        if fate == "late" and world.calm:
            fate = "stored"
        if fate in ("stored", "lost", "mute", "stored, bug", "stored, full"):
            world.turns.switch(0.3)
            world.keep(self.database, records)
        if fate == "stored":
            self._data += encode_ack(self._sent)
        elif fate == "late":
            self.database.late.append(records)
        elif fate == "goodbye":
            self.ending = 1001, "stops"
        elif fate.endswith("full"):
            self.ending = 1011, "disk full"
        elif fate in ("lost", "gone"):
            self.cut = True
        elif fate.endswith("bug"):
            raise ZeroDivisionError("a bug, in a connection")
        world.turns.switch(0.3)

    def read(self, wait: bool = True) -> bytes | None:
        if wait:
            self._world.turns.block(lambda: bool(self._data or self.cut or self.ending), self._timeout)
        data, self._data = self._data, b""
        if data:
            return data
        if self.ending:
            return b"closing" if wait else b""
        if self.cut:
            return b""
        if wait:
            raise TimeoutError("timed out")
        return None

    def parse(self, data: bytes) -> list[Any]:
        return [SimpleNamespace(payloads=data)] if len(data) == 8 else []


class World:
    """Names, addresses, the stores behind them, and one publisher, all chosen by `seed`.

    While the world is not `calm`, links fail, consumers are unreachable, addresses move to other stores, and names get
    other addresses. If `traced`, threads may lose their turn before every line.
    """

    def __init__(self, seed: int, traced: bool = False, one_address_left: bool = False) -> None:
        self.rng = rng = Random(seed)
        files = tuple(f"{module.__name__.rpartition('.')[2]}.py" for module in MODULES[:-1]) if traced else ()
        self.turns = Turns(rng, rng.choice((0.02, 0.1, 0.3)), 50_000, files)
        self.calm = self.stopping = False
        self.may_have: dict[Record, list[Sent]] = {}
        self.excused: set[Record] = set()  # may be in two stores, as a store without an identity had them
        self.dropped: set[Destination] = set()  # at some time
        self.destination_of: dict[threading.Thread, Destination] = {}  # of each worker
        self.was_fixed: dict[threading.Thread, bool] = {}  # its destination, when it took its batch
        self.links: list[Wire] = []
        self.unreachable: set[str] = set()  # hosts
        self.seen: dict[str, int] = {}
        self.faults = rng.choice((0.1, 0.3, 0.6))
        self.buggy = rng.random() < 0.3
        self.fates = [fate for fate in FATES if rng.random() < 0.6 and (self.buggy or "bug" not in fate)]

        count = rng.randrange(1, 5)
        silent = rng.choice((0, 0, 0.3, 1))
        self.stores = [Database(f"{n}", None if rng.random() < silent else f"store {n}") for n in range(count)]
        self.addresses = [f"10.0.0.{n}" for n in range(1, count + rng.randrange(3) + 1)]
        self.behind = {address: rng.choice(self.stores) for address in self.addresses}
        self.weights = [rng.choice((0, 1, 3)) + 0.1 for _ in range(5)]  # of the changes in `change_something`
        self.names: dict[str, list[str]] = {}
        if rng.random() < 0.8:
            self.names["name"] = self._some_addresses()
        if one_address_left:
            self.names["name"] = []
        more = rng.choice((0, len(self.addresses))) if self.names else len(self.addresses)
        self.hosts = [*self.names, *rng.sample(self.addresses, rng.randrange(not self.names, more + 1))]
        # One name that had several addresses and has one now, which may have become another consumer's.
        self.one_address_left = one_address_left or (self.hosts == ["name"] and rng.random() < 0.7)
        if self.one_address_left:
            self.hosts = ["name"]
            self.names["name"], self.weights[3] = self.addresses[:1], 0

        capacity = rng.choice((1, 2, 3, 5, 8, 16))
        self.max_workers = rng.randrange(1, 7)
        self.max_batch = rng.randrange(1, 6)
        self.few_threads = rng.random() < 0.15
        with self.patched():
            self.ring = WatchedRing(self, capacity)

    def patched(self) -> ExitStack:
        """Put the modules under test into this world, until the stack is closed."""
        stack = ExitStack()
        for module in MODULES:
            if hasattr(module, "threading"):
                stack.enter_context(patch.object(module, "threading", self.turns))
            if hasattr(module, "monotonic"):
                stack.enter_context(patch.object(module, "monotonic", self.turns.monotonic))
            if hasattr(module, "wait_until") and module is not timing:
                stack.enter_context(patch.object(module, "wait_until", self.turns.watched(timing.wait_until)))
        for owner, name, replacement in [
            (timing, "random", self.rng),
            (addresses.socket, "getaddrinfo", self.resolve),
            (link_module, "ClientConnection", self.connect),
            (link_module, "peer_address", lambda *unused: None),
            (link_module, "encode_batch", self.encode),
            (workers, "fatal", fatal),
        ]:
            stack.enter_context(patch.object(owner, name, replacement))
        return stack

    # The network.

    def _some_addresses(self) -> list[str]:
        return self.rng.sample(self.addresses, self.rng.choice((1, self.rng.randrange(1, len(self.addresses) + 1))))

    def resolve(self, host: str, port: int, *unused: Any, **more: Any) -> list[Any]:
        if not self.calm and self.chance(0.1):
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in self.names[host]]

    def chance(self, probability: float) -> bool:
        return not self.calm and self.rng.random() < probability * self.faults

    def encode(self, runs: Any, values: Any) -> bytes:
        if self.buggy and self.chance(0.1):
            self.on_unexpected(runs, values)
            raise MemoryError
        return _encode_batch(runs, values)

    def connect(self, endpoint: Endpoint, *rest: Any) -> Wire:
        return Wire(self, endpoint.host, rest[-1])

    def connected(self, wire: Wire, host: str) -> Database:
        address = self.rng.choice(self.names[host]) if host in self.names else host
        if address in self.unreachable or self.chance(0.2):
            raise self.rng.choice(
                (ConnectionRefusedError("refused"), HandshakeError("refused with HTTP status 503", 503))
            )
        if self.buggy and self.chance(0.05):
            raise ZeroDivisionError("a bug, while it connects")
        self.links.append(wire)
        return self.behind[address]

    def fate(self) -> str:
        return self.rng.choice(self.fates) if self.fates and self.chance(0.5) else "stored"

    def cut(self, probability: float) -> None:
        for wire in self.links:
            if self.rng.random() < probability:
                wire.cut = True
        self.links = [wire for wire in self.links if not wire.cut]

    def change_something(self) -> None:
        rng = self.rng
        (change,) = rng.choices(("cut", "reach", "move", "name", "late"), self.weights)
        if change == "cut":
            self.cut(rng.choice((0.2, 1)))
        elif change == "reach":
            self.unreachable.symmetric_difference_update(rng.sample(self.addresses, 1))
        elif change == "move":
            movable = self.addresses[:1] if self.one_address_left else self.addresses
            self.behind[rng.choice(movable)] = rng.choice(self.stores)
            if rng.random() < 0.5:
                self.cut(1)
        elif change == "name" and self.names:
            self.names["name"] = self._some_addresses()
        elif change == "late":
            self.deliver()

    def deliver(self) -> None:
        """A late message arrives at each store, or is lost."""
        for store in self.stores:
            if store.late:
                records = store.late.pop(self.rng.randrange(len(store.late)))
                if self.rng.random() < 0.7:
                    self.keep(store, records)

    def settle(self) -> None:
        """End all faults. Each store with an identity is now behind an address of one of the hosts."""
        self.calm = True
        self.unreachable.clear()
        if "name" in self.names:
            self.names["name"] = list(self.addresses)
        named = sorted({*self.hosts, *self.names.get("name", ())} - {"name"})
        known = [store for store in self.stores if store.identity]
        self.rng.shuffle(named)
        self.behind.update(zip(named, known, strict=False))
        self.cut(1)

    # The checks.

    def on_sent(self, store: Database, records: dict[Record, int], stays: bool) -> None:
        """Check that these records may be sent to this store. `stays`: from now on they may be there."""
        destination, fixed = self.destination_of[threading.current_thread()], self.was_fixed[threading.current_thread()]
        for record in records:
            before = self.may_have.get(record, [])
            here = [sent for sent in before if sent.store is store]
            # A fixed destination is the same consumer, whichever store it has now.
            same_consumer = fixed and any(sent.destination is destination for sent in before)
            if before and not here:
                known = [sent for sent in before if sent.store.identity and store.identity]
                if known and not same_consumer:
                    self.turns.fail(f"{record} may be in {before}, and goes to {store}")
                if not any(sent.destination is destination for sent in before):
                    self.turns.fail(f"{record} goes to another destination: {before}, and goes to {store}")
                self.excused.add(record)
                self.count("uncertain")
            if before:
                self.count("again")
            if stays:
                if same_consumer and store.identity:
                    before = here
                self.may_have[record] = [*before, Sent(store, destination)]

    def on_unexpected(self, runs: Any, values: Any) -> None:
        """An unexpected error is raised: the program must assume that the records were sent."""
        wire = self.link_of[threading.current_thread()]
        if wire:
            self.on_sent(wire.database, records_of(Block(runs, values)), stays=True)

    def keep(self, store: Database, records: dict[Record, int]) -> None:
        for record, value in records.items():
            if value != value_of(record):
                self.turns.fail(f"{record} has the value {value}")
            if record not in store.records and record not in self.excused and self.is_stored([record]):
                self.turns.fail(f"{record} is stored twice")
            store.records[record] = value

    def is_fixed(self, destination: Destination) -> bool:
        """True if this is always the same consumer: the user named it, and the name has no other addresses."""
        assert destination.endpoint
        return destination.endpoint.host == destination.endpoint.name and destination not in self.dropped

    def is_stored(self, records: Sequence[Record] | dict[Record, int]) -> bool:
        return all(any(record in store.records for store in self.stores) for record in records)

    def check_invariants(self) -> None:
        with self.ring._lock:
            committed, reserved, cursor = self.ring._committed, self.ring._reserved, self.ring._cursor
            assert committed <= reserved <= cursor <= committed + self.ring.capacity
            assert self.ring._aside_size == sum(map(len, self.ring._aside)) <= self.ring.capacity
        stats = self.ring.stats()
        assert stats.committed <= stats.reserved <= stats.cursor <= stats.committed + stats.capacity
        assert 0 <= stats.stored <= stats.cursor and 0 <= stats.in_flight <= stats.depth
        for destination in self.forwarder.destinations:
            prober: Any = destination.breaker._prober
            assert prober is None or prober.is_alive() or self.stopping, "the prober has ended"

    def is_settled(self) -> bool:
        """True if each named consumer, and no other, has workers, and if a prober is one of them."""
        forwarder = self.forwarder
        owners = [owner for thread, (owner, _) in forwarder._workers.items() if thread in forwarder._working]
        for destination in forwarder.destinations:
            # With nothing to store, a prober may still be one although all is well.
            prober: Any = destination.breaker._prober
            if destination.dropped or not owners.count(destination) == destination.workers >= 1:
                return False
            if prober and (prober not in forwarder._working or forwarder._workers[prober][0] is not destination):
                return False
        destinations = set(forwarder.destinations)
        named = set(self.consumers._destinations.values())
        return destinations == named and len(owners) <= max(self.max_workers, len(destinations))

    def count(self, event: str) -> None:
        self.seen[event] = self.seen.get(event, 0) + 1

    # The publisher.

    def _make_destination(self, endpoint: Endpoint, on_link_lost: Callable[[], None]) -> Destination:
        settings: Any = SimpleNamespace(consumers=[(host, 1) for host in self.hosts])

        def make_link(endpoint: Endpoint, connected: Callable[[], None]) -> LinkSink:
            return WatchedLink(self, endpoint, connected)

        return make_destination(settings, None, make_link, endpoint, on_link_lost)

    def produce(self, number: int, blocks: int) -> None:
        """A client: it sends blocks, and often waits until they are stored."""
        source, first, rng = bytes([number]) * 16, 0, self.rng
        try:
            for _ in range(blocks):
                size = rng.randrange(1, 2 * self.ring.capacity + 2)
                since = self.ring.cursor
                records = {(source, n): value_of((source, n)) for n in range(first, first + size)}
                while records:
                    values = array("q", records.values())
                    try:
                        end = self.ring.put(values, source, first, rng.choice((None, 5)))
                        accepted = len(values)
                    except Full as full:
                        end, accepted = 0, full.accepted
                    first += accepted
                    self.put.update(dict(list(records.items())[:accepted]))
                    records = dict(list(records.items())[accepted:])
                if rng.random() < 0.5 and self.ring.wait_committed(end, rng.choice((None, 1)), since):
                    mine = [(source, n) for n in range(first - len(values), first)]
                    assert self.is_stored(mine), "acked, and not stored"
        except Closed:
            assert self.stopping

    def play(self) -> None:
        """Run with faults, then without, then stop; or stop in the middle."""
        rng, turns = self.rng, self.turns
        self.put: dict[Record, int] = {}
        self.link_of: dict[threading.Thread, Wire | None] = {}
        self.consumers = None
        while self.consumers is None:
            try:
                self.consumers = Consumers([(host, 1) for host in self.hosts], self._make_destination)
            except addresses.AddressError:
                continue
        if self.one_address_left:
            self.consumers.destinations[0].fixed = False
            self.dropped.update(self.consumers.destinations)
        self.forwarder = WatchedForwarder(
            self, self.ring, self.consumers.destinations, self.max_workers, self.max_batch
        )
        turns.may_start = lambda name: (
            not (self.few_threads and name.startswith("forward-") and self.chance(0.5) and not self.count("no thread"))
        )
        self.consumers.start(self.forwarder)
        producers = [
            turns.Thread(self.produce, (n, rng.choice((3, 10, 20))), f"produce-{n}") for n in range(rng.randrange(1, 4))
        ]
        for producer in producers:
            producer.start()
        for _ in range(rng.randrange(10, 80)):
            self.change_something()
            turns.sleep(rng.choice((0.001, 0.01, 0.1, 1, 1, 15)))
            self.check_invariants()
        if rng.random() < 0.2:
            self.count("aborted")
            self.stopping = True
            self.stop()
            return
        self.settle()
        for _ in range(20):
            turns.sleep(rng.random())
            self.deliver()
            self.check_invariants()
        for producer in producers:
            producer.join()
        assert self.ring.join()
        assert not self.ring.marks() and self.ring.stats().stored == self.ring.cursor == len(self.put)
        turns.block(self.is_settled)
        while any(store.late for store in self.stores):
            self.deliver()
        for record in self.put:
            times = sum(record in store.records for store in self.stores)
            assert times == 1 or (times > 1 and record in self.excused), f"{record} is stored {times} times"
        self.ring.close()
        self.stopping = True
        self.stop()

    def stop(self) -> None:
        if not self.ring.join(0) or self.rng.random() < 0.5:
            self.ring.abort()
        self.consumers.stop(1)
        assert self.forwarder.stop(1e9), f"still running: {self.turns.describe()}"
        assert self.forwarder.stats().workers == 0 and not self.forwarder._workers
        self.check_invariants()

    def run(self) -> None:
        """Play, and raise the error of any thread."""
        try:
            with self.patched():
                try:
                    self.play()
                finally:
                    self.turns.end()
        finally:
            if self.turns.error:
                raise self.turns.error


_encode_batch = link_module.encode_batch


def fatal(log: object, part: str) -> None:
    """Raise the error that is being handled, which ends the run, where the program would end the process."""
    raise


FATES = ["lost", "gone", "late", "mute", "goodbye", "full", "stored, full", "bug", "stored, bug"]
"""Of a block that is sent, apart from "stored"."""


def value_of(record: Record) -> int:
    return record[0][0] << 32 | record[1]


class WatchedLink(LinkSink):
    """The real sink, which may lose its turn when a worker asks whether it is ready."""

    def __init__(self, world: World, endpoint: Endpoint, connected: Callable[[], None]) -> None:
        super().__init__(endpoint.host, endpoint.port, connected, credentials=Credentials(), name=endpoint.name)
        self._world = world

    @property
    def ready(self) -> bool:
        self._world.turns.switch()
        return super().ready

    def store(self, block: Block) -> None:
        self._world.link_of[threading.current_thread()] = self._link  # type: ignore[assignment]
        super().store(block)


class WatchedRing(Ring):
    """The real ring, which reports the worker that takes a batch, and checks each commit."""

    def __init__(self, world: World, capacity: int) -> None:
        super().__init__(capacity)
        self._world = world

    def reserve(self, limit: int, timeout: Any = None, accepts: Callable[[object], bool] | None = None) -> Any:
        world, me = self._world, threading.current_thread()
        destination = world.destination_of[me]
        world.was_fixed[me] = world.is_fixed(destination)

        def watched(mark: object) -> bool:
            assert accepts
            world.was_fixed[me] = world.is_fixed(destination)
            return accepts(mark)

        return super().reserve(limit, timeout, accepts and watched)

    def commit(self, batch: ringbuffer.Batch) -> None:
        if not self._world.is_stored(records_of(Block(batch.runs, batch.values))):
            self._world.turns.fail("committed, and not stored")
        super().commit(batch)

    def _read(self, start: int, end: int) -> "array[int]":
        if self._world.buggy and self._world.chance(0.05):
            raise MemoryError
        return super()._read(start, end)


class WatchedForwarder(Forwarder):
    """The real forwarder, which reports the destination of each worker."""

    def __init__(self, world: World, *arguments: Any) -> None:
        self._world = world
        super().__init__(*arguments)

    def change(self, added: Sequence[Destination], dropped: Sequence[Destination]) -> None:
        super().change(added, dropped)
        self._world.dropped.update(dropped)

    def step(self, destination: Destination, sink: Any) -> bool:
        self._world.destination_of[threading.current_thread()] = destination
        return super().step(destination, sink)


def run_worlds(number: int, traced: bool = False) -> None:
    seed, seen = seeded(), Counter[str]()
    for turn in range(number):
        world = World(seed + turn, traced)
        try:
            world.run()
        except BaseException:
            print(f"in the world of RINGOEXP_SEED={seed + turn}")
            raise
        seen.update(world.seen)
    print(number, "worlds", dict(seen))
    assert seen["again"] > number and seen["uncertain"] and seen["aborted"], "too few records were in doubt"


@pytest.mark.slow
def test_records_in_doubt_go_to_no_other_store_and_are_stored_once() -> None:
    run_worlds(100)


@pytest.mark.long
@pytest.mark.parametrize("traced", [False, pytest.param(True, marks=pytest.mark.skipif(MEASURED, reason="traces"))])
def test_records_in_doubt_go_to_no_other_store_in_many_worlds(traced: bool) -> None:
    run_worlds(200 if traced else 1500, traced)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "good", "bad"),
    [
        pytest.param(Forwarder, "_store", "else sink.identity", "else None", id="a bug loses the store's identity"),
        pytest.param(
            Forwarder,
            "_forward_batch",
            "batch.mark is not None and not sink.ready",
            "False",
            id="a batch in doubt is sent without a link",
        ),
        pytest.param(
            Forwarder, "step", " or self._ring.has_marked", "", id="the only destination ignores batches in doubt"
        ),
        pytest.param(
            Forwarder, "_store", "except NotStored", "except (NotStored, InDoubt)", id="no batch is ever in doubt"
        ),
        pytest.param(
            Forwarder,
            "change",
            "destination.dropped, destination.fixed = True, False",
            "destination.dropped = True",
            id="a dropped destination stays fixed",
        ),
        pytest.param(
            Forwarder, "_leave", " or self._ring.has_marked_for(accepts)", "", id="a worker leaves batches in doubt"
        ),
        pytest.param(Forwarder, "_retire", "destination.breaker.resign()", "pass", id="a retired worker stays prober"),
        pytest.param(Destination, "accepts", "mark.destination is self and", "", id="any destination accepts a pin"),
        pytest.param(
            Ring, "requeue", "self._not_empty.notify_all()", "self._not_empty.notify()", id="the wrong worker is woken"
        ),
        pytest.param(
            LinkSink, "_cannot_be_stored", "link.ending[0] == GOING_AWAY", "True", id="any goodbye is trusted"
        ),
    ],
)
def test_model_detects_a_fault_put_into_the_program(owner: type, name: str, good: str, bad: str) -> None:
    """One line of the program is changed. The first two faults were real ones."""
    source = textwrap.dedent(inspect.getsource(getattr(owner, name)))
    assert good in source
    namespace: dict[str, Any] = {}
    code = "from __future__ import annotations\n" + source.replace(good, bad)
    exec(compile(code, "<a fault>", "exec"), vars(sys.modules[owner.__module__]), namespace)
    with patch.object(owner, name, namespace[name]), pytest.raises(AssertionError):
        for seed in range(1000):
            World(seed, one_address_left=bad == "False").run()
