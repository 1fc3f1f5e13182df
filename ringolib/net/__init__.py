"""Network: sockets, addresses, TLS, credentials and WebSocket frames. Knows no records."""
