"""What stands for a feature in a request: its ref, and how each rank reads and pays it."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec
import torch

from featcache import FeatcacheError, FeatureRef, MalformedRef, OwnerLost, StaleRef, UnknownPool
from featcache.blocking import BlockingBorrow, FeatureClient
from featcache.integrations.sglang.clients import client_for, device_of, paying_client
from featcache.integrations.sglang.readers import Readers

_GONE: Final = (StaleRef, OwnerLost, UnknownPool)
"""What a ref whose reads are over, or whose pool is, answers: nothing is owed any more."""


class _Wire(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    ref: bytes
    readers: Readers


_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(_Wire).decode


def current_device() -> int:
    """Return the index of torch's current GPU, 0 where there is none."""
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


class FeatureProxy:
    """A feature on its way to the ranks of a request. Every rank has its own copy of the proxy.

    The calls are those of SGLang's ``CudaIpcTensorTransportProxy``, which the classes in `ipc` and
    `vmm` derive from besides. A rank pays once, by a read or without one; paying again does nothing. A
    read is ordered on the current stream of the rank's device, and so is its payment.
    """

    transport_name = "featcache"
    rank_of: Callable[[int], int]
    """Returns this process's rank among so many; the deriving class has SGLang's."""

    def __init__(self, ref: FeatureRef, readers: Readers) -> None:
        self.ref = ref
        self.readers = readers
        self.total_consumer_count = self.consumer_count = readers.count
        self.generation = ref.generation
        spec = ref.specs[0]
        shape, dtype = torch.Size(spec.shape), getattr(torch, spec.dtype)
        extra = {"shape": shape, "dtype": dtype, "nbytes": spec.nbytes}
        extra |= {"recons_shape": shape, "recons_dtype": dtype}
        self.proxy_state = {"ipc_extra": extra, "tensor_data": None}
        self.shape, self.dtype = shape, dtype  # as SGLang's own of its VMM pool has them
        self.reconstruct_tensor: torch.Tensor | None = None
        self._consumer_acknowledged = False
        self._borrow: BlockingBorrow | None = None
        self._borrowed_on = 0

    # --- on the wire ------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """Return the wire form: the ref's bytes, and who owes its reads."""
        return _encode(_Wire(self.ref.to_bytes(), self.readers))

    @classmethod
    def from_bytes(cls, data: bytes) -> "FeatureProxy":
        """Return a proxy with nothing read or paid.

        Raises:
            MalformedRef: these are not the bytes of one.

        """
        try:
            wire = _decode(data)
        except msgspec.MsgspecError as error:
            raise MalformedRef(f"these bytes are not a featcache proxy: {error}") from None
        return cls(FeatureRef.from_bytes(wire.ref), wire.readers)

    # --- reading ------------------------------------------------------------------------------------

    def reconstruct_on_target_device(
        self,
        rebuild_device_idx: int,
        consumer_count: int | None = None,
        consumer_rank: int | None = None,
    ) -> torch.Tensor:
        """Return a copy on a GPU, made on its current stream, and pay.

        Raises:
            RuntimeError: it was paid before without a copy, or the feature is gone: it expired, or its
                owner died.

        """
        device = device_of(rebuild_device_idx)
        made = self.reconstruct_tensor
        if made is not None:
            return made.to(device)
        if self._consumer_acknowledged or self._borrow is not None:
            raise RuntimeError("this feature was released, or is borrowed: it can't be read again")
        everyone = self._is_all(consumer_count)
        client = self._client(device, consumer_rank)
        with _on(device), _told(self.ref):
            read = client.get(self.ref)
        assert isinstance(read, torch.Tensor), "a pool puts bare tensors"
        self._paid(client, everyone=everyone)
        self.reconstruct_tensor = read
        return read

    def borrow_on_target_device(self, rebuild_device_idx: int) -> torch.Tensor | None:
        """Return a view in the slab, to be ended by `release_borrowed_on_current_stream`; None if paid."""
        if self._consumer_acknowledged or self._borrow is not None:
            return None
        device = device_of(rebuild_device_idx)
        borrow = self._client(device, None).borrow(self.ref)
        with _on(device), _told(self.ref):
            view = borrow.__enter__()
        self._borrow, self._borrowed_on = borrow, rebuild_device_idx
        assert isinstance(view, torch.Tensor), "a pool puts bare tensors"
        return view

    def release_borrowed_on_current_stream(
        self, consumer_count: int | None = None, consumer_rank: int | None = None
    ) -> None:
        """End a borrow and pay, behind what the current stream was given; the view is then empty."""
        everyone, borrow = self._is_all(consumer_count), self._borrow
        if borrow is None:
            return
        device = device_of(self._borrowed_on)
        client, self._borrow = self._client(device, consumer_rank), None
        with _on(device):
            borrow.__exit__()
        self._paid(client, everyone=everyone)

    # --- paying without a read ----------------------------------------------------------------------

    def acknowledge_consumption(
        self, consumer_count: int | None = None, consumer_rank: int | None = None
    ) -> None:
        """Pay without reading."""
        if self._consumer_acknowledged:
            return
        everyone = self._is_all(consumer_count)
        client = self._client(device_of(current_device()), consumer_rank, reads=False)
        if not everyone:
            with contextlib.suppress(*_GONE):
                client.release(self.ref)
        self._paid(client, everyone=everyone)

    def release_without_reconstruction(self, consumer_count: int | None = None) -> None:
        """Pay for a request that is given up, whatever was begun."""
        if self._borrow is not None:
            self.release_borrowed_on_current_stream(consumer_count)
        else:
            self.acknowledge_consumption(consumer_count)

    # --- inside -------------------------------------------------------------------------------------

    def _client(
        self, device: torch.device, rank: int | None, *, reads: bool = True
    ) -> FeatureClient:
        find = client_for if reads else paying_client
        readers = self.readers
        if readers.group is None:
            return find(None, device)
        if rank is None:
            rank = 0 if readers.count == 1 else self.rank_of(readers.count)
        return find(readers.name_of(rank), device)

    def _is_all(self, consumer_count: int | None) -> bool:
        """Whether a payment is for the whole group.

        Raises:
            ValueError: for some of them, which no caller of SGLang's does.

        """
        if consumer_count is None or (consumer_count == 1 != self.readers.count):
            return False
        if consumer_count != self.readers.count:
            raise ValueError(
                "a payment is for one consumer or for the complete group, not for "
                f"{consumer_count} of {self.readers.count}"
            )
        return self.readers.count > 1

    def _paid(self, client: FeatureClient, *, everyone: bool) -> None:
        """Note that this rank has paid, and pay for the others too if the caller speaks for all."""
        if everyone:
            with contextlib.suppress(*_GONE):
                client.discard(self.ref)  # our own read, if one is on its way, is waited for
        self._consumer_acknowledged = True


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def _told(ref: FeatureRef) -> Iterator[None]:
    """Say which feature could not be read, in an error that SGLang's callers expect."""
    try:
        yield
    except FeatcacheError as error:
        raise RuntimeError(
            f"a multimodal feature of {ref.nbytes} bytes at {ref.endpoint} is lost: {error}"
        ) from error
