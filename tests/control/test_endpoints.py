"""Who owns an endpoint: one of those that come, for its life; and nobody removes another's files."""

import contextlib
import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import featcache
from featcache import AttachRefused, FeatcacheError, FeatureCache, SettingsError
from featcache.control import endpoint as endpoints
from support.caches import KIB, filled, small
from support.processes import Pipe, Start, starting, warm_up

pytestmark = pytest.mark.usefixtures("no_leaks")
ROUNDS = 12


@pytest.fixture(scope="module", autouse=True)
def _server() -> None:
    warm_up()


@pytest.fixture
def start() -> Iterator[Start]:
    with starting() as started:
        yield started


def at(endpoint: Path) -> FeatureCache:
    return featcache.create(endpoint=str(endpoint), settings=small())


async def works(endpoint: Path) -> None:
    async with featcache.connect(str(endpoint)) as client:
        await client.get(await client.put(filled(KIB)))


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- of several that start together, one -----------------------------------------------------------


async def opens(pipe: Pipe, endpoint: str | None) -> None:
    """Open a pool again and again, each time when told; keep it open until told."""
    while True:
        pipe.say("ready")
        await pipe.hear()
        cache = featcache.create(endpoint=endpoint, settings=small())
        try:
            await cache.open()
            pipe.say("opened")
        except SettingsError as error:
            pipe.say("refused", str(error))
        await pipe.hear()
        await cache.aclose()


@pytest.mark.parametrize("stale", [False, True], ids=["free", "stale"])
async def test_of_owners_that_start_together_one_opens(
    stale: bool, runtime_dir: Path, start: Start
) -> None:
    endpoint = runtime_dir / "one"
    children = [start(opens, str(endpoint)) for _ in range(3)]
    for _ in range(ROUNDS):
        for child in children:
            await child.expect("ready")
        if stale:
            with socket.socket(socket.AF_UNIX) as left:
                left.bind(str(endpoint))
        for child in children:
            child.tell("open")
        said = [await child.hear() for child in children]
        assert sorted(what for what, *_ in said) == ["opened", "refused", "refused"]
        (owner,) = [
            child.pid for child, (what, *_) in zip(children, said, strict=True) if what == "opened"
        ]
        told = [text for _, *texts in said for text in texts]
        assert all("in use" in text for text in told)
        assert any(f"process {owner} " in text for text in told) or stale
        for child in children:
            child.tell("close")
    for child in children:
        await child.expect("ready")
    assert files(runtime_dir) == set()


Step = tuple[Any, str]
STEPS: dict[str, Step] = {
    "before it has the lock": (fcntl, "lockf"),
    "before it looks at the path": (endpoints, "_clear"),
    "before it binds": (socket.socket, "bind"),
    "before it listens": (socket.socket, "listen"),
}


def before(monkeypatch: pytest.MonkeyPatch, step: Step, do: Callable[[], object]) -> None:
    """Do something once, before a call."""
    holder, name = step
    call, pending = getattr(holder, name), [do]

    def called(*arguments: Any) -> Any:
        if pending:
            pending.pop()()
        return call(*arguments)

    monkeypatch.setattr(holder, name, called)


async def stops(pipe: Pipe, endpoint: str, step: str) -> None:
    """Open a pool, and stand still at a step."""
    with pytest.MonkeyPatch.context() as patch:
        before(patch, STEPS[step], lambda: pipe.stand(step))
        await opens(pipe, endpoint)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("stale", [False, True], ids=["free", "stale"])
async def test_whoever_comes_between_two_steps_of_another(
    step: str, stale: bool, runtime_dir: Path, start: Start
) -> None:
    endpoint = runtime_dir / "one"
    if stale:
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(endpoint))
    child = start(stops, str(endpoint), step)
    await child.expect("ready")
    await child.ask("open")
    mine, opened = at(endpoint), False
    with contextlib.suppress(SettingsError):
        await mine.open()
        opened = True
    what, *_ = await child.ask("go on")
    assert {what, opened} in ({"opened", False}, {"refused", True})
    assert opened == (step == "before it has the lock")
    await works(endpoint)
    child.tell("close")
    await child.expect("ready")
    await mine.aclose()
    assert files(runtime_dir) == set()


def test_a_lock_whose_file_was_removed_before_it_was_taken_is_none(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock_file = runtime_dir / "one.lock"
    before(monkeypatch, (fcntl, "lockf"), lock_file.unlink)  # as the owner that closes does
    one = endpoints.listen(str(runtime_dir / "one"))
    assert lock_file.read_text() == f"{os.getpid()}\n"
    one.close()
    assert files(runtime_dir) == set()


# --- and for its life --------------------------------------------------------------------------------


async def test_while_an_owner_lives_its_endpoint_is_its_own(
    runtime_dir: Path, start: Start
) -> None:
    endpoint = runtime_dir / "one"
    child = start(opens, str(endpoint))
    await child.expect("ready")
    await child.ask("open")
    with pytest.raises(SettingsError, match=f"in use: process {child.pid} owns it"):
        await at(endpoint).open()
    endpoint.unlink()  # by somebody who cleans up
    with pytest.raises(SettingsError, match=f"in use: process {child.pid} owns it"):
        await at(endpoint).open()
    child.tell("close")
    await child.expect("ready")
    assert files(runtime_dir) == set()
    async with at(endpoint):
        await works(endpoint)


async def test_two_in_one_process(runtime_dir: Path) -> None:
    endpoint = runtime_dir / "one"
    (runtime_dir / "link").symlink_to(runtime_dir)
    async with at(endpoint):
        for _ in range(2):  # and the refusal takes nothing from the first
            with pytest.raises(SettingsError, match="in use: this process owns it"):
                await at(runtime_dir / "link" / "one").open()
        await works(endpoint)
    async with at(endpoint):
        await works(endpoint)


async def test_an_owner_whose_lock_file_was_removed_is_respected(
    runtime_dir: Path, start: Start
) -> None:
    endpoint = runtime_dir / "one"
    child = start(opens, str(endpoint))
    await child.expect("ready")
    await child.ask("open")
    (runtime_dir / "one.lock").unlink()
    with pytest.raises(SettingsError, match="in use: another owner listens there"):
        await at(endpoint).open()
    await works(endpoint)
    child.tell("close")
    await child.expect("ready")
    assert files(runtime_dir) == set()


async def test_a_folder_that_is_removed_and_made_again(runtime_dir: Path) -> None:
    folder = runtime_dir / "pools"
    folder.mkdir()
    first, second = at(folder / "one"), at(folder / "one")
    await first.open()
    ref = await first.put(filled(KIB))
    shutil.rmtree(folder)
    folder.mkdir()
    await second.open()  # nothing tells of the first there
    assert files(folder) == {"one", "one.lock"}
    await first.get(ref)
    await first.aclose()
    assert files(folder) == {"one", "one.lock"}
    await works(folder / "one")
    with pytest.raises(SettingsError, match="in use"):
        await at(folder / "one").open()
    await second.aclose()
    assert files(folder) == set()


async def test_a_folder_that_is_removed(runtime_dir: Path) -> None:
    folder = runtime_dir / "pools"
    folder.mkdir()
    async with at(folder / "one") as owner, featcache.connect(owner.endpoint) as client:
        shutil.rmtree(folder)
        await owner.get(await client.put(filled(KIB)))
        with pytest.raises(AttachRefused):
            await featcache.connect(owner.endpoint).open()
    assert not folder.exists()


async def test_what_was_put_in_the_sockets_place_is_kept(runtime_dir: Path) -> None:
    endpoint = runtime_dir / "one"
    async with at(endpoint):
        endpoint.unlink()
        endpoint.write_text("precious")
    assert files(runtime_dir) == {"one"}
    with pytest.raises(SettingsError, match="in use: it is no socket"):
        await at(endpoint).open()
    assert endpoint.read_text() == "precious"
    assert files(runtime_dir) == {"one"}


# --- after its death -----------------------------------------------------------------------------------


async def test_a_killed_owners_endpoint_goes_to_the_next(runtime_dir: Path, start: Start) -> None:
    endpoint = runtime_dir / "one"
    child = start(opens, str(endpoint))
    await child.expect("ready")
    await child.ask("open")
    child.kill()
    assert files(runtime_dir) == {"one", "one.lock"}
    async with at(endpoint):
        assert (runtime_dir / "one.lock").read_text() == f"{os.getpid()}\n"
        await works(endpoint)
    assert files(runtime_dir) == set()


async def test_what_killed_owners_left_in_the_default_folder_is_swept(
    runtime_dir: Path, start: Start
) -> None:
    folder = runtime_dir / "featcache"
    lives = start(opens, None)
    await lives.expect("ready")
    await lives.ask("open")
    kept = files(folder) | {"notes.lock"}
    dies = start(opens, None)
    await dies.expect("ready")
    await dies.ask("open")
    dies.kill()
    (folder / "12-ab.sock.lock").write_text("12\n")  # killed between its two files
    (folder / "notes.lock").write_text("kept")
    async with featcache.create(settings=small()) as mine:
        name = Path(mine.endpoint).name
        assert files(folder) == kept | {name, f"{name}.lock"}
    lives.tell("close")
    await lives.expect("ready")
    assert files(folder) == {"notes.lock"}
    (folder / "notes.lock").unlink()


# --- paths -----------------------------------------------------------------------------------------------


async def test_a_short_name_in_a_long_folder(runtime_dir: Path) -> None:
    folder = runtime_dir / ("x" * (104 - len(os.fsencode(runtime_dir))))
    folder.mkdir()
    endpoint = folder / "s"
    assert len(os.fsencode(endpoint)) == 107
    async with at(endpoint):
        await works(endpoint)
    assert files(folder) == set()


@pytest.mark.parametrize("given", ["one", "./one"])
async def test_a_relative_endpoint_is_absolute_in_refs(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    elsewhere = runtime_dir / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(runtime_dir)
    async with featcache.create(endpoint=given, settings=small()) as owner:
        assert owner.endpoint == str(runtime_dir / "one")
        async with featcache.connect(given) as bound:
            ref = await bound.put(filled(KIB))
        monkeypatch.chdir(elsewhere)
        async with featcache.connect() as reader:
            await reader.get(ref)
    assert files(runtime_dir) == {"elsewhere"}


def test_where_the_working_directory_is_gone_only_an_absolute_endpoint_will_do(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = runtime_dir / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(SettingsError, match="is in no directory: give it whole"):
        featcache.create(endpoint="one")
    assert endpoints.check_endpoint("/one") == "/one"


async def test_a_folder_in_which_nothing_can_be_made(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(path: Any, *_: Any, **__: Any) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with monkeypatch.context() as patch:
        patch.setattr("os.open", refuses)
        with pytest.raises(SettingsError, match="Read-only file system"):
            endpoints.listen(str(runtime_dir / "one"))


def test_a_listener_that_fails_half_way_leaves_nothing(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    for step in STEPS.values():
        with monkeypatch.context() as patch:
            before(patch, step, fails)
            with pytest.raises(FeatcacheError, match="Cannot allocate"):
                endpoints.listen(str(runtime_dir / "one"))
        assert files(runtime_dir) == set()
    endpoints.listen(str(runtime_dir / "one")).close()
    assert files(runtime_dir) == set()
