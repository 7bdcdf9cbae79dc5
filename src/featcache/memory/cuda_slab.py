"""A slab on a GPU, as its owner has it."""

import torch

from featcache.errors import BackendUnavailable, CacheClosed, SettingsError
from featcache.memory import copies
from featcache.memory.backing import IPC, VMM, IpcBacking, SegmentBacking
from featcache.memory.cuda import SLOWER, CudaMapping
from featcache.memory.driver import Driver
from featcache.memory.lane import Order
from featcache.memory.slab import Parts, Segment

__all__ = ["CudaSlab", "choose_backend"]


def choose_backend(driver: Driver, ordinal: int, wanted: str) -> tuple[str, str]:
    """Return the kind of slab to make on a device, and why.

    Raises:
        BackendUnavailable: `wanted` is ``"vmm"`` and the device can't.

    """
    able = driver.can_share_segments(ordinal)
    if wanted == "ipc":
        return IPC, "Settings.backend asks for it"
    if able:
        why = "Settings.backend asks for it" if wanted == "vmm" else "the device can share segments"
        return VMM, why
    if wanted == "vmm":
        raise BackendUnavailable(
            "this device can't share memory segments by descriptor: Settings(backend='ipc')"
        )
    return IPC, "the device can't share memory segments by descriptor"


class CudaSlab(CudaMapping):
    """The owner's mapping, and the memory behind it."""

    def __init__(
        self, driver: Driver, kind: str, ordinal: int, capacity_bytes: int, segment_bytes: int
    ) -> None:
        self.kind = kind
        self.capacity_bytes = capacity_bytes
        self.device_name = driver.uuid_of(ordinal)
        self._segment_bytes = segment_bytes
        backing: SegmentBacking | IpcBacking
        if kind == VMM:
            backing = SegmentBacking(driver, ordinal, capacity_bytes, write=True)
        else:
            backing = IpcBacking(driver, ordinal, capacity_bytes)
        self._memory = backing
        try:
            super().__init__(driver, backing, ordinal)
        except BaseException:
            backing.close()
            raise

    @property
    def handle(self) -> bytes:
        """The legacy handle that readers open; empty where segments are sent instead."""
        return self._memory.handle if isinstance(self._memory, IpcBacking) else b""

    def descriptors(self) -> list[int]:
        """Return none: segments are sent one by one, as they are made."""
        return []

    def segments(self, start_bytes: int, stop_bytes: int) -> list[Segment]:
        """Return the segments that lie in a part of the range."""
        if isinstance(self._memory, IpcBacking):
            return []
        return [
            Segment(mapped.start_bytes, mapped.size_bytes, mapped.fd)
            for mapped in self._memory.segments
            if start_bytes <= mapped.start_bytes < stop_bytes
        ]

    def commit(self, start_bytes: int, stop_bytes: int, *, prefault: bool) -> None:
        """Make segments. What is there from the start is one, however large: it never goes back."""
        if isinstance(self._memory, IpcBacking):
            return
        if self.end_bytes > start_bytes:  # what the driver did not let go of when it was asked to
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
        """Give segments back. The memory is free once no session has them mapped any more."""
        self.cut(start_bytes)

    # --- writing ----------------------------------------------------------------------------------

    def stage(self, parts: Parts) -> tuple[Parts, Order | None]:
        """Return the parts on this device or the host, and the caller's place in its stream's order.

        None is the order where no part is on a GPU: what is on the host is there already.
        """
        ordinal, on_device = self._ordinal, False
        for _, tensor in parts:
            where = tensor.get_device()
            if where == ordinal:
                on_device = True
            elif where >= 0:
                # torch orders a copy between devices after both their current streams.
                device = self._home.device
                parts = [
                    (spec, part.to(device) if part.get_device() >= 0 else part)
                    for spec, part in parts
                ]
                on_device = True
                break
        return parts, self._home.order() if on_device else None

    def staged_bytes(self, parts: Parts) -> int:
        """Return how many bytes of host memory would hold up a thread as long as `write` does."""
        return sum(tensor.nbytes for _, tensor in parts if tensor.get_device() < 0) * SLOWER

    def write(self, offset_bytes: int, parts: Parts, order: Order | None) -> None:
        """Copy staged tensors in: from the GPU enqueued at `order`, from the host done on return."""
        lane = self._home
        if lane.storage is None:
            raise CacheClosed("this mapping of the slab is closed")
        for spec, tensor in parts:
            nbytes = tensor.nbytes
            if not nbytes:
                continue
            at = lane.address + offset_bytes + spec.offset_bytes
            where = tensor.get_device()
            if where != lane.ordinal or order is None:
                if where >= 0:
                    raise SettingsError("a part was not staged")
                plain = tensor if copies.is_plain(tensor) else _made_plain(tensor)
                lane.copy_now(at, plain.data_ptr(), nbytes)
            elif tensor.is_contiguous() and not (tensor.is_neg() or tensor.is_conj()):
                lane.copy(at, tensor.data_ptr(), nbytes, order.stream)
            else:
                with lane.at(order):
                    copies.copy(self.view(offset_bytes, spec), tensor)


def _made_plain(tensor: torch.Tensor) -> torch.Tensor:
    plain = torch.empty(tensor.shape, dtype=tensor.dtype)
    copies.copy(plain, tensor)
    return plain
