"""The keyed storm: readers that find keys by themselves, while all that they read is taken from under them.

    python -m tests.soak --keyed --reads 10000000          # or make soak ARGS="--keyed --reads 10000000"

A slab that is too small, under puts of the same keys with other sizes, evictions, pins, refs that
expire, growth and shrinking; each extent is poisoned as it is freed. Readers, awaiting and
blocking, in several threads and on several streams, are killed and stopped at random and at each named step
of a hit, owners are stopped and killed, and every byte of every read is checked.
"""
