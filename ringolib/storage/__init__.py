"""Stores: their interface, group commit, the SQLite file, retention, and ClickHouse."""
