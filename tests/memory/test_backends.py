"""The table of backends: each kind of slab is planned, made and mapped by its row."""

import os
from typing import Any

import pytest
import torch

from featcache.errors import AttachRefused, BackendUnavailable
from featcache.memory import backends
from featcache.memory.backends import BY_KIND, make_host_slab, make_slab, map_slab, plan_for
from featcache.memory.cuda.backing import IPC, VMM
from featcache.memory.host.slab import KIND, HostSlab
from featcache.memory.slab import Mapping, PeerSlab, Plan, Slab
from featcache.memory.unreachable import UnreachableSlab

CPU = torch.device("cpu")


class OtherBackend:
    """A backend that is only a row: it notes its calls."""

    kinds = ("other",)

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.slab = HostSlab(1 << 16, huge_pages=False)

    def plan(self, device: torch.device, wanted: str) -> Plan:
        self.calls.append(("plan", device, wanted))
        return Plan("other", "", 0, 512, 2)

    def make(
        self, plan: Plan, capacity_bytes: int, segment_bytes: int, *, huge_pages: bool
    ) -> Slab:
        self.calls.append(("make", plan.kind, capacity_bytes, segment_bytes, huge_pages))
        return self.slab

    def make_host(
        self, sibling: Plan, capacity_bytes: int, *, huge_pages: bool, pinned: bool
    ) -> Slab:
        self.calls.append(("make_host", sibling.kind, capacity_bytes, huge_pages, pinned))
        return self.slab

    def map(self, peer: PeerSlab, device: torch.device | None) -> Mapping:
        self.calls.append(("map", peer, device))
        return UnreachableSlab(CPU, "it is only a row")


def test_a_row_is_all_that_a_backend_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    other = OtherBackend()
    monkeypatch.setitem(BY_KIND, "other", other)
    monkeypatch.setitem(backends._BY_DEVICE_TYPE, "xpu", other)
    device = torch.device("xpu", 1)
    plan = plan_for(device, "auto")
    assert make_slab(plan, 4096, 1024, huge_pages=False) is other.slab
    assert make_host_slab(plan, 4096, huge_pages=True, pinned=False) is other.slab
    mapping = map_slab(PeerSlab("other", "a name", 4096, 1024, b"h", [7]), device)
    assert isinstance(mapping, UnreachableSlab)
    assert other.calls == [
        ("plan", device, "auto"),
        ("make", "other", 4096, 1024, False),
        ("make_host", "other", 4096, True, False),
        ("map", PeerSlab("other", "a name", 4096, 1024, b"h", [7]), device),
    ]
    other.slab.close()


def test_the_kinds_there_are() -> None:
    assert set(BY_KIND) == {KIND, VMM, IPC}
    assert BY_KIND[VMM] is BY_KIND[IPC]


def test_a_host_slab_is_made_and_mapped(no_leaks: None) -> None:
    plan = plan_for(CPU, "auto")
    assert (plan.kind, plan.reason, plan.max_segments) == (KIND, "", None)
    slab = make_slab(plan, 1 << 16, 1 << 16, huge_pages=False)
    slab.commit(0, 1 << 16, prefault=False)
    mapping = map_slab(PeerSlab(KIND, "cpu", 1 << 16, 1 << 16, b"", slab.descriptors()), None)
    assert mapping.end_bytes == 1 << 16
    for fds in ([], [*slab.descriptors(), *slab.descriptors()]):
        with pytest.raises(AttachRefused, match="one descriptor"):
            map_slab(PeerSlab(KIND, "cpu", 1 << 16, 0, b"", fds), None)
    assert all(os.fstat(fd) for fd in slab.descriptors()), "they stay the caller's"
    mapping.close()
    slab.close()


def test_a_kind_without_a_row_is_refused() -> None:
    with pytest.raises(BackendUnavailable, match="'strange'"):
        map_slab(PeerSlab("strange", "cpu", 4096, 0, b"", []), None)
