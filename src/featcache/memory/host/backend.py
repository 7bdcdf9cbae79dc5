"""Host memory as a backend: slabs in a memfd, made by an owner and mapped by a client."""

import torch

from featcache.errors import AttachRefused
from featcache.memory.devices import device_of
from featcache.memory.host.slab import KIND, HostMapping, HostSlab
from featcache.memory.slab import PeerSlab, Plan


class HostBackend:
    """As `backends.Backend`: one sparse memfd, whatever the segments."""

    kinds = (KIND,)

    def plan(self, device: torch.device, wanted: str) -> Plan:
        """Plan a slab of any number of segments, which cost it nothing."""
        return Plan(KIND, "", -1, HostSlab.granularity_bytes, None)

    def make(
        self, plan: Plan, capacity_bytes: int, segment_bytes: int, *, huge_pages: bool
    ) -> HostSlab:
        return HostSlab(capacity_bytes, huge_pages=huge_pages)

    def make_host(
        self, sibling: Plan, capacity_bytes: int, *, huge_pages: bool, pinned: bool
    ) -> HostSlab:
        """Make another: no GPU copies to or from it, so none is pinned."""
        return HostSlab(capacity_bytes, huge_pages=huge_pages)

    def map(self, peer: PeerSlab, device: torch.device | None) -> HostMapping:
        """Map a peer's slab. Where it stands in for one on a GPU, reads go to that GPU."""
        if len(peer.fds) != 1:
            raise AttachRefused("a host slab comes with one descriptor")
        mapping = HostMapping.attach(peer.fds[0], peer.capacity_bytes, peer.committed_bytes)
        if peer.device_name != "cpu" and (device is None or device.type == "cuda"):
            mapping.home = device or device_of(peer.device_name)
        return mapping
