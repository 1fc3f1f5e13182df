"""Tests that a server needs only the methods of the store interface."""

import json
import threading
import uuid
from array import array
from collections.abc import Iterator, Sequence

import pytest
from support.harness import RawClient, frame, request

from ringolib.app import App
from ringolib.counters import Histogram
from ringolib.options import read_arguments
from ringolib.storage.interface import Page, Query, Sizes, Storage, StoreError, StoreStats
from ringolib.wire import SUBPROTOCOL, Run, encode_batch, encode_plain
from store import Store


class Memory:
    """A store in memory with only the methods of the interface."""

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

    def read(self, query: Query) -> Page:
        self.check()
        start = int(query.after or 0)
        values = [*self.records.values()][start : start + query.limit]
        return Page(b"".join(b"%d\n" % value for value in values), len(values), str(start + len(values)), False)

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
def app(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[App]:
    monkeypatch.setattr("ringolib.app.Store", Memory)
    app = App(read_arguments(["-p", "0", *request.param]), [])
    try:
        app.start()
        yield app
    finally:
        app.stop()
    assert app.store and app.store.closed  # type: ignore[attr-defined]


def test_server_uses_only_the_store_interface(app: App) -> None:
    interface = {name for name in vars(Storage) if not name.startswith("_")}
    store: Memory = app.store  # type: ignore[assignment]
    assert (
        {name for name in [*vars(Memory), "path", "identity"] if not name.startswith("_")}
        == interface
        <= {*dir(Store), "path", "identity"}
    )
    port = app.server.port
    with RawClient(port, {"Sec-WebSocket-Protocol": SUBPROTOCOL}) as client:
        for times in (1, 2):
            client.send(frame(2, encode_batch([Run(bytes(16), 5, 2)], array("q", [7, -7]))))
            client.acked(2 * times)
    assert request(port, "POST", "/v1.0/ingest", encode_plain([42]))[0] == 200
    assert sorted(store.records.values()) == [-7, 7, 42]
    stats = json.loads(request(port, "GET", "/v1.0/stats")[2])["stats"]
    assert (stats["recordsStored"], stats["recordsDuplicate"], stats["diskFreeBytes"]) == (3, 2, None)
    assert sorted(request(port, "GET", "/v1.0/records?format=text")[2].split()) == [b"-7", b"42", b"7"]
    assert request(port, "GET", "/metrics")[0] == request(port, "GET", "/v1.0/ready")[0] == 200


def test_store_error_is_the_readiness_detail(app: App) -> None:
    app.store.fails = "memory: out of order"  # type: ignore[union-attr]
    status, _, body = request(app.server.port, "GET", "/v1.0/ready")
    reasons = json.loads(body)["reasons"]
    assert (status, [(reason["code"], reason["detail"]) for reason in reasons]) == (
        503,
        [("store_failing", "memory: out of order")],
    )
