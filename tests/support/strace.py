"""A server under strace: its system calls as typed objects, in the order in which they began and ended.

strace stops a thread before and after each traced call, and logs both in the order in which it sees them. If the log
shows that one call ended before another began, then it did, even if different threads made them.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from support.harness import ServerProcess, eventually, server

WRITES = "write,pwrite64,writev,pwritev,pwritev2,sendfile,copy_file_range,fallocate,ftruncate,truncate"
NAMES = "openat,open,creat,unlink,unlinkat,rename,renameat,renameat2,link,linkat"
SYNCS = "fsync,fdatasync,sync_file_range,sync,syncfs"
SENDS = "sendto,sendmsg,sendmmsg"

_LINE = re.compile(r"(\d+) +(?:<\.\.\. \w+ resumed>)?(.*)")
_CALL = re.compile(r"(\w+)\((.*)\) += (-?\d+|0x[0-9a-f]+|\?)(.*)")
_UNFINISHED = " <unfinished ...>"
_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?')
_PATH = re.compile(r"\w+<((?:\\x[0-9a-f]{2})+|[^<]*?\](?=>)|[^<>]*)>")


@dataclass
class Call:
    """One system call. `begun` and `ended` are line numbers in the log; `ended` is None if the call did not end.

    `path` belongs to the descriptor; for a call that opens, renames or removes a file, it is the first name. `numbers`
    are the plain integers among the arguments. `flags` are the arguments without strings and descriptors, as strace
    prints them.
    """

    thread: int
    name: str
    begun: int
    ended: int | None
    path: str
    strings: list[bytes]
    numbers: list[int]
    flags: str
    result: int | None
    error: str

    @property
    def data(self) -> bytes:
        """Return the bytes that a write writes."""
        return self.strings[0]

    @property
    def ok(self) -> bool:
        """True if the call ended without an error."""
        return self.result is not None and self.result >= 0


def _unhex(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def _call(thread: int, begun: int, ended: int | None, text: str) -> Call:
    """Parse one call from one line of the log, or from two joined lines."""
    match = _CALL.fullmatch(text)
    assert match, f"strace wrote {text[:200]!r}"
    name, arguments, result, error = match.groups()
    strings = []
    for string, cut in _STRING.findall(arguments):
        assert not cut, f"strace has truncated a string: {text[:200]!r}"
        strings.append(_unhex(string))
    bare = _STRING.sub("", arguments)
    descriptor = _PATH.match(bare)
    path = descriptor[1] if descriptor else ""
    if path.startswith("\\x"):
        path = _unhex(path).decode()
    if name in ("openat", "open", "creat", "unlink", "unlinkat", "rename", "renameat", "truncate"):
        path = os.path.join(path, strings[0].decode())
    numbers = [int(argument) for argument in bare.split(", ") if argument.lstrip("-").isdigit()]
    value = None if result == "?" else int(result, 0)
    return Call(thread, name, begun, ended, path, strings, numbers, _PATH.sub("", bare), value, error.strip())


def parse(log: Path) -> list[Call]:
    """Return the calls of a log, in the order in which they began."""
    calls: list[Call] = []
    open_calls: dict[int, tuple[int, str]] = {}
    with open(log, encoding="latin-1") as lines:
        for number, line in enumerate(lines):
            match = _LINE.fullmatch(line.rstrip("\n"))
            assert match, f"strace wrote {line[:200]!r}"
            thread, text = int(match[1]), match[2]
            if text.startswith(("---", "+++", "???")) or "<... ??? resumed>" in line[:60]:
                continue  # a signal, an exit, or a call that was not made because the thread was killed
            if text.endswith(_UNFINISHED):
                open_calls[thread] = (number, text.removesuffix(_UNFINISHED))
            elif "resumed>" in line[:60]:
                begun, begin = open_calls.pop(thread)
                calls.append(_call(thread, begun, number, begin + text))
            else:
                calls.append(_call(thread, number, number, text))
    for thread, (begun, begin) in open_calls.items():  # the thread was killed during these calls
        calls.append(_call(thread, begun, None, f"{begin.rstrip(', ')}) = ?"))
    calls.sort(key=lambda call: call.begun)
    return calls


@cache
def reason_to_skip() -> str:
    """Return why strace cannot be used here; empty if it can."""
    if not shutil.which("strace"):
        return "needs strace"
    probe = subprocess.run(
        [*command(Path(os.devnull), "-e", "trace=fsync", "-e", "inject=fsync:error=EIO"), "true"],
        capture_output=True,
        text=True,
    )
    output = probe.stderr.strip()
    return f"strace may not trace here: {output[-200:]}" if probe.returncode or output else ""


def need_strace() -> None:
    """Skip the test if strace cannot be used."""
    if reason := reason_to_skip():
        pytest.skip(reason)


def command(log: Path, *options: str) -> list[str]:
    """Return the command that runs a server under strace. With -D, strace is the grandchild, not the server."""
    return ["strace", "-D", "-f", "-q", "--seccomp-bpf", "-o", str(log), *options]


def wait_for_end(log: Path, pid: int) -> None:
    """Wait until strace has logged the end of a process."""
    end = re.compile(rf"^{pid} +\+\+\+ ", re.MULTILINE)

    def has_ended() -> bool:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 65536))
            return bool(end.search(file.read().decode("latin-1")))

    eventually(has_ended, "strace has logged the end")


@contextmanager
def traced(directory: Path, log: Path, *flags: str, patch: str = "") -> Iterator[ServerProcess]:
    """Run a server and log its writes, syncs, file operations and sends. The log is complete when the context ends."""
    trace = ",".join([WRITES, NAMES, SYNCS, SENDS])
    # Log strings untruncated and in hexadecimal, and descriptors with their paths.
    options = ["-yy", "-xx", "-s", "33554432", "-e", f"trace={trace}"]
    with server(directory, *flags, patch=patch, under=command(log, *options)) as running:
        yield running
    wait_for_end(log, running.process.pid)
