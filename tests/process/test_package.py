"""The package: what the sdist and the wheel have in them, and that what is installed from them works from anywhere."""

import email
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from support.harness import DEADLINE, ROOT, ServerProcess, program_files, rows

from ringolib import __version__

PAGE = (ROOT / "ringolib/web/dashboard.html").read_bytes()
NOT_SOURCE = (".*", "__pycache__", "*.egg-info", "build", "dist", "*.db*", "*.pyz")


def run(*command: object, cwd: Path) -> str:
    """What a command says that must end well."""
    words = list(map(str, command))
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=10 * DEADLINE)
    if "No matching distribution found for" in done.stderr:
        pytest.skip("pip cannot get what it needs: no package index")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def venv(directory: Path, *requirements: object) -> Path:
    """The `bin` of a new environment with these in it."""
    run(sys.executable, "-m", "venv", directory, cwd=directory.parent)
    pip = [directory / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, *requirements, cwd=directory.parent)
    return directory / "bin"


class Built(NamedTuple):
    """What was built from a copy of the checkout: where the copy is, the tools that built it, and the files made."""

    source: Path
    tools: Path
    sdist: Path
    wheel: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """An sdist of the checkout, and a wheel of that sdist, as `python -m build` makes them."""
    top = tmp_path_factory.mktemp("package")
    source = top / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    for name in (".ci", ".gitignore", ".dockerignore"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    (required,) = re.findall(r'^requires = \["(.*)"\]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    tools = venv(top / "tools", required)
    build = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
    python = [tools / "python", "-W", "error::DeprecationWarning", "-c", build]
    run(*python, "build_sdist", top, cwd=source)
    (sdist,) = top.glob("*.tar.gz")
    with tarfile.open(sdist) as packed:
        packed.extractall(top / "unpacked", filter="data")
    (unpacked,) = (top / "unpacked").iterdir()
    run(*python, "build_wheel", top, cwd=unpacked)
    (wheel,) = top.glob("*.whl")
    return Built(source, tools, sdist, wheel)


def works(program: Path, directory: Path) -> None:
    """A server of it has its page, stores what its `send` sends, and ends well."""
    assert run(program, "version", cwd=directory) == f"ringoexp {__version__}\n"
    running = ServerProcess(directory, "-p", "0", "-T", "0", program=[str(program)])
    try:
        assert running.get("/")[::2] == (200, PAGE)
        (directory / "numbers").write_text("1\n-2\n3\n")
        run(program, "send", "--url", running.url, "numbers", cwd=directory)
        assert running.stop() == 0
    finally:
        running.kill()
    assert [value for _, _, value in rows(directory / "ringoexp.db")] == [1, -2, 3]
    assert "Traceback" not in running.errors.read_text()


def test_the_sdist_has_all_that_is_in_the_repository(built: Built) -> None:
    with tarfile.open(built.sdist) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    needed = {
        "LICENSE",
        "README.md",
        "ringolib/web/dashboard.html",
        "tools/build_pyz.py",
        "bench/bench.py",
        "docs/metrics.md",
    }
    assert needed | {"tests/support/harness.py", "tests/conftest.py"} <= names
    if (ROOT / ".git").exists():
        kept = run("git", "ls-files", cwd=ROOT).splitlines()
        assert {name for name in kept if (ROOT / name).exists()} <= names


def test_tests_run_from_the_unpacked_sdist(built: Built) -> None:
    (unpacked,) = (built.sdist.parent / "unpacked").iterdir()
    tests = ["tests/unit/test_wire.py", "tests/unit/test_counters.py"]
    said = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=unpacked)
    assert " passed" in said


def test_the_wheel_has_the_modules_the_page_and_the_licence_and_nothing_else(built: Built) -> None:
    info = f"ringoexp-{__version__}.dist-info"
    with zipfile.ZipFile(built.wheel) as packed:
        names = set(packed.namelist())
        metadata = email.message_from_bytes(packed.read(f"{info}/METADATA"))
        assert packed.read("ringolib/web/dashboard.html") == PAGE
        assert packed.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    files = {str(path.relative_to(ROOT)) for path in program_files()}
    assert {name for name in names if not name.startswith(info)} == files | {"ringolib/web/dashboard.html"}
    tops = {name.partition("/")[0].removesuffix(".py") for name in names if not name.startswith(info)}
    assert tops == {"ringoexp", "wsserver", "ringbuffer", "store", "ringolib"}
    assert built.wheel.name == f"ringoexp-{__version__}-py3-none-any.whl"
    assert (metadata["Name"], metadata["Version"], metadata["Requires-Python"]) == ("ringoexp", __version__, ">=3.10")
    assert metadata["Summary"] and metadata["License-Expression"] == "MIT"
    assert metadata["Description-Content-Type"] == "text/markdown" and "# Ringo Exp" in metadata.get_payload()
    assert "Programming Language :: Python :: 3.13" in metadata.get_all("Classifier", [])
    needs = [need for need in metadata.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert [re.split(r"[<>=]", need)[0] for need in needs] == ["simple-websocket"]


def test_installed_into_a_venv_of_its_own_it_runs_from_anywhere(built: Built, tmp_path: Path) -> None:
    """As pipx does it: an environment for this program alone, and a link to its script on the PATH."""
    program = venv(tmp_path / "venv", built.wheel) / "ringoexp"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ringoexp").symlink_to(program)
    (tmp_path / "work").mkdir()
    works(tmp_path / "bin" / "ringoexp", tmp_path / "work")
    assert not {"setup.py", "build_pyz.py", "harness.py"} & {path.name for path in (tmp_path / "venv").rglob("*.py")}


def test_an_editable_install_runs_what_is_in_the_checkout(built: Built, tmp_path: Path) -> None:
    pip = [built.tools / "pip", "install", "--quiet", "--disable-pip-version-check", "--no-build-isolation"]
    run(*pip, "--editable", built.source, cwd=tmp_path)
    works(built.tools / "ringoexp", tmp_path)
    code = "from ringolib.web import page; print(page.__file__)"
    assert run(built.tools / "python", "-c", code, cwd=tmp_path) == f"{built.source}/ringolib/web/page.py\n"
