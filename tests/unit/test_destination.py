"""Several destinations: workers spread over them, who fails is left out until it is back, and a batch in doubt goes where it
may be stored already.
"""

import logging
import threading
from array import array
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support.harness import Blocked, eventually

from ringbuffer import Ring
from ringolib import timing
from ringolib.forward import workers as forwarder
from ringolib.forward.destination import Destination, Pin
from ringolib.forward.link import LinkState
from ringolib.forward.sink import InDoubt, SinkError
from ringolib.forward.workers import Forwarder
from ringolib.net.addresses import Endpoint
from ringolib.net.credentials import Credentials
from ringolib.status import readiness
from ringolib.status.readiness import Readiness
from ringolib.wire import Block

SOURCE = b"s" * 16


class Consumer:
    """The other end of fake links: it is `away`, or stores; a `deaf` one stores and is gone before the ack."""

    def __init__(self, name: str, identity: str | None = None) -> None:
        self.identity = identity
        self.away = self.deaf = self.buggy = False
        self.gate = threading.Event()
        self.gate.set()
        self.stored: list[int] = []
        self.calls = self.connects = self.busy = 0
        self.lock = threading.Lock()
        self.state = LinkState(name)
        self.destination = Destination(lambda connected: Link(self), self.state, alone=False)


class Link:
    """A worker's link to a Consumer."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self.ready = False
        self.identity: str | None = None

    def connect(self) -> None:
        if self.ready:
            return
        self._consumer.connects += 1
        if self._consumer.away:
            raise SinkError("refused")
        self.ready, self.identity = True, self._consumer.identity

    def store(self, block: Block) -> None:
        there = self._consumer
        if there.away:
            self.ready = False
            raise SinkError("gone")
        self.connect()
        with there.lock:
            there.calls += 1
            there.busy += 1
        try:
            assert there.gate.wait(30)
        finally:
            with there.lock:
                there.busy -= 1
        if there.buggy:
            raise ZeroDivisionError("a bug")
        if there.away:
            self._fail()
        with there.lock:
            there.stored += block.values
        if there.deaf:
            there.away = True
            self._fail()

    def _fail(self) -> None:
        identity, self.ready, self.identity = self.identity, False, None
        raise InDoubt("no ack", identity)

    def idle(self) -> None: ...
    def close(self) -> None: ...

    def abort(self) -> None:
        self._consumer.away = True
        self._consumer.gate.set()


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "BACKOFF_FIRST_SECONDS", 0.001)
    monkeypatch.setattr(timing, "BACKOFF_MAX_SECONDS", 0.01)
    monkeypatch.setattr(forwarder, "QUIET_SECONDS", 0)


@contextmanager
def forwarding(ring: Ring, *consumers: Consumer, most: int = 8, records: int = 65536) -> Iterator[Forwarder]:
    running = Forwarder(ring, [each.destination for each in consumers], most, records)
    try:
        yield running
    finally:
        ring.abort()
        assert running.stop(20)
        assert running.stats().workers == 0
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("forward-")]


def put(ring: Ring, *values: int) -> int:
    return ring.put(array("q", values), SOURCE, ring.cursor, 20)


def test_who_may_have_a_batch_in_doubt() -> None:
    """The store that may have it, wherever; where nobody says which it is, the same consumer."""
    there, other = Destination(lambda connected: Link(Consumer(""))), Destination(lambda connected: Link(Consumer("")))
    address = Destination(lambda connected: Link(Consumer("")), fixed=False)
    for destination, mark, store, takes in [
        (there, Pin(there, None), None, True),
        (there, Pin(there, None), "x", True),
        (other, Pin(there, None), "x", False),
        (other, Pin(there, "x"), None, False),
        (other, Pin(there, "x"), "y", False),
        (other, Pin(there, "x"), "x", True),
        (there, Pin(there, "x"), "y", True),  # what was given this address is this consumer
        (address, Pin(address, "x"), "y", False),  # an address of a name may become another one's
        (address, Pin(address, "x"), "x", True),
        (address, Pin(address, "x"), None, True),
    ]:
        assert destination.takes(mark, store) is takes, (mark.store, store)


def test_each_outlet_has_a_worker_from_the_start_and_new_ones_go_where_there_are_fewest() -> None:
    ring, consumers = Ring(64), [Consumer(name) for name in "abc"]
    for each in consumers:
        each.gate.clear()
    with forwarding(ring, *consumers, most=9, records=1) as running:
        assert running.stats().workers == 3
        put(ring, *range(64))
        eventually(lambda: [each.busy for each in consumers] == [3, 3, 3])
        assert [each.destination.workers for each in consumers] == [3, 3, 3] and running.stats().workers == 9
        for each in consumers:
            each.gate.set()
        assert ring.wait_committed(64, 20)
        assert sorted(value for each in consumers for value in each.stored) == list(range(64))


def test_work_follows_who_is_fast_and_idle_workers_take_turns() -> None:
    ring, fast, slow = Ring(64), Consumer("fast"), Consumer("slow")
    with forwarding(ring, fast, slow, most=2):
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


def test_one_that_is_away_takes_nothing_and_has_work_again_when_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    """It is probed by one worker, also while there is nothing to store; no batch waits for it meanwhile."""
    caplog.set_level(logging.INFO)
    ring, here, away = Ring(64), Consumer("here"), Consumer("away")
    away.away = True
    with forwarding(ring, here, away) as running:
        eventually(lambda: away.connects > 3)
        for turn in range(50):
            assert ring.wait_committed(put(ring, turn), 20)
        assert here.stored == list(range(50)) and away.calls == 0 and away.destination.workers == 1
        away.away = False
        eventually(lambda: not away.state.down)
        eventually(lambda: away.stored or not ring.wait_committed(put(ring, 1), 20))
        assert running.stats().workers >= 2
    said = [(record.getMessage(), record.args["consumer"]) for record in caplog.records]  # type: ignore[index,call-overload]
    assert said == [("link_down", "away"), ("link_up", "here"), ("link_up", "away")] or said == [
        ("link_up", "here"),
        ("link_down", "away"),
        ("link_up", "away"),
    ]


def test_a_batch_in_doubt_goes_to_the_same_consumer_only_and_the_others_go_on() -> None:
    ring, here, deaf = Ring(8), Consumer("here", "x"), Consumer("deaf", "y")
    here.away = deaf.deaf = True
    with forwarding(ring, here, deaf):
        end = put(ring, 1, 2, 3)
        eventually(lambda: ring.marks())
        here.away = False
        for turn in range(50):  # several times the ring
            since = ring.cursor
            assert ring.wait_committed(put(ring, turn), 20, since)
        assert here.stored == list(range(50)) and deaf.stored == [1, 2, 3] and deaf.calls == 1
        assert not ring.is_stored(end)
        deaf.deaf = deaf.away = False
        assert ring.wait_committed(end, 20)
        assert deaf.stored[:6] == [1, 2, 3, 1, 2, 3], "there it is known for a duplicate"
        assert here.stored == list(range(50))


def test_a_batch_in_doubt_goes_to_whoever_has_the_same_store_at_once() -> None:
    ring, deaf, same, other = Ring(8), Consumer("deaf", "x"), Consumer("same", "x"), Consumer("other", "y")
    same.away = other.away = deaf.deaf = True
    with forwarding(ring, deaf, same, other):
        end = put(ring, 1, 2, 3)
        eventually(lambda: ring.marks())
        other.away = False
        eventually(lambda: other.stored or put(ring, 7) and False)
        assert not ring.is_stored(end)
        same.away = False
        assert ring.wait_committed(end, 20)
        assert same.stored[:3] == [1, 2, 3] and not {1, 2, 3} & set(other.stored) and deaf.away


def test_an_error_that_nobody_expected_leaves_the_batch_in_doubt() -> None:
    ring, here, buggy = Ring(8), Consumer("here"), Consumer("buggy")
    here.away = buggy.buggy = True
    with forwarding(ring, here, buggy):
        end = put(ring, 1)
        eventually(lambda: buggy.calls > 1)
        here.away = False
        eventually(lambda: here.stored or put(ring, 2) and False)
        assert not ring.is_stored(end)
        buggy.buggy = False
        assert ring.wait_committed(end, 20) and 1 in buggy.stored and 1 not in here.stored


def test_an_error_that_nobody_expected_does_not_make_it_forget_which_store_may_have_it() -> None:
    """Or a batch in doubt there would go to whichever store is at this address next."""
    ring, there = Ring(8), Consumer("there", "the one")
    there.destination.fixed, there.buggy = False, True
    put(ring, 1)
    ring.requeue(ring.reserve(1), there.destination.pin("the one"))
    assert Forwarder(ring, [], 8).step(there.destination, Link(there))
    assert ring.marks() == [(Pin(there.destination, "the one"), 1)]


def test_a_store_that_does_not_say_which_it_is_does_not_make_it_forget_which_one_may_have_it() -> None:
    """It was sent to one that says so, and then, at the same address, to one that does not: that may be the same."""
    ring, there = Ring(8), Consumer("there")
    there.destination.fixed, there.deaf = False, True
    put(ring, 1)
    ring.requeue(ring.reserve(1), there.destination.pin("the one"))
    assert Forwarder(ring, [], 8).step(there.destination, Link(there)) and there.stored == [1]
    assert ring.marks() == [(Pin(there.destination, "the one"), 1)]


def test_one_that_takes_batches_and_never_acks_gets_no_more_than_its_workers_had() -> None:
    """It accepts links: that is not enough to be back."""
    ring, here, deaf = Ring(64), Consumer("here"), Consumer("deaf")
    deaf.deaf = True
    with forwarding(ring, here, deaf, most=2):
        eventually(lambda: deaf.calls or put(ring, 1) and False)
        first = deaf.stored[0]
        for _ in range(100):
            deaf.away = False
            since = ring.cursor
            assert ring.wait_committed(put(ring, 9), 20, since) or ring.marks()
        assert len(ring.marks()) == 1 and set(deaf.stored) == {first}


def test_more_outlets_than_workers_have_one_each() -> None:
    ring, consumers = Ring(8), [Consumer(name) for name in "abc"]
    consumers[0].away = consumers[1].away = True
    with forwarding(ring, *consumers, most=1) as running:
        assert ring.wait_committed(put(ring, 1, 2), 20) and running.stats().workers == 3
        consumers[2].deaf = True
        end = put(ring, 3)
        eventually(lambda: ring.marks())
        consumers[0].away = False
        since = ring.cursor
        assert ring.wait_committed(put(ring, 4), 20, since) and not ring.is_stored(end)
        consumers[2].deaf = consumers[2].away = False
        assert ring.wait_committed(end, 20)


def test_one_that_is_back_gets_its_share_of_workers_though_there_are_as_many_as_there_may_be() -> None:
    ring, here, away = Ring(64), Consumer("here"), Consumer("away")
    away.away = True
    here.gate.clear()
    with forwarding(ring, here, away, most=6, records=1):
        put(ring, *range(60))
        eventually(lambda: here.destination.workers == 5 and here.busy == 5)
        away.away = False
        here.gate.set()
        eventually(lambda: put(ring, *range(64)) and abs(here.destination.workers - away.destination.workers) <= 1)


def test_one_that_is_dropped_ends_its_workers_once_nothing_is_in_doubt_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwarder, "IDLE_SECONDS", 0.05)
    ring, here, gone, new = Ring(8), Consumer("here"), Consumer("gone"), Consumer("new")
    here.away = gone.deaf = True
    with forwarding(ring, here, gone) as running:
        end = put(ring, 1)
        eventually(lambda: ring.marks())
        running.change([new.destination], [gone.destination])
        since = ring.cursor
        assert ring.wait_committed(put(ring, 2), 20, since) and new.stored == [2]
        assert gone.destination in running.destinations and running.keep(gone.destination)
        running.change([], [gone.destination])
        gone.deaf = gone.away = False
        assert ring.wait_committed(end, 20)
        eventually(lambda: gone.destination not in running.destinations)
        assert gone.destination.workers == 0 and not running.keep(gone.destination)
        assert ring.wait_committed(put(ring, 3), 20)


def test_one_that_is_dropped_before_it_had_a_worker_is_gone_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would ever count it out: stats and metrics would have it for good, and twice once it is named again."""
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


def test_one_that_found_no_thread_has_a_worker_as_soon_as_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if there are as many as there may be, and nothing is to be stored."""
    ring, here, new = Ring(8), Consumer("here", "x"), Consumer("new", "y")

    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with forwarding(ring, here, most=1) as running:
        with monkeypatch.context() as short:
            short.setattr(threading.Thread, "start", no_thread)
            running.change([new.destination], [])
            assert running.keep(new.destination), "it is tried again, and that is no error"
        assert new.destination.workers == 0
        assert running.keep(new.destination) and running.keep(new.destination), "each time that names are resolved"
        assert new.destination.workers == 1
        eventually(lambda: new.stored or put(ring, 2) and False)


@pytest.mark.parametrize("state", ["up", "away", "in doubt", "storing"])
def test_it_stops_in_every_state(state: str) -> None:
    ring, one, two = Ring(8), Consumer("one"), Consumer("two")
    if state == "away":
        one.away = two.away = True
    if state == "in doubt":
        one.deaf = two.deaf = True
    if state == "storing":
        one.gate.clear()
        two.gate.clear()
    with forwarding(ring, one, two):
        put(ring, 1)
        if state == "in doubt":
            eventually(lambda: ring.marks())
        if state == "storing":
            eventually(lambda: one.busy + two.busy)


def test_while_all_are_away_there_are_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ever longer ones: no busy loop."""
    monkeypatch.setattr(timing, "BACKOFF_MAX_SECONDS", 30)
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    ring, consumers = Ring(8), [Consumer(name) for name in "ab"]
    for each in consumers:
        each.away = True
    with forwarding(ring, *consumers):
        put(ring, 1)
        eventually(lambda: all(each.connects >= 5 for each in consumers))
        assert all(each.connects < 20 for each in consumers)


def test_what_is_in_doubt_at_one_store_goes_to_no_other_though_only_one_consumer_is_left() -> None:
    ring, here, gone = Ring(8), Consumer("here", "x"), Consumer("gone", "y")
    gone.destination = Destination(lambda connected: Link(gone), gone.state, fixed=False, alone=False)
    here.away = gone.deaf = True
    with forwarding(ring, here, gone) as running:
        end = put(ring, 1)
        eventually(lambda: ring.marks())
        gone.identity, gone.deaf, gone.away = "z", False, False  # another one has its address now
        running.change([], [gone.destination])
        eventually(lambda: put(ring, 2) and gone.destination not in running.destinations)
        here.away = False
        for _ in range(20):
            since = ring.cursor
            assert ring.wait_committed(put(ring, 3), 20, since)
        assert not ring.is_stored(end) and 1 not in here.stored and gone.stored[0] == 1 not in gone.stored[1:]
        back = Consumer("back", "y")
        running.change([back.destination], [])
        assert ring.wait_committed(end, 20) and 1 in back.stored


def test_what_became_in_doubt_while_a_worker_without_a_link_waited_goes_to_no_other_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It looked before whether there was such a batch; who it would reach, nobody knows until there is a link."""
    monkeypatch.setattr(forwarder, "IDLE_SECONDS", 0.01)
    ring, there = Ring(8), Consumer("there", "another")
    there.destination.fixed = False  # a name with one address
    link = Link(there)
    put(ring, 1)
    ring.requeue(ring.reserve(1), there.destination.pin("the one"))
    running = Forwarder(ring, [], 8)
    with monkeypatch.context() as before:
        before.setattr(Ring, "has_marked", False)
        assert running.step(there.destination, link)
    assert running.step(there.destination, link) and link.ready
    assert not there.stored and len(ring.marks()) == 1
    there.identity = "the one"
    assert running.step(there.destination, Link(there)) and there.stored == [1]


def test_a_name_that_has_other_addresses_now_is_no_longer_the_same_consumer() -> None:
    ring, name, one, two = Ring(8), Consumer("name", "x"), Consumer("one", "x"), Consumer("two", "y")
    name.deaf = one.away = True
    with forwarding(ring, name) as running:
        end = put(ring, 1)
        eventually(lambda: ring.marks())
        running.change([one.destination, two.destination], [name.destination])
        name.identity, name.deaf, name.away = "y", False, False  # by its name the second one answers
        eventually(lambda: name.destination not in running.destinations)
        assert name.stored == [1] and not two.stored
        one.away = False
        assert ring.wait_committed(end, 20) and one.stored == [1]


def test_one_that_is_taken_back_has_a_worker_however_that_coincides_with_its_leaving(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forwarder, "IDLE_SECONDS", 0.05)
    ring, here, gone = Ring(8), Consumer("here"), Consumer("gone")
    looking: list[Blocked] = []

    def has_for(takes: object) -> bool:
        if not looking:
            looking.append(Blocked(lambda: running.keep(gone.destination)))
            looking[0].still()
        return False

    with forwarding(ring, here, gone) as running:
        monkeypatch.setattr(ring, "has_for", has_for)
        running.change([], [gone.destination])
        eventually(lambda: looking)
        kept = looking[0].result()
        eventually(
            lambda: bool(gone.destination.workers) is kept and (gone.destination in running.destinations) is kept
        )
        assert ring.wait_committed(put(ring, 1), 20)


def test_one_that_is_back_with_nothing_to_try_it_with_is_asked_whether_it_is_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or else a publisher that gets nothing while it is not ready never is again."""
    monkeypatch.setattr(readiness, "check_consumer", lambda *unused: None)
    ring, back, same = Ring(8), Consumer("back", "x"), Consumer("same", "x")
    back.destination.place, same.destination.place = Endpoint("back", 1, "back"), Endpoint("same", 1, "same")
    back.deaf = same.away = True
    with forwarding(ring, back, same) as running:
        ready = Readiness(ring, None, None, running, Credentials())
        end = put(ring, 1)
        eventually(lambda: ring.marks())
        same.away = False
        assert ring.wait_committed(end, 20) and same.stored == [1]
        same.state.failed("it has gone")
        back.deaf = back.away = False
        eventually(lambda: running.linked(back.destination))
        assert back.state.down and not ready.reasons()
