"""``featcache serve``: started, told of, used, and ended by signals."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import featcache
from cli.commands import Run
from cli.conftest import Serve
from featcache import OwnerLost
from support.caches import KIB, MIB, filled, until


def endpoints(folder: Path) -> list[str]:
    return [path.name for path in (folder / "featcache").glob("*")]


async def test_it_prints_its_endpoint_and_serves_there(serve: Serve, runtime_dir: Path) -> None:
    daemon = serve()
    async with featcache.connect(daemon.endpoint()) as client:
        ref = await client.put(filled(KIB, 7))
        assert (await client.get(ref)).sum() == 7 * KIB  # type: ignore[union-attr]
    assert daemon.stops().code == 0
    assert daemon.out == f"featcache serves {daemon.endpoint()}\n" or daemon.out.count("\n") == 1
    assert endpoints(runtime_dir) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_in_order(
    serve: Serve, runtime_dir: Path, number: signal.Signals
) -> None:
    daemon = serve()
    async with featcache.connect(daemon.endpoint()) as client:
        await client.put(filled(KIB), key="k")
        ended = daemon.stops(number)
        assert (ended.code, "Traceback" in ended.err) == (0, False)
        with pytest.raises(OwnerLost):
            await client.put(filled(KIB))
    assert endpoints(runtime_dir) == []


async def test_waits_end_and_borrows_may_finish(serve: Serve) -> None:
    daemon = serve()
    async with featcache.connect(daemon.endpoint()) as client:
        ref = await client.put(filled(16 * MIB, 3), readers=2)
        waiting = asyncio.ensure_future(client.put(filled(KIB)))
        key = asyncio.ensure_future(client.get("absent", timeout=60))
        async with featcache.observe(daemon.endpoint()) as observer:
            while (await observer.snapshot()).statistics.waiters != 1:
                pass
        async with client.borrow(ref) as view:
            daemon.send_signal(signal.SIGTERM)
            for each in (waiting, key):
                with pytest.raises(OwnerLost):
                    await each
            with pytest.raises(OwnerLost, match="shutting down"):
                await client.put(filled(KIB))
            assert int(view[0]) == 3  # type: ignore[index]
            assert daemon.process.exitcode is None
        assert daemon.ends().code == 0


async def test_a_borrow_that_does_not_finish_is_waited_for_no_longer_than_the_grace(
    serve: Serve,
) -> None:
    daemon = serve("--grace", "0.05")
    async with featcache.connect(daemon.endpoint()) as client:
        ref = await client.put(filled(KIB, 9))
        async with client.borrow(ref) as view:
            assert daemon.stops().code == 0
            assert int(view[0]) == 9  # type: ignore[index]


async def test_a_second_signal_ends_it_at_once(serve: Serve) -> None:
    daemon = serve("--grace", "3600")
    async with featcache.connect(daemon.endpoint()) as client:
        ref = await client.put(filled(KIB))
        async with client.borrow(ref):
            daemon.send_signal(signal.SIGTERM)
            with pytest.raises(OwnerLost):
                await client.get("absent", timeout=60)  # so the first has arrived
            assert daemon.stops(signal.SIGINT).code == 128 + signal.SIGINT


async def test_an_endpoint_in_use_is_refused_and_a_stale_one_taken_over(
    serve: Serve, command: Run, runtime_dir: Path
) -> None:
    path = runtime_dir / "x.sock"
    first = serve("--endpoint", path)
    assert first.endpoint() == str(path)
    said = command("serve", "--endpoint", path).failed_with(5)
    assert f"process {first.pid} owns it" in said
    first.process.kill()
    first.process.join()
    assert path.exists()
    second = serve("--endpoint", path)
    assert second.endpoint() == str(path)
    async with featcache.connect(str(path)) as client:
        await client.get(await client.put(filled(KIB)))
    assert second.stops().code == 0
    assert not path.exists()


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(serve: Serve, runtime_dir: Path, *, abstract: bool) -> None:
    name = f"{'@' if abstract else ''}{runtime_dir}/notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name.replace("@", "\0", 1) if abstract else name)
        sock.settimeout(40)
        daemon = serve(NOTIFY_SOCKET=name)
        ready = sock.recv(4096).decode().splitlines()
        assert ready[0] == "READY=1"
        assert f"MAINPID={daemon.pid}" in ready
        assert daemon.endpoint() in ready[2]
        daemon.send_signal(signal.SIGTERM)
        assert sock.recv(4096) == b"STOPPING=1"
        assert daemon.ends().code == 0


def test_nobody_to_be_told_stops_nothing(serve: Serve) -> None:
    daemon = serve(NOTIFY_SOCKET="/nowhere/notify")
    daemon.endpoint()
    assert daemon.stops().code == 0


def test_its_log_can_be_read_by_machines(serve: Serve) -> None:
    daemon = serve("--log", "json")
    endpoint = daemon.endpoint()
    lines = [json.loads(line) for line in daemon.stops().err.splitlines()]
    assert [line["event"] for line in lines] == ["featcache.pool.opened", "featcache.pool.closed"]
    assert lines[0]["endpoint"] == endpoint
    assert lines[0]["level"] == "info"


async def test_options_come_before_the_environment_and_that_before_the_file(
    serve: Serve, runtime_dir: Path
) -> None:
    file = runtime_dir / "featcache.toml"
    file.write_text(
        'capacity = "4MiB"\nslots = 7\nttl = "none"\nname = "file"\nlog-level = "error"\n'
    )
    daemon = serve("--config", file, FEATCACHE_SLOTS="9", FEATCACHE_NAME="variable")
    async with featcache.observe(daemon.endpoint()) as observer:
        seen = await observer.snapshot()
    assert seen.statistics.capacity_bytes == 16 * MIB
    assert seen.statistics.slots == 9
    assert seen.name == "variable"
    assert daemon.stops().err == ""


async def test_every_option_has_its_variable(serve: Serve, runtime_dir: Path) -> None:
    file = runtime_dir / "featcache.toml"
    file.write_text("slots = 5\n")
    path = str(runtime_dir / "y.sock")
    daemon = serve(
        FEATCACHE_CONFIG=str(file),
        FEATCACHE_ENDPOINT=path,
        FEATCACHE_DEVICE="cpu",
        FEATCACHE_SPILL="1MiB",
        FEATCACHE_LOG="json",
        FEATCACHE_LOG_LEVEL="error",
        FEATCACHE_SHUTDOWN_GRACE="0",
    )
    assert daemon.endpoint() == path
    async with featcache.observe(path) as observer:
        assert (await observer.snapshot()).statistics.slots == 5
    async with featcache.connect(path) as client:
        await client.put(filled(16 * MIB))
        await client.put(filled(KIB), on_full="spill")
    assert daemon.stops().err == ""


BAD = [
    (["--capacity", "64Mi"], 2, "capacity='64Mi' is not a size"),
    (["--capacity", "0"], 2, "out of range"),
    (["--initial", "much"], 2, "initial"),
    (["--spill", "much"], 2, "spill='much' is not a size"),
    (["--device", "tpu"], 2, "device='tpu'"),
    (["--device", "cuda:99"], 6, "cuda:99"),
    (["--endpoint", "/" + "x" * 200], 2, "longer than a Unix socket's"),
    (["--endpoint", "/nowhere/x.sock"], 2, "can't listen at /nowhere/x.sock"),
    (["--name", ""], 2, "name"),
    (["--log", "xml"], 2, "--log: log='xml' is none of console, json"),
    (["--log-level", "loud"], 2, "log_level='loud'"),
    (["--metrics-port", "70000"], 2, "70000"),
    (["--metrics-port", "http"], 2, "is no port"),
    (["--grace", "-1"], 2, "shutdown_grace"),
    (["--config", "/nowhere.toml"], 2, "No such file"),
    (["--set", "colour=red"], 2, "colour is no setting"),
    (["--set", "slots"], 2, "NAME=VALUE"),
    (["--set", "slots=many"], 2, "slots='many' is not a whole number"),
    (["--colour"], 2, "No such option"),
    (["extra"], 2, "unexpected extra argument"),
]


@pytest.mark.parametrize(("arguments", "code", "said"), BAD, ids=lambda each: str(each)[:30])
def test_a_bad_use_ends_with_one_line(
    command: Run, arguments: list[str], code: int, said: str
) -> None:
    assert said in command("serve", *arguments).failed_with(code)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("capacity = ", "is not TOML"),
        ("capactiy = 1", "capactiy is no setting: did you mean capacity?"),
        ("log = 7", "log=7 is none of"),
        ("name = 7", "is not a text"),
        ("slots = 'many'", "slots='many'"),
    ],
)
def test_a_bad_file_is_told(command: Run, runtime_dir: Path, text: str, said: str) -> None:
    file = runtime_dir / "featcache.toml"
    file.write_text(text)
    assert said in command("serve", "--config", file).failed_with(2)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("FEATCACHE_LOG", "xml"),
        ("FEATCACHE_METRICS_PORT", "x"),
        ("FEATCACHE_SLOTS", "x"),
        ("FEATCACHE_SLOST", "1"),
    ],
)
def test_a_bad_variable_is_named(command: Run, variable: str, value: str) -> None:
    assert variable in command("serve", **{variable: value}).failed_with(2)


def test_metrics_without_their_package_are_told_before_it_serves(command: Run) -> None:
    ended = command("serve", "--metrics-port", "0", FEATCACHE_LOG_LEVEL="error")
    assert "pip install 'featcache[metrics]'" in ended.failed_with(6)


async def test_as_a_user_runs_it(runtime_dir: Path) -> None:
    process = subprocess.Popen(  # noqa: ASYNC220 - it starts, and is not waited for here
        [sys.executable, "-m", "featcache", "serve", "--capacity", "16MiB"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = await asyncio.to_thread(process.stdout.readline)
    endpoint = line.removeprefix("featcache serves ").strip()
    async with featcache.connect(endpoint) as client:
        await client.get(await client.put(filled(KIB)))
    process.send_signal(signal.SIGTERM)
    out, err = await asyncio.to_thread(process.communicate, None, 40)
    assert (process.returncode, out) == (0, "")
    assert "Traceback" not in err
    await until(lambda: not endpoints(runtime_dir))
