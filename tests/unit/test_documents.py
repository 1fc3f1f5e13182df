"""The documents are complete: all options, defaults, stats, events, codes and statuses, and none that does not exist.

Each test compares in both directions: the program has what a document lists, and a document lists what the program has.
`test_numbers.py` does the same for the metrics, `test_protocol.py` for the codes and the test vectors.
"""

import argparse
import ast
import re
import sqlite3
import uuid
from array import array
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.documents import DOCUMENTS, README, blocks, read, table, tables, words
from support.harness import ROOT, program_files
from wsproto.frame_protocol import CloseReason

from ringbuffer import RingLayout
from ringolib.client import read as read_records
from ringolib.client import send
from ringolib.options import OPTIONS
from ringolib.status.numbers import MEMORY_STATS, STATS
from ringolib.wire import Run
from store import Store

NOT_OF_SERVERS = {1000, 1005, 1006, 1008, 425, 429}
"""Codes and statuses that no server sends as a refusal: of clients, of the network, of proxies, or reserved."""


def camel_case(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(map(str.capitalize, others))


def constants(path: Path, *callables: str) -> set[object]:
    """Return the first arguments of the calls of these functions in a file that are constants."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call) and node.args]
    firsts = [call.args[0] for call in calls if ast.unparse(call.func).rpartition(".")[2] in callables]
    return {first.value for first in firsts if isinstance(first, ast.Constant)}


# Options.


def test_options_page_lists_each_option_with_its_default() -> None:
    documented = [
        ("".join(words([short])).lstrip("-"), "".join(words([long])).removeprefix("--"), default)
        for short, long, default, *_ in table("docs/options.md", "short", "long", "default")
    ]
    unset = {"name": "empty", "debug": "off"} | {option.long: "off" for option in OPTIONS if not_set(option.default)}
    expected = [
        (option.short, option.long, unset.get(option.long, f"`{str(option.default).lower()}`")) for option in OPTIONS
    ]
    assert documented == [*expected, ("h", "help", ""), ("V", "version", "")]


def not_set(default: object) -> bool:
    return default is None or default == ()


@pytest.mark.parametrize(("command", "page", "header"), [(send, "sending", "flag"), (read_records, "http", "option")])
def test_page_lists_each_flag_of_command_with_its_default(command: Any, page: str, header: str) -> None:
    documented = {}
    for flags, defaults, *_ in table(f"docs/{page}.md", header, "default"):
        names = words([flags])
        for name, default in zip(names, defaults.split(", ") * len(names), strict=False):
            documented[name] = default
    expected = {}
    for action in command.make_parser()._actions:
        name = max(action.option_strings, key=len, default="").replace("-", "_").replace("__", "--", 1)
        if name and not isinstance(action, argparse._HelpAction):
            expected[name] = action.default
    assert set(documented) == set(expected)
    for name, default in expected.items():
        if default not in (None, False):
            assert documented[name] == f"`{default}`", name


def test_variables_of_the_environment_are_documented() -> None:
    used = {name for path in program_files() for name in re.findall(r'"(RINGOEXP_[A-Z_]+[A-Z])"', path.read_text())}
    documents = "".join(map(read, DOCUMENTS))
    assert used and [name for name in used if f"`{name}`" not in documents and f"{name}=" not in documents] == []


# Statistics.


def test_http_page_lists_exactly_the_keys_of_the_stats() -> None:
    info, stats, ring, memory = [
        sorted(words([row[0] for row in rows])) for rows in tables("docs/http.md", "key", "meaning")
    ]
    assert info == sorted(["version", "uuid", *(camel_case(option.long) for option in OPTIONS)])
    assert stats == sorted(number.key for number in STATS if number.key)
    assert ring == sorted(map(camel_case, RingLayout._fields))
    assert memory == sorted(number.key for number in MEMORY_STATS if number.key)


def test_http_page_lists_exactly_the_codes_of_not_ready() -> None:
    used = set()
    for path in program_files():
        used |= constants(path, "Reason")
        used |= set(re.findall(r'^[A-Z_]+ = "([a-z]+_full)"', path.read_text(), re.MULTILINE))
    used |= {"consumer_not_ready", "disk_full", "failed"}  # of calls whose first argument is a variable
    documented = words([row[0] for row in table("docs/http.md", "code", "meaning")])
    assert sorted(documented) == sorted(map(str, used))
    section = read("docs/protocol.md").partition("## Ready, for load balancers")[2].partition("\n## ")[0]
    assert used - {"failed"} <= set(re.findall(r"`([a-z_]+)`", section))


# Log events.


def test_operations_page_lists_exactly_the_events_without_debug() -> None:
    used: dict[str, str] = {}
    for path in program_files():
        source = path.read_text()
        names = re.findall(r'\blog\.(?:info|warning|error|critical)\(\s*"([a-z_]+)"', source)
        names += re.findall(r'\blog_unexpected\(\s*\w+,\s*"([a-z_]+)"', source)
        used |= dict.fromkeys(names, path.name)
    documented = words([row[0] for row in table("docs/operations.md", "event", "meaning")])
    assert [name for name in used if name not in documented] == []
    sources = "".join(path.read_text() for path in program_files())
    assert [name for name in documented if f'"{name}"' not in sources] == []


# Close codes and statuses.


def test_close_codes_in_the_source_are_documented() -> None:
    used = {1002, 1007}  # the code that wsproto chooses, and the default of WireError
    for path in [*(ROOT / "ringolib" / "net").glob("*.py"), *(ROOT / "ringolib" / "web").glob("*.py")]:
        source = path.read_text()
        used |= {CloseReason[name].value for name in re.findall(r"CloseReason\.([A-Z_]+)", source)}
        used |= {int(code) for code in re.findall(r"\b10(?:0[0-9]|1[0-5])\b", source)}
    causes = [row[0] for row in table("docs/protocol.md", "code", "cause")]
    documented = {int(code) for cause in causes for code in re.findall(r"\d+", cause)}
    assert used - NOT_OF_SERVERS == documented - NOT_OF_SERVERS
    refused = [row[1] for row in table("docs/http.md", "refused input")]
    assert {int(code) for cell in refused for code in re.findall(r"\b10\d\d\b", cell)} == used - NOT_OF_SERVERS


def test_statuses_in_the_source_are_documented() -> None:
    used = {101, 431, 501, 508}  # of wsproto, h11, and a name
    for path in program_files():
        if path.name != "profiler.py":  # it has a port of its own
            used |= {int(str(status)) for status in constants(path, "Refusal", "reply", "reply_json")}
    causes = [row[0] for row in table("docs/protocol.md", "status", "cause")]
    documented = {int(status) for cause in causes for status in re.findall(r"\d{3}", cause)}
    assert used == documented - NOT_OF_SERVERS


# Links, names and lines.


def prose(document: str) -> str:
    """Return the text of a document without its code blocks."""
    return re.sub(r"^```.*?^```$", "", read(document), flags=re.MULTILINE | re.DOTALL)


def anchors(document: Path) -> set[str]:
    """Return the names that a link may have after `#`: the headings, in the form that code hosts give them."""
    headings = re.findall(r"^#+ (.*)$", prose(str(document.relative_to(ROOT))), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_test_names_in_documents_exist(document: str) -> None:
    text = prose(document)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
    for target in targets:
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            linked = (ROOT / document).parent / path if path else ROOT / document
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked.resolve()), target
    tests = {path.name: path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    for name in re.findall(r"`(test_\w+\.py)`", text):
        assert name in tests or name == "test_x.py", name
    for name in re.findall(r"`(test_\w+)(?:\[.*?\])?`", text):
        assert any(f"def {name}(" in source for source in tests.values()), name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_in_documents_exist(document: str) -> None:
    """A path in backquotes is from the root."""
    top = "bench|deploy|docs|ringolib|tests|tools|\\.ci"
    paths = re.findall(rf"`((?:{top})/[\w./-]+)[`\s:]", prose(document))
    assert [path for path in paths if not (ROOT / path).exists()] == []


# Form.


def test_readme_is_short() -> None:
    lines = read(README).splitlines()
    assert len(lines) <= 250
    assert [line for line in lines if len(line) > 100] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_lines_have_at_most_100_columns(document: str) -> None:
    """Except for rows of tables and code, which cannot be wrapped."""
    assert [line for line in prose(document).splitlines() if len(line) > 100 and not line.startswith("|")] == []


def test_index_lists_every_page_and_each_says_for_whom_it_is() -> None:
    pages = [document.removeprefix("docs/") for document in DOCUMENTS if document.startswith("docs/")]
    pages.remove("README.md")
    listed = re.findall(r"^\| \[(\S+)\]\(\1\) \|", read("docs/README.md"), re.MULTILINE)
    assert sorted(listed) == pages
    assert [page for page in pages if "\n\nThis page is " not in read(f"docs/{page}")[:200]] == []


def test_queries_of_the_database_page_use_the_indexes(tmp_path: Path) -> None:
    source = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff").bytes
    with closing(Store(str(tmp_path / "ringoexp.db"))) as store:
        for first in (0, 5, 20):
            store.append([Run(source, first, 5), Run(uuid.uuid4().bytes, first, 5)], array("q", range(10)))
    queries = [block.text for block in blocks("docs/database.md") if block.language == "sql"]
    with closing(sqlite3.connect(tmp_path / "ringoexp.db")) as database:
        for query in queries:
            if "ATTACH" not in query:  # of another program
                plan = [row[3] for row in database.execute(f"EXPLAIN QUERY PLAN {query}")]
                assert not any(re.match("SCAN (record|batch|source)", step) for step in plan), (query, plan)
                query = query.replace("id > 1000", "id > 10")
                assert database.execute(query).fetchall(), query
    assert len(queries) > 10
