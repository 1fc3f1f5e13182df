"""The documents of the project: their tables, and the words that a table has in backquotes."""

import re

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
