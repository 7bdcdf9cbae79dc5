"""SGLang's pool and transport of ``--mm-feature-transport cuda_vmm`` over featcache's slab."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.multimodal.transport.memory_pool import (
    DEFAULT_MAX_INFLIGHT_SLICES,
    resolve_consumer_rank,
)
from sglang.srt.utils.cuda_vmm_transport_utils import (
    CudaVmmFeatureTransport,
    CudaVmmMemoryPool,
    CudaVmmTensorTransportProxy,
)

from featcache.integrations.sglang.ipc import CONTEXT
from featcache.integrations.sglang.pool import PoolEnd, open_end
from featcache.integrations.sglang.proxy import FeatureProxy

_MOST = 1024
"""Members of one `put_many`."""


class FeatcacheVmmProxy(FeatureProxy, CudaVmmTensorTransportProxy):  # type: ignore[misc]
    """A feature in featcache's slab, as a CudaVmmTensorTransportProxy."""

    rank_of = staticmethod(resolve_consumer_rank)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as bytes; what this process has read or paid stays here."""
        return restore_vmm, (self.to_bytes(),)


def restore_vmm(data: bytes) -> FeatureProxy:
    """Return the proxy of these bytes; SGLang's allowlist of unpickling has this function."""
    return FeatcacheVmmProxy.from_bytes(data)


class FeatcacheVmmPool(CudaVmmMemoryPool):  # type: ignore[misc]
    """CudaVmmMemoryPool over the slab that all tokenizer workers share.

    Over several nodes, which featcache's slab does not reach, and where it can't be had, it is SGLang's
    own pool.
    """

    _end: PoolEnd | None = None

    def __init__(
        self,
        memory_size: int,
        recycle_interval: float,
        base_gpu_id: int,
        consumer_count: int,
        allow_posix_fallback: bool = False,
    ) -> None:
        """`memory_size` is this worker's share in bytes; `recycle_interval` is SGLang's own pool's."""
        end = None
        if allow_posix_fallback:  # SGLang's way to say that there is one node
            end = open_end(
                memory_size, base_gpu_id, consumer_count, DEFAULT_MAX_INFLIGHT_SLICES, CONTEXT
            )
        if end is None:
            super().__init__(
                memory_size, recycle_interval, base_gpu_id, consumer_count, allow_posix_fallback
            )
            return
        self._end = end
        self.device_index, self.consumer_count = base_gpu_id, consumer_count

    def wrap_tensor(self, tensor: torch.Tensor) -> Any:
        """Put a tensor, on any device, and return its proxy; a copy on the host if it is full."""
        end = self._end
        if end is None:
            return super().wrap_tensor(tensor)
        ref = end.put(tensor)
        return tensor.cpu() if ref is None else FeatcacheVmmProxy(ref, end.readers)

    def wrap_tensors(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Put tensors together, each with a proxy and a life of its own; None if they find no room."""
        end, members = self._end, list(tensors)
        if end is None:
            return super().wrap_tensors(members)
        if not members:
            return []
        if len(members) > _MOST:
            return None
        refs = end.slab.put_many([one.detach() for one in members], end.readers, end.wait_s())
        return None if refs is None else [FeatcacheVmmProxy(ref, end.readers) for ref in refs]

    def cancel_proxy(self, proxy: Any) -> None:
        """Take back a feature whose request was never dispatched."""
        if self._end is None:
            super().cancel_proxy(proxy)
        else:
            self._end.cancel(proxy)

    @property
    def active_lease_count(self) -> int:
        """The features in the slab, of all workers: whose reads are owed or not collected yet."""
        return len(self.occupied_chunks) if self._end is None else self._end.slab.in_use

    def one_wait(self) -> contextlib.AbstractContextManager[None]:
        """Bound the waits of the puts in the block together."""
        return contextlib.nullcontext() if self._end is None else self._end.one_wait()

    def shutdown(self) -> None:
        """Leave the slab; in its owner this closes it. Idempotent."""
        if self._end is None:
            super().shutdown()
        else:
            self._end.shutdown()


class FeatcacheFeatureTransport(CudaVmmFeatureTransport):  # type: ignore[misc]
    """CudaVmmFeatureTransport whose requests wait for room once, however many features they have."""

    def wrap_items(self, mm_items: list[Any]) -> None:
        """Publish the features of one request."""
        if not isinstance(self.pool, FeatcacheVmmPool):
            super().wrap_items(mm_items)
            return
        with self.pool.one_wait():
            super().wrap_items(mm_items)
