"""A benchmark of featcache beside what people use instead, run by hand: see host.py."""
