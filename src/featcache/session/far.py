"""Refs of other hosts: a read of one becomes a read of the copy that this host's owner fetches."""

from featcache.ref import FeatureRef


class Elsewhere(Exception):
    """Raised within a read of another host's ref: its bytes are here now, under another ref.

    It never reaches a user.
    """

    def __init__(self, ref: FeatureRef, left_s: float | None) -> None:
        super().__init__(ref)
        self.ref = ref
        """Of a pool of this host; it owes this session's read."""
        self.left_s = left_s
        """What is left of the read's time."""
