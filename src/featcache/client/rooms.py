"""The rooms that a client was given ahead: slots that it may claim for its next puts."""

from collections.abc import Sequence

from featcache.control.rooms import MAX_ROOMS, Room


class RoomsAhead:
    """Rooms of one pool, the newest last. The owner may have taken some back: that is seen in its words."""

    def __init__(self) -> None:
        self._rooms: list[Room] = []
        self.come = False
        """Whether any ever came."""

    def add(self, rooms: Sequence[Room]) -> None:
        """Add new ones, and forget the oldest beyond a bound."""
        self.come = True
        self._rooms += rooms
        if len(self._rooms) > MAX_ROOMS:
            del self._rooms[:-MAX_ROOMS]

    def pop(self, nbytes: int) -> Room | None:
        """Return the newest that is large enough: its bytes are the likeliest to be in the cache."""
        rooms = self._rooms
        for at in range(len(rooms) - 1, -1, -1):
            if rooms[at].nbytes >= nbytes:
                return rooms.pop(at)
        return None
