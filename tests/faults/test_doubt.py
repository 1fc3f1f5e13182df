"""What is in doubt goes to no other store, whatever happens in whichever order: the ring, the forwarder, the destinations,
the links and the names as they are, with threads that take turns, stores in memory, and a network that is drawn.

A record that was sent may be where it was sent to. From then on it is sent to no store that certainly is another one;
if it is not known whether it is, then only by the same destination. Nothing else may put it into two stores.
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
from ringolib.app import make_destination
from ringolib.forward import destination as destinations
from ringolib.forward import discovery as consumers
from ringolib.forward import link as sinks
from ringolib.forward import workers as forwarder
from ringolib.forward.destination import Destination
from ringolib.forward.discovery import Consumers
from ringolib.forward.link import LinkSink
from ringolib.forward.workers import Forwarder
from ringolib.net import addresses
from ringolib.net import websocket as websock
from ringolib.net.addresses import Endpoint
from ringolib.net.credentials import Credentials
from ringolib.net.websocket import HandshakeError
from ringolib.wire import Block, decode_batch, encode_ack

ROOMS = ringbuffer, forwarder, destinations, consumers, sinks
Record = tuple[bytes, int]


class Database:
    """A store behind one consumer or several. One without an identity does not say which it is."""

    def __init__(self, name: str, identity: str | None) -> None:
        self.name = name
        self.identity = identity
        self.records: dict[Record, int] = {}
        self.late: list[dict[Record, int]] = []  # still on their way, though nobody waits for them any more

    def __repr__(self) -> str:
        return f"{self.name} ({self.identity})"


class Sent(NamedTuple):
    """Where a record may be: it was sent to this store by this destination."""

    store: Database
    destination: Destination

    def __repr__(self) -> str:
        return f"{self.store} by {self.destination.place}"


def records_of(block: Block) -> dict[Record, int]:
    values = iter(block.values)
    return {(run.source, run.first + n): next(values) for run in block.runs for n in range(run.count)}


class Wire:
    """In place of `websock.ClientConnection`: a connection of this world."""

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
        self.there = world.connected(self, host)
        self.store = self.there.identity

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
        world.sent(self.there, records, stays=fate != "goodbye" or self.cut)
        if self.cut:
            raise BrokenPipeError  # that nothing has arrived nobody can know
        self._sent += len(records)
        if fate == "late" and world.calm:
            fate = "stored"
        if fate in ("stored", "lost", "mute", "stored, bug", "stored, full"):
            world.turns.switch(0.3)
            world.keep(self.there, records)
        if fate == "stored":
            self._data += encode_ack(self._sent)
        elif fate == "late":
            self.there.late.append(records)
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
    """Names, addresses and the stores behind them, and one publisher, all drawn from `seed`.

    While it is not `calm` links fail, stores are away, addresses become other stores' and names get other addresses.
    """

    def __init__(self, seed: int, fine: bool = False, again_one: bool = False) -> None:
        self.rng = rng = Random(seed)
        rooms = tuple(f"{room.__name__.rpartition(chr(46))[2]}.py" for room in ROOMS[:4]) if fine else ()
        self.turns = Turns(rng, rng.choice((0.02, 0.1, 0.3)), 50_000, rooms)
        self.calm = self.stopping = False
        self.may_have: dict[Record, list[Sent]] = {}
        self.excused: set[Record] = set()
        self.dropped: set[Destination] = set()  # at some time
        self.by: dict[threading.Thread, Destination] = {}  # whose turn a worker does
        self.was_fixed: dict[threading.Thread, bool] = {}  # its destination, when it took its batch
        self.links: list[Wire] = []
        self.away: set[str] = set()  # hosts
        self.seen: dict[str, int] = {}
        self.faults = rng.choice((0.1, 0.3, 0.6))
        self.buggy = rng.random() < 0.3
        self.rough = [each for each in _FATES if rng.random() < 0.6 and (self.buggy or "bug" not in each)]

        several = rng.randrange(1, 5)
        silent = rng.choice((0, 0, 0.3, 1))
        self.stores = [Database(f"{n}", None if rng.random() < silent else f"store {n}") for n in range(several)]
        self.addresses = [f"10.0.0.{n}" for n in range(1, several + rng.randrange(3) + 1)]
        self.behind = {each: rng.choice(self.stores) for each in self.addresses}
        self.likely = [rng.choice((0, 1, 3)) + 0.1 for _ in range(5)]  # which of what may change
        self.names: dict[str, list[str]] = {}
        if rng.random() < 0.8:
            self.names["name"] = self._some()
        if again_one:
            self.names["name"] = []
        more = rng.choice((0, len(self.addresses))) if self.names else len(self.addresses)
        self.hosts = [*self.names, *rng.sample(self.addresses, rng.randrange(not self.names, more + 1))]
        # One name that had several addresses for a while, and has one: it might become another consumer's by now.
        self.again_one = again_one or (self.hosts == ["name"] and rng.random() < 0.7)
        if self.again_one:
            self.hosts = ["name"]
            self.names["name"], self.likely[3] = self.addresses[:1], 0

        capacity = rng.choice((1, 2, 3, 5, 8, 16))
        self.most = rng.randrange(1, 7)
        self.batch = rng.randrange(1, 6)
        self.few_threads = rng.random() < 0.15
        with self.rooms():
            self.ring = TheRing(self, capacity)

    def rooms(self) -> ExitStack:
        """The rooms under test are in this world for a while."""
        stack = ExitStack()
        for room in ROOMS:
            stack.enter_context(patch.object(room, "threading", self.turns))
            if hasattr(room, "monotonic"):
                stack.enter_context(patch.object(room, "monotonic", self.turns.monotonic))
        for where, what, by in [
            (websock, "random", self.rng),
            (addresses.socket, "getaddrinfo", self.resolve),
            (sinks, "ClientConnection", self.connect),
            (sinks, "peer", lambda *unused: None),
            (sinks, "encode_batch", self.encode),
            (ringbuffer, "_wait_until", self.turns.noting(ringbuffer._wait_until)),
        ]:
            stack.enter_context(patch.object(where, what, by))
        return stack

    # The network.

    def _some(self) -> list[str]:
        return self.rng.sample(self.addresses, self.rng.choice((1, self.rng.randrange(1, len(self.addresses) + 1))))

    def resolve(self, host: str, port: int, *unused: Any, **more: Any) -> list[Any]:
        if not self.calm and self.chance(0.1):
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in self.names[host]]

    def chance(self, part: float) -> bool:
        return not self.calm and self.rng.random() < part * self.faults

    def encode(self, runs: Any, values: Any) -> bytes:
        if self.buggy and self.chance(0.1):
            self.supposed(runs, values)
            raise MemoryError
        return _encode_batch(runs, values)

    def connect(self, host: str, *rest: Any) -> Wire:
        return Wire(self, host, rest[-1])

    def connected(self, link: Wire, host: str) -> Database:
        address = self.rng.choice(self.names[host]) if host in self.names else host
        if address in self.away or self.chance(0.2):
            raise self.rng.choice(
                (ConnectionRefusedError("refused"), HandshakeError("refused with HTTP status 503", 503))
            )
        if self.buggy and self.chance(0.05):
            raise ZeroDivisionError("a bug, while it connects")
        self.links.append(link)
        return self.behind[address]

    def fate(self) -> str:
        return self.rng.choice(self.rough) if self.rough and self.chance(0.5) else "stored"

    def cut(self, part: float) -> None:
        for link in self.links:
            if self.rng.random() < part:
                link.cut = True
        self.links = [each for each in self.links if not each.cut]

    def unsettle(self) -> None:
        """Something changes."""
        rng = self.rng
        (what,) = rng.choices(("cut", "away", "move", "name", "late"), self.likely)
        if what == "cut":
            self.cut(rng.choice((0.2, 1)))
        elif what == "away":
            self.away.symmetric_difference_update(rng.sample(self.addresses, 1))
        elif what == "move":
            self.behind[rng.choice(self.addresses[:1] if self.again_one else self.addresses)] = rng.choice(self.stores)
            if rng.random() < 0.5:
                self.cut(1)
        elif what == "name" and self.names:
            self.names["name"] = self._some()
        elif what == "late":
            self.deliver()

    def deliver(self) -> None:
        """What was on its way arrives, or never does."""
        for store in self.stores:
            if store.late:
                records = store.late.pop(self.rng.randrange(len(store.late)))
                if self.rng.random() < 0.7:
                    self.keep(store, records)

    def settle(self) -> None:
        """All faults end. Each store that says which it is, is at an address that somebody names."""
        self.calm = True
        self.away.clear()
        if "name" in self.names:
            self.names["name"] = list(self.addresses)
        named = sorted({*self.hosts, *self.names.get("name", ())} - {"name"})
        known = [each for each in self.stores if each.identity]
        self.rng.shuffle(named)
        self.behind.update(zip(named, known, strict=False))
        self.cut(1)

    # What is checked.

    def sent(self, store: Database, records: dict[Record, int], stays: bool) -> None:
        """Records are sent to this store: may they be?"""
        destination, fixed = self.by[threading.current_thread()], self.was_fixed[threading.current_thread()]
        for record in records:
            before = self.may_have.get(record, [])
            at = [each for each in before if each.store is store]
            back = fixed and any(
                each.destination is destination for each in before
            )  # the same consumer, whatever it has now
            if before and not at:
                known = [each for each in before if each.store.identity and store.identity]
                if known and not back:
                    self.turns.fail(f"{record} may be in {before}, and goes to {store}")
                if not any(each.destination is destination for each in before):
                    self.turns.fail(f"{record} goes to another destination: {before}, and goes to {store}")
                self.excused.add(record)
                self.note("uncertain")
            if before:
                self.note("again")
            if stays:
                if back and store.identity:
                    before = at
                self.may_have[record] = [*before, Sent(store, destination)]

    def supposed(self, runs: Any, values: Any) -> None:
        """An error that nobody expected: the program has to suppose that the records were sent."""
        me = threading.current_thread()
        link = self.holds[me]
        if link:
            self.sent(link.there, records_of(Block(runs, values)), stays=True)

    def keep(self, store: Database, records: dict[Record, int]) -> None:
        for record, value in records.items():
            if value != value_of(record):
                self.turns.fail(f"{record} has the value {value}")
            if record not in store.records and record not in self.excused and self.stored([record]):
                self.turns.fail(f"{record} is stored twice")
            store.records[record] = value

    def is_fixed(self, destination: Destination) -> bool:
        """Whether this is one consumer for ever: somebody gave it this address, or name, and that has no others."""
        assert destination.place
        return destination.place.host == destination.place.name and destination not in self.dropped

    def stored(self, records: Sequence[Record] | dict[Record, int]) -> bool:
        return all(any(record in each.records for each in self.stores) for record in records)

    def look(self) -> None:
        """What is so at every moment."""
        with self.ring._lock:
            committed, reserved, cursor = self.ring._committed, self.ring._reserved, self.ring._cursor
            assert committed <= reserved <= cursor <= committed + self.ring.capacity
            assert self.ring._aside_size == sum(map(len, self.ring._aside)) <= self.ring.capacity
        stats = self.ring.stats()
        assert stats.committed <= stats.reserved <= stats.cursor <= stats.committed + stats.capacity
        assert 0 <= stats.stored <= stats.cursor and 0 <= stats.in_flight <= stats.depth
        for destination in self.running.destinations:
            prober: Any = destination.breaker._prober
            assert prober is None or prober.is_alive() or self.stopping, "who probes is gone"

    def settled(self) -> bool:
        """Each consumer that is named, and no other, has a worker, one that probes among them if there is any."""
        at = [
            destination for thread, (destination, _) in self.running._workers.items() if thread in self.running._working
        ]
        for destination in self.running.destinations:
            prober: Any = destination.breaker._prober  # with nothing to store it may not know yet that all is well
            if destination.leaving or not at.count(destination) == destination.workers >= 1:
                return False
            if prober and (prober not in self.running._working or self.running._workers[prober][0] is not destination):
                return False
        there = set(self.running.destinations)
        return there == set(self.consumers._destinations.values()) and len(at) <= max(self.most, len(there))

    def note(self, what: str) -> None:
        self.seen[what] = self.seen.get(what, 0) + 1

    # The publisher.

    def _make_destination(self, place: Endpoint, lost: Callable[[], None]) -> Destination:
        settings: Any = SimpleNamespace(consumers=[(host, 1) for host in self.hosts])

        def make_link(endpoint: Endpoint, connected: Callable[[], None]) -> LinkSink:
            return Link(self, endpoint, connected)

        return make_destination(settings, None, make_link, place, lost)

    def produce(self, number: int, most: int) -> None:
        """A client: sends, and often waits until that is stored."""
        source, first, rng = bytes([number]) * 16, 0, self.rng
        try:
            for _ in range(most):
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
                    assert self.stored(mine), "acked, and not stored"
        except Closed:
            assert self.stopping

    def play(self) -> None:
        """Faults, then none, then the end; or the end in the middle of it."""
        rng, turns = self.rng, self.turns
        self.put: dict[Record, int] = {}
        self.holds: dict[threading.Thread, Wire | None] = {}
        self.consumers = None
        while self.consumers is None:
            try:
                self.consumers = Consumers([(host, 1) for host in self.hosts], self._make_destination)
            except addresses.AddressError:
                continue
        if self.again_one:
            self.consumers.destinations[0].fixed = False
            self.dropped.update(self.consumers.destinations)
        self.running = TheForwarder(self, self.ring, self.consumers.destinations, self.most, self.batch)
        turns.may_start = lambda name: (
            not (self.few_threads and name.startswith("forward-") and self.chance(0.5) and not self.note("no thread"))
        )
        self.consumers.start(self.running)
        producers = [
            turns.Thread(self.produce, (n, rng.choice((3, 10, 20))), f"produce-{n}") for n in range(rng.randrange(1, 4))
        ]
        for each in producers:
            each.start()
        for _ in range(rng.randrange(10, 80)):
            self.unsettle()
            turns.sleep(rng.choice((0.001, 0.01, 0.1, 1, 1, 15)))
            self.look()
        if rng.random() < 0.2:
            self.note("aborted")
            self.stopping = True
            self.stop()
            return
        self.settle()
        for _ in range(20):
            turns.sleep(rng.random())
            self.deliver()
            self.look()
        for each in producers:
            each.join()
        assert self.ring.join()
        assert not self.ring.marks() and self.ring.stats().stored == self.ring.cursor == len(self.put)
        turns.block(self.settled)
        while any(each.late for each in self.stores):
            self.deliver()
        for record in self.put:
            times = sum(record in each.records for each in self.stores)
            assert times == 1 or (times > 1 and record in self.excused), f"{record} is stored {times} times"
        self.ring.close()
        self.stopping = True
        self.stop()

    def stop(self) -> None:
        if not self.ring.join(0) or self.rng.random() < 0.5:
            self.ring.abort()
        self.consumers.stop(1)
        assert self.running.stop(1e9), f"there still are {self.turns.waiting()}"
        assert self.running.stats().workers == 0 and not self.running._workers
        self.look()

    def run(self) -> None:
        """All of it. Raises what was found."""
        try:
            with self.rooms():
                try:
                    self.play()
                finally:
                    self.turns.end()
        finally:
            if self.turns.error:
                raise self.turns.error


_encode_batch = sinks.encode_batch
_FATES = ["lost", "gone", "late", "mute", "goodbye", "full", "stored, full", "bug", "stored, bug"]


def value_of(record: Record) -> int:
    return record[0][0] << 32 | record[1]


class Link(LinkSink):
    """The real one, which other threads may come in between of."""

    def __init__(self, world: World, place: Endpoint, connected: Callable[[], None]) -> None:
        super().__init__(place.host, place.port, connected, credentials=Credentials(), name=place.name)
        self._world = world

    @property
    def ready(self) -> bool:
        self._world.turns.switch()
        return super().ready

    def store(self, block: Block) -> None:
        self._world.holds[threading.current_thread()] = self._link  # type: ignore[assignment]
        super().store(block)


class TheRing(Ring):
    """The real one, which says who took what."""

    def __init__(self, world: World, capacity: int) -> None:
        super().__init__(capacity)
        self._world = world

    def reserve(self, limit: int, timeout: Any = None, takes: Callable[[object], bool] | None = None) -> Any:
        world, me = self._world, threading.current_thread()
        destination = world.by[me]
        world.was_fixed[me] = world.is_fixed(destination)

        def noted(mark: object) -> bool:
            assert takes
            world.was_fixed[me] = world.is_fixed(destination)
            return takes(mark)

        return super().reserve(limit, timeout, takes and noted)

    def commit(self, batch: ringbuffer.Batch) -> None:
        if not self._world.stored(records_of(Block(batch.runs, batch.values))):
            self._world.turns.fail("committed, and not stored")
        super().commit(batch)

    def _read(self, start: int, end: int) -> "array[int]":
        if self._world.buggy and self._world.chance(0.05):
            raise MemoryError
        return super()._read(start, end)


class TheForwarder(Forwarder):
    """The real one, which says for whom a thread works."""

    def __init__(self, world: World, *arguments: Any) -> None:
        self._world = world
        super().__init__(*arguments)

    def change(self, added: Sequence[Destination], dropped: Sequence[Destination]) -> None:
        super().change(added, dropped)
        self._world.dropped.update(dropped)

    def step(self, destination: Destination, sink: Any) -> bool:
        self._world.by[threading.current_thread()] = destination
        return super().step(destination, sink)


def worlds(number: int, fine: bool = False) -> None:
    seed, seen = seeded(), Counter[str]()
    for turn in range(number):
        world = World(seed + turn, fine)
        try:
            world.run()
        except BaseException:
            print(f"in the world of RINGOEXP_SEED={seed + turn}")
            raise
        seen.update(world.seen)
    print(number, "worlds", dict(seen))
    assert seen["again"] > number and seen["uncertain"] and seen["aborted"], "hardly anything was in doubt"


def test_what_is_in_doubt_goes_to_no_other_store_and_everything_is_stored_once() -> None:
    worlds(100)


@pytest.mark.long
@pytest.mark.parametrize("fine", [False, pytest.param(True, marks=pytest.mark.skipif(MEASURED, reason="traces"))])
def test_it_goes_to_no_other_store_in_many_worlds(fine: bool) -> None:
    worlds(200 if fine else 1500, fine)


@pytest.mark.parametrize(
    ("of", "name", "good", "bad"),
    [
        pytest.param(Forwarder, "step", ', "store", sink.identity)', ', "store", None)', id="a bug makes it forget"),
        pytest.param(Forwarder, "step", "batch.mark is not None and not sink.ready", "False", id="without a link"),
        pytest.param(Forwarder, "step", " or self._ring.has_marked", "", id="the only one does not look"),
        pytest.param(Forwarder, "step", "not isinstance(error, InDoubt)", "True", id="nothing is in doubt"),
        pytest.param(
            Forwarder,
            "change",
            "destination.leaving, destination.fixed = True, False",
            "destination.leaving = True",
            id="fixed",
        ),
        pytest.param(Forwarder, "_leaves", " or self._ring.has_for(takes)", "", id="leaves what is in doubt"),
        pytest.param(Forwarder, "_retire", "destination.breaker.left()", "pass", id="probes for ever"),
        pytest.param(Destination, "takes", "mark.destination is self and", "", id="any consumer"),
        pytest.param(
            Ring, "requeue", "self._not_empty.notify_all()", "self._not_empty.notify()", id="wakes a wrong one"
        ),
        pytest.param(LinkSink, "store", "link.ending[0] == GOING_AWAY", "True", id="any goodbye"),
    ],
)
def test_a_program_with_a_hole_is_found_out(of: type, name: str, good: str, bad: str) -> None:
    """A line of it is another one: the first two are holes that there were."""
    source = textwrap.dedent(inspect.getsource(getattr(of, name)))
    assert good in source
    made: dict[str, Any] = {}
    code = "from __future__ import annotations\n" + source.replace(good, bad)
    exec(compile(code, "<a hole>", "exec"), vars(sys.modules[of.__module__]), made)
    with patch.object(of, name, made[name]), pytest.raises(AssertionError):
        for seed in range(1000):
            World(seed, again_one=bad == "False").run()
