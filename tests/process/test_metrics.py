"""`GET /metrics`: the text format, by a parser of our own and by `promtool`, and that it says what stats say."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.harness import ROOT, RawClient, ServerProcess, eventually, frame, free_port, request, server

from ringolib.counters import BOUNDS
from ringolib.status import prometheus as metrics
from ringolib.wire import encode_plain

DOCS = (ROOT / "docs/metrics.md").read_text()
SAMPLE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)+)\})? (\S+)')
ROLES = {
    "single": ["-T", "0"],
    "publisher": [],
    "spooling": ["-S", "s.spool"],
    "consumer": ["-I", "false"],
    "retaining": ["-I", "false", "--retain", "30"],
}


def scrape(running: ServerProcess) -> tuple[dict[str, str], dict[str, float]]:
    """Type by metric, and value by name and labels. Fails where the format is not kept."""
    status, headers, body = running.get(
        "/metrics", Accept="application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    )
    assert status == 200 and headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    text = body.decode()
    assert text.endswith("\n") and "\n\n" not in text
    kinds: dict[str, str] = {}
    values: dict[str, float] = {}
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith("# HELP "):
            _, _, name, meaning = line.split(" ", 3)
            assert name not in kinds and meaning.endswith(".")
            kind = next(lines)
            assert kind.startswith(f"# TYPE {name} ")
            kinds[name] = kind.rsplit(" ", 1)[1]
            continue
        found = SAMPLE.fullmatch(line)
        assert found, line
        base = re.sub("_(bucket|sum|count)$", "", found[1]) if kinds[name] == "histogram" else found[1]
        assert base == name, "samples follow their own HELP and TYPE"
        assert f"{found[1]}{{{found[2]}}}" not in values
        values[f"{found[1]}{{{found[2]}}}" if found[2] else found[1]] = float(found[3])
    for name, kind in kinds.items():
        assert kind in ("counter", "gauge", "histogram")
        assert name.endswith("_total") == (kind == "counter"), name
        assert not re.search("_(ms|millis|kb|mb|bucket|sum|count)$", name), "base units"
    return kinds, values


@pytest.fixture(params=ROLES)
def running(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServerProcess]:
    flags = ROLES[request.param]
    if request.param in ("publisher", "spooling"):
        flags = [*flags, "-T", str(free_port())]
    with server(tmp_path, "-p", "0", *flags) as running:
        yield running


def test_every_role_keeps_the_format_and_every_metric_is_in_the_docs(running: ServerProcess) -> None:
    kinds, values = scrape(running)
    assert len(kinds) > 15 and values["process_resident_memory_bytes"] > 5e6
    for name, kind in kinds.items():
        assert re.search(rf"^\| `{name}` \| {kind} \|", DOCS, re.MULTILINE), name
    assert request(running.port, "HEAD", "/metrics")[::2] == (200, b"")
    assert request(running.port, "POST", "/metrics")[0] == 405


def test_promtool_finds_nothing_to_object_to(running: ServerProcess) -> None:
    promtool = shutil.which("promtool")
    if not promtool:
        pytest.skip("needs promtool (Debian: prometheus)")
    done = subprocess.run([promtool, "check", "metrics"], input=running.get("/metrics")[2], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_every_metric_of_the_docs_is_one_of_some_role(tmp_path: Path) -> None:
    found = set()
    for role, flags in ROLES.items():
        more = ["-T", str(free_port())] if role in ("publisher", "spooling") else []
        with server(tmp_path, "-p", "0", *flags, *more) as running:
            found |= scrape(running)[0].keys()
    over_tls = {"ringoexp_certificate_expires_timestamp_seconds"}  # test_tls has it
    assert found | over_tls == set(re.findall(r"^\| `(\w+)` \|", DOCS, re.MULTILINE))


def test_the_queries_of_the_docs_use_metrics_that_there_are() -> None:
    names = set(re.findall(r"^\| `(\w+)` \|", DOCS, re.MULTILINE))
    queries = "".join(re.findall(r"```promql\n(.*?)```", DOCS, re.DOTALL))
    used = set(re.findall(r"\b((?:ringoexp|process)_\w+)", queries))
    assert len(used) > 15
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in used} <= names


def test_the_rules_of_the_docs_are_rules(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if not promtool:
        pytest.skip("needs promtool (Debian: prometheus)")
    (rules,) = re.findall(r"```yaml\n(groups:.*?)```", DOCS, re.DOTALL)
    queries = re.findall(r"```promql\n(.*?)\n```", DOCS, re.DOTALL)
    rules += "".join(
        f"\n  - name: query-{n}\n    rules:\n    - record: a:b\n      expr: {q!r}" for n, q in enumerate(queries)
    )
    (tmp_path / "rules.yml").write_text(rules)
    done = subprocess.run([promtool, "check", "rules", tmp_path / "rules.yml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_metrics_and_stats_say_the_same(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", "-r", "100") as running, RawClient(running.port) as client:
        for _ in range(3):
            assert request(running.port, "POST", "/v1.0/ingest", encode_plain([1, 2, 3]))[0] == 200
        assert request(running.port, "POST", "/v1.0/ingest", bytes(5))[0] == 400
        client.send(frame(2, bytes(8)))
        client.acked(1)
        eventually(lambda: running.stats()["recordsAcked"] == 10)
        _, values = scrape(running)
        stats = running.stats()
    for name, key in {
        "ringoexp_records_received_total": "recordsReceived",
        "ringoexp_records_stored_total": "recordsStored",
        "ringoexp_records_acked_total": "recordsAcked",
        "ringoexp_records_refused_total": "recordsRefused",
        "ringoexp_records_duplicate_total": "recordsDuplicate",
        "ringoexp_received_bytes_total": "bytesReceived",
        "ringoexp_commits_total": "commits",
        "ringoexp_ring_slots": "ringSize",
        "ringoexp_ring_high_water_slots": "ringHighWater",
        "ringoexp_database_bytes": "databaseBytes",
        "ringoexp_wal_bytes": "walBytes",
        "ringoexp_clients": "clients",
        "ringoexp_publishers": "publishers",
        "ringoexp_workers": "workers",
    }.items():
        assert values[name] == stats[key], name
    assert values["ringoexp_records_acked_total"] == 10 and values["ringoexp_clients"] == 1
    assert values['ringoexp_build_info{version="0.1.0",role="publisher"}'] == 1


@pytest.mark.parametrize(
    ("name", "count"), [("ringoexp_ack_latency_seconds", 4), ("ringoexp_commit_duration_seconds", 4)]
)
def test_histograms_are_cumulative_and_complete(tmp_path: Path, name: str, count: int) -> None:
    with server(tmp_path, "-p", "0", "-T", "0") as running:
        for _ in range(count):
            assert request(running.port, "POST", "/v1.0/ingest", bytes(4))[0] == 200
        eventually(lambda: scrape(running)[1][f"{name}_count"] == count)
        _, values = scrape(running)
    buckets = [values[f'{name}_bucket{{le="{bound}"}}'] for bound in [*map(repr, BOUNDS), "+Inf"]]
    assert buckets == sorted(buckets) and buckets[-1] == values[f"{name}_count"] == count
    assert 0 < values[f"{name}_sum"] < 30 * count


def test_label_values_are_escaped() -> None:
    assert metrics._labels(a='b"c\\d\ne') == '{a="b\\"c\\\\d\\ne"}'


def test_metrics_answer_beyond_the_limit_of_connections(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", "-n", "1") as running, RawClient(running.port):
        assert request(running.port, "POST", "/v1.0/ingest", bytes(4))[0] == 503
        assert scrape(running)[1]["ringoexp_connections_refused_total"] == 1
