"""The container set: its files agree with each other, and its rule of sharing holds in namespaces.

There may be no engine where tests run. Namespaces are what one makes containers of, so owner and client
run in their own: user, mount, PID, IPC, network and UTS.
"""

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest

import featcache
from examples.waiting import SERVE, until
from featcache import blocking
from support.processes import Server

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "containers"
SERVICES = ("owner", "web")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="pyyaml is not installed")
    found: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    return found


def test_all_containers_run_as_the_user_who_owns_the_sockets_directory(
    compose: dict[str, Any],
) -> None:
    users = {compose["services"][name]["user"] for name in SERVICES}
    assert len(users) == 1
    uid, gid = users.pop().split(":")
    options = compose["volumes"]["pool"]["driver_opts"]["o"].split(",")
    assert {f"uid={uid}", f"gid={gid}", "mode=0700"} <= set(options)
    assert f"USER {uid}:{gid}" in (FOLDER / "Dockerfile").read_text()


def test_all_containers_find_the_endpoint_in_the_shared_directory(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == set(SERVICES)
    for service in compose["services"].values():
        (volume,) = service["volumes"]
        name, _, folder = volume.partition(":")
        assert name in compose["volumes"]
        assert Path(service["environment"]["FEATCACHE_ENDPOINT"]).parent == Path(folder)
        assert service["ulimits"]["memlock"] == -1


def test_containers_share_no_namespace_and_have_no_right_beyond(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert not {"ipc", "pid", "network_mode", "userns_mode", "privileged"} & set(service)
        assert service["cap_drop"] == ["ALL"]


def test_the_owner_ends_before_it_would_be_killed(compose: dict[str, Any]) -> None:
    owner = compose["services"]["owner"]
    command = owner["command"]
    grace_s = float(command[command.index("--grace") + 1])
    assert float(owner["stop_grace_period"].removesuffix("s")) > grace_s


def test_the_file_for_gpus_changes_what_is_there(compose: dict[str, Any]) -> None:
    yaml = pytest.importorskip("yaml", reason="pyyaml is not installed")
    gpus = yaml.safe_load((FOLDER / "compose.gpu.yaml").read_text())["services"]
    assert set(gpus) == set(compose["services"])
    for service in gpus.values():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
        arguments = service["build"]["args"]
        assert all(f"ARG {name}=" in (FOLDER / "Dockerfile").read_text() for name in arguments)


def test_the_image_has_what_is_copied_into_it() -> None:
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    kept = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    assert len(copied) >= 5
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}" in kept


# --- namespaces ------------------------------------------------------------------------------------

CONTAINER = ("unshare", "--mount", "--pid", "--fork", "--ipc", "--net", "--uts", "--mount-proc")
AS_ROOT_INSIDE = (*CONTAINER, "--user", "--map-root-user")
AS_ITSELF_INSIDE = (*CONTAINER, "--user", "--map-current-user")

READ = """
import os, sys, torch
from featcache import blocking
try:
    with blocking.connect(sys.argv[1], name="far") as cache:
        kept = cache.get_or_put("kept", lambda: torch.arange(1000.0))
        ref = cache.put(kept, readers=["far"])
        with cache.borrow(ref) as view:
            print("uid", os.geteuid(), "sum", int(view.sum()), flush=True)
            sys.stdin.read()
except Exception as error:
    print(type(error).__name__, error, flush=True)
"""


def can_unshare() -> bool:
    if shutil.which("unshare") is None:
        return False
    return (
        subprocess.run([*AS_ROOT_INSIDE, "true"], capture_output=True, check=False).returncode == 0
    )


namespaces = pytest.mark.skipif(not can_unshare(), reason="namespaces can't be made here")


@contextmanager
def running(*command: object) -> Iterator[subprocess.Popen[str]]:
    given = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([*map(str, command)], env=env, text=True, **given) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()


@namespaces
def test_an_owner_and_clients_in_containers_share_by_the_directory_alone(runtime_dir: Path) -> None:
    endpoint = runtime_dir / "pool.sock"
    with ExitStack() as stack:
        owner = stack.enter_context(
            running(*AS_ITSELF_INSIDE, sys.executable, SERVE, "serve", "--endpoint", endpoint)
        )
        assert owner.stdout is not None
        assert owner.stdout.readline() == f"featcache serves {endpoint}\n"
        client = stack.enter_context(running(*AS_ROOT_INSIDE, sys.executable, "-c", READ, endpoint))
        assert client.stdout is not None
        # Of another uid by its own count, and of the same user.
        assert client.stdout.readline() == "uid 0 sum 499500\n"
        with blocking.observe(str(endpoint)) as observer:
            (session,) = observer.snapshot().sessions
            assert (session.name, session.pid, session.reading) == ("far", 0, 1)
            for process in psutil.Process(client.pid).children():
                process.send_signal(signal.SIGKILL)
            # Its death is seen across PID namespaces, and what it read is paid.
            until(lambda: not observer.snapshot().sessions)
            seen = observer.snapshot().statistics
        assert seen.readers_lost == 1
        assert seen.used_bytes == seen.resident_bytes > 0
        (inside,) = psutil.Process(owner.pid).children()
        inside.terminate()
        assert owner.wait(30) == 0
    assert not endpoint.exists()


def _attach_as(uid: int, endpoint: str, said: Connection) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    try:
        blocking.connect(endpoint).open()
    except featcache.AttachRefused as error:
        said.send(str(error))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start another user's process")
def test_another_user_is_refused_even_where_the_directory_is_open(runtime_dir: Path) -> None:
    endpoint = runtime_dir / "pool.sock"
    with blocking.create(endpoint=str(endpoint), capacity="1MiB") as cache:
        runtime_dir.chmod(0o711)
        endpoint.chmod(0o777)
        ours, theirs = multiprocessing.Pipe(duplex=False)
        other = Server().Process(target=_attach_as, args=(10002, str(endpoint), theirs))
        other.start()
        theirs.close()
        assert ours.recv() == "the peer runs as uid 0, this process as uid 10002"
        other.join()
        assert cache.statistics().sessions == 0
