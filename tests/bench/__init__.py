"""A benchmark of featcache beside other systems, run by hand: see host.py."""
