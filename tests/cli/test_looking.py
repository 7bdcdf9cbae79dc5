"""The commands that look at pools: stat, keys, evict, ls, sweep."""

import asyncio
import contextlib
import importlib.metadata
import json
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import attrs
import pytest

import featcache
from cli.commands import Ended, Run, started
from cli.conftest import Serve
from featcache import FeatureCache, Snapshot, Statistics
from featcache.cli import checks
from featcache.cli.exits import one_line
from featcache.observation import SessionView, UnpaidRef, WaitingPut
from support.caches import KIB, filled, pair, small


async def ran(command: Run, *arguments: object, **env: str) -> Ended:
    return await asyncio.to_thread(command, *arguments, **env)


@contextlib.asynccontextmanager
async def some_keys() -> AsyncIterator[FeatureCache]:
    async with featcache.create(settings=small()) as owner:
        for index in range(5):
            await owner.put(filled(KIB * (index + 1)), key=f"k{index}")
        yield owner


def names(kind: type) -> set[str]:
    return {field.name for field in attrs.fields(kind)}


# --- stat -------------------------------------------------------------------------------------------


async def test_stat_as_json_has_the_whole_record(command: Run) -> None:
    async with pair(name="r1") as (owner, client):
        await owner.put(filled(KIB), readers=["r1", "r2"])
        await owner.put(filled(owner.statistics().largest_free_bytes))
        waiting = asyncio.ensure_future(client.put(filled(KIB)))
        endpoint = owner.endpoint
        ended = await ran(command, "stat", "--json", endpoint)
        waiting.cancel()
    assert (ended.code, ended.err) == (0, "")
    (seen,) = ended.objects
    assert set(seen) == names(Snapshot) | {"schema"}
    assert set(seen["statistics"]) == names(Statistics)
    assert set(seen["sessions"][0]) == names(SessionView)
    assert set(seen["unpaid"][0]) == names(UnpaidRef)
    assert set(seen["waiting"][0]) == names(WaitingPut)
    assert (seen["schema"], seen["level"], seen["endpoint"]) == (1, "exhausted", endpoint)


async def test_stat_for_people_names_who_owes(command: Run) -> None:
    async with pair(name="rank-1") as (owner, _):
        endpoint = owner.endpoint
        await owner.put(filled(KIB), readers=["rank-1", "rank-2"])
        ended = await ran(command, "stat", endpoint)
    assert (ended.code, ended.err) == (0, "")
    for word in (endpoint, "pressure", "normal", "rank-1", "rank-2 (never attached)"):
        assert word in ended.out


async def test_a_name_of_others_is_only_text(command: Run) -> None:
    async with pair(name="[red]\x1b[2Jx") as (owner, _):
        await owner.put(filled(KIB), key="[bold]\x1b]0;title\x07")
        stat = await ran(command, "stat", owner.endpoint)
        keys = await ran(command, "keys", owner.endpoint)
    assert "[red]" in stat.out
    assert "\x1b" not in stat.out + keys.out


async def test_stat_watches_until_it_is_interrupted(serve: Serve, command: Run) -> None:
    owner = serve()
    with contextlib.closing(_watch(owner.endpoint(), serve)) as watch:
        for _ in range(2):
            watch.line('{"pool"')
        watch.send_signal(signal.SIGINT)
        assert watch.ends().code == 130


def _watch(endpoint: str, serve: Serve):  # type: ignore[no-untyped-def]
    from cli.commands import Daemon

    folder = Path(os.environ["XDG_RUNTIME_DIR"])
    return Daemon(folder, ("stat", endpoint, "--json", "--watch", "--interval", "0.05"), {})


async def test_stat_of_an_owner_that_ends_says_so(serve: Serve) -> None:
    owner = serve()
    with contextlib.closing(_watch(owner.endpoint(), serve)) as watch:
        watch.line('{"pool"')
        owner.stops()
        ended = watch.ends()
    assert ended.code == 7
    assert "closed the pool" in ended.err


async def test_the_endpoint_may_come_from_the_environment(command: Run) -> None:
    async with featcache.create(settings=small()) as owner:
        endpoint = owner.endpoint
        ended = await ran(command, "stat", "--json", FEATCACHE_ENDPOINT=endpoint)
    assert ended.objects[0]["endpoint"] == endpoint


@pytest.mark.parametrize("what", [["stat"], ["keys"], ["evict", "{}", "k"]])
def test_an_endpoint_of_nobody_is_told(command: Run, runtime_dir: Path, what: list[str]) -> None:
    path = str(runtime_dir / "nobody.sock")
    arguments = [each.format(path) for each in what]
    if len(arguments) == 1:
        arguments.append(path)
    assert f"no owner listens at {path}" in command(*arguments).failed_with(3)


def test_a_pool_of_another_version_is_told(command: Run, runtime_dir: Path) -> None:
    import threading

    from control.peers import frame
    from featcache.control.messages import VERSION, Closing, encode

    path = str(runtime_dir / "old.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def answer() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(frame(encode(Closing()), version=VERSION + 1))
                peer.recv(1)

        thread = threading.Thread(target=answer)
        thread.start()
        said = command("stat", path).failed_with(4)
        thread.join()
    assert f"version {VERSION + 1}" in said


async def test_one_observer_too_many_is_told(command: Run) -> None:
    async with featcache.create(settings=small(observers=0)) as owner:
        ended = await ran(command, "stat", owner.endpoint)
    assert "raise Settings.observers" in ended.failed_with(4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stat"], "Missing argument 'ENDPOINT': give it, or set FEATCACHE_ENDPOINT"),
        (["stat", "x", "--interval", "0"], "--interval"),
        (["stat", "x", "--every", "0"], "--interval"),
        (["keys", "x", "--by", "colour"], "colour"),
        (["keys", "x", "--limit", "0"], "--limit"),
        (["evict"], "Missing argument 'KEY'"),
        (["evict", "x"], "Missing argument 'ENDPOINT'"),
        (["evict", "x", "y", "z"], "unexpected extra argument (z)"),
        (["evict", "x", "zz", "--hex"], "is not hex"),
        (["stat", ""], "not the path of a Unix socket"),
        (["nonsense"], "No such command"),
        (["srve"], "No such command 'srve'. Did you mean 'serve'?"),
        (["bench", "--sizes", "much"], "is not a size"),
        (["bench", "--device", "tpu"], "tpu"),
        (["bench", "--seconds", "0"], "--seconds"),
    ],
)
def test_a_bad_use_ends_with_one_line(command: Run, arguments: list[str], said: str) -> None:
    assert said in command(*arguments).failed_with(2)


# --- keys and evict -----------------------------------------------------------------------------------


async def test_keys_come_largest_first_page_by_page(command: Run) -> None:
    async with some_keys() as owner:
        first = await ran(command, "keys", owner.endpoint, "--limit", 2, "--json")
        *shown, after = first.objects
        rest = await ran(
            *(command, "keys", owner.endpoint, "--limit", 9, "--json"), "--after", after["next"]
        )
        everything = await ran(command, "keys", owner.endpoint, "--limit", 2, "--all", "--json")
    assert [one["key"] for one in shown] == ["k4", "k3"]
    assert [one["key"] for one in rest.objects] == ["k2", "k1", "k0"]
    assert everything.objects == shown + rest.objects or [
        one["key"] for one in everything.objects
    ] == ["k4", "k3", "k2", "k1", "k0"]


@pytest.mark.parametrize(("by", "first"), [("oldest", "k0"), ("largest", "k4"), ("most-hit", "k2")])
async def test_keys_have_their_orders(command: Run, by: str, first: str) -> None:
    async with some_keys() as owner, featcache.connect(owner.endpoint) as client:
        for _ in range(3):
            await client.get("k2")
        ended = await ran(command, "keys", owner.endpoint, "--by", by, "--json")
    assert ended.objects[0]["key"] == first


async def test_keys_for_people_say_how_to_go_on(command: Run) -> None:
    async with some_keys() as owner:
        ended = await ran(command, "keys", owner.endpoint, "--limit", 2)
        assert "2 of 5 keys, by largest" in ended.out
        after = ended.out.split("next: --after ")[1].strip()
        more = await ran(command, "keys", owner.endpoint, "--after", after)
    assert "k2" in more.out
    assert "next:" not in more.out


async def test_evict_drops_a_key_and_says_when_there_is_none(command: Run) -> None:
    async with some_keys() as owner:
        assert (await ran(command, "evict", owner.endpoint, "k1")).code == 0
        assert not await owner.contains("k1")
        assert "no key 'k1'" in (await ran(command, "evict", owner.endpoint, "k1")).failed_with(1)
        hexed = await ran(command, "evict", owner.endpoint, b"k2".hex(), "--hex")
        assert hexed.code == 0
        assert not await owner.contains("k2")


async def test_evict_too_takes_its_endpoint_from_the_environment(command: Run) -> None:
    async with some_keys() as owner:
        ended = await ran(command, "evict", "k1", FEATCACHE_ENDPOINT=owner.endpoint)
        assert (ended.code, ended.out) == (0, "evicted k1\n")
        assert not await owner.contains("k1")


# --- ls and sweep ---------------------------------------------------------------------------------------


def test_ls_and_sweep_tell_the_living_from_the_dead(
    serve: Serve, command: Run, runtime_dir: Path
) -> None:
    living, dead, elsewhere = serve(), serve(), serve("--endpoint", runtime_dir / "own.sock")
    paths = [daemon.endpoint() for daemon in (living, dead, elsewhere)]
    dead.process.kill()
    dead.process.join()
    note = runtime_dir / "featcache" / "note.txt"
    note.write_text("mine")
    other = runtime_dir / "featcache" / "other.lock"
    other.write_text("no process")
    found = {one["endpoint"]: one for one in command("ls", "--json").objects}
    assert [found[path]["state"] for path in paths] == ["alive", "stale", "alive"]
    assert found[paths[0]]["pid"] == living.pid
    assert found[paths[0]]["capacity_bytes"] == 16 << 20
    assert str(note) not in found
    table = command("ls").out
    assert all(path in table for path in paths)
    assert f"· {paths[1]}: its owner died: featcache sweep removes it\n" in table
    swept = command("sweep")
    assert (swept.code, swept.out) == (0, f"removed {paths[1]}\n")
    assert not Path(paths[1]).exists()
    assert not Path(f"{paths[1]}.lock").exists()
    assert note.exists()
    assert other.exists()
    assert command("sweep").out == "nothing to remove\n"
    for daemon in (living, elsewhere):
        assert daemon.stops().code == 0


async def test_a_look_for_pools_leaves_its_own_process_s_locks(runtime_dir: Path) -> None:
    from featcache.api.endpoints import find_endpoints, sweep

    async with featcache.create(settings=small()) as owner:
        mine = [one for one in find_endpoints() if one.path == owner.endpoint]
        assert [(one.state, one.pid) for one in mine] == [("alive", os.getpid())]
        assert sweep() == []
        with pytest.raises(featcache.SettingsError, match="in use"):
            await featcache.create(settings=small(), endpoint=owner.endpoint).open()


def test_ls_of_nothing_says_so(command: Run, runtime_dir: Path) -> None:
    found = [line for line in command("ls", "--json").out.splitlines() if str(runtime_dir) in line]
    assert found == []


# --- doctor and bench -------------------------------------------------------------------------------------


def test_doctor_finds_this_machine_in_order(command: Run) -> None:
    ended = command("doctor", "--json")
    found = {one["name"]: one for one in ended.objects}
    wanted = {"python", "torch", "kernel", "pidfd", "/proc", "memfd", "descriptors", "memlock"}
    assert wanted | {"memory", "socket folder", "descriptor passing"} <= set(found)
    assert ended.code == 0, [one for one in found.values() if one["state"] == "bad"]
    assert all(one["remedy"] for one in found.values() if one["state"] in {"warn", "bad"})


def test_doctor_tells_what_other_hosts_are_reached_over(monkeypatch: pytest.MonkeyPatch) -> None:
    there: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in there:
            raise importlib.metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    (missing,) = checks._reach()
    assert missing.state == "note"
    assert "pip install 'featcache[reach]'" in missing.remedy
    there["nixl-cu12"] = "1.5.1"
    monkeypatch.setenv("UCX_TLS", "tcp")
    found = list(checks._reach())
    assert [one.name for one in found] == ["other hosts", "RDMA"]
    assert found[0].found == "nixl-cu12 1.5.1; UCX_TLS=tcp"


def test_doctor_says_what_to_do_where_something_is_bad(command: Run, runtime_dir: Path) -> None:
    ended = command("doctor", XDG_RUNTIME_DIR="/nowhere", FEATCACHE_CAPACITY="100TiB")
    assert ended.code == 1
    assert "set XDG_RUNTIME_DIR, or --endpoint" in ended.out
    assert "set --capacity, or raise the limit" in ended.out
    assert ended.err == "featcache: not in order: socket folder\n"


def test_bench_measures_each_size(command: Run) -> None:
    ended = command("bench", "--sizes", "1KiB,64KiB", "--seconds", "0.5", "--json")
    assert (ended.code, ended.err) == (0, "")
    assert [one["nbytes"] for one in ended.objects] == [1 << 10, 64 << 10]
    for one in ended.objects:
        assert set(one["us"]) >= {"put", "get", "borrow", "contains"}
        assert all(value > 0 for value in one["us"].values())
    assert "GiB/s" in command("bench", "--sizes", "1KiB", "--seconds", "0.2").out


def test_help_and_version_need_no_pool(command: Run) -> None:
    assert command("--version").out == f"featcache, version {featcache.__version__}\n"
    helped = command("--help")
    assert helped.code == 0
    for name in ("serve", "ls", "stat", "top", "keys", "evict", "sweep", "doctor", "bench"):
        assert name in helped.out
        assert command(name, "--help").code == 0


def test_no_command_at_all_shows_them_line_by_line(command: Run) -> None:
    ended = command()
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == command("--help").out


@pytest.mark.parametrize(
    ("command", "start"),
    [
        ("stat --watch --every 0.1", b"endpoint"),
        ("stat --json --watch --every 0.1", b"{"),
        ("top --interval 0.1", b"featcache"),
    ],
)
async def test_an_output_that_nobody_reads_any_more_is_no_failure(
    runtime_dir: Path, command: str, start: bytes
) -> None:
    out, err = runtime_dir / "out", runtime_dir / "err"
    os.mkfifo(out)
    async with featcache.create(settings=small()) as owner:
        process = started([*command.split(), owner.endpoint], out, err)
        reads = await asyncio.to_thread(os.open, out, os.O_RDONLY)
        assert await asyncio.to_thread(os.read, reads, len(start)) == start
        os.close(reads)
        await asyncio.to_thread(process.join)
    assert (process.exitcode, err.read_text()) == (0, "")


def test_an_error_of_the_system_is_told_without_its_number() -> None:
    error = FileNotFoundError(2, "No such file or directory", "top.svg")
    assert one_line(error) == "No such file or directory: top.svg"
    assert one_line(OSError(28, "No space left on device")) == "No space left on device"


def test_a_missing_extra_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    from featcache import cli

    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name}", name="click")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 6
    assert capsys.readouterr().err == "featcache: click is missing: pip install 'featcache[cli]'\n"


def test_json_lines_are_json(command: Run) -> None:
    assert all(json.loads(line) for line in command("doctor", "--json").out.splitlines())
