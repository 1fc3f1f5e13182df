"""nginx for the tests: it runs deploy/nginx.conf with other paths, ports and times, as a child process."""

import grp
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.harness import ROOT, connected, eventually, free_port

CONFIG = ROOT / "deploy" / "nginx.conf"
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")
"""The path of nginx. Debian installs it in a directory that only root has in its PATH."""


@contextmanager
def socket_directory() -> Iterator[Path]:
    """Make a directory for a Unix socket as deploy/nginx.conf describes, so that the user of nginx can connect."""
    with tempfile.TemporaryDirectory(prefix="ringoexp-") as name:
        if not os.getuid():
            os.chown(name, -1, grp.getgrnam("www-data").gr_gid)
            os.chmod(name, 0o2750)
        yield Path(name)


@contextmanager
def nginx(
    directory: Path, server_at: int | Path, *changes: tuple[str, str], certificate: Path | None = None
) -> Iterator[int]:
    """Run nginx in front of the server at a Unix socket or a port, and yield the port of nginx.

    With a `certificate` it is the port for TLS. The files of nginx are in `directory`. `changes` are more replacements
    (old, new) in the configuration. Skips the test without nginx.
    """
    if not NGINX:
        pytest.skip("no nginx (Debian: nginx-light)")
    port, tls_port = free_port(), free_port()
    text = CONFIG.read_text()
    if certificate:
        begin = text.index("    #server {\n")
        text = text[:begin] + text[begin:].replace("    #", "    ")
    upstream = f"unix:{server_at.absolute()}" if isinstance(server_at, Path) else f"127.0.0.1:{server_at}"
    temporary = "".join(
        f"    {kind}_temp_path {directory}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    for old, new in (
        ("http {\n", f"http {{\n{temporary}"),
        ("worker_processes auto;", "worker_processes 1;"),
        ("pid /run/nginx.pid;", f"pid {directory}/nginx.pid;"),
        ("error_log /var/log/nginx/error.log;", f"error_log {directory}/error.log;"),
        ("access_log /var/log/nginx/access.log;", f"access_log {directory}/access.log;"),
        ("    server unix:/run/ringoexp/ringoexp.sock;", f"    server {upstream};"),
        ("listen 80;", f"listen 127.0.0.1:{port};"),
        ("listen [::]:80;", ""),
        ("listen 443 ssl;", f"listen 127.0.0.1:{tls_port} ssl;"),
        ("listen [::]:443 ssl;", ""),
        ("/etc/ssl/ringoexp.crt", str(certificate)),
        ("/etc/ssl/ringoexp.key", str(certificate)),
        *changes,
    ):
        assert old in text, old
        text = text.replace(old, new)
    config = directory / "nginx.conf"
    config.write_text(text)
    errors = directory / "error.log"
    command = [NGINX, "-p", str(directory), "-c", str(config), "-e", str(errors), "-g", "daemon off;"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def listens() -> bool:
        assert process.poll() is None, errors.read_text()
        try:
            connected(port).close()
        except ConnectionRefusedError:
            return False
        return True

    try:
        eventually(listens, "nginx listens")
        yield tls_port if certificate else port
    finally:
        process.terminate()
        process.wait()
    assert not re.search(r"\[(alert|emerg)\]", errors.read_text()), errors.read_text()
