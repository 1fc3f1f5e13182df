"""Our units under a real systemd (`boot`): start, stop, watchdog, and what the server may do there."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.boot import Machine, machine
from support.harness import ROOT, eventually

CONSUMER, PUBLISHER = "ringoexp-consumer", "ringoexp-publisher"
SEND = "seq 1 {} | /opt/ringoexp/ringoexp.pyz send --url ws://localhost:{}/v1.0/ingest"
COUNT = "sqlite3 -readonly /var/lib/{}/ringoexp.db 'SELECT count(*) FROM records'"


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with machine(tmp_path_factory.mktemp("machine")) as made:
        yield made


@pytest.fixture
def running(booted: Machine) -> Iterator[Machine]:
    """Both services run."""
    booted.run("systemctl", "start", PUBLISHER, CONSUMER)
    yield booted
    booted.run("systemctl", "stop", PUBLISHER, CONSUMER, check=False)
    booted.run("systemctl", "reset-failed", PUBLISHER, CONSUMER, check=False)
    for unit in (PUBLISHER, CONSUMER):
        (booted.directory / "default" / unit).unlink(missing_ok=True)
        (booted.directory / "etc" / f"{unit}.service.d" / "test.conf").unlink(missing_ok=True)
    booted.run("systemctl", "daemon-reload")


def restarted(machine: Machine, unit: str, flags: str | None = "", more: str = "") -> int:
    """The service runs with these flags (None: its unit's), and lines of its unit; its PID."""
    if flags is not None:
        (machine.directory / "default" / unit).write_text(f'FLAGS="{flags}"\n')
    extra = machine.directory / "etc" / f"{unit}.service.d"
    extra.mkdir(exist_ok=True)
    (extra / "test.conf").write_text(f"[Service]\n{more}\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", unit)
    return int(machine.show(unit, "MainPID")[0])


def test_started_they_take_records_and_stopped_they_have_stored_them(running: Machine) -> None:
    for unit, said in (CONSUMER, "storing in /var/lib/ringoexp-consumer/ringoexp.db"), (PUBLISHER, "forwarding to"):
        state, status = running.show(unit, "SubState", "StatusText")
        assert state == "running" and said in status
    running.run("sh", "-c", SEND.format(1000, 6660))
    assert running.run("sh", "-c", COUNT.format(CONSUMER)) == "1000\n"
    running.run("systemctl", "stop", PUBLISHER, CONSUMER)
    for unit in (PUBLISHER, CONSUMER):
        assert running.show(unit, "SubState", "Result", "ExecMainStatus") == ["dead", "success", "0"]
        log = (running.directory / "lib" / f"{unit}.log").read_text()
        assert "ringoexp: stopped, 1000 stored, 0 unstored" in log


@pytest.mark.parametrize("unit", [CONSUMER, PUBLISHER])
def test_the_server_is_nobody_and_writes_where_its_data_are_and_nowhere_else(running: Machine, unit: str) -> None:
    (pid,) = running.show(unit, "MainPID")
    status = dict(re.findall(r"^(\w+):\s*(.*)$", running.run("cat", f"/proc/{pid}/status"), re.MULTILINE))
    assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2"
    assert {int(status[name], 16) for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb", "CapInh")} == {0}
    assert int(status["Uid"].split()[0]) >= 61184, "a dynamic user"
    for path in ("/usr", "/etc", "/opt/ringoexp", "/root", "/home"):
        said = running.run("nsenter", "-t", pid, "-m", "touch", f"{path}/there", check=False)
        assert "Read-only file system" in said or "Permission denied" in said, (path, said)
    assert running.run("nsenter", "-t", pid, "-m", "ls", "/root") == ""
    listed = running.run("stat", "-c", "%a", f"/var/lib/private/{unit}", f"/var/lib/private/{unit}/.")
    assert listed.split() == ["700", "700"]
    assert "sys" not in running.run("nsenter", "-t", pid, "-m", "ls", "/proc").split(), "processes, and no more"


def test_all_the_server_can_do_works_there(running: Machine) -> None:
    """With each call that the filter takes away: cores, profiler, samples, the page, metrics, a reader of the log."""
    flags = "-X 1 -L 6061 -d --log_json -n 50 -H ::"
    restarted(running, CONSUMER, flags)
    restarted(running, PUBLISHER, flags.replace("6061", "6062"))
    running.run("sh", "-c", SEND.format(1000, 6660))
    for path in ("/", "/v1.0/alive", "/v1.0/ready", "/v1.0/stats", "/metrics"):
        for port in (6660, 6661):
            running.run("curl", "-sSf", "-o", "/dev/null", f"http://localhost:{port}{path}")
    for path in ("threads", "profile?seconds=1", "heap?start=1", "heap", "heap?stop=1"):
        for port in (6061, 6062):
            running.run("curl", "-sSf", "-o", "/dev/null", f"http://localhost:{port}/debug/pprof/{path}")
    for unit in (CONSUMER, PUBLISHER):
        (pid,) = running.show(unit, "MainPID")
        assert re.search(r"^Cpus_allowed_list:\s*\d+$", running.run("cat", f"/proc/{pid}/status"), re.MULTILINE)
        stats = running.run("curl", "-sS", f"http://localhost:{6660 if unit == PUBLISHER else 6661}/metrics")
        assert "process_open_fds" in stats
        assert "Operation not permitted" not in (running.directory / "lib" / f"{unit}.log").read_text()


def test_its_memory_is_never_to_be_written_and_executed_and_it_has_one_heap_all_the_same(running: Machine) -> None:
    """What `_use_one_malloc_arena` calls through ctypes."""
    (running.directory / "opt" / "call.py").write_text(
        "import ctypes, mmap\nprint('set', ctypes.CDLL(None).mallopt(-8, 1))\nmmap.mmap(-1, 4096, prot=7)\n"
    )
    unit = (ROOT / "deploy" / f"{CONSUMER}.service").read_text()
    unit = re.sub("ExecStart=.*", "ExecStart=/usr/bin/python3 /opt/call.py", unit).replace(
        "Type=notify", "Type=oneshot"
    )
    unit = unit.replace(
        "Restart=on-failure", "StandardError=file:/var/lib/call.log\nStandardOutput=file:/var/lib/call.log"
    )
    (running.directory / "etc" / "call.service").write_text(unit)
    running.run("systemctl", "start", "call", check=False)
    log = (running.directory / "lib" / "call.log").read_text()
    assert "set 1\n" in log and "PermissionError" in log


def test_a_credential_is_where_docs_deploy_says(running: Machine) -> None:
    """The drop-in's own lines; a name stands in for the flag, and says what the flag was given."""
    secret = running.directory / "opt" / "token"
    secret.write_text("s3cret\n")
    secret.chmod(0o600)
    text = (ROOT / "docs" / "deploy.md").read_text()
    assert "LoadCredential=token:/etc/ringoexp/token\n" in text and 'Environment="SECRETS=--token_file %d/token' in text
    more = 'LoadCredential=token:/opt/token\nEnvironment="SECRETS=--name %d/token"'
    restarted(running, PUBLISHER, None, f"{more}\nExecStartPre=/bin/cat %d/token")
    answer = running.run("curl", "-sSi", "http://localhost:6660/v1.0/alive")
    (path,) = re.findall(r"^Server: (.*?)\r?$", answer, re.MULTILINE)
    assert path == f"/run/credentials/{PUBLISHER}.service/token"
    assert (running.directory / "lib" / f"{PUBLISHER}.log").read_text().count("s3cret") == 1
    told = running.run("systemctl", "show", PUBLISHER, "--property=StatusText,Environment")
    assert "s3cret" not in told and "s3cret" not in running.run("ps", "ax")


def test_behind_nginx_its_socket_is_where_docs_deploy_says_and_is_for_nginx(running: Machine) -> None:
    """The drop-in's own lines; nginx's user stands in for nginx, and another user for everybody else."""
    text = (ROOT / "docs" / "deploy.md").read_text()
    (more,) = re.findall(r"```ini\n\[Service\]\n(Group=www-data\n.*?)```", text, re.DOTALL)
    restarted(running, PUBLISHER, None, more)
    socket = "/run/ringoexp/ringoexp.sock"
    assert running.run("stat", "-c", "%a %G", socket) == "660 www-data\n"
    ask = ["curl", "-sS", "--unix-socket", socket, "http://localhost/v1.0/ready"]
    become = ["setpriv", "--clear-groups", "--reuid", "www-data", "--regid"]
    assert '{"ready": true' in running.run(*become, "www-data", *ask)
    assert "ready" not in running.run(*become, "nogroup", *ask, check=False)


def test_a_server_that_hangs_is_restarted_and_says_where_it_hung(running: Machine) -> None:
    """Stopped, it does not answer for itself any more."""
    pid = restarted(running, CONSUMER, more="WatchdogSec=2\nRestartSec=0")  # and half of that late, on a busy machine
    told = "WatchdogTimestampMonotonic"
    (began,) = running.show(CONSUMER, told)
    eventually(lambda: int(running.show(CONSUMER, told)[0]) >= int(began) + 3_500_000, "the watchdog's time passes")
    assert running.show(CONSUMER, "MainPID", "NRestarts") == [str(pid), "0"]
    running.run("kill", "-STOP", str(pid))
    eventually(lambda: running.show(CONSUMER, "NRestarts", "SubState") == ["1", "running"])
    log = (running.directory / "lib" / f"{CONSUMER}.log").read_text()
    assert "Fatal Python error: Aborted" in log and " in serve_forever\n" in log
    running.run("sh", "-c", SEND.format(10, 6660))


def test_a_bad_flag_is_not_tried_again_and_a_port_that_is_taken_is(running: Machine) -> None:
    running.run("systemctl", "stop", PUBLISHER)
    (running.directory / "default" / PUBLISHER).write_text("FLAGS=--no-such-flag\n")
    assert "failed" in running.run("systemctl", "start", PUBLISHER, check=False)
    assert running.show(PUBLISHER, "ActiveState", "ExecMainStatus", "NRestarts") == ["failed", "2", "0"]
    (running.directory / "default" / PUBLISHER).write_text('FLAGS="-p 6661"\n')
    running.run("systemctl", "start", PUBLISHER, check=False)
    assert running.show(PUBLISHER, "ActiveState", "SubState", "ExecMainStatus") == ["activating", "auto-restart", "1"]


def test_killed_it_comes_back(running: Machine) -> None:
    restarted(running, PUBLISHER, more="RestartSec=0")
    (pid,) = running.show(PUBLISHER, "MainPID")
    running.run("kill", "-KILL", pid)
    eventually(lambda: running.show(PUBLISHER, "NRestarts", "SubState") == ["1", "running"])
    running.run("sh", "-c", SEND.format(10, 6660))


@pytest.mark.skipif("SIGHUP" not in (ROOT / "ringoexp.py").read_text(), reason="the server does not reload yet")
def test_reloaded_it_is_the_same_process(running: Machine) -> None:
    for unit in (CONSUMER, PUBLISHER):
        before = running.show(unit, "MainPID")
        running.run("systemctl", "reload", unit)
        eventually(lambda unit=unit: running.show(unit, "SubState") == ["running"])
        assert running.show(unit, "MainPID", "NRestarts") == [*before, "0"]


@pytest.mark.long
def test_a_stop_with_records_that_cannot_be_stored_ends_in_time_and_is_a_failure(running: Machine) -> None:
    """The consumer hangs, and the spool is full."""
    consumer = str(restarted(running, CONSUMER, more="WatchdogSec=0"))
    restarted(running, PUBLISHER, "--spool_max 1")
    running.run("kill", "-STOP", consumer)
    running.run("sh", "-c", f"({SEND.format(3000, 6660)}) > /dev/null 2>&1 & sleep 12; kill $!")
    began = time.monotonic()
    running.run("systemctl", "stop", PUBLISHER)
    assert 25 < time.monotonic() - began < 43
    assert running.show(PUBLISHER, "ActiveState", "Result", "ExecMainStatus") == ["failed", "exit-code", "3"]
    running.run("kill", "-CONT", consumer)


def test_the_machine_leaves_nothing_on_this_one(booted: Machine) -> None:
    """Its directories are the tests' own, whatever the services wrote."""
    assert booted.run("ls", "-d", f"/var/lib/private/{CONSUMER}")
    assert not Path(f"/var/lib/private/{CONSUMER}").exists()
