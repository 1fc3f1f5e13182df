"""The parts of Ringo Exp, in layers, together with the four files beside this package.

    wire, timing, counters    message formats; deadlines, retries, threads; totals and histograms
    net                       sockets, addresses, TLS, credentials, WebSocket frames
    [ringbuffer]              the ring
    storage, [store]          the interface of all stores, group commit, retention, ClickHouse; the SQLite store
    options                   the command-line options
    forward, client           workers that drain the ring; the producer and the `send` command
    web                       HTTP connections, ingest sessions, the live page
    status                    what a server reports about itself
    [wsserver]                HTTP routes, and the upgrade to WebSocket
    app                       builds, starts and stops a server
    [ringoexp]                the program

A module may import from the lines above it, never from the lines below it.
"""

__version__ = "0.2.0"
