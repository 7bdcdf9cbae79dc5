"""`get_or_put`: of all callers that want a key at once, in all processes, one makes it."""

import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, Protocol, TypeAlias

import anyio
import torch

from featcache.errors import KeyNotFound, KeyTimeout
from featcache.memory.pack import Feature
from featcache.memory.slab import uncopied
from featcache.ref import FeatureRef
from featcache.session.arguments import rpc_timeout
from featcache.session.hits import KeyHits
from featcache.session.lease import KeyLease, MakeClaim

Device: TypeAlias = torch.device | None
Make = Callable[[], Feature | Awaitable[Feature]]
Command: TypeAlias = Literal["contains", "evict", "pin", "unpin"]


class Keys(Protocol):
    """The directory, as its owner or an attached client uses it."""

    @property
    def hits(self) -> KeyHits | None:
        """Lookups in the key table, in any thread; None before its pool is attached."""

    def at_hand(self, key: str | bytes, device: Device) -> KeyLease | None:
        """Return a read of the feature under a key if the key table is enough to find it, or None.

        Safe in any thread. `device` is where the read is to be, None is the pool's own. What it does not
        find is no miss: the owner is asked next.
        """

    def find_now(self, key: str | bytes, device: Device) -> KeyLease:
        """As `at_hand`, for a caller that does not ask the owner.

        Raises:
            KeyNotFound: there is none.
            GetTimeout: the owner is to say.
            UnknownPool: the pool is not attached yet.

        """

    def contains_now(self, key: str | bytes) -> bool | None:
        """Whether a key is there, by the key table alone; None if the owner is to say. In any thread.

        Raises:
            OwnerLost: the owner is gone.

        """

    async def find(
        self, key: bytes, timeout_s: float | None, device: Device, *, counted: bool = False
    ) -> KeyLease:
        """Return a read of the feature under a key; with a timeout, wait for it that long.

        `counted`: the caller looked it up before, and that was counted as a miss.

        Raises:
            KeyNotFound: there is none; KeyTimeout: nor came in time.

        """

    async def find_or_claim(
        self, key: bytes, device: Device, *, waits: bool
    ) -> KeyLease | MakeClaim:
        """Return a read, once there is a feature, or the claim to make it.

        Unless it `waits`, raise KeyNotFound while another makes it.
        """

    async def find_many(self, keys: Sequence[bytes], device: Device) -> list[KeyLease | None]:
        """Return a read of each key that is there, and None of the others; all or, if it fails, none.

        An error says by its `member` which key it is of, where it is of one.
        """

    async def contains_many(self, keys: Sequence[bytes]) -> list[bool]:
        """Return whether each of these keys is there. Not a use of them."""

    async def share(
        self,
        key: bytes,
        readers: int | frozenset[str],
        ttl_s: float | None,
        timeout_s: float | None,
    ) -> FeatureRef:
        """Return a ref of the feature under a key that owes these reads; `timeout_s` as in `find`."""

    async def command(self, command: Command, key: bytes) -> bool:
        """Do this to a key; return whether it was there. KeyNotFound of pin and unpin if it was not."""


async def find_or_claim(
    keys: Keys, key: bytes, device: Device, timeout_s: float | None
) -> KeyLease | MakeClaim:
    """Return a read of a key, or the claim to make it, within a time; KeyTimeout if neither came."""
    if timeout_s is None:  # a scope takes longer than many a lookup
        return await keys.find_or_claim(key, device, waits=True)
    try:
        with anyio.fail_after(rpc_timeout(timeout_s)):
            return await keys.find_or_claim(key, device, waits=timeout_s > 0)
    except (KeyNotFound, TimeoutError):
        raise KeyTimeout(f"nobody made it within {timeout_s} s") from None


async def make_and_put(
    claim: MakeClaim, make: Make, put: Callable[[Feature], Awaitable[object]]
) -> Feature:
    """Make a claimed feature and put it; return it.

    However it ends the claim is released: it is void if the feature is there by then, else it passes
    to the next waiter.
    """
    try:
        made = make()
        feature = await made if inspect.isawaitable(made) else made
        await put(feature)
    finally:
        claim.end()
    return feature


def moved(feature: Feature, device: torch.device | None) -> Feature:
    """Return a feature that was made, contiguous and on a device (None: where it is)."""
    if isinstance(feature, torch.Tensor):
        return _moved(feature, device)
    return {name: _moved(tensor, device) for name, tensor in feature.items()}


def _moved(tensor: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    try:
        return (tensor if device is None else tensor.to(device)).contiguous()
    except RuntimeError as error:
        raise uncopied(tensor.nbytes, error) from error
