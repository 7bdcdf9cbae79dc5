"""Features through SGLang's own calls of its CUDA IPC transport, on featcache's slab."""

import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch

from featcache.integrations.sglang.samples import tokenize
from integrations.sglang.real import needs_sglang
from integrations.sglang.scenes import as_rank, item, on_gpu, output, processor, published, rank
from support.processes import Start, starting, until

pytestmark = needs_sglang


@pytest.fixture
def start() -> Iterator[Start]:
    with starting() as start:
        yield start


@pytest.fixture
def tokenizer() -> Iterator[Any]:
    """A processor of two tensor-parallel ranks' server, with its pool."""
    with published(mm_feature_transport="cuda_ipc", tp_size=2):
        made = processor()
        yield made
        made.cudaipc_mmfeature_pool.shutdown()


async def drained(pool: Any) -> None:
    await until(lambda: pool.active_lease_count == 0, what="every feature is recycled")


def wrapped(tokenizer: Any, *features: Any) -> Any:
    request = output(*map(item, features))
    tokenizer._prepare_mm_items_for_transport(request.mm_items)
    return request


async def test_every_rank_reads_what_the_processor_wrapped(tokenizer: Any, start: Start) -> None:
    from sglang.srt.multimodal.transport.cuda_ipc import CudaIpcTensorTransportProxy

    features = [on_gpu(60, 32), on_gpu(7, 8, dtype=torch.bfloat16)]
    request = wrapped(tokenizer, *features)

    assert all(isinstance(one.feature, CudaIpcTensorTransportProxy) for one in request.mm_items)
    assert tokenizer.cudaipc_mmfeature_pool.active_lease_count == 2
    for child in (start(rank, 0), start(rank, 1)):
        (read,) = await child.ask("read", request)
        assert all(torch.equal(*pair) for pair in zip(read, features, strict=True))
    await drained(tokenizer.cudaipc_mmfeature_pool)


async def test_a_rank_that_gives_its_request_up_pays(tokenizer: Any, start: Start) -> None:
    request = wrapped(tokenizer, on_gpu(4, 4))
    reads, gives_up = start(rank, 0), start(rank, 1)

    await reads.ask("read", request)
    assert tokenizer.cudaipc_mmfeature_pool.active_lease_count == 1
    await gives_up.ask("give up", request)

    await drained(tokenizer.cudaipc_mmfeature_pool)


@pytest.mark.parametrize("what", ["hold", "read"])
async def test_a_dead_rank_leaks_nothing(tokenizer: Any, start: Start, what: str) -> None:
    """One that died in the middle of a read, and one that owed reads that it never began."""
    first, second = wrapped(tokenizer, on_gpu(4, 4)), wrapped(tokenizer, on_gpu(4, 4))
    lives, dies = start(rank, 0), start(rank, 1)
    await dies.ask(what, first)

    dies.kill()

    for request in (first, second):
        await lives.ask("read", request)
    await drained(tokenizer.cudaipc_mmfeature_pool)


async def test_a_failed_request_releases_what_is_left(tokenizer: Any) -> None:
    from sglang.srt.managers.schedule_batch import MultimodalInputs

    request = wrapped(tokenizer, on_gpu(4, 4), on_gpu(2, 2), on_gpu(3, 3))
    pool = tokenizer.cudaipc_mmfeature_pool
    pool.cancel_proxy(request.mm_items[1].feature)  # so that the second can't be read

    for number in (0, 1):
        proxies = [type(one.feature).from_bytes(one.feature.to_bytes()) for one in request.mm_items]
        with as_rank(number), pytest.raises(RuntimeError, match="is lost"):
            MultimodalInputs.from_processor_output(output(*map(item, proxies)))
        assert [proxy._consumer_acknowledged for proxy in proxies] == [True, True, True]

    await drained(pool)


async def test_a_request_of_several_samples_is_read_as_often_as_it_is_sent(
    tokenizer: Any, start: Start
) -> None:
    """With ``n`` above 1 SGLang sends one tokenized request n + 1 times, its features with it."""
    feature, extra = on_gpu(4, 4), on_gpu(2, 3)
    request = wrapped(tokenizer, feature)
    request.mm_items[0].model_specific_data["extra"] = tokenizer.cudaipc_mmfeature_pool.wrap_tensor(
        extra, use_pool_handle_cache=True
    )

    async def original(manager: Any, obj: Any) -> Any:
        return SimpleNamespace(mm_inputs=request)

    samples = SimpleNamespace(sampling_params={"n": 2})
    tokenized = await tokenize(original, None, samples)

    ranks = [start(rank, 0), start(rank, 1)]
    for _ in range(3):
        for child in ranks:
            ((read,),) = await child.ask("read", tokenized.mm_inputs)
            assert torch.equal(read, feature)
    assert torch.equal(request.mm_items[0].model_specific_data["extra"], extra)
    await drained(tokenizer.cudaipc_mmfeature_pool)


@pytest.mark.parametrize("sampling", [None, {}, {"n": 1}, {"n": None}])
async def test_a_request_of_one_sample_keeps_its_proxies(tokenizer: Any, sampling: Any) -> None:
    request = wrapped(tokenizer, on_gpu(4, 4))
    proxy = request.mm_items[0].feature

    async def original(manager: Any, obj: Any) -> Any:
        return SimpleNamespace(mm_inputs=request)

    await tokenize(original, None, SimpleNamespace(sampling_params=sampling))

    assert request.mm_items[0].feature is proxy
    tokenizer.cudaipc_mmfeature_pool.cancel_proxy(proxy)


async def test_wrapping_that_fails_halfway_is_undone(tokenizer: Any) -> None:
    features = [on_gpu(16), on_gpu(0)]
    items = [item(feature) for feature in features]

    with pytest.raises(ValueError, match="empty tensor"):
        tokenizer._prepare_mm_items_for_transport(items)

    assert [one.feature for one in items] == features
    await drained(tokenizer.cudaipc_mmfeature_pool)


async def test_a_feature_that_waits_for_its_model_is_read_then(tokenizer: Any) -> None:
    """Deferred reconstruction: the request is taken in with its proxy, and materialised later."""
    from sglang.srt.managers.schedule_batch import MultimodalInputs
    from sglang.srt.multimodal.transport.cuda_ipc import (
        DEFER_CUDA_IPC_FEATURE_RECONSTRUCTION_KEY as DEFER,
    )

    feature = on_gpu(5, 6)
    deferred = item(feature, model_specific_data={DEFER: True})
    tokenizer._prepare_mm_items_for_transport([deferred])
    proxy = deferred.feature
    for number in (0, 1):
        mine = item(type(proxy).from_bytes(proxy.to_bytes()), model_specific_data={DEFER: True})
        with as_rank(number):
            inputs = MultimodalInputs.from_processor_output(output(mine))
            assert inputs.mm_items[0].has_cuda_ipc_proxy()
            if number:
                inputs.release_features()  # aborted before its prefill
                assert mine.feature is None
            else:
                mine.reconstruct(0)
                assert torch.equal(mine.feature, feature)

    await drained(tokenizer.cudaipc_mmfeature_pool)


async def test_positional_embeddings_share_the_processors_pool(tokenizer: Any) -> None:
    from sglang.srt.managers import positional_embeds_transport
    from sglang.srt.managers.embed_types import PositionalEmbeds

    with patch.object(positional_embeds_transport, "is_cuda", lambda: True):
        transport = positional_embeds_transport.PositionalEmbedsTransport(0, tokenizer)
    embeds = on_gpu(2, 8)
    request = SimpleNamespace(
        positional_embed_overrides=PositionalEmbeds(embeds=embeds, positions=[3, 4])
    )

    (proxy,) = transport.prepare_for_dispatch([request])
    for number in (0, 1):
        override = PositionalEmbeds(type(proxy).from_bytes(proxy.to_bytes()), [3, 4])
        with as_rank(number):
            override.reconstruct(0)
        assert torch.equal(override.embeds, embeds)
    transport.prepare_for_dispatch([SimpleNamespace(positional_embed_overrides=None)])

    await drained(tokenizer.cudaipc_mmfeature_pool)
    request.positional_embed_overrides = PositionalEmbeds(embeds=embeds, positions=[3, 4])
    transport.cancel_for_dispatch(transport.prepare_for_dispatch([request]))
    await drained(tokenizer.cudaipc_mmfeature_pool)


async def test_qwen3_vl_borrows_and_gives_back() -> None:
    """Its model packs the borrowed view into its own buffer, and ends the borrow behind that."""
    from sglang.srt.models import qwen3_vl
    from sglang.srt.multimodal.transport.cuda_ipc import (
        BORROW_CUDA_IPC_FEATURE_KEY as BORROW,
    )
    from sglang.srt.multimodal.transport.cuda_ipc import (
        RETAINED_CUDA_IPC_FEATURE_PROXY_KEY as RETAINED,
    )

    materialize = qwen3_vl.materialize_multimodal_features
    with published(mm_feature_transport="cuda_ipc", tp_size=1):
        pool = processor().cudaipc_mmfeature_pool
        feature = on_gpu(6, 4)
        one = item(pool.wrap_tensor(feature, use_pool_handle_cache=True))
        one.model_specific_data[BORROW] = True
        model = SimpleNamespace(
            visual=SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)
        )
        with (
            as_rank(0),
            patch("torch.cuda.current_stream"),
            patch("torch.cuda.Event", Mock()),
            # its buffer, on the host
            patch.object(
                qwen3_vl,
                "materialize_multimodal_features",
                lambda features, **more: materialize(features, **more | {"device": "cpu"}),
            ),
        ):
            packed, borrowed, _ = (
                qwen3_vl.Qwen3VLForConditionalGeneration._materialize_visual_items(
                    model, [one], [0], preserve_for_reprefill=True
                )
            )

        assert torch.equal(packed, feature)
        assert len(borrowed) == 1
        assert torch.equal(one.feature, feature)
        assert RETAINED not in one.model_specific_data
        await drained(pool)
        pool.shutdown()


async def test_a_borrow_that_its_request_abandons_is_ended(tokenizer: Any, start: Start) -> None:
    request = wrapped(tokenizer, on_gpu(4, 4))
    holds, reads = start(rank, 0), start(rank, 1)
    await holds.ask("hold", request)
    await reads.ask("read", request)
    assert tokenizer.cudaipc_mmfeature_pool.active_lease_count == 1

    proxy = request.mm_items[0].feature
    mine = type(proxy).from_bytes(proxy.to_bytes())
    holds.kill()
    await drained(tokenizer.cudaipc_mmfeature_pool)

    with as_rank(0), pytest.raises(RuntimeError, match="is lost"):
        mine.reconstruct_on_target_device(0)


async def test_tokenizer_workers_share_one_slab_of_the_whole_budget(start: Start) -> None:
    with published(mm_feature_transport="cuda_ipc", tp_size=1, tokenizer_worker_num=2):
        mine = processor().cudaipc_mmfeature_pool
        other = start(worker)
        _, capacity_bytes, request, endpoint = await other.hear()

        plan = mine._end.slab.plan
        assert (plan.endpoint, plan.capacity_bytes) == (endpoint, capacity_bytes)
        assert capacity_bytes == 1 << 30
        with as_rank(0):
            read = request.mm_items[0].feature.reconstruct_on_target_device(0)
        assert torch.equal(read, torch.ones(2, 2))
        mine.shutdown()
        other.tell("over")
        await other.ends()


async def worker(pipe: Any) -> None:
    """Another tokenizer worker of the same server."""
    with published(mm_feature_transport="cuda_ipc", tp_size=1, tokenizer_worker_num=2):
        made = processor()
        request = wrapped(made, torch.ones(2, 2).as_subclass(type(on_gpu(1))))
        plan = made.cudaipc_mmfeature_pool._end.slab.plan
        pipe.say("up", plan.capacity_bytes, request, plan.endpoint)
        await pipe.hear()
        made.cudaipc_mmfeature_pool.shutdown()
    gc.collect()
