"""The documents of the project: their tables, and the words that a table has in backquotes."""

import re
from typing import NamedTuple

from support.harness import ROOT

README = "README.md"
DOCUMENTS = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
"""The paths of all documents from the root."""


def read(document: str) -> str:
    """Return the text of a document. The path is from the root."""
    return (ROOT / document).read_text()


def tables(document: str, *header: str) -> list[list[list[str]]]:
    """Return the rows of each table whose first columns have this header. Fail if there is no such table."""
    start = re.escape("| " + " | ".join(header) + " |")
    found = re.findall(rf"^{start}.*\n\|[-|]+\|\n((?:\|.*\n?)+)", read(document), re.MULTILINE)
    assert found, f"{document} has no table {header}"
    return [[_cells(line) for line in rows.splitlines()] for rows in found]


def table(document: str, *header: str) -> list[list[str]]:
    """Return the rows of the only table whose first columns have this header."""
    (rows,) = tables(document, *header)
    return rows


def words(cells: list[str]) -> list[str]:
    """Return the words in backquotes in these cells, in their order."""
    return [word for cell in cells for word in re.findall(r"`([^`]+)`", cell)]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


class Block(NamedTuple):
    """A code block: the invisible comment before it, or "", its language, its text, and its line in the document."""

    marker: str
    language: str
    text: str
    line: int


def blocks(document: str) -> list[Block]:
    """Return the code blocks of a document, in their order."""
    text = read(document)
    fences = re.finditer(r"(?:^<!-- (.*?) -->\n)?^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(m[1] or "", m[2], m[3], text.count("\n", 0, m.start(2)) + 1) for m in fences]
