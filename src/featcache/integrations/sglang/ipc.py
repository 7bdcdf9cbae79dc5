"""SGLang's pool of ``--mm-feature-transport cuda_ipc``, and its proxies, over featcache's slab."""

from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.multimodal.transport.cuda_ipc import (
    MM_FEATURE_CACHE_SIZE,
    CudaIpcTensorTransportProxy,
    MmItemMemoryPool,
)
from sglang.srt.multimodal.transport.memory_pool import (
    DEFAULT_MAX_INFLIGHT_SLICES,
    resolve_consumer_rank,
)
from sglang.srt.runtime_context import get_parallel, get_serving

from featcache.integrations.sglang.pool import PoolEnd, SglangContext, open_end
from featcache.integrations.sglang.proxy import FeatureProxy

CONTEXT = SglangContext(
    MM_FEATURE_CACHE_SIZE,
    envs.SGLANG_MM_FEATURE_CACHE_MB.get,
    lambda: int(get_serving().tokenizer_worker_num),
    get_parallel,
)


class FeatcacheIpcProxy(FeatureProxy, CudaIpcTensorTransportProxy):  # type: ignore[misc]
    """A feature in featcache's slab, as a CudaIpcTensorTransportProxy."""

    rank_of = staticmethod(resolve_consumer_rank)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as bytes; what this process has read or paid stays here."""
        return restore_ipc, (self.to_bytes(),)


def restore_ipc(data: bytes) -> FeatureProxy:
    """Return the proxy of these bytes; SGLang's allowlist of unpickling has this function."""
    return FeatcacheIpcProxy.from_bytes(data)


class FeatcacheItemPool(MmItemMemoryPool):  # type: ignore[misc]
    """MmItemMemoryPool over the slab that all tokenizer workers share.

    Where featcache can't have a slab it is SGLang's own pool, with a warning.
    """

    _end: PoolEnd | None = None

    def __init__(
        self,
        memory_size: int,
        recycle_interval: float,
        base_gpu_id: int,
        consumer_count: int,
        max_inflight_slices: int = DEFAULT_MAX_INFLIGHT_SLICES,
    ) -> None:
        """`memory_size` is this worker's share in bytes; `recycle_interval` is SGLang's own pool's."""
        end = open_end(memory_size, base_gpu_id, consumer_count, max_inflight_slices, CONTEXT)
        if end is None:
            super().__init__(
                memory_size, recycle_interval, base_gpu_id, consumer_count, max_inflight_slices
            )
            return
        self._end = end
        self.device_id, self.consumer_count = base_gpu_id, consumer_count

    def wrap_tensor(self, tensor: torch.Tensor, *, use_pool_handle_cache: bool) -> Any:
        """Put a tensor and return its proxy; None, and SGLang sends it through the host, if it is full.

        `use_pool_handle_cache` changes nothing: a slab is mapped once, by each reader.

        Raises:
            ValueError: an empty tensor, as SGLang's own pool says.

        """
        end = self._end
        if end is None:
            return super().wrap_tensor(tensor, use_pool_handle_cache=use_pool_handle_cache)
        if not tensor.numel():
            raise ValueError("featcache's pool cannot transport an empty tensor")
        ref = end.put(tensor)
        return None if ref is None else FeatcacheIpcProxy(ref, end.readers)

    def cancel_proxy(self, proxy: Any) -> None:
        """Take back a feature whose request was never dispatched."""
        if self._end is None:
            super().cancel_proxy(proxy)
        else:
            self._end.cancel(proxy)

    @property
    def active_lease_count(self) -> int:
        """The features in the slab, of all workers: whose reads are owed or not collected yet."""
        return super().active_lease_count if self._end is None else self._end.slab.in_use

    def shutdown(self) -> None:
        """Leave the slab; in its owner this closes it. Idempotent."""
        if self._end is None:
            super().shutdown()
        else:
            self._end.shutdown()
