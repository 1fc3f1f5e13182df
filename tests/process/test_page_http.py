"""How the live page is served: its headers, its policy, and every way to install the program."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipapp
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.harness import ROOT, RawClient, ServerProcess, request, server, started_port

from ringolib.web import page

OCTETS = {"Content-Type": "application/octet-stream"}
PAGE = (ROOT / "ringolib/web/dashboard.html").read_text()


@pytest.fixture(scope="module")
def publisher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with server(tmp_path_factory.mktemp("page"), "-p", "0", "-T", "0", "-N", "Ringo the 1st") as process:
        yield process


def test_page_has_strict_headers(publisher: ServerProcess) -> None:
    status, headers, body = publisher.get("/", Accept="text/html,application/xhtml+xml,*/*;q=0.8")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-cache"
    assert headers["Server"] == "Ringo the 1st"
    assert body.decode() == PAGE


def test_policy_allows_only_the_pages_own_blocks(publisher: ServerProcess) -> None:
    policy = publisher.get("/")[1]["Content-Security-Policy"]
    directives = dict(part.split(" ", 1) for part in policy.split("; "))
    hashes = {}
    for tag in "script", "style":
        (block,) = re.findall(f"<{tag}[^>]*>(.*?)</{tag}>", PAGE, re.DOTALL)
        hashes[tag] = f"'sha256-{base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()}'"
    assert directives == {
        "default-src": "'none'",
        "script-src": hashes["script"],
        "style-src": hashes["style"],
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }


def test_page_is_one_file_without_inline_attributes() -> None:
    addresses = re.findall(r"\b(?:https?|wss?)://[^\s'\"`<>]*", PAGE)
    assert set(addresses) == {"http://www.w3.org/2000/svg"}, "an XML namespace, not an address"
    assert set(re.findall(r"\s(?:src|href|action|data)=\"([^#\"][^\"]*)\"", PAGE)) <= {
        "v1.0/stats",
        "v1.0/ready",
        "metrics",
        *re.findall(r'href="(data:image/svg\+xml,[^"]*)"', PAGE),
    }
    markup = re.sub(r"<(script|style)>.*?</\1>", "", PAGE, flags=re.DOTALL)
    assert not re.search(r"\s(on\w+|style)\s*=", markup)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", PAGE)


def test_cached_page_is_answered_304(publisher: ServerProcess) -> None:
    etag = publisher.get("/")[1]["ETag"]
    status, headers, body = publisher.get("/", **{"If-None-Match": f'"other", W/{etag}'})
    assert (status, headers["ETag"], body) == (304, etag, b"")
    assert publisher.get("/", **{"If-None-Match": '"other"'})[0] == 200


def test_stats_have_the_most_slots_used_since_a_look(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0") as process:

        def look(query: str = "") -> tuple[int, int]:
            ring = json.loads(process.get(f"/v1.0/stats{query}")[2])["ring"]
            return ring["cursor"], ring["highest"]

        def store(count: int) -> None:
            assert request(process.port, "POST", "/v1.0/ingest", bytes(8 * count), OCTETS)[0] == 200

        store(700)
        cursor, highest = look()
        assert (cursor, highest) == (700, 700)
        store(300)
        assert look(f"?since={cursor}") == look(f"?since={cursor}") == (1000, 300), "for each page that asks"
        assert look("?since=1000") == (1000, 0)
        assert look() == look("?since=") == look("?since=99999") == (1000, 700), "since the start"
        for wrong in ("x", "-1", "1.5", "9" * 20):
            status, _, body = process.get(f"/v1.0/stats?since={wrong}")
            assert status == 400 and "since must be" in json.loads(body)["error"]


def test_page_answers_head_and_refuses_post(publisher: ServerProcess) -> None:
    status, headers, body = request(publisher.port, "HEAD", "/?now")
    assert (status, body) == (200, b"") and headers["Content-Length"] == str(len(PAGE.encode()))
    status, headers, body = request(publisher.port, "POST", "/", b"")
    assert (status, headers["Allow"]) == (405, "GET, HEAD") and "error" in json.loads(body)


def test_page_is_served_beyond_the_connection_limit(tmp_path: Path) -> None:
    with server(tmp_path, "-p", "0", "-T", "0", "-n", "1") as full, RawClient(full.port):
        assert full.get("/v1.0/ingest")[0] == 503
        assert full.get("/")[0] == 200


def assert_serves_the_page(directory: Path, *command: str, env: dict[str, str] | None = None) -> None:
    with open(directory / "log", "wb") as log:
        process = subprocess.Popen(
            [*command, "-p", "0", "-T", "0"], cwd=directory, env={**os.environ, **(env or {})}, stderr=log
        )
    try:
        port = started_port(directory / "log", process)
        assert request(port, "GET", "/")[::2] == (200, PAGE.encode())
    finally:
        process.kill()
        process.wait()


def copy_program(directory: Path, *more: str) -> Path:
    """Copy the program without its tests, and more files of the project, to a new directory."""
    directory.mkdir()
    for path in [*ROOT.glob("*.py"), *(ROOT / name for name in more)]:
        shutil.copy(path, directory)
    shutil.copytree(ROOT / "ringolib", directory / "ringolib", ignore=shutil.ignore_patterns("__pycache__"))
    return directory


def test_zipapp_serves_the_page(tmp_path: Path) -> None:
    source = copy_program(tmp_path / "source")
    (source / "__main__.py").write_text("import sys\nimport ringoexp\nsys.exit(ringoexp.main())\n")
    zipapp.create_archive(source, tmp_path / "ringoexp.pyz")
    shutil.rmtree(source)
    assert_serves_the_page(tmp_path, sys.executable, "ringoexp.pyz")


@pytest.mark.slow
def test_installed_package_serves_the_page(tmp_path: Path) -> None:
    source = copy_program(tmp_path / "source", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-compile",
        "--disable-pip-version-check",
    ]
    pip += ["--target", str(tmp_path / "installed")]
    done = subprocess.run([*pip, str(source)], capture_output=True, text=True)
    if "No matching distribution found for setuptools" in done.stderr:
        pytest.skip("pip cannot get setuptools: no package index")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(source)
    env = {"PYTHONPATH": str(tmp_path / "installed")}
    assert_serves_the_page(tmp_path, sys.executable, "-m", "ringoexp", env=env)


def test_missing_page_file_is_logged_and_answered_404(tmp_path: Path) -> None:
    (copy_program(tmp_path / "source") / "ringolib/web/dashboard.html").unlink()
    script = str(tmp_path / "source" / "ringoexp.py")
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen([sys.executable, script, "-p", "0", "-T", "0"], cwd=tmp_path, stderr=log)
    try:
        port = started_port(tmp_path / "log", process)
        status, _, body = request(port, "GET", "/")
        assert status == 404 and "dashboard.html" in json.loads(body)["error"]
        assert request(port, "GET", "/v1.0/stats")[0] == 200
    finally:
        process.kill()
        process.wait()
    errors = (tmp_path / "log").read_text()
    assert "dashboard_missing" in errors and "Traceback" not in errors


def test_unreadable_page_is_read_again_next_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The server may be out of file descriptors for a while."""
    page._read.cache_clear()

    def no_descriptor(*unused: object) -> bytes:
        raise OSError("Too many open files")

    with monkeypatch.context() as short:
        short.setattr(page.pkgutil, "get_data", no_descriptor)
        assert page.load_page() is None
    assert [record.msg for record in caplog.records] == ["dashboard_missing"]
    loaded = page.load_page()
    assert loaded and b"<h1" in loaded.content
