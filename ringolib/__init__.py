"""The parts that Ringo Exp is made of; the four files beside this package put them to work.

    wire, timing, counters    message formats; deadlines, retries, threads; totals and histograms
    net                       sockets, addresses, TLS, credentials, WebSocket frames
    storage                   the interface of all stores, group commit, SQLite files, retention, ClickHouse
    options                   the command-line options
    forward, client           workers that drain the ring; the producer and the `send` command
    web                       HTTP connections, ingest sessions, the live page
    status                    what a server reports about itself
    app                       builds, starts and stops a server

A line may import from the lines above it, never from the lines below it.
"""

__version__ = "0.1.0"
