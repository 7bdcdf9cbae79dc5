"""Copying pinned bytes: in the caller's thread, or in a thread of the pool if it would hold up the loop."""

import torch
from torch.autograd.graph import increment_version

from featcache.control.turns import BYTES_SHIFT, Turn
from featcache.errors import SettingsError
from featcache.memory.pack import Feature, check_fit, same_layout, unpack
from featcache.memory.slab import Order
from featcache.ref import FeatureRef
from featcache.session.attachment import Attachment
from featcache.session.lease import KeyLease
from featcache.session.offload import Offload

Device = torch.device | None
Targets = list[torch.Tensor] | None
"""The tensors copied into; None where they are yet to be made."""
Readable = Attachment | KeyLease
"""The pinned source of a read; told when a use of it ends."""


def targets_of(ref: FeatureRef, device: Device, out: Feature | None) -> tuple[Targets, Device]:
    """Return the caller's tensors, if it gave some, and the device that a get copies to.

    Raises:
        SettingsError: `out` has another layout than the feature, or is on several devices.

    """
    if out is None:
        return None, device
    targets = same_layout(ref.specs, out)
    return targets, place(targets)


def place(targets: list[torch.Tensor]) -> torch.device:
    """Return the device that they are all on: a read is paid in the order of one device."""
    device = targets[0].device
    if device.type not in {"cpu", "cuda"}:
        raise SettingsError(f"out is on {device}: a get fills tensors on 'cpu' or 'cuda:<n>'")
    if any(target.device != device for target in targets):
        raise SettingsError("the tensors of one get's out are all on one device")
    return device


def copy(
    source: Readable,
    ref: FeatureRef,
    device: Device,
    targets: Targets,
    order: Order,
) -> Feature:
    """Copy in the caller's thread."""
    specs, mapping = ref.specs, source.mapping
    if targets is not None:
        _fill_given(source, ref, targets, order)
        return unpack(specs, targets)
    if specs[0].name is None:  # one bare tensor, as most features are
        return mapping.fetch(ref.offset_bytes, specs[0], device, order)
    targets = [mapping.empty(spec, device) for spec in specs]
    _fill(source, ref, targets, order)
    return unpack(specs, targets)


def _fill(source: Readable, ref: FeatureRef, targets: list[torch.Tensor], order: Order) -> None:
    read, offset_bytes = source.mapping.read, ref.offset_bytes
    for spec, target in zip(ref.specs, targets, strict=True):
        read(offset_bytes, spec, target, order)


def _fill_given(
    source: Readable, ref: FeatureRef, targets: list[torch.Tensor], order: Order
) -> None:
    """Fill tensors of the caller's, which autograd is told of: it may have saved what they held."""
    check_fit(ref.specs, targets)
    _fill(source, ref, targets, order)
    for target in targets:
        increment_version(target)


class Copier:
    """Copies; those that would hold up the loop for long go to a thread."""

    def __init__(self, offload: Offload, inline_bytes: int, turn: Turn) -> None:
        self._offload = offload
        self._inline_bytes = inline_bytes
        self._turn = turn

    async def copy(
        self,
        source: Readable,
        ref: FeatureRef,
        device: Device,
        targets: Targets,
        *,
        pays: bool = True,
    ) -> Feature:
        """Copy a pinned ref's bytes, here or in a thread, and end the use, which then `pays`."""
        mapping = source.mapping
        copied, order, handed_over = False, None, False
        try:
            order = mapping.order(device)
            blocking_bytes = mapping.blocking_read_bytes(ref.nbytes, device)
            if blocking_bytes <= self._inline_bytes:
                self._turn.left -= blocking_bytes >> BYTES_SHIFT
                if targets is None and ref.specs[0].name is None:  # as `copy`, inline
                    feature: Feature = mapping.fetch(ref.offset_bytes, ref.specs[0], device, order)
                else:
                    feature = copy(source, ref, device, targets, order)
            else:
                into = targets or [mapping.empty(spec, device) for spec in ref.specs]
                # From here the thread has the pin; if this call is cancelled, the pin ends with it.
                handed_over = True
                fill = _fill if targets is None else _fill_given
                await self._offload.run(
                    lambda: fill(source, ref, into, order),
                    lambda _: source.unpin(ref, pays=False),
                )
                handed_over = False
                feature = unpack(ref.specs, into)
            copied = True
        except Exception:
            handed_over = False  # the copy itself failed: nobody else ends this use
            raise
        finally:
            if not handed_over:
                source.unpin(ref, pays=copied and pays, order=order)
        return feature
