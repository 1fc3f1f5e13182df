"""A server: builds its parts from the settings, starts them, and stops them in order.

The main thread builds, starts, reloads and stops an `App`. `Report` and the service manager's watchdog read it from any
thread; each part guards its own state.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

from ringbuffer import Ring
from ringolib.counters import Totals
from ringolib.forward import spool as spool_module
from ringolib.forward.destination import Destination
from ringolib.forward.discovery import Discovery
from ringolib.forward.health import Health
from ringolib.forward.link import LinkSink, dialer
from ringolib.forward.sink import Sink, StoreSink
from ringolib.forward.spool import Spool, SpoolSink
from ringolib.forward.workers import BATCH_RECORDS, Forwarder
from ringolib.net.addresses import (
    Address,
    AddressError,
    Endpoint,
    format_address,
    is_fixed,
    is_same_listener,
    resolve,
    unix_path,
)
from ringolib.net.credentials import CredentialError, CredentialFiles, Credentials
from ringolib.net.listeners import Listeners
from ringolib.open_files import Shares, divide
from ringolib.options import Role, Settings, find_conflict
from ringolib.status.look import Look, hint_for
from ringolib.status.profiler import Profiler
from ringolib.status.report import Report, Sources
from ringolib.status.snapshot import records_stored
from ringolib.storage.clickhouse.store import ClickHouse
from ringolib.storage.clickhouse.url import Target, is_clickhouse_url, parse_url, redact_passwords
from ringolib.storage.interface import Storage
from ringolib.storage.retention import Retention
from ringolib.timing import ThreadError, deadline_after, remaining
from ringolib.web import budget
from ringolib.web.intake import Intake, RingIntake, StoreIntake
from ringolib.web.names import Names
from ringolib.web.records import MAX_STREAMS, StoredRecords
from ringolib.web.relay import RelayedRecords
from ringolib.web.table import Limits
from store import Store
from wsserver import Server

log = logging.getLogger("ringoexp")

DRAIN_SECONDS = 30.0
"""How long a stopping server tries to store the records that it has accepted."""
JOIN_SECONDS = 5.0
"""How long the stop waits for the threads of one part."""
LOOP_TIMEOUT_SECONDS = 9.0
"""How long the ingest loop may take to show that it is alive; less than half the watchdog's period in our units."""

LinkMaker = Callable[[Endpoint, Callable[[], None]], LinkSink]
"""Makes a link to an endpoint; the second argument is called when the link connects."""


class StartupError(Exception):
    """The server cannot start. The text names the cause and the remedy."""


class App:
    """A server: its store, ring, workers and HTTP server. Parts that the settings do not ask for are None.

    Raises StartupError or StoreError if a part cannot be built; nothing is left open then.
    """

    def __init__(self, settings: Settings, argv: Sequence[str]) -> None:
        target = parse_url(settings.database) if is_clickhouse_url(settings.database) else None
        if target:
            settings = replace(settings, database=target.display_url)  # from here on, only the store knows the password
        self.settings = settings
        self.argv = [redact_passwords(argument) for argument in argv]
        self.totals = Totals()
        self.intact = True  # False after `stop` if another program has damaged the database or spool meanwhile
        listening = resolve_option("-H", settings.hostname, settings.port)
        role = resolve_role(settings)
        self.credentials = _read_credentials(settings)
        if conflict := find_conflict(settings, role):
            raise StartupError(conflict)
        stores = role is Role.STORES
        self._shares = _divide_files(settings, stores)
        # Each part needs only parts that are built before it. If one fails, `undo` closes the others in reverse order.
        with ExitStack() as undo, _startup_errors():
            limits = _limits(settings, self._shares)
            self.server = _open_server(settings, listening, limits, self.credentials, self.totals, undo)
            self.profiler = _open_profiler(settings, self.credentials, undo) if settings.profiler_port else None
            self.store: Storage | None
            self.retention: Retention | None
            self.store, self.retention = _open_store(settings, target, undo) if stores else (None, None)
            self.ring = _allocate_ring(settings.ring_size) if settings.is_publisher else None
            make_link = partial(_make_link, settings, self.credentials, self.server.listeners.is_own)
            self.spool = _open_spool(settings, make_link, undo) if settings.spool else None
            discovery = None if stores else Discovery(settings.consumers, by_name=self.spool is not None)
            make = partial(make_destination, settings, self.spool, make_link)
            self.forwarder = self._start_forwarder(self.ring, discovery, make, undo) if self.ring else None
            undo.pop_all()
        self._intake: Intake | None = None
        self._report = Report(
            Sources(
                settings=settings,
                argv=self.argv,
                totals=self.totals,
                server=self.server,
                budget=self.server.budget,
                credentials=self.credentials,
                ring=self.ring,
                store=self.store,
                spool=self.spool,
                forwarder=self.forwarder,
                forwards=not stores,
                retention=self.retention,
            )
        )
        self._look = None if stores else Look(self._report.absent_consumers, hint_for(settings))

    def _start_forwarder(
        self, ring: Ring, discovery: Discovery | None, make: Callable[[Endpoint], Destination], undo: ExitStack
    ) -> Forwarder:
        """Start the workers, which take batches from `ring` to the consumers, or to the own store."""
        if discovery:
            destinations = [make(endpoint) for endpoint in discovery.endpoints]
        else:
            assert self.store
            destinations = [_store_destination(self.store)]
        max_workers = self._shares.links or self.settings.max_workers
        max_records = self.settings.spool_max if self.spool else BATCH_RECORDS
        forwarder = Forwarder(ring, destinations, max_workers, max_records)
        undo.callback(forwarder.stop, JOIN_SECONDS)
        undo.callback(ring.abort)  # runs first: the workers end only if the ring is closed or aborted
        if discovery:
            forwarder.follow(discovery, make)
        return forwarder

    @property
    def address(self) -> str:
        """The address that this server listens on, with the port that it has got."""
        return format_address(self.settings.hostname, self.server.port)

    def start(self) -> None:
        """Start to serve. Raises StartupError."""
        self._log_credential_warnings()
        if "null" in self.settings.allow_origin:
            hint = "every web page can send Origin: null from a sandboxed frame; give the pages an origin of their own"
            log.warning("null_origin", {"hint": hint})
        with _startup_errors():
            if self.ring:
                self._intake = RingIntake(self.ring, self.settings.ack == "ring")
            else:
                assert self.store
                self._intake = StoreIntake(self.store)
            self.server.serve(self._intake, self._report, self._records())
            if self.profiler:
                self.profiler.start()
        if self._look:
            self._look.start()
        if self.profiler:
            level = logging.INFO if self.profiler.loopback else logging.WARNING
            log.log(level, "profiling", {"host": self.settings.profiler_host, "port": self.profiler.port})

    def _records(self) -> StoredRecords | RelayedRecords:
        """Return what answers `GET /v1.0/records`. Long answers may take a quarter of the connections."""
        limits = [limit for limit in (self._shares.connections, self.settings.max_request_threads) if limit]
        max_streams = max(1, min(MAX_STREAMS, min(limits, default=4 * MAX_STREAMS) // 4))
        if self.store:
            return StoredRecords(self.store.read, max_streams)
        assert self.forwarder
        forwarder = self.forwarder

        def endpoints() -> list[Endpoint]:
            return [destination.endpoint for destination in forwarder.destinations if destination.endpoint]

        return RelayedRecords(endpoints, self.credentials, max_streams)

    def reload(self) -> None:
        """Read the token and the certificates again. Open connections keep the old ones."""
        try:
            self.credentials.reload()
        except CredentialError as error:
            log.error("not_reloaded", {"reason": str(error)})
            return
        log.info("reloaded")
        self._log_credential_warnings()

    def _log_credential_warnings(self) -> None:
        """Warn if other machines can connect without a token, and if the certificate is expired or nearly so."""
        if not self.credentials.current.token and not self.server.listeners.loopback and not self.settings.client_ca:
            hint = "any client that can connect may send records and read statistics; --token_file requires a token"
            log.warning("no_token", {"address": self.address, "hint": hint})
        if trouble := self.credentials.certificate_problem():
            log.warning("certificate", {"file": self.settings.tls_cert, "reason": trouble})

    def stored(self) -> int:
        """Return the number of records stored since the start."""
        store = self.store.stats() if self.store else None
        return records_stored(store, self.ring.stats() if self.ring else None)

    def unstored(self) -> int:
        """Return the number of accepted records that are not stored."""
        if not self.ring:
            return 0
        ring = self.ring.stats()
        return ring.cursor - ring.stored

    def stop(self) -> None:
        """Stop in order. Returns within DRAIN_SECONDS and a few seconds, with all threads ended, unless a disk hangs.

        1. Retention stops, so that the database is free for the records that are still to be stored.
        2. The server accepts no more records. Clients get their last acks while the workers empty the ring.
        3. The ring closes once no client can put records into it, and the workers store the rest. After DRAIN_SECONDS
           the ring is aborted, which ends every wait for records that are not stored.
        4. Remaining connections are cut, then the listeners close. The profiler stays until then, so that a stop that
           hangs can be examined.
        5. The workers and their links end, then the spool, and the store last: each may use the parts after it.
        """
        deadline = deadline_after(DRAIN_SECONDS)
        if unstored := self.unstored():
            hint = "a second signal ends the process without storing them"
            log.warning("draining", {"unstored": unstored, "seconds": DRAIN_SECONDS, "hint": hint})
        if self._look:
            self._look.stop()
        if self.retention:
            self.retention.stop(JOIN_SECONDS)
        self.server.stop()
        ended = self.server.wait_ended(DRAIN_SECONDS)
        if self.ring:
            if ended:
                self.ring.close()
                self.ring.join(remaining(deadline))
            if not ended or self.unstored():
                self.ring.abort()
        if not ended and not self.server.wait_ended(JOIN_SECONDS):
            self.server.abort()
            self.server.wait_ended(JOIN_SECONDS)
        self.server.close()
        if self._intake:
            self._intake.stop(JOIN_SECONDS)
        if self.profiler:
            self.profiler.close()
        if self.forwarder:
            self.forwarder.stop(JOIN_SECONDS)
        if self.spool:
            self.spool.stop(JOIN_SECONDS)
            self.intact = self.spool.intact
        if self.store:
            self.intact = self.store.close()

    def alive(self) -> bool:
        """True if a thread accepts connections, and the ingest loop responds.

        Blocks if a lock that records need is never released. A restart helps in all three cases. A failing disk or
        consumer does not count: no thread holds these locks while it waits for them, and the loop never waits.
        """
        self.totals.snapshot()
        consumers = [destination.consumer for destination in self.forwarder.destinations] if self.forwarder else []
        for part in (self.ring, self.forwarder, *consumers, self.spool, self.spool and self.spool.store, self.store):
            if part:
                part.stats()
        loop = self.server.loop
        return self.server.accepting and (loop is None or loop.responds(LOOP_TIMEOUT_SECONDS))


# Addresses and roles.


def resolve_option(flag: str, host: str, port: int) -> list[Address]:
    """Return the addresses of a host given with `flag`, IPv4 first. Raises StartupError if it does not resolve."""
    try:
        return resolve(host, port)
    except AddressError as error:
        hint = " (give only a host: the port has its own flag)" if ":" in host or "/" in host else ""
        raise StartupError(f"{flag} {host}: {error}{hint}") from error


def resolve_role(settings: Settings) -> Role:
    """Return where the records of a server with these settings go. Raises StartupError if -U does not resolve.

    With a spool, an unresolved name is only logged: names come and go with the network, and the spool does not need it.
    """
    try:
        stores = not settings.is_publisher or is_own_consumer(settings)
    except StartupError as error:
        if not settings.spool:
            raise
        log.warning("consumer_unresolved", {"reason": str(error)})
        return Role.FORWARDS
    return Role.STORES if stores else Role.FORWARDS


def is_own_consumer(settings: Settings) -> bool:
    """True if the consumer's address is the publisher's own.

    Raises StartupError if the only consumer's name does not resolve, or if one of several consumers is the publisher.
    """
    listening = resolve_option("-H", settings.hostname, settings.port)
    several = len(settings.consumers) > 1
    for host, port in settings.consumers:
        try:
            candidates = resolve_option("-U", host, port)
        except StartupError:
            if several:
                continue
            raise
        if any(is_same_listener(candidate, own) for candidate in candidates for own in listening):
            if several:
                raise StartupError(
                    f"-U {format_address(host, port)}: that is this publisher itself, which cannot be one of "
                    "several consumers: leave this address out"
                )
            return True
    return False


# Building the parts.


@contextmanager
def _startup_errors() -> Iterator[None]:
    """Convert errors about names and threads into StartupError."""
    try:
        yield
    except (AddressError, ThreadError) as error:
        raise StartupError(str(error)) from error


def _read_credentials(settings: Settings) -> Credentials:
    """Return the token and the certificates. Raises StartupError."""
    files = CredentialFiles(
        settings.token_file,
        settings.tls_cert,
        settings.tls_key,
        settings.client_ca,
        settings.consumer_tls,
        settings.consumer_ca,
    )
    try:
        return Credentials(files)
    except CredentialError as error:
        raise StartupError(str(error)) from error


def _divide_files(settings: Settings, stores: bool) -> Shares:
    """Return how many files connections and links may open, and log if that is less than the options ask for."""
    links = 0 if stores else settings.max_workers
    shares = divide(settings.connections, links)
    if shares.connections < settings.connections or shares.links < links:
        hint = "raise the limit of open files (ulimit -n), or lower -n and -W"
        log.warning("few_files", {"connections": shares.connections, "workers": shares.links, "hint": hint})
    return shares


def _limits(settings: Settings, shares: Shares) -> Limits:
    """Return the limits of connections: the options, or less if the system allows fewer open files."""
    limited_by = "-n" if shares.connections == settings.connections else "ulimit -n"
    return Limits(
        shares.connections,
        settings.per_address,
        shares.refused,
        settings.max_request_threads,
        settings.unfinished * budget.MIB,
        limited_by,
    )


def _open_server(
    settings: Settings,
    listening: Sequence[Address],
    limits: Limits,
    credentials: Credentials,
    totals: Totals,
    undo: ExitStack,
) -> Server:
    """Return a server that listens, and accepts connections once it serves. Raises StartupError."""
    try:
        listeners = Listeners(format_address(settings.hostname, settings.port), listening)
    except AddressError as error:
        if unix_path(settings.hostname):
            raise StartupError(str(error)) from error
        hint = "-H names another address"
        if "in use" in str(error):
            hint = (
                "is a server already running? -H and -p name another address; a complete system there also needs "
                "-T, with the same port as -p"
            )
        raise StartupError(f"{error} ({hint})") from error
    server = Server(listeners, settings.name, limits, credentials, totals, _names(settings, settings.hostname))
    undo.callback(server.close)
    return server


def _open_profiler(settings: Settings, credentials: Credentials, undo: ExitStack) -> Profiler:
    """Return the profiler, which listens. Raises StartupError."""
    host, port = settings.profiler_host, settings.profiler_port
    listening = resolve_option("--profiler_host", host, port)
    try:
        listeners = Listeners(format_address(host, port), listening)
        profiler = Profiler(listeners, settings.name, credentials, _names(settings, host))
    except AddressError as error:
        raise StartupError(f"-L: {error} (-L and --profiler_host name another address)") from error
    undo.callback(profiler.close)
    return profiler


def _names(settings: Settings, hostname: str) -> Names:
    """Return the names that a server on `hostname` answers to."""
    is_unix = unix_path(hostname) is not None
    hosts = settings.allow_host if is_unix else [*settings.allow_host, hostname]
    return Names(hosts, settings.allow_origin, any_host=is_unix)


def _open_store(settings: Settings, target: Target | None, undo: ExitStack) -> tuple[Storage, Retention | None]:
    """Return the store and its retention. ClickHouse deletes old records itself. Raises StoreError."""
    if target:
        clickhouse = ClickHouse(target, settings.clickhouse_cluster, settings.retain)
        undo.callback(clickhouse.close)
        return clickhouse, None
    store = Store(settings.database)
    undo.callback(store.close)
    if not settings.retain:
        return store, None
    retention = Retention(store, settings.retain)
    undo.callback(retention.stop, JOIN_SECONDS)
    return store, retention


def _allocate_ring(size: int) -> Ring:
    try:
        return Ring(size)
    except MemoryError:
        raise StartupError(f"-r {size}: not enough memory for a ring of {size} slots") from None


def _make_link(
    settings: Settings,
    credentials: Credentials,
    is_own: Callable[[Address], bool],
    endpoint: Endpoint,
    on_connected: Callable[[], None],
) -> LinkSink:
    """Return a link to a consumer, which connects when it is first used. With a spool it gives up earlier."""
    ack_timeout = spool_module.ACK_TIMEOUT_SECONDS if settings.spool else None
    dial = dialer(credentials, is_own, endpoint.name)
    return LinkSink(endpoint.host, endpoint.port, on_connected, ack_timeout, dial)


def _open_spool(settings: Settings, make_link: LinkMaker, undo: ExitStack) -> Spool:
    """Return the spool, with its own link to the only consumer."""
    assert settings.spool
    ((host, port),) = settings.consumers
    endpoint = Endpoint(host, port, host)
    link = make_link(endpoint, lambda: None)
    spool = Spool(settings.spool, settings.spool_max, link, Health(str(endpoint)))
    undo.callback(spool.stop, JOIN_SECONDS)
    return spool


def make_destination(settings: Settings, spool: Spool | None, make_link: LinkMaker, endpoint: Endpoint) -> Destination:
    """Return the destination for one consumer.

    With a spool there is only one destination. A worker whose link fails stores in the spool, which knows the health of
    the consumer.
    """

    def make_sink(on_connected: Callable[[], None]) -> Sink:
        link = make_link(endpoint, on_connected)
        return SpoolSink(link, spool) if spool else link

    health, consumer = (Health(), spool.health) if spool else (Health(str(endpoint)), None)
    is_host_itself = endpoint.host == endpoint.name  # not one of the addresses of a name
    is_only = len(settings.consumers) == 1 and (spool is not None or is_fixed(endpoint.name))
    return Destination(make_sink, health, endpoint, is_host_itself, is_only, consumer)


def _store_destination(store: Storage) -> Destination:
    """Return the destination of a publisher that is its own consumer."""
    return Destination(lambda on_connected: StoreSink(store))
