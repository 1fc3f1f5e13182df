"""A server put together: store, ring, workers and the HTTP server, as the flags say; and their ordered stop.

The main thread builds it, has it read its keys again, and stops it: connections first, then the ring, the workers and
the store. What `Monitor` and `notify` ask, any thread may ask, once it is built; each room guards its own.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from time import monotonic

from ringbuffer import Ring
from ringolib.counters import Totals
from ringolib.forward import spool
from ringolib.forward.destination import Destination
from ringolib.forward.discovery import Consumers
from ringolib.forward.link import LinkSink, LinkState
from ringolib.forward.sink import Sink, StoreSink
from ringolib.forward.workers import BATCH_RECORDS, Forwarder
from ringolib.net.addresses import (
    Address,
    AddressError,
    Endpoint,
    format_address,
    is_fixed,
    is_same_listener,
    unix_path,
)
from ringolib.net.addresses import resolve as find
from ringolib.net.credentials import CredentialError, CredentialFiles, Credentials
from ringolib.net.listeners import Listeners
from ringolib.options import DATABASE, Settings
from ringolib.status.profiler import Profiler
from ringolib.status.report import Report, Sources
from ringolib.status.snapshot import records_stored
from ringolib.storage.clickhouse.store import ClickHouse
from ringolib.storage.clickhouse.url import is_clickhouse_url, parse_url, redact_passwords
from ringolib.storage.interface import Storage
from ringolib.storage.retention import Retention
from ringolib.web.intake import Intake, RingIntake, StoreIntake
from ringolib.web.table import Limits
from store import Store
from wsserver import Server

log = logging.getLogger("ringoexp")

DRAIN_SECONDS = 30.0
"""How long a stopping server tries to store what it has accepted."""


class StartupError(Exception):
    """The server cannot start. The text says what happened and what to do."""


def _no_thread(error: RuntimeError) -> StartupError:
    """What a thread that cannot be had is to who starts a server."""
    return StartupError(f"no thread to be had: {error} (ulimit -u limits them)")


def resolve(flag: str, host: str, port: int) -> list[Address]:
    """The addresses of a host, IPv4 first. Raises StartupError when there is none."""
    try:
        return find(host, port)
    except AddressError as error:
        hint = " (a host alone: the port is another flag)" if ":" in host or "/" in host else ""
        raise StartupError(f"{flag} {host}: {error}{hint}") from error


def is_own_consumer(settings: Settings) -> bool:
    """True when the consumer's address is this publisher's own. Raises StartupError for names that do not resolve, if
    there is only one, and for an address of its own among several.
    """
    own = resolve("-H", settings.hostname, settings.port)
    several = len(settings.consumers) > 1
    for host, port in settings.consumers:
        try:
            theirs = resolve("-U", host, port)
        except StartupError:
            if several:
                continue
            raise
        if any(is_same_listener(address, listening) for address in theirs for listening in own):
            if several:
                raise StartupError(
                    f"-U {format_address(host, port)}: that is this publisher itself, which cannot be one of several consumers: "
                    "leave it out"
                )
            return True
    return False


class App:
    """A server put together: what there is of store, ring and forwarder, and the HTTP server before them.

    Raises StartupError or StoreError when one of them cannot be had; nothing is left open then.
    """

    def __init__(self, settings: Settings, argv: Sequence[str]) -> None:
        target = parse_url(settings.database) if is_clickhouse_url(settings.database) else None
        if target:  # from here on nobody knows the password but the store
            settings = replace(settings, database=target.display_url)
        self.settings = settings
        self.argv = [redact_passwords(each) for each in argv]
        self.totals = Totals()
        self.store: Storage | None = None
        self.ring: Ring | None = None
        self.forwarder: Forwarder | None = None
        self.consumers: Consumers | None = None
        self.spool: spool.Spool | None = None
        self.retention: Retention | None = None
        addresses = resolve("-H", settings.hostname, settings.port)
        try:
            own = not settings.is_publisher or is_own_consumer(settings)
        except StartupError as error:  # names come and go with the network; with a spool, ingest does not
            if not settings.spool:
                raise
            log.warning("consumer_unresolved", {"reason": str(error)})
            own = False
        self.credentials = _read_keys(settings)
        theirs = named(settings)
        if not own and settings.database != DATABASE:
            raise StartupError(
                f"-D {settings.database}: this publisher has no database, it forwards to "
                f"{theirs} (-U and -T, the same as -H and -p, make it its own consumer)"
            )
        if not own and settings.retain:
            raise StartupError(
                f"--retain {settings.retain:g}: this publisher has no database, it forwards to "
                f"{theirs} (--retain is that consumer's)"
            )
        if own and settings.spool:
            raise StartupError(
                f"-S {settings.spool}: this publisher stores in its own database, it needs no spool "
                "(-U and -T name a consumer elsewhere)"
            )
        with ExitStack() as undo:
            try:
                listeners = Listeners(format_address(settings.hostname, settings.port), addresses)
            except AddressError as error:
                hint = "-H names another address"
                if "in use" in str(error):
                    hint = "is one running already? -H and -p name another address; a complete system there needs -T "
                    hint += "too, the same as -p"
                raise StartupError(str(error) if unix_path(settings.hostname) else f"{error} ({hint})") from error
            limits = Limits(settings.max_connections, settings.per_address)
            self.server = Server(listeners, settings.name, limits, self.credentials, self.totals)
            undo.callback(self.server.close)
            self.profiler = self._open_profiler()
            if self.profiler:
                undo.callback(self.profiler.close)
            if not own:
                try:
                    self.consumers = Consumers(settings.consumers, self._make_destination, by_name=bool(settings.spool))
                except AddressError as error:
                    raise StartupError(str(error)) from error
                undo.callback(self.consumers.stop, 1)
            if own and target:
                self.store = ClickHouse(target, settings.clickhouse_cluster, settings.retain)
                undo.callback(self.store.close)
            elif own:
                self.store = store = Store(settings.database)
                undo.callback(self.store.close)
            if own and not target and settings.retain:
                try:
                    self.retention = Retention(store, settings.retain)
                except RuntimeError as error:
                    raise _no_thread(error) from error
                undo.callback(self.retention.stop, 5)
            if settings.is_publisher:
                try:
                    self.ring = Ring(settings.ring_size)
                except MemoryError:
                    raise StartupError(f"-r {settings.ring_size}: not that much memory to be had") from None
                try:
                    destinations = (
                        self.consumers.destinations if self.consumers else [Destination(self._make_store_sink)]
                    )
                    if settings.spool and destinations[0].link:
                        link = self._make_link(destinations[0], lambda: None)
                        self.spool = spool.Spool(settings.spool, settings.spool_max, link, destinations[0].link)
                        undo.callback(self.spool.stop, 5)
                    most = settings.spool_max if self.spool else BATCH_RECORDS
                    self.forwarder = Forwarder(self.ring, destinations, settings.most_workers, most)
                    if self.consumers:
                        self.consumers.start(self.forwarder)
                except RuntimeError as error:
                    raise _no_thread(error) from error
            undo.pop_all()
        self._report = Report(
            Sources(
                settings=settings,
                argv=self.argv,
                totals=self.totals,
                server=self.server,
                credentials=self.credentials,
                ring=self.ring,
                store=self.store,
                spool=self.spool,
                forwarder=self.forwarder,
                forwards=self.consumers is not None,
                retention=self.retention,
            )
        )

    def start(self) -> None:
        """Begins to serve. Raises StartupError."""
        self._say_who_may_come()
        intake: Intake
        if self.ring:
            intake = RingIntake(self.ring, self.settings.ack == "ring")
        else:
            assert self.store
            intake = StoreIntake(self.store)
        try:
            self.server.serve(intake, self._report)
            if self.profiler:
                self.profiler.start()
        except RuntimeError as error:
            raise _no_thread(error) from error
        if self.profiler:
            where = {"host": self.settings.profiler_host, "port": self.profiler.port}
            log.log(logging.INFO if self.profiler.loopback else logging.WARNING, "profiling", where)

    def reload(self) -> None:
        """Reads token and certificates again; connections that are open keep what they have."""
        try:
            self.credentials.reload()
        except CredentialError as error:
            log.error("not_reloaded", {"reason": str(error)})
            return
        log.info("reloaded")
        self._say_who_may_come()

    def _say_who_may_come(self) -> None:
        """One line if that is everybody who can connect, and one if the certificate will be refused."""
        if not self.credentials.current.token and not self.server.listeners.loopback and not self.settings.client_ca:
            hint = "whoever can connect may write and look on: --token_file keeps others out"
            log.warning("no_token", {"address": format_address(self.settings.hostname, self.server.port), "hint": hint})
        if trouble := self.credentials.certificate_problem():
            log.warning("certificate", {"file": self.settings.tls_cert, "reason": trouble})

    def _open_profiler(self) -> Profiler | None:
        """The profiler's port, if there is to be one. Raises StartupError."""
        settings = self.settings
        if not settings.profiler_port:
            return None
        host, port = settings.profiler_host, settings.profiler_port
        addresses = resolve("--profiler_host", host, port)
        try:
            return Profiler(Listeners(format_address(host, port), addresses), host, settings.name, self.credentials)
        except AddressError as error:
            raise StartupError(f"-L: {error} (-L and --profiler_host name another address)") from error

    def _make_store_sink(self, connected: Callable[[], None]) -> Sink:
        assert self.store
        return StoreSink(self.store)

    def _make_destination(self, place: Endpoint, lost: Callable[[], None]) -> Destination:
        def make_sink(connected: Callable[[], None]) -> Sink:
            link = self._make_link(destination, connected)
            return spool.SpoolSink(link, self.spool) if self.spool else link

        spooled = bool(self.settings.spool)
        alone = len(self.settings.consumers) == 1 and (spooled or is_fixed(place.name))
        destination = Destination(
            make_sink, LinkState(str(place)), place, place.host == place.name, lost, spooled, alone
        )
        return destination

    def _make_link(self, destination: Destination, connected: Callable[[], None]) -> LinkSink:
        assert destination.endpoint
        host, port, name = destination.endpoint
        patience = spool.ACK_TIMEOUT_SECONDS if self.settings.spool else None
        is_own = self.server.listeners.is_own
        return LinkSink(host, port, connected, patience, is_own, self.credentials, name)

    def stored(self) -> int:
        """Records stored since the start."""
        store = self.store.stats() if self.store else None
        return records_stored(store, self.ring.stats() if self.ring else None)

    def unstored(self) -> int:
        """Records that were taken and are not stored."""
        if not self.ring:
            return 0
        ring = self.ring.stats()
        return ring.cursor - ring.stored

    def stop(self) -> None:
        """The ordered stop: returns within DRAIN_SECONDS and a little, with everything ended, unless a disk hangs."""
        deadline = monotonic() + DRAIN_SECONDS
        if unstored := self.unstored():
            hint = "a second signal gives them up"
            log.warning("draining", {"unstored": unstored, "seconds": DRAIN_SECONDS, "hint": hint})
        if self.retention:  # first: what is to be stored has the database to itself
            self.retention.stop(5)
        self.server.stop()
        ended = self.server.wait_ended(DRAIN_SECONDS)
        if self.ring:
            if ended:
                self.ring.close()
                self.ring.join(max(0.0, deadline - monotonic()))
            if not ended or self.unstored():
                self.ring.abort()  # from here on nobody waits for what is not stored
        if not ended and not self.server.wait_ended(5):
            self.server.abort()
            self.server.wait_ended(5)
        self.server.close()
        if self.profiler:  # to the end: why does it not stop?
            self.profiler.close()
        if self.consumers:
            self.consumers.stop(1)
        if self.forwarder:
            self.forwarder.stop(5)
        if self.spool:
            self.spool.stop(5)
        if self.store:
            self.store.close()

    def alive(self) -> bool:
        """True when somebody accepts, and every lock could be had that a record needs: a restart mends what keeps one.

        It does not mend a disk or a consumer; none of these locks is held while one is waited for.
        """
        self.totals.snapshot()
        links = [destination.link for destination in self.consumers.destinations] if self.consumers else []
        for room in (self.ring, self.forwarder, *links, self.spool, self.spool and self.spool.store, self.store):
            if room:
                room.stats()
        return self.server.accepting


def _read_keys(settings: Settings) -> Credentials:
    """Token and certificates. Raises StartupError."""
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


def named(settings: Settings) -> str:
    """The consumers, for people."""
    *rest, last = [format_address(host, port) for host, port in settings.consumers]
    return f"{', '.join(rest)} and {last}" if rest else last
