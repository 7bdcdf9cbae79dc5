"""Features through SGLang's own calls of its CUDA VMM transport, on featcache's slab."""

import asyncio
import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from integrations.sglang.real import needs_sglang
from integrations.sglang.scenes import as_rank, item, output, published, rank
from support.processes import Start, starting, until

pytestmark = needs_sglang
MIB = 1 << 20


@pytest.fixture
def start() -> Iterator[Start]:
    with starting() as start:
        yield start


@contextlib.contextmanager
def transporting(**fields: Any) -> Iterator[Any]:
    from sglang.srt.utils import cuda_vmm_transport_utils

    with published(mm_feature_transport="cuda_vmm", tp_size=2, **fields):
        transport = cuda_vmm_transport_utils.CudaVmmFeatureTransport(
            SimpleNamespace(base_gpu_id=0), object()
        )
        yield transport
        transport.shutdown()
        transport.shutdown()


@pytest.fixture
def transport() -> Iterator[Any]:
    with transporting() as made:
        yield made


async def drained(pool: Any) -> None:
    await until(lambda: pool.active_lease_count == 0, what="every feature is recycled")


async def test_every_rank_reads_what_was_prepared_for_dispatch(
    transport: Any, start: Start
) -> None:
    from sglang.srt.utils.cuda_vmm_transport_utils import CudaVmmTensorTransportProxy

    features = [torch.arange(k, k + 12.0).reshape(3, 4) for k in range(3)]
    request = output(*map(item, features))

    prepared = await transport.prepare_for_dispatch_async([request, None])

    assert prepared == request.mm_items
    assert all(isinstance(one.feature, CudaVmmTensorTransportProxy) for one in prepared)
    for child in (start(rank, 0), start(rank, 1)):
        (read,) = await child.ask("read", request)
        assert all(torch.equal(*pair) for pair in zip(read, features, strict=True))
    await drained(transport.pool)


async def test_a_request_that_was_not_dispatched_is_taken_back(transport: Any) -> None:
    request = output(item(torch.ones(4)), item(torch.ones(5)), item(torch.ones(6)))
    prepared = await transport.prepare_for_dispatch_async([request])
    assert transport.pool.active_lease_count == 3

    transport.cancel_for_dispatch(prepared)

    assert [one.feature for one in request.mm_items] == [None] * 3
    await drained(transport.pool)


async def test_a_task_cancelled_while_it_publishes_leaves_nothing(transport: Any) -> None:
    task = asyncio.ensure_future(
        transport.prepare_for_dispatch_async([output(item(torch.ones(4)), item(torch.ones(5)))])
    )
    await asyncio.sleep(0)  # it has begun
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    transport._publisher_executor.submit(lambda: None).result()  # behind what was begun
    await drained(transport.pool)


async def test_a_publication_that_fails_halfway_is_undone(transport: Any) -> None:
    features = [torch.ones(4), torch.ones(5)]
    items = [item(features[0], precomputed_embeddings=[torch.ones(1)]), item(features[1])]

    with pytest.raises(TypeError, match="single tensor"):
        transport.wrap_items(items)

    assert [one.feature for one in items] == features
    await drained(transport.pool)


async def test_a_rank_that_gives_its_request_up_pays_for_each_feature(
    transport: Any, start: Start
) -> None:
    request = output(item(torch.ones(4)), item(torch.ones(5)))
    await transport.prepare_for_dispatch_async([request])

    await start(rank, 0).ask("give up", request)
    assert transport.pool.active_lease_count == 2
    await start(rank, 1).ask("read", request)

    await drained(transport.pool)


async def test_a_full_slab_falls_back_to_the_host_after_one_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sglang.srt.environ import envs

    monkeypatch.setenv("FEATCACHE_SGLANG_SPILL", "0")
    monkeypatch.setenv("FEATCACHE_SGLANG_WAIT", "0.01")
    with envs.SGLANG_MM_FEATURE_CACHE_MB.override(4), transporting() as transport:
        held = output(item(torch.zeros(3 * MIB, dtype=torch.uint8)))
        await transport.prepare_for_dispatch_async([held])
        features = [torch.ones(2 * MIB, dtype=torch.uint8) for _ in range(2)]
        late = output(*map(item, features))

        await transport.prepare_for_dispatch_async([late])

        assert all(isinstance(one.feature, torch.Tensor) for one in late.mm_items)
        assert transport.pool._end.slab.plan.capacity_bytes == 4 * MIB
        transport.cancel_for_dispatch(held.mm_items)


def test_an_error_of_one_rank_is_its_requests_alone(transport: Any) -> None:
    """SGLang's scheduler asks all ranks before it takes a request in: the lost feature ends it."""
    from sglang.srt.managers.scheduler import Scheduler

    request = output(item(torch.ones(4)))
    transport.wrap_items(request.mm_items)
    transport.pool.cancel_proxy(request.mm_items[0].feature)  # lost on its way
    scheduler = object.__new__(Scheduler)
    scheduler.dp_tp_cpu_group = None
    scheduler.model_config = SimpleNamespace(requires_mm_token_modalities=False)
    tokenized = SimpleNamespace(mm_inputs=request)

    with as_rank(0), patch.object(Scheduler, "_tokenized_requests", lambda *_: (tokenized,)):
        (error,) = scheduler._materialize_cuda_vmm_inputs(tokenized)

    assert "is lost" in error
    assert tokenized.mm_inputs is None


def test_several_nodes_keep_sglangs_own_pool() -> None:
    """It shares by FABRIC handles, which a slab has not; there is no GPU here to make it on."""
    from sglang.srt.utils import cuda_vmm_transport_utils as vmm

    made: list[Any] = []
    own = vmm.CudaVmmMemoryPool.__mro__[1]
    with patch.object(own, "__init__", lambda *arguments: made.append(arguments[1:])):
        pool = vmm.CudaVmmMemoryPool(MIB, 0.05, 0, 2, allow_posix_fallback=False)

    assert made == [(MIB, 0.05, 0, 2, False)]
    assert pool._end is None
