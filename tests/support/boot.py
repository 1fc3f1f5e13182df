"""Boot a real systemd that runs the project's units, as the first process of its own namespaces. Needs root.

It has its own directories wherever it reads or writes. It uses the host's programs, but does not see the host's
services, and the host does not see its services.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.harness import DEADLINE, ROOT, eventually

SYSTEMD = Path("/lib/systemd/systemd")
HOST_UNITS = Path("/lib/systemd/system")
COMMAND_TIMEOUT_SECONDS = 120
TARGETS = (
    *("sysinit", "basic", "multi-user", "shutdown", "final", "umount"),
    *("sockets", "timers", "paths", "slices", "local-fs", "swap"),
    *("network", "network-online", "nss-lookup"),
)
"""The host's targets that the machine gets: the boot needs them, or the units name them."""
NAMESPACES = ("unshare", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--mount-proc", "--kill-child")
BOOT = """
set -e
mount --make-rprivate /
for pair in units:/lib/systemd/system etc:/etc/systemd/system lib:/var/lib opt:/opt default:/etc/default; do
    mkdir -p "${pair#*:}"
    mount --bind "$1/${pair%%:*}" "$(realpath "${pair#*:}")"
done
mount -t tmpfs tmpfs /run
mount -t cgroup2 cgroup2 "$1/cgroup"
mkdir "$1/cgroup/$2"
echo 0 > "$1/cgroup/$2/cgroup.procs"
umount "$1/cgroup"
exec unshare --cgroup sh -c 'mount -t cgroup2 cgroup2 /sys/fs/cgroup && mount --make-rshared / && exec "$@"' sh \
    /lib/systemd/systemd --system --unit=basic.target --log-target=console --show-status=no
"""
"""Shell script with the arguments DIRECTORY and CGROUP, run inside the namespaces."""
REMOVE_CGROUP = """
mount -t cgroup2 cgroup2 "$1/cgroup"
find "$1/cgroup/$2" -depth -type d -exec rmdir {} ";"
test ! -d "$1/cgroup/$2"
"""


class Machine:
    """A booted machine: its directories are in `directory`, and `run` runs commands in it."""

    def __init__(self, directory: Path, pid: int) -> None:
        self.directory = directory
        self._pid = pid
        self._log = directory / "log"

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command inside the machine and return its output, stderr included."""
        inside = ["nsenter", "-t", str(self._pid), "-m", "-p", "-n", "-i", "-u", "-C", *command]
        done = subprocess.run(
            inside, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=COMMAND_TIMEOUT_SECONDS
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}\n{self.log()}"
        return done.stdout

    def show(self, unit: str, *properties: str) -> list[str]:
        """Return the values of a unit's properties."""
        shown = self.run("systemctl", "show", unit, f"--property={','.join(properties)}")
        values = dict(line.split("=", 1) for line in shown.splitlines())
        return [values[name] for name in properties]

    def log(self) -> str:
        """Return the log of systemd."""
        return self._log.read_text(errors="replace")


@contextmanager
def machine(directory: Path) -> Iterator[Machine]:
    """Boot a machine with the units and `ringoexp.pyz` installed as in docs/deploy.md. Skips if that is impossible."""
    if os.getuid() or not SYSTEMD.exists() or not shutil.which("unshare"):
        pytest.skip("needs root, systemd and unshare")
    if not (ROOT / "tools" / "build_pyz.py").exists():
        pytest.skip("needs tools/build_pyz.py")
    _install(directory)
    cgroup = f"ringoexp-test-{os.getpid()}"
    with open(directory / "log", "wb") as log:
        starter = subprocess.Popen(
            [*NAMESPACES, "sh", "-c", BOOT, "sh", str(directory), cgroup],
            env={"PATH": os.environ["PATH"], "container": "unshare"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield _wait_booted(directory, starter)
    finally:
        starter.kill()  # this kills the first process, and so all processes of the namespaces
        starter.wait(DEADLINE)
        remove = ["unshare", "--mount", "sh", "-c", REMOVE_CGROUP, "sh", str(directory), cgroup]
        eventually(lambda: subprocess.run(remove, capture_output=True).returncode == 0)


def _install(directory: Path) -> None:
    """Create the machine's directories with targets, units and the program."""
    for name in ("units", "etc", "lib", "opt/ringoexp", "default", "cgroup"):
        (directory / name).mkdir(parents=True)
    for target in TARGETS:
        shutil.copy(HOST_UNITS / f"{target}.target", directory / "units")
    for unit in (ROOT / "deploy").glob("*.service"):
        text = unit.read_text()
        assert "Type=notify\n" in text
        # The machine has no journal.
        output = f"Type=notify\nStandardOutput=append:/var/lib/{unit.stem}.log\n"
        (directory / "etc" / unit.name).write_text(text.replace("Type=notify\n", output))
    build = [sys.executable, "tools/build_pyz.py", str(directory / "opt/ringoexp/ringoexp.pyz")]
    subprocess.run(build, cwd=ROOT, check=True)
    # A test's directories are for their owner only, but the service's user must read /opt.
    (directory / "opt").chmod(0o755)


def _wait_booted(directory: Path, starter: subprocess.Popen[bytes]) -> Machine:
    """Return the machine when systemd runs. Skips if it cannot run in namespaces."""
    children = Path(f"/proc/{starter.pid}/task/{starter.pid}/children")

    def skip_if_ended() -> None:
        if starter.poll() is not None:
            pytest.skip(f"no systemd in namespaces: {(directory / 'log').read_text(errors='replace')}")

    def first_process() -> list[str]:
        skip_if_ended()
        return children.read_text().split()

    booted = Machine(directory, int(eventually(first_process)[0]))

    def is_running() -> bool:
        skip_if_ended()
        return "running" in booted.run("systemctl", "is-system-running", check=False)

    eventually(is_running, "systemd has booted")
    return booted
