"""Spans, as the SDK of OpenTelemetry collects them."""

import asyncio
from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from prometheus_client import CollectorRegistry

import featcache
from featcache import FeatureCache, FeatureClient, FeatureRef, MalformedRef, SettingsError, StaleRef
from featcache.integrations import metrics, tracing
from integrations.scraping import one, scraped
from support.caches import KIB, filled, full, pair, small, tensor, until


class Spans:
    """What was exported."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = self.provider.get_tracer("test")

    def take(self) -> list[ReadableSpan]:
        """The spans that ended since the last call."""
        found = list(self._exporter.get_finished_spans())
        self._exporter.clear()
        return found

    def names(self) -> list[str]:
        return [span.name.removeprefix("featcache.") for span in self.take()]


@pytest.fixture
def spans() -> Iterator[Spans]:
    made = Spans()
    tracing.instrument(made.provider)
    yield made
    tracing.uninstrument()
    assert not tracing.is_instrumented()
    assert "get" not in vars(FeatureCache)  # as it was: inherited
    assert not hasattr(FeatureClient.put, "__wrapped__")


def parent_of(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


def id_of(span: ReadableSpan) -> int:
    context = span.get_span_context()
    assert context is not None
    return context.span_id


async def test_a_put_a_get_and_a_borrow_have_spans_with_the_pool_and_the_bytes(
    spans: Spans,
) -> None:
    async with pair() as (owner, client):
        with spans.tracer.start_as_current_span("request") as request:
            ref = await owner.put(filled(KIB))
            await client.get(ref=ref)
            ref = await client.put(feature=filled(KIB))
            async with client.borrow(ref):
                assert spans.names() == ["put", "get", "put"]
        borrowed, asked = spans.take()
        assert (borrowed.name, asked.name) == ("featcache.borrow", "request")
        assert parent_of(borrowed) == request.get_span_context().span_id
        assert borrowed.attributes == {
            "featcache.pool": ref.pool_id.hex(),
            "featcache.bytes": KIB,
            "featcache.key": False,
        }
        kept = owner.put_nowait(filled(KIB), key="kept", readers=1)
        client.get_nowait(kept)
        await client.get("kept")
        with client.borrow("kept"):
            pass
        taken = spans.take()
        assert [span.name.removeprefix("featcache.") for span in taken] == [
            *("put", "get", "get", "borrow")
        ]
        for span in taken:
            assert span.attributes is not None
            assert span.attributes["featcache.bytes"] == KIB
            assert span.parent is None
        assert [span.attributes["featcache.key"] for span in taken if span.attributes] == [
            *(False, False, True, True)
        ]


async def test_a_wait_for_room_is_a_span_within_its_put(spans: Spans) -> None:
    async with pair() as (owner, client):
        ref = await full(owner)
        spans.take()
        waiting = [asyncio.create_task(each.put(filled(KIB))) for each in (owner, client)]
        await until(lambda: owner.statistics().waiters == 2)
        await client.release(ref)
        put_refs = await asyncio.gather(*waiting)
        found = spans.take()
        (wait,) = [span for span in found if span.name == "featcache.wait"]
        puts = {id_of(span): span for span in found if span.name == "featcache.put"}
        assert len(puts) == 2
        put = puts[parent_of(wait) or 0]  # the owner's: a client's put waits in the owner
        assert wait.attributes == {"featcache.pool": ref.pool_id.hex(), "featcache.granted": True}
        assert wait.start_time is not None
        assert wait.end_time is not None
        assert put.end_time is not None
        assert wait.start_time < wait.end_time <= put.end_time
        for each in put_refs:
            await client.release(each)
        await full(owner)
        spans.take()
        with pytest.raises(featcache.PutTimeout):
            await owner.put(filled(KIB), timeout=0.01)
        wait, put = spans.take()
        assert wait.attributes is not None
        assert wait.attributes["featcache.granted"] is False
        assert put.status.status_code is StatusCode.ERROR


async def test_a_call_that_raises_tells_its_error(spans: Spans) -> None:
    async with pair() as (owner, client):
        ref = await owner.put(filled(1))
        await owner.discard(ref)
        spans.take()
        with pytest.raises(StaleRef):
            await client.get(ref)
        with pytest.raises(StaleRef):
            async with client.borrow(ref):
                pass
        for span in spans.take():
            assert span.status.status_code is StatusCode.ERROR
            assert [event.name for event in span.events] == ["exception"]
        # One that is entered twice goes on being the one that it was.
        borrow = client.borrow(await owner.put(filled(1)))
        with borrow:
            spans.take()
            with pytest.raises(SettingsError, match="entered already"):
                borrow.__enter__()
            assert spans.names() == []
        assert spans.names() == ["borrow"]


def test_blocking_objects_have_the_same_spans(spans: Spans) -> None:
    blocking = featcache.blocking
    with (
        blocking.create(settings=small()) as owner,
        blocking.connect(owner.endpoint, settings=small()) as client,
    ):
        client.get(owner.put(filled(KIB)))
        client.get_nowait(owner.put_nowait(filled(KIB)))
        assert spans.names() == ["put", "get", "put", "get"]
        with spans.tracer.start_as_current_span("request") as request:
            ref = client.put(filled(KIB), key="kept", readers=1)
            with client.borrow(ref), client.borrow("kept"):
                assert spans.names() == ["put"]
        first, second, _ = spans.take()
        for span in (first, second):
            assert (span.name, parent_of(span)) == (
                "featcache.borrow",
                request.get_span_context().span_id,
            )
            assert span.attributes is not None
            assert span.attributes["featcache.bytes"] == KIB


async def test_spans_and_metrics_go_together_whichever_came_first(spans: Spans) -> None:
    registry = CollectorRegistry()
    async with pair() as (owner, client):
        metrics.register(owner, registry)
        metrics.register(client, registry)
        tracing.uninstrument()
        tracing.instrument(spans.provider)
        await client.get(await owner.put(filled(KIB)))
        with client.borrow(await owner.put(filled(KIB))):
            pass
        assert spans.names() == ["put", "get", "put", "borrow"]
        found = scraped(registry)
        assert one(found, "featcache_get_bytes_total") == 2 * KIB
        assert one(found, "featcache_put_host_seconds_count") == 2


async def test_off_the_classes_are_as_they_were() -> None:
    before = {kind: dict(vars(kind)) for kind in (FeatureCache, FeatureClient)}
    made = Spans()
    tracing.instrument(made.provider)
    tracing.instrument(made.provider)
    tracing.uninstrument()
    tracing.uninstrument()
    assert {kind: dict(vars(kind)) for kind in before} == before
    async with pair() as (owner, client):
        await client.get(await owner.put(filled(1)))
        assert made.take() == []


# --- context beside a ref -------------------------------------------------------------------------


async def test_the_context_goes_beside_the_ref(spans: Spans) -> None:
    async with pair() as (owner, client):
        with spans.tracer.start_as_current_span("sender") as sender:
            sent = tracing.to_bytes(await owner.put(filled(KIB, 7)))
        ref, context = tracing.from_bytes(sent)
        spans.take()
        with tracing.within(context):
            assert tensor(await client.get(ref))[0] == 7
        (get,) = spans.take()
        assert parent_of(get) == sender.get_span_context().span_id
        context_of_get = get.get_span_context()
        assert context_of_get is not None
        assert context_of_get.trace_id == sender.get_span_context().trace_id
        assert not trace.get_current_span().get_span_context().is_valid


REF = FeatureRef(
    b"p" * 16, "/run/pool.sock", 3, 4, 0, 16, (featcache.ref.TensorSpec(None, "uint8", (16,), 0),)
)


def test_the_bytes_of_a_ref_alone_have_no_context_and_an_old_reader_refuses_the_others() -> None:
    ref, context = tracing.from_bytes(REF.to_bytes())
    assert (ref, dict(context)) == (REF, {})
    envelope = tracing.to_bytes(REF)
    assert tracing.from_bytes(envelope)[0] == REF
    with pytest.raises(MalformedRef):
        FeatureRef.from_bytes(envelope)


def test_a_damaged_envelope_is_refused() -> None:
    with Spans().tracer.start_as_current_span("sender"):
        envelope = tracing.to_bytes(REF)
    for end in range(len(envelope)):
        with pytest.raises(MalformedRef):
            tracing.from_bytes(envelope[:end])
    head = envelope[: len(tracing._MAGIC)]
    for beside in (b"[]", b'"text"', b'{"traceparent":1}', b"{", b"\xff", b"[" * 4000):
        with pytest.raises(MalformedRef):
            tracing.from_bytes(head + len(beside).to_bytes(2, "big") + beside + REF.to_bytes())
    large = b'{"a":"' + b"b" * 5000 + b'"}'
    with pytest.raises(MalformedRef):
        tracing.from_bytes(head + len(large).to_bytes(2, "big") + large + REF.to_bytes())
