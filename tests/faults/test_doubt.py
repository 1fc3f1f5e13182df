"""A model of records in doubt: the real ring, forwarder, links and discovery, in a simulated world.

The objects get a runtime whose threads take turns (`support.turns`), sockets that lead to simulated consumers, and a
name service that changes its mind. A seed decides about the network and the faults. The consumers' ends of the links
are real sessions, so a message that was cut in the middle is one for them, too.

A record that has arrived at a store may be there. From then on it must not arrive at a store that is certainly another
one. If it is unknown whether it is another one, only the same destination may send it there.
"""

import socket
import threading
from array import array
from collections import Counter
from collections.abc import Callable
from functools import partial
from random import Random, seed
from sys import exc_info
from typing import Any, NamedTuple

import pytest
from support.harness import seeded
from support.turns import Turns

from ringbuffer import Batch, Closed, Full, Ring
from ringolib.forward.destination import Destination
from ringolib.forward.discovery import Discovery
from ringolib.forward.doubts import Doubts
from ringolib.forward.health import Health
from ringolib.forward.link import LinkSink
from ringolib.forward.pool import Worker
from ringolib.forward.sink import InDoubt, NotStored
from ringolib.forward.workers import Forwarder
from ringolib.net.addresses import AddressError, Endpoint
from ringolib.net.protocol import Protocol
from ringolib.net.websocket import HandshakeError
from ringolib.net.websocket_client import ClientConnection
from ringolib.web.session import GOING_AWAY, Session
from ringolib.wire import Block

Record = tuple[bytes, int]
ERRORS = ConnectionResetError("reset"), TimeoutError("stalled"), MemoryError(), ZeroDivisionError("a bug")
"""What may cut a message in the middle, or the wait for its ack."""
FATES = ["stored, lost", "lost", "stored, mute", "goodbye", "full", "stored, full", "slow", "stored, slow"]
"""Of a block that arrives at a consumer, apart from "stored"."""


class Database:
    """A store behind one consumer or several. If `identity` is None, its consumers report no identity."""

    def __init__(self, name: str, identity: str | None) -> None:
        self.name = name
        self.identity = identity
        self.records: dict[Record, int] = {}

    def __repr__(self) -> str:
        return f"{self.name} ({self.identity})"


class Sent(NamedTuple):
    """A record that this destination has sent has arrived at this store, so it may be there."""

    store: Database
    destination: Destination


def value_of(record: Record) -> int:
    return record[0][0] << 32 | record[1]


def records_of(block: Block) -> dict[Record, int]:
    values = iter(block.values)
    return {(run.source, run.first + n): next(values) for run in block.runs for n in range(run.count)}


class Wire(ClientConnection):
    """A link of the simulated world: the real client's end, its socket, and the consumer's session behind it."""

    def __init__(self, world: "World", destination: Destination, host: str, address: str) -> None:
        self._protocol, self._unsent, self._rest = Protocol(is_server=False), b"", b""
        self.sock = self
        self.database = world.behind[address]
        self.store = self.database.identity
        self.cut = False
        self._world = world
        self._destination = destination
        self._address = address
        self._session = Session(batches=True, now=0)
        self._inbox = b""  # for the client
        self._outbox = b""  # for a consumer that hangs
        self._counted: dict[Record, int] = {}
        self._fixed = True  # the destination, when it sent last
        self._timeout: float | None = None

    def finish(self, code: int, reason: str) -> None:
        self.cut = True

    # As a socket.

    def settimeout(self, seconds: float | None) -> None:
        self._timeout = seconds

    def setblocking(self, blocking: bool) -> None:
        self._timeout = None if blocking else 0

    def close(self) -> None:
        self.cut = True

    def shutdown(self, how: int) -> None:
        self.cut = True

    def send(self, data: Any, flags: int = 0) -> int:
        world = self._world
        world.turns.switch(0.3)
        self._fixed = world.was_fixed[threading.current_thread()]
        error = BrokenPipeError() if self.cut else world.error()
        size = world.rng.randrange(len(data)) if error or world.chance(0.2) else len(data)
        if isinstance(error, TimeoutError):  # then the system has taken nothing
            world.turns.sleep(self._timeout or 0)
            raise error
        if not self.cut:
            self.deliver(bytes(data[:size]))
        world.wire_of[threading.current_thread()] = self
        if error:
            world.count("cut in the middle")
            raise error
        return size

    def recv(self, size: int, flags: int = 0) -> bytes:
        if self._timeout == 0 or flags & socket.MSG_DONTWAIT:
            if not self._inbox and not self.cut:
                raise BlockingIOError
        else:
            timeout = float("inf") if self._timeout is None else self._timeout
            self._world.turns.block(lambda: bool(self._inbox or self.cut), timeout)
            if error := self._world.error():
                self._world.count("no ack")
                raise error
            if not self._inbox and not self.cut:
                raise TimeoutError("timed out")
        data, self._inbox = self._inbox, b""
        return data

    # The consumer.

    def deliver(self, data: bytes = b"") -> None:
        """Let data arrive, unless the consumer hangs. It may be alive again when the link is long gone."""
        self._outbox += data
        if self._address not in self._world.hanging:
            data, self._outbox = self._outbox, b""
            block = self._session.receive(data, 0)
            if block.values:
                self._settle(records_of(block))

    def _settle(self, records: dict[Record, int]) -> None:
        world, session = self._world, self._session
        fate = world.fate()
        if fate == "goodbye" and not self.cut:
            session.end(*GOING_AWAY)
            session.close(0)
        else:
            self.count(records)
        if fate.startswith("stored"):
            world.keep(self.database, records)
        if fate == "stored":
            session.stored(session.received)
        elif fate.endswith("slow"):
            world.later.append(partial(self._settle_late, session.received, records))
        elif fate.endswith("full"):
            session.replace_ending(1011, "disk full")
            session.close(0)
        elif fate.endswith("lost"):
            self.cut = True
        self._inbox += session.data_to_send()

    def count(self, records: dict[Record, int]) -> None:
        """Count these records as arrived, once: when they arrive, or when the program must assume that they have."""
        new = {record: value for record, value in records.items() if record not in self._counted}
        self._counted.update(new)
        self._world.on_arrived(self.database, self._destination, self._fixed, new)

    def _settle_late(self, count: int, records: dict[Record, int]) -> None:
        self._world.keep(self.database, records)
        self._session.stored(count)
        self._inbox += self._session.data_to_send()


class WatchedRing(Ring):
    """The real ring, which checks each commit."""

    world: "World"

    def commit(self, batch: Batch) -> None:
        if not self.world.is_stored(records_of(Block(batch.runs, batch.values))):
            self.world.turns.fail("committed, and not stored")
        super().commit(batch)


class WatchedForwarder(Forwarder):
    """The real forwarder, which reports the worker that begins a turn."""

    world: "World"

    def turn(self, worker: Worker) -> bool:
        destination = worker.destination
        assert destination.endpoint
        is_named = destination.endpoint.host == destination.endpoint.name and destination not in self.world.dropped
        self.world.was_fixed[threading.current_thread()] = is_named
        return super().turn(worker)

    def change(self, endpoints: Any) -> None:
        super().change(endpoints)
        self.world.dropped.update(destination for destination in self.destinations if destination.dropped)

    def _store(self, worker: Worker, batch: Batch, in_doubt: bool) -> BaseException | None:
        self.world.wire_of.pop(threading.current_thread(), None)
        error = super()._store(worker, batch, in_doubt)
        wire = self.world.wire_of.get(threading.current_thread())
        if wire and error and not isinstance(error, NotStored):
            wire.count(records_of(Block(batch.runs, batch.values)))
        return error


class Program(NamedTuple):
    """The classes that a world is made of. A fault is put in as a subclass."""

    ring: type[WatchedRing] = WatchedRing
    forwarder: type[WatchedForwarder] = WatchedForwarder
    link: type[LinkSink] = LinkSink
    health: type[Health] = Health
    doubts: type[Doubts] = Doubts


class World:
    """Names, addresses, the stores behind them, and one publisher, all chosen by a seed.

    While the world is not `calm`, links fail, consumers hang or are unreachable, addresses move to other stores, and
    names get other addresses. With `one_name` the consumers are the addresses of one name, which change often.
    """

    def __init__(self, number: int, program: Program = Program(), one_name: bool = False) -> None:  # noqa: B008
        seed(number)  # for the pauses between retries
        self.rng = rng = Random(number)
        self.turns = Turns(rng, 50_000)
        self.program = program
        self.calm = self.stopping = False
        self.may_have: dict[Record, list[Sent]] = {}
        self.excused: set[Record] = set()  # may be in two stores, as a store without an identity had them
        self.put: set[Record] = set()
        self.dropped: set[Destination] = set()  # at some time, so that the name is not the same consumer any more
        self.was_fixed: dict[threading.Thread, bool] = {}  # the destination of each worker, at the start of its turn
        self.wire_of: dict[threading.Thread, Wire] = {}  # over which each worker has sent its batch
        self.links: list[Wire] = []
        self.later: list[Callable[[], None]] = []  # what slow consumers have still to do
        self.unreachable: set[str] = set()
        self.hanging: set[str] = set()
        self.seen = Counter[str]()
        self.faults = rng.choice((0.1, 0.3, 0.6))
        self.fates = [fate for fate in FATES if rng.random() < 0.6]
        self.errors = [error for error in ERRORS if rng.random() < 0.4]

        count = rng.randrange(1, 5)
        silent = rng.choice((0, 0, 0.3, 1))
        self.stores = [Database(f"{n}", None if rng.random() < silent else f"store {n}") for n in range(count)]
        self.addresses = [f"10.0.0.{n}" for n in range(1, count + rng.randrange(3) + 1)]
        self.behind = {address: rng.choice(self.stores) for address in self.addresses}
        self.weights = [rng.choice((0, 1, 3)) + 0.1 for _ in range(6)]  # of the changes in `change_something`
        self.name: list[str] = self._some_addresses() if rng.random() < 0.8 else []
        more = rng.choice((0, len(self.addresses))) if self.name else len(self.addresses)
        own = rng.sample(self.addresses, rng.randrange(not self.name, more + 1))
        self.hosts = [("name", 1)] * bool(self.name) + [(address, 1) for address in own]
        if one_name:
            self.hosts, self.weights[2:4] = [("name", 1)], [4, 4]
            self.name = self.name or self._some_addresses()
        self.max_workers = rng.randrange(1, 7)
        self.max_batch = rng.randrange(1, 6)
        self.few_threads = rng.random() < 0.15
        self.ring = program.ring(rng.choice((1, 2, 3, 5, 8, 16)), self.turns)
        self.ring.world = self

    # The network.

    def _some_addresses(self) -> list[str]:
        return self.rng.sample(self.addresses, self.rng.choice((1, self.rng.randrange(1, len(self.addresses) + 1))))

    def resolve(self, host: str, port: int) -> list[Endpoint]:
        if host != "name":
            return [Endpoint(host, port, host)]
        if self.chance(0.1):
            raise AddressError("there is no answer")
        if len(self.name) == 1:
            return [Endpoint(host, port, host)]
        return [Endpoint(address, port, host) for address in self.name]

    def dial(self, destination: list[Destination], host: str, port: int, on_socket: Callable[[Any], None]) -> Wire:
        address = self.rng.choice(self.name) if host == "name" else host
        wire = Wire(self, destination[0], host, address)
        on_socket(wire)
        self.turns.switch(0.3)
        if address in self.unreachable or self.chance(0.2):
            raise self.rng.choice((ConnectionRefusedError("refused"), HandshakeError("refused with 503", 503)))
        if address in self.hanging:
            self.turns.sleep(5)
            raise TimeoutError("timed out")
        if error := self.error():
            raise error
        self.links.append(wire)
        return wire

    def chance(self, probability: float) -> bool:
        return not self.calm and self.rng.random() < probability * self.faults

    def error(self) -> BaseException | None:
        return self.rng.choice(self.errors) if self.errors and self.chance(0.15) else None

    def fate(self) -> str:
        return self.rng.choice(self.fates) if self.fates and self.chance(0.5) else "stored"

    def cut(self, probability: float) -> None:
        for wire in self.links:
            wire.cut = wire.cut or self.rng.random() < probability

    def change_something(self) -> None:
        rng = self.rng
        (change,) = rng.choices(("cut", "reach", "move", "name", "late", "hang"), self.weights)
        if change == "cut":
            self.cut(rng.choice((0.2, 1)))
        elif change == "reach":
            self.unreachable.symmetric_difference_update(rng.sample(self.addresses, 1))
        elif change == "move":
            self.behind[rng.choice(self.addresses)] = rng.choice(self.stores)
            if rng.random() < 0.5:
                self.cut(1)
        elif change == "name" and self.name:
            self.name = self._some_addresses()
        elif change == "late" and self.later:
            self.later.pop(rng.randrange(len(self.later)))()
        elif change == "hang":
            self.hanging.symmetric_difference_update(rng.sample(self.addresses, 1))
            self.wake_up()

    def wake_up(self) -> None:
        """Let consumers that do not hang any more handle the bytes that have arrived."""
        for wire in self.links:
            wire.deliver()

    def settle(self) -> None:
        """End all faults. Each store with an identity is now behind an address of one of the hosts."""
        self.calm = True
        self.unreachable.clear()
        self.hanging.clear()
        self.wake_up()
        if self.name:
            self.name = list(self.addresses)
        named = sorted({*self.name, *(host for host, _ in self.hosts)} - {"name"})
        known = [store for store in self.stores if store.identity]
        self.rng.shuffle(named)
        self.behind.update(zip(named, known, strict=False))
        self.cut(1)

    # The checks.

    def on_arrived(self, store: Database, destination: Destination, fixed: bool, records: dict[Record, int]) -> None:
        """Check that these records may be at this store. From now on they may be there."""
        for record in records:
            before = self.may_have.get(record, [])
            here = [sent for sent in before if sent.store is store]
            # A fixed destination is the same consumer, whichever store it has now.
            same_consumer = fixed and any(sent.destination is destination for sent in before)
            if before and not here:
                if not same_consumer and any(sent.store.identity and store.identity for sent in before):
                    self.turns.fail(f"{record} may be in {before}, and arrives at {store}")
                if not any(sent.destination is destination for sent in before):
                    self.turns.fail(f"{record} from another destination: it may be in {before}, and arrives at {store}")
                self.excused.add(record)
                self.count("uncertain")
            if before:
                self.count("again")
            if same_consumer and store.identity:
                before = here
            self.may_have[record] = [*before, Sent(store, destination)]

    def keep(self, store: Database, records: dict[Record, int]) -> None:
        for record, value in records.items():
            if value != value_of(record):
                self.turns.fail(f"{record} has the value {value}")
            if record not in store.records and record not in self.excused and self.is_stored([record]):
                self.turns.fail(f"{record} is stored twice")
            store.records[record] = value

    def is_stored(self, records: Any) -> bool:
        return all(any(record in store.records for store in self.stores) for record in records)

    def check_invariants(self) -> None:
        stats = self.ring.stats()
        assert stats.committed <= stats.reserved <= stats.cursor <= stats.committed + stats.capacity
        assert 0 <= stats.stored <= stats.cursor and 0 <= stats.in_flight <= stats.depth
        assert self.ring._aside_size == sum(map(len, self.ring._aside)) <= self.ring.capacity
        for destination in self.forwarder.destinations:
            prober: Any = destination.health._prober
            assert prober is None or prober.is_alive() or self.stopping, "the prober has ended"

    def is_settled(self) -> bool:
        """True if each named consumer, and no other, has workers, and if a prober is one of them."""
        forwarder = self.forwarder
        pool = forwarder._pool
        owners = [worker.destination for thread, worker in pool._workers.items() if thread in pool._working]
        for destination in forwarder.destinations:
            prober: Any = destination.health._prober
            if destination.dropped or not owners.count(destination) == destination.workers >= 1:
                return False
            if prober and (prober not in pool._working or pool._workers[prober].destination is not destination):
                return False
        named = {str(destination.endpoint) for destination in forwarder.destinations}
        return named == set(map(str, self.discovery.endpoints)) and len(owners) <= max(self.max_workers, len(named))

    def count(self, event: str) -> None:
        self.seen[event] += 1

    # The publisher.

    def make(self, endpoint: Endpoint) -> Destination:
        made: list[Destination] = []

        def make_sink(connected: Callable[[], None]) -> LinkSink:
            return self.program.link(endpoint.host, 1, connected, None, partial(self.dial, made), self.turns)

        is_fixed = endpoint.host == endpoint.name
        only = len(self.hosts) == 1 and endpoint.name != "name"
        health = self.program.health(str(endpoint), self.turns)
        made.append(Destination(make_sink, health, endpoint, is_fixed, only))
        return made[0]

    def produce(self, number: int, blocks: int) -> None:
        """A client: it sends blocks, and often waits until they are acked."""
        source, first, rng = bytes([number]) * 16, 0, self.rng
        try:
            for _ in range(blocks):
                left = rng.randrange(1, 2 * self.ring.capacity + 2)
                since, began = self.ring.cursor, first
                while left:
                    values = array("q", (value_of((source, n)) for n in range(first, first + left)))
                    try:
                        self.ring.put(values, source, first, rng.choice((None, 5)))
                        accepted = left
                    except Full as full:
                        accepted = full.accepted
                    self.put |= {(source, n) for n in range(first, first + accepted)}
                    first, left = first + accepted, left - accepted
                end = self.ring.cursor
                acked = partial(self.ring.is_stored, since, end)
                if rng.random() < 0.5 and self.turns.block(acked, rng.choice((float("inf"), 1))):
                    if not self.is_stored((source, n) for n in range(began, first)):
                        self.turns.fail("acked, and not stored")
        except Closed:
            assert self.stopping

    def play(self) -> None:
        """Run with faults, then without, then stop; or stop in the middle."""
        rng, turns = self.rng, self.turns
        while True:
            try:
                self.discovery = Discovery(self.hosts, resolve=self.resolve, runtime=turns)
                break
            except AddressError:
                continue
        destinations = [self.make(endpoint) for endpoint in self.discovery.endpoints]
        self.forwarder = self.program.forwarder(self.ring, destinations, self.max_workers, self.max_batch, turns)
        self.forwarder.world = self
        self.forwarder._doubts = doubts = self.program.doubts()
        self.forwarder.in_doubt = doubts.records  # type: ignore[method-assign]
        self.forwarder.follow(self.discovery, self.make)
        turns.may_start = lambda name: not (self.few_threads and name.startswith("forward-") and self.chance(0.5))
        producers = [
            turns.start_thread(self.produce, n, rng.choice((3, 10, 20)), name=f"produce-{n}")
            for n in range(rng.randrange(1, 4))
        ]
        for _ in range(rng.randrange(10, 80)):
            self.change_something()
            turns.sleep(rng.choice((0.001, 0.01, 0.1, 1, 1, 15)))
            self.check_invariants()
        if rng.random() < 0.2:
            self.count("aborted")
            self.stop()
            return
        self.settle()
        for _ in range(20):
            turns.sleep(rng.random())
            if self.later:
                self.later.pop()()
            self.check_invariants()
        for producer in producers:
            producer.join()
        assert self.ring.join()
        assert not self.forwarder.in_doubt() and self.ring.stats().stored == self.ring.cursor == len(self.put)
        turns.block(self.is_settled)
        while self.later:
            self.later.pop()()
        for record in self.put:
            times = sum(record in store.records for store in self.stores)
            assert times == 1 or (times > 1 and record in self.excused), f"{record} is stored {times} times"
        self.stop()

    def stop(self) -> None:
        self.stopping = True
        self.ring.close()
        if not self.ring.join(0) or self.rng.random() < 0.5:
            self.ring.abort()
        assert self.forwarder.stop(1e9), "workers still run"
        assert self.forwarder.stats().workers == 0 and not self.forwarder._pool._workers
        self.check_invariants()

    def run(self) -> None:
        """Play, and raise the error of any thread."""
        try:
            self.play()
        except AssertionError:
            self.calm = self.stopping = True
            self.turns.forgive(5000)
            try:
                self.ring.abort()
                self.forwarder.stop(1e9)
            except AssertionError:
                pass  # threads that wait for ever are left behind
            raise


@pytest.mark.slow
def test_records_in_doubt_go_to_no_other_store_and_are_stored_once() -> None:
    run_worlds(100)


@pytest.mark.long
def test_records_in_doubt_go_to_no_other_store_in_many_worlds() -> None:
    run_worlds(3000)


def run_worlds(number: int) -> None:
    first, seen = seeded(), Counter[str]()
    for turn in range(number):
        world = World(first + turn)
        try:
            world.run()
        except BaseException:
            print(f"in the world of RINGOEXP_SEED={first + turn}")
            raise
        seen.update(world.seen)
    print(number, "worlds", dict(seen))
    events = "again", "uncertain", "aborted", "cut in the middle", "no ack"
    assert all(seen[event] for event in events), "too little happened"


# Faults, put into the program on purpose.


class NoDoubt(WatchedForwarder):
    def _give_back(self, worker: Worker, batch: Batch, error: BaseException, in_doubt: bool) -> None:
        super()._give_back(worker, batch, NotStored(), False)


class ForgetsStore(WatchedForwarder):
    def _give_back(self, worker: Worker, batch: Batch, error: BaseException, in_doubt: bool) -> None:
        super()._give_back(worker, batch, InDoubt("") if isinstance(error, InDoubt) else error, in_doubt)


class StaysFixed(WatchedForwarder):
    def change(self, endpoints: Any) -> None:
        fixed = [destination for destination in self.destinations if destination.fixed]
        super().change(endpoints)
        for destination in fixed:
            destination.fixed = True


class NoLinkBeforeBatch(WatchedForwarder):
    def _take(self, worker: Any) -> Any:
        worker.sink._drop()
        return super()._take(worker)


class LeavesDoubts(Doubts):
    def has_for(self, destination: Any, store: Any) -> bool:
        return False


class TakenByAnyone(Doubts):
    def take(self, destination: Any, store: Any) -> Any:
        for doubt in self._doubts.values():
            if not doubt.held:
                doubt.held = True
                return doubt.batch
        return None


class StaysProber(Health):
    def resign(self) -> None: ...


class WakesNobody(WatchedRing):
    def interrupt(self) -> None:
        self._interrupts += 1


class AcksWhatIsSetAside(WatchedRing):
    def is_stored(self, start: int, end: int) -> bool:
        return self.committed >= end


class TrustsAnyGoodbye(LinkSink):
    def _cannot_be_stored(self, link: Any, size: int) -> bool:
        return link.ending is not None


class WaitsForNoAck(LinkSink):
    def _await_ack(self, link: Any, patience: Any) -> None:
        self._acked = self._sent


class KeepsLinkAfterBug(LinkSink):
    def _drop(self) -> None:
        if isinstance(exc_info()[1], (OSError, HandshakeError, ValueError)):
            super()._drop()


OF_NAMES = Program(forwarder=StaysFixed), Program(doubts=LeavesDoubts)
"""Faults that matter only if names get other addresses."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        Program(forwarder=NoDoubt),
        Program(forwarder=ForgetsStore),
        *OF_NAMES,
        Program(forwarder=NoLinkBeforeBatch),
        Program(doubts=TakenByAnyone),
        Program(health=StaysProber),
        Program(ring=WakesNobody),
        Program(ring=AcksWhatIsSetAside),
        Program(link=TrustsAnyGoodbye),
        Program(link=WaitsForNoAck),
        Program(link=KeepsLinkAfterBug),
    ],
    ids=lambda program: next(part.__name__ for part, real in zip(program, Program(), strict=True) if part is not real),
)
def test_model_detects_a_fault_put_into_the_program(fault: Program) -> None:
    with pytest.raises(AssertionError) as found:
        for number in range(1000):
            World(number, fault, one_name=fault in OF_NAMES).run()
    print(number, found.value)
