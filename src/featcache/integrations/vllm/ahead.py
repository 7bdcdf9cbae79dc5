"""Inputs that can't be encoded here are copied to the ranks before a step is planned with them.

vLLM has no way to fail one request within a step. So what a step can't make itself must be with its ranks
before the step is planned: the scheduler puts an order into the pool, each rank waits for the next order,
copies the feature into memory of its own, and puts a receipt. From then on neither an eviction nor the
owner's death can come between the plan and the load. Orders and receipts are features of a few bytes, by
keys of this engine alone, since a consumer's ranks hear of nothing else while no step runs.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import attrs
import msgspec
import torch

import featcache
from featcache import FeatcacheError, KeyNotFound
from featcache.integrations.vllm.features import tensors_of, unpacked
from featcache.integrations.vllm.link import LoopLink, ThreadLink
from featcache.integrations.vllm.outages import logger

MAX_ORDERS: Final = 32
"""Inputs at once that are ordered, or with the ranks and not loaded; others are loaded by their step."""
_PATIENCE_S: Final = 5.0
"""How long the ranks may take. Then the step loads it itself."""
_AGAIN_S: Final = 0.5
"""After which an order that a full pool refused, or evicted, is put again."""
_KEPT_S: Final = 60.0
"""How long what the ranks have is counted on."""
_KEEP_S: Final = 2 * _KEPT_S
"""How long a rank keeps what no step loads."""
_LISTEN_S: Final = 1.0
"""How long a rank waits for the next order before it looks whether that one was lost, with its owner."""
_COPY_S: Final = 2.0


def name_of(vllm_config: Any) -> str:
    """Return what tells this engine's orders from others': the same in its scheduler and its ranks."""
    parallel = getattr(vllm_config, "parallel_config", None)
    replica = getattr(parallel, "data_parallel_index", 0)
    engine = vllm_config.ec_transfer_config.engine_id
    return f"{engine}:{getattr(vllm_config, 'instance_id', '')}:{replica}"


def _order_key(engine: str, number: int) -> str:
    return f"vllm-ahead:{engine}:{number}"


def _receipt_key(engine: str, number: int, rank: int) -> str:
    return f"{_order_key(engine, number)}:{rank}"


def _written(words: list[str]) -> torch.Tensor:
    return torch.frombuffer(bytearray(msgspec.json.encode(words)), dtype=torch.uint8)


@attrs.define(eq=False)
class _Order:
    number: int
    words: list[str]
    """The identifier, and the key."""
    began_s: float
    sent_s: float
    left: set[int]
    """Ranks that have not put their receipt."""
    ended_s: float | None = None
    """When all had."""


class Orders:
    """The scheduler's side. Nothing here waits."""

    def __init__(
        self,
        link: LoopLink,
        engine: str,
        ranks: int,
        encodable: Callable[[Any], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._link, self._engine, self._ranks, self._clock = link, engine, ranks, clock
        self.encodable: Final = encodable
        """Whether a request brings what an input's output can be made of."""
        self._orders: dict[str, _Order] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._orders)

    def has(self, identifier: str) -> bool:
        """Whether all ranks have an input's output in memory of their own."""
        order = self._orders.get(identifier)
        return order is not None and order.ended_s is not None

    def awaits(self, identifier: str, key: str, client: featcache.FeatureClient) -> bool:
        """Order what is in the pool, unless it was; return whether its ranks are to be awaited still."""
        now_s = self._clock()
        order = self._orders.get(identifier)
        if order is None:
            if len(self._orders) >= MAX_ORDERS:
                return False
            order = _Order(self._next, [identifier, key], now_s, now_s, set(range(self._ranks)))
            self._orders[identifier] = order
            self._next += 1
            self._send(order, client)
            return True
        for rank in list(order.left):
            if client.contains_nowait(_receipt_key(self._engine, order.number, rank)):
                order.left.discard(rank)
        if not order.left:
            order.ended_s = now_s
            return False
        if now_s - order.began_s > _PATIENCE_S:
            return False
        if now_s - order.sent_s > _AGAIN_S:
            order.sent_s = now_s
            self._send(order, client)
        return True

    def taken(self, identifier: str) -> None:
        """Take note that a step loads it: what the ranks have is theirs to drop."""
        order = self._orders.pop(identifier, None)
        client = self._link.client
        if order is not None and client is not None:
            self._link.spawn(lambda: self._clear(order, client))

    def expire(self) -> None:
        """Forget what no step came to load: at each step."""
        if not self._orders:
            return
        before_s = self._clock() - _KEPT_S
        for identifier, order in list(self._orders.items()):
            if order.began_s < before_s:
                self.taken(identifier)

    def _send(self, order: _Order, client: featcache.FeatureClient) -> None:
        self._link.spawn(lambda: self._put(order, client))

    async def _put(self, order: _Order, client: featcache.FeatureClient) -> None:
        key = _order_key(self._engine, order.number)
        with contextlib.suppress(FeatcacheError):  # full, or gone: it is put again
            if not client.contains_nowait(key):
                await client.put(_written(order.words), key=key, on_full="raise")

    async def _clear(self, order: _Order, client: featcache.FeatureClient) -> None:
        # The order stays for a rank that is yet to come to it: what it waits for has one number, and no gap.
        with contextlib.suppress(FeatcacheError):
            if not order.left:
                await client.evict(_order_key(self._engine, order.number))
            for rank in range(self._ranks):
                await client.evict(_receipt_key(self._engine, order.number, rank))


@attrs.frozen
class _Copied:
    output: Any
    ready: torch.cuda.Event | None
    """After the copy; None in host memory."""
    since_s: float


class Copies:
    """A rank's side: a thread that copies what is ordered, and keeps it for the step that loads it."""

    def __init__(self, link: ThreadLink, engine: str, rank: int) -> None:
        self._link, self._engine, self._rank = link, engine, rank
        self._lock = threading.Lock()
        self._copied: dict[str, _Copied] = {}
        self._ends = threading.Event()
        self._stream: torch.cuda.Stream | None = None
        self._thread = threading.Thread(target=self._run, name="featcache-ahead", daemon=True)
        self._thread.start()

    def take(self, identifier: str) -> Any:
        """Return what was copied of an input, complete in the order of the current stream, or None."""
        with self._lock:
            copied = self._copied.pop(identifier, None)
        if copied is None:
            return None
        if copied.ready is not None:
            for tensor in tensors_of(copied.output):
                stream = torch.cuda.current_stream(tensor.device)
                stream.wait_event(copied.ready)
                tensor.record_stream(stream)
        return copied.output

    def close(self) -> None:
        """Have the thread end, once its link is closed too."""
        self._ends.set()
        with self._lock:
            self._copied.clear()

    def join(self) -> None:
        """Wait for the thread, after the link was closed."""
        self._thread.join(_LISTEN_S + _COPY_S)

    def _run(self) -> None:
        number = 0
        while not self._ends.is_set():
            client = self._link.client
            if client is None:
                self._ends.wait(0.02)
                continue
            try:
                order = client.get(
                    _order_key(self._engine, number), device="cpu", timeout=_LISTEN_S
                )
                number += 1
            except KeyNotFound:
                self._drop_old()
                number = self._later(client, number)
                continue
            except FeatcacheError:  # the owner is gone, or the client is closed
                self._ends.wait(0.02)
                continue
            try:
                self._copy(client, number - 1, bytes(tensors_of(order)[0].numpy()))
            except Exception:  # noqa: BLE001 - no receipt: the step loads it itself, as far as it can
                logger.debug("featcache: an order was not copied", exc_info=True)

    def _later(self, client: Any, number: int) -> int:
        """Return the first order from a number on that is there, or the number itself."""
        with contextlib.suppress(FeatcacheError):
            for each in range(number, number + 2 * MAX_ORDERS):
                if client.contains_nowait(_order_key(self._engine, each)):
                    return each
        return number

    def _copy(self, client: Any, number: int, words: bytes) -> None:
        identifier, key = msgspec.json.decode(words, type=tuple[str, str])
        self._drop_old()
        if self._link.device.type == "cuda":
            if self._stream is None:
                # First: a new thread's current GPU is the first one, as in `Saver`.
                torch.cuda.set_device(self._link.device)
                self._stream = torch.cuda.Stream(self._link.device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(self._stream):
                output = unpacked(client.get(key, timeout=_COPY_S))
                ready = self._stream.record_event()
        else:
            output, ready = unpacked(client.get(key, timeout=_COPY_S)), None
        with self._lock:
            if self._ends.is_set():
                return
            self._copied[identifier] = _Copied(output, ready, time.monotonic())
        # After the copy is kept: the scheduler counts on it from the receipt on.
        client.put(
            torch.zeros(1, dtype=torch.uint8),
            key=_receipt_key(self._engine, number, self._rank),
            on_full="raise",
        )

    def _drop_old(self) -> None:
        before_s = time.monotonic() - _KEEP_S
        with self._lock:
            for identifier, copied in list(self._copied.items()):
                if copied.since_s < before_s:
                    del self._copied[identifier]
