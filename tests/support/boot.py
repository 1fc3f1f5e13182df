"""A real systemd that runs our units: the first process of namespaces of its own, with directories of its own where it
reads and writes. It sees this machine's programs, and nothing of its services; nor do they see it. Takes root.
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
SHARED = Path("/lib/systemd/system")
TARGETS = (
    "sysinit",
    "basic",
    "shutdown",
    "sockets",
    "timers",
    "paths",
    "slices",
    "local-fs",
    "swap",
    "umount",
    "final",
)
TARGETS += ("network", "network-online", "nss-lookup", "multi-user")
START = """
set -e
mount --make-rprivate /
for each in units:/lib/systemd/system etc:/etc/systemd/system lib:/var/lib opt:/opt default:/etc/default; do
    mkdir -p "${each#*:}"
    mount --bind "$1/${each%%:*}" "$(realpath "${each#*:}")"
done
mount -t tmpfs tmpfs /run
mount -t cgroup2 cgroup2 "$1/cgroup"
mkdir "$1/cgroup/$2"
echo 0 > "$1/cgroup/$2/cgroup.procs"
umount "$1/cgroup"
exec unshare --cgroup sh -c 'mount -t cgroup2 cgroup2 /sys/fs/cgroup && mount --make-rshared / && exec "$@"' sh \
    /lib/systemd/systemd --system --unit=basic.target --log-target=console --show-status=no
"""
END = """
mount -t cgroup2 cgroup2 "$1/cgroup"
find "$1/cgroup/$2" -depth -type d -exec rmdir {} ";"
test ! -d "$1/cgroup/$2"
"""


class Machine:
    """What there is of it: the directories it uses for its own, and commands that run in it."""

    def __init__(self, directory: Path, pid: int) -> None:
        self.directory = directory
        self._pid = pid
        self._log = directory / "log"

    def run(self, *command: str, check: bool = True) -> str:
        """What a command in it prints, to stderr too."""
        inside = ["nsenter", "-t", str(self._pid), "-m", "-p", "-n", "-i", "-u", "-C", *command]
        done = subprocess.run(inside, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}\n{self.log()}"
        return done.stdout

    def python(self, script: str) -> str:
        """What a Python script prints that runs in it."""
        return self.run(sys.executable, "-c", script)

    def show(self, unit: str, *properties: str) -> list[str]:
        """The values of a unit's properties."""
        shown = self.run("systemctl", "show", unit, f"--property={','.join(properties)}")
        values = dict(line.split("=", 1) for line in shown.splitlines())
        return [values[name] for name in properties]

    def log(self) -> str:
        """What systemd said, and the services."""
        return self._log.read_text(errors="replace")


@contextmanager
def machine(directory: Path) -> Iterator[Machine]:
    """It runs, with our units and `ringoexp.pyz` installed as docs/deploy.md says. Skips where that cannot be."""
    if os.getuid() or not SYSTEMD.exists() or not shutil.which("unshare"):
        pytest.skip("takes root, systemd and unshare")
    if not (ROOT / "tools" / "build_pyz.py").exists():
        pytest.skip("takes tools/build_pyz.py")
    for name in ("units", "etc", "lib", "opt/ringoexp", "default", "cgroup"):
        (directory / name).mkdir(parents=True)
    for target in TARGETS:
        shutil.copy(SHARED / f"{target}.target", directory / "units")
    for unit in (ROOT / "deploy").glob("*.service"):
        text = unit.read_text()  # there is no journal
        assert "Type=notify\n" in text
        (directory / "etc" / unit.name).write_text(
            text.replace("Type=notify\n", f"Type=notify\nStandardOutput=append:/var/lib/{unit.stem}.log\n")
        )
    subprocess.run(
        [sys.executable, "tools/build_pyz.py", str(directory / "opt/ringoexp/ringoexp.pyz")], cwd=ROOT, check=True
    )
    # The tests' directories are for their owner alone, and the service's user reads what is under /opt.
    (directory / "opt").chmod(0o755)

    cgroup = f"ringoexp-test-{os.getpid()}"
    spaces = ["unshare", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--mount-proc", "--kill-child"]
    with open(directory / "log", "wb") as log:
        starter = subprocess.Popen(
            [*spaces, "sh", "-c", START, "sh", str(directory), cgroup],
            env={"PATH": os.environ["PATH"], "container": "unshare"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        children = Path(f"/proc/{starter.pid}/task/{starter.pid}/children")
        first = eventually(lambda: starter.poll() is not None or children.read_text().split())
        if first is True:
            pytest.skip(f"no systemd in namespaces: {(directory / 'log').read_text()}")
        made = Machine(directory, int(first[0]))

        def runs() -> bool:
            if starter.poll() is not None:
                pytest.skip(f"no systemd in namespaces: {made.log()}")
            return "running" in made.run("systemctl", "is-system-running", check=False)

        eventually(runs, made.log)
        yield made
    finally:
        starter.kill()  # and with it the first process, and all others in there
        starter.wait(DEADLINE)
        end = ["unshare", "--mount", "sh", "-c", END, "sh", str(directory), cgroup]
        eventually(lambda: subprocess.run(end, capture_output=True).returncode == 0)
