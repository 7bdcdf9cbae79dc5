"""The backends: a row for each type of device, and from it a table by kind of slab.

A new backend is a folder beside `host` and `cuda`, and a row here.
"""

from typing import Final, Protocol

import torch

from featcache.errors import BackendUnavailable
from featcache.memory.cuda.backend import CudaBackend
from featcache.memory.host.backend import HostBackend
from featcache.memory.slab import Mapping, PeerSlab, Plan, Slab


class Backend(Protocol):
    """How the slabs of one type of device are planned, made and mapped. Every call may block."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of slab it has, by the names that travel to clients."""

    def plan(self, device: torch.device, wanted: str) -> Plan:
        """As `plan_for`."""

    def make(
        self, plan: Plan, capacity_bytes: int, segment_bytes: int, *, huge_pages: bool
    ) -> Slab:
        """As `make_slab`."""

    def make_host(
        self, sibling: Plan, capacity_bytes: int, *, huge_pages: bool, pinned: bool
    ) -> Slab:
        """As `make_host_slab`."""

    def map(self, peer: PeerSlab, device: torch.device | None) -> Mapping:
        """As `map_slab`."""


_BY_DEVICE_TYPE: Final[dict[str, Backend]] = {"cpu": HostBackend(), "cuda": CudaBackend()}
BY_KIND: Final[dict[str, Backend]] = {
    kind: backend for backend in _BY_DEVICE_TYPE.values() for kind in backend.kinds
}


def plan_for(device: torch.device, backend: str) -> Plan:
    """Choose the kind of slab for a device. May block.

    Raises:
        BackendUnavailable: no driver, no such device, or none of the kind that `backend` names.

    """
    return _BY_DEVICE_TYPE[device.type].plan(device, backend)


def make_slab(plan: Plan, capacity_bytes: int, segment_bytes: int, *, huge_pages: bool) -> Slab:
    """Make an empty slab. May block.

    Raises:
        BackendUnavailable: the memory, or the system's support for it, is missing.

    """
    return BY_KIND[plan.kind].make(plan, capacity_bytes, segment_bytes, huge_pages=huge_pages)


def make_host_slab(sibling: Plan, capacity_bytes: int, *, huge_pages: bool, pinned: bool) -> Slab:
    """Make the host slab beside another: if `pinned`, a GPU copies to and from it at full speed."""
    backend = BY_KIND[sibling.kind]
    return backend.make_host(sibling, capacity_bytes, huge_pages=huge_pages, pinned=pinned)


def map_slab(peer: PeerSlab, device: torch.device | None) -> Mapping:
    """Map a peer's slab for a device that reads; None is the slab's own where visible. May block.

    Raises:
        Unreachable: the device can't access the slab.
        AttachRefused: the description is invalid for a slab of its kind.
        BackendUnavailable: a kind of slab, or a driver, that is missing here.

    """
    backend = BY_KIND.get(peer.kind)
    if backend is None:
        raise BackendUnavailable(f"this client can't map a slab of kind {peer.kind!r}")
    return backend.map(peer, device)
