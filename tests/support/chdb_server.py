"""A current ClickHouse engine, chdb, behind the part of ClickHouse's HTTP interface that the store and the tests use.

A program: `chdb_server.py DIRECTORY PORT`. It executes one query at a time. It shows how the engine handles our SQL,
settings and rows, and not how ClickHouse's own HTTP server behaves.
"""

import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

INSERT_SUFFIX = " FORMAT RowBinary"


class Engine:
    """A chdb session with its files in `directory`."""

    def __init__(self, directory: Path) -> None:
        from chdb.session import Session

        self._session: Any = Session(str(directory / "data"))
        self._rows = directory / "rows"
        self._lock = threading.Lock()

    def execute(self, sql: str, data: bytes, database: str, settings: dict[str, str]) -> bytes:
        """Return the response body of a statement. Raises what chdb raises."""
        with self._lock:
            self._session.query(f"USE `{database}`")
            for name, value in settings.items():
                self._session.query(f"SET {name} = '{value}'")
            if sql.startswith("INSERT") and sql.endswith(INSERT_SUFFIX):
                self._rows.write_bytes(data)
                insert = sql.removesuffix(INSERT_SUFFIX)
                self._session.query(f"{insert} FROM INFILE '{self._rows}'{INSERT_SUFFIX}")
                return b""
            result: bytes = self._session.query(sql, "TabSeparated").bytes()
            return result


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    engine: Engine

    def do_GET(self) -> None:
        self._respond(200, b"Ok.\n")

    def do_POST(self) -> None:
        parameters = dict(parse_qsl(urlsplit(self.path).query, keep_blank_values=True))
        body = self.rfile.read(int(self.headers["Content-Length"]))
        sql = parameters.pop("query", "")
        sql, data = (sql, body) if sql else (body.decode(), b"")
        database = parameters.pop("database", "default")
        parameters.pop("wait_end_of_query", None)
        try:
            self._respond(200, self.engine.execute(sql, data, database, parameters))
        except Exception as error:
            code = re.search(r"Code: (\d+)", str(error))
            self._respond(500, str(error).encode(), code[1] if code else None)

    def _respond(self, status: int, content: bytes, exception_code: str | None = None) -> None:
        self.send_response(status)
        if exception_code:
            self.send_header("X-ClickHouse-Exception-Code", exception_code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *unused: object) -> None:
        pass


if __name__ == "__main__":
    Handler.engine = Engine(Path(sys.argv[1]))
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
