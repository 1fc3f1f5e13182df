"""Runs our image's commands as Docker would, in a root directory with its files: `contained.py ROOT DATA`.

The root cannot be written but for `/data`, the user is a number, without capabilities, and the server the first process
of its PID namespace. Takes root, and namespaces of its own (`unshare --mount --net --ipc --uts`): it mounts, takes port
6660, and brings the loopback up. `deploy/try_image` gives it the image's root, test_deploy.py one made of this
machine's programs. Ends with an AssertionError if anything is not as it should be.
"""

import fcntl
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

DOCKERFILE = Path(__file__).resolve().parents[2] / "Dockerfile"
SIOCSIFFLAGS, UP_AND_RUNNING = 0x8914, 0x41  # netdevice(7)
RECORDS = 300_000


def instructions(name: str) -> list[str]:
    """What stands after an instruction in the Dockerfile, each time, in one line."""
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    return [line.split(maxsplit=1)[1].strip() for line in text.splitlines() if line.startswith(f"{name} ")]


def entry_point() -> list[str]:
    """The command of a container."""
    (found,) = instructions("ENTRYPOINT")
    return list(json.loads(found))


def health_check() -> list[str]:
    """The command that says whether it is healthy."""
    (found,) = instructions("HEALTHCHECK")
    return list(json.loads(found.split(" CMD ")[1]))


def main(root: str, data: str) -> None:
    """Mounts, then runs a publisher that is its own consumer, and a consumer."""
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "--rbind", root, root], check=True)
    hosts = Path(f"{data}.hosts")  # Docker makes one too
    hosts.write_text("127.0.0.1 localhost\n::1 localhost\n")
    Path(root, "etc/hosts").touch()
    subprocess.run(["mount", "--bind", hosts, f"{root}/etc/hosts"], check=True)
    hosts.unlink()
    for kind, source, target in ("--rbind", "/dev", "dev"), ("--bind", data, "data"), ("-tproc", "proc", "proc"):
        subprocess.run(["mount", kind, source, f"{root}/{target}"], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", root], check=True)
    os.chown(data, 10001, 10001)
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", UP_AND_RUNNING))
    (environment,) = instructions("ENV")
    inside = ["chroot", root, "/usr/bin/env", "-i", "PATH=/usr/local/bin:/usr/bin:/bin", environment]
    inside += ["setpriv", "--reuid=10001", "--regid=10001", "--clear-groups", "--no-new-privs", "--bounding-set=-all"]
    inside += ["sh", "-c", 'cd /data && exec "$@"', "sh"]
    for flags in ([], ["-I", "false"], ["-I", "false", "-H", "::"]):
        serve(inside, [*entry_point(), *flags])
    gone = subprocess.run([*inside, *health_check()], stderr=subprocess.DEVNULL)
    assert gone.returncode == 1, "nobody is healthy when the server is gone"


def serve(inside: list[str], command: list[str]) -> None:
    """Starts the server, sends it records, stops it as `docker stop` does."""
    first = ["unshare", "--pid", "--fork", "--kill-child", *inside, *command]
    with subprocess.Popen(first, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        print(server.stdout.readline(), end="")
        assert subprocess.run([*inside, *health_check()]).returncode == 0, "healthy"
        for path in ("/there", "/tmp/there", "/usr/there"):
            touched = subprocess.run([*inside, "touch", path], capture_output=True, text=True)
            assert "Read-only file system" in touched.stderr, f"{path}: {touched.stderr}"
        numbers = b"".join(b"%d\n" % number for number in range(RECORDS))
        assert subprocess.run([*inside, command[0], "send"], input=numbers).returncode == 0
        (pid,) = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        status = Path(f"/proc/{pid}/status").read_text()
        assert re.search(r"^NSpid:.*\t1$", status, re.MULTILINE), "the first process"
        assert re.search(r"^Uid:\t10001\t10001\t", status, re.MULTILINE)
        assert set(re.findall(r"^Cap(?:Prm|Eff|Bnd):\t(\w+)$", status, re.MULTILINE)) == {"0" * 16}
        began = time.monotonic()
        os.kill(int(pid), signal.Signals[instructions("STOPSIGNAL")[0]])
        said, _ = server.communicate(timeout=45)
        assert server.returncode == 0
        assert said == f"ringoexp: stopped, {RECORDS} stored, 0 unstored\n"
        print(said, f"It took {time.monotonic() - began:.2f} s.", sep="")


if __name__ == "__main__":
    main(*sys.argv[1:])
