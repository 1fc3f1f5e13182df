"""Web: the HTTP server without its routes, ingest sessions, and the live page."""
