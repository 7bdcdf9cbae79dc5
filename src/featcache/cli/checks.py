"""The checks of ``featcache doctor``, one function a subject."""

import contextlib
import fcntl
import importlib.metadata
import os
import platform
import re
import resource
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Literal

import attrs
import torch

from featcache import BackendUnavailable, Settings, SettingsError
from featcache.api.machine import DeviceFacts, cuda_devices, host_bytes, runtime_folder
from featcache.cli.exits import one_line
from featcache.cli.showing import size
from featcache.version import VERSION

State = Literal["ok", "note", "warn", "bad"]

_KERNEL: Final = (5, 14)
_PYTHON: Final = (3, 11)
_TORCH: Final = (2, 6)
_FEW_DESCRIPTORS: Final = 1024
_LITTLE_LOCKED_BYTES: Final = 64 << 20
_F_ADD_SEALS: Final = fcntl.F_ADD_SEALS
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | 0x10  # F_SEAL_FUTURE_WRITE
_NIXL: Final = ("nixl-cu12", "nixl-cu13", "nixl")
_UCX: Final = ("UCX_TLS", "UCX_NET_DEVICES", "UCX_TCP_PORT_RANGE")
_RDMA: Final = Path("/sys/class/infiniband")
_HUGE: Final = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


@attrs.frozen
class Check:
    """One finding."""

    name: str
    state: State
    found: str
    remedy: str = ""
    """What to do; empty where nothing is."""


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _versions() -> Iterator[Check]:
    yield Check("featcache", "ok", f"{VERSION}, pure Python: no compiled part")
    python = platform.python_version()
    state: State = "ok" if sys.version_info >= _PYTHON else "bad"
    yield Check("python", state, python, "" if state == "ok" else "use Python 3.11 or newer")
    state = "ok" if _numbers(torch.__version__) >= _TORCH else "bad"
    advice = "" if state == "ok" else "pip install 'torch>=2.6'"
    yield Check("torch", state, str(torch.__version__), advice)
    if torch.cuda.device_count():
        try:
            yield Check("cuda-bindings", "ok", importlib.metadata.version("cuda-bindings"))
        except importlib.metadata.PackageNotFoundError:
            yield Check("cuda-bindings", "bad", "not installed", "pip install 'featcache[cuda]'")


def _kernel() -> Iterator[Check]:
    release = platform.release()
    if sys.platform != "linux":
        yield Check("kernel", "bad", sys.platform, "featcache needs Linux")
    elif _numbers(release) < _KERNEL:
        advice = "from 5.14 on, new memory is touched by one call (MADV_POPULATE_WRITE)"
        yield Check("kernel", "warn", release, advice)
    else:
        yield Check("kernel", "ok", f"{release} on {platform.machine()}")


def _pidfd() -> Iterator[Check]:
    advice = "allow pidfd_open (Linux 5.3): in a container, its seccomp profile"
    try:
        fd = os.pidfd_open(os.getpid())
    except OSError as error:
        yield Check("pidfd", "bad", one_line(error), advice)
        return
    try:
        target = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115 - a link of a descriptor
        yield Check("pidfd", "ok", target)
    except OSError as error:
        yield Check("pidfd", "bad", f"/proc/self/fd: {one_line(error)}", "mount /proc")
    finally:
        os.close(fd)


def _proc() -> Iterator[Check]:
    wanted = [Path("/proc/self/fdinfo"), Path("/proc/self/cgroup"), Path("/proc/meminfo")]
    missing = [str(path) for path in wanted if not os.access(path, os.R_OK)]
    if missing:
        yield Check("/proc", "bad", f"can't read {', '.join(missing)}", "mount /proc")
    else:
        yield Check("/proc", "ok", "mounted")


def _memfd() -> Iterator[Check]:
    try:
        fd = os.memfd_create("featcache-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        advice = "allow memfd_create: in a container, its seccomp profile"
        yield Check("memfd", "bad", one_line(error), advice)
        return
    try:
        os.ftruncate(fd, 4096)
        fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
        yield Check("memfd", "ok", "made and sealed")
    except OSError as error:
        advice = "the kernel must know F_SEAL_FUTURE_WRITE (Linux 5.1)"
        yield Check("memfd", "bad", f"can't be sealed: {one_line(error)}", advice)
    finally:
        os.close(fd)


def _descriptor_passing() -> Iterator[Check]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        try:
            socket.send_fds(ours, [b"."], [ours.fileno()])
            _, fds, _, _ = socket.recv_fds(theirs, 1, 1)
            for fd in fds:
                os.close(fd)
            yield Check("descriptor passing", "ok", "SCM_RIGHTS over a Unix socket")
        except OSError as error:
            advice = "a security policy forbids it: sessions get their memory so"
            yield Check("descriptor passing", "bad", one_line(error), advice)


def _folder() -> Iterator[Check]:
    try:
        yield Check("socket folder", "ok", str(runtime_folder()))
    except SettingsError as error:
        yield Check("socket folder", "bad", one_line(error), "set XDG_RUNTIME_DIR, or --endpoint")


def _descriptors() -> Iterator[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{_limit(soft)} (up to {_limit(hard)})"
    if 0 <= soft < _FEW_DESCRIPTORS:
        advice = (
            f"ulimit -n {_FEW_DESCRIPTORS}, or LimitNOFILE= of the service: a session takes about 4"
        )
        yield Check("descriptors", "warn", found, advice)
    else:
        yield Check("descriptors", "ok", found)


def _memlock() -> Iterator[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    found = f"{_limit(soft, size)} (up to {_limit(hard, size)})"
    if 0 <= soft < _LITTLE_LOCKED_BYTES and torch.cuda.device_count():
        advice = "ulimit -l unlimited, or LimitMEMLOCK=infinity: pinned spill slabs may be refused"
        yield Check("memlock", "warn", found, advice)
    else:
        yield Check("memlock", "ok", found)


def _limit(value: int, form: Callable[[int], str] = str) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else form(value)


def _memory() -> Iterator[Check]:
    left = host_bytes()
    capacity = Settings().capacity
    if left is None:
        yield Check("memory", "warn", "unknown", "mount /proc and /sys/fs/cgroup")
    elif left < capacity:
        advice = f"less than the capacity of {size(capacity)}: set --capacity, or raise the limit"
        yield Check("memory", "warn", f"{size(left)} can be had, cgroup limits considered", advice)
    else:
        yield Check("memory", "ok", f"{size(left)} can be had, cgroup limits considered")


def _huge_pages() -> Iterator[Check]:
    with contextlib.suppress(OSError):
        chosen = re.search(r"\[(\w+)\]", _HUGE.read_text())
        value = chosen[1] if chosen else "unknown"
        if value in {"never", "deny"}:
            advice = f"echo advise > {_HUGE}: copies to and from a host slab are then faster"
            yield Check("huge pages", "note", value, advice)
        else:
            yield Check("huge pages", "ok", value)


def _gpus() -> Iterator[Check]:
    if not torch.cuda.device_count():
        why = "torch sees none" if torch.version.cuda else "this torch is built without CUDA"
        yield Check("GPUs", "note", f"{why}: slabs in host memory only")
        return
    try:
        devices = cuda_devices()
    except BackendUnavailable as error:
        yield Check("GPUs", "bad", one_line(error), "pip install 'featcache[cuda]'")
        return
    for one in devices:
        yield from _gpu(one, len(devices))


def _gpu(one: DeviceFacts, count: int) -> Iterator[Check]:
    yield Check(one.device, "ok", f"{one.name}, {size(one.total_bytes)}, {one.uuid}")
    if one.shares_segments:
        yield Check(f"{one.device} sharing", "ok", "segments by descriptor (VMM); legacy IPC too")
    else:
        advice = "Settings.backend='auto' takes legacy IPC: one segment of fixed size"
        yield Check(f"{one.device} sharing", "note", "legacy IPC only", advice)
    rdma = "a network card can reach VMM memory" if one.rdma else "none for VMM memory"
    yield Check(f"{one.device} RDMA", "ok" if one.rdma else "note", rdma)
    if len(one.reaches) < count - 1:
        advice = (
            "reads between the others are staged through host memory: see nvidia-smi topo -p2p r"
        )
        reached = ", ".join(one.reaches) or "none"
        yield Check(f"{one.device} peers", "warn", f"reaches {reached} of {count - 1}", advice)
    elif count > 1:
        yield Check(f"{one.device} peers", "ok", f"reaches {', '.join(one.reaches)}")


def _reach() -> Iterator[Check]:
    """Whether pools can be read by other hosts, and over what."""
    found: list[tuple[str, str]] = []
    for name in _NIXL:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append((name, importlib.metadata.version(name)))
    if not found:
        advice = "only for pools that other hosts read: pip install 'featcache[reach]'"
        yield Check("other hosts", "note", "the extra reach is not installed", advice)
        return
    name, version = found[0]
    told = [f"{key}={value}" for key in _UCX if (value := os.environ.get(key))]
    yield Check("other hosts", "ok", f"{name} {version}; {', '.join(told) or 'UCX chooses'}")
    yield _network()


def _network() -> Check:
    """Say what UCX can read other hosts' memory over."""
    devices = [path.name for path in sorted(_RDMA.iterdir())] if _RDMA.is_dir() else []
    if devices:
        return Check("RDMA", "ok", f"{', '.join(devices)}: UCX takes it where UCX_TLS allows")
    return Check(
        *("RDMA", "note", "no device: UCX reads over TCP, and over shared memory on one host"),
        "UCX_NET_DEVICES=eth1 chooses the network, UCX_TCP_PORT_RANGE bounds its ports",
    )


CHECKS: Final[tuple[Callable[[], Iterator[Check]], ...]] = (
    _versions,
    _kernel,
    _pidfd,
    _proc,
    _memfd,
    _descriptor_passing,
    _folder,
    _descriptors,
    _memlock,
    _memory,
    _huge_pages,
    _gpus,
    _reach,
)
