"""Servers are killed or stopped at random moments under load, and every record is stored once.

Every acked record is stored at that moment. The check itself is tested with servers and databases that break the
promise.
"""

import shutil
import sqlite3
from array import array
from contextlib import closing
from pathlib import Path
from random import Random
from threading import Event

import pytest
from support.both_producers import MakeProducer
from support.checks import TIMEOUT, VICTIMS, Load, Servers, problems, short_times
from support.harness import DEADLINE, eventually, seeded, server

from ringolib.client.producer import Producer


@pytest.fixture(autouse=True)
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    short_times(monkeypatch)


@pytest.mark.parametrize("rounds", [6, pytest.param(50, marks=pytest.mark.long)])
@pytest.mark.parametrize("fault", ["kill", "stop"])
def test_random_server_failures_keep_exactly_once(
    tmp_path: Path, make_producer: MakeProducer, fault: str, rounds: int
) -> None:
    """A stopped server goes on after a pause, which may be longer or shorter than the timeouts of its peers."""
    rng = Random(seeded())
    count = dict.fromkeys(VICTIMS, 0)
    with Servers(tmp_path) as servers, Load(servers.url, rng, make_producer=make_producer) as load:
        for turn in range(rounds):
            load.goes_on()
            Event().wait(rng.uniform(0, 0.1))  # a random moment, not a synchronisation
            victims = rng.choice(VICTIMS)
            count[victims] += 1
            still = "consumer" in victims  # no process writes to the database
            getattr(servers, fault)(*victims)
            assert not load.problems(servers.database, dead=still), f"round {turn}, {victims}"
            Event().wait(rng.uniform(0, 0.1 if fault == "kill" else 2 * TIMEOUT))  # some acks may still arrive
            assert not load.problems(servers.database, dead=still), f"round {turn}, {victims}"
            back = servers.start if fault == "kill" else servers.go_on
            back(*rng.sample(victims, len(victims)))
        load.goes_on()
        load.finish()
        assert not load.problems(servers.database, whole=True)
        if fault == "kill":
            killed = sum(times for victims, times in count.items() if "publisher" in victims)
            assert load.reconnects() >= killed * len(load.producers), "too few reconnects for the killed publishers"
        print(f"{fault}: {count}, {sum(load.acked().values())} records, {load.reconnects()} reconnects")


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [5, pytest.param(50, marks=pytest.mark.long)])
def test_spool_keeps_acks_coming_while_the_consumer_fails(tmp_path: Path, rounds: int) -> None:
    """While the consumer is killed or stopped, and the publisher killed, each acked record is stored by one of them."""
    rng = Random(seeded())
    with Servers(tmp_path, spooling=True) as servers, Load(servers.url, rng) as load:
        for turn in range(rounds):
            load.goes_on()
            Event().wait(rng.uniform(0, 0.1))  # a random moment, not a synchronisation
            fault, back = rng.choice(((servers.kill, servers.start), (servers.stop, servers.go_on)))
            fault("consumer")
            load.goes_on()  # the spool replaces the consumer
            assert not servers.problems(load, {"consumer"}), f"round {turn}"
            if rng.random() < 0.5:
                servers.kill("publisher")
                assert not servers.problems(load, {"consumer", "publisher"}), f"round {turn}, publisher"
                servers.start("publisher")
                load.goes_on()
            back("consumer")
            Event().wait(rng.uniform(0, 0.2))  # while the spool is forwarded
            if rng.random() < 0.5:
                servers.kill("publisher")
                assert not servers.problems(load, {"publisher"}), f"round {turn}, forwarding"
                servers.start("publisher")
        load.finish()
        publisher = servers.running["publisher"]
        eventually(lambda: publisher.stats()["spoolDepth"] == 0, "all records are forwarded")
        assert not load.problems(servers.database, whole=True)
        print(f"{sum(load.acked().values())} records, {load.reconnects()} reconnects")


ACK = "[setattr(queued, 'outcome', True) for queued in group], self._listener()"
LATE = (
    "web.intake.StoreIntake._commit = lambda self, group:"
    " ([__import__('threading').Timer(3600, self._store.append, queued.block).start() for queued in group], "
    f"{ACK})"
)
TAKEN = "web.intake.StoreIntake.outcome = web.intake.StoreIntake.passed = lambda self, ticket: True; " + LATE.replace(
    ACK, ""
)


@pytest.mark.parametrize("patch", ["", LATE, TAKEN])
def test_check_detects_acks_before_the_commit(tmp_path: Path, patch: str) -> None:
    values = array("q", range(1000))
    with server(tmp_path, "-I", "false", "-p", "0", "-D", "c.db", patch=patch) as consumer:
        with server(tmp_path, "-p", "0", "-T", str(consumer.port)) as publisher, Producer(publisher.url) as sender:
            sender.send(values)
            sender.flush(DEADLINE)
            consumer.kill()
            errors = problems(tmp_path / "c.db", {sender.source: values}, {sender.source: sender.acked}, dead=True)
    assert errors == ([f"{sender.source}: records 0 to 999 are acked and not stored"] if patch else [])


DAMAGE = {
    "": "",
    "UPDATE record SET value = ~value WHERE id = 500": "never sent",
    "UPDATE batch SET sequence = sequence + 1": "records 0 to 0 are acked and not stored",
    "UPDATE source SET uuid = zeroblob(16)": "records 0 to 999 are acked and not stored",
    "INSERT INTO record VALUES (1001, 7); INSERT INTO batch SELECT 1001, 1, source_id, 7, 0 FROM batch": "stored twice",
    "DELETE FROM record WHERE id = 500": "ids: 1000 records in batches, 999 in all",
    "INSERT INTO record VALUES (1002, 7)": "ids: 1000 records in batches, 1001 in all, the last is 1002",
    "DELETE FROM record; DELETE FROM batch": "records 0 to 999 are acked and not stored",
}


def test_check_detects_a_damaged_database(tmp_path: Path) -> None:
    values = array("q", range(1000))
    with server(tmp_path, "-I", "false", "-p", "0", "-D", "c.db") as consumer, Producer(consumer.url) as sender:
        sender.send(values)
        sender.flush(DEADLINE)
        consumer.stop()
    for number, (damage, message) in enumerate(DAMAGE.items()):
        copy = tmp_path / f"{number}.db"
        shutil.copy(tmp_path / "c.db", copy)
        with closing(sqlite3.connect(copy)) as writer:
            writer.executescript(damage)
        errors = problems(copy, {sender.source: values}, {sender.source: 1000})
        assert any(message in error for error in errors) if message else errors == [], damage
