"""A server put together: store, ring, workers and the HTTP server, as the flags say; and their ordered stop.

The main thread builds it, has it read its keys again, and stops it: connections first, then the ring, the workers and
the store. What `Monitor` and `notify` ask, any thread may ask, once it is built; each room guards its own.
"""

import datetime
import logging
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from time import monotonic
from typing import Any

from ringbuffer import Ring
from ringolib import __version__
from ringolib.counters import Totals
from ringolib.forward import spool
from ringolib.forward.destination import Outlet
from ringolib.forward.discovery import Consumers
from ringolib.forward.link import LinkSink, LinkState
from ringolib.forward.sink import Sink, StoreSink
from ringolib.forward.workers import BATCH_RECORDS, Forwarder
from ringolib.net.addresses import Address, AddressError, Place, is_fixed, reaches, shown, unix_path
from ringolib.net.addresses import resolve as find
from ringolib.net.credentials import Access, BadKeys, Files
from ringolib.net.listeners import Listeners
from ringolib.options import DATABASE, Settings
from ringolib.status import prometheus as metrics
from ringolib.status import report as monitor
from ringolib.status.probe import Reason
from ringolib.status.process import memory
from ringolib.status.profiler import Profiler
from ringolib.status.readiness import Readiness
from ringolib.storage.clickhouse import http as clickhouse_http
from ringolib.storage.clickhouse.store import ClickHouse
from ringolib.storage.interface import Storage
from ringolib.storage.retention import Retention
from ringolib.timing import iso
from ringolib.web.intake import Intake, RingIntake, StoreIntake
from store import Store
from wsserver import Server

log = logging.getLogger("ringoexp")

DRAIN_SECONDS = 30.0
"""How long a stopping server tries to store what it has accepted."""


class CannotRun(Exception):
    """The server cannot start. The text says what happened and what to do."""


def _no_thread(error: RuntimeError) -> CannotRun:
    """What a thread that cannot be had is to who starts a server."""
    return CannotRun(f"no thread to be had: {error} (ulimit -u limits them)")


def resolve(flag: str, host: str, port: int) -> list[Address]:
    """The addresses of a host, IPv4 first. Raises CannotRun when there is none."""
    try:
        return find(host, port)
    except AddressError as error:
        hint = " (a host alone: the port is another flag)" if ":" in host or "/" in host else ""
        raise CannotRun(f"{flag} {host}: {error}{hint}") from error


def is_own_consumer(settings: Settings) -> bool:
    """True when the consumer's address is this publisher's own. Raises CannotRun for names that do not resolve, if
    there is only one, and for an address of its own among several.
    """
    own = resolve("-H", settings.hostname, settings.port)
    several = len(settings.consumers) > 1
    for host, port in settings.consumers:
        try:
            theirs = resolve("-U", host, port)
        except CannotRun:
            if several:
                continue
            raise
        if any(reaches(address, listening) for address in theirs for listening in own):
            if several:
                raise CannotRun(
                    f"-U {shown(host, port)}: that is this publisher itself, which cannot be one of several consumers: "
                    "leave it out"
                )
            return True
    return False


class Parts:
    """A server put together: what there is of store, ring and forwarder, and the HTTP server before them.

    Raises CannotRun or StoreError when one of them cannot be had; nothing is left open then.
    """

    def __init__(self, settings: Settings, argv: Sequence[str]) -> None:
        target = clickhouse_http.parse(settings.database) if clickhouse_http.is_address(settings.database) else None
        if target:  # from here on nobody knows the password but the store
            settings = replace(settings, database=target.shown)
        self.settings = settings
        self.argv = [clickhouse_http.redacted(each) for each in argv]
        self.uuid = str(uuid.uuid4()).upper()
        self.started = datetime.datetime.now(datetime.timezone.utc)
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
        except CannotRun as error:  # names come and go with the network; with a spool, ingest does not
            if not settings.spool:
                raise
            log.warning("consumer_unknown", {"reason": str(error)})
            own = False
        self.access = _read_keys(settings)
        theirs = named(settings)
        if not own and settings.database != DATABASE:
            raise CannotRun(
                f"-D {settings.database}: this publisher has no database, it forwards to "
                f"{theirs} (-U and -T, the same as -H and -p, make it its own consumer)"
            )
        if not own and settings.retain:
            raise CannotRun(
                f"--retain {settings.retain:g}: this publisher has no database, it forwards to "
                f"{theirs} (--retain is that consumer's)"
            )
        if own and settings.spool:
            raise CannotRun(
                f"-S {settings.spool}: this publisher stores in its own database, it needs no spool "
                "(-U and -T name a consumer elsewhere)"
            )
        with ExitStack() as undo:
            try:
                listeners = Listeners(shown(settings.hostname, settings.port), addresses)
            except AddressError as error:
                hint = "-H names another address"
                if "in use" in str(error):
                    hint = "is one running already? -H and -p name another address; a complete system there needs -T "
                    hint += "too, the same as -p"
                raise CannotRun(str(error) if unix_path(settings.hostname) else f"{error} ({hint})") from error
            limits = settings.most_connections, settings.per_address
            self.server = Server(listeners, settings.name, *limits, self.access, self.totals, self)
            undo.callback(self.server.close)
            self.profiler = self._open_profiler()
            if self.profiler:
                undo.callback(self.profiler.close)
            if not own:
                try:
                    self.consumers = Consumers(settings.consumers, self._make_outlet, by_name=bool(settings.spool))
                except AddressError as error:
                    raise CannotRun(str(error)) from error
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
                    raise CannotRun(f"-r {settings.ring_size}: not that much memory to be had") from None
                try:
                    outlets = self.consumers.outlets if self.consumers else [Outlet(self._make_store_sink)]
                    if settings.spool and outlets[0].link:
                        link = self._make_link(outlets[0], lambda: None)
                        self.spool = spool.Spool(settings.spool, settings.spool_max, link, outlets[0].link)
                        undo.callback(self.spool.stop, 5)
                    most = settings.spool_max if self.spool else BATCH_RECORDS
                    self.forwarder = Forwarder(self.ring, outlets, settings.most_workers, most)
                    if self.consumers:
                        self.consumers.start(self.forwarder)
                except RuntimeError as error:
                    raise _no_thread(error) from error
            undo.pop_all()
        to_consumers = self.forwarder if self.consumers else None
        self._readiness = Readiness(self.ring, self.store, self.spool, to_consumers, self.access)

    def start(self) -> None:
        """Begins to serve. Raises CannotRun."""
        self._say_who_may_come()
        intake: Intake
        if self.ring:
            intake = RingIntake(self.ring, self.settings.ack == "ring")
        else:
            assert self.store
            intake = StoreIntake(self.store)
        try:
            self.server.serve(intake)
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
            self.access.reload()
        except BadKeys as error:
            log.error("not_reloaded", {"reason": str(error)})
            return
        log.info("reloaded")
        self._say_who_may_come()

    def _say_who_may_come(self) -> None:
        """One line if that is everybody who can connect, and one if the certificate will be refused."""
        if not self.access.keys.token and not self.server.listeners.loopback and not self.settings.client_ca:
            hint = "whoever can connect may write and look on: --token_file keeps others out"
            log.warning("no_token", {"address": shown(self.settings.hostname, self.server.port), "hint": hint})
        if trouble := self.access.trouble():
            log.warning("certificate", {"file": self.settings.tls_cert, "reason": trouble})

    def _open_profiler(self) -> Profiler | None:
        """The profiler's port, if there is to be one. Raises CannotRun."""
        settings = self.settings
        if not settings.profiler_port:
            return None
        host, port = settings.profiler_host, settings.profiler_port
        addresses = resolve("--profiler_host", host, port)
        try:
            return Profiler(Listeners(shown(host, port), addresses), host, settings.name, self.access)
        except AddressError as error:
            raise CannotRun(f"-L: {error} (-L and --profiler_host name another address)") from error

    def _make_store_sink(self, connected: Callable[[], None]) -> Sink:
        assert self.store
        return StoreSink(self.store)

    def _make_outlet(self, place: Place, lost: Callable[[], None]) -> Outlet:
        def make_sink(connected: Callable[[], None]) -> Sink:
            link = self._make_link(outlet, connected)
            return spool.SpoolSink(link, self.spool) if self.spool else link

        spooled = bool(self.settings.spool)
        alone = len(self.settings.consumers) == 1 and (spooled or is_fixed(place.name))
        outlet = Outlet(make_sink, LinkState(str(place)), place, place.host == place.name, lost, spooled, alone)
        return outlet

    def _make_link(self, outlet: Outlet, connected: Callable[[], None]) -> LinkSink:
        assert outlet.place
        host, port, name = outlet.place
        patience = spool.PATIENCE if self.settings.spool else None
        is_own = self.server.listeners.is_own
        return LinkSink(host, port, connected, patience, is_own, self.access, name)

    def identity(self) -> str | None:
        """The database that records go to from here without a link in between; None if there is none."""
        return self.store.identity if self.store else None

    def stored(self) -> int:
        """Records stored since the start."""
        store = self.store.stats() if self.store else None
        return monitor.records_stored(store, self.ring.stats() if self.ring else None)

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
        links = [outlet.link for outlet in self.consumers.outlets] if self.consumers else []
        for room in (self.ring, self.forwarder, *links, self.spool, self.spool and self.spool.store, self.store):
            if room:
                room.stats()
        return self.server.accepting

    def snapshot(self) -> monitor.Snapshot:
        """What all the rooms say now."""
        totals = self.totals.snapshot()  # first: what is acked is stored
        database = self.store or (self.spool.store if self.spool else None)
        disk = database.stats() if database else None
        return monitor.Snapshot(
            version=__version__,
            started_at=self.started.timestamp(),
            totals=totals,
            connections=self.server.stats(),
            ring=self.ring.stats() if self.ring else None,
            layout=self.ring.layout() if self.ring else None,
            forwarder=self.forwarder.stats() if self.forwarder else None,
            consumers=self._readiness.consumers(),
            store=disk if self.store else None,
            spool=self.spool.stats() if self.spool else None,
            retention=self.retention.stats() if self.retention else None,
            disk=disk,
            sizes=database.sizes() if database else None,
            certificate_ends=self.access.keys.valid[1] if self.access.keys.valid else None,
            not_ready=[reason.code for reason in self._readiness.reasons(wait=False)],
        )

    def report(self) -> dict[str, Any]:
        """What `/v1.0/stats` says. The README explains each key."""
        settings = {_camel(key): value for key, value in asdict(self.settings).items()}
        settings["port"] = self.server.port
        now = self.snapshot()
        return {
            "info": {"version": __version__, "uuid": self.uuid, **settings},
            "options": self.argv,
            "stats": {"startTime": iso(self.started), **monitor.stats(now)},
            "ring": monitor.layout(now),
            "memStats": memory(),
        }

    def metrics(self) -> str:
        """What `/metrics` says."""
        return metrics.text(self.snapshot())

    def reasons(self) -> list[Reason]:
        """Why a record sent now would not be stored now, but for what the connections have to say."""
        return self._readiness.reasons()


def _read_keys(settings: Settings) -> Access:
    """Token and certificates. Raises CannotRun."""
    files = Files(
        settings.token_file,
        settings.tls_cert,
        settings.tls_key,
        settings.client_ca,
        settings.consumer_tls,
        settings.consumer_ca,
    )
    try:
        return Access(files)
    except BadKeys as error:
        raise CannotRun(str(error)) from error


def named(settings: Settings) -> str:
    """The consumers, for people."""
    *rest, last = [shown(host, port) for host, port in settings.consumers]
    return f"{', '.join(rest)} and {last}" if rest else last


def _camel(name: str) -> str:
    head, *tail = name.split("_")
    return head + "".join(word.capitalize() for word in tail)
