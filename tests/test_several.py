"""Publishers with several consumers, as real processes: work spreads, who fails is left out until it is back, and what
is in doubt goes where it may be stored already.
"""

import signal
import uuid
from pathlib import Path
from random import Random
from threading import Event

import pytest
from checks import SHORT_TIMES, TIMEOUT, Load, problems, short_times
from harness import ServerProcess, eventually, free_port, rows, seeded

import producer

QUICK = f"{SHORT_TIMES}; readiness.FRESH = 0.05; readiness.PATIENCE = 0.5; readiness.STUCK = 0.1"


class Fleet:
    """Consumers, each with a database of its own, on ports that stay theirs, and a publisher in front of them."""

    def __init__(self, directory: Path, *flags: str, consumers: int = 2) -> None:
        self._directory = directory
        self.ports = [free_port() for _ in range(consumers)]
        self.databases = [directory / f"{number}.db" for number in range(consumers)]
        self.consumers: dict[int, ServerProcess] = {}
        self._flags = ["-p", "0", "-U", ",".join(f"localhost:{port}" for port in self.ports), *flags]

    def __enter__(self) -> "Fleet":
        for number in range(len(self.ports)):
            self.start(number)
        self.publisher = ServerProcess(self._directory, *self._flags, patch=QUICK)
        return self

    def __exit__(self, *unused: object) -> None:
        for running in (self.publisher, *self.consumers.values()):
            running.kill()
        for errors in self._directory.glob("stderr-*"):
            assert "Traceback" not in errors.read_text()

    def start(self, number: int) -> None:
        flags = "-I", "false", "-p", str(self.ports[number]), "-D", self.databases[number].name
        self.consumers[number] = ServerProcess(self._directory, *flags, patch=SHORT_TIMES)

    def states(self) -> list[str]:
        return [each["state"] for each in self.publisher.stats()["consumers"]]

    def problems(self, load: Load) -> list[str]:
        """How the databases together break the promise, by what is acked now: each record is in one of them, once."""
        acked = load.acked()
        found = []
        spans: dict[uuid.UUID, list[tuple[int, int]]] = {}
        for database in self.databases:
            found += problems(database, load.sent, {}, dead=True)
            for of, sequence, _ in rows(database):
                spans.setdefault(uuid.UUID(of), []).append(sequence)  # type: ignore[arg-type]
        for source, count in acked.items():
            stored = spans.get(source, [])
            if len(set(stored)) < len(stored):
                found.append(f"{source}: {len(stored) - len(set(stored))} records are in both databases")
            if missing := set(range(count)) - set(stored):  # type: ignore[arg-type]
                found.append(f"{source}: {len(missing)} of {count} acked records are in none")
        return found


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Producers that never send again: with separate databases that might be stored in the other one, too."""
    short_times(monkeypatch)
    monkeypatch.setattr(producer, "STALL_TIMEOUT", 600)


@pytest.mark.parametrize("rounds", [6, pytest.param(50, marks=pytest.mark.long)])
@pytest.mark.parametrize("fault", ["kill", "stop"])
def test_consumers_fail_in_turns_and_each_record_is_in_one_database_once(
    tmp_path: Path, fault: str, rounds: int
) -> None:
    """One or both, for a while."""
    rng = Random(seeded())
    with Fleet(tmp_path, "-r", "8192") as fleet, Load(fleet.publisher.url, rng) as load:
        for _ in range(rounds):
            load.goes_on()
            Event().wait(rng.uniform(0, 0.1))  # not to synchronise: a random moment
            victims = rng.choice(([0], [1], [0, 1]))
            for each in victims:
                number = signal.SIGKILL if fault == "kill" else signal.SIGSTOP
                fleet.consumers[each].send_signal(number)
            Event().wait(rng.uniform(0, 3 * TIMEOUT))
            for each in victims:
                if fault == "kill":
                    fleet.consumers[each].kill()
                    fleet.start(each)
                else:
                    fleet.consumers[each].send_signal(signal.SIGCONT)
        load.goes_on()
        load.finish()
        eventually(lambda: fleet.states() == ["up", "up"])
        assert load.reconnects() == 0
        assert fleet.publisher.stop() == 0
        assert not fleet.problems(load)
        shares = [len(rows(database)) for database in fleet.databases]
        assert min(shares) > 0
        print(f"{fault}: {sum(load.acked().values())} records, {shares}")
