"""Clients: the exactly-once producer, and the `ringoexp send` command."""
