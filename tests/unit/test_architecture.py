"""The import rules of the architecture, and that links in the documents lead somewhere."""

import ast
import re
from pathlib import Path

import pytest
from support.harness import ROOT, program_files

LAYERS = (
    ("ringolib", "ringolib.wire", "ringolib.timing", "ringolib.counters"),
    ("ringolib.net",),
    ("ringbuffer", "ringolib.storage", "store"),
    ("ringolib.options",),
    ("ringolib.forward", "ringolib.client"),
    ("ringolib.web",),
    ("ringolib.status",),
    ("wsserver",),
    ("ringolib.app",),
    ("ringoexp",),
)
"""Each layer may import the layers above it in this table, and its own modules; never a layer below it."""
FORBIDDEN = {
    "ringolib.net": {"ringolib.wire", "ringolib.counters", "ringolib.storage"},
    "ringbuffer": {"ringolib.net", "ringolib.storage", "store", "socket", "sqlite3"},
    "store": {"ringolib.net", "ringolib.storage.clickhouse"},
    "ringolib.storage": {"ringbuffer", "store"},
    "ringolib.client": {"ringolib.forward"},
    "ringolib.forward": {"ringolib.client"},
    "ringolib.web": {"ringolib.forward", "ringolib.client", "ringolib.storage.clickhouse", "store", "sqlite3"},
}
"""Imports that the table of layers would allow, and the design does not."""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """The modules that a file imports, in full, wherever in the file the import is."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in modules if name in MODULES} or {node.module}
    return found


MODULES = {module_name(path): path for path in program_files()}


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def layer(name: str) -> int:
    """The layer of a module: that of the longest entry it is within."""
    entries = [(len(entry), at) for at, layer in enumerate(LAYERS) for entry in layer if is_within(name, entry)]
    return max(entries)[1]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_module_imports_only_layers_above_it(name: str) -> None:
    for imported in imports(MODULES[name]):
        if imported in MODULES and imported != "ringolib":
            assert layer(imported) <= layer(name), f"{name} imports {imported}"
        for entry, forbidden in FORBIDDEN.items():
            if is_within(name, entry):
                assert not any(is_within(imported, other) for other in forbidden), f"{name} imports {imported}"


def test_lowest_layer_needs_the_standard_library_only() -> None:
    for name in ("ringolib.wire", "ringolib.timing", "ringolib.counters"):
        assert not [imported for imported in imports(MODULES[name]) if imported.startswith(("ringolib.", "wsproto"))]


def test_only_stores_know_sql() -> None:
    users = {name for name, path in MODULES.items() if "sqlite3" in imports(path)}
    assert users <= {"store", "ringolib.storage.sqlite_file", "ringolib.storage.oldest"} and "store" in users


def test_packages_do_not_use_private_names_of_others() -> None:
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(("ringolib", "store")):
                private = [alias.name for alias in node.names if alias.name.startswith("_") and alias.name[1] != "_"]
                same = name.rpartition(".")[0] == node.module.rpartition(".")[0]
                assert not private or same, f"{name} imports {private} from {node.module}"


def test_every_module_says_its_job_in_one_sentence() -> None:
    for name, path in MODULES.items():
        first = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
        assert first and not first.startswith("TODO"), name
        assert first.endswith((".", ":")), f"{name}: the first line of the docstring is one sentence"


DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def anchors(document: Path) -> set[str]:
    """What a link may name behind `#`: the headings, as code hosts do it."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_and_test_names_in_documents_exist(document: Path) -> None:
    text = document.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            linked = document.parent / path if path else document
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target
    tests = {path.name: path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    for name in re.findall(r"`(test_\w+\.py)`", text):
        assert name in tests or name == "test_x.py", name
    for name in re.findall(r"`(test_\w+)(?:\[.*?\])?`", text):
        assert any(f"def {name}(" in source for source in tests.values()), name
