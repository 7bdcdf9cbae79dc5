"""Where an endpoint lies: odd umasks, folders that are not there, system calls that a profile refuses."""

import errno
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

import featcache
from featcache import AttachRefused, BackendUnavailable, SettingsError
from featcache.control import endpoint as endpoints
from support.caches import KIB, filled, small

pytestmark = pytest.mark.usefixtures("no_leaks")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask_777() -> Iterator[None]:
    before = os.umask(0o777)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask_777")
async def test_a_umask_that_takes_from_the_user_itself(runtime_dir: Path) -> None:
    async with featcache.create(settings=small()) as cache:
        assert mode(Path(cache.endpoint).parent) == 0o700
        assert mode(Path(cache.endpoint)) == 0o600
        async with featcache.connect(cache.endpoint) as client:
            await client.put(filled(KIB))


async def test_a_folder_that_such_a_umask_left_behind(runtime_dir: Path) -> None:
    (runtime_dir / "featcache").mkdir(mode=0o000)
    async with featcache.create(settings=small()):
        assert mode(runtime_dir / "featcache") == 0o700


async def test_no_temporary_folder_at_all(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose root is read-only: none of the usual places can be written."""
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(runtime_dir / "none")])
    with pytest.raises(SettingsError, match="set XDG_RUNTIME_DIR or endpoint") as refused:
        await featcache.create(settings=small()).open()
    assert isinstance(refused.value.__cause__, FileNotFoundError)
    async with featcache.create(settings=small(), endpoint=str(runtime_dir / "named.sock")):
        pass


async def test_a_folder_whose_path_may_not_be_looked_at(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> NoReturn:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "lstat", refuse)
    with pytest.raises(SettingsError, match="make it accessible to this user"):
        await featcache.create(settings=small(), endpoint=str(runtime_dir / "named.sock")).open()


async def test_a_socket_that_can_not_be_asked_is_not_called_in_use(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = runtime_dir / "named.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "connect_ex", lambda *_: errno.EACCES)
        with pytest.raises(SettingsError, match="Permission denied"):
            endpoints.listen(str(path))
    assert path.exists()
    path.unlink()


async def test_an_owner_whose_socket_can_not_be_removed_closes_all_the_same(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    cache = await featcache.create(settings=small()).open()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        await cache.aclose()
    endpoints.listen(None).close()  # the next owner in the folder sweeps


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS])
async def test_a_profile_that_forbids_pidfd_open(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Profiles answer either, as they are written."""

    def refuse(_: int) -> NoReturn:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pidfd_open", refuse)
        with pytest.raises(BackendUnavailable, match=r"pidfd_open.*seccomp profile"):
            await featcache.create(settings=small()).open()
    async with featcache.create(settings=small()) as owner:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pidfd_open", refuse)
            with pytest.raises(BackendUnavailable, match=r"pidfd_open.*seccomp profile"):
                await featcache.connect(owner.endpoint).open()
        assert owner.statistics().sessions == 0


async def test_an_owner_that_does_not_answer_is_not_called_gone(runtime_dir: Path) -> None:
    path = runtime_dir / "silent.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(AttachRefused, match=r"did not answer.*Settings\.attach_timeout"):
            await featcache.connect(str(path), settings=small(attach_timeout=0.05)).open()
    path.unlink()
