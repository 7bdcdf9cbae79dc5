"""The soak: a storm of kills, stops, limits, forgeries and cancellations over all kinds of sessions.

    python -m tests.soak --minutes 30          # from the repository's root; or make soak MINUTES=30

The conductor (`storm.py`) has imported torch, holds no cache and starts no thread, so it forks the
owners and workers itself, in milliseconds. What they count lies in shared memory (`board.py`) and
outlives their death. Every feature's bytes tell which feature they are (`content.py`).
"""
