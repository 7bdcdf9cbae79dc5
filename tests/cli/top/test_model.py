"""What `top` keeps and what its keys choose, without a terminal."""

import pytest

from cli.top.records import MIB, key, lively, page, session, slab, snapshot, unpaid
from featcache.cli.top.history import LONGEST, History
from featcache.cli.top.model import Model, Seen
from featcache.cli.top.tables import ORDERS, Name, table_of


def model_of(**changes: object) -> Model:
    model = Model("/run/pool.sock")
    model.saw(Seen(snapshot=snapshot(**changes)), 0.0)
    return model


def first_cells(model: Model, name: Name) -> list[str]:
    return [row.cells[0].strip() for row in model.table(name).rows]


# --- history ----------------------------------------------------------------------------------------


def test_the_first_rates_are_those_since_the_owner_began() -> None:
    history = History()
    history.add(snapshot(hits=30, misses=10, puts=200, uptime_s=100.0), 5.0)
    assert history.last is not None
    assert (history.last.hit_rate, history.last.rates["puts"]) == (0.75, 2.0)


def test_later_rates_are_those_between_two_looks() -> None:
    history = History()
    history.add(snapshot(hits=30, misses=10, puts=200), 5.0)
    history.add(snapshot(hits=30, misses=15, puts=210), 7.0)
    assert history.last is not None
    assert (history.last.hit_rate, history.last.rates["puts"]) == (0.0, 5.0)
    history.add(snapshot(hits=30, misses=15, puts=210), 8.0)
    assert history.last.hit_rate is None


def test_a_new_owner_s_counters_are_not_compared_with_the_old_one_s() -> None:
    history = History()
    history.add(snapshot(puts=1000), 5.0)
    history.add(snapshot(puts=4, uptime_s=2.0, pool="cd" * 16), 7.0)
    assert history.last is not None
    assert history.last.rates["puts"] == 2.0


def test_what_can_be_evicted_is_not_held() -> None:
    history = History()
    figures = {"used_bytes": 48 * MIB, "resident_bytes": 32 * MIB, "pinned_bytes": 16 * MIB}
    history.add(snapshot(**figures), 1.0)
    assert history.last is not None
    assert (history.last.held, history.last.used) == (0.5, 0.75)


def test_history_is_bounded() -> None:
    history = History()
    for at in range(LONGEST + 5):
        history.add(snapshot(), float(at))
    assert len(history.samples) == LONGEST
    assert history.newest(0) == []


# --- tables -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "first"),
    [
        ("number", "1"),
        ("reads", "2"),
        ("owes", "3"),
        ("holds", "1"),
        ("pins", "2"),
        ("age", "3"),
        ("name", "2"),
    ],
)
def test_sessions_go_by_what_they_read_owe_and_hold(order: str, first: str) -> None:
    sessions = (
        session(1, name="Zoe", writing=1, writing_bytes=5, ahead=1, ahead_bytes=5),
        session(2, name="abe", reading=1, reading_bytes=9, pins=1, pinned_bytes=9, writing_bytes=7),
        session(3, name="bob", owes=1, owes_bytes=9, age_s=99.0),
    )
    seen = snapshot(sessions=sessions)
    table = table_of("sessions", seen, None, order=order)
    assert table.rows[0].cells[0] == first
    turned = table_of("sessions", seen, None, order=order, reverse=True)
    assert turned.rows[-1].cells[0] == first


def test_every_order_of_every_table_can_be_chosen() -> None:
    for name in ("sessions", "refs", "puts", "keys"):
        model = lively()
        model.choose(name)
        seen = [model.orders[name]]
        for _ in ORDERS[name]:
            assert len(model.table(name).rows) >= 2
            model.sort()
            seen.append(model.orders[name])
        assert set(seen) == set(ORDERS[name])
        assert seen[0] == seen[-1]


def test_refs_with_the_least_life_left_come_first_by_ttl() -> None:
    model = model_of(
        unpaid=(unpaid("1:1", 5.0), unpaid("2:2", 1.0, ttl_s=9.0), unpaid("3:3", 8.0, ttl_s=10.0))
    )
    assert first_cells(model, "refs") == ["3:3", "1:1", "2:2"]
    model.choose("refs")
    model.sort("ttl")
    assert first_cells(model, "refs") == ["3:3", "2:2", "1:1"]


def test_a_filter_looks_through_all_columns_whatever_the_case() -> None:
    model = lively()
    model.filter("RANK-9")
    assert first_cells(model, "refs") == ["3:14"]
    assert first_cells(model, "sessions") == []
    model.filter("quarantined")
    assert first_cells(model, "sessions") == ["2"]


def test_the_filter_is_bounded() -> None:
    model = lively()
    model.filter("x" * 1000)
    assert len(model.filtered) < 100


# --- the cursor -------------------------------------------------------------------------------------


def test_the_cursor_stays_on_its_row_as_others_come() -> None:
    model = Model("/run/pool.sock", view="keys")
    model.saw(Seen(snapshot=snapshot(), keys=page(key("a", 9), key("b", 8))), 0.0)
    model.move(1)
    assert model.chosen_key is not None
    model.saw(Seen(snapshot=snapshot(), keys=page(key("new", 99), key("a", 9), key("b", 8))), 1.0)
    assert model.chosen_key.label == "b"
    model.saw(Seen(snapshot=snapshot(), keys=page(key("a", 9))), 2.0)
    assert model.chosen_key is not None
    assert model.chosen_key.label == "a"


def test_the_cursor_stays_within_the_table() -> None:
    model = lively()
    model.choose("keys")
    model.move(10**6)
    assert model.cursor == 2
    model.move(-(10**6))
    assert model.cursor == 0
    model.filter("nothing like it")
    model.move(5)
    assert model.cursor == 0
    assert model.chosen_key is None


# --- eviction ---------------------------------------------------------------------------------------


def test_an_eviction_is_asked_twice() -> None:
    model = lively()
    model.choose("keys")
    model.ask(0.0)
    assert model.question is not None
    assert "image/1" in model.question.text
    assert "pinned" in model.question.text
    assert model.answer(True, 0.0) is None
    assert model.question is not None
    chosen = model.answer(True, 0.0)
    assert chosen is not None
    assert chosen.label == "image/1"
    assert model.question is None


@pytest.mark.parametrize("yeses", [0, 1])
def test_one_no_is_enough_to_keep_a_key(yeses: int) -> None:
    model = lively()
    model.choose("keys")
    model.ask(0.0)
    for _ in range(yeses):
        model.answer(True, 0.0)
    assert model.answer(False, 0.0) is None
    assert model.question is None
    assert model.answer(True, 0.0) is None, "there is nothing to say yes to"


def test_the_question_is_about_the_key_that_was_chosen_whatever_came_since() -> None:
    model = lively()
    model.choose("keys")
    model.ask(0.0)
    model.saw(Seen(snapshot=snapshot(), keys=page(key("other", 99 * MIB))), 1.0)
    model.answer(True, 1.0)
    chosen = model.answer(True, 1.0)
    assert chosen is not None
    assert chosen.label == "image/1"


def test_where_no_key_is_shown_none_is_evicted() -> None:
    model = lively()
    model.ask(0.0)
    assert (model.view, model.question) == ("keys", None)
    model.filter("nothing like it")
    model.ask(0.0)
    assert model.question is None
    assert "no key" in model.news(0.0)


def test_an_answer_that_comes_to_a_frozen_frame_is_not_shown() -> None:
    model = lively()
    before = model.snapshot, model.slab, len(model.history.samples)
    model.asking(103.0)
    model.frozen = True
    model.saw(Seen(snapshot=snapshot(), slab=slab("f")), 103.5)
    assert (model.snapshot, model.slab, len(model.history.samples)) == before
    assert model.asked_s is None


# --- how fresh it is --------------------------------------------------------------------------------


def test_a_silent_owner_is_told_with_the_seconds() -> None:
    model = model_of()
    model.asking(10.0)
    assert model.status(11.0) == ("every 1 s", False)
    assert model.status(17.0) == ("no answer for 7 s", True)
    model.saw(Seen(snapshot=snapshot()), 18.0)
    assert model.status(30.0) == ("answers take 8 s", False)
    model.asking(30.0)
    assert model.silent_s(40.0) == 0.0, "that is as usual"
    assert model.silent_s(43.0) == 13.0
    for at in range(20):
        model.asking(43.0 + at)
        model.answered(43.0 + at)
    assert model.status(70.0) == ("every 1 s", False)


def test_an_owner_that_went_is_told_from_when_it_did() -> None:
    model = model_of()
    model.lost("its process died", 10.0)
    model.lost("its process died", 14.0)
    assert model.status(15.0) == ("NO OWNER for 5.0s: its process died", True)
    assert model.history.newest(2) == [None, None]
    assert model.snapshot is not None, "what was seen last stays"
    model.saw(Seen(snapshot=snapshot(), slab=slab("k")), 16.0)
    assert model.status(16.0) == ("every 1 s", False)


def test_a_frame_whose_seconds_count_is_drawn_anew_without_news() -> None:
    model = model_of()
    assert not model.changes_by_itself(100.0)
    model.asking(100.0)
    assert model.changes_by_itself(105.0)
    model.lost("gone", 106.0)
    assert model.changes_by_itself(107.0)


def test_escape_leaves_what_is_open_one_by_one() -> None:
    model = lively()
    model.choose("keys")
    model.filter("image")
    model.helping = True
    model.ask(0.0)
    model.escape(0.0)
    assert (model.question, model.helping, model.filtered) == (None, True, "image")
    model.escape(0.0)
    assert (model.helping, model.filtered) == (False, "image")
    model.escape(0.0)
    assert model.filtered == ""


def test_who_is_not_there_comes_first_among_those_who_owe() -> None:
    owed_by = ("a (session 1, pid 12)", "b (never attached)", "c (the owner, pid 3)")
    (row,) = model_of(unpaid=(unpaid("1:1", 5.0, *owed_by),)).table("refs").rows
    assert row.cells[-1] == "b (never attached), a, c"
    assert row.alert
    (row,) = (
        model_of(unpaid=(unpaid("1:1", 5.0, read_by=("a (session 1, pid 12)",)),))
        .table("refs")
        .rows
    )
    assert row.cells[-1] == "anyone; read by a"
    assert not row.alert
