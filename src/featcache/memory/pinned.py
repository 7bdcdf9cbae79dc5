"""A host slab whose pages the CUDA driver knows: GPUs copy to and from it at the speed of the bus."""

from contextlib import suppress

from featcache.memory.driver import Driver, DriverError
from featcache.memory.host import HostSlab

__all__ = ["PinnedSlab"]


class PinnedSlab(HostSlab):
    """Registers what is committed. Where the driver refuses, pages stay as they are, only slower."""

    def __init__(
        self, driver: Driver, ordinal: int, capacity_bytes: int, *, huge_pages: bool
    ) -> None:
        super().__init__(capacity_bytes, huge_pages=huge_pages)
        self._driver = driver
        self._ordinal = ordinal
        self._pinned: dict[int, int] = {}

    def commit(self, start_bytes: int, stop_bytes: int, *, prefault: bool) -> None:
        """Reserve and pin."""
        super().commit(start_bytes, stop_bytes, prefault=prefault)
        base = self._open()[1]
        with suppress(DriverError, MemoryError), self._driver.on(self._ordinal):
            self._driver.register(base + start_bytes, stop_bytes - start_bytes)
            self._pinned[start_bytes] = stop_bytes

    def decommit(self, start_bytes: int, stop_bytes: int) -> None:
        """Unpin and give back. What was pinned together is unpinned together."""
        self._unpin(start_bytes)
        super().decommit(start_bytes, stop_bytes)

    def _unpin(self, from_bytes: int) -> None:
        base = self._open()[1]
        for start_bytes in [start for start, stop in self._pinned.items() if stop > from_bytes]:
            stop_bytes = self._pinned.pop(start_bytes)
            with suppress(DriverError, MemoryError), self._driver.on(self._ordinal):
                self._driver.unregister(base + start_bytes)
                if start_bytes < from_bytes < stop_bytes:
                    self._driver.register(base + start_bytes, from_bytes - start_bytes)
                    self._pinned[start_bytes] = from_bytes

    def close(self) -> None:
        """Unpin and drop everything."""
        if self._region is not None:
            self._unpin(0)
        super().close()

    def forget(self) -> None:
        """Drop the mapping in a forked child, where CUDA calls fail."""
        self._pinned.clear()
        super().close()
