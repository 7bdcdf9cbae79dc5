"""Which of several hosts is the home of a key: rendezvous hashing, by the highest random weight.

After D. G. Thaler and C. V. Ravishankar, "Using name-based mappings to increase hit rates" (IEEE/ACM
Transactions on Networking 6(1), 1998). Each host that has the same list comes to the same order; without one
of the addresses only that one's keys have another home, and they spread over all that are left.
"""

import hashlib
from collections.abc import Sequence
from typing import Final

_WEIGHT_BYTES: Final = 16
_LENGTH_BYTES: Final = 2


class Ranking:
    """The order of the addresses for each key.

    Keys are chosen by others: under a key of the cluster's own nobody can make many that have one home.
    """

    def __init__(self, cluster_key: bytes, addresses: Sequence[str]) -> None:
        """`addresses` as all hosts have them; twice the same is once."""
        secret = hashlib.blake2b(cluster_key, digest_size=32, person=b"featcache homes").digest()
        self.addresses: Final = tuple(dict.fromkeys(addresses))
        self._states = []
        for address in self.addresses:
            state = hashlib.blake2b(digest_size=_WEIGHT_BYTES, key=secret)
            text = address.encode()
            state.update(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
            self._states.append((address, state))

    def of(self, key: bytes) -> list[str]:
        """Return the addresses: first the home of a key, then the one that stands in for it, and so on."""
        weighed = []
        for address, begun in self._states:
            state = begun.copy()
            state.update(key)
            weighed.append((state.digest(), address))
        weighed.sort(reverse=True)
        return [address for _, address in weighed]
