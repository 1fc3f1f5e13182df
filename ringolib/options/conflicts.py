"""Options that cannot be used together, or that have no effect in the server's role.

Both are refused: a flag without an effect is a misunderstanding. `read_arguments` checks what the options alone show.
`ringolib.app` checks the rest once names are resolved and the role of the server is known.
"""

from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

from ringolib.net.addresses import unix_path
from ringolib.options.table import Settings
from ringolib.storage.clickhouse.url import is_clickhouse_url


class Role(Enum):
    """Where a server's records go. It depends on addresses, so it is unknown until names are resolved."""

    UNKNOWN = "unknown"
    STORES = "stores"  # a consumer, or a publisher that is its own consumer
    FORWARDS = "forwards"  # a publisher with consumers elsewhere


class Conflict(NamedTuple):
    """An option that is not accepted with others: its long name, a predicate, and a message with cause and remedy.

    It counts only if the option is given. In the message, `{s}` is the settings.
    """

    option: str
    applies: Callable[[Settings, Role], object]
    message: str


def _requires(option: str, needed: str) -> Conflict:
    """Return the conflict of an option that is given without the option it depends on."""
    return Conflict(option, lambda s, role: not getattr(s, needed), f"requires --{needed}")


def _is_consumer(s: Settings, role: Role) -> bool:
    return not s.is_publisher


def _is_own_consumer(s: Settings, role: Role) -> bool:
    return s.is_publisher and role is Role.STORES


def _forwards(s: Settings, role: Role) -> bool:
    return role is Role.FORWARDS


def _on_unix_socket(s: Settings, role: Role) -> bool:
    return unix_path(s.hostname) is not None


def _consumer_port_missing(s: Settings, role: Role) -> bool:
    """True if a publisher's consumer has port 0, and that is not the publisher's own port (-p 0)."""
    missing = any(not port and not unix_path(host) for host, port in s.consumers)
    may_be_own = not s.port and not unix_path(s.hostname) and len(s.consumers) == 1
    return s.is_publisher and missing and not may_be_own


CONFLICTS = (
    # A consumer. Known from the options alone, as everything up to the next heading.
    Conflict("ring_size", _is_consumer, "not accepted with -I false: a consumer has no ring"),
    Conflict("ack", _is_consumer, "not accepted with -I false: a consumer has no ring, it acks stored records"),
    Conflict("consumer_hostname", _is_consumer, "not accepted with -I false: a consumer forwards to no other"),
    Conflict("consumer_port", _is_consumer, "not accepted with -I false: a consumer forwards to no other"),
    Conflict("workers", _is_consumer, "not accepted with -I false: a consumer has no workers"),
    Conflict("spool", _is_consumer, "not accepted with -I false: only a publisher has a spool"),
    Conflict("spool_max", _is_consumer, "not accepted with -I false: only a publisher has a spool"),
    Conflict("consumer_tls", _is_consumer, "not accepted with -I false: a consumer has no links"),
    Conflict("consumer_ca", _is_consumer, "not accepted with -I false: a consumer has no links"),
    # An option that needs another one.
    Conflict(
        "consumer_port",
        _consumer_port_missing,
        "0 is not accepted: use 1 to 65535 (0 only with -p 0: the publisher's own port)",
    ),
    Conflict(
        "spool",
        lambda s, role: len(s.consumers) > 1,
        "{s.spool!r} is not accepted with several consumers: a record that one of them may have stored must not go to "
        "another; name one consumer, or leave out the spool",
    ),
    _requires("spool_max", "spool"),
    _requires("tls_key", "tls_cert"),
    _requires("client_ca", "tls_cert"),
    _requires("consumer_ca", "consumer_tls"),
    _requires("profiler_host", "profiler_port"),
    Conflict(
        "clickhouse_cluster",
        lambda s, role: not is_clickhouse_url(s.database),
        "{s.clickhouse_cluster!r} requires -D clickhouse://...",
    ),
    # A Unix socket. It leaves -p unused, as a consumer with a port of its own leaves -T: each is only the port of
    # addresses that have none, and a script or a unit file may give it before other flags change the address.
    Conflict("per_address", _on_unix_socket, "not accepted with -H {s.hostname}: all its clients have one address"),
    Conflict(
        "allow_host",
        lambda s, role: _on_unix_socket(s, role) and (not s.profiler_port or unix_path(s.profiler_host)),
        "not accepted with -H {s.hostname}: a Unix socket answers to any name",
    ),
    # Known once names are resolved.
    Conflict(
        "database",
        _forwards,
        "{s.database!r} is not accepted: this publisher has no database, it forwards to {s.consumer_names} "
        "(with {s.own_consumer_flags} it stores in a database of its own)",
    ),
    Conflict(
        "retain",
        _forwards,
        "{s.retain:g} is not accepted: this publisher has no database, it forwards to {s.consumer_names} "
        "(give --retain to that consumer)",
    ),
    Conflict(
        "spool",
        _is_own_consumer,
        "{s.spool!r} is not accepted: this publisher stores in its own database, it needs no spool "
        "(-U and -T name a consumer elsewhere)",
    ),
    Conflict(
        "consumer_tls",
        _is_own_consumer,
        "not accepted: this publisher stores in its own database, it needs no links "
        "(-U and -T name a consumer elsewhere)",
    ),
)


def find_conflict(settings: Settings, role: Role) -> str | None:
    """Return the message of the first conflict between the settings, or None."""
    for conflict in CONFLICTS:
        if conflict.option in settings.given and conflict.applies(settings, role):
            return f"{settings.given[conflict.option]}: {conflict.message.format(s=settings)}"
    return None
