"""``featcache serve``: started, told of, used, and ended by signals."""

import asyncio
import contextlib
import errno
import importlib.util
import json
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import featcache
from cli.commands import Run
from cli.conftest import Serve
from featcache import OwnerLost
from featcache.cli.exits import Exit, Failure
from support.caches import KIB, MIB, filled, small, until


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
            await until(lambda: "featcache.stopping" in daemon.err)
        ended = daemon.ends()
        assert (ended.code, "featcache.grace_over" in ended.err) == (0, False)


async def test_a_borrow_that_does_not_finish_is_waited_for_no_longer_than_the_grace(
    serve: Serve,
) -> None:
    daemon = serve("--grace", "0.05")
    async with featcache.connect(daemon.endpoint()) as client:
        ref = await client.put(filled(KIB, 9))
        async with client.borrow(ref) as view:
            ended = daemon.stops()
            assert ended.code == 0
            assert "featcache.grace_over" in ended.err
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
    (["--grace", "-1"], 2, "--grace: shutdown_grace"),
    (["--config", "/nowhere.toml"], 2, "No such file"),
    (["--set", "colour=red"], 2, "colour is no setting"),
    (["--set", "tll=5"], 2, "tll is no setting: did you mean ttl?"),
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


# --- metrics, of which the module is another's ------------------------------------------------------


@contextlib.asynccontextmanager
async def service(*arguments: str) -> AsyncIterator[Any]:
    from featcache.cli import serve as module
    from featcache.cli.config import options_of

    options = options_of(dict(zip(arguments[::2], arguments[1::2], strict=True)), None)
    async with featcache.create(settings=small()) as owner:
        yield module._Service(owner, options)


def modules(monkeypatch: pytest.MonkeyPatch, found: Any) -> None:
    """Have this found for any module that is imported by its name, or raised."""

    def load(_: str) -> Any:
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr("importlib.import_module", load)


async def test_metrics_without_their_package_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async with service("metrics_port", "0") as served:
        modules(monkeypatch, ModuleNotFoundError("No module", name="prometheus_client"))
        with pytest.raises(Failure, match=r"pip install 'featcache\[metrics\]'") as told:
            served._metrics()
        assert told.value.code == 6


async def test_metrics_are_served_on_the_loopback_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []

    def start(port: int, *caches: Any, host: str) -> Any:
        calls.append((port, caches, host))
        return SimpleNamespace(url="http://127.0.0.1/metrics")

    async with service("metrics_port", "9464") as served:
        modules(monkeypatch, SimpleNamespace(serve=start))
        served._metrics()
        assert calls == [(9464, (served._cache,), "127.0.0.1")]
    async with service("metrics_port", "0", "metrics_host", "0.0.0.0") as served:  # noqa: S104 - as asked
        served._metrics()
        assert calls[1][2] == "0.0.0.0"  # noqa: S104 - as asked
    async with service() as served:
        served._metrics()
        assert len(calls) == 2


async def test_metrics_can_be_fetched_while_it_serves(serve: Serve) -> None:
    pytest.importorskip("prometheus_client")
    daemon = serve("--metrics-port", "0", "--log", "json")
    async with featcache.connect(daemon.endpoint()) as client:
        await client.put(filled(KIB), key="k")
    (url,) = (line["url"] for line in map(json.loads, daemon.err.splitlines()) if "url" in line)
    assert url.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(url) as answer:  # noqa: S310, ASYNC210 - its own, at once
        assert b"featcache_keys" in answer.read()
    assert daemon.stops().code == 0


def test_a_port_in_use_is_refused(command: Run, runtime_dir: Path) -> None:
    pytest.importorskip("prometheus_client")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = command("serve", "--metrics-port", port, "--log-level", "error")
    assert f"port {port}" in ended.failed_with(5)
    assert endpoints(runtime_dir) == []


@pytest.mark.parametrize(("number", "code"), [(errno.EADDRINUSE, 5), (errno.EACCES, 2)])
async def test_a_port_that_can_t_be_had_is_told(
    monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    def start(*_: Any, **__: Any) -> Any:
        raise featcache.SettingsError("metrics can't listen") from OSError(number, "why")

    async with service("metrics_port", "80") as served:
        modules(monkeypatch, SimpleNamespace(serve=start))
        with pytest.raises((Failure, featcache.SettingsError)) as told:
            served._metrics()
        assert getattr(told.value, "code", 2) == code


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


def key_file(folder: Path) -> Path:
    file = folder / "cluster.key"
    file.write_text("a key of the cluster, for tests\n")
    return file


async def test_it_listens_to_other_hosts_or_names_the_extra(serve: Serve, tmp_path: Path) -> None:
    key = ("--cluster-key-file", key_file(tmp_path))
    daemon = serve("--listen", "127.0.0.1:0", *key, "--capacity", "1MiB")
    if any(importlib.util.find_spec(name) for name in ("nixl_cu12", "nixl_cu13", "nixl")):
        address = daemon.line("featcache listens to other hosts at ")
        async with featcache.connect(daemon.endpoint()) as client:
            assert (await client.put(filled(KIB))).address == address
        assert daemon.stops().code == 0
    else:
        ended = daemon.ends()
        assert ended.code == Exit.UNAVAILABLE
        assert "featcache[reach]" in ended.err
        assert "Traceback" not in ended.err


def test_an_address_without_a_key_is_refused(command: Run, tmp_path: Path) -> None:
    ended = command("serve", "--listen", "127.0.0.1:0")
    assert ended.code == Exit.USAGE
    assert "FEATCACHE_CLUSTER_KEY" in ended.err
    missing = command("serve", "--listen", "127.0.0.1:0", "--cluster-key-file", tmp_path / "none")
    assert missing.code == Exit.USAGE
    assert "none" in missing.err
    assert "--cluster-key " not in command("serve", "--help").out


async def test_a_tier_is_made_by_its_factory(serve: Serve) -> None:
    daemon = serve("--tier", "support.tiers:MemoryTier", "--capacity", "1MiB")
    async with featcache.connect(daemon.endpoint()) as client:
        for number in range(5):
            await client.put(filled(300 * KIB, number), key=f"{number}")
        for number in range(5):
            assert (await client.get(f"{number}")).sum() == 300 * KIB * number  # type: ignore[union-attr]
    assert daemon.stops().code == 0


@pytest.mark.parametrize(
    ("named", "why"),
    [
        ("nothing", "MODULE:FACTORY"),
        ("no_such_module:x", "PYTHONPATH"),
        ("json:nothing", "nothing"),
        (":x", "MODULE:FACTORY"),
        ("json:loads", "loads"),
        ("support.tiers:unset", "NO_SUCH_VARIABLE"),
    ],
)
def test_a_tier_that_is_not_there_is_told(command: Run, named: str, why: str) -> None:
    told = command("serve", "--tier", named)
    assert (told.code, "Traceback" in told.err) == (Exit.USAGE, False)
    assert "tier" in told.err
    assert why in told.err
