"""`GET /metrics`: the text format, checked by a parser here and by `promtool`, and that metrics and stats agree."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.harness import ROOT, RawClient, ServerProcess, eventually, frame, free_port, request, server

from ringolib.counters import BOUNDS_SECONDS
from ringolib.status.numbers import NUMBERS
from ringolib.status.prometheus import _labels
from ringolib.wire import encode_plain

DOCS = (ROOT / "docs/metrics.md").read_text()
KINDS = {number.metric.name: number.metric.kind for number in NUMBERS if number.metric}
SAMPLE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)+)\})? (\S+)')
ROLES = {
    "single": ["-T", "0"],
    "publisher": [],
    "spooling": ["-S", "s.spool"],
    "consumer": ["-I", "false"],
    "retaining": ["-I", "false", "--retain", "30"],
}


def scrape(running: ServerProcess) -> tuple[dict[str, str], dict[str, float]]:
    """Return the type of each metric, and the value of each sample by name and labels. Fails if the format is wrong."""
    status, headers, body = running.get(
        "/metrics", Accept="application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    )
    assert status == 200 and headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    text = body.decode()
    assert text.endswith("\n") and "\n\n" not in text
    kinds: dict[str, str] = {}
    values: dict[str, float] = {}
    name = ""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith("# HELP "):
            _, _, name, text = line.split(" ", 3)
            assert name not in kinds and text.endswith(".")
            kind = next(lines)
            assert kind.startswith(f"# TYPE {name} ")
            kinds[name] = kind.rsplit(" ", 1)[1]
            continue
        match = SAMPLE.fullmatch(line)
        assert match, line
        sample, labels, value = match.groups()
        base = re.sub("_(bucket|sum|count)$", "", sample) if kinds[name] == "histogram" else sample
        assert base == name, "samples follow their own HELP and TYPE"
        key = f"{sample}{{{labels}}}" if labels else sample
        assert key not in values
        values[key] = float(value)
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


def test_metrics_of_each_role_have_the_format_and_types_of_the_table(running: ServerProcess) -> None:
    kinds, values = scrape(running)
    assert len(kinds) > 15 and values["process_resident_memory_bytes"] > 5e6
    assert kinds.items() <= KINDS.items()
    assert request(running.port, "HEAD", "/metrics")[::2] == (200, b"")
    assert request(running.port, "POST", "/metrics")[0] == 405


def test_promtool_accepts_the_metrics(running: ServerProcess) -> None:
    promtool = shutil.which("promtool")
    if not promtool:
        pytest.skip("needs promtool (Debian: prometheus)")
    result = subprocess.run([promtool, "check", "metrics"], input=running.get("/metrics")[2], capture_output=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")


@pytest.mark.slow
def test_each_metric_of_the_table_is_reported_by_some_role(tmp_path: Path) -> None:
    reported = set()
    for role, flags in ROLES.items():
        consumer = ["-T", str(free_port())] if role in ("publisher", "spooling") else []
        with server(tmp_path, "-p", "0", *flags, *consumer) as running:
            reported |= scrape(running)[0].keys()
    with_tls = {"ringoexp_certificate_expires_timestamp_seconds"}  # tested in test_tls.py
    assert reported | with_tls == KINDS.keys()


def test_queries_in_the_docs_use_existing_metrics() -> None:
    queries = "".join(re.findall(r"```promql\n(.*?)```", DOCS, re.DOTALL))
    used = set(re.findall(r"\b((?:ringoexp|process)_\w+)", queries))
    assert len(used) > 15
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in used} <= KINDS.keys()


def test_promtool_accepts_the_rules_in_the_docs(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if not promtool:
        pytest.skip("needs promtool (Debian: prometheus)")
    (rules,) = re.findall(r"```yaml\n(groups:.*?)```", DOCS, re.DOTALL)
    queries = re.findall(r"```promql\n(.*?)\n```", DOCS, re.DOTALL)
    rules += "".join(
        f"\n  - name: query-{n}\n    rules:\n    - record: a:b\n      expr: {q!r}" for n, q in enumerate(queries)
    )
    (tmp_path / "rules.yml").write_text(rules)
    result = subprocess.run([promtool, "check", "rules", tmp_path / "rules.yml"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_metrics_and_stats_agree_after_a_known_load(tmp_path: Path) -> None:
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
    assert values['ringoexp_build_info{version="0.2.0",role="publisher"}'] == 1


@pytest.mark.parametrize(
    ("name", "count"), [("ringoexp_ack_latency_seconds", 4), ("ringoexp_commit_duration_seconds", 4)]
)
def test_histograms_are_cumulative_and_complete(tmp_path: Path, name: str, count: int) -> None:
    with server(tmp_path, "-p", "0", "-T", "0") as running:
        for _ in range(count):
            assert request(running.port, "POST", "/v1.0/ingest", bytes(4))[0] == 200
        eventually(lambda: scrape(running)[1][f"{name}_count"] == count)
        _, values = scrape(running)
    buckets = [values[f'{name}_bucket{{le="{bound}"}}'] for bound in [*map(repr, BOUNDS_SECONDS), "+Inf"]]
    assert buckets == sorted(buckets) and buckets[-1] == values[f"{name}_count"] == count
    assert 0 < values[f"{name}_sum"] < 30 * count


def test_label_values_are_escaped() -> None:
    assert _labels(a='b"c\\d\ne') == '{a="b\\"c\\\\d\\ne"}'


def test_metrics_are_served_beyond_the_connection_limit(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", "-n", "1") as running, RawClient(running.port):
        assert request(running.port, "POST", "/v1.0/ingest", bytes(4))[0] == 503
        assert scrape(running)[1]["ringoexp_connections_refused_total"] == 1
