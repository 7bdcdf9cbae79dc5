"""The calls of the fake driver: each what `cuda.bindings.driver` calls the same, less the checks.

A method ``_cuXxx`` returns the call's value, or raises `Refused` with the code; `FakeApi` makes a
call of it.
"""

import threading
import uuid
from types import SimpleNamespace
from typing import Any

from memory.fakememory import FakeMemory
from memory.fakepages import GRANULARITY_BYTES, Broken, Code, refuse_unless
from memory.fakestreams import FakeStreams, Stream

_CONTEXT = 0xC0DE0000


class Number:
    """An opaque handle, as the bindings wrap them."""

    def __init__(self, value: Any = 0) -> None:
        self._value = int(value)

    def __int__(self) -> int:
        return self._value

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._value:#x})"


def uuid_of(device: int) -> str:
    """Return the UUID of one of the machine's devices."""
    return str(uuid.UUID(int=0xFA4E0000 + device))


class FakeCalls:
    """What each call does, for one process."""

    CUstream = Number
    CUmemAllocationHandleType = SimpleNamespace(CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR=1)
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM=0)
    CUmemAccess_flags = SimpleNamespace(
        CU_MEM_ACCESS_FLAGS_PROT_READ=1, CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3
    )
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED=102,
        CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED=103,
        CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED=110,
        CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS=117,
        CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING=118,
    )
    CUflushGPUDirectRDMAWritesTarget = SimpleNamespace(
        CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX=0
    )
    CUflushGPUDirectRDMAWritesScope = SimpleNamespace(
        CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_ALL_DEVICES=200
    )
    CUipcMem_flags = SimpleNamespace(CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS=1)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUevent_flags = SimpleNamespace(CU_EVENT_DISABLE_TIMING=2)
    CU_MEMHOSTREGISTER_PORTABLE = 1
    CU_MEMHOSTREGISTER_DEVICEMAP = FakeMemory.DEVICEMAP
    CU_MEMHOSTREGISTER_READ_ONLY = FakeMemory.READ_ONLY

    CUstreamBatchMemOpType = SimpleNamespace(CU_STREAM_MEM_OP_WRITE_VALUE_64=4)

    @staticmethod
    def CUstreamBatchMemOpParams() -> SimpleNamespace:
        return SimpleNamespace(
            writeValue=SimpleNamespace(operation=0, address=0, value64=0, flags=0)
        )

    @staticmethod
    def CUmemAllocationProp() -> SimpleNamespace:
        return SimpleNamespace(
            location=SimpleNamespace(), allocFlags=SimpleNamespace(gpuDirectRDMACapable=0)
        )

    CUmemAccessDesc = CUmemAllocationProp
    CUipcMemHandle = SimpleNamespace

    def __init__(self, visible: tuple[int, ...], peers: bool, total_bytes: int) -> None:
        self.memory = FakeMemory(visible, peers, total_bytes)
        self.streams = FakeStreams(self.memory)
        self.attributes = {102: 1, 103: 1, 110: 0, 117: 0, 118: 200}
        self.rdma_refused: Code | None = None
        """What a segment for network cards is refused with, if it is."""
        self.for_rdma: list[bool] = []
        """Of each segment that was made, whether it is for network cards."""
        self._ready = False
        self._here = threading.local()

    @property
    def _stack(self) -> list[int]:
        if not hasattr(self._here, "stack"):
            self._here.stack = []
        stack: list[int] = self._here.stack
        return stack

    @property
    def _ordinal(self) -> int:
        return self._stack[-1]

    def _ordinal_of(self, device: Any) -> int:
        refuse_unless(0 <= int(device) < len(self.memory.visible), Code.CUDA_ERROR_INVALID_DEVICE)
        return int(device)

    def _idle(self, address: int, size: int, what: str) -> None:
        if self.streams.in_flight(address, size):
            raise Broken(f"{what} with work in flight on it")

    # --- devices and contexts ---------------------------------------------------------------------

    def _cuInit(self, flags: int) -> None:
        refuse_unless(self.memory.visible, Code.CUDA_ERROR_NO_DEVICE)
        self._ready = True

    def _cuDeviceGetCount(self) -> int:
        return len(self.memory.visible)

    def _cuDeviceGet(self, ordinal: int) -> Number:
        return Number(self._ordinal_of(ordinal))

    def _cuDeviceGetUuid(self, device: Any) -> SimpleNamespace:
        found = uuid.UUID(uuid_of(self.memory.visible[self._ordinal_of(device)]))
        return SimpleNamespace(bytes=found.bytes)

    def _cuDeviceGetAttribute(self, name: int, device: Any) -> int:
        self._ordinal_of(device)
        return self.attributes[name]

    def _cuDeviceCanAccessPeer(self, device: Any, other: Any) -> int:
        where = self.memory.visible[self._ordinal_of(other)]
        return int(self.memory.can_copy_to(self._ordinal_of(device), where))

    def _cuDevicePrimaryCtxRetain(self, device: Any) -> Number:
        return Number(_CONTEXT + self._ordinal_of(device))

    def _cuCtxPushCurrent(self, context: Any) -> None:
        self._stack.append(self._ordinal_of(int(context) - _CONTEXT))

    def _cuCtxPopCurrent(self) -> Number:
        refuse_unless(self._stack, Code.CUDA_ERROR_INVALID_CONTEXT)
        return Number(_CONTEXT + self._stack.pop())

    def _cuCtxGetCurrent(self) -> Number:
        return Number(_CONTEXT + self._ordinal if self._stack else 0)

    def _cuCtxSetCurrent(self, context: Any) -> None:
        self._stack[-1:] = [self._ordinal_of(int(context) - _CONTEXT)]

    def _cuFlushGPUDirectRDMAWrites(self, target: int, scope: int) -> None:
        refuse_unless((target, scope) == (0, 200) and self.attributes[117] & 1)
        refuse_unless(self._stack, Code.CUDA_ERROR_INVALID_CONTEXT)

    def _cuCtxSynchronize(self) -> None:
        for stream in list(self.streams.streams.values()):
            if stream.ordinal == self._ordinal:
                self.streams.drain(stream)

    # --- segments -----------------------------------------------------------------------------------

    def _shareable(self, prop: Any) -> int:
        refuse_unless((prop.type, prop.location.type, prop.requestedHandleTypes) == (1, 1, 1))
        return self._ordinal_of(prop.location.id)

    def _cuMemGetAllocationGranularity(self, prop: Any, flags: int) -> int:
        self._shareable(prop)
        return GRANULARITY_BYTES

    def _cuMemCreate(self, size: int, prop: Any, flags: int) -> Number:
        rdma = bool(prop.allocFlags.gpuDirectRDMACapable)
        if rdma:
            refuse_unless(self.attributes[110])
            refuse_unless(self.rdma_refused is None, self.rdma_refused or Code.CUDA_SUCCESS)
        made = Number(self.memory.create(size, self._shareable(prop)))
        self.for_rdma.append(rdma)
        return made

    def _cuMemExportToShareableHandle(self, handle: Any, kind: int, flags: int) -> int:
        refuse_unless(kind == 1)
        return self.memory.export(int(handle))

    def _cuMemImportFromShareableHandle(self, fd: int, kind: int) -> Number:
        refuse_unless(kind == 1)
        return Number(self.memory.import_(fd))

    def _cuMemRelease(self, handle: Any) -> None:
        self.memory.release(int(handle))

    def _cuMemAddressReserve(self, size: int, align: int, near: int, flags: int) -> Number:
        return Number(self.memory.reserve(size))

    def _cuMemAddressFree(self, address: int, size: int) -> None:
        self.memory.unreserve(int(address), size)

    def _cuMemMap(self, address: int, size: int, offset: int, handle: Any, flags: int) -> None:
        refuse_unless(offset == 0)
        self.memory.map(int(address), size, int(handle))

    def _cuMemUnmap(self, address: int, size: int) -> None:
        self._idle(int(address), size, "a segment is unmapped")
        self.memory.unmap(int(address), size)

    def _cuMemSetAccess(self, address: int, size: int, access: list[Any], count: int) -> None:
        refuse_unless(count == len(access) and all(one.location.type == 1 for one in access))
        self.memory.allow(int(address), size, {one.location.id: one.flags == 3 for one in access})

    # --- legacy allocations ---------------------------------------------------------------------

    def _cuMemAlloc(self, size: int) -> Number:
        return Number(self.memory.allocate(size, self._ordinal))

    def _discard(self, address: int, kind: str) -> None:
        region = self.memory.regions.get(address)
        self._idle(address, region.size if region else 1, "memory is freed")
        self.memory.discard(address, kind)

    def _cuMemFree(self, address: Any) -> None:
        self._discard(int(address), "allocation")

    def _cuIpcGetMemHandle(self, address: Any) -> SimpleNamespace:
        return SimpleNamespace(reserved=self.memory.name(int(address)))

    def _cuIpcOpenMemHandle(self, handle: Any, flags: int) -> Number:
        refuse_unless(flags == 1)
        return Number(self.memory.open(handle.reserved, self._ordinal))

    def _cuIpcCloseMemHandle(self, address: Any) -> None:
        self._discard(int(address), "opened")

    # --- host memory ----------------------------------------------------------------------------

    def _cuMemHostRegister(self, address: int, size: int, flags: int) -> None:
        self.memory.register(address, size, flags)

    def _cuMemHostUnregister(self, address: int) -> None:
        registered = self.memory.registered.get(address)
        if registered is not None:
            alias = self.memory.device_address(address)
            self._idle(alias, registered.size, "host memory is unregistered")
        self.memory.unregister(address)

    def _cuMemHostGetDevicePointer(self, address: int, flags: int) -> Number:
        return Number(self.memory.device_address(address))

    # --- streams --------------------------------------------------------------------------------

    def _stream(self, stream: Any, *, foreign: bool = False) -> Stream:
        return self.streams.find(int(stream), self._ordinal, foreign=foreign)

    def _cuStreamCreate(self, flags: int) -> Number:
        refuse_unless(flags == 1)
        return Number(self.streams.new(self._ordinal, ours=True))

    def _cuStreamSynchronize(self, stream: Any) -> None:
        self.streams.drain(self._stream(stream))

    def _cuStreamDestroy(self, stream: Any) -> None:
        self.streams.end(int(stream), self._ordinal)

    def _cuMemcpyAsync(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        refuse_unless(nbytes > 0)
        self.streams.copy(self._stream(stream), int(target), int(source), nbytes)

    def _cuStreamWriteValue64(self, stream: Any, address: int, value: int, flags: int) -> None:
        refuse_unless(flags == 0)
        self.streams.word(self._stream(stream), int(address), value)

    def _cuStreamBatchMemOp(
        self, stream: Any, count: int, records: list[SimpleNamespace], flags: int
    ) -> None:
        refuse_unless(0 < count < 256 and count == len(records) and flags == 0)
        for record in records:
            word = record.writeValue
            refuse_unless(word.operation == 4 and word.flags == 0)
            self.streams.word(self._stream(stream), int(word.address), int(word.value64))

    def _cuEventCreate(self, flags: int) -> Number:
        return Number(self.streams.event(self._ordinal))

    def _cuEventRecord(self, event: Any, stream: Any) -> None:
        self.streams.record(int(event), self._stream(stream))

    def _cuStreamWaitEvent(self, stream: Any, event: Any, flags: int) -> None:
        self.streams.wait(self._stream(stream, foreign=True), int(event))

    def _cuEventDestroy(self, event: Any) -> None:
        self.streams.drop(int(event))
