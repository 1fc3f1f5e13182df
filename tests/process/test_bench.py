"""What the bench's figures are made of; how fast anything is, only the bench itself says."""

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


@pytest.mark.skipif(sys.platform != "linux", reason="the bench asks Linux for other processes' time")
def test_processor_time_is_told_finer_than_a_tick_and_with_ended_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tick is 10 ms: twenty short connections took none, and what it costs to have TLS was divided by it."""
    monkeypatch.syspath_prepend(str(BENCH))
    from bench import cpu_seconds

    with subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        told = []
        for _ in range(5):
            process.stdin.write(b"\n")
            process.stdin.flush()
            assert process.stdout.readline()
            told.append(cpu_seconds(process.pid))
        process.stdin.close()
    assert told == sorted(set(told)), f"each turn took some: {told}"
    steps = [late - early for early, late in zip(told, told[1:], strict=False)]
    assert min(steps) < 1 / os.sysconf("SC_CLK_TCK"), f"and it took less than a tick: {steps}"
