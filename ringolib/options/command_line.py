"""The command line: from flags and environment variables to `Settings`, with errors of one line."""

import argparse
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ringolib import __version__
from ringolib.net.addresses import parse_hosts, unix_path
from ringolib.options.conflicts import Role, find_conflict
from ringolib.options.environment import find_misspelt, given_variables
from ringolib.options.nearest import suggest
from ringolib.options.table import OPTIONS, Option, Settings, parse_boolean
from ringolib.storage.clickhouse.url import redact_passwords
from ringolib.timing import format_ago

EXIT_USAGE = 2
COMMANDS = ("send", "read", "help", "version")
"""The words that the command line may begin with. `ringoexp.main` carries out `send` and `read`."""
MAX_WIDTH = 100
"""Columns of `--help`, on a wide terminal."""
_FLAGS = {f"--{option.long}": option for option in OPTIONS}


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Shows `-p, --port PORT` where argparse before Python 3.13 shows `-p PORT, --port PORT`."""

    def __init__(self, prog: str, **details: Any) -> None:
        super().__init__(prog, **details)
        self._width = min(self._width, MAX_WIDTH)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        value = "" if action.nargs == 0 else f" {self._format_args(action, action.dest.upper())}"
        return ", ".join(action.option_strings) + value


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line, which do not show passwords, in JSON if `as_json` is true."""

    as_json = False
    addresses: Sequence[str] = ()
    """The ClickHouse addresses among the arguments, without any text before them. They may contain passwords."""

    def error(self, message: str) -> NoReturn:
        """Print one line, without the usage text, and exit."""
        # Replace each address as a whole: within a message, the end of a password cannot be recognised.
        for address in self.addresses:
            for form in (address, repr(address)[1:-1], repr("\"'" + address)[4:-1]):  # as repr escapes it
                message = message.replace(form, redact_passwords(form))
        message = f"{message} (ringoexp --help lists the flags)"
        line = f"ringoexp: error: {message}"
        if self.as_json:
            line = json.dumps({"time": format_ago(0), "level": "error", "event": "bad_usage", "error": message})
        self.exit(EXIT_USAGE, f"{line}\n")


def _make_parser() -> _Parser:
    """Return the parser of the command line, made from OPTIONS. It returns only the options that are given."""
    parser = _Parser(
        prog="ringoexp",
        usage="ringoexp [flags]\n       ringoexp send [flags] [FILE | INTEGER ...]\n       ringoexp read [flags]",
        description="Receives integers over WebSocket or HTTP, buffers them in a ring and stores\n"
        "them in SQLite. Without flags: a complete system on http://localhost:6660/.",
        epilog="Each flag can be given in the environment, too: RINGOEXP_PORT=7000 is -p 7000.\n"
        "Flags win. Names may have hyphens: --ring-size is --ring_size.\n\n"
        "examples:\n"
        "  a consumer that stores in numbers.db:\n"
        "    ringoexp -I false -p 6661 -D numbers.db\n"
        "  a publisher in front of it, with a larger ring:\n"
        "    ringoexp -p 6660 -T 6661 -r 65536\n"
        "  a complete system on another port needs both flags:\n"
        "    ringoexp -p 7000 -T 7000\n"
        "  the flags of send and read: ringoexp send --help, ringoexp read --help",
        formatter_class=_Formatter,
        argument_default=argparse.SUPPRESS,
        add_help=False,
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {}
    for option in OPTIONS:
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        _add_option(groups[option.group], option)
    common = groups["common"]
    common.add_argument("-h", "--help", action="help", help="print this and exit; so does the word help")
    common.add_argument(
        "-V", "--version", action="version", version=f"ringoexp {__version__}", help="print the version and exit"
    )
    return parser


def _add_option(group: Any, option: Option) -> None:
    """Add an option to a group of the parser."""
    flags = [f"-{option.short}"] if option.short else []
    flags.append(f"--{option.long}")
    details: dict[str, Any] = {"type": option.parse, "metavar": option.metavar, "help": _help_text(option)}
    if isinstance(option.default, bool):
        group.add_argument(*flags, nargs="?", const=True, **details)
    elif option.default == ():
        group.add_argument(*flags, action="append", **details)
    else:
        group.add_argument(*flags, **details)


def _help_text(option: Option) -> str:
    """Return the help of an option, with its default if it has one."""
    if option.default in ("", None, ()):
        return option.help
    default = str(option.default).lower() if isinstance(option.default, bool) else option.default
    return f"{option.help} (default {default})"


def read_arguments(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> Settings:
    """Return the settings for `argv` and the environment.

    Prints and raises SystemExit for help and version (0) and for bad usage (2).
    """
    parser = _make_parser()
    argv = [_with_underscores(text) for text in argv]
    parser.as_json = _wants_json(argv, environ)
    texts = [*argv, *given_variables(environ).values()]
    parser.addresses = [match[0] for text in texts if (match := re.search(r"(?is)clickhouses?://.*", text))]
    settings = _parse(parser, argv, environ)
    try:
        parse_hosts(settings.consumer_hostname, settings.consumer_port)  # with the port, two hosts may be equal
    except ValueError as error:
        name = settings.given.get("consumer_hostname") or settings.given["consumer_port"]
        parser.error(f"{name}: {settings.consumer_hostname!r} is not accepted: {error}")
    if conflict := find_conflict(settings, Role.UNKNOWN):
        parser.error(conflict)
    return settings


def _with_underscores(argument: str) -> str:
    """Return an argument in the spelling of the table if it is a flag with hyphens in its name."""
    flag, equals, value = argument.partition("=")
    name = "--" + flag[2:].replace("-", "_")
    return name + equals + value if flag.startswith("--") and name in _FLAGS else argument


def _wants_json(argv: Sequence[str], environ: Mapping[str, str]) -> bool:
    """True if errors have to be JSON, as far as arguments show that cannot be read completely."""
    text = given_variables(environ).get("log_json", "false")
    for argument, following in zip(argv, [*argv[1:], ""], strict=False):
        if argument == "--log_json":
            text = "true" if following.startswith("-") or not following else following
        elif argument.startswith("--log_json="):
            text = argument.partition("=")[2]
    try:
        return parse_boolean(text)
    except argparse.ArgumentTypeError:
        return False


def _parse(parser: _Parser, argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """Return the settings: flags, or else variables, or else defaults."""
    if len(argv) == 1 and argv[0] in ("help", "version"):
        argv = [f"--{argv[0]}"]
    values = _parse_flags(parser, argv)
    given = {name: f"argument {_FLAGS[f'--{name}'].flags}" for name in values}
    if misspelt := find_misspelt(environ):
        parser.error(misspelt)
    for name, text in given_variables(environ).items():
        if name not in values:
            option = _FLAGS[f"--{name}"]
            given[name] = f"variable {option.variable}"
            values[name] = _parse_variable(parser, option, text)
    if unix_path(values.get("hostname", "")) and not values.keys() & {"consumer_hostname", "consumer_port"}:
        values["consumer_hostname"] = values["hostname"]  # a complete system
    return Settings(**{option.long: option.default for option in OPTIONS} | values, given=given)


def _parse_flags(parser: _Parser, argv: Sequence[str]) -> dict[str, Any]:
    """Return the values of the flags that are given, by the options' long names."""
    for argument in argv:  # argparse would read -port as -p with the value "ort"
        if f"-{argument}".partition("=")[0] in _FLAGS:
            parser.error(f"{argument!r} is not a flag: did you mean -{argument}?")
    namespace, rest = parser.parse_known_args(argv)
    if rest:
        parser.error(_explain_stray(rest[0], argv))
    values = vars(namespace)
    for name, value in values.items():
        if value in ([], [[]]):  # argparse before 3.13 returns this for --flag=--
            parser.error(f"argument {_FLAGS[f'--{name}'].flags}: '--' is not accepted: name a value")
        if isinstance(value, list):
            values[name] = tuple(value)
    return values


def _explain_stray(word: str, argv: Sequence[str]) -> str:
    """Return the error for an argument that is neither a flag nor the value of one."""
    if word.startswith("-"):
        flag = word.partition("=")[0]
        return f"{flag!r} is not a flag{suggest(_with_underscores(flag), [*_FLAGS, '--help', '--version'])}"
    if word in COMMANDS:
        return f"the command {word!r} must be the first argument, and has flags of its own"
    if word == argv[0]:
        known = f": the commands are {', '.join(COMMANDS)}"
        return f"{word!r} is not a flag or a command{suggest(word, COMMANDS) or known}"
    return f"{word!r} is not a flag"


def _parse_variable(parser: _Parser, option: Option, text: str) -> Any:
    """Return the value of an option that is given in the environment. Several values are separated by commas."""
    try:
        if option.default == ():
            return tuple(option.parse(part.strip()) for part in text.split(","))
        return option.parse(text)
    except argparse.ArgumentTypeError as error:
        parser.error(f"variable {option.variable}: {error}")
