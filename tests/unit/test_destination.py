"""Several destinations: workers spread over them, and a failing destination gets no batches until it recovers.

A batch in doubt goes only where it may be stored already.
"""

import logging
import threading
from array import array
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support.harness import Blocked, eventually
from support.short_times import short_times  # noqa: F401  (a fixture for every test here)

from ringbuffer import Ring
from ringolib import timing
from ringolib.forward import workers as workers_module
from ringolib.forward.destination import Destination, Pin
from ringolib.forward.link import LinkState
from ringolib.forward.sink import InDoubt, NotStored
from ringolib.forward.workers import Forwarder
from ringolib.net.addresses import Endpoint
from ringolib.net.credentials import Credentials
from ringolib.status import readiness
from ringolib.status.readiness import Readiness
from ringolib.wire import Block

SOURCE = b"s" * 16


class Consumer:
    """The other end of fake links. It refuses links while `down`; if `mute`, it stores and goes down without an ack."""

    def __init__(self, name: str, identity: str | None = None) -> None:
        self.identity = identity
        self.down = self.mute = self.buggy = False
        self.gate = threading.Event()
        self.gate.set()
        self.stored: list[int] = []
        self.calls = self.connects = self.busy = 0
        self.lock = threading.Lock()
        self.state = LinkState(name)
        self.destination = Destination(lambda connected: Link(self), self.state, only=False)


class Link:
    """The link of a worker to a Consumer."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self.ready = False
        self.identity: str | None = None

    def connect(self) -> None:
        if self.ready:
            return
        self._consumer.connects += 1
        if self._consumer.down:
            raise NotStored("refused")
        self.ready, self.identity = True, self._consumer.identity

    def store(self, block: Block) -> None:
        consumer = self._consumer
        if consumer.down:
            self.ready = False
            raise NotStored("gone")
        self.connect()
        with consumer.lock:
            consumer.calls += 1
            consumer.busy += 1
        try:
            assert consumer.gate.wait(30)
        finally:
            with consumer.lock:
                consumer.busy -= 1
        if consumer.buggy:
            raise ZeroDivisionError("a bug")
        if consumer.down:
            self._fail()
        with consumer.lock:
            consumer.stored += block.values
        if consumer.mute:
            consumer.down = True
            self._fail()

    def _fail(self) -> None:
        identity, self.ready, self.identity = self.identity, False, None
        raise InDoubt("no ack", identity)

    def idle(self) -> None: ...
    def close(self) -> None: ...

    def abort(self) -> None:
        self._consumer.down = True
        self._consumer.gate.set()


@pytest.fixture(autouse=True)
def no_quiet_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any failure of the prober means that its consumer is down, even if another link has just had an ack."""
    monkeypatch.setattr(workers_module, "QUIET_SECONDS", 0)


@contextmanager
def forwarding(ring: Ring, *consumers: Consumer, max_workers: int = 8, records: int = 65536) -> Iterator[Forwarder]:
    running = Forwarder(ring, [consumer.destination for consumer in consumers], max_workers, records)
    try:
        yield running
    finally:
        ring.abort()
        assert running.stop(20)
        assert running.stats().workers == 0
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("forward-")]


def put(ring: Ring, *values: int) -> int:
    return ring.put(array("q", values), SOURCE, ring.cursor, 20)


def test_pin_is_accepted_by_same_store_or_same_consumer() -> None:
    """Any destination with the same store accepts it. If the identity is unknown, only the same consumer does."""
    fixed, other = Destination(lambda connected: Link(Consumer(""))), Destination(lambda connected: Link(Consumer("")))
    address = Destination(lambda connected: Link(Consumer("")), fixed=False)
    for destination, mark, store, accepts in [
        (fixed, Pin(fixed, None), None, True),
        (fixed, Pin(fixed, None), "x", True),
        (other, Pin(fixed, None), "x", False),
        (other, Pin(fixed, "x"), None, False),
        (other, Pin(fixed, "x"), "y", False),
        (other, Pin(fixed, "x"), "x", True),
        (fixed, Pin(fixed, "x"), "y", True),  # a fixed address is always this consumer
        (address, Pin(address, "x"), "y", False),  # an address of a name may become another consumer's
        (address, Pin(address, "x"), "x", True),
        (address, Pin(address, "x"), None, True),
    ]:
        assert destination.accepts(mark, store) is accepts, (mark.store, store)


def test_each_destination_starts_with_a_worker_and_gets_a_fair_share() -> None:
    ring, consumers = Ring(64), [Consumer(name) for name in "abc"]
    for consumer in consumers:
        consumer.gate.clear()
    with forwarding(ring, *consumers, max_workers=9, records=1) as running:
        assert running.stats().workers == 3
        put(ring, *range(64))
        eventually(lambda: [consumer.busy for consumer in consumers] == [3, 3, 3])
        assert [consumer.destination.workers for consumer in consumers] == [3, 3, 3] and running.stats().workers == 9
        for consumer in consumers:
            consumer.gate.set()
        assert ring.wait_committed(64, 20)
        assert sorted(value for consumer in consumers for value in consumer.stored) == list(range(64))


def test_fast_destination_takes_the_work_of_a_slow_one() -> None:
    ring, fast, slow = Ring(64), Consumer("fast"), Consumer("slow")
    with forwarding(ring, fast, slow, max_workers=2):
        for turn in range(40):
            assert ring.wait_committed(put(ring, turn), 20)
        assert min(len(fast.stored), len(slow.stored)) > 5
        slow.gate.clear()
        eventually(lambda: slow.busy or not put(ring, 1))
        eventually(lambda: ring.stats().backlog == fast.busy == 0)
        for _ in range(40):
            stored = len(fast.stored)
            put(ring, 1)
            eventually(lambda stored=stored: len(fast.stored) == stored + 1)
        slow.gate.set()


def test_unreachable_destination_gets_no_batch_until_it_recovers(caplog: pytest.LogCaptureFixture) -> None:
    """One worker probes it, even while there is nothing to store. No batch waits for it meanwhile."""
    caplog.set_level(logging.INFO)
    ring, here, away = Ring(64), Consumer("here"), Consumer("away")
    away.down = True
    with forwarding(ring, here, away) as running:
        eventually(lambda: away.connects > 3)
        for turn in range(50):
            assert ring.wait_committed(put(ring, turn), 20)
        assert here.stored == list(range(50)) and away.calls == 0 and away.destination.workers == 1
        away.down = False
        eventually(lambda: not away.state.down)
        eventually(lambda: away.stored or not ring.wait_committed(put(ring, 1), 20))
        assert running.stats().workers >= 2
    events = [(record.getMessage(), record.args["consumer"]) for record in caplog.records]  # type: ignore[index,call-overload]
    assert events == [("link_down", "away"), ("link_up", "here"), ("link_up", "away")] or events == [
        ("link_up", "here"),
        ("link_down", "away"),
        ("link_up", "away"),
    ]


def test_batch_in_doubt_waits_for_its_consumer_and_others_go_on() -> None:
    ring, here, mute = Ring(8), Consumer("here", "x"), Consumer("mute", "y")
    here.down = mute.mute = True
    with forwarding(ring, here, mute):
        end = put(ring, 1, 2, 3)
        eventually(lambda: ring.marks())
        here.down = False
        for turn in range(50):  # several times the ring
            since = ring.cursor
            assert ring.wait_committed(put(ring, turn), 20, since)
        assert here.stored == list(range(50)) and mute.stored == [1, 2, 3] and mute.calls == 1
        assert not ring.is_stored(end)
        mute.mute = mute.down = False
        assert ring.wait_committed(end, 20)
        assert mute.stored[:6] == [1, 2, 3, 1, 2, 3], "its consumer recognises the duplicate"
        assert here.stored == list(range(50))


def test_batch_in_doubt_goes_at_once_to_destination_with_same_store() -> None:
    ring, mute, same, other = Ring(8), Consumer("mute", "x"), Consumer("same", "x"), Consumer("other", "y")
    same.down = other.down = mute.mute = True
    with forwarding(ring, mute, same, other):
        end = put(ring, 1, 2, 3)
        eventually(lambda: ring.marks())
        other.down = False
        eventually(lambda: other.stored or put(ring, 7) and False)
        assert not ring.is_stored(end)
        same.down = False
        assert ring.wait_committed(end, 20)
        assert same.stored[:3] == [1, 2, 3] and not {1, 2, 3} & set(other.stored) and mute.down


def test_unexpected_error_leaves_batch_in_doubt() -> None:
    ring, here, buggy = Ring(8), Consumer("here"), Consumer("buggy")
    here.down = buggy.buggy = True
    with forwarding(ring, here, buggy):
        end = put(ring, 1)
        eventually(lambda: buggy.calls > 1)
        here.down = False
        eventually(lambda: here.stored or put(ring, 2) and False)
        assert not ring.is_stored(end)
        buggy.buggy = False
        assert ring.wait_committed(end, 20) and 1 in buggy.stored and 1 not in here.stored


def test_unexpected_error_keeps_the_store_of_a_pin() -> None:
    """Otherwise a batch in doubt there would go to the next store at this address."""
    ring, consumer = Ring(8), Consumer("there", "the one")
    consumer.destination.fixed, consumer.buggy = False, True
    put(ring, 1)
    ring.requeue(ring.reserve(1), consumer.destination.pin("the one"))
    assert Forwarder(ring, [], 8).step(consumer.destination, Link(consumer))
    assert ring.marks() == [(Pin(consumer.destination, "the one"), 1)]


def test_store_without_identity_keeps_the_store_of_a_pin() -> None:
    """The batch was sent to a named store, then, at the same address, to one without identity. It may be the same."""
    ring, consumer = Ring(8), Consumer("there")
    consumer.destination.fixed, consumer.mute = False, True
    put(ring, 1)
    ring.requeue(ring.reserve(1), consumer.destination.pin("the one"))
    assert Forwarder(ring, [], 8).step(consumer.destination, Link(consumer)) and consumer.stored == [1]
    assert ring.marks() == [(Pin(consumer.destination, "the one"), 1)]


def test_destination_that_never_acks_gets_no_further_batches() -> None:
    """It accepts links, but a link alone does not show that it is up."""
    ring, here, mute = Ring(64), Consumer("here"), Consumer("mute")
    mute.mute = True
    with forwarding(ring, here, mute, max_workers=2):
        eventually(lambda: mute.calls or put(ring, 1) and False)
        first = mute.stored[0]
        for _ in range(100):
            mute.down = False
            since = ring.cursor
            assert ring.wait_committed(put(ring, 9), 20, since) or ring.marks()
        assert len(ring.marks()) == 1 and set(mute.stored) == {first}


def test_each_destination_has_a_worker_beyond_the_maximum() -> None:
    ring, consumers = Ring(8), [Consumer(name) for name in "abc"]
    consumers[0].down = consumers[1].down = True
    with forwarding(ring, *consumers, max_workers=1) as running:
        assert ring.wait_committed(put(ring, 1, 2), 20) and running.stats().workers == 3
        consumers[2].mute = True
        end = put(ring, 3)
        eventually(lambda: ring.marks())
        consumers[0].down = False
        since = ring.cursor
        assert ring.wait_committed(put(ring, 4), 20, since) and not ring.is_stored(end)
        consumers[2].mute = consumers[2].down = False
        assert ring.wait_committed(end, 20)


@pytest.mark.slow
def test_recovered_destination_gets_its_share_of_workers() -> None:
    ring, here, away = Ring(64), Consumer("here"), Consumer("away")
    away.down = True
    here.gate.clear()
    with forwarding(ring, here, away, max_workers=6, records=1):
        put(ring, *range(60))
        eventually(lambda: here.destination.workers == 5 and here.busy == 5)
        away.down = False
        here.gate.set()
        eventually(lambda: put(ring, *range(64)) and abs(here.destination.workers - away.destination.workers) <= 1)


def test_dropped_destination_ends_once_nothing_is_in_doubt_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "IDLE_SECONDS", 0.05)
    ring, here, old, new = Ring(8), Consumer("here"), Consumer("old"), Consumer("new")
    here.down = old.mute = True
    with forwarding(ring, here, old) as running:
        end = put(ring, 1)
        eventually(lambda: ring.marks())
        running.change([new.destination], [old.destination])
        since = ring.cursor
        assert ring.wait_committed(put(ring, 2), 20, since) and new.stored == [2]
        assert old.destination in running.destinations and running.keep(old.destination)
        running.change([], [old.destination])
        old.mute = old.down = False
        assert ring.wait_committed(end, 20)
        eventually(lambda: old.destination not in running.destinations)
        assert old.destination.workers == 0 and not running.keep(old.destination)
        assert ring.wait_committed(put(ring, 3), 20)


def test_dropped_destination_without_worker_is_removed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise statistics and metrics would show it forever, and twice once it is named again."""
    ring, here, new = Ring(8), Consumer("here"), Consumer("new")

    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with forwarding(ring, here) as running:
        with monkeypatch.context() as short:
            short.setattr(threading.Thread, "start", no_thread)
            running.change([new.destination], [])
        assert new.destination in running.destinations and new.destination.workers == 0
        running.change([], [new.destination])
        assert list(running.destinations) == [here.destination]
        assert not running.keep(new.destination)
        assert ring.wait_committed(put(ring, 1), 20)


def test_destination_without_thread_gets_worker_at_next_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the maximum of workers is reached, and nothing is to be stored."""
    ring, here, new = Ring(8), Consumer("here", "x"), Consumer("new", "y")

    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with forwarding(ring, here, max_workers=1) as running:
        with monkeypatch.context() as short:
            short.setattr(threading.Thread, "start", no_thread)
            running.change([new.destination], [])
            assert running.keep(new.destination), "it tries again, and that is not an error"
        assert new.destination.workers == 0
        assert running.keep(new.destination) and running.keep(new.destination), "as each time names are resolved"
        assert new.destination.workers == 1
        eventually(lambda: new.stored or put(ring, 2) and False)


@pytest.mark.parametrize("state", ["up", "away", "in doubt", "storing"])
def test_forwarder_stops_in_every_state(state: str) -> None:
    ring, one, two = Ring(8), Consumer("one"), Consumer("two")
    if state == "away":
        one.down = two.down = True
    if state == "in doubt":
        one.mute = two.mute = True
    if state == "storing":
        one.gate.clear()
        two.gate.clear()
    with forwarding(ring, one, two):
        put(ring, 1)
        if state == "in doubt":
            eventually(lambda: ring.marks())
        if state == "storing":
            eventually(lambda: one.busy + two.busy)


def test_retries_pause_while_all_destinations_are_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pauses grow, so there is no busy loop."""
    monkeypatch.setattr(timing, "BACKOFF_MAX_SECONDS", 30)
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    ring, consumers = Ring(8), [Consumer(name) for name in "ab"]
    for consumer in consumers:
        consumer.down = True
    with forwarding(ring, *consumers):
        put(ring, 1)
        eventually(lambda: all(consumer.connects >= 5 for consumer in consumers))
        assert all(consumer.connects < 20 for consumer in consumers)


def test_batch_in_doubt_waits_though_one_other_consumer_is_left() -> None:
    ring, here, old = Ring(8), Consumer("here", "x"), Consumer("old", "y")
    old.destination = Destination(lambda connected: Link(old), old.state, fixed=False, only=False)
    here.down = old.mute = True
    with forwarding(ring, here, old) as running:
        end = put(ring, 1)
        eventually(lambda: ring.marks())
        old.identity, old.mute, old.down = "z", False, False  # another consumer has its address now
        running.change([], [old.destination])
        eventually(lambda: put(ring, 2) and old.destination not in running.destinations)
        here.down = False
        for _ in range(20):
            since = ring.cursor
            assert ring.wait_committed(put(ring, 3), 20, since)
        assert not ring.is_stored(end) and 1 not in here.stored and old.stored[0] == 1 not in old.stored[1:]
        back = Consumer("back", "y")
        running.change([back.destination], [])
        assert ring.wait_committed(end, 20) and 1 in back.stored


def test_worker_without_link_sends_no_batch_that_came_into_doubt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It looked for batches in doubt before there was one. Without a link it does not know which store it reaches."""
    monkeypatch.setattr(workers_module, "IDLE_SECONDS", 0.01)
    ring, consumer = Ring(8), Consumer("there", "another")
    consumer.destination.fixed = False  # a name with one address
    link = Link(consumer)
    put(ring, 1)
    ring.requeue(ring.reserve(1), consumer.destination.pin("the one"))
    running = Forwarder(ring, [], 8)
    with monkeypatch.context() as earlier:
        earlier.setattr(Ring, "has_marked", False)
        assert running.step(consumer.destination, link)
    assert running.step(consumer.destination, link) and link.ready
    assert not consumer.stored and len(ring.marks()) == 1
    consumer.identity = "the one"
    assert running.step(consumer.destination, Link(consumer)) and consumer.stored == [1]


@pytest.mark.slow
def test_name_with_other_addresses_is_no_longer_the_same_consumer() -> None:
    ring, name, one, two = Ring(8), Consumer("name", "x"), Consumer("one", "x"), Consumer("two", "y")
    name.mute = one.down = True
    with forwarding(ring, name) as running:
        end = put(ring, 1)
        eventually(lambda: ring.marks())
        running.change([one.destination, two.destination], [name.destination])
        name.identity, name.mute, name.down = "y", False, False  # the name now leads to the second one
        eventually(lambda: name.destination not in running.destinations)
        assert name.stored == [1] and not two.stored
        one.down = False
        assert ring.wait_committed(end, 20) and one.stored == [1]


def test_kept_destination_has_worker_if_keep_races_with_leaving(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers_module, "IDLE_SECONDS", 0.05)
    ring, here, old = Ring(8), Consumer("here"), Consumer("old")
    looking: list[Blocked] = []

    def has_marked_for(accepts: object) -> bool:
        if not looking:
            looking.append(Blocked(lambda: running.keep(old.destination)))
            looking[0].still()
        return False

    with forwarding(ring, here, old) as running:
        monkeypatch.setattr(ring, "has_marked_for", has_marked_for)
        running.change([], [old.destination])
        eventually(lambda: looking)
        kept = looking[0].result()
        eventually(lambda: bool(old.destination.workers) is kept and (old.destination in running.destinations) is kept)
        assert ring.wait_committed(put(ring, 1), 20)


def test_recovered_consumer_with_nothing_to_send_is_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise a publisher that gets no records while it is not ready would never be ready again."""
    monkeypatch.setattr(readiness, "check_consumer", lambda *unused: None)
    ring, back, same = Ring(8), Consumer("back", "x"), Consumer("same", "x")
    back.destination.endpoint, same.destination.endpoint = Endpoint("back", 1, "back"), Endpoint("same", 1, "same")
    back.mute = same.down = True
    with forwarding(ring, back, same) as running:
        ready = Readiness(ring, None, None, running, Credentials())
        end = put(ring, 1)
        eventually(lambda: ring.marks())
        same.down = False
        assert ring.wait_committed(end, 20) and same.stored == [1]
        same.state.on_failure("it has gone")
        back.mute = back.down = False
        eventually(lambda: running.linked(back.destination))
        assert back.state.down and not ready.reasons()
