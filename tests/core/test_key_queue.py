"""Who waits for a key and who makes it: one claim for each key, and nothing handed over is lost."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featcache.core.key_queue import KeyQueue, KeyWaiter, KeyWaiterState
from featcache.core.slots import Slot

WAITING, FOUND, CHOSEN = KeyWaiterState.WAITING, KeyWaiterState.FOUND, KeyWaiterState.CHOSEN
TAKEN, GONE = KeyWaiterState.TAKEN, KeyWaiterState.GONE


def join(
    key_waiters: KeyQueue,
    key: bytes = b"a",
    session: int = 1,
    *,
    can_make: bool = True,
    tag: object = None,
) -> KeyWaiter:
    return key_waiters.join(key, session, can_make=can_make, tag=tag)


def chosen(key_waiters: KeyQueue, key: bytes = b"a", session: int = 1) -> KeyWaiter:
    waiter = join(key_waiters, key, session)
    assert waiter.state is CHOSEN
    return waiter


def states(*key_waiters: KeyWaiter) -> list[KeyWaiterState]:
    return [waiter.state for waiter in key_waiters]


# --- joining ------------------------------------------------------------------------------------


def test_a_seeker_keeps_what_it_came_with() -> None:
    tag = object()
    waiter = join(KeyQueue(), b"key", 7, can_make=False, tag=tag)
    assert (waiter.key, waiter.session, waiter.can_make) == (b"key", 7, False)
    assert waiter.tag is tag
    assert (waiter.state, waiter.slot, waiter.claim) == (WAITING, None, 0)


def test_the_first_who_makes_is_chosen_at_once_and_the_others_wait() -> None:
    key_waiters = KeyQueue()
    first, second, third = (join(key_waiters) for _ in range(3))
    assert states(first, second, third) == [CHOSEN, WAITING, WAITING]
    assert key_waiters.holds(b"a", first.claim)
    assert key_waiters.count == 2


def test_who_only_waits_is_never_chosen() -> None:
    key_waiters = KeyQueue()
    plain = join(key_waiters, can_make=False)
    assert plain.state is WAITING
    maker = chosen(key_waiters)
    assert key_waiters.release_claim(b"a", maker.claim) is None
    assert plain.state is WAITING
    assert key_waiters.count == 1


def test_each_key_has_a_claim_of_its_own() -> None:
    key_waiters = KeyQueue()
    a, b = chosen(key_waiters, b"a"), chosen(key_waiters, b"b")
    assert a.claim != b.claim
    assert not key_waiters.holds(b"a", b.claim)
    assert not key_waiters.holds(b"b", a.claim)
    assert not key_waiters.holds(b"c", a.claim)
    assert key_waiters.release_claim(b"a", b.claim) is None
    assert key_waiters.holds(b"b", b.claim)


def test_one_session_may_seek_a_key_several_times() -> None:
    key_waiters = KeyQueue()
    first, second = (join(key_waiters, session=1) for _ in range(2))
    assert states(first, second) == [CHOSEN, WAITING]
    assert key_waiters.release_claim(b"a", first.claim) is second


# --- claims -------------------------------------------------------------------------------------


def test_the_next_who_makes_is_chosen_in_order_of_arrival() -> None:
    key_waiters = KeyQueue()
    first = chosen(key_waiters)
    plain = join(key_waiters, can_make=False)
    second, third = join(key_waiters), join(key_waiters)
    assert key_waiters.release_claim(b"a", first.claim) is second
    assert states(plain, second, third) == [WAITING, CHOSEN, WAITING]
    assert key_waiters.holds(b"a", second.claim)
    assert key_waiters.count == 2
    assert key_waiters.release_claim(b"a", second.claim) is third
    assert key_waiters.release_claim(b"a", third.claim) is None
    assert plain.state is WAITING


def test_a_claim_is_given_back_once() -> None:
    key_waiters = KeyQueue()
    first, second, third = chosen(key_waiters), join(key_waiters), join(key_waiters)
    assert key_waiters.release_claim(b"a", first.claim) is second
    assert key_waiters.release_claim(b"a", first.claim) is None
    assert key_waiters.holds(b"a", second.claim)
    assert third.state is WAITING


@pytest.mark.parametrize(("key", "claim"), [(b"a", 0), (b"a", 99), (b"b", 1)])
def test_a_claim_that_never_was_is_not_given_back(key: bytes, claim: int) -> None:
    key_waiters = KeyQueue()
    maker = chosen(key_waiters)
    waiting = join(key_waiters)
    assert key_waiters.release_claim(key, claim) is None
    assert key_waiters.holds(b"a", maker.claim)
    assert waiting.state is WAITING


def test_an_old_claim_is_not_taken_for_a_new_one() -> None:
    key_waiters = KeyQueue()
    old = chosen(key_waiters)
    key_waiters.release_claim(b"a", old.claim)
    new = chosen(key_waiters)
    assert new.claim != old.claim
    assert not key_waiters.holds(b"a", old.claim)
    assert key_waiters.release_claim(b"a", old.claim) is None
    assert key_waiters.holds(b"a", new.claim)


def test_when_a_claim_was_given_back_the_next_who_comes_makes() -> None:
    key_waiters = KeyQueue()
    key_waiters.release_claim(b"a", chosen(key_waiters).claim)
    chosen(key_waiters)


def test_the_claims_of_a_session() -> None:
    key_waiters = KeyQueue()
    a, b, _ = (
        chosen(key_waiters, b"a", 1),
        chosen(key_waiters, b"b", 1),
        chosen(key_waiters, b"c", 2),
    )
    join(key_waiters, b"c", 1)
    assert key_waiters.claims_of(1) == [(b"a", a.claim), (b"b", b.claim)]
    assert key_waiters.claims_of(3) == []
    key_waiters.release_claim(b"a", a.claim)
    assert key_waiters.claims_of(1) == [(b"b", b.claim)]


def test_a_claim_passes_to_the_session_that_was_chosen() -> None:
    key_waiters = KeyQueue()
    first, second = chosen(key_waiters, b"a", 1), join(key_waiters, b"a", 2)
    key_waiters.release_claim(b"a", first.claim)
    assert key_waiters.claims_of(1) == []
    assert key_waiters.claims_of(2) == [(b"a", second.claim)]


# --- what is found ------------------------------------------------------------------------------


def test_all_who_wait_are_handed_the_slot_in_order_of_arrival() -> None:
    key_waiters, slot = KeyQueue(), Slot(3)
    maker = chosen(key_waiters)
    plain, other, second = (
        join(key_waiters, can_make=False),
        join(key_waiters, b"b"),
        join(key_waiters),
    )
    waits = join(key_waiters, b"b", can_make=False)
    assert key_waiters.found(b"a", slot) == [plain, second]
    assert states(maker, plain, second) == [CHOSEN, FOUND, FOUND]
    assert plain.slot is second.slot is slot
    assert (maker.slot, second.claim) == (None, 0)
    assert states(other, waits) == [CHOSEN, WAITING]
    assert key_waiters.count == 1


def test_a_key_that_nobody_waits_for_is_found_by_nobody() -> None:
    key_waiters = KeyQueue()
    maker = chosen(key_waiters)
    for key in (b"a", b"b"):
        assert key_waiters.found(key, Slot(0)) == []
    assert maker.state is CHOSEN


def test_who_found_it_is_not_chosen_when_the_maker_gives_its_claim_back() -> None:
    key_waiters = KeyQueue()
    maker, waiting = chosen(key_waiters), join(key_waiters)
    key_waiters.found(b"a", Slot(0))
    assert key_waiters.release_claim(b"a", maker.claim) is None
    assert waiting.state is FOUND
    assert key_waiters.claims_of(1) == []


def test_who_comes_after_it_was_found_waits_for_the_claim() -> None:
    """It was published and evicted before its maker gave the claim back."""
    key_waiters = KeyQueue()
    maker, first = chosen(key_waiters), join(key_waiters)
    key_waiters.found(b"a", Slot(0))
    late = join(key_waiters)
    assert states(first, late) == [FOUND, WAITING]
    assert key_waiters.release_claim(b"a", maker.claim) is late


# --- leaving ------------------------------------------------------------------------------------


def test_who_waits_and_leaves_is_handed_nothing_any_more() -> None:
    key_waiters = KeyQueue()
    maker, leaver, last = chosen(key_waiters), join(key_waiters), join(key_waiters)
    assert key_waiters.leave(leaver) is WAITING
    assert leaver.state is GONE
    assert key_waiters.count == 1
    assert key_waiters.release_claim(b"a", maker.claim) is last
    assert key_waiters.found(b"a", Slot(0)) == []


def test_who_leaves_does_not_change_the_order_of_the_others() -> None:
    key_waiters = KeyQueue()
    maker = chosen(key_waiters)
    waiting = [join(key_waiters) for _ in range(4)]
    key_waiters.leave(waiting.pop(1))
    assert key_waiters.found(b"a", Slot(0)) == waiting
    key_waiters.release_claim(b"a", maker.claim)
    assert (key_waiters.count, key_waiters._waiting, key_waiters._claims) == (0, {}, {})


def test_who_found_it_and_leaves_says_so() -> None:
    key_waiters, slot = KeyQueue(), Slot(0)
    waiter = join(key_waiters, can_make=False)
    key_waiters.found(b"a", slot)
    assert key_waiters.leave(waiter) is FOUND
    assert waiter.state is GONE
    assert waiter.slot is slot  # for the caller, who pays for it
    assert key_waiters.count == 0


def test_who_was_chosen_and_leaves_says_so_and_its_claim_is_the_callers_to_give_back() -> None:
    key_waiters = KeyQueue()
    waiter, second = chosen(key_waiters), join(key_waiters)
    assert key_waiters.leave(waiter) is CHOSEN
    assert waiter.state is GONE
    assert key_waiters.holds(b"a", waiter.claim)
    assert key_waiters.release_claim(b"a", waiter.claim) is second


@pytest.mark.parametrize("state", list(KeyWaiterState))
def test_leaving_twice_gives_nothing_back_twice(state: KeyWaiterState) -> None:
    key_waiters = KeyQueue()
    waiter = join(key_waiters, can_make=state is CHOSEN)
    if state is FOUND:
        key_waiters.found(b"a", Slot(0))
    elif state in {TAKEN, GONE}:
        key_waiters.leave(waiter)
        waiter.state = state
    assert key_waiters.leave(waiter) is state
    after = TAKEN if state is TAKEN else GONE
    assert key_waiters.leave(waiter) is after
    assert waiter.state is after
    assert key_waiters.count == 0


def test_who_waits_of_a_session() -> None:
    key_waiters = KeyQueue()
    chosen(key_waiters, b"a", 1)
    mine = [join(key_waiters, b"a", 1), join(key_waiters, b"b", 1, can_make=False)]
    other = join(key_waiters, b"a", 2)
    assert key_waiters.by_session(1) == mine
    assert key_waiters.by_session(2) == [other]
    assert key_waiters.by_session(3) == []
    key_waiters.leave(mine[0])
    key_waiters.found(b"b", Slot(0))
    assert key_waiters.by_session(1) == []


# --- all at once --------------------------------------------------------------------------------


class Model:
    """The same by hand: one list of who waits, one claim for each key."""

    def __init__(self) -> None:
        self.key_waiters = KeyQueue()
        self.everybody: list[KeyWaiter] = []
        self.waiting: list[KeyWaiter] = []
        self.claims: dict[bytes, KeyWaiter] = {}

    def join(self, number: int) -> None:
        key, can_make = b"%d" % (number % 2), number % 3 > 0
        waiter = join(self.key_waiters, key, number % 4, can_make=can_make)
        self.everybody.append(waiter)
        if can_make and key not in self.claims:
            assert waiter.state is CHOSEN
            self.claims[key] = waiter
        else:
            self.waiting.append(waiter)

    def leave(self, number: int) -> None:
        if self.everybody:
            waiter = self.everybody[number % len(self.everybody)]
            was = waiter.state
            assert self.key_waiters.leave(waiter) is was
            if was is CHOSEN:
                self.release_claim(waiter)
            self.waiting = [other for other in self.waiting if other is not waiter]

    def return_lease(self, number: int) -> None:
        if self.everybody:
            self.release_claim(self.everybody[number % len(self.everybody)])

    def release_claim(self, waiter: KeyWaiter) -> None:
        following = self.key_waiters.release_claim(waiter.key, waiter.claim)
        if self.claims.get(waiter.key) is not waiter:
            assert following is None
            return
        del self.claims[waiter.key]
        makers = [one for one in self.waiting if one.key == waiter.key and one.can_make]
        assert following is (makers[0] if makers else None)
        if following is not None:
            self.waiting.remove(following)
            self.claims[waiter.key] = following

    def found(self, number: int) -> None:
        key, slot = b"%d" % (number % 2), Slot(number)
        handed = [waiter for waiter in self.waiting if waiter.key == key]
        assert self.key_waiters.found(key, slot) == handed
        assert all(waiter.slot is slot and waiter.state is FOUND for waiter in handed)
        self.waiting = [waiter for waiter in self.waiting if waiter.key != key]

    def check(self) -> None:
        key_waiters = self.key_waiters
        assert key_waiters.count == len(self.waiting)
        assert all(waiter.state is WAITING for waiter in self.waiting)
        for session in range(4):
            mine = [waiter for waiter in self.waiting if waiter.session == session]
            assert sorted(key_waiters.by_session(session), key=self.waiting.index) == mine
            claims = {key: one.claim for key, one in self.claims.items() if one.session == session}
            assert dict(key_waiters.claims_of(session)) == claims
        for waiter in self.waiting:
            assert not waiter.can_make or waiter.key in self.claims, (
                "nobody makes what it waits for"
            )
        numbers = [waiter.claim for waiter in self.everybody if waiter.claim]
        assert len(set(numbers)) == len(numbers)


Step = Callable[[Model, int], None]
STEPS: list[Step] = [Model.join, Model.join, Model.leave, Model.return_lease, Model.found]


@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 30)), max_size=60))
def test_the_seekers_are_a_list(steps: list[tuple[Step, int]]) -> None:
    model = Model()
    for step, number in steps:
        step(model, number)
        model.check()
