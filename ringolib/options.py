"""The command-line options: one table, from which the parser, `--help` and `Settings` follow.

CONFLICTS lists the combinations that are not accepted. `read_arguments` checks what the flags alone show.
`ringolib.app` checks the rest once names are resolved and the role of the server is known.
"""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, NoReturn
from urllib.parse import urlsplit

from ringolib import __version__
from ringolib.net.addresses import format_address, parse_host, parse_hosts, unix_path
from ringolib.storage.clickhouse.url import PASSWORD_VARIABLE, is_clickhouse_url, parse_url, redact_passwords

MAX_RING_SIZE = 2**31
DEFAULT_DATABASE = "ringoexp.db"
DEFAULT_THREADS = 10_000
OTHER_THREADS = 128
"""Threads that do not serve an admitted connection or a worker, for example to refuse other connections."""
EXIT_USAGE = 2
NO_PORT = -1
"""Passed to `parse_hosts` as the default port, to see whether a host has a port of its own."""


class Option(NamedTuple):
    """A flag: `-short` (may be empty) and `--long`, its default, the parser of its value, its group and its help."""

    short: str
    long: str
    default: Any
    parse: Callable[[str], Any]
    group: str
    help: str

    @property
    def flags(self) -> str:
        """The flag as argparse names it in errors."""
        return f"-{self.short}/--{self.long}" if self.short else f"--{self.long}"


# Parsers of values. Each raises ArgumentTypeError with the value and the accepted form.


def _whole_number(low: int, high: int, unit: str = "") -> Callable[[str], int]:
    """Return a parser of whole numbers from `low` to `high`. Its errors name the unit, if there is one."""
    kind = f"a whole number of {unit}" if unit else "a whole number"

    def parse(text: str) -> int:
        value = _integer(text)
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not accepted: {kind}, {low} to {high}")
        return value

    return parse


def _integer(text: str) -> int | None:
    """Return the integer that `text` is in ASCII digits, or None. At most 19 digits, so that no input is slow."""
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) < 20 else None


def _limit(text: str) -> int:
    """Parse a limit. 0 or less means no limit and becomes 0."""
    value = _integer(text)
    if value is None or not -(10**18) <= value <= 10**9:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not accepted: a whole number up to 1000000000, 0 or less for no limit"
        )
    return max(0, value)


def _optional_port(text: str) -> int:
    """Parse a port. 0 or less means off and becomes 0."""
    value = _integer(text)
    if value is None or not -(10**18) <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: 1 to 65535, 0 or less for off")
    return max(0, value)


def _boolean(text: str) -> bool:
    """Parse true or false, t or f, 1 or 0, in upper or lower case."""
    value = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}.get(text.lower())
    if value is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: true or false, t or f, 1 or 0")
    return value


def _days(text: str) -> float:
    """Parse a number of days above 0, with decimals if needed."""
    value = float(text) if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,9})?|\.[0-9]{1,9}", text) else 0.0
    if not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: a number of days above 0, for example 30 or 0.5")
    return value


def _choice(*choices: str) -> Callable[[str], str]:
    """Return a parser that accepts only these words."""

    def parse(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is not accepted: {' or '.join(choices)}")
        return text

    return parse


def _header_text(text: str) -> str:
    """Parse text that an HTTP header can hold."""
    if not all(" " <= c <= "~" for c in text):
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: printable ASCII, on one line")
    return text


def _not_empty(text: str) -> str:
    """Parse text that is not blank and has no NUL."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: it must not be empty")
    return text


def _host_name(text: str) -> str:
    """Parse the name of a host, without a port."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: a host's name, without a port")
    return text


def _origin(text: str) -> str:
    """Parse the origin of web pages, as browsers send it."""
    if "*" in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not accepted: wildcards are not supported: give one flag for each origin"
        )
    if text != "null" and not _is_origin(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not accepted: SCHEME://HOST[:PORT] without a path or a final slash, or null"
        )
    return text


def _is_origin(text: str) -> bool:
    """True if a browser may send this origin. Schemes other than http and https may do without a host."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*://[!-~]*", text) or any(
        c in text.partition("://")[2] for c in "/?#@"
    ):
        return False
    try:
        url = urlsplit(text)
        return url.port != 0 and (bool(url.hostname) or url.scheme not in ("http", "https"))
    except ValueError:
        return False


def _host(text: str) -> str:
    """Parse a host: a name, an address, an IPv6 address with or without brackets, or `unix:PATH`."""
    try:
        return parse_host(_not_empty(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: {error}") from None


def _hosts(text: str) -> str:
    """Parse hosts with commas, each with or without a port. A single host without a port is checked as -H is."""
    try:
        hosts = parse_hosts(_not_empty(text), NO_PORT)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: {error}") from None
    has_port = hosts[0][1] > 0
    return text if len(hosts) > 1 or has_port else _host(text)


def _database(text: str) -> str:
    """Parse a path or a ClickHouse address. Errors show an address without its password."""
    _not_empty(text)
    if is_clickhouse_url(text):
        try:
            parse_url(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(
                f"{redact_passwords(text)!r} is not accepted: {error} (clickhouse://USER@HOST:PORT/DATABASE)"
            ) from None
    return text


def _spool(text: str) -> str:
    """Parse a path. The error does not show a ClickHouse address, because it may contain a password."""
    if is_clickhouse_url(text):
        raise argparse.ArgumentTypeError("a ClickHouse address is not accepted: a spool is a file on this machine")
    return _not_empty(text)


# One entry for each option, without the formatter, which would use a line for each value.
# fmt: off
OPTIONS = (
    Option("N", "name", "", _header_text, "basic",
           "the server's name, sent as the Server header; without the flag: ringoexp/VERSION"),
    Option("H", "hostname", "localhost", _host, "basic", "address to listen on, or unix:PATH"),
    Option("p", "port", 6660, _whole_number(0, 65535), "basic",
           "port to listen on; 0: any free port, printed at start"),
    Option("n", "connections", 0, _limit, "basic",
           "maximum number of connections, WebSocket and HTTP together; 0: no limit"),
    Option("I", "is_publisher", True, _boolean, "basic",
           "true: a publisher; false: a consumer. Also t/f and 1/0; the bare flag means true"),
    Option("r", "ring_size", 4096, _whole_number(1, MAX_RING_SIZE), "publisher", "slots in the ring, 8 bytes each"),
    Option("U", "consumer_hostname", "localhost", _hosts, "publisher",
           "the consumer's host, or unix:PATH; several with commas, with or without a port: HOST:PORT,[IPv6]:PORT; "
           "workers are spread over all of them, and over all addresses of a name"),
    Option("T", "consumer_port", 6660, _whole_number(0, 65535), "publisher",
           "the consumer's port, unless -U has one; if host and port are the publisher's own, it stores in its own "
           "database"),
    Option("W", "workers", 1024, _whole_number(1, 65536), "publisher",
           "maximum number of worker connections to the consumer"),
    Option("A", "ack", "stored", _choice("stored", "ring"), "publisher",
           "stored: ack records that are on the consumer's disk; ring: ack records that are in the ring; they are "
           "lost if this process is killed"),
    Option("S", "spool", None, _spool, "publisher",
           "file that stores records durably while the consumer is unreachable; they are forwarded afterwards"),
    Option("", "spool_max", 100_000_000, _whole_number(1, 2**62), "publisher",
           "maximum number of records in the spool; if it is full, clients have to wait"),
    Option("D", "database", DEFAULT_DATABASE, _database, "consumer",
           "SQLite file, or clickhouse://USER@HOST:PORT/DATABASE (clickhouses:// for TLS, several hosts with commas, "
           f"the password in {PASSWORD_VARIABLE}); for a consumer, or a publisher that is its own consumer"),
    Option("", "clickhouse_cluster", None, _not_empty, "consumer",
           "cluster over which the ClickHouse tables are spread, a name from its system.clusters"),
    Option("", "retain", None, _days, "consumer",
           "days after which records are deleted from this server's database; decimals are accepted"),
    Option("", "token_file", None, _not_empty, "security",
           "file with the bearer token required for all requests except /v1.0/alive and /v1.0/ready; also sent to the "
           "consumer. Without the flag: the variable RINGOEXP_TOKEN, if it is set"),
    Option("", "tls_cert", None, _not_empty, "security", "certificate chain, PEM; the server then accepts TLS only"),
    Option("", "tls_key", None, _not_empty, "security", "private key of --tls_cert, PEM, if it is in another file"),
    Option("", "client_ca", None, _not_empty, "security",
           "certificate authorities, PEM; clients then need a certificate signed by one of them"),
    Option("", "allow_host", (), _host_name, "security",
           "name that clients call this server by, beside its addresses, localhost, the name of -H and that of the "
           "machine; other names are refused. May be given several times"),
    Option("", "allow_origin", (), _origin, "security",
           "origin of web pages that may use this server, such as https://HOST:PORT; other pages are refused. May be "
           "given several times"),
    Option("", "consumer_tls", False, _boolean, "security",
           "publisher: use TLS to the consumer, with the certificate of --tls_cert, if there is one"),
    Option("", "consumer_ca", None, _not_empty, "security",
           "publisher: certificate authorities, PEM, for the consumer's certificate; without the flag: the system's"),
    Option("", "per_address", 0, _limit, "limits",
           "maximum number of connections from one client address; 0: no limit"),
    Option("", "threads", DEFAULT_THREADS, _whole_number(512, 10**6), "limits",
           "maximum number of threads, at least 512: one for each HTTP connection and worker, 128 for the rest; an "
           "open WebSocket needs none; the server refuses HTTP connections beyond it, as with -n"),
    Option("", "unfinished", 256, _whole_number(16, 2**20, "MiB"), "limits",
           "maximum size of unfinished messages and request bodies, of all clients together, in MiB, 16 to 1048576; "
           "beyond it, clients wait"),
    Option("X", "procs", 0, _limit, "system", "processor cores to use; 0: all available"),
    Option("L", "profiler_port", 0, _optional_port, "system", "port of the profiler, /debug/pprof/; 0 or less: off"),
    Option("", "profiler_host", "localhost", _host, "system", "address the profiler listens on"),
    Option("d", "debug", False, _boolean, "common", "log in detail"),
    Option("", "log_json", False, _boolean, "common", "log one JSON object per line"),
)
# fmt: on


@dataclass(frozen=True)
class Settings:
    """The value of every option, in the order and units of the table."""

    name: str
    hostname: str
    port: int
    connections: int
    is_publisher: bool
    ring_size: int
    consumer_hostname: str
    consumer_port: int
    workers: int
    ack: str
    spool: str | None
    spool_max: int
    database: str
    clickhouse_cluster: str | None
    retain: float | None
    token_file: str | None
    tls_cert: str | None
    tls_key: str | None
    client_ca: str | None
    allow_host: tuple[str, ...]
    allow_origin: tuple[str, ...]
    consumer_tls: bool
    consumer_ca: str | None
    per_address: int
    threads: int
    unfinished: int
    procs: int
    profiler_port: int
    profiler_host: str
    debug: bool
    log_json: bool

    @property
    def consumers(self) -> list[tuple[str, int]]:
        """The consumers' hosts and ports."""
        return parse_hosts(self.consumer_hostname, self.consumer_port)

    @property
    def consumer_names(self) -> str:
        """The consumers' addresses as text for people."""
        *rest, last = [format_address(host, port) for host, port in self.consumers]
        return f"{', '.join(rest)} and {last}" if rest else last

    @property
    def max_request_threads(self) -> int:
        """The limit of threads that serve HTTP connections: `threads` minus workers and other threads."""
        return self.threads - OTHER_THREADS - (self.max_workers if self.is_publisher else 0)

    @property
    def max_workers(self) -> int:
        """The limit of workers: `workers`, but not more than half of all threads."""
        return min(self.workers, self.threads // 2)


class Role(Enum):
    """Where a server's records go. It depends on addresses, so it is unknown until names are resolved."""

    UNKNOWN = "unknown"
    STORES = "stores"  # a consumer, or a publisher that is its own consumer
    FORWARDS = "forwards"  # a publisher with consumers elsewhere


class Conflict(NamedTuple):
    """Settings that cannot be used together: a predicate, and a message that names cause and remedy.

    In the message, `{s}` is the settings and `{cores}` the number of processor cores.
    """

    applies: Callable[[Settings, Role], object]
    message: str


def _requires(option: str, needed: str) -> Conflict:
    """Return the conflict of an option that is given without the option it depends on."""
    return Conflict(
        lambda s, role: getattr(s, option) and not getattr(s, needed),
        f"argument --{option}: {{s.{option}!r}} requires --{needed}",
    )


def _consumer_port_missing(s: Settings, role: Role) -> bool:
    """True if a publisher's consumer has port 0, and that is not the publisher's own port (-p 0)."""
    missing = any(not port and not unix_path(host) for host, port in s.consumers)
    may_be_own = not s.port and not unix_path(s.hostname) and len(s.consumers) == 1
    return s.is_publisher and missing and not may_be_own


CONFLICTS = (
    # Known from the flags alone.
    Conflict(
        _consumer_port_missing,
        "argument -T/--consumer_port: 0 is not accepted: 1 to 65535 (0 only with -p 0: the publisher's own port)",
    ),
    Conflict(
        lambda s, role: s.ack == "ring" and not s.is_publisher,
        "argument -A/--ack: 'ring' is not accepted with -I false: a consumer has no ring; use stored",
    ),
    Conflict(
        lambda s, role: s.spool and not s.is_publisher,
        "argument -S/--spool: {s.spool!r} is not accepted with -I false: only a publisher has a spool",
    ),
    Conflict(
        lambda s, role: s.spool and len(s.consumers) > 1,
        "argument -S/--spool: {s.spool!r} is not accepted with several consumers: a record that one of them may have "
        "stored must not go to another; name one consumer, or leave out the spool",
    ),
    _requires("tls_key", "tls_cert"),
    _requires("client_ca", "tls_cert"),
    _requires("consumer_ca", "consumer_tls"),
    Conflict(
        lambda s, role: s.clickhouse_cluster and not is_clickhouse_url(s.database),
        "argument --clickhouse_cluster: {s.clickhouse_cluster!r} requires -D clickhouse://...",
    ),
    Conflict(
        lambda s, role: s.consumer_tls and not s.is_publisher,
        "argument --consumer_tls: not accepted with -I false: a consumer has no links",
    ),
    Conflict(
        lambda s, role: s.procs and not _cores(),
        "argument -X/--procs: {s.procs} is not accepted: 0, this system cannot choose cores",
    ),
    Conflict(
        lambda s, role: s.procs > _cores(),
        "argument -X/--procs: {s.procs} is not accepted: at most {cores}, the available cores",
    ),
    # Known once names are resolved.
    Conflict(
        lambda s, role: role is Role.FORWARDS and s.database != DEFAULT_DATABASE,
        "-D {s.database}: this publisher has no database, it forwards to {s.consumer_names} "
        "(to make it its own consumer, use the same -U and -T as -H and -p)",
    ),
    Conflict(
        lambda s, role: role is Role.FORWARDS and s.retain,
        "--retain {s.retain:g}: this publisher has no database, it forwards to {s.consumer_names} "
        "(give --retain to that consumer)",
    ),
    Conflict(
        lambda s, role: role is Role.STORES and s.spool,
        "-S {s.spool}: this publisher stores in its own database, it needs no spool "
        "(-U and -T name a consumer elsewhere)",
    ),
)


def find_conflict(settings: Settings, role: Role) -> str | None:
    """Return the message of the first conflict between the settings, or None."""
    for conflict in CONFLICTS:
        if conflict.applies(settings, role):
            return conflict.message.format(s=settings, cores=_cores())
    return None


def _cores() -> int:
    """Return the number of available processor cores; 0 if this system does not let a process choose cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line, which do not show passwords."""

    addresses: Sequence[str] = ()
    """The ClickHouse addresses among the arguments, without any text before them. They may contain passwords."""

    def error(self, message: str) -> NoReturn:
        """Print one line, without the usage text, and exit."""
        # Replace each address as a whole: within a message, the end of a password cannot be recognised.
        for address in self.addresses:
            for form in (address, repr(address)[1:-1], repr("\"'" + address)[4:-1]):  # as repr escapes it
                message = message.replace(form, redact_passwords(form))
        self.exit(EXIT_USAGE, f"ringoexp: error: {message} (ringoexp --help lists the flags)\n")


def _make_parser() -> _Parser:
    """Return the parser of the command line, made from OPTIONS."""
    parser = _Parser(
        prog="ringoexp",
        usage="ringoexp [flags] | send [flags] [FILE] | read [flags] | help | version",
        description="Receives integers over WebSocket or HTTP, buffers them in a ring and stores them in SQLite.\n"
        "Without flags: a complete system on localhost:6660.",
        epilog="examples:\n"
        "  a consumer that stores in numbers.db:\n"
        "    ringoexp -I false -p 6661 -D numbers.db\n"
        "  a publisher in front of it, with a larger ring:\n"
        "    ringoexp -p 6660 -T 6661 -r 65536\n"
        "  a complete system on another port needs both: -p 7000 -T 7000\n"
        "  the flags of send and read: ringoexp send --help, ringoexp read --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    """Add an option to a group of the parser, in all its spellings."""
    flags = [f"-{option.short}"] if option.short else []
    flags.append(f"--{option.long}")
    if "_" in option.long:
        flags.append(f"--{option.long.replace('_', '-')}")
    if option.long == "debug":
        group.add_argument(*flags, action="store_true", help=option.help)
        return
    help_text = option.help if option.default == "" else f"{option.help} (default {_default_text(option.default)})"
    details: dict[str, Any] = {"type": option.parse, "default": option.default, "help": help_text}
    if isinstance(option.default, bool):
        group.add_argument(*flags, nargs="?", const=True, metavar="BOOL", **details)
    elif option.default == ():
        group.add_argument(*flags, action="append", metavar="TEXT", type=option.parse, help=help_text)
    else:
        group.add_argument(*flags, metavar="N" if isinstance(option.default, int) else "TEXT", **details)


def _default_text(default: Any) -> str:
    if default in (None, ()):
        return "off"
    return str(default).lower() if isinstance(default, bool) else str(default)


def read_arguments(argv: Sequence[str]) -> Settings:
    """Return the settings for `argv`. Prints and raises SystemExit for help and version (0) and for bad usage (2)."""
    parser = _make_parser()
    parser.addresses = [match[0] for text in argv if (match := re.search(r"(?is)clickhouses?://.*", text))]
    settings = _parse(parser, argv)
    try:
        parse_hosts(settings.consumer_hostname, settings.consumer_port)  # with the port, two hosts may be equal
    except ValueError as error:
        parser.error(f"argument -U/--consumer_hostname: {settings.consumer_hostname!r} is not accepted: {error}")
    if conflict := find_conflict(settings, Role.UNKNOWN):
        parser.error(conflict)
    return settings


def _parse(parser: _Parser, argv: Sequence[str]) -> Settings:
    """Return the settings for `argv`, with defaults for the options that are not given."""
    if len(argv) == 1 and argv[0] in ("help", "version"):
        argv = [f"--{argv[0]}"]
    parser.set_defaults(consumer_hostname=None, consumer_port=None)  # to tell whether they are given
    values, rest = parser.parse_known_args(argv)
    if rest:
        parser.error(f"{rest[0]!r} is not a flag")
    for option in OPTIONS:
        if getattr(values, option.long) in ([], [[]]):  # argparse before 3.13 returns this for --flag=--
            parser.error(f"argument {option.flags}: '--' is not accepted: name a value")
    if unix_path(values.hostname) and values.consumer_hostname is None and values.consumer_port is None:
        values.consumer_hostname = values.hostname  # a complete system
    for option in OPTIONS:
        if getattr(values, option.long) is None:
            setattr(values, option.long, option.default)
        elif option.default == ():
            setattr(values, option.long, tuple(getattr(values, option.long)))
    return Settings(**vars(values))
