"""The flags: one table. argparse, --help and `Settings` follow it, and the README's table too (tests see to it)."""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from ringolib import __version__
from ringolib.net.addresses import parse_hosts
from ringolib.storage.clickhouse.url import PASSWORD_VARIABLE, is_clickhouse_url, parse_url, redact_passwords

MAX_RING = 2**31
DATABASE = "ringoexp.db"
THREADS = 10_000
OTHER_THREADS = 128
"""Threads that are neither an admitted connection's nor a worker's: those who are turned away, and who works here."""
EXIT_USAGE = 2


class Option(NamedTuple):
    """A flag: `-short`, if it has one, and `--long`, its default, how its text is read, and what help says of it."""

    short: str
    long: str
    default: Any
    read: Callable[[str], Any]
    group: str
    help: str

    @property
    def shown(self) -> str:
        """The flag as argparse names it in errors."""
        return f"-{self.short}/--{self.long}" if self.short else f"--{self.long}"


def _whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A reader of whole numbers from `low` to `high`."""

    def read(text: str) -> int:
        digits = text.removeprefix("-")
        value = int(text) if digits.isascii() and digits.isdigit() and len(digits) < 20 else None
        if value is None or value < low or (high is not None and value > high):
            span = f"{low} or more" if high is None else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"{text!r} is not accepted: a whole number, {span}")
        return value

    return read


def _at_will(text: str) -> int:
    """A whole number; 0 or less means no change, and is read as 0."""
    try:
        return max(0, _whole(-(10**18), 10**9)(text))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not accepted: a whole number up to 1000000000, 0 or less for no change"
        ) from None


def _port_at_will(text: str) -> int:
    """A port; 0 or less means none, and is read as 0."""
    try:
        return max(0, _whole(-(10**18), 65535)(text))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: 1 to 65535, 0 or less for off") from None


def _boolean(text: str) -> bool:
    """true or false, in any case, also t/f and 1/0."""
    value = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}.get(text.lower())
    if value is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: true or false, t or f, 1 or 0")
    return value


def _days(text: str) -> float:
    """A number of days above 0, parts of a day too."""
    value = float(text) if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,9})?|\.[0-9]{1,9}", text) else 0.0
    if not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: a number of days above 0, 30 or 0.5 say")
    return value


def _choice(*choices: str) -> Callable[[str], str]:
    """A reader of one of these words."""

    def read(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is not accepted: {' or '.join(choices)}")
        return text

    return read


def _header_text(text: str) -> str:
    """Text that can stand in an HTTP header."""
    if not all(" " <= c <= "~" for c in text):
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: printable ASCII, on one line")
    return text


def _host(text: str) -> str:
    """A host's name or address, an IPv6 one with or without brackets; or `unix:` and a path."""
    _not_empty(text)
    if text.startswith("unix:") and not text[5:].strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: unix:PATH, the path of a Unix socket")
    return text[1:-1] if text.startswith("[") and text.endswith("]") and ":" in text else text


def _hosts(text: str) -> str:
    """A host, or several with commas, each perhaps with a port."""
    _not_empty(text)
    try:
        hosts = parse_hosts(text, -1)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: {error}") from None
    return text if len(hosts) > 1 or hosts[0][1] > 0 else _host(text)


def _not_empty(text: str) -> str:
    """Any text but none, and no NUL."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: it must not be empty")
    return text


def _database(text: str) -> str:
    """A path, or a ClickHouse address. What is wrong with one is said without it: there may be a password in it."""
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
    """A path; what is an address all the same is not shown, as there may be a password in it."""
    if is_clickhouse_url(text):
        raise argparse.ArgumentTypeError("a ClickHouse address is not accepted: a spool is a file on this machine")
    return _not_empty(text)


OPTIONS = (
    Option("N", "name", "", _header_text, "basic", "the server's name, sent as the Server header"),
    Option("H", "hostname", "localhost", _host, "basic", "address to listen on, or unix:PATH"),
    Option("p", "port", 6660, _whole(0, 65535), "basic", "port to listen on; 0: any free one, printed at start"),
    Option(
        "n",
        "connections",
        0,
        _at_will,
        "basic",
        "most incoming connections, WebSocket and HTTP together; 0: no limit",
    ),
    Option(
        "I",
        "is_publisher",
        True,
        _boolean,
        "basic",
        "true: a publisher; false: a consumer. Also t/f and 1/0; the bare flag means true",
    ),
    Option("r", "ring_size", 4096, _whole(1, MAX_RING), "publisher", "slots in the ring, 8 bytes each"),
    Option(
        "U",
        "consumer_hostname",
        "localhost",
        _hosts,
        "publisher",
        "the consumer's host, or unix:PATH; several with commas, each perhaps with a port: HOST:PORT,[IPv6]:PORT; "
        "workers spread over them, and over all addresses of a name",
    ),
    Option(
        "T",
        "consumer_port",
        6660,
        _whole(0, 65535),
        "publisher",
        "the consumer's port, where -U has none; where host and port are the publisher's own, it stores in a database "
        "of its own",
    ),
    Option("W", "workers", 1024, _whole(1, 65536), "publisher", "most worker connections to the consumer"),
    Option(
        "A",
        "ack",
        "stored",
        _choice("stored", "ring"),
        "publisher",
        "stored: ack what is on the consumer's disk; ring: ack what is in the ring, lost if this process is killed",
    ),
    Option(
        "S",
        "spool",
        None,
        _spool,
        "publisher",
        "file that takes over, durably, while the consumer is away; what is in it is sent on afterwards",
    ),
    Option(
        "",
        "spool_max",
        100_000_000,
        _whole(1, 2**62),
        "publisher",
        "most records in the spool; when it is full, clients have to wait",
    ),
    Option(
        "D",
        "database",
        DATABASE,
        _database,
        "consumer",
        "SQLite file to store in, or clickhouse://USER@HOST:PORT/DATABASE (clickhouses:// for TLS, several hosts with "
        f"commas, the password in {PASSWORD_VARIABLE}); a publisher that is its own consumer has one too, no "
        "other has",
    ),
    Option(
        "",
        "clickhouse_cluster",
        None,
        _not_empty,
        "consumer",
        "cluster of the ClickHouse servers over which the tables are to be spread, as system.clusters there names it",
    ),
    Option(
        "",
        "retain",
        None,
        _days,
        "consumer",
        "days after which records are deleted, where there is a database; parts of a day too",
    ),
    Option(
        "",
        "token_file",
        None,
        _not_empty,
        "security",
        "file with the token that every request needs, but alive and ready; links show it to the consumer; else the "
        "variable RINGOEXP_TOKEN, if it is set",
    ),
    Option(
        "", "tls_cert", None, _not_empty, "security", "certificate chain, PEM: TLS is spoken then, and nothing else"
    ),
    Option("", "tls_key", None, _not_empty, "security", "its key, PEM, if that is in another file"),
    Option(
        "",
        "client_ca",
        None,
        _not_empty,
        "security",
        "authorities, PEM: clients need a certificate that one of them has signed",
    ),
    Option(
        "",
        "consumer_tls",
        False,
        _boolean,
        "security",
        "publisher: links to the consumer speak TLS; they show the certificate of --tls_cert, if there is one",
    ),
    Option(
        "",
        "consumer_ca",
        None,
        _not_empty,
        "security",
        "publisher: authorities, PEM, that may have signed the consumer's certificate; else the system's",
    ),
    Option("", "per_address", 0, _at_will, "limits", "most connections from one client's address; 0: no limit"),
    Option(
        "",
        "threads",
        THREADS,
        _whole(512, 10**6),
        "limits",
        "most threads: one for each connection and worker, 128 for the rest; refuses connections as -n does",
    ),
    Option("X", "procs", 0, _at_will, "system", "processor cores to use; 0: all the system gives"),
    Option("L", "profiler_port", 0, _port_at_will, "system", "port of the profiler, /debug/pprof/; 0 or less: off"),
    Option("", "profiler_host", "localhost", _host, "system", "address the profiler listens on"),
    Option("d", "debug", False, _boolean, "common", "log in detail"),
    Option("", "log_json", False, _boolean, "common", "log a JSON object a line, for machines"),
)


@dataclass(frozen=True)
class Settings:
    """The value of every option, in the table's units."""

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
    consumer_tls: bool
    consumer_ca: str | None
    per_address: int
    threads: int
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
    def max_connections(self) -> int:
        """How many connections may be admitted at once: what `connections` says, and `threads` leaves room for."""
        room = self.threads - OTHER_THREADS - (self.most_workers if self.is_publisher else 0)
        return min(self.connections or room, room)

    @property
    def most_workers(self) -> int:
        """How many workers there may be at once: what `workers` says, but not more than half of all threads."""
        return min(self.workers, self.threads // 2)


class _Parser(argparse.ArgumentParser):
    given: Sequence[str] = ()
    """The addresses among the arguments, whatever stands before them, which may have a password in them."""

    def error(self, message: str) -> NoReturn:
        """One line, and where to find more; no usage text in between."""
        for each in self.given:  # by itself: in a message nobody knows where a password ends
            for form in (each, repr(each)[1:-1], repr("\"'" + each)[4:-1]):  # as the quotes around it want it
                message = message.replace(form, redact_passwords(form))
        self.exit(EXIT_USAGE, f"ringoexp: error: {message} (ringoexp --help lists the flags)\n")


def parser() -> _Parser:
    """The command line's parser, made from OPTIONS."""
    made = _Parser(
        prog="ringoexp",
        usage="ringoexp [flags] | send [flags] [FILE] | help | version",
        description="Takes integers over WebSocket or HTTP, buffers them in a ring and stores them in SQLite.\n"
        "With no flags: a complete system on localhost:6660.",
        epilog="examples:\n"
        "  a consumer that stores in numbers.db:\n"
        "    ringoexp -I false -p 6661 -D numbers.db\n"
        "  a publisher in front of it, with a larger ring:\n"
        "    ringoexp -p 6660 -T 6661 -r 65536\n"
        "  a complete system on another port needs both: -p 7000 -T 7000\n"
        "  the flags of send: ringoexp send --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {}
    for option in OPTIONS:
        group = groups.setdefault(option.group, None) or made.add_argument_group(option.group)
        groups[option.group] = group
        names = [f"-{option.short}"] if option.short else []
        names.append(f"--{option.long}")
        if "_" in option.long:
            names.append(f"--{option.long.replace('_', '-')}")
        shown = option.help if option.default == "" else f"{option.help} (default {_shown(option.default)})"
        if option.long == "debug":
            group.add_argument(*names, action="store_true", help=option.help)
        elif isinstance(option.default, bool):
            group.add_argument(
                *names, type=option.read, nargs="?", const=True, default=option.default, metavar="BOOL", help=shown
            )
        else:
            metavar = "N" if isinstance(option.default, int) else "TEXT"
            group.add_argument(*names, type=option.read, default=option.default, metavar=metavar, help=shown)
    common = groups["common"]
    common.add_argument("-h", "--help", action="help", help="print this and exit; so does the word help")
    common.add_argument(
        "-V", "--version", action="version", version=f"ringoexp {__version__}", help="print the version and exit"
    )
    return made


def _shown(default: Any) -> str:
    return "off" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


def read_arguments(argv: Sequence[str]) -> Settings:
    """The settings that `argv` gives. Prints and raises SystemExit for help, version (0) and bad values (2)."""
    made = parser()
    made.given = [found[0] for each in argv if (found := re.search(r"(?is)clickhouses?://.*", each))]
    words = [word for word in argv if word in ("help", "version")]
    if len(argv) == 1 and words:
        argv = [f"--{words[0]}"]
    made.set_defaults(consumer_hostname=None, consumer_port=None)  # to see whether they are given
    values, rest = made.parse_known_args(argv)
    if rest:
        made.error(f"{rest[0]!r} is not a flag")
    for option in OPTIONS:
        if getattr(values, option.long) == []:  # what argparse before 3.13 makes of --flag=--
            made.error(f"argument {option.shown}: '--' is not accepted: name a value")
    unix = values.hostname.startswith("unix:")
    if unix and values.consumer_hostname is None and values.consumer_port is None:
        values.consumer_hostname = values.hostname  # a complete system
    for option in OPTIONS:
        if getattr(values, option.long) is None:
            setattr(values, option.long, option.default)
    settings = Settings(**vars(values))
    try:
        consumers = settings.consumers
    except ValueError as error:  # with their ports two of them are the same
        made.error(f"argument -U/--consumer_hostname: {settings.consumer_hostname!r} is not accepted: {error}")
    no_port = any(not port and not host.startswith("unix:") for host, port in consumers)
    if settings.is_publisher and no_port and (settings.port or unix or len(consumers) > 1):
        made.error("argument -T/--consumer_port: 0 is not accepted: 1 to 65535 (0 only with -p 0: its own)")
    if settings.ack == "ring" and not settings.is_publisher:
        made.error("argument -A/--ack: 'ring' is not accepted with -I false: a consumer has no ring; stored")
    if settings.spool and not settings.is_publisher:
        made.error(
            f"argument -S/--spool: {settings.spool!r} is not accepted with -I false: a consumer has nobody to spool for"
        )
    if settings.spool and len(consumers) > 1:
        made.error(
            f"argument -S/--spool: {settings.spool!r} is not accepted with several consumers: what may be stored at "
            "one must not go to another; name one, or do without a spool"
        )
    for flag, value, needs, given in (
        ("--tls_key", settings.tls_key, "--tls_cert", settings.tls_cert),
        ("--client_ca", settings.client_ca, "--tls_cert", settings.tls_cert),
        ("--consumer_ca", settings.consumer_ca, "--consumer_tls", settings.consumer_tls),
        (
            "--clickhouse_cluster",
            settings.clickhouse_cluster,
            "-D clickhouse://...",
            is_clickhouse_url(settings.database),
        ),
    ):
        if value and not given:
            made.error(f"argument {flag}: {value!r} is of no use without {needs}")
    if settings.consumer_tls and not settings.is_publisher:
        made.error("argument --consumer_tls: not accepted with -I false: a consumer has no links")
    if settings.procs:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
        if settings.procs > cores:
            most = f"at most {cores}, the cores there are" if cores else "0, this system cannot choose"
            made.error(f"argument -X/--procs: {settings.procs} is not accepted: {most}")
    return settings
