"""The rooms that a client was given ahead: slots that it may claim for its next puts."""

import threading
from collections.abc import Sequence

from featcache.control.rooms import MAX_ROOMS, Room


class RoomsAhead:
    """Rooms of one pool, the newest last. The owner may have taken some back: that is seen in its words.

    Safe in any thread: a room goes to one caller of `pop`.
    """

    def __init__(self) -> None:
        self._rooms: list[Room] = []
        self._lock = threading.Lock()
        self.come = False
        """Whether any ever came."""
        self._low = 0

    def add(self, rooms: Sequence[Room]) -> None:
        """Add new ones, and forget the oldest beyond a bound."""
        self.come = True
        if not rooms:
            return
        with self._lock:
            self._rooms += rooms
            if len(self._rooms) > MAX_ROOMS:
                del self._rooms[:-MAX_ROOMS]
            self._low = len(self._rooms) // 2

    def run_low(self) -> bool:
        """Return whether half of them are used up; said once, until new ones come."""
        if len(self._rooms) > self._low:
            return False
        self._low = -1
        return True

    def pop(self, nbytes: int) -> Room | None:
        """Return the newest that is large enough: its bytes are the likeliest to be in the cache."""
        with self._lock:
            rooms = self._rooms
            for at in range(len(rooms) - 1, -1, -1):
                if rooms[at].nbytes >= nbytes:
                    return rooms.pop(at)
        return None
