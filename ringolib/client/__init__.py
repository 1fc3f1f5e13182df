"""Clients of a server: the exactly-once producer, and the command `ringoexp send`."""
