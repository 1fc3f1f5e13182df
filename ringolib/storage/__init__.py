"""Storage: the interface of all stores, group commit, SQLite files, retention and ClickHouse."""
