"""The house: one room, one job, imports go downwards only; and its documents lead where they say."""

import ast
import json
import re
from pathlib import Path

import pytest
from support.harness import ROOT

README = (ROOT / "README.md").read_text()
MODULES = json.loads(re.findall(r"^py-modules = (\[.*?\])", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[0])
TABLE = re.findall(r"`(\w+)\.py`", README[README.index("\n## The code") : README.index("\n## Licence")])
ROOMS = [name for name in TABLE if name in MODULES]
"""The modules, in the order of the README's table."""


def imports(path: Path) -> set[str]:
    """What a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def test_each_room_imports_only_rooms_below_it_in_the_readmes_table() -> None:
    assert len(ROOMS) == len(set(ROOMS)) > 20
    upwards = []
    for at, room in enumerate(ROOMS):
        upwards += [f"{room} imports {each}" for each in sorted(imports(ROOT / f"{room}.py") & set(ROOMS[: at + 1]))]
    assert not upwards, "imports go downwards only: move the row, or the code"


def test_the_readmes_table_has_every_module() -> None:
    assert sorted(ROOMS) == sorted(MODULES)


def test_what_rooms_must_not_know() -> None:
    """SQL is the store's; formats and the ring know neither sockets nor databases."""
    assert {room for room in ROOMS if "sqlite3" in imports(ROOT / f"{room}.py")} == {"store", "database"}
    assert not imports(ROOT / "wire.py") & {*ROOMS, "socket", "threading"}
    assert imports(ROOT / "ringbuffer.py") & {*ROOMS, "socket"} == {"wire"}


DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def anchors(document: Path) -> set[str]:
    """What a link may name behind `#`: the headings, as code hosts do it."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_and_names_of_tests_in_the_documents_lead_somewhere(document: Path) -> None:
    text = document.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            there = document.parent / path if path else document
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target
    tests = {path.name: path.read_text() for path in (ROOT / "tests").glob("*.py")}
    for name in re.findall(r"`(test_\w+\.py)`", text):
        assert name in tests or "test_x.py" == name, name
    for name in re.findall(r"`(test_\w+)(?:\[.*?\])?`", text):
        assert any(f"def {name}(" in each for each in tests.values()), name
