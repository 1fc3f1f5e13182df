"""Everything a server reports about itself: stats, metrics, readiness, logs, profiles, and systemd messages."""
