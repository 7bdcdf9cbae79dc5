"""From an owner's welcome to a mapped pool in this process."""

from functools import partial
from typing import NamedTuple

import torch

from featcache.control.descriptors import close_taken, duplicate_all
from featcache.control.messages import Welcome
from featcache.errors import AttachRefused
from featcache.memory.backends import map_slab
from featcache.memory.devices import default_device
from featcache.memory.key_table import KeyTable
from featcache.memory.slab import Mapping, PageWords, PeerSlab, Unreachable
from featcache.memory.unreachable import UnreachableSlab
from featcache.memory.words import OwnerWords, SessionWords
from featcache.session.attachment import Attachment
from featcache.session.hits import KeyHits
from featcache.session.offload import Offload
from featcache.session.waiting import Doorbell

_CONTROL_DESCRIPTORS = 3  # the owner's words, the session's page, the eventfd


class MappedPool(NamedTuple):
    """A pool as it could be mapped."""

    attachment: Attachment
    hits: KeyHits
    doorbell: Doorbell
    unreachable: str | None
    """Why its slab is read through host memory, if it is."""


class _MappedSlab(NamedTuple):
    mapping: Mapping
    adopted: PageWords
    unreachable: str | None


async def map_pool(
    welcome: Welcome,
    fds: list[int],
    device: torch.device | None,
    offload: Offload,
    *,
    through_host: bool,
) -> MappedPool:
    """Map the pool that an owner described, of which no word is trusted.

    Takes the doorbell's descriptor from `fds`; the others stay the caller's.

    Raises:
        AttachRefused: the welcome is not one that an owner sends.
        BackendUnavailable: the slab can't be mapped, nor read through host memory.
        OSError: the system refused a descriptor or a mapping.

    """
    if len(fds) < _CONTROL_DESCRIPTORS:
        raise AttachRefused("the owner's welcome came without its descriptors")
    words = OwnerWords.attach(fds[0], welcome.slots)
    page = SessionWords.attach(fds[1], welcome.slots, welcome.grants)
    # The thread's: a cancelled attach closes the others meanwhile.
    own = duplicate_all(fds[_CONTROL_DESCRIPTORS:])
    try:
        slab = await offload.run(
            # No closure, which the traceback of an error would keep, and with it the page mapped.
            partial(_map_and_adopt, welcome, own, device, page, through_host=through_host),
            lambda mapped: None if mapped is None else offload.spawn(mapped.mapping.close),
        )
    except Exception:
        close_taken(own)  # the thread has not, if it was refused
        raise
    doorbell = Doorbell(fds.pop(2))
    attachment = Attachment(welcome.pool_id, words, page, slab.mapping, slab.adopted, doorbell.ring)
    attachment.shrink_epoch = welcome.shrink_epoch
    attachment.capacity_bytes = welcome.capacity_bytes
    return MappedPool(attachment, KeyHits(attachment, KeyTable(words)), doorbell, slab.unreachable)


def _map_and_adopt(
    welcome: Welcome,
    own: list[int],
    device: torch.device | None,
    page: SessionWords,
    *,
    through_host: bool,
) -> _MappedSlab:
    """Map a slab and ready the page for its streams, in a thread. Closes `own`."""
    mapping, unreachable = _map(welcome, own, device, through_host=through_host)
    try:
        return _MappedSlab(mapping, PageWords.adopted(mapping, page), unreachable)
    except BaseException:
        mapping.close()
        raise


def _map(
    welcome: Welcome, own: list[int], device: torch.device | None, *, through_host: bool
) -> tuple[Mapping, str | None]:
    try:
        if through_host and welcome.relays:
            raise Unreachable("Settings.through_host is set")
        peer = PeerSlab(
            welcome.kind,
            welcome.device,
            welcome.capacity_bytes,
            welcome.committed_bytes,
            welcome.handle,
            own,
        )
        return map_slab(peer, device), None
    except Unreachable as error:
        if not welcome.relays:
            raise
        return UnreachableSlab(device or default_device(), str(error)), str(error)
    finally:
        close_taken(own)
