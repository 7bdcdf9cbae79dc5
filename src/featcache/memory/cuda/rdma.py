"""What a device does with network cards that reach its memory (GPUDirect RDMA)."""

from typing import Any, Final

_ALL_DEVICES: Final = 200
"""Of CUGPUDirectRDMAWritesOrdering: every GPU of the system sees what a card wrote, in order."""
_BY_HOST: Final = 1
"""Of CUflushGPUDirectRDMAWritesOptions: a call from the host flushes."""


class RdmaCalls:
    """The part of a `Driver` that is about network cards."""

    def __init__(self, api: Any) -> None:
        self.api = api
        self._for_rdma: dict[int, bool] = {}
        """By device, whether its new segments are made for network cards too."""

    def _call(self, name: str, *args: Any) -> Any:
        raise NotImplementedError

    def can_rdma(self, ordinal: int) -> bool:
        """Whether a network card can reach segments of a device (GPUDirect RDMA with VMM)."""
        name = "CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED"
        return bool(self._attribute(name, ordinal))

    def needs_flush(self, ordinal: int) -> bool:
        """Whether what a card wrote to a device is seen by every GPU only after `flush_remote_writes`."""
        ordering = self._attribute("CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING", ordinal)
        options = self._attribute(
            "CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS", ordinal
        )
        return ordering < _ALL_DEVICES and bool(options & _BY_HOST)

    def flush_remote_writes(self) -> None:
        """Wait until every GPU sees what cards wrote to the current context's device."""
        api = self.api
        self._call(
            "cuFlushGPUDirectRDMAWrites",
            api.CUflushGPUDirectRDMAWritesTarget.CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX,
            api.CUflushGPUDirectRDMAWritesScope.CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_ALL_DEVICES,
        )

    def _attribute(self, name: str, ordinal: int) -> int:
        """Return an attribute of a device; 0 where the bindings do not know it."""
        known = getattr(self.api.CUdevice_attribute, name, None)
        if known is None:
            return 0
        return int(self._call("cuDeviceGetAttribute", known, self._call("cuDeviceGet", ordinal)))

    def _makes_for_rdma(self, ordinal: int) -> bool:
        if ordinal not in self._for_rdma:
            self._for_rdma[ordinal] = self.can_rdma(ordinal)
        return self._for_rdma[ordinal]
