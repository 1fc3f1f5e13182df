"""What the tests share: servers to start, clients, fault injection, checks."""

NOT_PERMITTED = "not permitted here"
"""In the reason of a test that is skipped because of the machine, not because something is not installed."""
