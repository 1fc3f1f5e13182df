"""The sampler attributes CPU time and wall time to stacks: with simulated threads and clocks, and with real threads."""

import gc
import hashlib
import itertools
import random
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

from ringolib.status import sampler
from ringolib.status.sampler import INTERVAL_NS, PROBE_NS, Cost, Profile, sample

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="CPU time of threads is known on Linux only")
MS = 1_000_000


# A simulation: time passes only while the sampler waits.


def make_code(name: str) -> CodeType:
    return compile("0", f"{name}.py", "exec").replace(co_name=name)


class Frame:
    """The attributes of a frame that the sampler reads."""

    def __init__(self, name: str, back: "Frame | None" = None, lasti: int = 0) -> None:
        self.f_code, self.f_back, self.f_lasti = make_code(name), back, lasti


class Actor:
    """A simulated thread: `load` is the share of the time in which it uses CPU in its current place."""

    def __init__(self, world: "World", ident: int, native_id: int, name: str | None) -> None:
        self.world, self.ident, self.native_id, self.name = world, ident, native_id, name
        self.cpu = 0
        self.go("begin", 0)

    def go(self, place: str, load: float) -> None:
        """Move the thread to another place."""
        self.frame, self.load = Frame(place), load
        self.world.kept.append(self.frame)  # so that no two frames have the same address


class World:
    """Simulated threads and clocks. `on_wait` is called after each wait of the sampler."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 10**9  # ns
        self.sampler_cpu = 0  # ns
        self.sample_cost = 0  # ns of CPU time that each sample takes
        self.actors: dict[int, Actor] = {}
        self.on_wait: Callable[[], None] = lambda: None
        self.times: list[int] = []  # of the samples
        self.ids = itertools.count(100)
        self.kept: list[Frame] = []
        fakes = {
            "sys": SimpleNamespace(
                _current_frames=self._frames, getswitchinterval=sys.getswitchinterval, setswitchinterval=lambda _: None
            ),
            "threading": SimpleNamespace(get_ident=lambda: 1, enumerate=self._enumerate),
            "time": SimpleNamespace(time_ns=lambda: 5, sleep=self._pass),
            "monotonic_ns": lambda: self.now,
            "thread_time_ns": lambda: self.sampler_cpu,
            "thread_cpu": self._cpu,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(sampler, name, fake)

    def thread(self, name: str | None, ident: int = 0) -> Actor:
        """Return a new thread; one without a name was not started by Python."""
        native_id = next(self.ids)
        actor = self.actors[ident or native_id] = Actor(self, ident or native_id, native_id, name)
        return actor

    def sample(self, seconds: float) -> Profile:
        """Return the sampler's profile."""
        return sample(seconds, self._wait)

    def _pass(self, seconds: float) -> None:
        self.now += round(seconds * 1e9)
        for actor in self.actors.values():
            actor.cpu += round(seconds * 1e9 * actor.load)

    def _wait(self, seconds: float) -> bool:
        self._pass(seconds)
        self.on_wait()
        return False

    def _frames(self) -> dict[int, Frame]:
        self.sampler_cpu += self.sample_cost
        self.times.append(self.now)
        return {1: Frame("sampler"), **{actor.ident: actor.frame for actor in self.actors.values()}}

    def _enumerate(self) -> list[Actor]:
        return [actor for actor in self.actors.values() if actor.name]

    def _cpu(self, native_id: int) -> int | None:
        return next((actor.cpu for actor in self.actors.values() if actor.native_id == native_id and actor.name), None)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def costs_by_place(profile: Profile) -> dict[tuple[str, str], Cost]:
    """Return the costs by thread and innermost function."""
    sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for (name, _, stack), cost in profile.costs.items():
        for n, value in enumerate(cost):
            sums[name, stack[0][0].co_name][n] += value
    return {key: Cost(*values) for key, values in sums.items()}


def test_busy_thread_has_cpu_time_and_idle_thread_only_wall_time(world: World) -> None:
    world.thread("busy").go("burn", 1)
    world.thread("idle").go("doze", 0)
    profile = world.sample(1)
    costs = costs_by_place(profile)
    assert profile.duration == 10**9 and profile.started_at == 5
    assert costs["busy", "burn"] == Cost(101, 10**9 + PROBE_NS, 10**9), "and the time of the probe that shows it"
    assert costs["idle", "doze"] == Cost(101, 0, 10**9)
    assert len(costs) == 2, "the sampling thread is left out"


def test_unassigned_cpu_goes_to_next_running_stack(world: World) -> None:
    """Nine of ten samples find the thread waiting, after work that no sample has found."""
    actor = world.thread("both")
    turn = itertools.count()

    def move() -> None:
        actor.cpu += 3 * MS  # between two samples
        work = next(turn) % 10 == 9
        actor.go("work" if work else "wait", 1 if work else 0)

    world.on_wait = move
    costs = costs_by_place(world.sample(1))
    assert costs["both", "wait"].cpu == 0
    assert costs["both", "work"].cpu == actor.cpu - 3 * MS, "all but the CPU time before the first sample"
    assert costs["both", "wait"].wall > 8 * costs["both", "work"].wall


def test_cpu_of_thread_never_found_running_goes_to_its_stack(world: World) -> None:
    actor = world.thread("shy")
    world.on_wait = lambda: setattr(actor, "cpu", actor.cpu + MS)
    assert costs_by_place(world.sample(1))["shy", "begin"].cpu == 100 * MS


def test_new_position_in_same_function_is_a_move(world: World) -> None:
    actor = world.thread("t")
    actor.go("both", 1)

    def go_on() -> None:
        if world.now == 1_500_000_000:
            actor.frame.f_lasti, actor.load = 2, 0

    world.on_wait = go_on
    profile = world.sample(1)
    costs = {stack[0][1]: cost for (_, _, stack), cost in profile.costs.items()}
    assert costs[0].cpu == 500 * MS and costs[2].cpu == 0 and costs[0].wall + costs[2].wall == 10**9


def test_long_call_gets_its_cpu(world: World) -> None:
    """The thread does not move, and it runs only most of the time."""
    actor = world.thread("zip")
    actor.go("compress", 0.9)

    def move() -> None:
        if world.now > 1_500_000_000:
            actor.go("after", 0)

    world.on_wait = move
    costs = costs_by_place(world.sample(1))
    assert costs["zip", "compress"].cpu == actor.cpu
    assert 440 * MS < actor.cpu < 460 * MS and costs["zip", "after"].cpu == 0


def test_waiting_call_gets_no_cpu_of_work_before_it(world: World) -> None:
    """Between two samples that find the thread waiting, it wakes and works."""
    actor = world.thread("t")
    actor.go("work", 1)
    places = iter(["work", *[f"wait{n}" for n in range(50)], "work"])

    def move() -> None:
        place = next(places, "work")
        actor.cpu += 2 * MS
        actor.go(place, place == "work")

    world.on_wait = move
    costs = costs_by_place(world.sample(0.6))
    assert sum(cost.cpu for (_, place), cost in costs.items() if place.startswith("wait")) == 0


def test_thread_started_while_sampling_gets_all_its_cpu(world: World) -> None:
    world.thread("old").go("doze", 0)

    def begin() -> None:
        if world.now == 1_500_000_000:
            late = world.thread("late")
            late.cpu = 6 * MS  # in the interval in which it started
            late.go("burn", 1)

    world.on_wait = begin
    costs = costs_by_place(world.sample(1))
    assert costs["late", "burn"].cpu == 506 * MS + PROBE_NS and costs["late", "burn"].wall == 510 * MS


def test_thread_first_seen_late_gets_at_most_one_interval_of_cpu(world: World) -> None:
    """A thread of a C library may have run for hours before it runs Python code."""

    def show() -> None:
        if world.now == 1_500_000_000:
            late = world.thread("Dummy-1")
            late.cpu = 3600 * 10**9
            late.go("callback", 0)

    world.on_wait = show
    assert costs_by_place(world.sample(1))["Dummy-1", "callback"].cpu == INTERVAL_NS


def test_ended_thread_keeps_its_cpu(world: World) -> None:
    """Unassigned CPU time goes to the last stack in which the thread was found running."""
    actor = world.thread("gone")
    actor.go("burn", 1)

    def end() -> None:
        if world.now == 1_300_000_000:
            actor.go("doze", 0)
        elif world.now == 1_500_000_000:
            del world.actors[actor.ident]

    world.on_wait = end
    costs = costs_by_place(world.sample(1))
    assert costs["gone", "burn"].cpu == 300 * MS and costs["gone", "doze"].cpu == 0
    assert costs["gone", "burn"].wall + costs["gone", "doze"].wall == 490 * MS


@pytest.mark.parametrize("names", [("http-1", "http-2"), ("same", "same")])
def test_ident_reused_by_new_thread_is_two_threads(world: World, names: tuple[str, str]) -> None:
    world.thread(names[0], 7).go("first", 1)
    ids = [world.actors[7].native_id]

    def change() -> None:
        if world.now == 1_500_000_000:
            second = world.thread(names[1], 7)
            second.cpu = 2 * MS
            second.go("second", 1)
            ids.append(second.native_id)

    world.on_wait = change
    profile = world.sample(1)
    costs = {(name, native_id): cost for (name, native_id, _), cost in profile.costs.items()}
    assert costs.keys() == set(zip(names, ids, strict=True))
    assert costs[names[0], ids[0]].cpu == 490 * MS and costs[names[0], ids[0]].wall == 490 * MS
    assert costs[names[1], ids[1]].cpu == 502 * MS + PROBE_NS and costs[names[1], ids[1]].wall == 510 * MS


def test_unassigned_cpu_stays_with_thread_when_ident_is_reused(world: World) -> None:
    first = world.thread("first", 7)
    first.go("burn", 1)

    def change() -> None:
        if world.now == 1_300_000_000:
            first.cpu += 4 * MS
            first.go("doze", 0)
        elif world.now == 1_500_000_000:
            world.thread("second", 7).go("burn", 1)

    world.on_wait = change
    costs = costs_by_place(world.sample(1))
    assert costs["first", "burn"].cpu == first.cpu == 304 * MS
    assert costs["second", "burn"].cpu == 500 * MS + PROBE_NS


def test_renamed_thread_counts_under_both_names(world: World) -> None:
    actor = world.thread("before")
    actor.go("burn", 1)

    def rename() -> None:
        if world.now == 1_500_000_000:
            actor.name = "after"
            actor.go("burn", 1)

    world.on_wait = rename
    costs = costs_by_place(world.sample(1))
    assert costs["before", "burn"].cpu + costs["after", "burn"].cpu == 10**9 + PROBE_NS
    assert abs(costs["before", "burn"].cpu - costs["after", "burn"].cpu) < 30 * MS


def test_thread_not_started_by_python_has_wall_time_only(world: World) -> None:
    actor = world.thread(None)
    actor.go("callback", 1)
    costs = costs_by_place(world.sample(1))
    assert costs == {(f"thread-{actor.ident}", "callback"): Cost(101, 0, 10**9)}


def test_random_threads_get_exactly_their_time(world: World) -> None:
    """A thread's wall time is the time for which it existed, its CPU time is the time of its clock."""
    chance = random.Random(seeded())
    born: dict[int, tuple[int, int]] = {}  # time and CPU time at the sample before it started
    ended: dict[int, tuple[int, int]] = {}  # time of the last sample that found it; CPU time is unknown
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
    world.on_wait = act
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


def test_samples_are_one_interval_apart_and_last_is_at_the_end(world: World) -> None:
    world.thread("t")
    assert world.sample(0.25).duration == 250 * MS
    assert len(world.times) == 26 and world.times[-1] - world.times[0] == 250 * MS
    assert {b - a for a, b in itertools.pairwise(world.times)} == {INTERVAL_NS}


def test_expensive_samples_are_taken_less_often(world: World) -> None:
    """The sampler uses less than a tenth of a core, however expensive a sample is."""
    world.thread("t").go("burn", 1)
    world.sample_cost = 2 * MS
    profile = world.sample(1)
    assert sum(cost.samples for cost in profile.costs.values()) == len(world.times)
    assert len(world.times) * world.sample_cost < 0.1 * 10**9 + 2 * world.sample_cost
    assert costs_by_place(profile)["t", "burn"].cpu == 10**9 + PROBE_NS


def test_missed_samples_are_skipped(world: World) -> None:
    """After another thread held the interpreter lock, a burst of samples would count one moment many times."""
    world.thread("t")

    def stall() -> None:
        if len(world.times) == 20:
            world._pass(0.5)

    world.on_wait = stall
    world.sample(1)
    assert sum(time > 10**9 + 690 * MS for time in world.times) <= 33
    assert len(world.times) < 60


def test_sampling_ends_when_wait_returns_true(world: World) -> None:
    world.thread("t")
    answers = iter([False] * 5 + [True])
    profile = sample(60, lambda seconds: world._pass(seconds) or next(answers))
    assert profile.duration == 40 * MS and costs_by_place(profile)["t", "begin"] == Cost(5, 0, 40 * MS)


# Real threads.


@contextmanager
def running(*jobs: Callable[[threading.Event], None], names: tuple[str, ...] = ()) -> Iterator[list[threading.Thread]]:
    """Run each job in its own thread, and set the event that it gets at the end."""
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


def costs_by_function(profile: Profile, name: str) -> dict[str, Cost]:
    """Return the costs of a thread by function, for every function in its stacks."""
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for (thread, _, stack), cost in profile.costs.items():
        for function in {code.co_name for code, _ in stack} if thread == name else ():
            for n, value in enumerate(cost):
                sums[function][n] += value
    return {function: Cost(*values) for function, values in sums.items()}


def spin(seconds: float) -> None:
    """Use this much CPU time in Python code."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


@pytest.mark.slow
@LINUX
def test_real_threads_that_run_wait_or_do_both() -> None:
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
        hashlib.sha256(block).digest()  # long, without the interpreter lock: the thread does not move

    with running(sleeper, shift, cruncher):
        profile = sample(1, threading.Event().wait)
    assert not costs_by_function(profile, threading.current_thread().name), "the sampling thread is left out"
    idle, both = costs_by_function(profile, "sleeper")["sleeper"], costs_by_function(profile, "shift")
    assert abs(idle.wall - profile.duration) < profile.duration / 10 and idle.cpu < profile.duration / 50
    assert both["spin"].cpu > 0.8 * both["shift"].cpu > 0, "not in the wait"
    assert both["shift"].cpu <= used["shift"]
    assert both["wait"].wall > 0.05 * both["shift"].wall, "a busy machine makes the other part longer"
    call = costs_by_function(profile, "cruncher")
    assert call["crunch"].cpu > 0.8 * call["cruncher"].cpu > profile.duration / 20


@pytest.mark.slow
@LINUX
def test_work_shorter_than_switch_interval_is_sampled() -> None:
    """The sampler must get the interpreter lock before the work is done."""
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
    costs = costs_by_function(profile, "shift")
    assert used["shift"] >= costs["shift"].cpu > 0.5 * used["shift"]
    assert costs["spin"].cpu > 0.5 * costs["shift"].cpu


def test_switch_interval_is_shorter_only_while_sampling() -> None:
    usual = sys.getswitchinterval()
    meanwhile = []

    def wait(seconds: float) -> bool:
        meanwhile.append(sys.getswitchinterval())
        raise KeyError

    with pytest.raises(KeyError):
        sample(1, wait)
    assert meanwhile[0] < usual == sys.getswitchinterval()


@pytest.mark.slow
@LINUX
def test_real_threads_that_compete_for_interpreter_lock() -> None:
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
        costs = costs_by_function(profile, name)
        assert ns >= costs[name].cpu > 0.5 * ns, (
            "the profile misses the time before the first and after the last sample"
        )
        assert costs["spin"].cpu > 0.8 * costs[name].cpu


@pytest.mark.slow
@LINUX
def test_real_threads_that_start_and_end() -> None:
    def nursery(over: threading.Event) -> None:
        number = itertools.count()
        while not over.is_set():
            child = threading.Thread(target=spin, args=(0.02,), name=f"child-{next(number)}")
            child.start()
            child.join()

    with running(nursery):
        profile = sample(1, threading.Event().wait)
    children = {key[0]: key[1] for key in profile.costs if key[0].startswith("child-")}
    assert len(children) > 3 and len(set(children.values())) == len(children), "each thread has its own id"
    assert sum(cost.cpu for key, cost in profile.costs.items() if key[0] in children) > 0
    for name in children:
        assert costs_by_function(profile, name)["_bootstrap"].cpu < 60 * MS


def test_sampler_keeps_no_variables_of_frames_alive() -> None:
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
        sampling = Blocked(lambda: sample(60, ended.wait))
        assert sampling.still(0.05)
        leave.set()
        eventually(lambda: gone[0]() is None, deadline=5)
        assert sampling.still(0)
        ended.set()
        assert sampling.result().duration < 60e9
    gc.collect()


@pytest.mark.slow
@LINUX
def test_bytearray_can_be_resized_while_sampling() -> None:
    """A bytearray cannot be resized while a frame keeps a view of it alive."""
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
    assert tries > 100 and errors < tries / 50, "only a sample in that very moment may hold the frame"


def test_new_frame_at_same_address_is_a_move(world: World) -> None:
    """If a call ends and the next one reuses its memory, only the thread's clock shows the move."""
    actor = world.thread("t")
    actor.go("first", 0.5)
    world.on_wait = lambda: setattr(actor.frame, "f_code", make_code("second")) if world.now >= 1_500_000_000 else None
    costs = costs_by_place(world.sample(1))
    assert costs["t", "first"].wall == 490 * MS and costs["t", "second"].wall == 510 * MS


def test_idle_thread_is_checked_periodically(world: World) -> None:
    """Its clock is read in one of a few samples, since an idle thread rarely moves."""
    actor = world.thread("t")
    actor.go("wait", 0)

    def change() -> None:
        if world.now == 1_500_000_000:
            actor.frame.f_code, actor.load = make_code("work"), 1

    world.on_wait = change
    costs = costs_by_place(world.sample(1))
    assert costs["t", "work"].wall >= (510 - 10 * sampler.IDLE_CHECK_SAMPLES) * MS
    assert costs["t", "work"].cpu == 500 * MS + PROBE_NS


def test_thread_cpu_returns_cpu_time_of_that_thread() -> None:
    me = threading.get_native_id()
    before, own = sampler.thread_cpu(me), time.thread_time_ns()
    assert before is not None and abs(own - before) < 5 * MS
    spin(0.03)
    after = sampler.thread_cpu(me)
    assert after is not None and after - before >= 25 * MS
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    ended = thread.native_id or 0
    eventually(lambda: sampler.thread_cpu(ended) is None, "the system ends the thread a moment after the join")
    assert sampler.thread_cpu(0) is None and sampler.thread_cpu(1 if me != 1 else 2) is None
