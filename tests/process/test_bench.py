"""The measuring functions of the bench. The bench itself measures speed."""

import os
import subprocess
import sys

import pytest
from support.harness import ROOT

BENCH = ROOT / "bench"

BUSY = """
import sys, threading
for _ in sys.stdin:
    thread = threading.Thread(target=sum, args=(range(20_000),))
    thread.start()
    thread.join()
    print("done", flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the bench reads the CPU time of other processes as Linux does")
def test_cpu_seconds_is_finer_than_a_tick_and_includes_ended_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tick is 10 ms, longer than twenty short connections take; the measurement of TLS divides by their time."""
    monkeypatch.syspath_prepend(str(BENCH))
    from bench import cpu_seconds

    with subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        readings = []
        for _ in range(5):
            process.stdin.write(b"\n")
            process.stdin.flush()
            assert process.stdout.readline()
            readings.append(cpu_seconds(process.pid))
        process.stdin.close()
    assert readings == sorted(set(readings)), f"each turn takes some time: {readings}"
    steps = [late - early for early, late in zip(readings, readings[1:], strict=False)]
    assert min(steps) < 1 / os.sysconf("SC_CLK_TCK"), f"a turn takes less than a tick: {steps}"
