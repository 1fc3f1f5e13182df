"""Builds `ringoexp.pyz`, the whole program in one file: `python tools/build_pyz.py [OUTPUT]`, from a checkout.

The file is a zip of the sources, unchanged: the program's modules, the live page, and simple-websocket, wsproto and
h11 as they are installed, each with its licence. The same sources give the same bytes, on every machine and with every
Python. Only a different zlib (for example zlib-ng) compresses them differently.
"""

import hashlib
import io
import os
import re
import sys
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = "ringoexp.pyz"
MODULES = ("ringoexp.py", "wsserver.py", "ringbuffer.py", "store.py")
PACKAGE = "ringolib"
DEPENDENCIES = {"simple-websocket": "simple_websocket", "wsproto": "wsproto", "h11": "h11"}
"""Distributions the program needs besides the standard library, and the package in each."""
ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip file can hold
FILE_MODE = 0o100644  # S_IFREG, rw-r--r--
UNIX = 3
LICENCE = re.compile(r"(licen[cs]e|copying|notice|authors)[^/]*$", re.IGNORECASE)

MAIN = """\
# Every Python can parse this file, even 2.7: a version that is too old prints one line instead of a syntax error.
import sys

if sys.version_info < (3, 10):
    sys.exit("ringoexp: error: this is Python %d.%d, Python 3.10 or newer is needed" % sys.version_info[:2])

import signal

if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback

try:
    import zlib
except ImportError:
    sys.exit("ringoexp: error: this Python lacks the module zlib: use a Python that was built with it")

import ringoexp
from ringolib.web import page

page.load_page()  # read the page now: a newer file may replace this one while the program runs
sys.exit(ringoexp.main())
"""


class BuildError(Exception):
    """The file cannot be built. The text names the cause and the remedy."""


def installed(name: str) -> Distribution:
    """Return an installed distribution. Raises BuildError if it is missing."""
    try:
        return distribution(name)
    except PackageNotFoundError:
        raise BuildError(
            f"{name} is not installed for {sys.executable}: "
            "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/python tools/build_pyz.py"
        ) from None


def own_files() -> dict[str, bytes]:
    """The program's own files, by their name in the archive. Raises OSError."""
    paths = [ROOT / name for name in (*MODULES, "LICENSE")]
    paths += [path for path in (ROOT / PACKAGE).rglob("*") if path.suffix in (".py", ".html")]
    return {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in paths}


def dependency_files(name: str, package: str) -> dict[str, bytes]:
    """The sources and licences of an installed distribution. Raises BuildError, OSError."""
    files = {}
    licences = 0
    dist = installed(name)
    for path in dist.files or ():
        location = path.as_posix()
        if path.suffix in (".so", ".pyd"):
            raise BuildError(f"{name} {dist.version}: {location} is not Python source, so it cannot be in the file")
        if location.startswith(f"{package}/") and path.suffix == ".py":
            files[location] = path.read_binary()
        elif ".dist-info/" in location and LICENCE.search(location):
            files[f"licenses/{name}-{dist.version}/{path.name}"] = path.read_binary()
            licences += 1
    if f"{package}/__init__.py" not in files or not licences:
        raise BuildError(f"{name} {dist.version}: its files or its licence are not where pip puts them")
    return files


def contents() -> dict[str, bytes]:
    """All files of the archive, by their name in it. Raises BuildError, OSError."""
    files = {"__main__.py": MAIN.encode(), **own_files()}
    for name, package in DEPENDENCIES.items():
        files |= dependency_files(name, package)
    return files


def archive(files: dict[str, bytes]) -> bytes:
    """An executable zip of `files`: a line that names the interpreter, then the zip."""
    output = io.BytesIO()
    output.write(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(output, "w") as zip_file:
        for name, content in sorted(files.items()):
            info = zipfile.ZipInfo(name, ZIP_EPOCH)
            info.create_system = UNIX
            info.external_attr = FILE_MODE << 16
            method = zipfile.ZIP_STORED if name == "__main__.py" else zipfile.ZIP_DEFLATED  # it runs without zlib, too
            zip_file.writestr(info, content, method, 9)
    return output.getvalue()


def main(arguments: list[str]) -> int:
    """Build the file and return the exit status: 0 built, 1 failed, 2 bad usage."""
    if len(arguments) > 1 or arguments and arguments[0].startswith("-"):
        print("usage: python tools/build_pyz.py [OUTPUT]", file=sys.stderr)
        return 2
    output = Path(arguments[0] if arguments else OUTPUT)
    if output.is_dir():
        print(f"build_pyz: error: {output} is a directory: name a file in it", file=sys.stderr)
        return 1
    new = output.with_name(f"{output.name}.new")
    try:
        content = archive(contents())
        new.write_bytes(content)  # then replace the old file in one step: it may be running
        new.chmod(0o755)
        os.replace(new, output)
    except (BuildError, OSError) as error:
        print(f"build_pyz: error: {error}", file=sys.stderr)
        return 1
    versions = ", ".join(f"{name} {installed(name).version}" for name in DEPENDENCIES)
    print(f"{output}: {len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}, with {versions}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
