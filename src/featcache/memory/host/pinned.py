"""A host slab in pinned memory: GPUs copy to and from it at the speed of the bus."""

from contextlib import suppress

from featcache.memory.cuda.driver import Driver, DriverError
from featcache.memory.host.slab import HostSlab


class PinnedSlab(HostSlab):
    """Pins its initial bytes in one piece, since a copy can't cross from one pinned piece to another.

    So its initial bytes should be all it will have. Where the driver refuses, it is only slower.
    """

    def __init__(
        self, driver: Driver, ordinal: int, capacity_bytes: int, *, huge_pages: bool
    ) -> None:
        self._driver = driver
        self._ordinal = ordinal
        self.pinned_bytes = 0
        # Before there is anything to close, should the driver fail.
        home, self.device_name = driver.device(ordinal), driver.uuid_of(ordinal)
        super().__init__(capacity_bytes, huge_pages=huge_pages)
        self.home = home

    def commit(self, start_bytes: int, stop_bytes: int, *, prefault: bool) -> None:
        """Reserve pages, and pin them if they are the first."""
        super().commit(start_bytes, stop_bytes, prefault=prefault)
        if start_bytes == 0:
            with suppress(DriverError, MemoryError), self._driver.on(self._ordinal):
                self._driver.register(self._open()[1], stop_bytes)
                self.pinned_bytes = stop_bytes

    def close(self) -> None:
        """Unpin, then drop the mapping and the descriptors."""
        if self.pinned_bytes and self._region is not None:
            self.pinned_bytes = 0
            # Before the unmap: the driver must not keep a registration of addresses that are gone.
            with suppress(DriverError), self._driver.on(self._ordinal):
                self._driver.unregister(self._region[1])
        super().close()

    def forget(self) -> None:
        """Drop the mapping in a forked child, where CUDA calls fail."""
        self.pinned_bytes = 0
        super().forget()
