"""What users hold: the cache, the client, and what makes them."""
