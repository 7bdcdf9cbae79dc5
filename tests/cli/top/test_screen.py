"""The application, driven through textual's pilot: what its keys do, and what is on the screen."""

import contextlib
from collections.abc import AsyncIterator

import pytest
from textual.pilot import Pilot

from cli.top.fakes import Clock, FakeOwner, on_screen, text_of
from cli.top.records import HOSTILE, MIB, session, unpaid, waiting
from featcache import FeatcacheError, OwnerUnreachable
from featcache.cli.top.look import Look
from featcache.cli.top.model import Model
from featcache.cli.top.screen import Top
from support.caches import until

Driven = Pilot[int | FeatcacheError]


@contextlib.asynccontextmanager
async def shown(
    look: Look | None = None, size: tuple[int, int] = (80, 24), interval_s: float = 3600.0
) -> AsyncIterator[tuple[Top, Driven]]:
    """An application that has looked once."""
    app = Top(Model("x", interval_s=interval_s), Look("full") if look is None else look)
    async with app.run_test(size=size) as pilot:
        await until(lambda: app.model.slab is not None and app.model.asked_s is None)
        await pilot.pause()
        yield app, pilot


async def pressed(pilot: Driven, *keys: str) -> None:
    await pilot.press(*keys)
    await pilot.pause()


async def test_all_that_there_is_stands_on_80_by_24(owner: FakeOwner) -> None:
    owner.seen = {
        "sessions": tuple(session(number) for number in range(1, 40)),
        "unpaid": tuple(unpaid(f"{at}:1", 9.0, "rank-9 (never attached)") for at in range(16)),
        "waiting": tuple(waiting(MIB, 0.5) for _ in range(16)),
        "level": "exhausted",
    }
    async with shown() as (app, _):
        lines = on_screen(app)
        assert len(lines) == 24
        text = "\n".join(lines)
        for part in (
            "memory",
            "EXHAUSTED",
            "slab by offset",
            "pressure",
            "hit rate",
            "SESSIONS 39",
        ):
            assert part in text
        for part in ("UNPAID REFS 16", "rank-9 (never attached)", "PUTS THAT WAIT", "q quit"):
            assert part in text


async def test_numbers_and_tab_choose_the_table(owner: FakeOwner) -> None:
    async with shown() as (app, pilot):
        titles = {"2": "SESSIONS", "3": "UNPAID REFS", "4": "PUTS THAT WAIT", "5": "KEYS 2"}
        for number, title in titles.items():
            await pressed(pilot, number)
            await until(lambda wanted=title: wanted in text_of(app))  # type: ignore[misc]
        await pressed(pilot, "tab")
        await until(lambda: "PUTS THAT WAIT" in text_of(app))
        await pressed(pilot, "shift+tab")
        await until(lambda: "KEYS 2" in text_of(app))


async def test_s_sorts_and_r_turns_the_order_round(owner: FakeOwner) -> None:
    owner.seen = {"sessions": (session(1, reading_bytes=1), session(2, reading_bytes=2))}
    async with shown() as (app, pilot):
        assert "#▼" in text_of(app)
        await pressed(pilot, "s")
        assert "reads▼" in text_of(app)
        assert [row.cells[0] for row in app.model.table("sessions").rows] == ["2", "1"]
        await pressed(pilot, "r")
        assert "reads▲" in text_of(app)
        assert [row.cells[0] for row in app.model.table("sessions").rows] == ["1", "2"]


async def test_a_filter_works_as_it_is_typed_and_takes_every_letter(owner: FakeOwner) -> None:
    owner.seen = {"sessions": (session(1, name="quest"), session(2, name="other"))}
    async with shown() as (app, pilot):
        await pressed(pilot, "slash", *"ques")
        assert "SESSIONS 1 of 2" in text_of(app)
        await pressed(pilot, "enter")
        assert "only rows with 'ques'" in text_of(app)
        await pressed(pilot, "escape")
        assert "SESSIONS 2" in text_of(app)
        await pressed(pilot, "slash", "x", "escape")
        assert app.model.filtered == ""
        await pressed(pilot, "q")
    assert app.return_value == 0


async def test_space_freezes_the_frame(owner: FakeOwner) -> None:
    async with shown() as (app, pilot):
        await pressed(pilot, "space")
        assert on_screen(app)[0].endswith("FROZEN")
        await pressed(pilot, "space")
        assert on_screen(app)[0].endswith("every 3600 s")


async def test_a_key_is_evicted_after_two_questions(owner: FakeOwner) -> None:
    async with shown() as (app, pilot):
        await pressed(pilot, "e")
        assert owner.evicted == []
        await until(lambda: "image/2" in text_of(app))
        await pressed(pilot, "down", "e")
        assert on_screen(app)[-1].startswith("Evict image/2 (8B)?")
        await pressed(pilot, "y")
        assert on_screen(app)[-1].startswith("Sure?")
        assert owner.evicted == []
        await pressed(pilot, "y")
        await until(lambda: "image/2 is evicted" in text_of(app))
    assert owner.evicted == [b"image/2"]


async def test_anything_but_two_yeses_evicts_nothing(owner: FakeOwner) -> None:
    async with shown() as (app, pilot):
        await pressed(pilot, "5")
        await until(lambda: "image/1" in text_of(app))
        for answers in (["n"], ["y", "n"], ["escape"], ["y", "escape"]):
            await pilot.press("e", *answers)
            await pressed(pilot, "y")
            assert (owner.evicted, app.model.question) == ([], None), answers
        await pressed(pilot, "e", "y", "q")
    assert owner.evicted == []


async def test_the_map_is_drawn_with_letters_where_they_are_asked_for(owner: FakeOwner) -> None:
    async with shown() as (app, pilot):
        assert "k" * 80 not in text_of(app)
        await pressed(pilot, "m")
        assert on_screen(app)[4] == "k" * 80


async def test_help_is_shown_and_left(owner: FakeOwner) -> None:
    async with shown() as (app, pilot):
        await pressed(pilot, "question_mark")
        assert "which is asked twice" in text_of(app)
        await pressed(pilot, "escape")
        assert "which is asked twice" not in text_of(app)


async def test_a_frame_follows_the_size_of_the_terminal(owner: FakeOwner) -> None:
    async with shown() as (app, pilot):
        for width, height in ((120, 40), (40, 10), (20, 6), (10, 3), (80, 24)):
            await pilot.resize_terminal(width, height)
            await pilot.pause()
            lines = on_screen(app)
            assert len(lines) == height
            assert all(len(line) <= width for line in lines)


async def test_a_hostile_name_is_only_text_on_the_screen(owner: FakeOwner) -> None:
    owner.seen = {"sessions": (session(1, name=HOSTILE),)}
    async with shown(size=(120, 30)) as (app, _):
        assert all(line.isprintable() for line in on_screen(app))
        assert r"\x1b[2J\x07[red]\u202e\n\x9b1m" in text_of(app)


async def test_without_colour_the_screen_has_none(
    owner: FakeOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    async with shown(Look("none")) as (app, _):
        for strip in app.screen._compositor.render_strips():
            for segment in strip:
                colours = [segment.style.color, segment.style.bgcolor] if segment.style else []
                assert all(colour is None or colour.is_default for colour in colours)


async def test_a_stopped_owner_is_told_of_second_by_second(owner: FakeOwner, clock: Clock) -> None:
    async with shown(interval_s=0.1) as (app, pilot):
        owner.answers.clear()
        await until(lambda: owner.asking)
        clock.ahead_s = 30.0
        app._tick()
        await pilot.pause()
        assert "no answer for 30 s" in on_screen(app)[0]
        clock.ahead_s = 31.0
        app._tick()
        await pilot.pause()
        assert "no answer for 31 s" in on_screen(app)[0]
        owner.answers.set()
        await until(lambda: "no answer" not in text_of(app))


async def test_an_owner_that_died_is_told_and_seen_again_when_it_is_back(owner: FakeOwner) -> None:
    async with shown(interval_s=0.1) as (app, _):
        owner.dies()
        await until(lambda: "its process died" in on_screen(app)[0])
        assert "NO OWNER" in on_screen(app)[0]
        owner.comes_back()
        await until(lambda: on_screen(app)[0].endswith("every 0.1 s"))


async def test_nobody_at_the_endpoint_ends_it_with_the_error(owner: FakeOwner) -> None:
    owner.dies()
    app = Top(Model("x"), Look())
    async with app.run_test():
        await until(lambda: app.return_value is not None)
    assert isinstance(app.return_value, OwnerUnreachable)


@pytest.mark.parametrize(("key", "code"), [("q", 0), ("ctrl+c", 130)])
async def test_it_is_left_by(owner: FakeOwner, key: str, code: int) -> None:
    async with shown() as (app, pilot):
        await pressed(pilot, key)
    assert app.return_value == code
    assert owner.opened == owner.closed == 1


async def test_ctrl_c_leaves_it_while_a_filter_is_typed(owner: FakeOwner) -> None:
    async with shown() as (app, pilot):
        await pressed(pilot, "slash", "a", "ctrl+c")
    assert app.return_value == 130
