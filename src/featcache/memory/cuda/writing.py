"""Writing into a slab on a GPU: copies on the caller's stream, from this GPU, another or the host."""

from typing import Any

import torch

from featcache.errors import BackendUnavailable, CacheClosed, SettingsError
from featcache.memory import strided as copies
from featcache.memory.cuda.streams import DeviceStreams, StreamOrder
from featcache.memory.pack import DTYPES, contiguous_strides
from featcache.memory.slab import Parts, Word, Words
from featcache.memory.views import view_over
from featcache.ref import TensorSpec

SLOWER = 16
"""How much longer a byte takes over PCIe, from pageable memory and waited for, than in host memory."""


class CudaWriting:
    """What a mapping that can be written does; `_home` is the device that it writes through."""

    _home: DeviceStreams
    _ordinal: int
    _target: tuple[int, torch.UntypedStorage] | None = None
    """Where the slab begins in a range that may be written, and a storage over that."""

    @property
    def writable(self) -> bool:
        """Whether `write` can be called: in its owner always, elsewhere after `open_for_writing`."""
        return self._target is not None

    def stage(self, parts: Parts) -> tuple[Parts, StreamOrder | None]:
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

    def blocking_write_bytes(self, parts: Parts) -> int:
        """Return how many bytes of host memory would hold up a thread as long as `write` does."""
        total_bytes = 0
        for _, tensor in parts:
            if tensor.get_device() < 0:
                total_bytes += tensor.nbytes
        return total_bytes * SLOWER

    def signal(self, words: Words, index: int, value: int, order: StreamOrder | None) -> None:
        """Store a word behind everything enqueued at `order`, or now if that is None (`CudaMapping`)."""
        raise NotImplementedError

    def write(
        self, offset_bytes: int, parts: Parts, order: StreamOrder | None, word: Word | None = None
    ) -> None:
        """Copy staged tensors in: from the GPU enqueued at `order`, from the host done on return.

        Then `signal` the word: of one bare tensor, as most features are, in one go with its copy.
        """
        streams, target = self._home, self._target
        if streams.storage is None:
            raise CacheClosed("this mapping of the slab is closed")
        if target is None:
            raise BackendUnavailable("this mapping of the slab was not opened for writing")
        for spec, tensor in parts:
            nbytes = tensor.nbytes
            if not nbytes:
                continue
            at = target[0] + offset_bytes + spec.offset_bytes
            where = tensor.get_device()
            if where != streams.ordinal or order is None:
                if where >= 0:
                    raise SettingsError("a part was not staged")
                plain = tensor if copies.is_plain(tensor) else _made_plain(tensor)
                streams.copy_now(at, plain.data_ptr(), nbytes)
            elif (  # as not copies.is_plain, inline
                not tensor.is_contiguous()
                or tensor.is_neg()
                or (spec.dtype in copies.COMPLEX and tensor.is_conj())
            ):
                with streams.at(order):
                    copies.copy(_view(target[1], offset_bytes, spec, streams.device), tensor)
            elif word is None or spec.name is not None:
                streams.copy(at, tensor.data_ptr(), nbytes, order.stream)
            else:
                streams.copy_and_signal(at, tensor.data_ptr(), nbytes, word, order.stream)
                return
        if word is not None:
            self.signal(*word, order)


def _made_plain(tensor: torch.Tensor) -> torch.Tensor:
    plain = torch.empty(tensor.shape, dtype=tensor.dtype)
    copies.copy(plain, tensor)
    return plain


def _view(storage: Any, offset_bytes: int, spec: TensorSpec, device: torch.device) -> torch.Tensor:
    dtype, shape = DTYPES[spec.dtype], spec.shape
    at = (offset_bytes + spec.offset_bytes) // dtype.itemsize
    return view_over(storage, at, dtype, shape, contiguous_strides(shape), device)
