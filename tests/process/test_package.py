"""The package: the contents of the sdist and the wheel, and programs installed from them."""

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

pytestmark = pytest.mark.slow  # builds, virtual environments and other Pythons

PAGE = (ROOT / "ringolib/web/dashboard.html").read_bytes()
NOT_SOURCE = (".*", "__pycache__", "*.egg-info", "build", "dist", "*.db*", "*.pyz")


def run(*command: object, cwd: Path) -> str:
    """Return the output of a command, which must succeed."""
    words = list(map(str, command))
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=10 * DEADLINE)
    if "No matching distribution found for" in done.stderr:
        pytest.skip("pip cannot reach a package index")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def venv(directory: Path, *requirements: object) -> Path:
    """Create an environment with these packages and return its `bin` directory."""
    run(sys.executable, "-m", "venv", directory, cwd=directory.parent)
    pip = [directory / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, *requirements, cwd=directory.parent)
    return directory / "bin"


class Built(NamedTuple):
    """A copy of the checkout, the tools that built from it, and the files that they built."""

    source: Path
    tools: Path
    sdist: Path
    wheel: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Build an sdist of the checkout and a wheel of that sdist, as `python -m build` does."""
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


def check_works(program: Path, directory: Path) -> None:
    """Check that the program serves its page, stores the records of its `send`, and stops in order."""
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


@pytest.mark.slow
def test_sdist_has_all_files_of_the_repository(built: Built) -> None:
    with tarfile.open(built.sdist) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    required = {
        "LICENSE",
        "README.md",
        "ringolib/web/dashboard.html",
        "tools/build_pyz.py",
        "bench/bench.py",
        "docs/metrics.md",
    }
    assert required | {"tests/support/harness.py", "tests/conftest.py"} <= names
    if (ROOT / ".git").exists():
        tracked = run("git", "ls-files", cwd=ROOT).splitlines()
        assert {name for name in tracked if (ROOT / name).exists()} <= names


def test_tests_run_from_the_unpacked_sdist(built: Built) -> None:
    (unpacked,) = (built.sdist.parent / "unpacked").iterdir()
    tests = ["tests/unit/test_wire.py", "tests/unit/test_counters.py"]
    output = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=unpacked)
    assert " passed" in output


def test_wheel_has_only_modules_page_and_licence(built: Built) -> None:
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
    requirements = [text for text in metadata.get_all("Requires-Dist", []) if "extra ==" not in text]
    assert [re.split(r"[<>=]", text)[0] for text in requirements] == ["simple-websocket"]


@pytest.mark.slow
def test_installed_program_runs_from_any_directory(built: Built, tmp_path: Path) -> None:
    """As pipx installs it: an environment for this program alone, and a link to its script on the PATH."""
    program = venv(tmp_path / "venv", built.wheel) / "ringoexp"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ringoexp").symlink_to(program)
    (tmp_path / "work").mkdir()
    check_works(tmp_path / "bin" / "ringoexp", tmp_path / "work")
    assert not {"setup.py", "build_pyz.py", "harness.py"} & {path.name for path in (tmp_path / "venv").rglob("*.py")}


@pytest.mark.slow
def test_editable_install_runs_the_checkout(built: Built, tmp_path: Path) -> None:
    pip = [built.tools / "pip", "install", "--quiet", "--disable-pip-version-check", "--no-build-isolation"]
    run(*pip, "--editable", built.source, cwd=tmp_path)
    check_works(built.tools / "ringoexp", tmp_path)
    code = "from ringolib.web import page; print(page.__file__)"
    assert run(built.tools / "python", "-c", code, cwd=tmp_path) == f"{built.source}/ringolib/web/page.py\n"
