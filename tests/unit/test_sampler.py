"""The sampler: whose CPU and wall time goes where. In a world of made-up threads and clocks, and with real threads."""

import gc
import hashlib
import itertools
import json
import random
import re
import sys
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, SimpleNamespace

import pytest
from support.harness import Blocked, eventually, seeded
from support.pprof_reader import check_speedscope, read_profile

from ringolib.status import profile_formats
from ringolib.status import sampler as sampling
from ringolib.status.profile_formats import Cost, Profile, Stack
from ringolib.status.sampler import INTERVAL_NS, MOMENT_NS, sample

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="CPU time of threads is known on Linux only")
MS = 1_000_000


# A world: time passes only while the sampler waits.


def named(name: str) -> CodeType:
    return compile("0", f"{name}.py", "exec").replace(co_name=name)


class Frame:
    """As much of a frame as the sampler looks at."""

    def __init__(self, name: str, back: "Frame | None" = None, lasti: int = 0) -> None:
        self.f_code, self.f_back, self.f_lasti = named(name), back, lasti


class Actor:
    """A made-up thread: `load` is the part of the time for which it uses CPU where it is."""

    def __init__(self, world: "World", ident: int, native_id: int, name: str | None) -> None:
        self.world, self.ident, self.native_id, self.name = world, ident, native_id, name
        self.cpu = 0
        self.go("begin", 0)

    def go(self, place: str, load: float) -> None:
        """Moves it."""
        self.frame, self.load = Frame(place), load
        self.world.kept.append(self.frame)  # no two at one address: that has a test of its own


class World:
    """Threads, the clocks, and what happens at each time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.used = 10**9, 0  # used: the sampler's own CPU time
        self.cost = 0  # of each sample
        self.actors: dict[int, Actor] = {}
        self.at: Callable[[], None] = lambda: None  # after each wait
        self.times: list[int] = []
        self.ids = itertools.count(100)
        self.kept: list[Frame] = []
        fakes = {
            "sys": SimpleNamespace(
                _current_frames=self._frames, getswitchinterval=sys.getswitchinterval, setswitchinterval=lambda _: None
            ),
            "threading": SimpleNamespace(get_ident=lambda: 1, enumerate=self._enumerate),
            "time": SimpleNamespace(time_ns=lambda: 5, sleep=self._pass),
            "monotonic_ns": lambda: self.now,
            "thread_time_ns": lambda: self.used,
            "thread_cpu": self._cpu,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(sampling, name, fake)

    def thread(self, name: str | None, ident: int = 0) -> Actor:
        """A new thread; one without a name is not Python's own."""
        native_id = next(self.ids)
        actor = self.actors[ident or native_id] = Actor(self, ident or native_id, native_id, name)
        return actor

    def sample(self, seconds: float) -> Profile:
        """What the sampler finds."""
        return sample(seconds, self._wait)

    def _pass(self, seconds: float) -> None:
        self.now += round(seconds * 1e9)
        for actor in self.actors.values():
            actor.cpu += round(seconds * 1e9 * actor.load)

    def _wait(self, seconds: float) -> bool:
        self._pass(seconds)
        self.at()
        return False

    def _frames(self) -> dict[int, Frame]:
        self.used += self.cost
        self.times.append(self.now)
        return {1: Frame("sampler"), **{actor.ident: actor.frame for actor in self.actors.values()}}

    def _enumerate(self) -> list[Actor]:
        return [actor for actor in self.actors.values() if actor.name]

    def _cpu(self, native_id: int) -> int | None:
        return next((each.cpu for each in self.actors.values() if each.native_id == native_id and each.name), None)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def by_place(profile: Profile) -> dict[tuple[str, str], Cost]:
    """Costs by thread and innermost function."""
    found: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for (name, _, stack), cost in profile.costs.items():
        for n, value in enumerate(cost):
            found[name, stack[0][0].co_name][n] += value
    return {key: Cost(*costs) for key, costs in found.items()}


def test_a_busy_thread_has_cpu_and_an_idle_one_wall_only(world: World) -> None:
    world.thread("busy").go("burn", 1)
    world.thread("idle").go("doze", 0)
    profile = world.sample(1)
    found = by_place(profile)
    assert profile.duration == 10**9 and profile.started_at == 5
    assert found["busy", "burn"] == Cost(101, 10**9 + MOMENT_NS, 10**9), "and the moment in which that is found out"
    assert found["idle", "doze"] == Cost(101, 0, 10**9)
    assert len(found) == 2, "the sampling thread is left out"


def test_what_a_thread_did_unseen_counts_for_where_it_is_at_work_next(world: World) -> None:
    """It is seen waiting nine times of ten, though it has worked before."""
    actor = world.thread("both")
    turn = itertools.count()

    def move() -> None:
        actor.cpu += 3 * MS  # since the last look, somewhere
        work = next(turn) % 10 == 9
        actor.go("work" if work else "wait", 1 if work else 0)

    world.at = move
    found = by_place(world.sample(1))
    assert found["both", "wait"].cpu == 0
    assert found["both", "work"].cpu == actor.cpu - 3 * MS, "all but what was used before the first look"
    assert found["both", "wait"].wall > 8 * found["both", "work"].wall


def test_a_thread_never_seen_at_work_keeps_its_cpu(world: World) -> None:
    actor = world.thread("shy")
    world.at = lambda: setattr(actor, "cpu", actor.cpu + MS)
    assert by_place(world.sample(1))["shy", "begin"].cpu == 100 * MS


def test_to_go_on_in_the_same_function_is_to_move(world: World) -> None:
    actor = world.thread("t")
    actor.go("both", 1)

    def go_on() -> None:
        if world.now == 1_500_000_000:
            actor.frame.f_lasti, actor.load = 2, 0

    world.at = go_on
    profile = world.sample(1)
    found = {stack[0][1]: cost for (_, _, stack), cost in profile.costs.items()}
    assert found[0].cpu == 500 * MS and found[2].cpu == 0 and found[0].wall + found[2].wall == 10**9


def test_one_long_call_keeps_its_cpu(world: World) -> None:
    """It does not move, and is not at work for all of the time."""
    actor = world.thread("zip")
    actor.go("compress", 0.9)

    def move() -> None:
        if world.now > 1_500_000_000:
            actor.go("after", 0)

    world.at = move
    found = by_place(world.sample(1))
    assert found["zip", "compress"].cpu == actor.cpu
    assert 440 * MS < actor.cpu < 460 * MS and found["zip", "after"].cpu == 0


def test_cpu_before_a_call_that_waits_is_not_its_own(world: World) -> None:
    """Found waiting, it wakes, works unseen, and is found in the next wait."""
    actor = world.thread("t")
    actor.go("work", 1)
    places = iter(["work", *[f"wait{n}" for n in range(50)], "work"])

    def move() -> None:
        place = next(places, "work")
        actor.cpu += 2 * MS
        actor.go(place, place == "work")

    world.at = move
    found = by_place(world.sample(0.6))
    assert sum(cost.cpu for (_, place), cost in found.items() if place.startswith("wait")) == 0


def test_a_thread_that_starts_while_sampling_has_all_its_cpu(world: World) -> None:
    world.thread("old").go("doze", 0)

    def begin() -> None:
        if world.now == 1_500_000_000:
            late = world.thread("late")
            late.cpu = 6 * MS  # in the interval in which it began
            late.go("burn", 1)

    world.at = begin
    found = by_place(world.sample(1))
    assert found["late", "burn"].cpu == 506 * MS + MOMENT_NS and found["late", "burn"].wall == 510 * MS


def test_a_thread_that_only_shows_itself_late_has_no_more_cpu_than_there_was_time(world: World) -> None:
    """Of a C library, say: it may have run for hours."""

    def show() -> None:
        if world.now == 1_500_000_000:
            late = world.thread("Dummy-1")
            late.cpu = 3600 * 10**9
            late.go("callback", 0)

    world.at = show
    assert by_place(world.sample(1))["Dummy-1", "callback"].cpu == INTERVAL_NS


def test_a_thread_that_ends_keeps_what_it_has_used(world: World) -> None:
    """Also what nobody has seen it do: it counts for where it was last at work."""
    actor = world.thread("gone")
    actor.go("burn", 1)

    def end() -> None:
        if world.now == 1_300_000_000:
            actor.go("doze", 0)
        elif world.now == 1_500_000_000:
            del world.actors[actor.ident]

    world.at = end
    found = by_place(world.sample(1))
    assert found["gone", "burn"].cpu == 300 * MS and found["gone", "doze"].cpu == 0
    assert found["gone", "burn"].wall + found["gone", "doze"].wall == 490 * MS


@pytest.mark.parametrize("names", [("conn-1", "conn-2"), ("same", "same")])
def test_the_ident_of_an_ended_thread_may_be_a_new_ones(world: World, names: tuple[str, str]) -> None:
    world.thread(names[0], 7).go("first", 1)
    ids = [world.actors[7].native_id]

    def change() -> None:
        if world.now == 1_500_000_000:
            second = world.thread(names[1], 7)
            second.cpu = 2 * MS
            second.go("second", 1)
            ids.append(second.native_id)

    world.at = change
    profile = world.sample(1)
    found = {(name, native_id): cost for (name, native_id, _), cost in profile.costs.items()}
    assert found.keys() == set(zip(names, ids, strict=True))
    assert found[names[0], ids[0]].cpu == 490 * MS and found[names[0], ids[0]].wall == 490 * MS
    assert found[names[1], ids[1]].cpu == 502 * MS + MOMENT_NS and found[names[1], ids[1]].wall == 510 * MS


def test_what_a_thread_did_unseen_is_not_the_next_ones_with_its_ident(world: World) -> None:
    first = world.thread("first", 7)
    first.go("burn", 1)

    def change() -> None:
        if world.now == 1_300_000_000:
            first.cpu += 4 * MS
            first.go("doze", 0)
        elif world.now == 1_500_000_000:
            world.thread("second", 7).go("burn", 1)

    world.at = change
    found = by_place(world.sample(1))
    assert found["first", "burn"].cpu == first.cpu == 304 * MS
    assert found["second", "burn"].cpu == 500 * MS + MOMENT_NS


def test_a_thread_may_be_renamed(world: World) -> None:
    actor = world.thread("before")
    actor.go("burn", 1)

    def rename() -> None:
        if world.now == 1_500_000_000:
            actor.name = "after"
            actor.go("burn", 1)

    world.at = rename
    found = by_place(world.sample(1))
    assert found["before", "burn"].cpu + found["after", "burn"].cpu == 10**9 + MOMENT_NS
    assert abs(found["before", "burn"].cpu - found["after", "burn"].cpu) < 30 * MS


def test_a_foreign_thread_has_wall_time(world: World) -> None:
    actor = world.thread(None)
    actor.go("callback", 1)
    found = by_place(world.sample(1))
    assert found == {(f"thread-{actor.ident}", "callback"): Cost(101, 0, 10**9)}


def test_nothing_is_lost_and_nothing_invented(world: World) -> None:
    """Threads that do anything: per thread, wall is the time for which it was there, and CPU what its clock says."""
    chance = random.Random(seeded())
    born: dict[int, tuple[int, int]] = {}  # the time of the sample before it came, and its CPU then
    ended: dict[int, tuple[int, int]] = {}  # the time of the last sample it was in, and its CPU at the last look
    alive: list[Actor] = []

    def begin(*idents: int) -> None:
        actor = world.thread("t", chance.choice(idents))
        alive[:] = world.actors.values()
        born[actor.native_id] = (world.times[-1] if world.times else world.now, 0)

    def act() -> None:
        if not world.times:
            return
        for actor in alive:
            if chance.random() < 0.3:
                actor.go(chance.choice("abcd"), chance.choice([0, 0, 0.4, 1]))
            elif chance.random() < 0.1:
                actor.load = chance.random()
        if chance.random() < 0.1:
            gone = set(world.actors.values())
            begin(0, 0, 3, 4, 5)
            for actor in gone - set(world.actors.values()):
                ended[actor.native_id] = (world.times[-1], -1)
        if len(alive) > 3 and chance.random() < 0.08:
            actor = alive.pop(chance.randrange(len(alive)))
            del world.actors[actor.ident]
            ended[actor.native_id] = (world.times[-1], -1)

    for _ in range(6):
        begin(0)
    world.at = act
    profile = world.sample(10)
    wall: dict[int, int] = defaultdict(int)
    cpu: dict[int, int] = defaultdict(int)
    for (_, native_id, _), cost in profile.costs.items():
        wall[native_id] += cost.wall
        cpu[native_id] += cost.cpu
        assert cost.samples > 0 and cost.cpu >= 0 <= cost.wall
    final = {actor.native_id: actor.cpu for actor in world.actors.values()}
    assert len(final) > 1 and len(ended) > 5
    for native_id, (since, used) in born.items():
        until = ended[native_id][0] if native_id in ended else world.times[-1]
        assert wall[native_id] == max(0, until - since), native_id
        if native_id in final:
            assert cpu[native_id] == final[native_id] - used
        else:
            assert cpu[native_id] <= until - since + INTERVAL_NS


def test_samples_are_a_tenth_of_a_second_apart_and_the_last_is_at_the_end(world: World) -> None:
    world.thread("t")
    assert world.sample(0.25).duration == 250 * MS
    assert len(world.times) == 26 and world.times[-1] - world.times[0] == 250 * MS
    assert {b - a for a, b in itertools.pairwise(world.times)} == {INTERVAL_NS}


def test_dear_samples_are_rarer(world: World) -> None:
    """Less than a tenth of a core, whatever a sample costs."""
    world.thread("t").go("burn", 1)
    world.cost = 2 * MS
    profile = world.sample(1)
    assert sum(each.samples for each in profile.costs.values()) == len(world.times)
    assert len(world.times) * world.cost < 0.1 * 10**9 + 2 * world.cost
    assert by_place(profile)["t", "burn"].cpu == 10**9 + MOMENT_NS


def test_missed_samples_are_not_made_up_for(world: World) -> None:
    """Somebody held Python's lock: a burst of samples after that would see one moment many times."""
    world.thread("t")

    def stall() -> None:
        if len(world.times) == 20:
            world._pass(0.5)

    world.at = stall
    world.sample(1)
    assert sum(time > 10**9 + 690 * MS for time in world.times) <= 33
    assert len(world.times) < 60


def test_it_ends_when_it_is_told(world: World) -> None:
    world.thread("t")
    answers = iter([False] * 5 + [True])
    profile = sample(60, lambda seconds: world._pass(seconds) or next(answers))
    assert profile.duration == 40 * MS and by_place(profile)["t", "begin"] == Cost(5, 0, 40 * MS)


# Real threads.


@contextmanager
def running(*jobs: Callable[[threading.Event], None], names: tuple[str, ...] = ()) -> Iterator[list[threading.Thread]]:
    """Threads that do their jobs until the end."""
    over = threading.Event()
    threads = [threading.Thread(target=job, args=(over,), name=job.__name__) for job in jobs]
    for thread in threads:
        thread.start()
    try:
        yield threads
    finally:
        over.set()
        for thread in threads:
            thread.join()


def of_thread(profile: Profile, name: str) -> dict[str, Cost]:
    """Costs of the thread by functions anywhere in the stack, each once."""
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for (thread, _, stack), cost in profile.costs.items():
        for function in {code.co_name for code, _ in stack} if thread == name else ():
            for n, value in enumerate(cost):
                found[function][n] += value
    return {function: Cost(*costs) for function, costs in found.items()}


def spin(seconds: float) -> None:
    """Uses so much CPU time in Python."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


@LINUX
def test_real_threads_that_work_wait_or_do_both() -> None:
    used = {}

    def sleeper(over: threading.Event) -> None:
        over.wait()

    def shift(over: threading.Event) -> None:
        while not over.wait(0.05):
            spin(0.025)
        used["shift"] = time.thread_time_ns()

    def cruncher(over: threading.Event) -> None:
        block = bytes(40_000_000)
        while not over.is_set():
            crunch(block)

    def crunch(block: bytes) -> None:
        hashlib.sha256(block).digest()  # without Python's lock, for long: the thread does not move

    with running(sleeper, shift, cruncher):
        profile = sample(1, threading.Event().wait)
    assert not of_thread(profile, threading.current_thread().name), "the sampling thread is left out"
    idle, both = of_thread(profile, "sleeper")["sleeper"], of_thread(profile, "shift")
    assert abs(idle.wall - profile.duration) < profile.duration / 10 and idle.cpu < profile.duration / 50
    assert both["spin"].cpu > 0.8 * both["shift"].cpu > 0, "not where it waits"
    assert both["shift"].cpu <= used["shift"]
    assert both["wait"].wall > 0.3 * both["shift"].wall
    call = of_thread(profile, "cruncher")
    assert call["crunch"].cpu > 0.8 * call["cruncher"].cpu > profile.duration / 20


@LINUX
def test_short_work_is_seen_too() -> None:
    """Less than Python's switch interval: the sampler must not have to wait until it is done."""
    used = {}

    def shift(over: threading.Event) -> None:
        while not over.wait(0.02):
            spin(0.003)
        used["shift"] = time.thread_time_ns()

    def rival(over: threading.Event) -> None:
        while not over.is_set():
            spin(0.01)

    with running(shift, rival):
        profile = sample(1, threading.Event().wait)
    found = of_thread(profile, "shift")
    assert used["shift"] >= found["shift"].cpu > 0.5 * used["shift"]
    assert found["spin"].cpu > 0.5 * found["shift"].cpu


def test_the_switch_interval_is_shorter_only_meanwhile() -> None:
    usual = sys.getswitchinterval()
    meanwhile = []

    def wait(seconds: float) -> bool:
        meanwhile.append(sys.getswitchinterval())
        raise KeyError

    with pytest.raises(KeyError):
        sample(1, wait)
    assert meanwhile[0] < usual == sys.getswitchinterval()


@LINUX
def test_real_threads_that_want_pythons_lock_all_the_time() -> None:
    used = {}

    def first(over: threading.Event) -> None:
        while not over.is_set():
            spin(0.01)
        used["first"] = time.thread_time_ns()

    def second(over: threading.Event) -> None:
        while not over.is_set():
            spin(0.01)
        used["second"] = time.thread_time_ns()

    with running(first, second):
        profile = sample(1, threading.Event().wait)
    for name, ns in used.items():
        found = of_thread(profile, name)
        assert ns >= found[name].cpu > 0.5 * ns, "beginning and end are not in the profile"
        assert found["spin"].cpu > 0.8 * found[name].cpu


@LINUX
def test_real_threads_come_and_go() -> None:
    def nursery(over: threading.Event) -> None:
        number = itertools.count()
        while not over.is_set():
            child = threading.Thread(target=spin, args=(0.02,), name=f"child-{next(number)}")
            child.start()
            child.join()

    with running(nursery):
        profile = sample(1, threading.Event().wait)
    children = {key[0]: key[1] for key in profile.costs if key[0].startswith("child-")}
    assert len(children) > 3 and len(set(children.values())) == len(children), "each with its own id"
    assert sum(cost.cpu for key, cost in profile.costs.items() if key[0] in children) > 0
    for name in children:
        assert of_thread(profile, name)["_bootstrap"].cpu < 60 * MS


def test_what_a_frame_holds_is_freed_soon() -> None:
    class Thing:
        pass

    gone: list[weakref.ref[Thing]] = []
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        thing = Thing()
        gone.append(weakref.ref(thing))
        inside.set()
        leave.wait()

    def job(over: threading.Event) -> None:
        hold()
        over.wait()

    ended = threading.Event()
    with running(job):
        inside.wait()
        sampler = Blocked(lambda: sample(60, ended.wait))
        assert sampler.still(0.05)
        leave.set()
        eventually(lambda: gone[0]() is None, deadline=5)
        assert sampler.still(0)
        ended.set()
        assert sampler.result().duration < 60e9
    gc.collect()


@LINUX
def test_what_a_finished_call_worked_with_is_free_again() -> None:
    """A bytearray cannot be resized while a view of it is kept, be it by a frame that is kept."""
    tries = errors = 0

    def job(over: threading.Event) -> None:
        nonlocal tries, errors
        buffer = bytearray(1000)

        def look() -> None:
            view = memoryview(buffer)
            spin(0.0002)
            assert view

        while not over.is_set():
            look()
            tries += 1
            try:
                buffer.append(1)
            except BufferError:
                errors += 1

    with running(job):
        sample(1, threading.Event().wait)
    assert tries > 100 and errors < tries / 50, "a frame that is looked at right then may be seen"


def test_a_frame_at_the_address_of_another_is_another(world: World) -> None:
    """As it comes to be when a call ends and the next one begins: only the thread's clock tells."""
    actor = world.thread("t")
    actor.go("first", 0.5)
    world.at = lambda: setattr(actor.frame, "f_code", named("second")) if world.now >= 1_500_000_000 else None
    found = by_place(world.sample(1))
    assert found["t", "first"].wall == 490 * MS and found["t", "second"].wall == 510 * MS


def test_a_still_thread_is_looked_at_now_and_then(world: World) -> None:
    """Its clock, in one of a few samples: where it has been for long, it hardly can be anywhere else."""
    actor = world.thread("t")
    actor.go("wait", 0)

    def change() -> None:
        if world.now == 1_500_000_000:
            actor.frame.f_code, actor.load = named("work"), 1

    world.at = change
    found = by_place(world.sample(1))
    assert found["t", "work"].wall >= (510 - 10 * sampling.RECHECK) * MS
    assert found["t", "work"].cpu == 500 * MS + MOMENT_NS


def test_the_cpu_time_of_a_thread_is_its_own() -> None:
    me = threading.get_native_id()
    before, own = sampling.thread_cpu(me), time.thread_time_ns()
    assert before is not None and abs(own - before) < 5 * MS
    spin(0.03)
    after = sampling.thread_cpu(me)
    assert after is not None and after - before >= 25 * MS
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    ended = thread.native_id or 0
    eventually(lambda: sampling.thread_cpu(ended) is None, "a moment after the join, the system has ended it too")
    assert sampling.thread_cpu(0) is None and sampling.thread_cpu(1 if me != 1 else 2) is None


# Formats.


def example() -> Profile:
    """Made-up costs of real code, with names that formats have to bear."""
    inner, outer = (spin.__code__, 4), (of_thread.__code__, 8)
    odd = (compile("0", "/x/od;d\nname.py", "exec"), 0)
    costs: dict[tuple[str, int, Stack], Cost] = {
        ("busy", 41, (inner, outer)): Cost(3, 5_000_000, 6_000_000),
        ("busy", 42, (inner, outer)): Cost(2, 1_500_000, 2_000_000),
        ("id;le\n1", 43, (outer,)): Cost(9, 0, 2**40),
        ("odd \udcff", 0, (odd, outer)): Cost(1, 999, 1_000),
    }
    return Profile(1_700_000_000_000_000_000, 10**9, costs)


def test_pprof_says_what_the_profile_says() -> None:
    profile = example()
    read = read_profile(profile_formats.pprof(profile))
    assert read.types == [("samples", "count"), ("cpu", "nanoseconds"), ("wall", "nanoseconds")]
    assert read.default == "cpu" and read.period == (("cpu", "nanoseconds"), INTERVAL_NS)
    assert (read.time_ns, read.duration_ns) == (profile.started_at, profile.duration)
    assert read.mappings == [sys.executable]
    assert [sample.values for sample in read.samples] == [tuple(cost) for cost in profile.costs.values()]
    labels = [sample.labels for sample in read.samples]
    assert labels[0] == {"thread": "busy", "thread id": 41} and labels[1] == {"thread": "busy", "thread id": 42}
    assert labels[3]["thread"] == "odd ?"
    inner, outer = read.samples[0].calls
    assert (inner.function, inner.file, inner.start) == (
        "test_sampler.spin",
        __file__,
        spin.__code__.co_firstlineno,
    )
    assert outer.function == "test_sampler.of_thread" and inner.line >= inner.start
    assert read.samples[0].calls == read.samples[1].calls


def test_numbers_of_any_size_are_written() -> None:
    for number in (0, 1, 127, 128, 300, 2**31, 2**62, 2**63 - 1):
        profile = Profile(number, number, {("t", 1, ((spin.__code__, 0),)): Cost(number, number, number)})
        read = read_profile(profile_formats.pprof(profile))
        assert read.samples[0].values == (number,) * 3 and read.time_ns == number


def test_a_line_of_code_is_the_one_it_is_at() -> None:
    """The place is that of the call, also in callers."""

    def here() -> profile_formats.Place:
        frame = sys._getframe(1)
        return frame.f_code, frame.f_lasti

    place = here()
    line = sys._getframe().f_lineno - 1
    found = profile_formats.site(place)
    assert (found.line, found.file) == (line, __file__) and found.first_line < line
    assert found.function.endswith("test_a_line_of_code_is_the_one_it_is_at")
    assert profile_formats.site((spin.__code__, -1)).line == spin.__code__.co_firstlineno


def test_collapsed_lines_can_be_read_back() -> None:
    text = profile_formats.collapsed(example(), "cpu")
    assert text == "busy;test_sampler.of_thread;test_sampler.spin 6500\n", "µs; what has none is left out"
    lines = profile_formats.collapsed(example(), "wall").splitlines()
    assert len(lines) == 3
    for line in lines:
        assert re.fullmatch(r"[^;]+(;[^;]+)+ \d+", line)
    assert any(line.startswith("id:le 1;test_sampler.of_thread ") for line in lines)
    assert re.fullmatch(r"odd \udcff;test_sampler.of_thread;od:d name\.\S+ 1", lines[2])


def test_speedscope_keeps_its_schema() -> None:
    file = json.loads(profile_formats.speedscope(example(), "name"))
    check_speedscope(file)
    cpu, wall = file["profiles"]
    assert (cpu["name"], wall["name"]) == ("cpu", "wall")
    assert sum(cpu["weights"]) == 6_500_999 and sum(wall["weights"]) == 8_001_000 + 2**40
    names = [frame["name"] for frame in file["shared"]["frames"]]
    assert [names[n] for n in cpu["samples"][0]] == ["busy", "test_sampler.of_thread", "test_sampler.spin"]


def test_a_heap_profile_says_what_was_traced() -> None:
    traces = [([("/a/b.py", 3), ("/a/c.py", 7)], 2, 100), ([("/a/c.py", 7)], 1, 50)]
    read = read_profile(profile_formats.pprof_heap(traces, 77))
    assert read.types == [("inuse_objects", "count"), ("inuse_space", "bytes")] and read.default == "inuse_space"
    assert read.time_ns == 77 and [each.values for each in read.samples] == [(2, 100), (1, 50)]
    first = read.samples[0].calls
    assert [(call.function, call.file, call.line) for call in first] == [
        ("b.py:3", "/a/b.py", 3),
        ("c.py:7", "/a/c.py", 7),
    ]
