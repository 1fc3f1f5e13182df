"""The import rules of the architecture."""

import ast
import re
import sys
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
    ("ringolib.open_files", "ringolib.app"),
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
    """Return the layer of a module: the layer of the longest entry that it is within."""
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
        tops = {imported.partition(".")[0] for imported in imports(MODULES[name])}
        assert tops <= sys.stdlib_module_names, name
    assert not imports(MODULES["ringolib.wire"]) & {"socket", "threading"}, "message formats do no I/O"


def test_patched_constants_are_read_from_their_module() -> None:
    """A constant that was imported by value would keep its value when a test patches its module."""
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    patched = set(re.findall(r"\b((?:[a-z_]+\.)+)([A-Z][A-Z_]+) = ", tests))
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = node.module.removeprefix("ringolib.") + "."
                values = [alias.name for alias in node.names if (module, alias.name) in patched]
                if (name, values) == ("ringolib.forward.spool", ["LARGE_WAL_BYTES"]):
                    continue  # another constant follows from it
                assert not values, f"{name} imports {values} from {node.module}: read it from the module"


def test_only_stores_know_sql() -> None:
    users = {name for name, path in MODULES.items() if "sqlite3" in imports(path)}
    storage = {f"ringolib.storage.{module}" for module in ("sqlite_file", "remedies", "oldest", "reading", "wal")}
    assert users <= storage | {"store"} and "store" in users


def test_packages_do_not_use_private_names_of_others() -> None:
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text())
        modules = set()  # names of this module for other modules of the program
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules |= {alias.asname or alias.name for alias in node.names if alias.name in MODULES}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported = [alias for alias in node.names if f"{node.module}.{alias.name}" in MODULES]
                modules |= {alias.asname or alias.name for alias in imported}
                private = [alias.name for alias in node.names if re.match("_[^_]", alias.name)]
                same = name.rpartition(".")[0] == node.module.rpartition(".")[0]
                assert not private or same or "ringolib" not in node.module, f"{name} imports {private}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                assert not re.match("_[^_]", node.attr), f"{name} uses {ast.unparse(node)}"


def test_every_module_says_its_job_in_one_sentence() -> None:
    for name, path in MODULES.items():
        first = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
        assert first and not first.startswith("TODO"), name
        assert first.endswith((".", ":")), f"{name}: the first line of the docstring is one sentence"
