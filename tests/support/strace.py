"""A server under strace: what it asked of the kernel, as typed calls in the order in which they began and ended.

strace stops a thread before and after each traced call, and writes both down in the order in which it sees them. So a
call that is written to have ended before another began did end before it, whichever threads made them.
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
    """One system call. `begun` and `ended` are places in the log; `ended` is None when it did not end.

    `path` is that of the descriptor, or what a call that opens, renames or removes names first. `numbers` are the plain
    integers among the arguments, `flags` the arguments without strings and descriptors, as strace writes them.
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
        """What a write writes."""
        return self.strings[0]

    @property
    def ok(self) -> bool:
        """True when it ended without an error."""
        return self.result is not None and self.result >= 0


def _unhex(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def _call(thread: int, begun: int, ended: int | None, text: str) -> Call:
    """The call of one whole line of the log, or of two that were put together."""
    found = _CALL.fullmatch(text)
    assert found, f"strace wrote {text[:200]!r}"
    name, arguments, result, error = found.groups()
    strings = []
    for string, cut in _STRING.findall(arguments):
        assert not cut, f"strace has cut a string short: {text[:200]!r}"
        strings.append(_unhex(string))
    bare = _STRING.sub("", arguments)
    descriptor = _PATH.match(bare)
    path = descriptor[1] if descriptor else ""
    if path.startswith("\\x"):
        path = _unhex(path).decode()
    if name in ("openat", "open", "creat", "unlink", "unlinkat", "rename", "renameat", "truncate"):
        path = os.path.join(path, strings[0].decode())
    numbers = [int(each) for each in bare.split(", ") if each.lstrip("-").isdigit()]
    value = None if result == "?" else int(result, 0)
    return Call(thread, name, begun, ended, path, strings, numbers, _PATH.sub("", bare), value, error.strip())


def parse(log: Path) -> list[Call]:
    """The calls of a log, in the order in which they began."""
    calls: list[Call] = []
    open_calls: dict[int, tuple[int, str]] = {}
    with open(log, encoding="latin-1") as lines:
        for place, line in enumerate(lines):
            found = _LINE.fullmatch(line.rstrip("\n"))
            assert found, f"strace wrote {line[:200]!r}"
            thread, text = int(found[1]), found[2]
            if text.startswith(("---", "+++", "???")) or "<... ??? resumed>" in line[:60]:
                continue  # signals and ends; a thread killed as it made a call, which then was not made
            if text.endswith(_UNFINISHED):
                open_calls[thread] = (place, text.removesuffix(_UNFINISHED))
            elif "resumed>" in line[:60]:
                begun, begin = open_calls.pop(thread)
                calls.append(_call(thread, begun, place, begin + text))
            else:
                calls.append(_call(thread, place, place, text))
    for thread, (begun, begin) in open_calls.items():  # it was killed within these
        calls.append(_call(thread, begun, None, f"{begin.rstrip(', ')}) = ?"))
    calls.sort(key=lambda call: call.begun)
    return calls


@cache
def why_not() -> str:
    """Why nothing can be traced here; empty where it can."""
    if not shutil.which("strace"):
        return "needs strace"
    probe = subprocess.run(
        [*command(Path(os.devnull), "-e", "trace=fsync", "-e", "inject=fsync:error=EIO"), "true"],
        capture_output=True,
        text=True,
    )
    said = probe.stderr.strip()
    return f"strace may not trace here: {said[-200:]}" if probe.returncode or said else ""


def needed() -> None:
    """Skips the test where nothing can be traced."""
    if reason := why_not():
        pytest.skip(reason)


def command(log: Path, *options: str) -> list[str]:
    """The command that runs a server under strace. The server keeps its own pid: strace is a grandchild (-D)."""
    return ["strace", "-D", "-f", "-q", "--seccomp-bpf", "-o", str(log), *options]


def finished(log: Path, pid: int) -> None:
    """Returns once strace has written the last of that process, which has ended."""
    end = re.compile(rf"^{pid} +\+\+\+ ", re.MULTILINE)

    def over() -> bool:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 65536))
            return bool(end.search(file.read().decode("latin-1")))

    eventually(over, "strace has written everything")


@contextmanager
def traced(directory: Path, log: Path, *flags: str, patch: str = "") -> Iterator[ServerProcess]:
    """A server of which everything that it writes, syncs, names and sends is in `log`, complete afterwards."""
    trace = ",".join([WRITES, NAMES, SYNCS, SENDS])
    # Of each call what it is asked to do, all of it: strings whole and in hexadecimal, descriptors with their paths.
    options = ["-yy", "-xx", "-s", "33554432", "-e", f"trace={trace}"]
    with server(directory, *flags, patch=patch, under=command(log, *options)) as running:
        yield running
    finished(log, running.process.pid)
