"""Frames: what stands on them, in how many columns, on which terminals."""

import pytest
from rich.cells import cell_len
from rich.style import Style

from cli.top.records import (
    HOSTILE,
    MIB,
    PLAIN,
    among_hosts,
    key,
    lively,
    page,
    session,
    shown,
    slab,
    snapshot,
    unpaid,
    waiting,
)
from featcache.cli.top.frame import draw, map_cells
from featcache.cli.top.look import AGES_S, Look, look_of
from featcache.cli.top.model import VIEWS, Model, Seen
from featcache.cli.top.short import short_latency

LOOKS = [
    Look("full"),
    Look("basic"),
    PLAIN,
    Look("none", unicode=False),
    Look("full", letters=True),
]

FRAME = """\
featcache main  host on cpu  pid 4711  up 1m40s                        every 1 s
memory ██████████████████████████████▒▒░░ 60M of 64M, kept 8M, largest free 3M
 HIGH   waiting 2 (9M)  unpaid 40 (1m15s)  sessions 3  keys 3  slots 40/64
slab by offset, 0 to 112M, 1M a cell          puts 10/s  paid 0/s  evicted 1.0/s
···--ssookkpprr···--ssookkpprr···--ssookkpprr···--ssookkpprr···--ssookkpprr···--
ssookkpprr···--ssookkpprr···--ssookkpprr···--ssookkpprr···--ssookkpprr···--ssook
kpprr···--ssookkpprr···--ssookkpprr···--ssookkpprr···--ssookkpprr···--ssookkpprr
· free 29% s reserved 14% o owed 14% k kept 14% p pinned 14% r read 14% CAPS >1m
pressure high, 88% held                  hit rate 90% of 50/s
                                      ▇                                       ▇▇
                                     .h  2.0s ago                            now
   #▼ SESSIONS 3              pid    age     reads      owes     holds      pins
    1 rank-0                 1001  1m00s      2 3M    12 20M         -         -
    2 rank-1 (quarantine…    1002  1m00s         -    28 30M         -         -
    7 encoder                1007  1m00s         -         -      4 1M      1 4M
        ref   size   age▼    ttl  reads UNPAID REFS 2 of 40  owed by; read by
       3:14     1M  1m15s  1m30s      1 rank-9 (never attached)
        5:2     1M    12s      -      1 rank-0; read by rank-0
   #▼ PUTS THAT WAIT 2                                               size  waits
    1 the owner                                                        6M   1.5s
    2 7 encoder                                                        3M   0.2s


1-5 view  s sort  r reverse  / filter  space freeze  e evict  ? help  q quit
""".splitlines()


def test_a_frame_without_colour_at_80_by_24_is_this() -> None:
    assert shown(lively()) == FRAME


@pytest.mark.parametrize("look", LOOKS, ids=str)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("size", [(80, 24), (120, 40), (200, 60), (40, 12), (20, 6), (1, 1)])
def test_a_frame_fills_its_rows_and_no_line_is_longer(
    size: tuple[int, int], view: str, look: Look
) -> None:
    model = lively()
    model.choose(view)  # type: ignore[arg-type]  # one of them
    width, height = size
    lines = draw(model, look, width, height, 102.0)
    assert len(lines) == max(height, 6)
    assert max(cell_len(line.plain) for line in lines) <= max(width, 20)


@pytest.mark.parametrize("look", LOOKS, ids=str)
def test_styles_of_a_frame_are_styles(look: Look) -> None:
    model = lively()
    for age_s in (0.0, *AGES_S):
        model.slab = slab("f.sokpr" * 9, used=0.4, age_s=age_s)
        for line in draw(model, look, 80, 24, 102.0):
            for span in line.spans:
                Style.parse(str(span.style))


@pytest.mark.parametrize("look", [look for look in LOOKS if look.colours == "none"], ids=str)
def test_a_frame_without_colour_has_no_colour(look: Look) -> None:
    model = lively()
    for level in ("normal", "elevated", "high", "exhausted"):
        model.saw(Seen(snapshot=snapshot(level=level)), 103.0)
    for line in draw(model, look, 120, 40, 104.0):
        for span in line.spans:
            style = Style.parse(str(span.style))
            assert (style.color, style.bgcolor) == (None, None), span


def test_a_frame_in_ascii_is_ascii() -> None:
    model = lively()
    seen = snapshot(
        sessions=(session(1, name="späher"),), name="été", unpaid=(unpaid("1:1", 1, "é"),)
    )
    model.saw(Seen(snapshot=seen, keys=page(key("ключ"))), 103.0)
    for view in VIEWS:
        model.choose(view)
        assert all(line.isascii() for line in shown(model, look=Look("none", unicode=False)))


def test_names_of_others_move_no_cursor() -> None:
    seen = snapshot(
        name=HOSTILE,
        sessions=(session(1, name=HOSTILE, state=HOSTILE),),
        unpaid=(unpaid(HOSTILE, 1.0, HOSTILE, read_by=(HOSTILE,)),),
        waiting=(waiting(1, 1.0, 1, HOSTILE),),
        device=HOSTILE,
    )
    model = Model(f"/run/{HOSTILE}")
    frames = [shown(model, 300, 40)]
    model.saw(Seen(snapshot=seen, keys=page(key(HOSTILE))), 1.0)
    for view in VIEWS:
        model.choose(view)
        frames.append(shown(model, 300, 40, now_s=1.0))
    model.ask(1.0)
    frames.append(shown(model, 300, 40, now_s=1.0))
    model.escape(1.0)
    model.filter(HOSTILE)
    model.lost(HOSTILE, 1.0)
    frames.append(shown(model, 300, 40, now_s=99.0))
    for frame in frames:
        assert all(line.isprintable() for line in frame)
    assert any(r"\x1b[2J\x07[red]\u202e\n\x9b1m" in line for line in frames[1])


# --- the map ----------------------------------------------------------------------------------------


def map_of(states: str, look: Look = PLAIN, age_s: float = 0.5, used: float = 1.0) -> list[str]:
    model = Model("/run/pool.sock")
    model.saw(Seen(snapshot=snapshot(), slab=slab(states, used=used, age_s=age_s)), 0.0)
    return shown(model, 80, 24, look, 0.0)[4:8]


def test_the_map_goes_by_offset_row_by_row() -> None:
    assert map_cells(80, 24) == 240
    first, second, third, _ = map_of("o" * 80 + "k" * 80 + "r" * 80)
    assert (first, second, third) == ("o" * 80, "k" * 80, "r" * 80)


def test_a_map_of_other_cells_than_there_is_room_for_fills_the_room() -> None:
    first, _, third, _ = map_of("ok")
    assert first == "o" * 80
    assert third == "k" * 80


def test_what_is_old_has_a_capital_where_there_is_no_colour() -> None:
    assert map_of("k" * 240, age_s=599.0)[0] == "K" * 80
    assert map_of("k" * 240, age_s=59.0)[0] == "k" * 80


@pytest.mark.parametrize("colours", ["full", "basic"])
def test_what_is_older_is_darker(colours: str) -> None:
    look = Look(colours)  # type: ignore[arg-type]  # one of them
    for letter in "sokpr":
        brightness = []
        for age_s in (0.0, 20.0, 5000.0):
            style = Style.parse(look.cell(letter, 0.5, age_s)[1])
            assert style.color is not None
            brightness.append(sum(style.color.get_truecolor()) * (0.5 if style.dim else 1.0))
        assert brightness == sorted(brightness, reverse=True)
        assert len(set(brightness)) == 3


def test_each_state_has_a_colour_and_a_letter_of_its_own() -> None:
    for look in (Look("full"), Look("basic"), PLAIN):
        assert len({look.cell(letter, 1.0, 0.0) for letter in "fsokpr"}) == 6


def test_the_legend_has_the_share_of_each_state() -> None:
    legend = map_of("oooo" * 30 + "k" * 60 + "f" * 59 + "p")[3]
    for part in (
        "free 25%",
        "owed 50%",
        "kept 25%",
        "pinned <1%",
        "read 0%",
        "reserved 0%",
        "CAPS >1m",
    ):
        assert part in legend


def test_a_map_that_is_older_than_the_frame_says_so() -> None:
    model = lively()
    model.saw(Seen(snapshot=snapshot()), 112.0)
    assert "10s old" in shown(model, now_s=112.0)[3]


# --- what there is to say ---------------------------------------------------------------------------


def test_before_the_first_answer_the_frame_says_that_it_connects() -> None:
    first = shown(Model("/run/pool.sock"))[0]
    assert first.startswith("featcache top  /run/pool.sock")
    assert first.endswith("connecting")


def test_an_empty_pool_says_of_each_table_that_it_is_empty() -> None:
    model = Model("/run/pool.sock")
    model.saw(Seen(snapshot=snapshot(), slab=slab("f" * 8), keys=page()), 0.0)
    text = "\n".join(shown(model, now_s=0.0))
    for said in ("nobody is attached", "no ref owes a read", "no put waits", "no lookups"):
        assert said in text
    model.choose("keys")
    assert "nothing is kept under a key" in "\n".join(shown(model, now_s=0.0))


def test_many_sessions_are_counted_and_scrolled_through() -> None:
    model = Model("/run/pool.sock")
    model.saw(Seen(snapshot=snapshot(sessions=tuple(map(session, range(1, 501))))), 0.0)
    assert any("SESSIONS 500" in line for line in shown(model, now_s=0.0))
    assert any("and 494 more: 2 shows them" in line for line in shown(model, now_s=0.0))
    model.choose("sessions")
    model.move(499)
    assert any(line.lstrip().startswith("500 s500") for line in shown(model, now_s=0.0))


def test_a_filter_that_nothing_matches_says_so() -> None:
    model = lively()
    model.filter("nothing like it")
    text = "\n".join(shown(model))
    assert "none matches 'nothing like it'" in text
    assert "Esc ends it" in text


def test_questions_and_news_stand_on_the_last_line() -> None:
    model = lively()
    model.choose("keys")
    model.ask(102.0)
    assert shown(model)[-1].startswith("Evict image/1 (pinned, 2M)?")
    model.answer(True, 102.0)
    assert shown(model)[-1].startswith("Sure?")
    model.answer(False, 102.0)
    assert shown(model)[-1] == "not evicted"
    assert "q quit" in shown(model, now_s=200.0)[-1]


def test_help_names_every_key() -> None:
    model = lively()
    model.helping = True
    text = "\n".join(shown(model))
    for what in ("sort", "filter", "freeze", "evict", "leave"):
        assert what in text


def test_no_figure_of_the_head_is_cut_in_two() -> None:
    model = Model("/run/pool.sock")
    model.saw(
        Seen(snapshot=snapshot(level="exhausted", slots=10**8, slots_used=12345678, keys=10**6)),
        0.0,
    )
    assert shown(model, now_s=0.0)[2].endswith("keys 1000000")


# --- which terminal ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "encoding", "system", "look"),
    [
        ({"TERM": "xterm-256color"}, "utf-8", "256", Look("full")),
        ({"TERM": "linux"}, "UTF-8", "standard", Look("basic")),
        ({"TERM": "xterm", "NO_COLOR": "1"}, "utf-8", "truecolor", Look("none")),
        ({"TERM": "xterm", "NO_COLOR": ""}, "utf-8", "256", Look("full")),
        ({"TERM": "dumb"}, "utf-8", None, Look("none", unicode=False)),
        ({"TERM": "xterm"}, "latin-1", "256", Look("full", unicode=False)),
        ({}, None, None, Look("none", unicode=False)),
    ],
)
def test_a_terminal_is_taken_for_what_it_says(
    environment: dict[str, str], encoding: str | None, system: str | None, look: Look
) -> None:
    assert look_of(environment, encoding, system, plain=False) == look


def test_sizes_that_do_not_fit_whole_columns_are_told_short() -> None:
    from featcache.cli.top.short import short_age, short_rate, short_size

    sizes = (0, 1023, 1536, 20 * MIB, 1023 * MIB, 1 << 40, 1 << 60)
    assert [short_size(size) for size in sizes] == [
        "0B",
        "1023B",
        "1.5K",
        "20M",
        "1023M",
        "1T",
        "1024P",
    ]
    ages = (0, 9.94, 59.4, 192, 7500, 360000)
    assert [short_age(age) for age in ages] == ["0.0s", "9.9s", "59s", "3m12s", "2h05m", "4d04h"]
    assert [short_rate(rate) for rate in (0, 0.25, 12, 123456)] == [
        "0/s",
        "0.2/s",
        "12/s",
        "123k/s",
    ]


# --- other hosts ----------------------------------------------------------------------------------------


def test_without_other_hosts_nothing_is_said_of_them() -> None:
    assert not any("HOSTS" in line or "hosts" in line for line in shown(lively(), height=40))


def test_other_hosts_have_a_table_of_80_columns() -> None:
    model = among_hosts()
    lines = shown(model, height=44)
    at = next(n for n, line in enumerate(lines) if "HOSTS 3" in line)
    assert lines[at : at + 4] == [
        "read HOSTS 3           state         now      moved▼ failed   took  heard  lease",
        "from 10.0.0.7:7400     connected       2        3 3M      1  3.2ms   0.2s      -",
        "by   10.0.0.9:41234    connected    1 1M        2 2M      -      -   0.4s   9.5s",
        "from 10.0.0.8:7400     lost            -        3 1M      -  3.2ms  1m15s      -",
    ]
    assert "1-6 view" in lines[-1]
    model.choose("hosts")
    assert [line for line in shown(model) if "10.0.0." in line] == [
        line for line in lines if "10.0.0." in line
    ]


def test_a_host_without_a_connection_stands_in_bold() -> None:
    model = among_hosts()
    model.choose("hosts")
    model.move(1)
    bold = [line.plain for line in draw(model, PLAIN, 80, 24, 102.0) if "bold" in str(line.style)]
    assert [line for line in bold if "10.0.0.8" in line]
    assert not [line for line in bold if "10.0.0.7" in line]


@pytest.mark.parametrize("size", [(20, 6), (40, 12), (80, 24), (120, 36)])
def test_a_frame_with_hosts_fills_its_rows_and_no_line_is_longer(size: tuple[int, int]) -> None:
    lines = draw(among_hosts(), PLAIN, *size, 102.0)
    assert len(lines) == size[1]
    assert all(line.cell_len <= size[0] for line in lines)


def test_hosts_go_by_what_was_moved_failed_and_took() -> None:
    model = among_hosts()
    model.choose("hosts")
    first = {}
    for order in model.orders_known():
        model.sort(order)
        first[order] = model.table("hosts").rows[0].cells[1]
    assert first == {
        "moved": "10.0.0.7:7400",
        "failed": "10.0.0.7:7400",
        "took": "10.0.0.7:7400",
        "heard": "10.0.0.8:7400",
        "address": "10.0.0.7:7400",
    }


def test_the_table_of_hosts_can_be_chosen_while_there_are_hosts() -> None:
    alone, model = lively(), among_hosts()
    for each, views in ((alone, 5), (model, 6)):
        seen = set()
        for _ in range(12):
            each.next_view()
            seen.add(each.view)
        assert len(seen) == views
    alone.choose("hosts")
    assert alone.view != "hosts"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.00085, "850us"), (0.0032, "3.2ms"), (0.0449, "45ms"), (1.42, "1.4s"), (75, "1m15s")],
)
def test_what_an_operation_took_is_told_in_few_columns(seconds: float, text: str) -> None:
    assert short_latency(seconds) == text
