"""Status: what a server reports about itself: stats, metrics, readiness, logs, profiler, systemd."""
