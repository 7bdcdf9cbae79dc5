"""Spans for OpenTelemetry, by its API (the extra ``tracing``).

`instrument` has every owner and client of this process make a span of each put, get and borrow, and
of each wait of an owner's put for room; `uninstrument` undoes that. Before and after, the calls run the
code that they would run without this module.

A ref's bytes have a fixed layout. To send the trace context of the sender beside it, `to_bytes` puts both
in an envelope, which `from_bytes` opens; `FeatureRef.from_bytes` raises MalformedRef for it.
"""

import contextlib
import functools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Final

try:
    from opentelemetry import context as contexts
    from opentelemetry import propagate, trace
except ImportError as missing:
    raise ImportError(
        "featcache.integrations.tracing needs OpenTelemetry's API: pip install 'featcache[tracing]'"
    ) from missing

from opentelemetry.context import Context
from opentelemetry.trace import Span, Status, StatusCode, Tracer, TracerProvider

import featcache
from featcache import FeatureRef, MalformedRef, SettingsError
from featcache.api import observing

__all__ = ["from_bytes", "instrument", "is_instrumented", "to_bytes", "uninstrument", "within"]

_MAGIC: Final = b"fcTrace\x01"
_MOST_CONTEXT_BYTES: Final = 4096

# --- switched on and off --------------------------------------------------------------------------

_lock: Final = threading.Lock()
_replaced: list[tuple[type, str, Any]] = []


def instrument(tracer_provider: TracerProvider | None = None) -> None:
    """Make spans from now on, in every thread; a second time it changes nothing.

    The spans are ``featcache.put``, ``featcache.get`` and ``featcache.borrow`` (from its entry to its end),
    and, within an owner's put, ``featcache.wait`` for the time that it stood in the queue. Their attributes
    are ``featcache.pool``, ``featcache.bytes``, ``featcache.key`` (whether it was by key), and
    ``featcache.granted`` of a wait. A call that raises has its error recorded.

    Args:
        tracer_provider: whose tracer makes them; None is the application's.

    """
    tracer = trace.get_tracer("featcache", featcache.__version__, tracer_provider)
    with _lock:
        if _replaced:
            return
        for kind in (featcache.FeatureCache, featcache.FeatureClient):
            _replace(kind, "put", _traced_async(tracer, "featcache.put", _put_attributes))
            _replace(kind, "get", _traced_async(tracer, "featcache.get", _get_attributes))
            _replace(kind, "get_nowait", _traced(tracer, "featcache.get", _get_attributes))
            _replace(kind, "borrow", _traced_borrow(tracer))
        for blocking in (featcache.blocking.FeatureCache, featcache.blocking.FeatureClient):
            _replace(blocking, "put", _traced(tracer, "featcache.put", _put_attributes))
            _replace(blocking, "get", _traced(tracer, "featcache.get", _get_attributes))
            _replace(blocking, "borrow", _traced_blocking_borrow(tracer))
        for owner in (featcache.FeatureCache, featcache.blocking.FeatureCache):
            _replace(owner, "put_nowait", _traced(tracer, "featcache.put", _put_attributes))
        waited = _waited(tracer)
        observing.observe_waits(waited)
        _waits.append(waited)


_waits: list[observing.WaitObserver] = []


def uninstrument() -> None:
    """Make no more spans; those of calls in progress end."""
    with _lock:
        while _replaced:
            kind, name, own = _replaced.pop()
            if own is None:  # it was inherited
                delattr(kind, name)
            else:
                setattr(kind, name, own)
        while _waits:
            observing.unobserve_waits(_waits.pop())


def is_instrumented() -> bool:
    """Whether spans are made now."""
    return bool(_replaced)


def _replace(kind: type, name: str, traced: Callable[[Any], Any]) -> None:
    own = vars(kind).get(name)
    method = getattr(kind, name)
    setattr(kind, name, functools.wraps(method)(traced(method)))
    _replaced.append((kind, name, own))


# --- the spans ------------------------------------------------------------------------------------

Attributes = Callable[[Any, Any], dict[str, Any]]
"""The attributes of a call, from its argument and its result."""


def _of_ref(ref: FeatureRef, *, by_key: bool) -> dict[str, Any]:
    return {
        "featcache.pool": ref.pool_id.hex(),
        "featcache.bytes": ref.nbytes,
        "featcache.key": by_key,
    }


def _put_attributes(_: Any, ref: FeatureRef) -> dict[str, Any]:
    return _of_ref(ref, by_key=False)


def _get_attributes(ref: Any, feature: Any) -> dict[str, Any]:
    if isinstance(ref, FeatureRef):
        return _of_ref(ref, by_key=False)
    tensors = feature.values() if isinstance(feature, dict) else (feature,)
    return {"featcache.bytes": sum(each.nbytes for each in tensors), "featcache.key": True}


def _first(args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Return what is put, got or borrowed."""
    return args[0] if args else options.get("ref", options.get("feature"))


_putting: Final = ContextVar("_putting", default=False)
"""Whether this is the context of a put that has a span: its wait for room is a span of its own."""


def _traced_async(tracer: Tracer, name: str, attributes: Attributes) -> Callable[[Any], Any]:
    is_put = name == "featcache.put"

    def traced(method: Any) -> Any:
        async def call(self: Any, *args: Any, **options: Any) -> Any:
            with tracer.start_as_current_span(name) as span:
                token = _putting.set(is_put)
                try:
                    result = await method(self, *args, **options)
                finally:
                    _putting.reset(token)
                if span.is_recording():
                    span.set_attributes(attributes(_first(args, options), result))
                return result

        return call

    return traced


def _traced(tracer: Tracer, name: str, attributes: Attributes) -> Callable[[Any], Any]:
    def traced(method: Any) -> Any:
        def call(self: Any, *args: Any, **options: Any) -> Any:
            with tracer.start_as_current_span(name) as span:
                result = method(self, *args, **options)
                if span.is_recording():
                    span.set_attributes(attributes(_first(args, options), result))
                return result

        return call

    return traced


def _waited(tracer: Tracer) -> observing.WaitObserver:
    def waited(pool: str, waited_s: float, granted: bool) -> None:
        if not _putting.get():
            return  # a client's put: its span is in the client
        end_ns = time.time_ns()
        span = tracer.start_span("featcache.wait", start_time=end_ns - int(waited_s * 1e9))
        span.set_attributes({"featcache.pool": pool, "featcache.granted": granted})
        span.end(end_ns)

    return waited


# --- borrows --------------------------------------------------------------------------------------


class _BorrowSpan:
    """The span of one borrow: from its entry to its end, in the context in which it was made."""

    __slots__ = ("_context", "_span", "_tracer")

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._context = contexts.get_current()
        self._span: Span | None = None

    @property
    def is_open(self) -> bool:
        return self._span is not None

    def begin(self) -> None:
        self._span = self._tracer.start_span("featcache.borrow", context=self._context)

    def fail(self, error: BaseException) -> None:
        if self._span is not None and isinstance(error, Exception):
            self._span.record_exception(error)
            self._span.set_status(Status(StatusCode.ERROR, f"{type(error).__name__}: {error}"))
        self.end()

    def entered(self, ref: FeatureRef | None, *, by_key: bool) -> None:
        if self._span is not None and ref is not None and self._span.is_recording():
            self._span.set_attributes(_of_ref(ref, by_key=by_key))

    def end(self) -> None:
        span, self._span = self._span, None
        if span is not None:
            span.end()


class _TracedBorrow(observing.Borrow):
    __slots__ = ("by_key", "span")

    by_key: bool
    span: _BorrowSpan

    async def __aenter__(self) -> Any:
        if self.span.is_open:
            return await super().__aenter__()  # which refuses it: it is entered already
        self.span.begin()
        try:
            view = await super().__aenter__()
        except BaseException as error:
            self.span.fail(error)
            raise
        self.span.entered(self.ref, by_key=self.by_key)
        return view

    def __enter__(self) -> Any:
        if self.span.is_open:
            return super().__enter__()  # as above
        self.span.begin()
        try:
            view = super().__enter__()
        except BaseException as error:
            self.span.fail(error)
            raise
        self.span.entered(self.ref, by_key=self.by_key)
        return view

    def close(self, *, pays: bool = True) -> None:
        try:
            super().close(pays=pays)
        finally:
            self.span.end()


class _TracedBlockingBorrow(featcache.blocking.BlockingBorrow):
    __slots__ = ("span",)

    span: _BorrowSpan

    def __enter__(self) -> Any:
        if self.span.is_open:
            return super().__enter__()  # as above
        self.span.begin()
        try:
            view = super().__enter__()
        except BaseException as error:
            self.span.fail(error)
            raise
        self.span.entered(self._borrow.ref, by_key=False)
        return view

    def __exit__(self, *error: object) -> None:
        try:
            super().__exit__(*error)
        finally:
            self.span.end()


_blocking_borrow: Final = ContextVar("_blocking_borrow", default=False)
"""Whether a blocking object makes a borrow, whose span is its own."""


def _traced_borrow(tracer: Tracer) -> Callable[[Any], Any]:
    def traced(method: Any) -> Any:
        def borrow(self: Any, *args: Any, **options: Any) -> Any:
            borrowed = method(self, *args, **options)
            if _blocking_borrow.get():
                return borrowed
            made = observing.borrow_as(_TracedBorrow, borrowed)
            by_key = not isinstance(_first(args, options), FeatureRef)
            made.by_key, made.span = by_key, _BorrowSpan(tracer)
            return made

        return borrow

    return traced


def _traced_blocking_borrow(tracer: Tracer) -> Callable[[Any], Any]:
    def traced(method: Any) -> Any:
        def borrow(self: Any, *args: Any, **options: Any) -> Any:
            token = _blocking_borrow.set(True)
            try:
                borrowed = method(self, *args, **options)
            finally:
                _blocking_borrow.reset(token)
            made = _TracedBlockingBorrow(borrowed._cache, borrowed._borrow)  # noqa: SLF001 - its class's parent
            made.span = _BorrowSpan(tracer)
            return made

        return borrow

    return traced


# --- context beside a ref -------------------------------------------------------------------------


def to_bytes(ref: FeatureRef, context: Context | None = None) -> bytes:
    """Return a ref's bytes with a trace context beside them, for `from_bytes` at the other end.

    Not for a reader that knows nothing of this: `FeatureRef.from_bytes` raises MalformedRef for them.

    Args:
        ref: what to send.
        context: the context to send, by the propagators that the application has; None is the present one.

    Raises:
        SettingsError: the context has more than 4096 bytes (its baggage, perhaps).

    """
    carrier: dict[str, str] = {}
    propagate.inject(carrier, context)
    beside = json.dumps(carrier, separators=(",", ":")).encode()
    if len(beside) > _MOST_CONTEXT_BYTES:
        raise SettingsError(
            f"a trace context of {len(beside)} bytes is more than {_MOST_CONTEXT_BYTES}"
        )
    return b"".join((_MAGIC, len(beside).to_bytes(2, "big"), beside, ref.to_bytes()))


def from_bytes(data: bytes) -> tuple[FeatureRef, Context]:
    """Return a ref and the trace context beside it; an empty context for the bytes of a ref alone.

    Raises:
        MalformedRef: it is neither.

    """
    if not data.startswith(_MAGIC):
        return FeatureRef.from_bytes(data), Context()
    start = len(_MAGIC) + 2
    end = start + int.from_bytes(data[len(_MAGIC) : start], "big")
    try:
        carrier = json.loads(data[start:end])
    except (ValueError, RecursionError) as error:
        raise MalformedRef("the trace context beside the ref is damaged") from error
    if end - start > _MOST_CONTEXT_BYTES or not _is_carrier(carrier):
        raise MalformedRef("the trace context beside the ref is none")
    return FeatureRef.from_bytes(data[end:]), propagate.extract(carrier)


def _is_carrier(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())


@contextlib.contextmanager
def within(context: Context) -> Iterator[None]:
    """Have the spans of a block be those of a context, such as the one that `from_bytes` returned."""
    token = contexts.attach(context)
    try:
        yield
    finally:
        contexts.detach(token)
