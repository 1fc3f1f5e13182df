"""Publishers with several consumers, as real processes.

The work spreads over the consumers, a failing one gets no batches until it recovers, and a batch in doubt goes only
where it may be stored already.
"""

import json
import re
import signal
import threading
import time
import uuid
from contextlib import ExitStack
from pathlib import Path
from random import Random
from threading import Event
from typing import Any

import pytest
from support.certificates import Authority, tls
from support.checks import SHORT_TIMES, TIMEOUT, Load, problems, short_times
from support.fake_consumer import Link, fake_consumer
from support.harness import (
    DEADLINE,
    Blocked,
    RawClient,
    ServerProcess,
    eventually,
    frame,
    free_port,
    not_ready,
    request,
    rows,
    seeded,
    server,
)

from ringolib.client import outbox
from ringolib.storage.interface import Storage
from ringolib.wire import decode_batch, encode_ack, encode_plain

QUICK = (
    f"{SHORT_TIMES}; status.probe.CACHE_SECONDS = 0.05; status.probe.ANSWER_TIMEOUT_SECONDS = 0.5; "
    "status.readiness_rules.RING_STUCK_SECONDS = 0.1"
)


class Fleet:
    """Consumers with separate databases, on ports that they keep, and a publisher in front of them."""

    def __init__(self, directory: Path, *flags: str, consumers: int = 2, patch: str = QUICK) -> None:
        self._directory = directory
        self._patch = patch
        self.ports = [free_port() for _ in range(consumers)]
        self.databases = [directory / f"{number}.db" for number in range(consumers)]
        self.consumers: dict[int, ServerProcess] = {}
        self._flags = ["-p", "0", "-U", ",".join(f"localhost:{port}" for port in self.ports), *flags]

    def __enter__(self) -> "Fleet":
        for number in range(len(self.ports)):
            self.start(number)
        self.publisher = ServerProcess(self._directory, *self._flags, patch=self._patch)
        return self

    def __exit__(self, *unused: object) -> None:
        for running in (self.publisher, *self.consumers.values()):
            running.kill()
        for errors in self._directory.glob("stderr-*"):
            assert "Traceback" not in errors.read_text()

    def start(self, number: int, patch: str = SHORT_TIMES) -> None:
        flags = "-I", "false", "-p", str(self.ports[number]), "-D", self.databases[number].name
        self.consumers[number] = ServerProcess(self._directory, *flags, patch=patch)

    def kill(self, *numbers: int) -> None:
        for number in numbers:
            self.consumers[number].kill()

    def address(self, number: int) -> str:
        return f"localhost:{self.ports[number]}"

    def states(self) -> list[str]:
        return [each["state"] for each in self.publisher.stats()["consumers"]]

    def problems(self, load: Load) -> list[str]:
        """Return the violations of the promise: each record that is acked now is in one of the databases, once."""
        acked = load.acked()
        violations = []
        sequences: dict[uuid.UUID, list[int]] = {}
        for database in self.databases:
            violations += problems(database, load.sent, {}, dead=True)
            for source_id, sequence, _ in rows(database):
                sequences.setdefault(uuid.UUID(source_id), []).append(sequence)
        for source, count in acked.items():
            stored = sequences.get(source, [])
            if len(set(stored)) < len(stored):
                violations.append(f"{source}: {len(stored) - len(set(stored))} records are in both databases")
            if missing := set(range(count)) - set(stored):
                violations.append(f"{source}: {len(missing)} of {count} acked records are in none")
        return violations


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Producers must not send a record again: with separate databases the other one might store it, too."""
    short_times(monkeypatch)
    monkeypatch.setattr(outbox, "STALL_TIMEOUT", 600)


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [6, pytest.param(50, marks=pytest.mark.long)])
@pytest.mark.parametrize("fault", ["kill", "stop"])
def test_failing_consumers_store_each_record_in_one_database_once(tmp_path: Path, fault: str, rounds: int) -> None:
    """One consumer or both fail for a short time."""
    rng = Random(seeded())
    with Fleet(tmp_path, "-r", "8192") as fleet, Load(fleet.publisher.url, rng) as load:
        for _ in range(rounds):
            load.goes_on()
            Event().wait(rng.uniform(0, 0.1))  # a random moment; nothing depends on it
            victims = rng.choice(([0], [1], [0, 1]))
            for number in victims:
                fleet.consumers[number].send_signal(signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
            Event().wait(rng.uniform(0, 3 * TIMEOUT))
            for number in victims:
                if fault == "kill":
                    fleet.consumers[number].kill()
                    fleet.start(number)
                else:
                    fleet.consumers[number].send_signal(signal.SIGCONT)
        load.goes_on()
        load.finish()
        eventually(lambda: fleet.states() == ["up", "up"])
        assert load.reconnects() == 0
        assert fleet.publisher.stop() == 0
        assert not fleet.problems(load)
        shares = [len(rows(database)) for database in fleet.databases]
        assert min(shares) > 0
        print(f"{fault}: {sum(load.acked().values())} records, {shares}")


def post(running: ServerProcess, *values: int) -> int:
    """POST these values, and return the status."""
    return request(running.port, "POST", "/v1.0/ingest", encode_plain(values))[0]


def values(fleet: Fleet) -> list[list[int]]:
    return [sorted(value for _, _, value in rows(database)) for database in fleet.databases]


def log(running: ServerProcess, event: str) -> list[str]:
    """Return the consumers that the log lines of this event name."""
    return re.findall(rf"event={event} consumer=(\S+)", running.errors.read_text())


STORE_AND_DIE = (
    "web.intake.StoreIntake._commit = lambda self, group:"
    " ([self._store.append(*queued.block) for queued in group], __import__('os')._exit(9))"
)


@pytest.mark.slow
def test_batch_unacked_by_killed_consumer_goes_only_to_it_again(tmp_path: Path) -> None:
    """Meanwhile the records of another connection are stored and acked."""
    with Fleet(tmp_path) as fleet, RawClient(fleet.publisher.port) as unlucky:
        eventually(lambda: fleet.publisher.stats()["consumers"][1]["state"] != "down")
        for number in (0, 1):
            fleet.kill(number)
            fleet.start(number, STORE_AND_DIE)
        unlucky.send(frame(2, encode_plain([1, 2, 3])))
        eventually(lambda: any(each.process.poll() == 9 for each in fleet.consumers.values()))
        dead = 0 if fleet.consumers[0].process.poll() == 9 else 1
        fleet.kill(1 - dead)
        fleet.start(1 - dead)
        doubts = [0, 0]
        doubts[dead] = 3
        eventually(lambda: [each["inDoubt"] for each in fleet.publisher.stats()["consumers"]] == doubts)
        for value in range(10, 30):
            assert post(fleet.publisher, value) == 200
        assert values(fleet)[dead] == [1, 2, 3] and values(fleet)[1 - dead] == list(range(10, 30))
        assert not_ready(fleet.publisher) == []
        unlucky.sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            unlucky.sock.recv(1)
        unlucky.sock.settimeout(DEADLINE)
        fleet.kill(dead)
        fleet.start(dead)
        assert unlucky.acked(3) == 3
        assert sorted(sum(values(fleet), [])) == [1, 2, 3, *range(10, 30)], "once in total"
        assert values(fleet)[dead][:3] == [1, 2, 3]
        assert fleet.consumers[dead].stats()["recordsDuplicate"] == 3


@pytest.mark.slow
def test_unreachable_consumer_gets_nothing_and_is_reported_down(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        for value in range(20):
            assert post(fleet.publisher, value) == 200
        assert all(len(each) > 3 for each in values(fleet)), "both have a share"
        fleet.kill(1)
        eventually(lambda: post(fleet.publisher, 100) == 200 and fleet.states() == ["up", "down"])
        before = values(fleet)[1]
        for value in range(200, 220):
            assert post(fleet.publisher, value) == 200
        assert values(fleet)[1] == before and set(range(200, 220)) < set(values(fleet)[0])
        stats, metrics = fleet.publisher.stats(), fleet.publisher.get("/metrics")[2].decode()
        here, away = stats["consumers"]
        assert (here["address"], here["reason"], here["awayMs"], here["inDoubt"]) == (fleet.address(0), None, 0, 0)
        assert away["address"] == fleet.address(1) and away["awayMs"] > 0 and away["workers"] == 1
        assert away["reason"].startswith(fleet.address(1))
        assert (stats["consumerState"], stats["consumerReason"], stats["consumerAwayMs"]) == ("up", None, 0)
        assert not_ready(fleet.publisher) == [] == stats["notReady"]
        for number, up in enumerate((1, 0)):
            assert f'ringoexp_link_up{{consumer="{fleet.address(number)}"}} {up}\n' in metrics
        assert "\nringoexp_consumer_up 1\n" in metrics and "\nringoexp_consumer_away_seconds 0.0\n" in metrics
        eventually(lambda: log(fleet.publisher, "link_down") == [fleet.address(1)])
        fleet.kill(0)
        eventually(lambda: not_ready(fleet.publisher) == ["consumer_unreachable"] * 2)
        details = [why["detail"] for why in json.loads(fleet.publisher.get("/v1.0/ready")[2])["reasons"]]
        assert all(why.startswith(fleet.address(number)) for number, why in enumerate(details))
        eventually(lambda: fleet.publisher.stats()["consumerState"] == "down")
        stats = fleet.publisher.stats()
        assert all(fleet.address(number) in stats["consumerReason"] for number in (0, 1))
        waiting = Blocked(lambda: post(fleet.publisher, 300))
        assert waiting.still(0.3)
        fleet.start(1)
        assert waiting.result() == 200, "this record alone shows that the consumer is up again"
        fleet.start(0)
        eventually(lambda: fleet.states() == ["up", "up"])
        had = len(values(fleet)[0])
        eventually(lambda: post(fleet.publisher, 400) == 200 and len(values(fleet)[0]) > had)
        assert fleet.publisher.stop() == 0
        downs, ups = log(fleet.publisher, "link_down"), log(fleet.publisher, "link_up")
        assert downs.count(fleet.address(1)) == 1 <= ups.count(fleet.address(1)) <= 2


@pytest.mark.slow
def test_hanging_consumer_delays_only_its_own_batches(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        for value in range(10):
            assert post(fleet.publisher, value) == 200
        fleet.consumers[0].send_signal(signal.SIGSTOP)
        posts: list[Blocked] = []
        while not posts or not posts[-1].still(2 * TIMEOUT):  # until the stopped consumer has one
            value = 100 + len(posts)
            posts.append(Blocked(lambda value=value: post(fleet.publisher, value)))
        eventually(lambda: fleet.states() == ["down", "up"])
        for value in range(200, 220):
            assert post(fleet.publisher, value) == 200
        fleet.consumers[0].send_signal(signal.SIGCONT)
        assert {each.result() for each in posts} == {200}
        assert fleet.publisher.stop() == 0
        assert sorted(sum(values(fleet), [])) == [*range(10), *range(100, 100 + len(posts)), *range(200, 220)]


@pytest.mark.slow
def test_hung_consumer_delays_acks_of_others_by_a_second(tmp_path: Path) -> None:
    """Twenty clients have one record in flight each. Those whose record the hung consumer has wait for it."""
    done, sent = threading.Event(), [0] * 20

    def send(number: int) -> None:
        with RawClient(fleet.publisher.port) as client:
            while not done.wait(0.1):
                client.send(frame(2, encode_plain([1000 * number + sent[number]])))
                assert client.acked(sent[number] + 1) == sent[number] + 1
                sent[number] += 1

    def goes_on(seconds: float) -> bool:
        before = sum(sent)
        Event().wait(seconds)
        return sum(sent) > before + 20

    with Fleet(tmp_path, patch="status.probe.ANSWER_TIMEOUT_SECONDS = 0.5") as fleet:
        clients = [Blocked(lambda number=number: send(number)) for number in range(20)]
        eventually(lambda: goes_on(0.5) and all(values(fleet)))
        fleet.consumers[0].send_signal(signal.SIGSTOP)
        eventually(lambda: log(fleet.publisher, "link_late"), deadline=5)
        eventually(lambda: goes_on(0.5), deadline=5)
        for _ in range(4):
            assert goes_on(0.5), "and not only once"
        stuck, free = fleet.publisher.stats()["consumers"]
        assert stuck["inDoubt"] > 0 == free["inDoubt"] and fleet.states()[1] == "up"
        eventually(lambda: fleet.states() == ["down", "up"])
        assert not_ready(fleet.publisher) == [] and log(fleet.publisher, "link_late") == [fleet.address(0)]
        fleet.consumers[0].send_signal(signal.SIGCONT)
        eventually(lambda: fleet.states() == ["up", "up"])
        done.set()
        for client in clients:
            client.result()
        assert [each["inDoubt"] for each in fleet.publisher.stats()["consumers"]] == [0, 0]
        assert fleet.publisher.stop() == 0
        expected = [1000 * number + value for number in range(20) for value in range(sent[number])]
        assert sorted(sum(values(fleet), [])) == expected


@pytest.mark.slow
@pytest.mark.parametrize("state", ["up", "one away", "both away", "one hangs", "both hang"])
def test_publisher_stops_in_time_in_every_state(tmp_path: Path, state: str) -> None:
    with Fleet(tmp_path, patch=f"{QUICK}; app.DRAIN_SECONDS = 1") as fleet:
        for value in range(10):
            assert post(fleet.publisher, value) == 200
        for number in {"one": [0], "both": [0, 1]}.get(state.split()[0], []):
            fleet.consumers[number].send_signal(signal.SIGSTOP if "hang" in state else signal.SIGKILL)
        if state != "up":
            eventually(lambda: "down" in fleet.states())
        with RawClient(fleet.publisher.port) as client:
            client.send(frame(2, encode_plain([100])))
            eventually(lambda: fleet.publisher.stats()["recordsReceived"] == 11)
            if state in ("up", "one away"):
                assert client.acked(1) == 1
            began = time.monotonic()
            status = fleet.publisher.stop()
            assert time.monotonic() - began < 10
        stored = int(re.search(r"(\d+) stored", fleet.publisher.tally)[1])  # type: ignore[index]
        assert f"{stored} stored, {11 - stored} unstored" in fleet.publisher.tally
        assert status == (0 if stored == 11 else 3)
        if state != "one hangs":  # either consumer had the last record
            assert stored == (10 if "both" in state else 11)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(Storage, "identity"), reason="needs stores with an identity")
def test_consumers_stopped_in_order_leave_nothing_in_doubt(tmp_path: Path) -> None:
    """They have stored no record that they have not acked before their goodbye, so it goes elsewhere at once."""
    with Fleet(tmp_path, "-r", "8192") as fleet, Load(fleet.publisher.url, Random(seeded())) as load:
        for turn in range(6):
            load.goes_on()
            stopped = turn % 2
            assert fleet.consumers[stopped].stop() == 0
            load.goes_on()
            assert [each["inDoubt"] for each in fleet.publisher.stats()["consumers"]] == [0, 0]
            fleet.start(stopped)
            eventually(lambda: fleet.states() == ["up", "up"])
        load.finish()
        assert fleet.publisher.stop() == 0
        assert not fleet.problems(load)


def test_batch_in_doubt_goes_to_another_consumer_of_same_store(tmp_path: Path) -> None:
    """This is the case for consumers in front of one ClickHouse."""
    stored: list[int] = []
    fates = iter(["dies"])
    lock = threading.Lock()

    def answer(peer: Link) -> None:
        total = 0
        for message in peer:
            with lock:
                fate = next(fates, "")
                stored.extend(decode_batch(message).values)  # type: ignore[arg-type]
            if fate:
                peer.socket.shutdown(2)
                return
            total += len(decode_batch(message).values)  # type: ignore[arg-type]
            peer.send(encode_ack(total))

    with ExitStack() as stack:
        ports = [stack.enter_context(fake_consumer(answer, "shared")) for _ in range(2)]
        where = ",".join(f"localhost:{port}" for port in ports)
        publisher = stack.enter_context(server(tmp_path, "-p", "0", "-U", where))
        eventually(lambda: [each["workers"] for each in publisher.stats()["consumers"]] == [1, 1])
        began = time.monotonic()
        assert post(publisher, 1, 2) == 200
        assert time.monotonic() - began < 20 and stored == [1, 2, 1, 2]


def test_token_and_tls_apply_to_all_consumers(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("localhost")
    (tmp_path / "token").write_text("secret")
    (tmp_path / "other").write_text("another")
    ports = [free_port() for _ in range(3)]
    with ExitStack() as stack:
        for number, token in enumerate(("token", "other", "token")):
            flags = "-p", str(ports[number]), "-D", f"{number}.db", "--token_file", token
            stack.enter_context(server(tmp_path, "-I", "false", *flags, *tls(pair)))
        where = f"localhost:{ports[0]},localhost:{ports[1]},127.0.0.1:{ports[2]}"
        more = "--token_file", "token", "--consumer_tls", "--consumer_ca", str(authority.ca)
        publisher = stack.enter_context(server(tmp_path, "-p", "0", "-U", where, *more, patch=QUICK))
        shown = {"Authorization": "Bearer secret"}

        def consumers() -> list[dict[str, Any]]:
            return list(json.loads(publisher.get("/v1.0/stats", **shown)[2])["stats"]["consumers"])

        eventually(lambda: [each["state"] for each in consumers()] == ["up", "down", "down"])
        for value in range(10):
            body = encode_plain([value])
            assert request(publisher.port, "POST", "/v1.0/ingest", body, shown)[0] == 200
        reasons = [each["reason"] for each in consumers()]
        assert reasons[0] is None and "token" in reasons[1] and "certificate" in reasons[2]
        assert [value for _, _, value in rows(tmp_path / "0.db")] == list(range(10))


@pytest.mark.slow
def test_new_address_of_a_name_becomes_a_consumer(tmp_path: Path) -> None:
    port, names = free_port(), tmp_path / "names"
    names.write_text("127.0.0.1 127.0.0.2")
    find = f"[net.addresses.Endpoint(each, port, host) for each in open({str(names)!r}).read().split()]"
    patch = (
        f"{QUICK}; forward.discovery.MIN_RESOLVE_INTERVAL_SECONDS = 0.1;"
        f" forward.discovery.resolve_endpoints = lambda host, port: {find};"
        " app.resolve = lambda host, port: [(2, ('127.0.0.1' if host == 'localhost' else '127.0.0.9', port))];"
        " forward.workers.IDLE_SECONDS = 0.2; net.addresses.x = 1"
    )
    ends: ServerProcess | None = None
    with ExitStack() as stack:
        for last in (1, 2, 3):
            flags = "-H", f"127.0.0.{last}", "-p", str(port), "-D", f"{last}.db", "--allow_host", "db.example"
            running = stack.enter_context(server(tmp_path, "-I", "false", *flags, patch=SHORT_TIMES))
            ends = running if last == 2 else ends
        publisher = stack.enter_context(server(tmp_path, "-p", "0", "-U", "db.example", "-T", str(port), patch=patch))

        def known() -> list[str]:
            return [each["address"].split(":")[0] for each in publisher.stats()["consumers"] if each["state"] == "up"]

        for value in range(10):
            assert post(publisher, value) == 200
        eventually(lambda: known() == ["127.0.0.1", "127.0.0.2"])
        names.write_text("127.0.0.1 127.0.0.3")
        assert ends
        ends.kill()
        eventually(lambda: known() == ["127.0.0.1", "127.0.0.3"])  # else a record might be in doubt at the killed one
        assert post(publisher, 10) == 200
        eventually(lambda: len(publisher.stats()["consumers"]) == 2)
        eventually(lambda: post(publisher, 11) == 200 and rows(tmp_path / "3.db"))
