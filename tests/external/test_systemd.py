"""The units under a real systemd (`support.boot`): start, stop, watchdog and restrictions."""

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
    with machine(tmp_path_factory.mktemp("machine")) as booted_machine:
        yield booted_machine


@pytest.fixture
def running(booted: Machine) -> Iterator[Machine]:
    """The machine with both services running."""
    booted.run("systemctl", "start", PUBLISHER, CONSUMER)
    yield booted
    booted.run("systemctl", "stop", PUBLISHER, CONSUMER, check=False)
    booted.run("systemctl", "reset-failed", PUBLISHER, CONSUMER, check=False)
    for unit in (PUBLISHER, CONSUMER):
        (booted.directory / "default" / unit).unlink(missing_ok=True)
        (booted.directory / "etc" / f"{unit}.service.d" / "test.conf").unlink(missing_ok=True)
    booted.run("systemctl", "daemon-reload")


def restart(machine: Machine, unit: str, flags: str | None = "", more: str = "") -> int:
    """Restart a service with these flags (None: the unit's) and more lines of the unit, and return its PID."""
    if flags is not None:
        (machine.directory / "default" / unit).write_text(f'FLAGS="{flags}"\n')
    extra = machine.directory / "etc" / f"{unit}.service.d"
    extra.mkdir(exist_ok=True)
    (extra / "test.conf").write_text(f"[Service]\n{more}\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", unit)
    return int(machine.show(unit, "MainPID")[0])


def test_services_store_all_records_before_they_stop(running: Machine) -> None:
    for unit, greeting in (CONSUMER, "storing in /var/lib/ringoexp-consumer/ringoexp.db"), (PUBLISHER, "forwarding to"):
        state, status = running.show(unit, "SubState", "StatusText")
        assert state == "running" and greeting in status
    running.run("sh", "-c", SEND.format(1000, 6660))
    assert running.run("sh", "-c", COUNT.format(CONSUMER)) == "1000\n"
    running.run("systemctl", "stop", PUBLISHER, CONSUMER)
    for unit in (PUBLISHER, CONSUMER):
        assert running.show(unit, "SubState", "Result", "ExecMainStatus") == ["dead", "success", "0"]
        log = (running.directory / "lib" / f"{unit}.log").read_text()
        assert " event=stopped stored=1000 unstored=0 " in log


@pytest.mark.parametrize("unit", [CONSUMER, PUBLISHER])
def test_service_has_no_privileges_and_writes_only_its_data(running: Machine, unit: str) -> None:
    (pid,) = running.show(unit, "MainPID")
    status = dict(re.findall(r"^(\w+):\s*(.*)$", running.run("cat", f"/proc/{pid}/status"), re.MULTILINE))
    assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2"
    assert {int(status[name], 16) for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb", "CapInh")} == {0}
    assert int(status["Uid"].split()[0]) >= 61184, "a dynamic user"
    for path in ("/usr", "/etc", "/opt/ringoexp", "/root", "/home"):
        output = running.run("nsenter", "-t", pid, "-m", "touch", f"{path}/new", check=False)
        assert "Read-only file system" in output or "Permission denied" in output, (path, output)
    assert running.run("nsenter", "-t", pid, "-m", "ls", "/root") == ""
    modes = running.run("stat", "-c", "%a", f"/var/lib/private/{unit}", f"/var/lib/private/{unit}/.")
    assert modes.split() == ["700", "700"]
    assert "sys" not in running.run("nsenter", "-t", pid, "-m", "ls", "/proc").split(), "processes only"


def test_every_feature_works_under_the_system_call_filter(running: Machine) -> None:
    """Features that use unusual system calls: CPU affinity, profiler, dashboard, metrics, JSON log."""
    flags = "-X 1 -L 6061 -d --log_json -n 50 -H ::"
    restart(running, CONSUMER, flags)
    restart(running, PUBLISHER, flags.replace("6061", "6062"))
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


def test_mallopt_works_though_executable_memory_is_denied(running: Machine) -> None:
    """`_use_one_malloc_arena` calls mallopt through ctypes, and MemoryDenyWriteExecute must not break that."""
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


def test_credential_drop_in_of_the_docs_works(running: Machine) -> None:
    """The test passes the credential's path as --name, and reads it back from the Server header."""
    secret = running.directory / "opt" / "token"
    secret.write_text("s3cret\n")
    secret.chmod(0o600)
    text = (ROOT / "docs" / "deploy.md").read_text()
    assert "LoadCredential=token:/etc/ringoexp/token\n" in text and 'Environment="SECRETS=--token_file %d/token' in text
    more = 'LoadCredential=token:/opt/token\nEnvironment="SECRETS=--name %d/token"'
    restart(running, PUBLISHER, None, f"{more}\nExecStartPre=/bin/cat %d/token")
    response = running.run("curl", "-sSi", "http://localhost:6660/v1.0/alive")
    (path,) = re.findall(r"^Server: (.*?)\r?$", response, re.MULTILINE)
    assert path == f"/run/credentials/{PUBLISHER}.service/token"
    assert (running.directory / "lib" / f"{PUBLISHER}.log").read_text().count("s3cret") == 1
    shown = running.run("systemctl", "show", PUBLISHER, "--property=StatusText,Environment")
    assert "s3cret" not in shown and "s3cret" not in running.run("ps", "ax")


def test_unix_socket_drop_in_of_the_docs_admits_nginx_only(running: Machine) -> None:
    """Requests come from nginx's user, with nginx's group and with another one."""
    text = (ROOT / "docs" / "deploy.md").read_text()
    (more,) = re.findall(r"```ini\n\[Service\]\n(Group=www-data\n.*?)```", text, re.DOTALL)
    restart(running, PUBLISHER, None, more)
    socket = "/run/ringoexp/ringoexp.sock"
    assert running.run("stat", "-c", "%a %G", socket) == "660 www-data\n"
    ask = ["curl", "-sS", "--unix-socket", socket, "http://localhost/v1.0/ready"]
    become = ["setpriv", "--clear-groups", "--reuid", "www-data", "--regid"]
    assert '{"ready": true' in running.run(*become, "www-data", *ask)
    assert "ready" not in running.run(*become, "nogroup", *ask, check=False)


def test_hanging_server_is_restarted_and_logs_its_stacks(running: Machine) -> None:
    """SIGSTOP makes the server hang."""
    pid = restart(running, CONSUMER, more="WatchdogSec=2\nRestartSec=0")  # short, though a busy machine notifies late
    notified_at = "WatchdogTimestampMonotonic"
    (began,) = running.show(CONSUMER, notified_at)
    eventually(
        lambda: int(running.show(CONSUMER, notified_at)[0]) >= int(began) + 3_500_000, "longer than the watchdog's time"
    )
    assert running.show(CONSUMER, "MainPID", "NRestarts") == [str(pid), "0"]
    running.run("kill", "-STOP", str(pid))
    eventually(lambda: running.show(CONSUMER, "NRestarts", "SubState") == ["1", "running"])
    log = (running.directory / "lib" / f"{CONSUMER}.log").read_text()
    assert "Fatal Python error: Aborted" in log and " in serve_forever\n" in log
    running.run("sh", "-c", SEND.format(10, 6660))


def test_port_in_use_is_retried_and_invalid_flag_is_not(running: Machine) -> None:
    running.run("systemctl", "stop", PUBLISHER)
    (running.directory / "default" / PUBLISHER).write_text("FLAGS=--no-such-flag\n")
    assert "failed" in running.run("systemctl", "start", PUBLISHER, check=False)
    assert running.show(PUBLISHER, "ActiveState", "ExecMainStatus", "NRestarts") == ["failed", "2", "0"]
    (running.directory / "default" / PUBLISHER).write_text('FLAGS="-p 6661"\n')
    running.run("systemctl", "start", PUBLISHER, check=False)
    assert running.show(PUBLISHER, "ActiveState", "SubState", "ExecMainStatus") == ["activating", "auto-restart", "1"]


def test_killed_server_is_restart(running: Machine) -> None:
    restart(running, PUBLISHER, more="RestartSec=0")
    (pid,) = running.show(PUBLISHER, "MainPID")
    running.run("kill", "-KILL", pid)
    eventually(lambda: running.show(PUBLISHER, "NRestarts", "SubState") == ["1", "running"])
    running.run("sh", "-c", SEND.format(10, 6660))


def test_reload_keeps_the_process(running: Machine) -> None:
    for unit in (CONSUMER, PUBLISHER):
        before = running.show(unit, "MainPID")
        running.run("systemctl", "reload", unit)
        eventually(lambda unit=unit: running.show(unit, "SubState") == ["running"])
        assert running.show(unit, "MainPID", "NRestarts") == [*before, "0"]


@pytest.mark.long
def test_stop_with_unstorable_records_fails_in_time(running: Machine) -> None:
    """The consumer hangs and the spool is full."""
    consumer = str(restart(running, CONSUMER, more="WatchdogSec=0"))
    restart(running, PUBLISHER, "--spool_max 1")
    running.run("kill", "-STOP", consumer)
    running.run("sh", "-c", f"({SEND.format(3000, 6660)}) > /dev/null 2>&1 & sleep 12; kill $!")
    began = time.monotonic()
    running.run("systemctl", "stop", PUBLISHER)
    assert 25 < time.monotonic() - began < 43
    assert running.show(PUBLISHER, "ActiveState", "Result", "ExecMainStatus") == ["failed", "exit-code", "3"]
    running.run("kill", "-CONT", consumer)


def test_booted_machine_leaves_nothing_on_the_host(booted: Machine) -> None:
    """The services write only to directories of the test."""
    assert booted.run("ls", "-d", f"/var/lib/private/{CONSUMER}")
    assert not Path(f"/var/lib/private/{CONSUMER}").exists()
