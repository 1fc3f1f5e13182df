"""The ClickHouse store, for consumers that outgrow one disk."""
