"""Why a ref is stale, as its owner tells it, and what to do about it."""

from collections.abc import Callable

import attrs
import pytest

from core.test_keyed_store import FIXED, put, reserve, store_of
from featcache.core.keyed_store import KeyedStore
from featcache.core.slots import Slot
from featcache.errors import StaleRef


def why(store: KeyedStore, index: int, generation: int) -> str:
    with pytest.raises(StaleRef) as raised:
        store.find(index, generation)
    return str(raised.value)


def ended(end: Callable[[KeyedStore, Slot], object], **how: object) -> tuple[str, str]:
    """What is said of a ref that ended so: at once, and when its slot has another feature."""
    store = store_of(attrs.evolve(FIXED, grace_s=0.0))
    slot = put(store, **({"key": None, "readers": 1} | how))  # type: ignore[arg-type]  # as `put` has them
    index, generation = slot.index, slot.generation
    end(store, slot)
    at_once = why(store, index, generation)
    store.recycle(store.due(9.0), 9.0)
    assert put(store, None, readers=1).index == index
    return at_once, why(store, index, generation)


def pay(store: KeyedStore, slot: Slot) -> None:
    store.pay(slot.index, slot.generation, 1, None, 0.0)


def discard(store: KeyedStore, slot: Slot) -> None:
    store.revoke(slot.index, slot.generation, 0.0)


REASONS = {
    "paid": (pay, {}, "was recycled, as every read that it owed was paid", "readers"),
    "expired": (lambda store, _: store.expire(2.0), {"ttl_s": 1.0}, "expired with reads", "ttl"),
    "discarded": (discard, {}, "was discarded", "put the feature again"),
    "waived": (lambda s, _: s.waive_reads("tp0", 0.0), {"readers": {"tp0"}}, "died", "put"),
    "failed": (lambda store, slot: store.fail_write(slot, 0.0), {}, "writer died", "put"),
    "evicted": (lambda s, _: s.evict(b"a", 0.0), {"key": b"a", "readers": 0}, "evicted", "pin"),
}


@pytest.mark.parametrize("reason", REASONS)
def test_the_reason_is_told_and_the_remedy(reason: str) -> None:
    end, how, told, remedy = REASONS[reason]
    others = {"recycled", "expired", "discarded", "evicted", "died"} - set(
        told.replace(",", "").split()
    )
    for message in ended(end, **how):  # type: ignore[arg-type]  # one type for all of them
        assert message.startswith(f"ref 0:1 {told}" if told.startswith("was") else "ref 0:1 ")
        assert told in message
        assert remedy in message.partition(":")[2]
        assert not any(f"was {other}" in message for other in others)


def test_a_feature_whose_key_was_given_to_another_is_told_so() -> None:
    store = store_of(attrs.evolve(FIXED, grace_s=0.0))
    first = put(store)
    store.publish(reserve(store), 0.0)
    assert "replaced" in why(store, first.index, first.generation)


def test_what_was_expired_and_evicted_later_expired() -> None:
    store = store_of()
    slot = put(store, readers=1, ttl_s=1.0)
    store.expire(2.0)
    assert store.find(slot.index, slot.generation) is slot  # its key keeps it
    store.evict(b"a", 3.0)
    assert "expired" in why(store, slot.index, slot.generation)


def test_a_feature_that_was_evicted_and_then_paid_was_paid() -> None:
    store = store_of()
    slot = put(store, readers=1)
    store.evict(b"a", 0.0)
    pay(store, slot)
    assert "paid" in why(store, slot.index, slot.generation)


@pytest.mark.parametrize("given", [(0, 0), (0, 2), (1, 1), (-1, 1), (8, 1), (0, -3)])
def test_what_was_never_given_out_is_told_so(given: tuple[int, int]) -> None:
    store = store_of()
    put(store, None, readers=1)
    assert "never given out" in why(store, *given)


def test_a_slot_that_is_still_reserved_was_not_given_out() -> None:
    store = store_of()
    slot = reserve(store, None, readers=1)
    assert "never given out" in why(store, slot.index, slot.generation)


def test_the_memory_is_bounded_and_says_where_it_ends() -> None:
    store = store_of(attrs.evolve(FIXED, grace_s=0.0))
    for _ in range(FIXED.slots + 1):
        discard(store, put(store, None, readers=1))
        store.recycle(store.due(0.0), 0.0)
    assert "discarded" in why(store, 0, 2)
    assert "too long ago" in why(store, 0, 1)
    for generation in range(2, FIXED.slots + 2):
        assert "was discarded" in why(store, 0, generation)
