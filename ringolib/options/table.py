"""The table of options, the parsers of their values, and `Settings`: the value of every option.

The command line, the environment, `--help` and the documents follow from OPTIONS.
"""

import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ringolib.net.addresses import format_address, is_loopback, parse_host, parse_hosts, unix_path
from ringolib.storage.clickhouse.url import PASSWORD_VARIABLE, is_clickhouse_url, parse_url, redact_passwords

MAX_RING_SIZE = 2**31
VARIABLE_PREFIX = "RINGOEXP_"
"""The start of the environment variables that belong to this program."""
DEFAULT_DATABASE = "ringoexp.db"
DEFAULT_THREADS = 10_000
OTHER_THREADS = 128
"""Threads that do not serve an admitted connection or a worker, for example to refuse other connections."""
_TRUE = ("true", "yes", "on", "t", "1")
_FALSE = ("false", "no", "off", "f", "0")
NO_PORT = -1
"""Passed to `parse_hosts` as the default port, to see whether a host has a port of its own."""


class Option(NamedTuple):
    """A flag: `-short` (may be empty) and `--long`, its default, the parser and the kind of its value, group and help.

    The default of an option that may be given several times is `()`.
    """

    short: str
    long: str
    default: Any
    parse: Callable[[str], Any]
    metavar: str
    group: str
    help: str

    @property
    def flags(self) -> str:
        """The flag as argparse names it in errors."""
        return f"-{self.short}/--{self.long}" if self.short else f"--{self.long}"

    @property
    def variable(self) -> str:
        """The environment variable with the same meaning."""
        return VARIABLE_PREFIX + self.long.upper()


# Parsers of values. Each raises ArgumentTypeError with the value and the accepted form.


def _whole_number(low: int, high: int, unit: str = "") -> Callable[[str], int]:
    """Return a parser of whole numbers from `low` to `high`. Its errors name the unit, if there is one."""
    kind = f"a whole number of {unit}" if unit else "a whole number"

    def parse(text: str) -> int:
        value = _integer(text)
        if value is None or not low <= value <= high:
            raise ArgumentTypeError(f"{text!r} is not accepted: use {kind}, {low} to {high}")
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
        raise ArgumentTypeError(
            f"{text!r} is not accepted: use a whole number up to 1000000000, 0 or less for no limit"
        )
    return max(0, value)


def _optional_port(text: str) -> int:
    """Parse a port. 0 or less means off and becomes 0."""
    value = _integer(text)
    if value is None or not -(10**18) <= value <= 65535:
        raise ArgumentTypeError(f"{text!r} is not accepted: use 1 to 65535, 0 or less for off")
    return max(0, value)


def parse_boolean(text: str) -> bool:
    """Parse true or false, yes or no, on or off, t or f, 1 or 0, in upper or lower case."""
    word = text.lower()
    if word not in _TRUE and word not in _FALSE:
        raise ArgumentTypeError(f"{text!r} is not accepted: use true or false, yes or no, on or off, t or f, 1 or 0")
    return word in _TRUE


def _days(text: str) -> float:
    """Parse a number of days above 0, with decimals if needed."""
    value = float(text) if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,9})?|\.[0-9]{1,9}", text) else 0.0
    if not value:
        raise ArgumentTypeError(f"{text!r} is not accepted: use a number of days above 0, for example 30 or 0.5")
    return value


def _choice(*choices: str) -> Callable[[str], str]:
    """Return a parser that accepts only these words."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ArgumentTypeError(f"{text!r} is not accepted: use {' or '.join(choices)}")
        return text

    return parse


def _header_text(text: str) -> str:
    """Parse text that an HTTP header can hold."""
    if not all(" " <= c <= "~" for c in text):
        raise ArgumentTypeError(f"{text!r} is not accepted: use printable ASCII, on one line")
    return text


def _not_empty(text: str) -> str:
    """Parse text that is not blank and has no NUL."""
    if not text.strip() or "\0" in text:
        raise ArgumentTypeError(f"{text!r} is not accepted: it must not be empty")
    return text


def _host_name(text: str) -> str:
    """Parse the name of a host, without a port."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", text):
        raise ArgumentTypeError(f"{text!r} is not accepted: use a host's name, without a port")
    return text


def _origin(text: str) -> str:
    """Parse the origin of web pages, as browsers send it."""
    if "*" in text:
        raise ArgumentTypeError(f"{text!r} is not accepted: wildcards are not supported: give one flag for each origin")
    if text != "null" and not _is_origin(text):
        raise ArgumentTypeError(
            f"{text!r} is not accepted: use SCHEME://HOST[:PORT] without a path or a final slash, or null"
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
        raise ArgumentTypeError(f"{text!r} is not accepted: {error}") from None


def _hosts(text: str) -> str:
    """Parse hosts with commas, each with or without a port. A single host without a port is checked as -H is."""
    try:
        hosts = parse_hosts(_not_empty(text), NO_PORT)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not accepted: {error}") from None
    has_port = hosts[0][1] > 0
    return text if len(hosts) > 1 or has_port else _host(text)


def _database(text: str) -> str:
    """Parse a path or a ClickHouse address. Errors show an address without its password."""
    _not_empty(text)
    if is_clickhouse_url(text):
        try:
            parse_url(text)
        except ValueError as error:
            raise ArgumentTypeError(
                f"{redact_passwords(text)!r} is not accepted: {error} (clickhouse://USER@HOST:PORT/DATABASE)"
            ) from None
    return text


def _spool(text: str) -> str:
    """Parse a path. The error does not show a ClickHouse address, because it may contain a password."""
    if is_clickhouse_url(text):
        raise ArgumentTypeError("a ClickHouse address is not accepted: a spool is a file on this machine")
    return _not_empty(text)


# One entry for each option, without the formatter, which would use a line for each value.
# fmt: off
OPTIONS = (
    Option("N", "name", "", _header_text, "NAME", "basic",
           "the server's name, sent as the Server header; without the flag: ringoexp/VERSION"),
    Option("H", "hostname", "localhost", _host, "HOST", "basic",
           "address to listen on: a name, an IP address (0.0.0.0 is all IPv4 ones, :: all), or unix:PATH"),
    Option("p", "port", 6660, _whole_number(0, 65535), "PORT", "basic",
           "port to listen on; 0: any free port, printed at start"),
    Option("n", "connections", 0, _limit, "N", "basic",
           "maximum number of connections, WebSocket and HTTP together; 0: no limit"),
    Option("I", "is_publisher", True, parse_boolean, "true|false", "basic",
           "true: a publisher; false: a consumer. Also yes/no, on/off, t/f and 1/0; the bare flag means true"),
    Option("r", "ring_size", 4096, _whole_number(1, MAX_RING_SIZE), "N", "publisher",
           "slots in the ring, 8 bytes each"),
    Option("U", "consumer_hostname", "localhost", _hosts, "HOST", "publisher",
           "the consumer's host, or unix:PATH; several with commas, with or without a port: HOST:PORT,[IPv6]:PORT; "
           "workers are spread over all of them, and over all addresses of a name"),
    Option("T", "consumer_port", 6660, _whole_number(0, 65535), "PORT", "publisher",
           "the consumer's port, unless -U has one; if host and port are the publisher's own, it stores in its own "
           "database"),
    Option("W", "workers", 1024, _whole_number(1, 65536), "N", "publisher",
           "maximum number of worker connections to the consumer"),
    Option("A", "ack", "stored", _choice("stored", "ring"), "stored|ring", "publisher",
           "stored: ack records that are on the consumer's disk; ring: ack records that are in the ring; they are "
           "lost if this process is killed"),
    Option("S", "spool", None, _spool, "PATH", "publisher",
           "file that stores records durably while the consumer is unreachable; they are forwarded afterwards"),
    Option("", "spool_max", 100_000_000, _whole_number(1, 2**62), "N", "publisher",
           "maximum number of records in the spool; if it is full, clients have to wait"),
    Option("D", "database", DEFAULT_DATABASE, _database, "PATH", "consumer",
           "SQLite file, or clickhouse://USER@HOST:PORT/DATABASE (clickhouses:// for TLS, several hosts with commas, "
           f"the password in {PASSWORD_VARIABLE}); for a consumer, or a publisher that is its own consumer"),
    Option("", "clickhouse_cluster", None, _not_empty, "NAME", "consumer",
           "cluster over which the ClickHouse tables are spread, a name from its system.clusters"),
    Option("", "retain", None, _days, "DAYS", "consumer",
           "days after which records are deleted from this server's database; decimals are accepted"),
    Option("", "token_file", None, _not_empty, "PATH", "security",
           "file with the bearer token required for all requests except /v1.0/alive and /v1.0/ready; also sent to the "
           "consumer. Without the flag: the variable RINGOEXP_TOKEN, if it is set"),
    Option("", "tls_cert", None, _not_empty, "PATH", "security",
           "certificate chain, PEM; the server then accepts TLS only"),
    Option("", "tls_key", None, _not_empty, "PATH", "security",
           "private key of --tls_cert, PEM, if it is in another file"),
    Option("", "client_ca", None, _not_empty, "PATH", "security",
           "certificate authorities, PEM; clients then need a certificate signed by one of them"),
    Option("", "allow_host", (), _host_name, "HOST", "security",
           "name that clients call this server by, beside its addresses, localhost, the name of -H and the name of the "
           "machine; other names are refused. May be given several times"),
    Option("", "allow_origin", (), _origin, "ORIGIN", "security",
           "origin of web pages that may use this server, such as https://HOST:PORT; other pages are refused. May be "
           "given several times"),
    Option("", "consumer_tls", False, parse_boolean, "true|false", "security",
           "publisher: use TLS to the consumer, with the certificate of --tls_cert, if there is one"),
    Option("", "consumer_ca", None, _not_empty, "PATH", "security",
           "publisher: certificate authorities, PEM, for the consumer's certificate; without the flag: the system's"),
    Option("", "per_address", 0, _limit, "N", "limits",
           "maximum number of connections from one client address; 0: no limit"),
    Option("", "threads", DEFAULT_THREADS, _whole_number(512, 10**6), "N", "limits",
           "maximum number of threads, at least 512: one for each HTTP connection and worker, 128 for the rest; an "
           "open WebSocket needs none; the server refuses HTTP connections beyond it, as with -n"),
    Option("", "unfinished", 256, _whole_number(16, 2**20, "MiB"), "MIB", "limits",
           "maximum size of unfinished messages and request bodies, of all clients together, in MiB, 16 to 1048576; "
           "beyond it, clients wait"),
    Option("X", "procs", 0, _limit, "N", "system",
           "processor cores to use; 0, or more than there are: all"),
    Option("L", "profiler_port", 0, _optional_port, "PORT", "system",
           "port of the profiler, /debug/pprof/; 0 or less: off"),
    Option("", "profiler_host", "localhost", _host, "HOST", "system", "address the profiler listens on"),
    Option("d", "debug", False, parse_boolean, "true|false", "common", "log in detail"),
    Option("", "log_json", False, parse_boolean, "true|false", "common",
           "log one JSON object per line; without the flag: key=value, or lines for people on a terminal"),
)
# fmt: on


@dataclass(frozen=True)
class Settings:
    """The value of every option, in the order and units of the table, and which of them were given."""

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
    given: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """The options that were given, each with its name in errors: `argument -p/--port` or `variable RINGOEXP_PORT`."""

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
    def own_consumer_flags(self) -> str:
        """The flags that make a publisher its own consumer, at the address that it has."""
        host, port = self.hostname, self.port
        if unix_path(host):
            return f"-H {host}, and without -U and -T,"
        is_anywhere = host in ("0.0.0.0", "::") or is_loopback(host)
        listen = [] if host == "localhost" else ["-H", host]
        consumer = [] if is_anywhere and self.consumer_hostname == "localhost" else ["-U", host]
        return " ".join([*listen, "-p", str(port), *consumer, "-T", str(port)])

    @property
    def max_request_threads(self) -> int:
        """The limit of threads that serve HTTP connections: `threads` minus workers and other threads."""
        return self.threads - OTHER_THREADS - (self.max_workers if self.is_publisher else 0)

    @property
    def max_workers(self) -> int:
        """The limit of workers: `workers`, but not more than half of all threads."""
        return min(self.workers, self.threads // 2)
