"""An attached process: its connections, its lookups, its puts."""
