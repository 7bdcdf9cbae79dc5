"""The owner's side of a slab on a GPU."""

from featcache.memory.cuda.backing import VMM, IpcBacking, SegmentBacking
from featcache.memory.cuda.driver import Driver
from featcache.memory.cuda.mapping import CudaMapping
from featcache.memory.slab import Segment


class CudaSlab(CudaMapping):
    """The owner's mapping, and the memory behind it."""

    handle = b""  # but for legacy IPC
    quick_commit_bytes = 0

    def __init__(
        self, driver: Driver, kind: str, ordinal: int, capacity_bytes: int, segment_bytes: int
    ) -> None:
        self.kind = kind
        self.capacity_bytes = capacity_bytes
        self.ordinal = ordinal
        self.device_name = driver.uuid_of(ordinal)
        self._segment_bytes = segment_bytes
        self._memory: SegmentBacking | IpcBacking
        if kind == VMM:
            self._memory = SegmentBacking(driver, ordinal, capacity_bytes, write=True)
        else:
            self._memory = IpcBacking(driver, ordinal, capacity_bytes)
            self.handle = self._memory.handle
        super().__init__(driver, self._memory, ordinal)
        assert self._home.storage is not None, "a new mapping is open"
        self._target = (self._home.address, self._home.storage)

    def descriptors(self) -> list[int]:
        """Return none: segments are sent one by one, as they are made, and serve for writing too."""
        return []

    write_descriptors = descriptors

    def segments(self, start_bytes: int, stop_bytes: int) -> list[Segment]:
        if isinstance(self._memory, IpcBacking):
            return []
        return [
            Segment(mapped.start_bytes, mapped.size_bytes, mapped.fd)
            for mapped in self._memory.segments
            if start_bytes <= mapped.start_bytes < stop_bytes
        ]

    def commit(self, start_bytes: int, stop_bytes: int, *, prefault: bool) -> None:
        """Create segments. The initial bytes are one, however large: they are never released."""
        if isinstance(self._memory, IpcBacking):
            return
        if self.end_bytes > start_bytes:  # a segment that the driver would not unmap
            self._memory.cut(start_bytes)
        step_bytes = self._segment_bytes if start_bytes else stop_bytes
        at = start_bytes
        try:
            while at < stop_bytes:
                size_bytes = min(step_bytes, stop_bytes - at)
                self._memory.make(at, size_bytes)
                at += size_bytes
        except BaseException:
            self._memory.cut(start_bytes)
            raise

    def decommit(self, start_bytes: int, stop_bytes: int) -> None:
        """Release segments. Their memory is free once no session has them mapped."""
        self.cut(start_bytes)
