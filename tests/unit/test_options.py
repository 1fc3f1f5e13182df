"""Options: which have an effect in which role, the environment, suggestions, and `--help`."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from support.harness import ROOT, server

from ringolib.app import is_own_consumer, resolve_role
from ringolib.options import OPTIONS, Option, find_conflict, read_arguments, strange_variables
from ringolib.options.environment import OTHER_VARIABLES

ROLES: dict[str, list[str]] = {
    "consumer": ["-I", "false"],
    "own consumer": ["-p", "7000", "-T", "7000"],
    "publisher": ["-p", "7000", "-T", "7001"],
    "several": ["-U", "127.0.0.1:7001,127.0.0.1:7002"],
    "unix": ["-H", "unix:a.sock"],
    "to unix": ["-p", "7000", "-U", "unix:b.sock"],
}
VALUES = {
    **{option.long: "x" for option in OPTIONS if option.default in ("", None, ())},
    **{option.long: str(option.default) for option in OPTIONS if option.default not in ("", None, ())},
    "retain": "7",
    "allow_origin": "http://x",
}
"""A value for each option, its default if it has one: an option that is given counts, whatever its value."""
WITH = {
    "spool_max": ["-S", "s"],
    "tls_key": ["--tls_cert", "c"],
    "client_ca": ["--tls_cert", "c"],
    "consumer_ca": ["--consumer_tls"],
    "profiler_host": ["-L", "6061"],
    "clickhouse_cluster": ["-D", "clickhouse://h/d"],
}
"""What an option needs beside it."""
EFFECTS = {
    **dict.fromkeys(("ring_size", "workers", "ack"), {*ROLES} - {"consumer"}),
    **dict.fromkeys(("consumer_hostname", "is_publisher", "hostname"), {*ROLES} - {"consumer"}),
    "consumer_port": {*ROLES} - {"consumer"},
    **dict.fromkeys(("spool", "spool_max"), {"publisher", "to unix"}),
    **dict.fromkeys(("consumer_tls", "consumer_ca"), {"publisher", "several", "to unix"}),
    **dict.fromkeys(("database", "retain", "clickhouse_cluster"), {"consumer", "own consumer", "unix"}),
    **dict.fromkeys(("per_address", "allow_host"), {*ROLES} - {"unix"}),
}
"""The roles in which an option has an effect. An option that is not here has one in all of them."""
SETS_THE_ROLE = {"is_publisher", "hostname", "consumer_hostname"}
"""Options that a role's own flags give already, or that would make another role of it."""


def refusal(words: Sequence[str], environ: Mapping[str, str], capsys: pytest.CaptureFixture[str]) -> str | None:
    """Return the error for these arguments, when they are read or once the role is known; None if they are accepted."""
    try:
        settings = read_arguments(words, environ)
    except SystemExit:
        return capsys.readouterr().err
    return find_conflict(settings, resolve_role(settings))


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("option", [o for o in OPTIONS if o.long not in SETS_THE_ROLE], ids=lambda option: option.long)
def test_option_without_effect_in_the_role_is_refused(
    option: Option, role: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [] if f"-{option.short}" in ROLES[role] else [f"--{option.long}", VALUES[option.long]]
    error = refusal([*ROLES[role], *WITH.get(option.long, []), *given], {}, capsys)
    if role in EFFECTS.get(option.long, ROLES):
        assert error is None
        return
    needed = re.match(r"--?(\w+)", (WITH.get(option.long) or ["--x"])[0])
    assert error and needed and re.search(rf"argument \S*({option.long}|{needed[1]}\b)", error)
    assert "not accepted" in error


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("option", [o for o in OPTIONS if o.long not in SETS_THE_ROLE], ids=lambda option: option.long)
def test_variable_without_effect_in_the_role_is_refused(
    option: Option, role: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if f"-{option.short}" in ROLES[role] or option.long in WITH:
        return
    error = refusal(ROLES[role], {option.variable: VALUES[option.long]}, capsys)
    if role in EFFECTS.get(option.long, ROLES):
        assert error is None
    else:
        assert error and f"variable {option.variable}: " in error


@pytest.mark.parametrize("option", [option for option in OPTIONS if option.long in WITH], ids=lambda o: o.long)
def test_option_that_needs_another_is_refused_without_it(option: Option, capsys: pytest.CaptureFixture[str]) -> None:
    error = refusal(["-p", "7000", f"--{option.long}", VALUES[option.long]], {}, capsys)
    assert error and f"argument --{option.long}: " in error
    needed = WITH[option.long][0]
    long = next(f"--{option.long}" for option in OPTIONS if needed in (f"-{option.short}", f"--{option.long}"))
    assert f"requires {long}" in error or f"requires {needed}" in error


# The environment.


@pytest.mark.parametrize("option", [o for o in OPTIONS if o.long != "consumer_hostname"], ids=lambda o: o.long)
def test_variable_is_read_as_its_flag(option: Option) -> None:
    text = "x" if option.long == "name" else VALUES[option.long]
    role = ["-I", "false"] if option.group == "consumer" else []
    others = [*role, *WITH.get(option.long, [])]
    flag = [f"--{option.long}", text]
    assert read_arguments(others, {option.variable: text}) == read_arguments([*others, *flag], {})


def test_flag_wins_over_its_variable() -> None:
    environ = {"RINGOEXP_PORT": "no number", "RINGOEXP_ALLOW_HOST": "a", "RINGOEXP_LOG_JSON": "yes"}
    settings = read_arguments(["-p", "7000", "--allow-host", "b", "--log_json", "off"], environ)
    assert (settings.port, settings.allow_host, settings.log_json) == (7000, ("b",), False)


@pytest.mark.parametrize("option", [o for o in OPTIONS if isinstance(o.default, bool)], ids=lambda o: o.long)
def test_flag_turns_off_what_its_variable_turns_on(option: Option) -> None:
    for flag, value in (([f"--{option.long}"], True), ([f"--{option.long}=false"], False)):
        assert getattr(read_arguments(flag, {option.variable: str(not value)}), option.long) is value


def test_variable_of_a_list_is_separated_by_commas() -> None:
    settings = read_arguments([], {"RINGOEXP_ALLOW_HOST": "a.example, b.example"})
    assert settings.allow_host == ("a.example", "b.example")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RINGOEXP_PORT": "x"}, "variable RINGOEXP_PORT: 'x' is not accepted: use a whole number, 0 to 65535"),
        ({"RINGOEXP_TOKEN_FILE": ""}, "variable RINGOEXP_TOKEN_FILE: '' is not accepted: it must not be empty"),
        ({"RINGOEXP_TLS_KEY": "k"}, "variable RINGOEXP_TLS_KEY: requires --tls_cert"),
        ({"RINGOEXP_CONSUMER_HOSTNAME": "a,a"}, "variable RINGOEXP_CONSUMER_HOSTNAME: 'a,a' is not accepted"),
        ({"RINGOEXP_DATABASE": "clickhouse://u:s3cret@h:x/d"}, "variable RINGOEXP_DATABASE: 'clickhouse://u:"),
        (
            {"RINGOEXP_TOKEN_FLIE": "x"},
            "variable RINGOEXP_TOKEN_FLIE is not an option: did you mean RINGOEXP_TOKEN_FILE?",
        ),
        ({"RINGOEXP_TOKN": "s3cret"}, "variable RINGOEXP_TOKN is not an option: did you mean RINGOEXP_TOKEN?"),
        ({"RINGOEXP_PROT": "7000"}, "variable RINGOEXP_PROT is not an option: did you mean RINGOEXP_PORT?"),
        ({"RINGOEXP_TOKENS": "s3cret"}, "variable RINGOEXP_TOKENS is not an option: did you mean RINGOEXP_TOKEN?"),
        (
            {"RINGOEXP_CLICKHOUSE_PASWORD": "s3cret"},
            "variable RINGOEXP_CLICKHOUSE_PASWORD is not an option: did you mean RINGOEXP_CLICKHOUSE_PASSWORD?",
        ),
        ({"RINGOEXP_RINGSIZE": "5"}, "variable RINGOEXP_RINGSIZE is not an option: did you mean RINGOEXP_RING_SIZE?"),
    ],
)
def test_bad_variable_error_names_the_variable(
    environ: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        read_arguments([], environ)
    error = capsys.readouterr().err
    assert exit_info.value.code == 2 and error.startswith(f"ringoexp: error: {message}") and error.count("\n") == 1
    assert "s3cret" not in error


def test_variables_of_kubernetes_services_are_ignored() -> None:
    """Kubernetes sets them for Services named `ringoexp` and `ringoexp-consumer`."""
    environ = {}
    for service in ("RINGOEXP", "RINGOEXP_CONSUMER"):
        address = {"": "tcp://10.0.0.1:6660", "_6660_TCP": "tcp://10.0.0.1:6660", "_6660_TCP_PROTO": "tcp"}
        more = {"_6660_TCP_PORT": "6660", "_6660_TCP_ADDR": "10.0.0.1"}
        environ |= {f"{service}_PORT{name}": value for name, value in (address | more).items()}
        environ |= {f"{service}_SERVICE_HOST": "10.0.0.1", f"{service}_SERVICE_PORT": "6660"}
        environ |= {f"{service}_SERVICE_PORT_HTTP": "6660"}
    assert read_arguments([], environ) == read_arguments([], {})
    assert strange_variables(environ) == []


def test_unknown_variable_is_a_warning_with_the_nearest_name(tmp_path: Path) -> None:
    environ = {"RINGOEXP_HOST": "x", "RINGOEXP_ELEPHANT": "x"}
    with server(tmp_path, "-p", "0", "-T", "0", env=environ) as running:
        log = running.errors.read_text()
    assert (
        'event=unknown_variable name=RINGOEXP_HOST hint="it is not an option: did you mean RINGOEXP_HOSTNAME?"' in log
    )
    assert 'event=unknown_variable name=RINGOEXP_ELEPHANT hint="it is not an option" ' in log


def test_variables_that_the_project_uses_are_known() -> None:
    known = {*OTHER_VARIABLES, *(option.variable for option in OPTIONS)}
    for path in [*ROOT.rglob("*.py"), ROOT / "Dockerfile", ROOT / ".ci/run", *(ROOT / "deploy").iterdir()]:
        if path.name != Path(__file__).name and ".venv" not in path.parts:
            used = set(re.findall(r"\bRINGOEXP_[A-Z_]+[A-Z]\b", path.read_text()))
            assert used <= known | {"RINGOEXP_NAME", "RINGOEXP_SERVICE_HOST"}, path
    assert strange_variables(dict.fromkeys(known, "x")) == []


@pytest.mark.parametrize(
    ("words", "environ"),
    [
        (["--log_json", "-p", "x"], {}),
        (["--log-json=yes", "--prot"], {}),
        (["--log_json", "on", "-p", "x"], {}),
        (["-p", "x"], {"RINGOEXP_LOG_JSON": "yes"}),
    ],
)
def test_usage_error_is_json_if_the_log_is(
    words: list[str], environ: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        read_arguments(words, environ)
    fields = json.loads(capsys.readouterr().err)
    assert (fields["level"], fields["event"]) == ("error", "bad_usage") and "--help" in fields["error"]


def test_startup_error_is_json_if_the_log_is(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "ringoexp.py"), "-p", "0", "-T", "0", "-D", "/", "--log_json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    fields = json.loads(done.stderr)
    assert (done.returncode, done.stdout, fields["event"]) == (1, "", "cannot_run") and "/" in fields["error"]


# Help, and the hint for a publisher without a consumer.


@pytest.mark.parametrize("columns", ["80", "60", "300"])
def test_help_fits_the_terminal(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        read_arguments(["--help"], {})
    longest = max(len(line) for line in capsys.readouterr().out.splitlines())
    assert longest <= max(79, min(int(columns), 100)), "usage and examples need 79 columns"


def test_help_shows_one_spelling_and_the_kind_of_value(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        read_arguments(["--help"], {})
    output = capsys.readouterr().out
    for option in OPTIONS:
        short = f"-{option.short}, " if option.short else ""
        value = f" [{option.metavar}]" if isinstance(option.default, bool) else f" {option.metavar}"
        invocation = f"  {short}--{option.long}{value}"
        assert re.search(rf"^{re.escape(invocation)}(  |$)", output, re.MULTILINE), invocation
    flags = re.findall(r"(?<![\w-])--[a-z][a-z_-]+", output.partition("\nEach flag")[0])
    assert not [flag for flag in flags if "-" in flag[2:]]
    kinds = {option.long: option.metavar for option in OPTIONS}
    assert (kinds["spool"], kinds["hostname"], kinds["retain"], kinds["port"]) == ("PATH", "HOST", "DAYS", "PORT")


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (["-p", "7000"], "-p 7000 -T 7000"),
        (["-p", "0"], "-p 0 -T 0"),
        (["-p", "7000", "-U", "other.example"], "-p 7000 -U localhost -T 7000"),
        (["-H", "0.0.0.0", "-p", "7000"], "-H 0.0.0.0 -p 7000 -T 7000"),
        (["-H", "::", "-U", "a:1,b:1"], "-H :: -p 6660 -U :: -T 6660"),
        (["-H", "127.0.0.1", "-T", "7000"], "-H 127.0.0.1 -p 6660 -T 6660"),
        (["-H", "192.0.2.1"], "-H 192.0.2.1 -p 6660 -U 192.0.2.1 -T 6660"),
    ],
)
def test_hint_makes_a_publisher_its_own_consumer(words: list[str], flags: str) -> None:
    assert read_arguments(words, {}).own_consumer_flags == flags
    if "192.0.2.1" not in flags:  # it is not an address of this machine
        assert is_own_consumer(read_arguments(flags.split(), {}))
