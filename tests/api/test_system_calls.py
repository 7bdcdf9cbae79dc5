"""Each system call in turn fails once; an error of the tree says so, and nothing is left behind."""

import ast
import asyncio
import errno
import gc
import os
import socket
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

import featcache
from featcache import FeatcacheError, OwnerLost, OwnerUnreachable, PutTimeout, events
from featcache.control import server
from featcache.control.channel import Channel
from featcache.control.messages import SocketFailed
from featcache.errors import AttachRefused, explain, system_errors
from support.caches import KIB, filled, small, until
from support.leaks import (
    difference,
    endpoint_files,
    mapped_memfds,
    open_descriptors,
    threads_ended,
)
from support.systemcalls import ELSEWHERE, TABLE, Calls

SOURCE = Path(featcache.__file__).parent
Scene = Callable[[Path], Awaitable[None]]

QUIET: Final = {
    "Path.iterdir": "the folder is swept another time",
    "Path.read_text": "what the host has left is not known, then",
    "Path.lstat": "as of unlink, if it can't be told whose file it is",
    "Path.unlink": "a socket without a listener is replaced by the next owner",
    "libc.madvise": "huge pages are not needed, and a page that is not there comes when it is touched",
    "libc.fallocate": "the memory is kept",
    "os.eventfd_read": "another turn reads it",
    "os.eventfd_write": "the recycler looks by itself",
    "socket.accept": "the owner tries again, and the client waits",
}
"""Calls whose failure is no error of a call, and why."""
SWEEP: Final = {"Path.lstat", "socket.socket", "socket.connect_ex"}
"""Calls at sockets of others, which stay if these fail."""
OFTEN: Final = {"socket.send": 3, "socket.recvmsg": 5, "Path.read_text": 2}
"""How often one that is made again and again is made to fail."""


async def owner_and_client(runtime_dir: Path) -> None:
    """The whole life of both, in one process."""
    chosen = small(attach_timeout=2.0, prefault=False)
    async with featcache.create(settings=chosen) as owner:
        await owner.get(await owner.put(filled(KIB)))
        try:
            async with featcache.connect(owner.endpoint, name="reader", settings=chosen) as client:
                await client.get(await client.put(filled(8 * KIB, 3)))
                # Larger than a segment: the slab grows.
                await client.get(await owner.put(filled(100 * KIB), timeout=0.1))
        except FeatcacheError as error:
            if any(isinstance(each, SocketFailed) for each in chain(error)) or is_far(error):
                raise  # without its socket a client can't say goodbye
            await until(lambda: not owner.statistics().sessions)
            raise


async def prefaulting_owner(runtime_dir: Path) -> None:
    async with featcache.create(settings=small(prefault=True)):
        pass


async def owner_at_a_stale_socket(runtime_dir: Path) -> None:
    path = runtime_dir / "named.sock"
    path.unlink(missing_ok=True)
    leave_socket(path)
    try:
        async with featcache.create(settings=small(), endpoint=str(path)):
            pass
    finally:
        path.unlink(missing_ok=True)


async def owner_in_a_temporary_folder(runtime_dir: Path) -> None:
    """There an owner was killed before, and the umask takes from the user itself."""
    folder = runtime_dir / f"featcache-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    leave_socket(folder / "killed.sock")
    folder.chmod(0o000)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XDG_RUNTIME_DIR")
        patch.setattr(tempfile, "tempdir", str(runtime_dir))
        try:
            async with featcache.create(settings=small()):
                pass
        finally:
            folder.chmod(0o700)
            for path in folder.iterdir():
                path.unlink()


async def full_socket(runtime_dir: Path) -> None:
    """A frame with a descriptor that the peer has no room for, as it comes at a growth on a GPU."""
    here, there = socket.socketpair()
    lost = list[Exception | None]()
    try:
        with system_errors(AttachRefused, "as the server and the link do"):
            channel = Channel(here, 64 * KIB, lambda *_: None, lost.append)
    except FeatcacheError:
        here.close()
        there.close()
        raise
    try:
        while not channel._outgoing and not lost:
            channel.send(bytes(32 * KIB))
        channel.send(b"with a descriptor", [there.fileno()])
        await asyncio.sleep(0)
    finally:
        channel.close()
        there.close()
    if lost and lost[0] is not None:
        raise lost[0]


def leave_socket(path: Path) -> None:
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


SCENES: Final[list[Scene]] = [
    owner_and_client,
    prefaulting_owner,
    owner_at_a_stale_socket,
    owner_in_a_temporary_folder,
    full_socket,
]


class Story(NamedTuple):
    """What came of one run of a scene."""

    error: BaseException | None
    told: list[str]
    """Events, and what the loop's exception handler was told."""


def play(scene: Scene, calls: Calls, runtime_dir: Path) -> Story:
    told: list[str] = []

    def tell(event: events.Event) -> None:
        told.append(str(event))

    async def run() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: told.append(f"a bug: {context}"))
        with calls.on():
            await scene(runtime_dir)

    events.add_hook(tell)
    try:
        asyncio.run(run())
    except Exception as error:  # noqa: BLE001 - looked at by `check`
        return Story(error, told)
    finally:
        events.remove_hook(tell)
    return Story(None, told)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def is_far(error: BaseException) -> bool:
    """Whether it came about at the other end of a socket: this end knows only what it was told."""
    lost = isinstance(error, OwnerLost) and not isinstance(error.__cause__, SocketFailed)
    return lost or "refused: " in str(error)


def check(scene: Scene, call: str, code: int, story: Story) -> None:
    """Check what is said of a failure: in the error, or, for one that the put waited out, by an event."""
    refused, error = OSError(code, os.strerror(code)), story.error
    assert not [line for line in story.told if "a bug" in line]
    if error is None:
        at_the_end = call in OFTEN  # the goodbye is not waited for, or a turn comes too late
        swept = scene is owner_in_a_temporary_folder and call in SWEEP
        assert call in QUIET or code in {errno.EINTR, errno.EAGAIN} or at_the_end or swept
        return
    assert isinstance(error, FeatcacheError), repr(error)
    if isinstance(error, PutTimeout):  # a slab that can't grow is a full one
        assert any("CommitFailed" in line and explain(refused) in line for line in story.told)
        assert explain(refused) in str(error)
    elif isinstance(error, OwnerUnreachable):
        assert "its log says" in str(error) or call.startswith("socket.")
        assert any(explain(refused) in line for line in story.told) or call.startswith("socket.")
    elif not is_far(error):
        assert explain(refused) in str(error) or "/proc" in str(error)
        assert any(isinstance(each, OSError) and each.errno == code for each in chain(error))
    elif not isinstance(error, OwnerLost):
        assert explain(refused) in str(error)


def state(runtime_dir: Path) -> list[Counter[str]]:
    gc.collect()
    threads_ended()
    gc.collect()
    return [open_descriptors(), mapped_memfds(), endpoint_files(runtime_dir)]


def failures(scene: Scene, runtime_dir: Path) -> Iterator[tuple[int, str, int]]:
    """Yield each call that a scene makes, by name and number, with each error of its."""
    calls, made = Calls(), Counter[str]()
    assert play(scene, calls, runtime_dir).error is None
    for call in calls.made:
        made[call] += 1
        if made[call] <= OFTEN.get(call, 1 << 10):
            for code in sorted(TABLE[call]):
                yield made[call], call, code


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_each_call_fails_once(
    scene: Scene, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_ACCEPT_AGAIN_S", 0.01)
    found = list(failures(scene, runtime_dir))
    gc.freeze()
    before = state(runtime_dir)
    for number, call, code in found:
        calls = Calls((call, number), code)
        story = play(scene, calls, runtime_dir)
        at = f"{call}, call {number}, {errno.errorcode[code]}: {story.error!r}"
        assert calls.error is not None, f"{at} did not come to it"
        try:
            check(scene, call, code, story)
        except AssertionError as wrong:
            raise AssertionError(at) from wrong
        del story, calls
        if call in {"Path.unlink", "Path.lstat"}:
            for path in (runtime_dir / "featcache").glob("*"):
                path.unlink()
        after = state(runtime_dir)
        left = [difference(one, other) for one, other in zip(before, after, strict=True)]
        assert not any(left), f"{at} leaves {left}"
    gc.unfreeze()


def test_every_call_is_met(runtime_dir: Path) -> None:
    met: set[str] = set()
    for scene in SCENES:
        calls = Calls()
        assert play(scene, calls, runtime_dir).error is None
        met |= set(calls.made)
    assert set(TABLE) - met == ONLY_ELSEWHERE


ONLY_ELSEWHERE: Final = {"libc.fallocate"}
"""Calls of a slab that shrinks: tests/memory/test_host.py."""

_MODULES: Final = frozenset(
    ("os", "mmap", "fcntl", "select", "tempfile", "threading", "socket", "ctypes")
)
_UNUSED: Final = frozenset(("subprocess", "shutil", "signal", "resource", "io", "multiprocessing"))
_OF_PATHS: Final = frozenset(
    name for name in vars(Path) | vars(Path.__mro__[1]) if not name.startswith("_")
) - {"joinpath", "with_name", "is_relative_to", "relative_to", "parents", "parent", "name"}
_PATHS: Final = ("path", "Path", "folder", "temporary", "proc", "group")
_OF_LOOPS: Final = frozenset(("add_reader", "add_writer"))
_HARMLESS: Final = frozenset(("close", "fileno", "setblocking"))
_ONLY: Final = {"ctypes": "CDLL", "threading": "Thread"}
"""The one call of a module that is one of the system."""


def system_calls(source: str) -> Iterator[str]:
    """Yield the calls in a source by the names of the table."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        else:
            modules = []
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                yield from system_call(ast.unparse(node.func.value), node.func.attr)
        new = {name.partition(".")[0] for name in modules} & _UNUSED
        assert not new, f"{new}: add its calls to the table"


def system_call(of: str, name: str) -> Iterator[str]:
    """Yield ``of.name()`` by its name in the table, if it looks like a system call."""
    module, last = of.partition(".")[0], of.rpartition(".")[2].lstrip("_")
    if module in _MODULES and "(" not in of:
        if _ONLY.get(module, name) == name:
            yield f"{of}.{name}"
    elif name in _OF_LOOPS:
        yield f"loop.{name}"
    elif last == "libc":
        yield f"libc.{name}"
    elif last in {"sock", "probe"} and name not in _HARMLESS:
        yield f"socket.{name}"
    elif name in _OF_PATHS and any(word in of for word in _PATHS):
        yield f"Path.{name}"


def test_no_call_is_forgotten() -> None:
    # Not the commands', which end with one line whatever the system says (tests/cli).
    paths = [path for path in SOURCE.rglob("*.py") if SOURCE / "cli" not in path.parents]
    found = {call for path in paths for call in system_calls(path.read_text())}
    assert found - set(TABLE) - set(ELSEWHERE) == set()
    assert set(TABLE) | set(ELSEWHERE) == found
