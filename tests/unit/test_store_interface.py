"""The face of a store is enough: a server runs on one that has nothing else."""

import json
import threading
import uuid
from array import array
from collections.abc import Iterator, Sequence

import pytest
from support.harness import RawClient, frame, request

from ringolib import app as assembly
from ringolib.counters import Histogram
from ringolib.options import read_arguments
from ringolib.storage.interface import Sizes, Storage, StoreError, StoreStats
from ringolib.wire import SUBPROTOCOL, Run, encode_batch, encode_plain
from store import Store


class Memory:
    """A store with the face and no more, which forgets everything at its end."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.identity = str(uuid.uuid4())
        self.records: dict[tuple[bytes, int], int] = {}
        self.fails: str | None = None
        self.closed = False
        self._lock = threading.Lock()
        self._duplicates = 0

    def append(self, runs: Sequence[Run], values: "array[int]") -> None:
        with self._lock:
            self.check()
            names = [(run.source, run.first + n) for run in runs for n in range(run.count)]
            for name, value in zip(names, values, strict=True):
                self._duplicates += name in self.records
                self.records.setdefault(name, value)

    def check(self) -> None:
        if self.fails or self.closed:
            raise StoreError(self.fails or f"{self.path} is closed")

    def stats(self) -> StoreStats:
        held = len(self.records)
        return StoreStats(held, self._duplicates, 1, 0, self.fails, held, Histogram().snapshot())

    def sizes(self) -> Sizes:
        return Sizes(0, 0, None)

    def close(self) -> None:
        self.closed = True


@pytest.fixture(params=[["-T", "0"], ["-I", "false"]], ids=["publisher", "consumer"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[assembly.App]:
    monkeypatch.setattr(assembly, "Store", Memory)
    made = assembly.App(read_arguments(["-p", "0", *request.param]), [])
    try:
        made.start()
        yield made
    finally:
        made.stop()
    assert made.store and made.store.closed  # type: ignore[attr-defined]


def test_a_server_needs_of_its_store_what_the_face_says_and_nothing_else(parts: assembly.App) -> None:
    face = {name for name in vars(Storage) if not name.startswith("_")}
    store: Memory = parts.store  # type: ignore[assignment]
    assert (
        {name for name in [*vars(Memory), "path", "identity"] if not name.startswith("_")}
        == face
        <= {*dir(Store), "path", "identity"}
    )
    port = parts.server.port
    with RawClient(port, {"Sec-WebSocket-Protocol": SUBPROTOCOL}) as client:
        for times in (1, 2):
            client.send(frame(2, encode_batch([Run(bytes(16), 5, 2)], array("q", [7, -7]))))
            client.acked(2 * times)
    assert request(port, "POST", "/v1.0/ingest", encode_plain([42]))[0] == 200
    assert sorted(store.records.values()) == [-7, 7, 42]
    stats = json.loads(request(port, "GET", "/v1.0/stats")[2])["stats"]
    assert (stats["recordsStored"], stats["recordsDuplicate"], stats["diskFreeBytes"]) == (3, 2, None)
    assert request(port, "GET", "/metrics")[0] == request(port, "GET", "/v1.0/ready")[0] == 200


def test_what_it_says_is_what_the_others_say(parts: assembly.App) -> None:
    parts.store.fails = "memory: it is tired"  # type: ignore[union-attr]
    status, _, body = request(parts.server.port, "GET", "/v1.0/ready")
    reasons = json.loads(body)["reasons"]
    assert (status, [(each["code"], each["detail"]) for each in reasons]) == (
        503,
        [("store_failing", "memory: it is tired")],
    )
