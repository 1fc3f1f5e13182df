"""Several destinations: workers spread over them, and a failing destination gets no batches until it recovers.

A batch in doubt goes only where it may be stored already.
"""

import logging
import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from support.harness import Blocked, eventually
from support.short_times import short_times  # noqa: F401  (a fixture for every test here)

from ringbuffer import Batch, Ring
from ringolib import timing
from ringolib.forward import health as health_module
from ringolib.forward import workers as workers_module
from ringolib.forward.destination import Destination
from ringolib.forward.discovery import Discovery
from ringolib.forward.doubts import Doubts
from ringolib.forward.health import Health
from ringolib.forward.pool import Worker
from ringolib.forward.sink import InDoubt, NotStored, ignore_late
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
        self.down = self.mute = self.buggy = self.stops = False
        self.late_after = 30.0
        self.gate = threading.Event()
        self.gate.set()
        self.stored: list[int] = []
        self.calls = self.connects = self.busy = 0
        self.lock = threading.Lock()
        self.health = Health(name)
        self.endpoint = Endpoint(name, 1, name)
        self.destination = self.new_destination()

    def new_destination(self, fixed: bool = True) -> Destination:
        self.destination = Destination(lambda connected: Link(self), self.health, self.endpoint, fixed, only=False)
        return self.destination


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

    def store(self, block: Block, on_late: Callable[[], None] = ignore_late) -> None:
        consumer = self._consumer
        if consumer.down:
            self.ready = False
            raise NotStored("gone")
        self.connect()
        with consumer.lock:
            consumer.calls += 1
            consumer.busy += 1
        try:
            if not consumer.gate.wait(consumer.late_after):
                on_late()
                assert consumer.gate.wait(30)
        finally:
            with consumer.lock:
                consumer.busy -= 1
        if consumer.buggy:
            raise ZeroDivisionError("a bug")
        if consumer.stops:
            consumer.down, self.ready, self.identity = True, False, None
            raise NotStored("goodbye")
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
    monkeypatch.setattr(health_module, "QUIET_SECONDS", 0)


@contextmanager
def forwarding(ring: Ring, *consumers: Consumer, max_workers: int = 8, records: int = 65536) -> Iterator[Forwarder]:
    """Run a forwarder. `name_consumers` changes its consumers."""
    running = Forwarder(ring, [consumer.destination for consumer in consumers], max_workers, records)
    try:
        yield running
    finally:
        ring.abort()
        assert running.stop(20)
        assert running.stats().workers == 0
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("forward-")]


def name_consumers(running: Forwarder, *consumers: Consumer) -> None:
    """Change the forwarder's consumers to these."""
    by_endpoint = {consumer.endpoint: consumer for consumer in consumers}
    running.follow(Discovery([("127.0.0.1", 1)]), lambda endpoint: by_endpoint[endpoint].new_destination())
    running.change(list(by_endpoint))


def connected(consumer: Consumer) -> Link:
    link = Link(consumer)
    link.connect()
    return link


def put(ring: Ring, *values: int) -> int:
    return ring.put(array("q", values), SOURCE, ring.cursor, 20)


def batch_of(ring: Ring) -> Batch:
    put(ring, 1)
    return ring.reserve(1)


def test_batch_in_doubt_goes_to_same_store_or_same_consumer() -> None:
    """Any destination with the same store may take it. If an identity is unknown, only the same consumer may."""
    fixed, other = Consumer("fixed").destination, Consumer("other").destination
    address = Consumer("address").destination
    address.fixed = False
    for destination, sent_to, known, store, may in [
        (fixed, fixed, None, None, True),
        (fixed, fixed, None, "x", True),
        (other, fixed, None, "x", False),
        (other, fixed, "x", None, False),
        (other, fixed, "x", "y", False),
        (other, fixed, "x", "x", True),
        (fixed, fixed, "x", "y", True),  # a fixed address is always this consumer
        (address, address, "x", "y", False),  # an address of a name may become another consumer's
        (address, address, "x", "x", True),
        (address, address, "x", None, True),
    ]:
        doubts, batch = Doubts(), batch_of(Ring(1))
        doubts.hold(batch, sent_to, known)
        assert doubts.take(destination, store) is None and not doubts.has_for(destination, store), "a worker holds it"
        doubts.release(batch)
        assert doubts.has_for(destination, store) is may, (known, store)
        assert doubts.take(destination, store) is (batch if may else None)
        assert doubts.records() == {sent_to: 1}
        doubts.settle(batch)
        assert not doubts.records()


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
        assert ring.wait_committed(0, 64, 20)
        assert sorted(value for consumer in consumers for value in consumer.stored) == list(range(64))


def test_fast_destination_takes_the_work_of_a_slow_one() -> None:
    ring, fast, slow = Ring(64), Consumer("fast"), Consumer("slow")
    with forwarding(ring, fast, slow, max_workers=2):
        for turn in range(40):
            assert ring.wait_committed(0, put(ring, turn), 20)
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
            assert ring.wait_committed(0, put(ring, turn), 20)
        assert here.stored == list(range(50)) and away.calls == 0 and away.destination.workers == 1
        away.down = False
        eventually(lambda: not away.health.down)
        eventually(lambda: away.stored or not ring.wait_committed(0, put(ring, 1), 20))
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
    with forwarding(ring, here, mute) as running:
        end = put(ring, 1, 2, 3)
        eventually(running.in_doubt)
        here.down = False
        for turn in range(50):  # several times the ring
            since = ring.cursor
            assert ring.wait_committed(since, put(ring, turn), 20)
        assert here.stored == list(range(50)) and mute.stored == [1, 2, 3] and mute.calls == 1
        assert not ring.is_stored(0, end)
        mute.mute = mute.down = False
        assert ring.wait_committed(0, end, 20)
        assert mute.stored[:6] == [1, 2, 3, 1, 2, 3], "its consumer recognises the duplicate"
        assert here.stored == list(range(50))


def test_batch_in_doubt_goes_at_once_to_destination_with_same_store() -> None:
    ring, mute, same, other = Ring(8), Consumer("mute", "x"), Consumer("same", "x"), Consumer("other", "y")
    same.down = other.down = mute.mute = True
    with forwarding(ring, mute, same, other) as running:
        end = put(ring, 1, 2, 3)
        eventually(running.in_doubt)
        other.down = False
        eventually(lambda: other.stored or put(ring, 7) and False)
        assert not ring.is_stored(0, end)
        same.down = False
        assert ring.wait_committed(0, end, 20)
        assert same.stored[:3] == [1, 2, 3] and not {1, 2, 3} & set(other.stored) and mute.down


def test_unexpected_error_leaves_batch_in_doubt() -> None:
    ring, here, buggy = Ring(8), Consumer("here"), Consumer("buggy")
    here.down = buggy.buggy = True
    with forwarding(ring, here, buggy):
        end = put(ring, 1)
        eventually(lambda: buggy.calls > 1)
        here.down = False
        eventually(lambda: here.stored or put(ring, 2) and False)
        assert not ring.is_stored(0, end)
        buggy.buggy = False
        assert ring.wait_committed(0, end, 20) and 1 in buggy.stored and 1 not in here.stored


@pytest.mark.parametrize("fate", ["buggy", "mute"])
def test_next_store_keeps_the_store_of_a_batch_in_doubt(fate: str) -> None:
    """The batch was sent to a named store, then, at the same address, to one without identity. It may be the same.

    The same holds if the next link fails in a way that nothing expected.
    """
    ring, consumer = Ring(8), Consumer("there", "the one")
    consumer.destination.fixed, consumer.mute = False, True
    running = Forwarder(ring, [], 8)
    put(ring, 1)
    assert running.turn(Worker(consumer.destination, Link(consumer))) and consumer.stored == [1]
    consumer.down, consumer.identity = False, None
    setattr(consumer, fate, True)
    assert running.turn(Worker(consumer.destination, Link(consumer)))
    assert running.in_doubt() == {consumer.destination: 1}
    consumer.destination.health.resign()
    consumer.down = consumer.mute = consumer.buggy = False
    consumer.identity = "another"
    assert running._doubts.take(consumer.destination, connected(consumer).identity) is None
    consumer.identity = "the one"
    assert running.turn(Worker(consumer.destination, Link(consumer))) and not running.in_doubt()


def test_destination_that_never_acks_gets_no_further_batches() -> None:
    """It accepts links, but a link alone does not show that it is up."""
    ring, here, mute = Ring(64), Consumer("here"), Consumer("mute")
    mute.mute = True
    with forwarding(ring, here, mute, max_workers=2) as running:
        eventually(lambda: mute.calls or put(ring, 1) and False)
        first = mute.stored[0]
        for _ in range(100):
            mute.down = False
            since = ring.cursor
            assert ring.wait_committed(since, put(ring, 9), 20) or running.in_doubt()
        assert len(running.in_doubt()) == 1 and set(mute.stored) == {first}


def test_each_destination_has_a_worker_beyond_the_maximum() -> None:
    ring, consumers = Ring(8), [Consumer(name) for name in "abc"]
    consumers[0].down = consumers[1].down = True
    with forwarding(ring, *consumers, max_workers=1) as running:
        assert ring.wait_committed(0, put(ring, 1, 2), 20) and running.stats().workers == 3
        consumers[2].mute = True
        end = put(ring, 3)
        eventually(running.in_doubt)
        consumers[0].down = False
        since = ring.cursor
        assert ring.wait_committed(since, put(ring, 4), 20) and not ring.is_stored(0, end)
        consumers[2].mute = consumers[2].down = False
        assert ring.wait_committed(0, end, 20)


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
        eventually(running.in_doubt)
        name_consumers(running, here, new)
        since = ring.cursor
        assert ring.wait_committed(since, put(ring, 2), 20) and new.stored == [2]
        before = old.destination
        assert before in running.destinations and before.dropped
        name_consumers(running, here, new, old)
        assert old.destination is before and not before.dropped, "its workers had not ended"
        name_consumers(running, here, new)
        old.mute = old.down = False
        assert ring.wait_committed(0, end, 20)
        eventually(lambda: before not in running.destinations)
        assert before.workers == 0
        name_consumers(running, here, new, old)
        assert old.destination is not before and not old.destination.dropped
        assert ring.wait_committed(0, put(ring, 3), 20)


def test_dropped_destination_without_worker_is_removed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise statistics and metrics would show it forever, and twice once it is named again."""
    ring, here, new = Ring(8), Consumer("here"), Consumer("new")

    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with forwarding(ring, here) as running:
        with monkeypatch.context() as short:
            short.setattr(threading.Thread, "start", no_thread)
            name_consumers(running, here, new)
        assert new.destination in running.destinations and new.destination.workers == 0
        name_consumers(running, here)
        assert list(running.destinations) == [here.destination]
        assert ring.wait_committed(0, put(ring, 1), 20)


def test_destination_without_thread_gets_worker_at_next_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the maximum of workers is reached, and nothing is to be stored."""
    ring, here, new = Ring(8), Consumer("here", "x"), Consumer("new", "y")

    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with forwarding(ring, here, max_workers=1) as running:
        with monkeypatch.context() as short:
            short.setattr(threading.Thread, "start", no_thread)
            name_consumers(running, here, new)
            running.change([here.endpoint, new.endpoint])
        assert new.destination.workers == 0, "it tries again, and that is not an error"
        for _ in range(2):
            running.change([here.endpoint, new.endpoint])  # as each time names are resolved
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
    with forwarding(ring, one, two) as running:
        put(ring, 1)
        if state == "in doubt":
            eventually(running.in_doubt)
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
    old.new_destination(fixed=False)
    here.down = old.mute = True
    with forwarding(ring, here, old) as running:
        end = put(ring, 1)
        eventually(running.in_doubt)
        old.identity, old.mute, old.down = "z", False, False  # another consumer has its address now
        name_consumers(running, here)
        eventually(lambda: put(ring, 2) and old.destination not in running.destinations)
        here.down = False
        for _ in range(20):
            since = ring.cursor
            assert ring.wait_committed(since, put(ring, 3), 20)
        assert not ring.is_stored(0, end) and 1 not in here.stored and old.stored[0] == 1 not in old.stored[1:]
        back = Consumer("back", "y")
        name_consumers(running, here, back)
        assert ring.wait_committed(0, end, 20) and 1 in back.stored


@pytest.mark.slow
def test_name_with_other_addresses_is_no_longer_the_same_consumer() -> None:
    ring, name, one, two = Ring(8), Consumer("name", "x"), Consumer("one", "x"), Consumer("two", "y")
    name.mute = one.down = True
    with forwarding(ring, name) as running:
        end = put(ring, 1)
        eventually(running.in_doubt)
        name_consumers(running, one, two)
        name.identity, name.mute, name.down = "y", False, False  # the name now leads to the second one
        eventually(lambda: name.destination not in running.destinations)
        assert name.stored == [1] and not two.stored
        one.down = False
        assert ring.wait_committed(0, end, 20) and one.stored == [1]


def test_destination_that_is_back_while_its_worker_leaves_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ring, here, old = Ring(8), Consumer("here"), Consumer("old")
    looking: list[Blocked] = []

    def has_for(*unused: object) -> bool:
        if not looking:
            looking.append(Blocked(lambda: name_consumers(running, here, old)))
            looking[0].still()
        return False

    with forwarding(ring, here, old) as running:
        monkeypatch.setattr(running._doubts, "has_for", has_for)
        name_consumers(running, here)
        eventually(lambda: looking)
        looking[0].result()
        eventually(lambda: [each.workers for each in running.destinations] == [1, 1])
        assert ring.wait_committed(0, put(ring, 1), 20)


@pytest.mark.parametrize("several", [True, False])
def test_late_batch_holds_back_only_its_own_records(several: bool, caplog: pytest.LogCaptureFixture) -> None:
    """With a single consumer there is nothing else to do than to wait."""
    ring, late, other = Ring(8), Consumer("late", "x"), Consumer("other", "y")
    late.late_after = 0.01
    late.gate.clear()
    other.down = True
    if not several:
        late.destination.only = True
    with forwarding(ring, *((late, other) if several else (late,))) as running:
        end = put(ring, 1, 2)
        eventually(lambda: late.busy)
        other.down = False
        if several:
            for turn in range(50):
                since = ring.cursor
                assert ring.wait_committed(since, put(ring, turn), 20)
            assert other.stored == list(range(50)) and late.destination.workers == 1
            assert running.in_doubt() == {late.destination: 2} and not ring.is_stored(0, end)
        else:
            assert not ring.wait_committed(0, end, 0.2) and ring.stats().depth == 2
        late.gate.set()
        assert ring.wait_committed(0, end, 20) and late.stored[:2] == [1, 2] and late.calls >= 1
        assert not running.in_doubt() and not late.health.probed
    late_lines = [record.args for record in caplog.records if record.msg == "link_late"]
    assert {"consumer": "late"} in late_lines if several else not late_lines


@pytest.mark.parametrize("probed", [False, True])
def test_consumer_with_late_batch_gets_no_more_even_if_it_was_probed(probed: bool) -> None:
    """Another link may have failed before, and its worker may still try to connect."""
    health = Health("a:1")
    if probed:
        Blocked(lambda: health.on_failure("refused", sent=False)).result()
    assert not Blocked(lambda: health.yields(linked=True, several=True)).result()
    health.on_late()
    assert Blocked(lambda: health.yields(linked=True, several=True)).result()


def test_late_batch_that_is_surely_not_stored_goes_elsewhere() -> None:
    """If the consumer has stopped in order, even a late batch is not in doubt."""
    ring, late, other = Ring(8), Consumer("late", "x"), Consumer("other", "y")
    late.late_after = 0.01
    late.gate.clear()
    other.down = True
    with forwarding(ring, late, other) as running:
        end = put(ring, 1, 2)
        eventually(running.in_doubt)
        late.stops = True
        late.gate.set()
        other.down = False
        assert ring.wait_committed(0, end, 20) and other.stored == [1, 2]
        assert not running.in_doubt() and not late.stored


def test_recovered_consumer_with_nothing_to_send_is_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise a publisher that gets no records while it is not ready would never be ready again."""
    monkeypatch.setattr(readiness, "check_consumer", lambda *unused: None)
    ring, back, same = Ring(8), Consumer("back", "x"), Consumer("same", "x")
    back.mute = same.down = True
    with forwarding(ring, back, same) as running:
        ready = Readiness(ring, None, None, running, Credentials())
        end = put(ring, 1)
        eventually(running.in_doubt)
        same.down = False
        assert ring.wait_committed(0, end, 20) and same.stored == [1]
        same.health.set_down("it has gone")
        back.mute = back.down = False
        eventually(lambda: running.linked(back.destination))
        assert back.health.down and not ready.reasons()
