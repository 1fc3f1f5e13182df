"""Run the image's commands as Docker does, in a root directory with the image's files: `contained.py ROOT DATA`.

The root is read-only except for `/data`. The user is a number without capabilities, and the server is the first process
of its PID namespace. The script needs root and its own namespaces (`unshare --mount --net --ipc --uts`), because it
mounts, uses port 6660 and brings the loopback interface up. `deploy/try_image` passes the image's root, and
test_deploy.py a root made of the host's programs. An AssertionError ends the script if a check fails.
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
USER_ID = 10001
STOP_TIMEOUT_SECONDS = 45


def instructions(name: str) -> list[str]:
    """Return the arguments of every such instruction in the Dockerfile, each as one line."""
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    return [line.split(maxsplit=1)[1].strip() for line in text.splitlines() if line.startswith(f"{name} ")]


def entry_point() -> list[str]:
    """Return the command of a container."""
    (command,) = instructions("ENTRYPOINT")
    return list(json.loads(command))


def environment() -> list[str]:
    """Return the variables of the image, each as NAME=VALUE."""
    return [word for line in instructions("ENV") for word in line.split()]


def health_check() -> list[str]:
    """Return the command of the health check."""
    (check,) = instructions("HEALTHCHECK")
    return list(json.loads(check.split(" CMD ")[1]))


def main(root: str, data: str) -> None:
    """Mount the root, then run a publisher with its own store, and consumers on IPv4 and IPv6."""
    _mount(root, data)
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", UP_AND_RUNNING))
    inside = ["chroot", root, "/usr/bin/env", "-i", "PATH=/usr/local/bin:/usr/bin:/bin", *environment()]
    inside += ["setpriv", f"--reuid={USER_ID}", f"--regid={USER_ID}", "--clear-groups", "--no-new-privs"]
    inside += ["--bounding-set=-all", "sh", "-c", 'cd /data && exec "$@"', "sh"]
    for flags in ([], ["-I", "false"], ["-I", "false", "-H", "::"]):
        check_server(inside, [*entry_point(), *flags])
    health = subprocess.run([*inside, *health_check()], stderr=subprocess.DEVNULL)
    assert health.returncode == 1, "unhealthy without a server"


def _mount(root: str, data: str) -> None:
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "--rbind", root, root], check=True)
    hosts = Path(f"{data}.hosts")  # Docker mounts one too
    hosts.write_text("127.0.0.1 localhost\n::1 localhost\n")
    Path(root, "etc/hosts").touch()
    subprocess.run(["mount", "--bind", hosts, f"{root}/etc/hosts"], check=True)
    hosts.unlink()
    for kind, source, target in ("--rbind", "/dev", "dev"), ("--bind", data, "data"), ("-tproc", "proc", "proc"):
        subprocess.run(["mount", kind, source, f"{root}/{target}"], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", root], check=True)
    os.chown(data, USER_ID, USER_ID)


def check_server(inside: list[str], command: list[str]) -> None:
    """Start the server, send it records, and stop it as `docker stop` does."""
    first_process = ["unshare", "--pid", "--fork", "--kill-child", *inside, *command]
    with subprocess.Popen(first_process, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr
        for line in server.stderr:
            print(line, end="")
            if " event=started " in line:
                break
        assert subprocess.run([*inside, *health_check()]).returncode == 0, "healthy"
        for path in ("/new", "/tmp/new", "/usr/new"):
            touched = subprocess.run([*inside, "touch", path], capture_output=True, text=True)
            assert "Read-only file system" in touched.stderr, f"{path}: {touched.stderr}"
        numbers = b"".join(b"%d\n" % number for number in range(RECORDS))
        assert subprocess.run([*inside, command[0], "send"], input=numbers).returncode == 0
        (pid,) = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        status = Path(f"/proc/{pid}/status").read_text()
        assert re.search(r"^NSpid:.*\t1$", status, re.MULTILINE), "the first process"
        assert re.search(rf"^Uid:\t{USER_ID}\t{USER_ID}\t", status, re.MULTILINE)
        assert set(re.findall(r"^Cap(?:Prm|Eff|Bnd):\t(\w+)$", status, re.MULTILINE)) == {"0" * 16}
        began = time.monotonic()
        os.kill(int(pid), signal.Signals[instructions("STOPSIGNAL")[0]])
        _, output = server.communicate(timeout=STOP_TIMEOUT_SECONDS)
        assert server.returncode == 0
        assert f" event=stopped stored={RECORDS} unstored=0 " in output
        print(output, f"The stop took {time.monotonic() - began:.2f} s.", sep="")


if __name__ == "__main__":
    main(*sys.argv[1:])
