"""The files in deploy/ and the Dockerfile agree with the program: flags, paths, users, times."""

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
from support.contained import entry_point, environment, health_check, instructions
from support.harness import DEADLINE, ROOT, free_port, in_order, server

import ringoexp
from ringolib import app
from ringolib.client.producer import Producer
from ringolib.net.credentials import TOKEN_VARIABLE
from ringolib.options import Settings, read_arguments
from ringolib.storage.clickhouse.url import PASSWORD_VARIABLE, parse_url
from wsserver import Handler

DEPLOY = ROOT / "deploy"
ROLES = ("publisher", "consumer")
STOP_SECONDS = app.DRAIN_SECONDS + ringoexp.GIVE_UP_SECONDS


def unit(role: str) -> dict[str, list[str]]:
    """Return the values of each setting of a unit."""
    values: dict[str, list[str]] = {}
    for line in (DEPLOY / f"ringoexp-{role}.service").read_text().splitlines():
        if line and line[0] not in "#[":
            name, value = line.split("=", 1)
            values.setdefault(name, []).append(value)
    return values


def manifests() -> list[dict[str, Any]]:
    """Return the manifests of the Kubernetes example."""
    yaml = pytest.importorskip("yaml")
    return list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))


def pods() -> dict[str, dict[str, Any]]:
    """Return the specification of each role's pod."""
    templates = [manifest["spec"]["template"] for manifest in manifests() if "template" in manifest["spec"]]
    return {template["metadata"]["labels"]["role"]: template["spec"] for template in templates}


# systemd.


@pytest.mark.parametrize("role", ROLES)
def test_unit_has_valid_flags_and_writes_to_its_state_directory(role: str) -> None:
    command = shlex.split(unit(role)["ExecStart"][0].replace("%S", "/var/lib"))
    assert command[:5] == ["/usr/bin/python3", "-I", "-X", "faulthandler", "/opt/ringoexp/ringoexp.pyz"]
    assert command[-2:] == ["$FLAGS", "$SECRETS"]
    settings = read_arguments(command[5:-2])
    assert settings.is_publisher is (role == "publisher")
    path = settings.spool if settings.is_publisher else settings.database
    assert path and path.startswith(f"/var/lib/{unit(role)['StateDirectory'][0]}/")
    consumer = read_arguments(shlex.split(unit("consumer")["ExecStart"][0])[5:-2])
    assert settings.consumer_port == consumer.port or not settings.is_publisher


@pytest.mark.parametrize("role", ROLES)
def test_unit_stop_timeout_exceeds_the_servers_stop(role: str) -> None:
    assert int(unit(role)["TimeoutStopSec"][0]) >= STOP_SECONDS + 5
    assert unit(role)["RestartPreventExitStatus"] == ["2"] and "SuccessExitStatus" not in unit(role)


def analyze(*arguments: str) -> str:
    """Return the output of systemd-analyze, which must succeed."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("needs systemd-analyze")
    done = subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("role", ROLES)
def test_unit_is_valid_and_its_exposure_is_below_3(role: str) -> None:
    path = str(DEPLOY / f"ringoexp-{role}.service")
    assert analyze("verify", path) == ""
    analyze("security", "--offline=true", "--threshold=30", "--no-pager", path)


# Kubernetes.


def image_variables() -> dict[str, str]:
    """Return the environment of a container."""
    return dict(variable.split("=", 1) for variable in environment())


def test_manifests_match_the_schema_of_kubernetes() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for manifest in manifests():
        kubernetes_validate.validate(manifest, "1.29", strict=True)


@pytest.mark.parametrize("role", ROLES)
def test_pod_has_valid_flags_and_probes_existing_routes(role: str) -> None:
    (container,) = pods()[role]["containers"]
    settings = read_arguments([*entry_point()[1:], *container["args"]], image_variables())
    assert settings.is_publisher is (role == "publisher")
    assert container["ports"] == [{"name": "http", "containerPort": settings.port}]
    (service,) = [
        manifest
        for manifest in manifests()
        if manifest["kind"] == "Service" and manifest["spec"]["selector"]["role"] == role
    ]
    assert service["spec"]["ports"] == [{"name": "http", "port": settings.port, "targetPort": "http"}]
    if settings.is_publisher:
        consumer = read_arguments(pods()["consumer"]["containers"][0]["args"], image_variables())
        assert (settings.consumer_hostname, settings.consumer_port) == ("ringoexp-consumer", consumer.port)
    routes = Handler.__new__(Handler).make_routes()
    for probe, path in ("startup", "alive"), ("liveness", "alive"), ("readiness", "ready"):
        check = container[f"{probe}Probe"]
        assert check["httpGet"] == {"path": f"/v1.0/{path}", "port": "http"} and check["timeoutSeconds"] == 5
        assert check["httpGet"]["path"] in routes


@pytest.mark.parametrize("role", ROLES)
def test_pod_grace_period_exceeds_the_servers_stop(role: str) -> None:
    pod = pods()[role]
    pause = 0
    if "lifecycle" in pod["containers"][0]:
        command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        pause = int(re.findall(r"sleep\((\d+)\)", command[-1])[0])
        compile(command[-1], "preStop", "exec")
    assert pod["terminationGracePeriodSeconds"] >= STOP_SECONDS + pause + 5


@pytest.mark.parametrize("role", ROLES)
def test_pod_has_no_privileges_and_writes_only_its_volume(role: str) -> None:
    pod = pods()[role]
    user, group = map(int, instructions("USER")[0].split(":"))
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] == user != 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    rights = pod["containers"][0]["securityContext"]
    assert rights["readOnlyRootFilesystem"] is True and rights["allowPrivilegeEscalation"] is False
    assert rights["capabilities"] == {"drop": ["ALL"]}
    mounts = pod["containers"][0].get("volumeMounts", [])
    if role == "consumer":
        assert [mount["mountPath"] for mount in mounts] == instructions("VOLUME")
        assert pod["securityContext"]["fsGroup"] == group
    else:
        assert mounts == []


def test_consumer_has_one_replica() -> None:
    (consumer,) = [manifest for manifest in manifests() if manifest["kind"] == "StatefulSet"]
    assert consumer["spec"]["replicas"] == 1


# Compose.

COMPOSE = ("compose.yaml", "compose.clickhouse.yaml")
PASSWORD = "RINGOEXP_CLICKHOUSE_PASSWORD"


def composed(name: str) -> dict[str, Any]:
    """Return the services and the volumes of a compose file."""
    yaml = pytest.importorskip("yaml")
    return dict(yaml.safe_load((DEPLOY / name).read_text()))


def composed_settings(name: str, role: str) -> Settings:
    """Return the settings of a server in a compose file."""
    return read_arguments([*entry_point()[1:], *composed(name)["services"][role]["command"]])


@pytest.mark.parametrize("name", COMPOSE)
def test_docker_compose_accepts_the_file(name: str) -> None:
    if not shutil.which("docker-compose"):
        pytest.skip("needs docker-compose")
    command = ["docker-compose", "-f", str(DEPLOY / name), "config", "-q"]
    env = {key: value for key, value in os.environ.items() if key not in (PASSWORD, "RINGOEXP_TOKEN")}
    done = subprocess.run(command, env={**env, PASSWORD: "x"}, capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    if "clickhouse" in name:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=DEADLINE)
        assert done.returncode != 0 and "set a password for ClickHouse" in done.stderr


@pytest.mark.parametrize("name", COMPOSE)
@pytest.mark.parametrize("role", ROLES)
def test_composed_server_has_valid_flags_and_the_images_port(name: str, role: str) -> None:
    """The health check of the image asks this port."""
    settings, service = composed_settings(name, role), composed(name)["services"][role]
    assert settings.is_publisher is (role == "publisher")
    assert [str(settings.port)] == instructions("EXPOSE")
    (published,) = service["ports"]
    port = {"publisher": 6660, "consumer": 6661}[role]
    assert published == f"127.0.0.1:{port}:{settings.port}", "as in the README's example"
    assert settings.allow_host == (role,), "others call it by the name of its service"
    if settings.is_publisher:
        assert settings.consumers == [("consumer", composed_settings(name, "consumer").port)]
        assert service["depends_on"] == ["consumer"]


@pytest.mark.parametrize("name", COMPOSE)
@pytest.mark.parametrize("role", ROLES)
def test_composed_server_is_built_here_and_has_no_privileges(name: str, role: str) -> None:
    service = composed(name)["services"][role]
    assert "image" not in service and (DEPLOY / service["build"] / "Dockerfile").is_file()
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert int(service["stop_grace_period"].removesuffix("s")) >= STOP_SECONDS + 5
    assert TOKEN_VARIABLE in service["environment"]


def test_composed_databases_are_in_volumes() -> None:
    files = [composed(name) for name in COMPOSE]
    (records,) = files[0]["services"]["consumer"]["volumes"]
    volume, mounted = records.split(":")
    assert volume in files[0]["volumes"] and [mounted] == instructions("VOLUME")
    assert Path(composed_settings(COMPOSE[0], "consumer").database).parent == Path(mounted)
    clickhouse = files[1]["services"]["clickhouse"]
    assert clickhouse["volumes"] == ["clickhouse:/var/lib/clickhouse"] and "clickhouse" in files[1]["volumes"]
    environment = dict(line.split("=", 1) for line in clickhouse["environment"])
    address = parse_url(composed_settings(COMPOSE[1], "consumer").database)
    assert (address.user, address.database) == (environment["CLICKHOUSE_USER"], environment["CLICKHOUSE_DB"])
    assert address.hosts == (("clickhouse", 8123),)
    own = [line for line in files[1]["services"]["consumer"]["environment"] if line.startswith(f"{PASSWORD}=")]
    assert own == [f"{PASSWORD}={environment['CLICKHOUSE_PASSWORD']}"] and PASSWORD == PASSWORD_VARIABLE


def test_composed_servers_store_records_together(tmp_path: Path) -> None:
    """As processes of this machine, with its names, ports and directory in place of the containers'."""
    services = composed(COMPOSE[0])["services"]
    publisher, consumer = ([*entry_point()[1:], *services[role]["command"]] for role in ROLES)
    consumer[consumer.index("/data/numbers.db")] = "numbers.db"
    publisher[publisher.index("consumer")] = "localhost"
    with (
        server(tmp_path, *consumer, "-p", "0") as store,
        server(tmp_path, *publisher, "-p", "0", "-T", str(store.port)) as front,
    ):
        url = f"ws://localhost:{front.port}/v1.0/ingest"
        with Producer(url) as producer:
            producer.send(range(1000))
            producer.flush(DEADLINE)
        assert in_order(tmp_path / "numbers.db", producer.source) == list(range(1000))
        for running, name in ((store, "consumer"), (front, "publisher")):
            assert running.get("/v1.0/ready", Host=f"{name}:6660")[0] == 200
            assert running.get("/v1.0/ready", Host="elsewhere:6660")[0] == 421


# The image.


def test_image_uses_exec_forms_and_a_numeric_user() -> None:
    """A shell would not forward SIGTERM, and Kubernetes needs a number to see that a user is not root."""
    assert re.fullmatch(r"python:3\.\d+-slim", (ROOT / "Dockerfile").read_text().split("ARG BASE=")[1].split()[0])
    assert all(isinstance(word, str) for word in [*entry_point(), *health_check()])
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", instructions("USER")[0])
    assert instructions("STOPSIGNAL") == ["SIGTERM"]
    settings = read_arguments(entry_point()[1:], image_variables())
    assert settings.hostname == "0.0.0.0" and [str(settings.port)] == instructions("EXPOSE")
    assert instructions("WORKDIR")[-1:] == instructions("VOLUME"), "a database without a path is in the volume"


def test_build_context_has_the_sources_and_no_secrets() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for needed in ("ringoexp.py", "pyproject.toml", "ringolib", "LICENSE", "README.md"):
        assert any(Path(needed).match(pattern) for pattern in kept), needed
    for secret in ("ringoexp.db", ".git", "token", "key.pem", ".venv"):
        assert not any(Path(secret).match(pattern) for pattern in kept), secret


def test_health_check_fails_unless_the_server_is_alive(tmp_path: Path) -> None:
    port = free_port()
    check = [word.replace("6660", str(port)) for word in health_check()]
    check[0] = sys.executable

    def healthy() -> bool:
        return subprocess.run(check, capture_output=True, timeout=DEADLINE).returncode == 0

    assert not healthy()
    with server(tmp_path, "-p", str(port), "-T", str(port)):
        assert healthy()


MAKE_ROOT_FROM_HOST = """
set -e
mount -t tmpfs tmpfs "$1"
cd "$1"
mkdir usr etc opt tmp dev data proc
mount --bind /usr usr
mount -o remount,bind,ro usr
mount --bind /etc etc
for name in bin lib lib64 sbin; do [ ! -L /$name ] || cp -P /$name .; done
mkdir -p opt
"$3" "$4/tools/build_pyz.py" opt/ringoexp > /dev/null
mount --bind opt usr/local/bin
exec "$3" "$4/tests/support/contained.py" "$1" "$2"
"""


@pytest.fixture
def directories(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Directories for a container's root and for its data."""
    for directory in (tmp_path / "root", tmp_path / "data"):
        directory.mkdir()
    yield tmp_path / "root", tmp_path / "data"


def test_image_commands_run_unprivileged_on_a_read_only_root(directories: tuple[Path, Path]) -> None:
    """The root contains the host's programs; `deploy/try_image` runs the same checks on the real image."""
    unshare = ["unshare", "--mount", "--net", "--ipc", "--uts"]
    if os.getuid() or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("needs root and namespaces")
    if not (ROOT / "tools" / "build_pyz.py").exists():
        pytest.skip("needs tools/build_pyz.py")
    command = [*unshare, "sh", "-c", MAKE_ROOT_FROM_HOST, "sh", *map(str, directories), sys.executable, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=4 * DEADLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" event=stopped ") == 3


# The documentation.


def test_times_in_the_docs_match_the_files() -> None:
    text = (ROOT / "docs/deploy.md").read_text()
    assert f"{app.DRAIN_SECONDS:.0f} s" in text and f"{STOP_SECONDS:.0f} s" in text
    for role in ROLES:
        assert f"`TimeoutStopSec={unit(role)['TimeoutStopSec'][0]}`" in text
        assert f"{pods()[role]['terminationGracePeriodSeconds']} s" in text
    assert json.dumps(entry_point()) in (ROOT / "Dockerfile").read_text()
