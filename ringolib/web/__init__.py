"""The HTTP server without its routes: connections, requests, header checks, and the ingest sessions of WebSockets."""
