"""Copying what is held: here and now, or in a thread what would hold up the loop."""

import torch

from featcache.errors import SettingsError
from featcache.memory.pack import Feature, same_layout, unpack
from featcache.memory.slab import Order
from featcache.ref import FeatureRef
from featcache.session.attachment import Attachment
from featcache.session.lease import KeyLease
from featcache.session.offload import Offload

Device = torch.device | None
Targets = list[torch.Tensor] | None
"""What is copied into; None where it is yet to be made."""
Readable = Attachment | KeyLease
"""What the bytes are read by, and told when a use of them ends."""


def place(targets: list[torch.Tensor]) -> torch.device:
    """Return where they all are: a read is paid in the order of one device."""
    device = targets[0].device
    if any(target.device != device for target in targets):
        raise SettingsError("the tensors of one get's out are all on one device")
    return device


def targets_of(ref: FeatureRef, device: Device, out: Feature | None) -> tuple[Targets, Device]:
    """Return what a get copies into, if the caller gave it, and the device that it copies to."""
    if out is None:
        return None, device
    targets = same_layout(ref.specs, out)
    return targets, place(targets)


def copy(
    attachment: Readable,
    ref: FeatureRef,
    device: Device,
    targets: Targets,
    order: Order,
) -> Feature:
    """Copy here and now."""
    specs, mapping = ref.specs, attachment.mapping
    if targets is None and specs[0].name is None:  # one bare tensor, as most features are
        return mapping.fetch(ref.offset_bytes, specs[0], device, order)
    if targets is None:
        targets = [mapping.empty(spec, device) for spec in specs]
    _fill(attachment, ref, targets, order)
    return unpack(specs, targets)


def _fill(attachment: Readable, ref: FeatureRef, targets: list[torch.Tensor], order: Order) -> None:
    read, offset_bytes = attachment.mapping.read, ref.offset_bytes
    for spec, target in zip(ref.specs, targets, strict=True):
        read(offset_bytes, spec, target, order)


class Copier:
    """Copies that know which of them would hold up the loop."""

    def __init__(self, offload: Offload, inline_bytes: int) -> None:
        self._offload = offload
        self._inline_bytes = inline_bytes

    async def copy(
        self,
        attachment: Readable,
        ref: FeatureRef,
        device: Device,
        targets: Targets,
        *,
        pays: bool = True,
    ) -> Feature:
        """Copy a held ref's bytes, here or in a thread, and end the use, which then `pays`."""
        mapping = attachment.mapping
        copied, order, handed_over = False, None, False
        try:
            order = mapping.order(device)
            if mapping.blocking_read_bytes(ref.nbytes, device) <= self._inline_bytes:
                feature = copy(attachment, ref, device, targets, order)
            else:
                into = targets or [mapping.empty(spec, device) for spec in ref.specs]
                handed_over = True
                await self._offload.run(
                    lambda: _fill(attachment, ref, into, order),
                    lambda: attachment.end(ref, pays=False),
                )
                handed_over = False
                feature = unpack(ref.specs, into)
            copied = True
        except Exception:
            handed_over = False  # the copy itself failed: nobody else ends this use
            raise
        finally:
            if not handed_over:
                attachment.end(ref, pays=copied and pays, order=order)
        return feature
