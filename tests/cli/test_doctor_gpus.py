"""What doctor says of GPUs, of facts that are made up: most machines have none."""

from typing import Any

import pytest

from featcache.api.machine import DeviceFacts
from featcache.cli import checks


def facts(**changes: Any) -> DeviceFacts:
    chosen: dict[str, Any] = {
        "device": "cuda:0",
        "name": "a GPU",
        "uuid": "00000000-0000-0000-0000-000000000000",
        "total_bytes": 80 << 30,
        "shares_segments": True,
        "rdma": True,
        "reaches": ("cuda:1",),
    }
    return DeviceFacts(**(chosen | changes))


def found(one: DeviceFacts, count: int = 2) -> dict[str, checks.Check]:
    return {check.name: check for check in checks._gpu(one, count)}


def test_a_gpu_with_everything_is_in_order() -> None:
    assert {check.state for check in found(facts()).values()} == {"ok"}


@pytest.mark.parametrize(
    ("changes", "name", "state", "said"),
    [
        ({"shares_segments": False}, "cuda:0 sharing", "note", "legacy IPC only"),
        ({"rdma": False}, "cuda:0 RDMA", "note", "none for VMM memory"),
        ({"reaches": ()}, "cuda:0 peers", "warn", "reaches none of 1"),
    ],
)
def test_what_a_gpu_lacks_is_said(
    changes: dict[str, Any], name: str, state: str, said: str
) -> None:
    check = found(facts(**changes))[name]
    assert (check.state, check.found) == (state, said)


def test_one_gpu_has_no_peers_to_reach() -> None:
    assert "cuda:0 peers" not in found(facts(reaches=()), count=1)


def test_missing_bindings_are_bad_and_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from featcache import BackendUnavailable

    def missing() -> None:
        raise BackendUnavailable("a slab on a GPU needs cuda-bindings")

    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(checks, "cuda_devices", missing)
    (check,) = checks._gpus()
    assert (check.state, check.remedy) == ("bad", "pip install 'featcache[cuda]'")
