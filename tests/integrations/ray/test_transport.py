"""The transport in Ray itself, where Ray is installed: it is too large to be one of the dev extra."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import torch

from examples.waiting import until
from featcache import KeyNotFound, OwnerLost, SettingsError, blocking
from featcache.integrations.ray import register
from featcache.integrations.ray.config import Config

ray = pytest.importorskip("ray", reason="ray is not installed")
scenes = pytest.importorskip("integrations.ray.scenes")
rdt = pytest.importorskip("ray.experimental.rdt.tensor_transport_manager")
if TYPE_CHECKING:
    from featcache.integrations.ray.transport import FeatcacheTransport

CAPACITY_BYTES = 16 << 20
pytestmark = [
    pytest.mark.timeout(240),  # Ray starts its daemons, and each actor imports torch
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def owner() -> Iterator[blocking.FeatureCache]:
    with blocking.create(capacity=CAPACITY_BYTES) as cache:
        register(cache.endpoint)
        with scenes.cluster():
            yield cache


@pytest.fixture(scope="module")
def actors(owner: blocking.FeatureCache) -> tuple[Any, Any]:
    actor = scenes.actor_class(owner.endpoint)
    return actor.remote(), actor.remote()


def until_empty(owner: blocking.FeatureCache) -> None:
    until(lambda: owner.statistics().slots_used == 0)


def test_an_object_comes_to_another_actor_a_hundred_times_and_leaves_nothing(
    owner: blocking.FeatureCache, actors: tuple[Any, Any]
) -> None:
    source, target = actors
    for number in range(100):
        assert ray.get(target.total.remote(source.make.remote(number))) == 1000 * number
    assert owner.statistics().puts >= 100
    until_empty(owner)


def test_objects_in_flight_both_ways_come_to_whom_they_were_sent(
    owner: blocking.FeatureCache, actors: tuple[Any, Any]
) -> None:
    one, other = actors
    sums = []
    for number in range(20):
        sums.append(other.total.remote(one.make.remote(number), one.make.remote(1)))
        sums.append(one.total.remote(other.make.remote(number), other.make.remote(2)))
    assert ray.get(sums) == [1000.0 * (number + more) for number in range(20) for more in (1, 2)]
    del sums
    until_empty(owner)


def test_an_object_of_more_tensors_than_a_feature_comes_whole(
    owner: blocking.FeatureCache, actors: tuple[Any, Any]
) -> None:
    source, target = actors
    found = ray.get(target.same.remote(source.make_many.remote(300)))
    assert [tensor.tolist() for tensor in found["tensors"]] == [[n] * 3 for n in range(300)]
    assert found["tensors"][0].dtype == torch.int64
    assert (found["scalar"].item(), found["scalar"].shape) == (2.5, torch.Size([]))
    assert found["text"] == "beside them"
    until_empty(owner)


def test_an_object_without_tensors_needs_no_room(
    owner: blocking.FeatureCache, actors: tuple[Any, Any]
) -> None:
    source, target = actors
    puts = owner.statistics().puts
    assert ray.get(target.same.remote(source.make_text.remote())) == "no tensor at all"
    assert owner.statistics().puts == puts


def test_an_object_is_received_as_often_as_it_is_passed_and_each_is_a_copy(
    owner: blocking.FeatureCache, actors: tuple[Any, Any]
) -> None:
    source, target = actors
    made = source.make.remote(3)
    assert ray.get(target.fill.remote(made)) == 7000
    assert ray.get([target.total.remote(made) for _ in range(3)]) == [3000] * 3
    assert torch.equal(ray.get(made), torch.full((1000,), 3.0))  # the driver receives too
    buffer = torch.zeros(1000)
    ray.experimental.set_target_for_ref(made, [buffer])
    assert ray.get(made) is buffer
    assert buffer.tolist() == [3] * 1000
    assert owner.statistics().slots_used == 1
    del made
    until_empty(owner)


def test_an_object_that_is_held_is_not_evicted_and_a_full_pool_fails_the_task(
    owner: blocking.FeatureCache, actors: tuple[Any, Any]
) -> None:
    source, target = actors
    held = source.make.remote(5)
    assert ray.get(target.total.remote(held)) == 5000
    half = CAPACITY_BYTES // 2
    for number in range(4):  # each evicts the one before
        owner.put(torch.zeros(half, dtype=torch.uint8), key=f"pressure {number}", timeout=5)
    assert ray.get(target.total.remote(held)) == 5000
    with pytest.raises(ray.exceptions.RayTaskError, match="never fits"):
        ray.get(target.total.remote(source.make.remote(1, CAPACITY_BYTES)))
    owner.evict("pressure 3")
    del held
    until_empty(owner)


@pytest.mark.parametrize(
    ("devices", "says"),
    [
        (["meta"], "for cpu and cuda, not meta"),
        (["cpu", "meta"], "one kind of device an object"),
    ],
)
def test_tensors_of_a_wrong_device_fail_the_task_and_take_no_room(
    owner: blocking.FeatureCache, actors: tuple[Any, Any], devices: list[str], says: str
) -> None:
    source, target = actors
    with pytest.raises(ray.exceptions.RayTaskError, match=says):
        ray.get(target.same.remote(source.make_on.remote(*devices)))
    until_empty(owner)


def test_asyncio_actors_send_and_receive(owner: blocking.FeatureCache) -> None:
    actor = scenes.async_actor_class()
    source, target = actor.remote(), actor.remote()
    sums = [target.total.remote(source.make.remote(number)) for number in range(20)]
    assert ray.get(sums) == [1000 * number for number in range(20)]
    del sums
    until_empty(owner)


def test_an_actor_that_is_killed_leaves_nothing_pinned_and_works_again_after_its_restart(
    owner: blocking.FeatureCache,
) -> None:
    actor = scenes.actor_class(owner.endpoint)
    source, target = actor.remote(), actor.remote()
    held = [source.make.remote(number) for number in range(5)]
    assert ray.get(target.total.remote(*held)) == 10_000
    os.kill(ray.get(source.pid.remote()), signal.SIGKILL)
    until(lambda: owner.statistics().pinned_bytes == 0)
    seen = owner.statistics()
    assert seen.used_bytes == seen.resident_bytes > 0  # may be evicted, all of it
    assert ray.get(target.total.remote(held[4])) == 4000  # until then it can be read still

    ref = owner.put(torch.zeros(CAPACITY_BYTES, dtype=torch.uint8), timeout=5)
    owner.discard(ref)
    until_empty(owner)
    with pytest.raises(ray.exceptions.RayTaskError, match="Have it made again"):
        ray.get(target.total.remote(held[4]))

    def answers() -> bool:
        with suppress(ray.exceptions.RayActorError):
            return isinstance(ray.get(source.pid.remote()), int)
        return False

    until(answers)
    assert ray.get(target.total.remote(source.make.remote(6))) == 6000
    assert ray.get(source.total.remote(target.make.remote(7))) == 7000
    del held
    until_empty(owner)


# --- the transport alone ----------------------------------------------------------------------------


def transport_to(endpoint: str) -> FeatcacheTransport:
    from featcache.integrations.ray.transport import FeatcacheTransport

    class Configured(FeatcacheTransport):
        config = Config(endpoint=endpoint, put_timeout_s=5)

    return Configured()


@pytest.fixture
def transport(owner: blocking.FeatureCache) -> FeatcacheTransport:
    return transport_to(owner.endpoint)


def test_a_receiver_without_tensor_transport_is_warned_of_once(
    transport: FeatcacheTransport, actors: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    source, target = actors
    waits_in_vain = scenes.plain_actor_class().remote()
    with caplog.at_level(logging.WARNING, "featcache"):
        transport.get_communicator_metadata(source, target)
        transport.get_communicator_metadata(source, waits_in_vain)
        transport.get_communicator_metadata(source, waits_in_vain)
    (record,) = [each for each in caplog.records if "tensor" in each.getMessage()]
    assert "enable_tensor_transport=True" in record.getMessage()
    assert str(waits_in_vain) in record.getMessage()


def test_a_task_that_ray_repeats_keeps_its_first_object(
    owner: blocking.FeatureCache, transport: FeatcacheTransport
) -> None:
    first = transport.extract_tensor_transport_metadata("a1", [torch.ones(3)])
    assert transport.extract_tensor_transport_metadata("a1", [torch.zeros(3)]) is first
    assert owner.statistics().slots_used == 1
    buffer = torch.zeros(3)
    (found,) = transport.recv_multiple_tensors("a1", first, rdt.CommunicatorMetadata(), [buffer])
    assert found is buffer
    assert buffer.tolist() == [1, 1, 1]
    transport.garbage_collect("a1", first, [])
    until_empty(owner)
    with pytest.raises(KeyNotFound, match="Have it made again"):
        transport.recv_multiple_tensors("a1", first, rdt.CommunicatorMetadata())
    transport.garbage_collect("a1", first, [])  # as Ray repeats it: nothing is left to be done


def test_a_receiver_with_no_gpu_is_told_what_to_do(
    owner: blocking.FeatureCache, transport: FeatcacheTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = transport.extract_tensor_transport_metadata("b2", [torch.ones(3)])
    made.tensor_device = "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingsError, match="give the actor num_gpus"):
        transport.recv_multiple_tensors("b2", made, rdt.CommunicatorMetadata())
    transport.garbage_collect("b2", made, [])
    until_empty(owner)


def test_an_owner_that_ends_fails_puts_and_receives_but_no_free() -> None:
    with blocking.create(capacity=CAPACITY_BYTES) as owner:
        transport = transport_to(owner.endpoint)
        made = transport.extract_tensor_transport_metadata("c3", [torch.ones(3)])
        assert transport.recv_multiple_tensors("c3", made, rdt.CommunicatorMetadata())
    with pytest.raises(OwnerLost):
        transport.recv_multiple_tensors("c3", made, rdt.CommunicatorMetadata())
    with pytest.raises(OwnerLost):
        transport.extract_tensor_transport_metadata("d4", [torch.ones(3)])
    transport.garbage_collect("c3", made, [])
