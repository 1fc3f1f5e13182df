"""What is in deploy/ and the Dockerfile says nothing that the program does not do: flags, paths, users, times."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.contained import entry_point, health_check, instructions
from support.harness import DEADLINE, ROOT, free_port, server

import ringoexp
from ringolib import app as assembly
from ringolib.options import Settings, read_arguments
from wsserver import Handler

DEPLOY = ROOT / "deploy"
ROLES = ("publisher", "consumer")
STOP_SECONDS = assembly.DRAIN_SECONDS + ringoexp.GIVE_UP_SECONDS


def unit(role: str) -> dict[str, list[str]]:
    """A unit's settings, each with all its values."""
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / f"ringoexp-{role}.service").read_text().splitlines():
        if line and line[0] not in "#[":
            name, value = line.split("=", 1)
            found.setdefault(name, []).append(value)
    return found


def manifests() -> list[dict[str, Any]]:
    """What the example for Kubernetes has in it."""
    yaml = pytest.importorskip("yaml")
    return list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))


def pods() -> dict[str, dict[str, Any]]:
    """The specification of each role's pod."""
    found = [each["spec"]["template"] for each in manifests() if "template" in each["spec"]]
    return {each["metadata"]["labels"]["role"]: each["spec"] for each in found}


def settings(arguments: list[str]) -> Settings:
    """What these flags are to the program. Fails if it does not take them."""
    return read_arguments(arguments)


# systemd.


@pytest.mark.parametrize("role", ROLES)
def test_a_units_flags_are_ours_and_it_writes_where_it_may(role: str) -> None:
    command = shlex.split(unit(role)["ExecStart"][0].replace("%S", "/var/lib"))
    assert command[:5] == ["/usr/bin/python3", "-I", "-X", "faulthandler", "/opt/ringoexp/ringoexp.pyz"]
    assert command[-2:] == ["$FLAGS", "$SECRETS"]
    read = settings(command[5:-2])
    assert read.is_publisher is (role == "publisher")
    path = read.spool if read.is_publisher else read.database
    assert path and path.startswith(f"/var/lib/{unit(role)['StateDirectory'][0]}/")
    consumer = settings(shlex.split(unit("consumer")["ExecStart"][0])[5:-2])
    assert read.consumer_port == consumer.port or not read.is_publisher


@pytest.mark.parametrize("role", ROLES)
def test_systemd_waits_longer_for_the_end_than_the_server_takes(role: str) -> None:
    assert int(unit(role)["TimeoutStopSec"][0]) >= STOP_SECONDS + 5
    assert unit(role)["RestartPreventExitStatus"] == ["2"] and "SuccessExitStatus" not in unit(role)


def analyze(*arguments: str) -> str:
    """What systemd-analyze says of it; fails if it says no."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("takes systemd-analyze")
    done = subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("role", ROLES)
def test_units_are_valid_and_their_exposure_is_below_3(role: str) -> None:
    path = str(DEPLOY / f"ringoexp-{role}.service")
    assert analyze("verify", path) == ""
    analyze("security", "--offline=true", "--threshold=30", "--no-pager", path)


# Kubernetes.


def test_manifests_are_what_kubernetes_takes() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for each in manifests():
        kubernetes_validate.validate(each, "1.29", strict=True)


@pytest.mark.parametrize("role", ROLES)
def test_a_pods_flags_are_ours_and_its_probes_ask_what_there_is(role: str) -> None:
    (container,) = pods()[role]["containers"]
    read = settings([*entry_point()[1:], *container["args"]])
    assert read.is_publisher is (role == "publisher")
    assert container["ports"] == [{"name": "http", "containerPort": read.port}]
    (service,) = [
        each for each in manifests() if each["kind"] == "Service" and each["spec"]["selector"]["role"] == role
    ]
    assert service["spec"]["ports"] == [{"name": "http", "port": read.port, "targetPort": "http"}]
    if read.is_publisher:
        consumer = settings([*entry_point()[1:], *pods()["consumer"]["containers"][0]["args"]])
        assert (read.consumer_hostname, read.consumer_port) == ("ringoexp-consumer", consumer.port)
    paths = Handler.__new__(Handler).routes()
    for probe, path in ("startup", "alive"), ("liveness", "alive"), ("readiness", "ready"):
        asked = container[f"{probe}Probe"]
        assert asked["httpGet"] == {"path": f"/v1.0/{path}", "port": "http"} and asked["timeoutSeconds"] == 5
        assert asked["httpGet"]["path"] in paths


@pytest.mark.parametrize("role", ROLES)
def test_kubernetes_waits_longer_for_the_end_than_the_server_takes(role: str) -> None:
    pod = pods()[role]
    pause = 0
    if "lifecycle" in pod["containers"][0]:
        command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        pause = int(re.findall(r"sleep\((\d+)\)", command[-1])[0])
        compile(command[-1], "preStop", "exec")
    assert pod["terminationGracePeriodSeconds"] >= STOP_SECONDS + pause + 5


@pytest.mark.parametrize("role", ROLES)
def test_a_pod_is_nobody_and_writes_its_volume_only(role: str) -> None:
    pod = pods()[role]
    user, group = map(int, instructions("USER")[0].split(":"))
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] == user != 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    rights = pod["containers"][0]["securityContext"]
    assert rights["readOnlyRootFilesystem"] is True and rights["allowPrivilegeEscalation"] is False
    assert rights["capabilities"] == {"drop": ["ALL"]}
    mounts = pod["containers"][0].get("volumeMounts", [])
    if role == "consumer":
        assert [each["mountPath"] for each in mounts] == instructions("VOLUME")
        assert pod["securityContext"]["fsGroup"] == group
    else:
        assert mounts == []


def test_there_is_one_writer_to_a_database() -> None:
    (consumer,) = [each for each in manifests() if each["kind"] == "StatefulSet"]
    assert consumer["spec"]["replicas"] == 1


# The image.


def test_the_image_is_made_of_exec_forms_and_runs_as_a_number() -> None:
    """Of a shell's child, nobody would hear SIGTERM; and Kubernetes takes no name's word for not being root."""
    assert re.fullmatch(r"python:3\.\d+-slim", (ROOT / "Dockerfile").read_text().split("ARG BASE=")[1].split()[0])
    assert all(isinstance(word, str) for word in [*entry_point(), *health_check()])
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", instructions("USER")[0])
    assert instructions("STOPSIGNAL") == ["SIGTERM"]
    read = settings(entry_point()[1:])
    assert read.hostname == "0.0.0.0" and [str(read.port)] == instructions("EXPOSE")
    assert instructions("WORKDIR")[-1:] == instructions("VOLUME"), "a database without a path is in the volume"


def test_the_build_sees_what_it_takes_and_no_more() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for needed in ("ringoexp.py", "pyproject.toml", "ringolib", "LICENSE", "README.md"):
        assert any(Path(needed).match(pattern) for pattern in kept), needed
    for secret in ("ringoexp.db", ".git", "token", "key.pem", ".venv"):
        assert not any(Path(secret).match(pattern) for pattern in kept), secret


def test_the_health_check_says_whether_the_server_is_alive(tmp_path: Path) -> None:
    port = free_port()
    check = [word.replace("6660", str(port)) for word in health_check()]
    check[0] = sys.executable

    def healthy() -> bool:
        return subprocess.run(check, capture_output=True, timeout=DEADLINE).returncode == 0

    assert not healthy()
    with server(tmp_path, "-p", str(port), "-T", str(port)):
        assert healthy()


FROM_THIS_MACHINE = """
set -e
mount -t tmpfs tmpfs "$1"
cd "$1"
mkdir usr etc opt tmp dev data proc
mount --bind /usr usr
mount -o remount,bind,ro usr
mount --bind /etc etc
for each in bin lib lib64 sbin; do [ ! -L /$each ] || cp -P /$each .; done
mkdir -p opt
"$3" "$4/tools/build_pyz.py" opt/ringoexp > /dev/null
mount --bind opt usr/local/bin
exec "$3" "$4/tests/support/contained.py" "$1" "$2"
"""


@pytest.fixture
def places(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Directories for a root and for data, which another user may enter."""
    for each in (tmp_path / "root", tmp_path / "data"):
        each.mkdir()
    yield tmp_path / "root", tmp_path / "data"


def test_the_images_commands_run_as_nobody_with_a_root_that_cannot_be_written(places: tuple[Path, Path]) -> None:
    """With this machine's programs in place of the image's; `deploy/try_image` has the real one."""
    apart = ["unshare", "--mount", "--net", "--ipc", "--uts"]
    if os.getuid() or subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("takes root and namespaces")
    if not (ROOT / "tools" / "build_pyz.py").exists():
        pytest.skip("takes tools/build_pyz.py")
    command = [*apart, "sh", "-c", FROM_THIS_MACHINE, "sh", *map(str, places), sys.executable, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=4 * DEADLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ringoexp: stopped") == 3


# The documentation.


def test_times_and_numbers_in_the_documentation_are_those_of_the_files() -> None:
    text = (ROOT / "docs/deploy.md").read_text()
    assert f"{assembly.DRAIN_SECONDS:.0f} s" in text and f"{STOP_SECONDS:.0f} s" in text
    for role in ROLES:
        assert f"`TimeoutStopSec={unit(role)['TimeoutStopSec'][0]}`" in text
        assert f"{pods()[role]['terminationGracePeriodSeconds']} s" in text
    assert json.dumps(entry_point()) in (ROOT / "Dockerfile").read_text()
