"""The runnable blocks of the documents do what their pages say.

A block is runnable if `<!-- run -->` stands on the line before it. The blocks of a document run in their order, in one
new directory. A server that a block starts runs until a later block starts others, or until the end. If the first block
starts none, a server without flags runs from the start. After `<!-- output -->` stands the output of the block before.

The commands are run as they are printed, with two differences: each port of the documents is replaced by a free port,
and `.venv/bin/ringoexp` is a script that runs this checkout and adds the port if a command leaves it out.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.documents import DOCUMENTS, Block, blocks
from support.harness import DEADLINE, ROOT, eventually, exchange, free_port

INSTALL = "python3 -m venv .venv && .venv/bin/pip install . && "
"""The part of a command that the scripts in `.venv/bin` replace. `test_package.py` tests the installation."""
SERVER = re.compile(r"(?:[A-Z_]+=\S+ )*\.venv/bin/ringoexp(?! (?:send|read|help|version|--help)\b)")
PORTS = ("6660", "6661", "6662", "6663", "6061")
"""The ports of the documents."""
TOOLS = ("curl", "sqlite3", "openssl", "go")
STOP_SECONDS = 60.0
"""A server ends within 40 s of the signal, also on a busy machine."""
RUNNABLE = [document for document in DOCUMENTS if any(block.marker == "run" for block in blocks(document))]

RINGOEXP = """#!{python}
import os
import sys

words = sys.argv[1:]
if words[:1] in (["send"], ["read"]):
    if "--url" not in words:
        words += ["--url", {{"send": "ws", "read": "http"}}[words[0]] + "://localhost:{port}"]
elif not any(word.startswith("unix:") for word in words):
    if "-p" not in words:
        words += ["-p", "{port}"]
    if "-I" not in words and "-T" not in words and "-U" not in words:
        words += ["-T", "{port}"]
os.execv("{python}", ["{python}", "{root}/ringoexp.py", *words])
"""


class Terminals:
    """A new directory with the program in `.venv/bin`, the servers that run in it, and the ports of the documents."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ports = {printed: str(free_port()) for printed in PORTS}
        self.servers: list[subprocess.Popen[str]] = []
        programs = directory / ".venv" / "bin"
        programs.mkdir(parents=True)
        script = RINGOEXP.format(python=sys.executable, root=ROOT, port=self.ports["6660"])
        for name, text in (("ringoexp", script), ("python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def adapt(self, text: str) -> str:
        """Return a block with free ports instead of the printed ones, and each command on one line."""
        text = text.replace("\\\n", " ").replace(INSTALL, "")
        return re.sub(rf"\b({'|'.join(PORTS)})\b", lambda match: self.ports[match[1]], text)

    def run(self, block: Block) -> str:
        """Run a block to its end, or start its servers. Return its output."""
        text = self.adapt(block.text)
        if block.language == "python":
            return self.output([sys.executable, "-c", text])
        if not any(map(SERVER.match, text.splitlines())):
            return self.output(["bash", "-eo", "pipefail", "-c", text])
        self.stop()
        for line in text.splitlines():
            if SERVER.match(line):
                self.start(line)
            else:
                self.output(["bash", "-eo", "pipefail", "-c", line])
        return ""

    def output(self, command: list[str]) -> str:
        """Return the output of a command, which must succeed in time."""
        done = subprocess.run(
            command, cwd=self.directory, env=self.environment, capture_output=True, text=True, timeout=2 * DEADLINE
        )
        assert done.returncode == 0, (command[-1], done.stdout, done.stderr)
        assert "Traceback" not in done.stderr, done.stderr
        assert '"error":' not in done.stdout, (command[-1], done.stdout)  # curl succeeds if the answer is an error
        return done.stdout

    def start(self, line: str) -> None:
        """Start a server, and wait until it answers. A port with TLS answers HTTP with an error."""
        with open(self.directory / f"server-{len(self.servers)}.log", "w") as log:
            command = ["bash", "-c", f"exec {line}"]
            server = subprocess.Popen(
                command, cwd=self.directory, env=self.environment, stdout=log, stderr=log, text=True
            )
        self.servers.append(server)
        words = shlex.split(line)
        port = words[words.index("-p") + 1] if "-p" in words else self.ports["6660"]
        paths = [self.directory / word.removeprefix("unix:") for word in words if word.startswith("unix:")]

        def answers() -> bool:
            assert server.poll() is None, (line, Path(log.name).read_text())
            try:
                return bool(exchange(paths[0] if paths else int(port), b"GET /v1.0/alive HTTP/1.0\r\n\r\n"))
            except OSError:
                return False

        eventually(answers, line)

    def stop(self) -> None:
        """Stop the servers in order, the last one first."""
        while self.servers:
            server = self.servers.pop()
            server.send_signal(signal.SIGTERM)
            log = (self.directory / f"server-{len(self.servers)}.log").read_text
            assert server.wait(STOP_SECONDS) == 0, log()
            assert "Traceback" not in log(), log()

    def kill(self) -> None:
        """Kill the servers that are left after a failure."""
        for server in self.servers:
            server.kill()
            server.wait()


@pytest.mark.slow
@pytest.mark.parametrize("document", RUNNABLE)
def test_runnable_blocks_of_document_work(document: str, tmp_path: Path) -> None:
    marked = [block for block in blocks(document) if block.marker in ("run", "output")]
    for tool in TOOLS:
        if any(re.search(rf"\b{tool}\b", block.text) for block in marked) and not shutil.which(tool):
            pytest.skip(f"needs {tool}")
    terminals = Terminals(tmp_path)
    output = ""
    try:
        if not SERVER.search(marked[0].text):
            terminals.start(".venv/bin/ringoexp")
        for block in marked:
            if block.marker == "output":
                assert output == terminals.adapt(block.text), f"{document}:{block.line}"
            else:
                output = terminals.run(block)
        terminals.stop()
    finally:
        terminals.kill()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_each_shell_block_is_runnable_or_says_why_not(document: str) -> None:
    for block in blocks(document):
        if block.language == "sh":
            place = f"{document}:{block.line}"
            assert re.fullmatch(r"run|test|not run: .+", block.marker), (
                f"{place}: no <!-- run --> or <!-- not run: WHY -->"
            )
            for path in re.findall(r"tests/\S+\.py", block.marker):
                assert (ROOT / path).exists(), f"{place}: {path}"


def test_default_ports_are_added_to_commands_that_leave_them_out(tmp_path: Path) -> None:
    terminals = Terminals(tmp_path)
    script = (tmp_path / ".venv" / "bin" / "ringoexp").read_text().replace("os.execv(", "print(")
    port = terminals.ports["6660"]
    for command, added in (
        ("", ["-p", port, "-T", port]),
        ("-p 1 -T 2", []),
        ("-p 1", ["-T", port]),
        ("-I false -p 1", []),
        ("-H unix:x.sock", []),
        ("send FILE", ["--url", f"ws://localhost:{port}"]),
        ("read --limit 1", ["--url", f"http://localhost:{port}"]),
    ):
        given = command.split()
        printed = subprocess.run(
            [sys.executable, "-c", script, *given], capture_output=True, text=True, check=True
        ).stdout
        assert printed.rstrip() == f"{sys.executable} {[sys.executable, f'{ROOT}/ringoexp.py', *given, *added]}"
