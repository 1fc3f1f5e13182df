"""ClickHouse URLs, and that no message shows the password of one."""

import pytest

from ringolib import options
from ringolib.storage.clickhouse.url import is_clickhouse_url, parse_url, redact_passwords


@pytest.mark.parametrize(
    ("text", "hosts", "user", "password", "database", "display_url"),
    [
        ("clickhouse://h/d", [("h", 8123)], "default", "", "d", "clickhouse://h:8123/d"),
        ("clickhouses://h", [("h", 8443)], "default", "", "default", "clickhouses://h:8443/default"),
        ("clickhouse://u:p@h:1,[::1]:2,g/d", [("h", 1), ("::1", 2), ("g", 8123)], "u", "p", "d", None),
        ("clickhouse://[fe80::1%25eth0]:1/d", [("fe80::1%eth0", 1)], "default", "", "d", None),
        ("ClickHouses://u:p@h/d", [("h", 8443)], "u", "p", "d", "clickhouses://u@h:8443/d"),
        ("clickhouse://u:@h/d", [("h", 8123)], "u", "", "d", "clickhouse://u@h:8123/d"),
        ("clickhouse://u%40x:a%2Fb@c@h/d%20e", [("h", 8123)], "u@x", "a/b@c", "d e", "clickhouse://u%40x@h:8123/d%20e"),
    ],
)
def test_url_is_parsed(
    text: str, hosts: list[tuple[str, int]], user: str, password: str, database: str, display_url: str | None
) -> None:
    target = parse_url(text)
    assert (list(target.hosts), target.user, target.password, target.database) == (hosts, user, password, database)
    assert is_clickhouse_url(text) and target.tls == text.lower().startswith("clickhouses:")
    assert display_url is None or target.display_url == display_url


@pytest.mark.parametrize(
    "text", ["clickhouse://", "clickhouse://u:pw@/d", "clickhouse://h:0/d", "clickhouse://h:70000/d",
             "clickhouse://u:pw@h/d?password=pw", "clickhouse://u:pw@h,h:8123/d", "clickhouse://u%3Ax:pw@h/d",
             "clickhouse://u:pw@h/d/e", "clickhouse://u:pw@h h/d"]
)  # fmt: skip
def test_invalid_url_is_refused_without_its_password(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["-D", text], [f"--database={text}"], [f"--databse={text}"], [text]):
        with pytest.raises(SystemExit) as stop:
            options.read_arguments(["-I", "false", *flags])
        stderr = capsys.readouterr().err
        assert stop.value.code == 2 and stderr.count("\n") == 1
        assert "pw" not in stderr


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("clickhouse://", "'clickhouse://' is not accepted: "),
        ("clickhouse://u:pw@h:99999/x", "'clickhouse://u:***@h:99999/x' is not accepted: "),
        ("clickhouse://u:pw@h/x?y=1", "'clickhouse://u:***@h/x?***' is not accepted: nothing may follow"),
    ],
)
def test_redaction_keeps_the_reason(url: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options.read_arguments(["-I", "false", "-D", url])
    line = capsys.readouterr().err
    assert message in line and "(clickhouse://USER@HOST:PORT/DATABASE)" in line and "pw" not in line


@pytest.mark.parametrize("before", ["", "x", "-x", "--nix=", "'", '"', "'\"", "-r", "-d"])
@pytest.mark.parametrize("password", ["pw", "p'pw", 'p"pw', "p'\"pw", "p\\pw", "p pw@pw"])
def test_password_in_a_misplaced_argument_is_not_shown(
    before: str, password: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        options.read_arguments([f"{before}clickhouse://u:{password}@h/d"])
    assert "pw" not in capsys.readouterr().err


def test_clickhouse_url_is_refused_as_a_spool(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options.read_arguments(["-S", "clickhouse://u:pw@h/d"])
    stderr = capsys.readouterr().err
    assert "a spool is a file" in stderr and "pw" not in stderr


def test_passwords_are_redacted_in_any_text() -> None:
    for text in (
        "clickhouse://u:p/@w@h/d",
        "-Dclickhouse://u:p w@h/d",
        "x clickhouses://u:pw@h,i/d y",
        "CLICKHOUSE://u:w@h",
    ):
        redacted = redact_passwords(text)
        assert "w" not in redacted and ":***@" in redacted and "u" in redacted
    for text in ("clickhouse://u@h/d", "clickhouse://h:1/d", "numbers.db", "a@b:c"):
        assert redact_passwords(text) == text
