"""Forwarding: worker threads that take batches from the ring and store them at a destination, or in the spool."""
