"""A current ClickHouse engine, chdb's, behind as much of ClickHouse's HTTP as the store and the tests use. A program:
`newhouse.py DIRECTORY PORT`. One query at a time.

What it shows is how the engine takes our SQL, our settings and our rows, not how its own HTTP server behaves.
"""

import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from chdb.session import Session

lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(200, b"Ok.\n")

    def do_POST(self) -> None:
        asked = dict(parse_qsl(urlsplit(self.path).query, keep_blank_values=True))
        body = self.rfile.read(int(self.headers["Content-Length"]))
        sql = asked.pop("query", "")
        data = body if sql else b""
        sql = sql or body.decode()
        database = asked.pop("database", "default")
        asked.pop("wait_end_of_query", None)
        with lock:
            try:
                session.query(f"USE `{database}`")
                for name, value in asked.items():
                    session.query(f"SET {name} = '{value}'")
                if sql.startswith("INSERT") and sql.endswith(" FORMAT RowBinary"):
                    rows.write_bytes(data)
                    session.query(f"{sql[: -len(' FORMAT RowBinary')]} FROM INFILE '{rows}' FORMAT RowBinary")
                    said = b""
                else:
                    said = session.query(sql, "TabSeparated").bytes()
                self._answer(200, said)
            except Exception as error:
                code = re.findall(r"Code: (\d+)", str(error))
                self._answer(500, str(error).encode(), code[:1])

    def _answer(self, status: int, said: bytes, code: list[str] = []) -> None:  # noqa: B006
        self.send_response(status)
        for each in code:
            self.send_header("X-ClickHouse-Exception-Code", each)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *unused: object) -> None:
        pass


directory = Path(sys.argv[1])
rows = directory / "rows"
session = Session(str(directory / "data"))
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
