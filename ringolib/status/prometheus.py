"""`GET /metrics`: writes the table of numbers in the Prometheus text format, version 0.0.4.

https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format. Numbers that the server does not have
are left out. The functions only format.
"""

from typing import Any

from ringolib.counters import BOUNDS_SECONDS, HistogramSnapshot
from ringolib.status.numbers import NUMBERS
from ringolib.status.snapshot import Snapshot

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def metrics_text(snapshot: Snapshot) -> str:
    """Return all metrics of a server, each with its HELP and TYPE lines."""
    lines: list[str] = []
    for number in NUMBERS:
        if number.metric and (value := number.read(snapshot)) is not None:
            name, kind, text = number.metric
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
            lines += _samples(name, value)
    return "\n".join(lines) + "\n"


def _samples(name: str, value: Any) -> list[str]:
    """Return the lines of one metric."""
    if isinstance(value, HistogramSnapshot):
        return _histogram(name, value)
    if isinstance(value, list):
        return [f"{name}{_labels(**sample.labels)} {_format(sample.value)}" for sample in value]
    return [f"{name} {_format(value)}"]


def _histogram(name: str, snapshot: HistogramSnapshot) -> list[str]:
    """Return the lines of the cumulative buckets, the sum and the count."""
    lines = []
    total = 0
    for bound, count in zip([*map(repr, BOUNDS_SECONDS), "+Inf"], snapshot.counts, strict=True):
        total += count
        lines.append(f"{name}_bucket{_labels(le=bound)} {total}")
    return [*lines, f"{name}_sum {_format(snapshot.sum)}", f"{name}_count {total}"]


def _labels(**labels: str) -> str:
    """Return `{name="value",...}`, with escaped values."""
    return "{" + ",".join(f'{name}="{_escape(value)}"' for name, value in labels.items()) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _format(value: float) -> str:
    """Return a number as text; a boolean as 1 or 0."""
    return str(int(value)) if isinstance(value, int) else repr(float(value))
