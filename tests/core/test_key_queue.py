"""Who waits for a key and who makes it: one claim for each key, and nothing handed over is lost."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featcache.core.key_queue import Seeker, Seekers, SeekerState
from featcache.core.slots import Slot

WAITING, FOUND, CHOSEN = SeekerState.WAITING, SeekerState.FOUND, SeekerState.CHOSEN
TAKEN, GONE = SeekerState.TAKEN, SeekerState.GONE


def join(
    seekers: Seekers, key: bytes = b"a", session: int = 1, *, makes: bool = True, tag: object = None
) -> Seeker:
    return seekers.join(key, session, makes=makes, tag=tag)


def chosen(seekers: Seekers, key: bytes = b"a", session: int = 1) -> Seeker:
    seeker = join(seekers, key, session)
    assert seeker.state is CHOSEN
    return seeker


def states(*seekers: Seeker) -> list[SeekerState]:
    return [seeker.state for seeker in seekers]


# --- joining ------------------------------------------------------------------------------------


def test_a_seeker_keeps_what_it_came_with() -> None:
    tag = object()
    seeker = join(Seekers(), b"key", 7, makes=False, tag=tag)
    assert (seeker.key, seeker.session, seeker.makes) == (b"key", 7, False)
    assert seeker.tag is tag
    assert (seeker.state, seeker.slot, seeker.claim) == (WAITING, None, 0)


def test_the_first_who_makes_is_chosen_at_once_and_the_others_wait() -> None:
    seekers = Seekers()
    first, second, third = (join(seekers) for _ in range(3))
    assert states(first, second, third) == [CHOSEN, WAITING, WAITING]
    assert seekers.holds(b"a", first.claim)
    assert seekers.count == 2


def test_who_only_waits_is_never_chosen() -> None:
    seekers = Seekers()
    plain = join(seekers, makes=False)
    assert plain.state is WAITING
    maker = chosen(seekers)
    assert seekers.unclaim(b"a", maker.claim) is None
    assert plain.state is WAITING
    assert seekers.count == 1


def test_each_key_has_a_claim_of_its_own() -> None:
    seekers = Seekers()
    a, b = chosen(seekers, b"a"), chosen(seekers, b"b")
    assert a.claim != b.claim
    assert not seekers.holds(b"a", b.claim)
    assert not seekers.holds(b"b", a.claim)
    assert not seekers.holds(b"c", a.claim)
    assert seekers.unclaim(b"a", b.claim) is None
    assert seekers.holds(b"b", b.claim)


def test_one_session_may_seek_a_key_several_times() -> None:
    seekers = Seekers()
    first, second = (join(seekers, session=1) for _ in range(2))
    assert states(first, second) == [CHOSEN, WAITING]
    assert seekers.unclaim(b"a", first.claim) is second


# --- claims -------------------------------------------------------------------------------------


def test_the_next_who_makes_is_chosen_in_order_of_arrival() -> None:
    seekers = Seekers()
    first = chosen(seekers)
    plain = join(seekers, makes=False)
    second, third = join(seekers), join(seekers)
    assert seekers.unclaim(b"a", first.claim) is second
    assert states(plain, second, third) == [WAITING, CHOSEN, WAITING]
    assert seekers.holds(b"a", second.claim)
    assert seekers.count == 2
    assert seekers.unclaim(b"a", second.claim) is third
    assert seekers.unclaim(b"a", third.claim) is None
    assert plain.state is WAITING


def test_a_claim_is_given_back_once() -> None:
    seekers = Seekers()
    first, second, third = chosen(seekers), join(seekers), join(seekers)
    assert seekers.unclaim(b"a", first.claim) is second
    assert seekers.unclaim(b"a", first.claim) is None
    assert seekers.holds(b"a", second.claim)
    assert third.state is WAITING


@pytest.mark.parametrize(("key", "claim"), [(b"a", 0), (b"a", 99), (b"b", 1)])
def test_a_claim_that_never_was_is_not_given_back(key: bytes, claim: int) -> None:
    seekers = Seekers()
    maker = chosen(seekers)
    waiting = join(seekers)
    assert seekers.unclaim(key, claim) is None
    assert seekers.holds(b"a", maker.claim)
    assert waiting.state is WAITING


def test_an_old_claim_is_not_taken_for_a_new_one() -> None:
    seekers = Seekers()
    old = chosen(seekers)
    seekers.unclaim(b"a", old.claim)
    new = chosen(seekers)
    assert new.claim != old.claim
    assert not seekers.holds(b"a", old.claim)
    assert seekers.unclaim(b"a", old.claim) is None
    assert seekers.holds(b"a", new.claim)


def test_when_a_claim_was_given_back_the_next_who_comes_makes() -> None:
    seekers = Seekers()
    seekers.unclaim(b"a", chosen(seekers).claim)
    chosen(seekers)


def test_the_claims_of_a_session() -> None:
    seekers = Seekers()
    a, b, _ = chosen(seekers, b"a", 1), chosen(seekers, b"b", 1), chosen(seekers, b"c", 2)
    join(seekers, b"c", 1)
    assert seekers.claims_of(1) == [(b"a", a.claim), (b"b", b.claim)]
    assert seekers.claims_of(3) == []
    seekers.unclaim(b"a", a.claim)
    assert seekers.claims_of(1) == [(b"b", b.claim)]


def test_a_claim_passes_to_the_session_that_was_chosen() -> None:
    seekers = Seekers()
    first, second = chosen(seekers, b"a", 1), join(seekers, b"a", 2)
    seekers.unclaim(b"a", first.claim)
    assert seekers.claims_of(1) == []
    assert seekers.claims_of(2) == [(b"a", second.claim)]


# --- what is found ------------------------------------------------------------------------------


def test_all_who_wait_are_handed_the_slot_in_order_of_arrival() -> None:
    seekers, slot = Seekers(), Slot(3)
    maker = chosen(seekers)
    plain, other, second = join(seekers, makes=False), join(seekers, b"b"), join(seekers)
    waits = join(seekers, b"b", makes=False)
    assert seekers.found(b"a", slot) == [plain, second]
    assert states(maker, plain, second) == [CHOSEN, FOUND, FOUND]
    assert plain.slot is second.slot is slot
    assert (maker.slot, second.claim) == (None, 0)
    assert states(other, waits) == [CHOSEN, WAITING]
    assert seekers.count == 1


def test_a_key_that_nobody_waits_for_is_found_by_nobody() -> None:
    seekers = Seekers()
    maker = chosen(seekers)
    for key in (b"a", b"b"):
        assert seekers.found(key, Slot(0)) == []
    assert maker.state is CHOSEN


def test_who_found_it_is_not_chosen_when_the_maker_gives_its_claim_back() -> None:
    seekers = Seekers()
    maker, waiting = chosen(seekers), join(seekers)
    seekers.found(b"a", Slot(0))
    assert seekers.unclaim(b"a", maker.claim) is None
    assert waiting.state is FOUND
    assert seekers.claims_of(1) == []


def test_who_comes_after_it_was_found_waits_for_the_claim() -> None:
    """It was published and evicted before its maker gave the claim back."""
    seekers = Seekers()
    maker, first = chosen(seekers), join(seekers)
    seekers.found(b"a", Slot(0))
    late = join(seekers)
    assert states(first, late) == [FOUND, WAITING]
    assert seekers.unclaim(b"a", maker.claim) is late


# --- leaving ------------------------------------------------------------------------------------


def test_who_waits_and_leaves_is_handed_nothing_any_more() -> None:
    seekers = Seekers()
    maker, leaver, last = chosen(seekers), join(seekers), join(seekers)
    assert seekers.leave(leaver) is WAITING
    assert leaver.state is GONE
    assert seekers.count == 1
    assert seekers.unclaim(b"a", maker.claim) is last
    assert seekers.found(b"a", Slot(0)) == []


def test_who_leaves_does_not_change_the_order_of_the_others() -> None:
    seekers = Seekers()
    maker = chosen(seekers)
    waiting = [join(seekers) for _ in range(4)]
    seekers.leave(waiting.pop(1))
    assert seekers.found(b"a", Slot(0)) == waiting
    seekers.unclaim(b"a", maker.claim)
    assert (seekers.count, seekers._waiting, seekers._claims) == (0, {}, {})


def test_who_found_it_and_leaves_says_so() -> None:
    seekers, slot = Seekers(), Slot(0)
    seeker = join(seekers, makes=False)
    seekers.found(b"a", slot)
    assert seekers.leave(seeker) is FOUND
    assert seeker.state is GONE
    assert seeker.slot is slot  # for the caller, who pays for it
    assert seekers.count == 0


def test_who_was_chosen_and_leaves_says_so_and_its_claim_is_the_callers_to_give_back() -> None:
    seekers = Seekers()
    seeker, second = chosen(seekers), join(seekers)
    assert seekers.leave(seeker) is CHOSEN
    assert seeker.state is GONE
    assert seekers.holds(b"a", seeker.claim)
    assert seekers.unclaim(b"a", seeker.claim) is second


@pytest.mark.parametrize("state", list(SeekerState))
def test_leaving_twice_gives_nothing_back_twice(state: SeekerState) -> None:
    seekers = Seekers()
    seeker = join(seekers, makes=state is CHOSEN)
    if state is FOUND:
        seekers.found(b"a", Slot(0))
    elif state in {TAKEN, GONE}:
        seekers.leave(seeker)
        seeker.state = state
    assert seekers.leave(seeker) is state
    after = TAKEN if state is TAKEN else GONE
    assert seekers.leave(seeker) is after
    assert seeker.state is after
    assert seekers.count == 0


def test_who_waits_of_a_session() -> None:
    seekers = Seekers()
    chosen(seekers, b"a", 1)
    mine = [join(seekers, b"a", 1), join(seekers, b"b", 1, makes=False)]
    other = join(seekers, b"a", 2)
    assert seekers.of(1) == mine
    assert seekers.of(2) == [other]
    assert seekers.of(3) == []
    seekers.leave(mine[0])
    seekers.found(b"b", Slot(0))
    assert seekers.of(1) == []


# --- all at once --------------------------------------------------------------------------------


class Model:
    """The same by hand: one list of who waits, one claim for each key."""

    def __init__(self) -> None:
        self.seekers = Seekers()
        self.everybody: list[Seeker] = []
        self.waiting: list[Seeker] = []
        self.claims: dict[bytes, Seeker] = {}

    def join(self, number: int) -> None:
        key, makes = b"%d" % (number % 2), number % 3 > 0
        seeker = join(self.seekers, key, number % 4, makes=makes)
        self.everybody.append(seeker)
        if makes and key not in self.claims:
            assert seeker.state is CHOSEN
            self.claims[key] = seeker
        else:
            self.waiting.append(seeker)

    def leave(self, number: int) -> None:
        if self.everybody:
            seeker = self.everybody[number % len(self.everybody)]
            was = seeker.state
            assert self.seekers.leave(seeker) is was
            if was is CHOSEN:
                self.unclaim(seeker)
            self.waiting = [other for other in self.waiting if other is not seeker]

    def give_back(self, number: int) -> None:
        if self.everybody:
            self.unclaim(self.everybody[number % len(self.everybody)])

    def unclaim(self, seeker: Seeker) -> None:
        following = self.seekers.unclaim(seeker.key, seeker.claim)
        if self.claims.get(seeker.key) is not seeker:
            assert following is None
            return
        del self.claims[seeker.key]
        makers = [one for one in self.waiting if one.key == seeker.key and one.makes]
        assert following is (makers[0] if makers else None)
        if following is not None:
            self.waiting.remove(following)
            self.claims[seeker.key] = following

    def found(self, number: int) -> None:
        key, slot = b"%d" % (number % 2), Slot(number)
        handed = [seeker for seeker in self.waiting if seeker.key == key]
        assert self.seekers.found(key, slot) == handed
        assert all(seeker.slot is slot and seeker.state is FOUND for seeker in handed)
        self.waiting = [seeker for seeker in self.waiting if seeker.key != key]

    def check(self) -> None:
        seekers = self.seekers
        assert seekers.count == len(self.waiting)
        assert all(seeker.state is WAITING for seeker in self.waiting)
        for session in range(4):
            mine = [seeker for seeker in self.waiting if seeker.session == session]
            assert sorted(seekers.of(session), key=self.waiting.index) == mine
            claims = {key: one.claim for key, one in self.claims.items() if one.session == session}
            assert dict(seekers.claims_of(session)) == claims
        for seeker in self.waiting:
            assert not seeker.makes or seeker.key in self.claims, "nobody makes what it waits for"
        numbers = [seeker.claim for seeker in self.everybody if seeker.claim]
        assert len(set(numbers)) == len(numbers)


Step = Callable[[Model, int], None]
STEPS: list[Step] = [Model.join, Model.join, Model.leave, Model.give_back, Model.found]


@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 30)), max_size=60))
def test_the_seekers_are_a_list(steps: list[tuple[Step, int]]) -> None:
    model = Model()
    for step, number in steps:
        step(model, number)
        model.check()
