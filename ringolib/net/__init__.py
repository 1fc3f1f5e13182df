"""The network without records: addresses, sockets, TLS, credentials, and WebSocket frames and connections."""
