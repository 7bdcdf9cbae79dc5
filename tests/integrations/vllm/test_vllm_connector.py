"""The connector by vLLM's own classes: factory, scheduler, and two tensor-parallel ranks, with no engine."""

import inspect
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib import util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from featcache import PoolFull, SettingsError, blocking
from integrations.vllm.enginehost import MODULE
from support.slabs import same

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from prometheus_client import Counter, Gauge, Histogram
from vllm.config import ECTransferConfig
from vllm.distributed.ec_transfer.ec_connector import base
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole
from vllm.distributed.ec_transfer.ec_connector.factory import ECConnectorFactory
from vllm.distributed.ec_transfer.ec_connector.utils import ECOutputAggregator
from vllm.v1.outputs import ECConnectorOutput, ModelRunnerOutput

from featcache.integrations.vllm import connector
from featcache.integrations.vllm.ahead import Orders
from featcache.integrations.vllm.connector import FeatcacheECConnector
from featcache.integrations.vllm.counts import COUNTERS
from featcache.integrations.vllm.stats import FeatcacheStats

OUTPUT = torch.arange(32, dtype=torch.bfloat16).reshape(4, 8)


def config(endpoint: str, role: str = "ec_both", ranks: int = 1, **extra: Any) -> Any:
    """As much of a VllmConfig as connectors look at, with vLLM's own transfer config."""
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model="m", dtype=torch.float32, multimodal_config=None, is_encoder_decoder=False
        ),
        cache_config=SimpleNamespace(enable_prefix_caching=True),
        load_config=SimpleNamespace(load_format="auto"),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks, data_parallel_rank=0),
        ec_transfer_config=ECTransferConfig(
            ec_connector="FeatcacheECConnector",
            ec_connector_module_path=MODULE,
            ec_role=role,
            ec_connector_extra_config={"endpoint": endpoint, **extra},
        ),
    )


class Request:
    """As much of vLLM's request as connectors look at."""

    def __init__(self, request_id: str, *identifiers: str) -> None:
        self.request_id = request_id
        self.mm_features = [
            SimpleNamespace(
                identifier=each,
                modality="image",
                data={"pixel_values": 1},
                mm_position=SimpleNamespace(offset=0, length=4),
            )
            for each in identifiers
        ]

    def get_num_encoder_embeds(self, index: int) -> int:
        return 4


def until(holds: Callable[[], object]) -> None:
    give_up_s = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < give_up_s, "it did not come"


@pytest.fixture
def owner() -> Iterator[blocking.FeatureCache]:
    with blocking.create(capacity="1MiB") as cache:
        yield cache


Made = Callable[..., FeatcacheECConnector]


@pytest.fixture
def made(owner: blocking.FeatureCache) -> Iterator[Made]:
    """Connectors by vLLM's factory, shut down at the end."""
    with ExitStack() as stack:

        def make(role: ECConnectorRole, engine: str = "ec_both", **how: Any) -> Any:
            one = ECConnectorFactory.create_connector(config(owner.endpoint, engine, **how), role)
            stack.callback(one.shutdown)
            return one

        yield make


SCHEDULER, WORKER = ECConnectorRole.SCHEDULER, ECConnectorRole.WORKER


def saved(worker: FeatcacheECConnector, identifier: str, output: Any = OUTPUT) -> None:
    """Have a producer's worker save an output, and wait until it says so."""
    worker.save_caches({identifier: output}, identifier)
    told: list[str] = []

    def has() -> bool:
        meta = worker.build_connector_worker_meta()
        told.extend([] if meta is None else meta.saved)
        return identifier in told

    until(has)


def planned(
    scheduler: FeatcacheECConnector, request: Request, encodes: dict[str, list[int]] | None = None
) -> Any:
    """Plan one step with all inputs of a request, as vLLM's scheduler does."""
    assert scheduler.ensure_cache_available(request, 0)
    for index, feature in enumerate(request.mm_features):
        scheduler.has_cache_item(feature.identifier)
        scheduler.update_state_after_alloc(request, index)
    output = SimpleNamespace(
        scheduled_encoder_inputs={} if encodes is None else encodes,
        num_scheduled_tokens={request.request_id: 8},
    )
    output.ec_connector_metadata = scheduler.build_connector_meta(output)
    return output


def loaded(worker: FeatcacheECConnector, output: Any) -> dict[str, Any]:
    """Run a step's loads as vLLM's runner does; return its encoder cache."""
    cache: dict[str, Any] = {}
    worker.bind_connector_metadata(output.ec_connector_metadata)
    worker.start_load_caches(cache)
    worker.clear_connector_metadata()
    return cache


def tell(scheduler: FeatcacheECConnector, *workers: FeatcacheECConnector) -> None:
    """Bring what workers tell of a step to the scheduler, by vLLM's own aggregator."""
    outputs = [
        ModelRunnerOutput(
            req_ids=[],
            req_id_to_index={},
            ec_connector_output=ECConnectorOutput(
                ec_connector_worker_meta=pickle.loads(
                    pickle.dumps(worker.build_connector_worker_meta())
                )
            ),
        )
        for worker in workers
    ]
    merged = ECOutputAggregator().aggregate(list(outputs), 0)
    assert merged is not None
    if merged.ec_connector_output is not None:
        scheduler.update_connector_output(merged.ec_connector_output)


def leased(scheduler: FeatcacheECConnector) -> int:
    assert scheduler._scheduler is not None
    return sum(scheduler._scheduler.leased.values())


def test_vllms_factory_finds_the_class() -> None:
    assert ECConnectorFactory.get_connector_class(config("x").ec_transfer_config) is (
        FeatcacheECConnector
    )


def test_a_mistake_in_the_config_stops_the_start() -> None:
    with pytest.raises(SettingsError, match="'endpiont' is not known"):
        ECConnectorFactory.create_connector(config("x", endpiont="y"), SCHEDULER)


@pytest.mark.parametrize("output", [OUTPUT, [OUTPUT, OUTPUT.to(torch.int8)]])
def test_what_a_producer_saves_a_consumer_loads(made: Made, output: Any) -> None:
    producer, consumer = made(WORKER, "ec_producer"), made(WORKER, "ec_consumer")
    scheduler = made(SCHEDULER, "ec_consumer")
    saved(producer, "a", output)
    found = loaded(consumer, planned(scheduler, Request("r", "a")))["a"]
    pairs = (
        [(found, output)] if isinstance(output, torch.Tensor) else zip(found, output, strict=True)
    )
    assert all(same(*pair) for pair in pairs)
    tell(scheduler, consumer)
    assert leased(scheduler) == 0


def test_a_consumer_saves_nothing(made: Made, owner: blocking.FeatureCache) -> None:
    consumer = made(WORKER, "ec_consumer")
    consumer.save_caches({"a": OUTPUT}, "a")
    consumer.shutdown()
    assert owner.statistics().puts == 0


def test_of_a_key_that_is_nowhere_nothing_is_planned(made: Made) -> None:
    scheduler = made(SCHEDULER, "ec_consumer")
    request = Request("r", "a")
    until(lambda: scheduler.ensure_cache_available(request, 0))
    assert not scheduler.has_cache_item("a")
    assert planned(scheduler, request).ec_connector_metadata.loads == []


def test_inputs_that_are_computed_already_are_not_asked_for(made: Made) -> None:
    scheduler = made(SCHEDULER)
    assert scheduler.ensure_cache_available(Request("r", "a"), 4)
    assert not scheduler.ensure_cache_available(Request("r", "a"), 3)


def test_what_was_looked_at_and_not_planned_is_leased_no_more(made: Made) -> None:
    saved(made(WORKER), "a")
    scheduler = made(SCHEDULER)
    assert scheduler.has_cache_item("a")
    scheduler.build_connector_meta(SimpleNamespace(scheduled_encoder_inputs={}))
    assert leased(scheduler) == 0


def test_a_feature_stays_until_both_ranks_have_it(
    made: Made, owner: blocking.FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = torch.zeros(40_000, 4)  # more than half of the pool
    ranks = ranks_of(made, monkeypatch)
    scheduler = made(SCHEDULER, ranks=2)
    saved(made(WORKER, "ec_producer"), "a", big)
    request = Request("r", "a")
    request.get_num_encoder_embeds = lambda index: 40_000  # type: ignore[method-assign]
    step = planned(scheduler, request)
    with pytest.raises(PoolFull):
        owner.put(big, key="b", on_full="raise")
    caches = on_both(ranks, step)
    assert all(same(cache["a"], big) for cache in caches)
    tell(scheduler, ranks[0])
    assert leased(scheduler) == 1
    tell(scheduler, ranks[1])
    assert leased(scheduler) == 0
    owner.put(big, key="b", on_full="raise")


def test_what_one_rank_can_not_load_both_encode(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = ranks_of(made, monkeypatch)
    scheduler, producer = made(SCHEDULER, ranks=2), made(WORKER, "ec_producer")
    for identifier in "abc":
        saved(producer, identifier)
    step = planned(scheduler, Request("r", *"abc"))
    worker = ranks[1]._worker
    assert worker is not None
    get = worker._loaded
    monkeypatch.setattr(
        worker,
        "_loaded",
        lambda loads, **how: {k: v for k, v in get(loads, **how).items() if k != "b"},
    )
    steps = [pickle.loads(pickle.dumps(step)) for _ in ranks]  # as each rank's process has it
    caches = on_both(ranks, *steps)
    assert [sorted(cache) for cache in caches] == [["a", "c"]] * 2
    assert [each.scheduled_encoder_inputs for each in steps] == [{"r": [1]}] * 2
    tell(scheduler, *ranks)
    assert leased(scheduler) == 0


def ranks_of(made: Made, monkeypatch: pytest.MonkeyPatch) -> list[FeatcacheECConnector]:
    """Two workers of one consumer; where ranks agree by a collective, these meet at a barrier."""
    ranks = [made(WORKER, "ec_consumer", ranks=2) for _ in range(2)]
    barrier, flags = threading.Barrier(2, timeout=20), dict[int, list[bool]]()

    def agree(well: list[bool]) -> list[bool]:
        flags[threading.get_ident()] = well
        barrier.wait()
        both = [all(pair) for pair in zip(*flags.values(), strict=True)]
        barrier.wait()
        return both

    for rank in ranks:
        assert rank._worker is not None
        monkeypatch.setattr(rank._worker, "_agree", agree)
    return ranks


def on_both(ranks: list[FeatcacheECConnector], *steps: Any) -> list[dict[str, Any]]:
    caches: list[dict[str, Any]] = [{}, {}]

    def run(at: int) -> None:
        caches[at] = loaded(ranks[at], steps[at % len(steps)])

    threads = [threading.Thread(target=run, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return caches


def test_a_feature_of_other_rows_is_encoded_instead(made: Made) -> None:
    saved(made(WORKER), "a", torch.ones(5, 8))
    scheduler, worker = made(SCHEDULER), made(WORKER)
    step = planned(scheduler, Request("r", "a"))
    assert loaded(worker, step) == {}
    assert step.scheduled_encoder_inputs == {"r": [0]}


def test_an_evicted_feature_is_encoded_by_the_step_that_wanted_it(
    made: Made, owner: blocking.FeatureCache
) -> None:
    worker, scheduler = made(WORKER), made(SCHEDULER)
    for identifier in "ab":
        saved(worker, identifier)
    step = planned(scheduler, Request("r", *"ab"), {"other": [0]})
    assert owner.evict(step.ec_connector_metadata.loads[0].key)
    assert list(loaded(worker, step)) == ["b"]
    assert step.scheduled_encoder_inputs == {"other": [0], "r": [0]}


def test_a_producer_that_has_the_output_still_saves_it_again(made: Made) -> None:
    scheduler, worker = made(SCHEDULER, "ec_producer"), made(WORKER, "ec_producer")
    request = Request("r", "a")
    until(lambda: scheduler.ensure_cache_available(request, 0))
    output = SimpleNamespace(scheduled_encoder_inputs={}, num_scheduled_tokens={"r": 8})
    step = scheduler.build_connector_meta(output)  # vLLM's own cache has it: nothing was allocated
    worker.bind_connector_metadata(step)
    worker.start_save_caches(encoder_cache={"a": OUTPUT})
    until(lambda: scheduler.has_cache_item("a") or scheduler.build_connector_meta(output) is None)


def test_an_input_that_brings_only_sizes_and_is_nowhere_fails_its_request(made: Made) -> None:
    scheduler = made(SCHEDULER, "ec_consumer")
    side = scheduler._scheduler
    assert side is not None
    side._orders = Orders(side._link, "e", 1, lambda feature: "pixel_values" in feature.data)
    request, whole = Request("r", "a"), Request("w", "b")
    request.mm_features[0].data = {"image_grid_thw": 1}
    until(lambda: scheduler.ensure_cache_available(whole, 0))

    def taken() -> bool:
        assert not scheduler.ensure_cache_available(request, 0)
        return scheduler.take_unavailable_requests() == {"r"}

    until(taken)


def test_ranks_have_what_brings_only_sizes_before_its_step_is_planned(
    made: Made, owner: blocking.FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connector, "encodable_here", lambda _: lambda _: False)
    monkeypatch.setattr(
        connector, "name_of", lambda _: "the engine"
    )  # one config in all its processes
    scheduler, worker = made(SCHEDULER, "ec_consumer"), made(WORKER, "ec_consumer")
    saved(made(WORKER, "ec_producer"), "a")
    request = Request("r", "a")
    until(lambda: scheduler.ensure_cache_available(request, 0) or not built(scheduler))
    step = planned(scheduler, request)
    owner.close()
    assert same(loaded(worker, step)["a"], OUTPUT)
    assert step.scheduled_encoder_inputs == {}


def built(scheduler: FeatcacheECConnector) -> object:
    """End a pass of the scheduler that planned nothing."""
    return scheduler.build_connector_meta(SimpleNamespace(scheduled_encoder_inputs={}))


def test_encoder_decoder_models_go_without(made: Made) -> None:
    saved(made(WORKER), "a")
    scheduler = made(SCHEDULER)
    assert scheduler.has_cache_item("a")
    scheduler._passive = True
    assert not scheduler.has_cache_item("a")
    assert scheduler.ensure_cache_available(Request("r", "z"), 0)


def test_engines_with_lora_in_the_encoder_share_nothing(owner: blocking.FeatureCache) -> None:
    """Their identifiers have an adapter's name, which is another adapter in another engine."""
    settings = config(owner.endpoint)
    settings.lora_config = SimpleNamespace(enable_tower_connector_lora=True)
    scheduler = FeatcacheECConnector(settings, SCHEDULER)
    worker = FeatcacheECConnector(settings, WORKER)
    try:
        worker.save_caches({"a": OUTPUT}, "a")
        worker.shutdown()  # saves what is queued
        assert owner.statistics().puts == 0
        assert scheduler.ensure_cache_available(Request("r", "a"), 0)
    finally:
        scheduler.shutdown()


def test_a_load_that_fails_in_any_way_is_encoded(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that raised would leave the others waiting for it where all agree."""
    scheduler, worker = made(SCHEDULER), made(WORKER)
    saved(worker, "a")
    step = planned(scheduler, Request("r", "a"))
    side = worker._worker
    assert side is not None

    def no_memory(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(side, "_loaded", no_memory)
    assert loaded(worker, step) == {}
    assert step.scheduled_encoder_inputs == {"r": [0]}
    tell(scheduler, worker)
    assert leased(scheduler) == 0


def test_counts_reach_vllms_log_line_and_prometheus(made: Made) -> None:
    worker, scheduler = made(WORKER), made(SCHEDULER)
    saved(worker, "a")
    step = planned(scheduler, Request("r", "a"))
    loaded(worker, step)
    tell(scheduler, worker)
    stats = scheduler.get_ec_connector_stats()
    assert stats is not None
    assert not stats.is_empty()
    assert (stats.data["hits"], stats.data["loads"], stats.data["load_bytes"]) == (1, 1, 64)
    assert scheduler.get_ec_connector_stats() is None
    both = FeatcacheECConnector.build_ec_connector_stats({"hits": 2}).aggregate(stats)
    assert both.reduce()["hits"] == 3
    seen: dict[str, float] = {}

    class Fake:
        def __init__(self, name: str, **_: Any) -> None:
            self.name = name

        def labels(self, *values: object) -> "Fake":
            assert values == ("m", "0")
            return self

        def inc(self, amount: float) -> None:
            seen[self.name] = amount

    kinds: Any = {Counter: Fake, Gauge: Fake, Histogram: Fake}
    prom = FeatcacheECConnector.build_prom_metrics(
        config("x"), kinds, ["model_name", "engine"], {0: ["m", "0"]}
    )
    prom.observe(pickle.loads(pickle.dumps(both.data)), 0)
    assert seen["vllm:ec_featcache_hits"] == 3
    assert set(seen) <= {f"vllm:ec_featcache_{name}" for name in COUNTERS}
    both.reset()
    assert both.is_empty()
    assert isinstance(both, FeatcacheStats)


def test_a_shutdown_twice_is_one(made: Made) -> None:
    worker = made(WORKER)
    worker.shutdown()
    worker.shutdown()


def bases() -> list[Any]:
    """This vLLM's interface, and the next version's where its file was unpacked."""
    found: list[Any] = [base]
    path = os.environ.get("FEATCACHE_NEXT_VLLM_BASE", "")
    if path and Path(path).exists():
        spec = util.spec_from_file_location("next_vllm_base", path)
        assert spec is not None
        assert spec.loader is not None
        module = util.module_from_spec(spec)
        sys.modules["next_vllm_base"] = module
        spec.loader.exec_module(module)
        found.append(module)
    return found


@pytest.mark.parametrize("module", bases(), ids=lambda module: module.__name__)
def test_calls_fit_the_interface(module: Any) -> None:
    for name, call in inspect.getmembers(module.ECConnectorBase, inspect.isfunction):
        ours = getattr(FeatcacheECConnector, name)
        if name.startswith("__"):
            continue
        theirs = inspect.signature(call).parameters
        mine = inspect.signature(ours).parameters
        for parameter in theirs.values():
            catches = any(each.kind is each.VAR_KEYWORD for each in mine.values())
            assert parameter.name in mine or parameter.kind is parameter.VAR_KEYWORD or catches, (
                name
            )
    abstract = module.ECConnectorBase.__abstractmethods__
    assert all(name in vars(FeatcacheECConnector) for name in abstract)
