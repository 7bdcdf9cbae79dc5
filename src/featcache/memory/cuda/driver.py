"""Checked wrappers over the calls of cuda.bindings that featcache needs.

The bindings are imported lazily: neither ``import featcache`` nor a host slab needs a GPU or the cuda
package. The module of bindings is an argument, so that tests without a GPU can pass a fake that keeps
the driver's rules.

Addresses, handles and streams are ints (the bindings' classes are made where a call needs them), sizes
are bytes, devices are ordinals of this process; between processes they are UUIDs.
"""

import importlib
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch

from featcache.errors import BackendUnavailable
from featcache.memory.cuda.rdma import RdmaCalls

_OUT_OF_MEMORY: Final = 2
_ADVICE: Final = {
    2: "the device has no such memory left",
    3: "the driver is shutting down with this process",
    4: "the driver is shutting down with this process",
    100: "no CUDA device is there: create(device='cpu'), or look at CUDA_VISIBLE_DEVICES",
    101: "no such device is visible here: look at CUDA_VISIBLE_DEVICES",
    201: "this thread has no CUDA context: torch.cuda.init() failed or was undone",
    217: "these two GPUs have no peer access: read with Settings(through_host=True)",
    304: "the operating system refused it: look at the limits on open files and locked memory",
    700: "a kernel of this process faulted, its CUDA context is lost: restart the process",
    709: "the CUDA context of this process was destroyed: restart the process",
    719: "a kernel of this process faulted, its CUDA context is lost: restart the process",
    800: "the driver does not permit it here: look at the container's devices and capabilities",
    801: "this driver or machine can't do it: try Settings(backend='ipc'), or 'vmm'",
    900: "a CUDA graph is being captured on this stream: call featcache outside the capture",
    906: "a CUDA graph is being captured in this thread: call featcache outside the capture",
}


class DriverError(BackendUnavailable):
    """A call to the CUDA driver failed; the message has the call, its code and the advice for it."""

    def __init__(self, call: str, code: int, name: str) -> None:
        advice = _ADVICE.get(code, "look at the driver's documentation of this code")
        super().__init__(f"{call}: {name} ({code}): {advice}")
        self.call = call
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        return BackendUnavailable, self.args


class DeviceMemoryError(DriverError, MemoryError):
    """A device, or the driver itself, has no memory left."""


def _torch_stream(ordinal: int) -> int:
    """Return the handle of torch's current stream on a device."""
    return int(torch.cuda.current_stream(ordinal).cuda_stream)


def _torch_lasts(ordinal: int) -> bool:
    """Whether torch's current stream of a device is one of torch's own, which it never destroys.

    The id of another's stream is its address, which is even; of torch's own but the default, 0, odd.
    """
    number: int = torch.cuda.current_stream(ordinal).stream_id
    return number == 0 or number % 2 == 1


def _torch_device(ordinal: int) -> torch.device:
    return torch.device("cuda", ordinal)


class Driver(RdmaCalls):
    """Checked calls over one module of bindings. Its only state is three tables."""

    def __init__(
        self,
        api: Any,
        current_stream: Callable[[int], int] = _torch_stream,
        device: Callable[[int], torch.device] = _torch_device,
        lasts: Callable[[int], bool] = _torch_lasts,
    ) -> None:
        super().__init__(api)
        self.current_stream = current_stream
        """Torch's current stream of a device, as the int that the driver knows it by."""
        self.device = device
        """torch's name of a device."""
        self.lasts = lasts
        """Whether torch's current stream of a device lives as long as the process."""
        self.own_allocations: dict[bytes, tuple[int, int]] = {}
        """Device and address of each allocation of this process, by its legacy handle."""
        self._contexts: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._posix_fd = api.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        self._call("cuInit", 0)

    def _call(self, name: str, *args: Any) -> Any:
        """Return the value of a call, if it has one; raise its error."""
        code, *value = getattr(self.api, name)(*args)
        if code != 0:
            self.fail(name, code)
        return value[0] if value else None

    def fail(self, call: str, code: Any) -> None:
        """Raise the error of a result other than success."""
        name = getattr(code, "name", "an unknown code")
        kind = DeviceMemoryError if code == _OUT_OF_MEMORY else DriverError
        raise kind(call, int(code), name)

    # --- devices ----------------------------------------------------------------------------------

    def device_count(self) -> int:
        return int(self._call("cuDeviceGetCount"))

    def uuid_of(self, ordinal: int) -> str:
        """Return a device's UUID, which names it between processes."""
        device = self._call("cuDeviceGet", ordinal)
        found = self._call("cuDeviceGetUuid", device)
        return str(uuid.UUID(bytes=bytes(found.bytes)))

    def ordinal_of(self, device_uuid: str) -> int | None:
        """Return this process's ordinal of a device, or None if it is hidden here."""
        ordinals = range(self.device_count())
        return next((each for each in ordinals if self.uuid_of(each) == device_uuid), None)

    def can_share_segments(self, ordinal: int) -> bool:
        """Whether a device can map memory (VMM) and export it as a file descriptor."""
        names = self.api.CUdevice_attribute
        device = self._call("cuDeviceGet", ordinal)
        needed = (
            names.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
            names.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
        )
        return all(self._call("cuDeviceGetAttribute", name, device) for name in needed)

    def can_reach(self, ordinal: int, other: int) -> bool:
        """Whether a device can read another's memory."""
        return ordinal == other or bool(self._call("cuDeviceCanAccessPeer", ordinal, other))

    def context(self, ordinal: int) -> Any:
        """Return a device's primary context, which torch uses too. Retained once, until exit."""
        with self._lock:
            context = self._contexts.get(ordinal)
            if context is None:
                device = self._call("cuDeviceGet", ordinal)
                context = self._contexts[ordinal] = self._call("cuDevicePrimaryCtxRetain", device)
        return context

    @contextmanager
    def on(self, ordinal: int) -> Iterator[None]:
        """Make a device's context this thread's current one for the length of a block."""
        self._call("cuCtxPushCurrent", self.context(ordinal))
        try:
            yield
        finally:
            # Unchecked: the block's work is done, and the next block makes its own context current.
            # A driver that shuts down says so at the next call.
            self.api.cuCtxPopCurrent()

    def enter(self, ordinal: int) -> None:
        """Make a device's context this thread's current one, until the thread ends."""
        self._call("cuCtxSetCurrent", self.context(ordinal))

    def synchronize(self, ordinal: int) -> None:
        """Wait for all work of this process on a device. Blocks."""
        with self.on(ordinal):
            self._call("cuCtxSynchronize")

    # --- segments (VMM) -----------------------------------------------------------------------------

    def _properties(self, ordinal: int, *, rdma: bool) -> Any:
        api = self.api
        prop = api.CUmemAllocationProp()
        prop.type = api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        prop.requestedHandleTypes = self._posix_fd
        prop.location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        prop.location.id = ordinal
        if rdma:
            prop.allocFlags.gpuDirectRDMACapable = 1
        return prop

    def granularity_bytes(self, ordinal: int) -> int:
        """Return the unit of the sizes and offsets of segments."""
        minimum = self.api.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        name = "cuMemGetAllocationGranularity"
        return int(self._for_cards(ordinal, lambda prop: self._call(name, prop, minimum)))

    def create(self, ordinal: int, size_bytes: int) -> Any:
        """Return a handle of new device memory, or raise MemoryError.

        It is made for network cards too (GPUDirect RDMA) where the device says that it can, and does.
        """
        return self._for_cards(ordinal, lambda prop: self._call("cuMemCreate", size_bytes, prop, 0))

    def _for_cards(self, ordinal: int, call: Callable[[Any], Any]) -> Any:
        """Call with the properties of memory for network cards; where those are refused, without."""
        if self._makes_for_rdma(ordinal):
            try:
                return call(self._properties(ordinal, rdma=True))
            except DeviceMemoryError:
                raise
            except DriverError:
                self._for_rdma[ordinal] = False
        return call(self._properties(ordinal, rdma=False))

    def export(self, handle: Any) -> int:
        """Return a new descriptor of a segment; it is the caller's."""
        return int(self._call("cuMemExportToShareableHandle", handle, self._posix_fd, 0))

    def import_(self, fd: int) -> Any:
        """Return a handle of another process's segment; the descriptor stays the caller's."""
        return self._call("cuMemImportFromShareableHandle", fd, self._posix_fd)

    def release(self, handle: Any) -> None:
        """Release a handle. The memory is freed with its last handle and mapping in any process."""
        self._call("cuMemRelease", handle)

    def reserve(self, size_bytes: int) -> int:
        """Return the start of a reserved range of addresses."""
        return int(self._call("cuMemAddressReserve", size_bytes, 0, 0, 0))

    def unreserve(self, address: int, size_bytes: int) -> None:
        self._call("cuMemAddressFree", address, size_bytes)

    def map(self, address: int, size_bytes: int, handle: Any) -> None:
        """Map a segment at an address. No device can access it before `allow`."""
        self._call("cuMemMap", address, size_bytes, 0, handle, 0)

    def unmap(self, address: int, size_bytes: int) -> None:
        """Unmap a whole segment. No work on it may be in progress."""
        self._call("cuMemUnmap", address, size_bytes)

    def allow(self, address: int, size_bytes: int, ordinals: Iterable[int], *, write: bool) -> None:
        """Give these devices access to mapped addresses: to read, or to `write` too."""
        api = self.api
        flags = api.CUmemAccess_flags
        descriptions = []
        for ordinal in ordinals:
            access = api.CUmemAccessDesc()
            access.location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
            access.location.id = ordinal
            access.flags = flags.CU_MEM_ACCESS_FLAGS_PROT_READ
            if write:
                access.flags = flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
            descriptions.append(access)
        self._call("cuMemSetAccess", address, size_bytes, descriptions, len(descriptions))

    # --- legacy IPC, in the current context -----------------------------------------------------------

    def allocate(self, size_bytes: int) -> int:
        """Allocate device memory that can be shared by a legacy handle."""
        return int(self._call("cuMemAlloc", size_bytes))

    def free(self, address: int) -> None:
        """Free an allocation of `allocate`. Waits for the device."""
        self._call("cuMemFree", address)

    def ipc_export(self, address: int) -> bytes:
        """Return the legacy handle of an allocation of `allocate`."""
        handle = self._call("cuIpcGetMemHandle", address)
        return bytes(handle.reserved)

    def ipc_open(self, handle: bytes) -> int:
        """Map another process's allocation for the current context's device."""
        named = self.api.CUipcMemHandle()
        named.reserved = handle
        flags = self.api.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        return int(self._call("cuIpcOpenMemHandle", named, flags))

    def ipc_close(self, address: int) -> None:
        self._call("cuIpcCloseMemHandle", address)

    # --- host memory, in the current context ------------------------------------------------------------

    def register(self, address: int, size_bytes: int, *, read_only: bool = False) -> None:
        """Give every device of this process access to host memory, whose pages are mapped already."""
        api = self.api
        flags = api.CU_MEMHOSTREGISTER_PORTABLE | api.CU_MEMHOSTREGISTER_DEVICEMAP
        if read_only:
            flags |= api.CU_MEMHOSTREGISTER_READ_ONLY
        self._call("cuMemHostRegister", address, size_bytes, flags)

    def unregister(self, address: int) -> None:
        """Undo one `register`. No device may be using the memory."""
        self._call("cuMemHostUnregister", address)

    def device_address(self, address: int) -> int:
        """Return the address of registered host memory on the devices."""
        return int(self._call("cuMemHostGetDevicePointer", address, 0))

    # --- streams, in the current context ------------------------------------------------------------------

    def stream(self) -> Any:
        """Return a new stream that does not synchronise with the default one."""
        flags = self.api.CUstream_flags.CU_STREAM_NON_BLOCKING
        return self._call("cuStreamCreate", flags)

    def word_batch(self, most: int) -> list[Any]:
        """Return the records of so many words for `write_words`."""
        api = self.api
        operation = api.CUstreamBatchMemOpType.CU_STREAM_MEM_OP_WRITE_VALUE_64
        records = [api.CUstreamBatchMemOpParams() for _ in range(most)]
        for record in records:
            word = record.writeValue
            word.operation, word.flags = operation, 0
        return records

    def write_words(self, batch: list[Any], words: Sequence[tuple[int, int]], stream: Any) -> None:
        """Enqueue the stores of 64-bit words, by address and value: no more than there are records."""
        records = batch[: len(words)]
        for record, (address, value) in zip(records, words, strict=True):
            word = record.writeValue
            word.address, word.value64 = address, value
        self._call("cuStreamBatchMemOp", stream, len(words), records, 0)

    def finish(self, stream: Any) -> None:
        """Wait for a stream. Blocks."""
        self._call("cuStreamSynchronize", stream)

    def end_stream(self, stream: Any) -> None:
        self._call("cuStreamDestroy", stream)

    def mark(self, stream: Any) -> Any:
        """Return an event behind all work that a stream has been given so far."""
        flags = self.api.CUevent_flags.CU_EVENT_DISABLE_TIMING
        event = self._call("cuEventCreate", flags)
        try:
            self._call("cuEventRecord", event, stream)
        except BaseException:
            self.drop(event)
            raise
        return event

    def follow(self, stream: Any, event: Any) -> None:
        """Make a stream, of any device, wait for an event."""
        self._call("cuStreamWaitEvent", stream, event, 0)

    def drop(self, event: Any) -> None:
        """Destroy an event; streams that follow it still do."""
        self._call("cuEventDestroy", event)


_loaded: list[Driver] = []


def load() -> Driver:
    """Return the real driver, opened once.

    Raises:
        BackendUnavailable: no cuda.bindings, no driver, or no device.

    """
    if not _loaded:
        try:
            api = importlib.import_module("cuda.bindings.driver")
        except ImportError as error:
            raise BackendUnavailable(
                f"a slab on a GPU needs cuda-bindings: pip install 'featcache[cuda]' ({error})"
            ) from error
        raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # noqa: SLF001 - 0.1 µs, not 4
        _loaded.append(Driver(api, raw or _torch_stream))
    return _loaded[0]
