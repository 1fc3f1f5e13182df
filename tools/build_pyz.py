"""Makes `ringoexp.pyz`, the whole program in one file: `python build_pyz.py [OUTPUT]`, from a checkout.

In it are the modules that pyproject.toml names, the live page, and simple-websocket, wsproto and h11 as they
are installed, each with its licence. Comments, docstrings and most of the indentation are left out, for the size; lines
keep their numbers, so that tracebacks and profiles name those of the sources. The same sources make the same bytes,
whoever builds, when, where and with which Python; another zlib than usual (zlib-ng) packs them differently.
"""

import ast
import hashlib
import io
import os
import re
import sys
import tokenize
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OUTPUT = "ringoexp.pyz"
PACKAGES = {"simple-websocket": "simple_websocket", "wsproto": "wsproto", "h11": "h11"}
"""What the program needs besides the standard library: distributions, and the package in each."""
TIME = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip file knows
FILE_MODE = 0o100644  # S_IFREG, rw-r--r--
UNIX = 3
LICENCE = re.compile(r"(licen[cs]e|copying|notice|authors)[^/]*$", re.IGNORECASE)

MAIN = """\
# Any Python can read this file, 2.7 too: one that is too old is to say so, and not to trip over the syntax.
import sys

if sys.version_info < (3, 10):
    sys.exit("ringoexp: error: this is Python %d.%d, Python 3.10 or newer is needed" % sys.version_info[:2])

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the imports run: end, without a traceback

import ringoexp  # first: it has the signals handled
from ringolib.web import page

page.page()  # read now: a newer file may take this one's place while it runs
sys.exit(ringoexp.main())
"""


class CannotBuild(Exception):
    """The file cannot be made. The text says what happened and what to do."""


def modules() -> list[str]:
    """The names of our modules, as pip installs them. Raises CannotBuild."""
    listed = re.search(
        r"^py-modules = (\[.*?\])", (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    if not listed:
        raise CannotBuild("pyproject.toml has no list py-modules")
    return [str(name) for name in ast.literal_eval(listed[1])]


def bare(source: str, name: str) -> str:
    """A module's source without comments and docstrings, every statement in its line. Raises CannotBuild."""
    lines = source.split("\n")
    cuts = []  # first line, column; last line, column; and what stands there instead
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            cuts.append((*token.start, *token.end, ""))
    tree = ast.parse(source)
    for body in _bodies(tree):
        texts = [each for each in body if _is_text(each)]
        for text in texts:
            assert text.end_lineno and text.end_col_offset
            start = _column(lines[text.lineno - 1], text.col_offset)
            end = _column(lines[text.end_lineno - 1], text.end_col_offset)
            only = len(texts) == len(body) and text is texts[0]
            cuts.append((text.lineno, start, text.end_lineno, end, "pass" if only else ""))
    for first, start, last, end, instead in sorted(cuts, reverse=True):
        left = (lines[first - 1][:start] + instead + lines[last - 1][end:]).rstrip()
        lines[first - 1 : last] = [left, *[""] * (last - first)]
    made = "\n".join(lines)
    _drop_texts(tree)
    try:
        same = ast.dump(ast.parse(made)) == ast.dump(tree)
    except SyntaxError:
        same = False
    if not same:
        raise CannotBuild(f"{name}: a docstring and code are in one line: it cannot be left out")
    # A quarter of the indentation, unless a text of several lines has some of it.
    thin = re.sub("^ +", lambda found: " " * sum(divmod(len(found[0]), 4)), made, flags=re.MULTILINE)
    return thin if ast.dump(ast.parse(thin)) == ast.dump(tree) else made


def bare_page(page: str) -> str:
    """The live page without indentation, and without comments in lines of their own; lines keep their numbers."""
    without = re.sub(r"^ */\*(?:(?!\*/).)*\*/$", lambda found: "\n" * found[0].count("\n"), page, flags=re.M | re.S)
    return re.sub("^ +", "", without, flags=re.M)


def _bodies(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    """All lists of statements that a docstring can be in."""
    for node in ast.walk(tree):
        for part in ("body", "orelse", "finalbody"):
            if isinstance(body := getattr(node, part, None), list) and body:
                yield body


def _is_text(statement: ast.stmt) -> bool:
    """True for a string that stands by itself: a docstring, of an attribute maybe."""
    found = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return found and isinstance(statement.value.value, str)  # type: ignore[attr-defined]


def _column(line: str, offset: int) -> int:
    """A column in characters; `ast` counts bytes."""
    return len(line.encode()[:offset].decode())


def _drop_texts(tree: ast.AST) -> None:
    for body in _bodies(tree):
        body[:] = [each for each in body if not _is_text(each)] or [ast.Pass()]


def installed(name: str) -> Distribution:
    """An installed package. Raises CannotBuild."""
    try:
        return distribution(name)
    except PackageNotFoundError:
        raise CannotBuild(
            f"{name} is not installed for {sys.executable}: "
            "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/python build_pyz.py"
        ) from None


def contents() -> dict[str, bytes]:
    """What goes into the file, by its name there. Raises CannotBuild, OSError."""
    found = {"__main__.py": MAIN.encode()}
    for name in modules():
        found[f"{name}.py"] = bare((ROOT / f"{name}.py").read_text("utf-8"), name).encode()
    found["dashboard.html"] = bare_page((ROOT / "dashboard.html").read_text("utf-8")).encode()
    found["LICENSE"] = (ROOT / "LICENSE").read_bytes()
    for name, package in PACKAGES.items():
        this = installed(name)
        licences = 0
        for path in this.files or ():
            place = path.as_posix()
            if path.suffix in (".so", ".pyd"):
                raise CannotBuild(f"{name} {this.version}: {place} is not Python, it cannot be in the file")
            if place.startswith(f"{package}/") and path.suffix == ".py":
                found[place] = bare(path.read_text("utf-8"), place).encode()
            elif ".dist-info/" in place and LICENCE.search(place):
                found[f"licenses/{name}-{this.version}/{path.name}"] = path.read_binary()
                licences += 1
        if f"{package}/__init__.py" not in found or not licences:
            raise CannotBuild(f"{name} {this.version}: its files or its licence are not where pip puts them")
    return found


def archive(files: dict[str, bytes]) -> bytes:
    """The file itself: the line that names the interpreter, and a zip."""
    made = io.BytesIO()
    made.write(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(made, "w") as packed:
        for name, content in sorted(files.items()):
            info = zipfile.ZipInfo(name, TIME)
            info.create_system = UNIX
            info.external_attr = FILE_MODE << 16
            packed.writestr(info, content, zipfile.ZIP_DEFLATED, 9)
    return made.getvalue()


def main(arguments: list[str]) -> int:
    """The program: 0 made, 1 could not, 2 bad usage."""
    if len(arguments) > 1 or arguments and arguments[0].startswith("-"):
        print("usage: python build_pyz.py [OUTPUT]", file=sys.stderr)
        return 2
    output = Path(arguments[0] if arguments else OUTPUT)
    if output.is_dir():
        print(f"build_pyz: error: {output} is a directory: name a file in it", file=sys.stderr)
        return 1
    new = output.with_name(f"{output.name}.new")
    try:
        made = archive(contents())
        new.write_bytes(made)  # and then it takes the old one's place at once, also while that runs
        new.chmod(0o755)
        os.replace(new, output)
    except (CannotBuild, OSError) as error:
        print(f"build_pyz: error: {error}", file=sys.stderr)
        return 1
    versions = ", ".join(f"{name} {installed(name).version}" for name in PACKAGES)
    print(f"{output}: {len(made)} bytes, sha256 {hashlib.sha256(made).hexdigest()}, with {versions}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
