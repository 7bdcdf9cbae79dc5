"""``featcache top`` as a user runs it: printed frames, pictures, terminals, and every way out."""

import asyncio
import contextlib
import os
import re
import signal
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.cells import cell_len

import featcache
from cli.commands import Daemon, Run
from cli.conftest import Serve
from cli.test_looking import ran
from cli.top.conftest import InTerminal
from cli.top.records import HOSTILE
from featcache import FeatureCache
from featcache.settings import Settings
from support.caches import KIB, filled, pair, small

SVG = "{http://www.w3.org/2000/svg}"


async def some_pool(owner: FeatureCache) -> None:
    await owner.put(filled(64 * KIB), readers=["rank-1", "rank-2"])
    for index in range(5):
        await owner.put(filled(KIB * (index + 1)), key=f"image/{index}")


# --- one frame --------------------------------------------------------------------------------------


async def test_once_prints_one_frame_of_80_columns(command: Run) -> None:
    async with pair(name="rank-1") as (owner, _):
        await some_pool(owner)
        ended = await ran(command, "top", owner.endpoint, "--once", COLUMNS="", LINES="")
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert 12 < len(lines) <= 24
    assert max(map(cell_len, lines)) <= 80
    for part in (
        "NORMAL",
        "slab by offset",
        "hit rate",
        "rank-2 (never attached)",
        "PUTS THAT WAIT 0",
    ):
        assert part in ended.out
    assert "\x1b" not in ended.out
    assert re.search("o{3,}", ended.out), "the map"


async def test_a_frame_has_the_size_that_is_asked_for(command: Run) -> None:
    async with pair() as (owner, _):
        await some_pool(owner)
        asked = ("top", owner.endpoint, "--once", "--view", "keys", "--sort", "age")
        large = await ran(command, *asked, "--size", "120x40")
        small_ = await ran(command, *asked, "--filter", "IMAGE/3", COLUMNS="60", LINES="16")
    assert 100 < max(map(cell_len, large.out.splitlines())) <= 120
    assert "KEYS 5" in large.out
    assert "age▼" in large.out
    assert max(map(cell_len, small_.out.splitlines())) <= 60
    assert "KEYS 1 of 5" in small_.out


async def test_a_frame_of_an_empty_pool(command: Run) -> None:
    async with featcache.create(settings=small()) as owner:
        ended = await ran(command, "top", owner.endpoint, "--once", "--ascii")
    assert ended.code == 0
    assert ended.out.isascii()
    for said in ("nobody is attached", "no ref owes a read", "no put waits for room"):
        assert said in ended.out


async def test_more_looks_show_rates_between_them(command: Run) -> None:
    async with featcache.create(settings=small()) as owner:
        looking = asyncio.ensure_future(
            ran(command, "top", owner.endpoint, "--once", "--looks", "4", "--interval", "0.1")
        )
        ended = await looking
    assert " ....  " in ended.out, "four looks at a normal level"


async def test_svg_writes_a_picture_in_which_names_are_only_text(
    command: Run, tmp_path: Path
) -> None:
    path = tmp_path / "top.svg"
    async with pair(name="<b>&" + HOSTILE) as (owner, _):
        await some_pool(owner)
        ended = await ran(command, "top", owner.endpoint, "--svg", path)
    assert (ended.code, ended.out, ended.err) == (0, "", "")
    root = ElementTree.parse(path).getroot()  # noqa: S314 - written by ourselves
    text = " ".join("".join(each.itertext()) for each in root.iter(f"{SVG}text")).replace(
        "\xa0", " "
    )
    assert root.tag == f"{SVG}svg"
    for part in ("featcache", "NORMAL", "rank-2 (never attached)", "owed", r"<b>&\x1b[2J"):
        assert part in text
    fills = {each.get("fill") for each in root.iter(f"{SVG}rect")}
    assert len(fills) > 3, "the map is in colours"


async def test_a_picture_that_can_not_be_written_is_told(command: Run, tmp_path: Path) -> None:
    async with featcache.create(settings=small()) as owner:
        path = tmp_path / "nowhere" / "top.svg"
        ended = await ran(command, "top", owner.endpoint, "--svg", path)
    assert str(path) in ended.failed_with(1)


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["top"], "Missing argument"),
        (["top", "x", "--interval", "0"], "--interval"),
        (["top", "x", "--interval", "nan"], "--interval"),
        (["top", "x", "--once", "--looks", "0"], "--looks"),
        (["top", "x", "--once", "--size", "80"], "--size"),
        (["top", "x", "--once", "--size", "9999x24"], "--size"),
        (["top", "x", "--view", "colour"], "--view"),
        (["top", "x", "--sort", "hits"], "--sort"),
        (["top", "", "--once"], "not the path of a Unix socket"),
    ],
)
def test_bad_usage_is_told(command: Run, arguments: list[str], said: str) -> None:
    assert said in command(*arguments).failed_with(2)


@pytest.mark.parametrize("how", [["--once"], ["--svg", "x.svg"], []])
def test_an_endpoint_of_nobody_is_told(command: Run, runtime_dir: Path, how: list[str]) -> None:
    path = str(runtime_dir / "nobody.sock")
    assert f"no owner listens at {path}" in command("top", path, *how).failed_with(3)


def test_without_textual_the_application_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from featcache.cli import program
    from featcache.cli.top import command as top_command

    monkeypatch.setitem(sys.modules, "textual", None)
    for name in [
        name for name in sys.modules if name.startswith(("textual.", "featcache.cli.top.screen"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(top_command, "_is_interactive", lambda: True)
    assert program.run(["top", "/nowhere"]) == 6
    said = capsys.readouterr().err
    assert said.startswith("featcache: textual is missing: pip install 'featcache[cli]'")
    assert said.count("\n") == 1


# --- in a terminal ----------------------------------------------------------------------------------


async def test_in_a_terminal_every_way_out_leaves_it_as_it_was(in_terminal: InTerminal) -> None:
    async with pair(name="rank-1") as (owner, _):
        await some_pool(owner)
        endpoint = owner.endpoint

        def run() -> None:
            ways: dict[str | signal.Signals, int] = {
                "q": 0,
                "\x03": 130,
                signal.SIGTERM: 143,
                signal.SIGINT: 130,
                signal.SIGHUP: 129,
            }
            for way, code in ways.items():
                terminal = in_terminal("top", endpoint)
                terminal.shows("slab by offset")
                if isinstance(way, str):
                    terminal.types(way)
                else:
                    terminal.send_signal(way)
                assert terminal.ends() == code, way
                assert terminal.is_as_it_was(), way

        await asyncio.to_thread(run)


async def test_in_a_terminal_a_key_is_evicted(in_terminal: InTerminal) -> None:
    async with pair() as (owner, _):
        await some_pool(owner)
        endpoint = owner.endpoint

        def run() -> None:
            terminal = in_terminal("top", endpoint, "--view", "keys", "--interval", "0.1")
            terminal.shows("image/4")
            terminal.types("e")
            terminal.shows("Evict image/4")
            terminal.types("y")
            terminal.shows("Sure?")
            terminal.types("y")
            terminal.shows("image/4 is evicted")
            terminal.types("q")
            assert terminal.ends() == 0

        await asyncio.to_thread(run)
        assert not await owner.contains("image/4")
        assert await owner.contains("image/3")


def test_in_a_terminal_an_endpoint_of_nobody_is_told_after_all(
    in_terminal: InTerminal, runtime_dir: Path
) -> None:
    terminal = in_terminal("top", runtime_dir / "nobody.sock")
    assert terminal.ends() == 3
    terminal.shows("no owner listens at")
    assert "Traceback" not in terminal.output


def test_in_a_terminal_an_owner_may_stop_die_and_come_back(
    in_terminal: InTerminal, serve: Serve, runtime_dir: Path
) -> None:
    path = runtime_dir / "own.sock"
    owner = serve("--endpoint", path)
    owner.endpoint()
    terminal = in_terminal("top", path, "--interval", "0.1")
    terminal.shows("every 0.1 s")
    owner.send_signal(signal.SIGSTOP)
    terminal.shows("no answer for ")
    owner.send_signal(signal.SIGCONT)
    owner.process.kill()
    owner.process.join()
    terminal.shows("NO OWNER for")
    back = serve("--endpoint", path)
    back.endpoint()
    terminal.shows(f"pid {back.pid}")
    terminal.types("q")
    assert terminal.ends() == 0
    assert terminal.is_as_it_was()


async def test_in_a_terminal_without_colour_no_colour_is_written(in_terminal: InTerminal) -> None:
    async with pair(name="rank-1") as (owner, _):
        await some_pool(owner)
        endpoint = owner.endpoint

        def run() -> str:
            terminal = in_terminal("top", endpoint, NO_COLOR="1")
            terminal.shows("slab by offset, 0 to")
            terminal.types("q")
            assert terminal.ends() == 0
            return terminal.output

        output = await asyncio.to_thread(run)
    codes = {code for found in re.findall(r"\x1b\[([0-9;]*)m", output) for code in found.split(";")}
    assert codes <= {"", "0", "1", "2", "4", "7", "39", "49"}, "attributes and the default colours"


def test_on_a_dumb_terminal_frames_follow_one_another(
    in_terminal: InTerminal, serve: Serve
) -> None:
    owner = serve()
    terminal = in_terminal("top", owner.endpoint(), "--interval", "0.1", TERM="dumb")
    terminal.until(lambda: terminal.output.count("PUTS THAT WAIT") > 2, "a third frame")
    terminal.send_signal(signal.SIGINT)
    assert terminal.ends() == 130
    assert "\x1b" not in terminal.output
    assert terminal.output.isascii()


def test_into_a_pipe_frames_follow_one_another_also_without_an_owner(serve: Serve) -> None:
    owner = serve()
    folder = Path(os.environ["XDG_RUNTIME_DIR"])
    command = Daemon(folder, ("top", owner.endpoint(), "--interval", "0.1"), {"TERM": "xterm"})
    with contextlib.closing(command):
        command.line("memory")
        assert owner.stops().code == 0
        command.holds("closed")
        command.send_signal(signal.SIGINT)
        ended = command.ends()
    assert (ended.code, ended.err.strip()) == (130, "")
    assert "NO OWNER for" in ended.out


# --- pools of many ----------------------------------------------------------------------------------


async def test_a_pool_of_100_000_slots_is_drawn(command: Run) -> None:
    many = Settings(
        capacity="32MiB", segment="1MiB", slots=100_000, huge_pages=False, message_bytes=64 << 10
    )
    async with featcache.create(settings=many) as owner:
        for _ in range(40):
            await owner.put_many([filled(1)] * 512, readers=1)
        ended = await ran(command, "top", owner.endpoint, "--once")
    assert ended.code == 0, ended.err
    assert "UNPAID REFS 16 of 20480" in ended.out
