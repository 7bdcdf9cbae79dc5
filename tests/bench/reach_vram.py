"""Slabs on GPUs read by another owner, over NIXL: bytes, order, growth, and speed. About a minute.

    PYTHONPATH=src python tests/bench/reach_vram.py [--nixl ZIP_OR_FOLDER] [--seconds 60]

Two processes on one machine, a home and a reader, each with slabs of its own: on GPU 0, on the last GPU,
in host memory; by segments (vmm) and by one legacy allocation (ipc). Each step stands alone: one that
fails is printed, and the next begins. ``--nixl`` is a tree of NIXL's wheel, or a zip of one.
"""

import argparse
import asyncio
import contextlib
import ctypes
import multiprocessing as mp
import os
import re
import statistics
import subprocess
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

MIB = 1 << 20
SIZES = (1, 4, 16, 64)
READS = 5
INITIAL_BYTES = 64 * MIB
KEY = "a key for the benchmark alone"
LIBRARIES = ("libcuda.so.1", "libnvidia-ml.so.1", "libcudart.so.13", "libcudart.so.12")
NEEDED = (*LIBRARIES, "libssl.so.3", "libcrypto.so.3", "libz.so.1")


# --- one side, in a process of its own -------------------------------------------------------------------


def side(pipe: Connection, log: str) -> None:
    """Follow orders, with the process's output, and so UCX's, in a file."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    asyncio.run(_follow(pipe))
    os._exit(0)


async def _follow(pipe: Connection) -> None:
    loop = asyncio.get_running_loop()
    state: dict[str, Any] = {}
    while (order := await loop.run_in_executor(None, pipe.recv)) is not None:
        name, *arguments = order
        try:
            pipe.send((True, await ORDERS[name](state, *arguments)))
        except BaseException as error:  # noqa: BLE001 - told, and the next order is awaited
            traceback.print_exc()
            first = str(error).partition("\n")[0]
            pipe.send((False, f"{type(error).__name__}: {first}"))


async def _facts(_: dict[str, Any], device: str) -> dict[str, Any]:
    import torch

    from featcache.memory.cuda.driver import load

    found: dict[str, Any] = {"torch": torch.__version__, "gpus": torch.cuda.device_count()}
    torch.zeros(1, device=device)
    for name in NEEDED:
        try:
            ctypes.CDLL(name)
        except OSError as error:
            found[f"{name} is missing"] = str(error)[:80]
    driver, ordinal = load(), torch.device(device).index or 0
    api = driver.api
    names, handle = api.CUdevice_attribute, api.cuDeviceGet(ordinal)[1]
    for name in (
        "GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED",
        "GPU_DIRECT_RDMA_WRITES_ORDERING",
        "GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS",
        "HANDLE_TYPE_FABRIC_SUPPORTED",
        "DMA_BUF_SUPPORTED",
    ):
        code = getattr(names, f"CU_DEVICE_ATTRIBUTE_{name}", None)
        found[name] = None if code is None else int(api.cuDeviceGetAttribute(code, handle)[1])
    with driver.on(ordinal):
        for kind, types, rdma in (("plain", 1, 0), ("rdma", 1, 1), ("fabric", 1 | 8, 1)):
            prop = driver._properties(ordinal, rdma=bool(rdma))
            with contextlib.suppress(Exception):
                prop.requestedHandleTypes = api.CUmemAllocationHandleType(types)
            code, made = api.cuMemCreate(2 * MIB, prop, 0)
            found[f"cuMemCreate {kind}"] = str(code)
            if int(code) == 0:
                api.cuMemRelease(made)
        driver.enter(ordinal)
        if driver.needs_flush(ordinal):
            began_s = time.perf_counter()
            driver.flush_remote_writes()
            found["flush us"] = round((time.perf_counter() - began_s) * 1e6, 1)
    return found


async def _open(state: dict[str, Any], device: str, backend: str, listens: bool) -> str | None:
    import torch

    import featcache

    await _close(state)
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)  # or torch makes a context on the first one too
    settings = featcache.Settings(
        capacity=768 * MIB,
        initial=INITIAL_BYTES,
        segment=64 * MIB,
        idle=0.3,
        backend=backend if on_gpu else "auto",
    )
    listen = "127.0.0.1:0" if listens else None
    owner = featcache.create(device=device, settings=settings, listen=listen, cluster_key=KEY)
    await owner.open()
    state["owner"], state["device"] = owner, device
    return owner.address


async def _close(state: dict[str, Any]) -> None:
    owner = state.pop("owner", None)
    if owner is not None:
        await owner.aclose()


def _feature(seed: int, nbytes: int, device: str) -> Any:
    import torch

    return (torch.arange(nbytes, device=device, dtype=torch.int32) * 7 + seed).to(torch.uint8)


async def _put(state: dict[str, Any], seeds: list[int], nbytes: int, busy: bool) -> list[bytes]:
    import torch

    device, refs = state["device"], []
    for seed in seeds:
        feature = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        if busy:
            torch.cuda._sleep(400_000_000)  # type: ignore[no-untyped-call]
        feature.copy_(_feature(seed, nbytes, device))
        refs.append((await state["owner"].put(feature)).to_bytes())
    return refs


async def _get(
    state: dict[str, Any], seeds: list[int], refs: list[bytes]
) -> tuple[list[float], int]:
    """Return the seconds of each read and how many bytes were wrong."""
    import torch

    import featcache

    times, wrong = [], 0
    for seed, data in zip(seeds, refs, strict=True):
        ref = featcache.FeatureRef.from_bytes(data)
        began_s = time.perf_counter()
        found = await state["owner"].get(ref, timeout=20)
        if found.is_cuda:
            torch.cuda.synchronize(found.device)
        times.append(time.perf_counter() - began_s)
        wrong += int((found != _feature(seed, found.numel(), str(found.device))).sum())
    return times, wrong


async def _shrunk(state: dict[str, Any]) -> tuple[int, int]:
    """Wait until the slab has given memory back; return MiB before and after."""
    owner = state["owner"]
    most = owner.statistics().committed_bytes
    give_up_s = time.monotonic() + 5
    while (  # noqa: ASYNC110 - of another's memory no event tells
        owner.statistics().committed_bytes > INITIAL_BYTES and time.monotonic() < give_up_s
    ):
        await asyncio.sleep(0.05)
    return most // MIB, owner.statistics().committed_bytes // MIB


ORDERS: dict[str, Callable[..., Any]] = {
    "facts": _facts,
    "open": _open,
    "close": _close,
    "put": _put,
    "get": _get,
    "shrunk": _shrunk,
}


# --- the steps ---------------------------------------------------------------------------------------------


class Side:
    """One of the two processes, started again if it ends."""

    def __init__(self, log: str) -> None:
        self.log = log
        self._process: Any = None

    def do(self, *order: Any, limit_s: float = 20.0) -> Any:
        """Have it do something; raise RuntimeError with what went wrong."""
        if self._process is None:
            context = mp.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=side, args=(theirs, self.log), daemon=True)
            self._process.start()
            theirs.close()
        try:
            self._pipe.send(order)
            if not self._pipe.poll(limit_s):
                raise RuntimeError(f"{order[0]}: no answer in {limit_s:.0f} s")
            done, result = self._pipe.recv()
        except (EOFError, OSError, RuntimeError) as error:
            self.end()
            raise RuntimeError(f"{order[0]}: the process ended or hung: {error}") from error
        if not done:
            raise RuntimeError(f"{order[0]}: {result}")
        return result

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join(5)
            self._process = None


def memory_used() -> str:
    """MiB used on each GPU, and by which processes, as nvidia-smi says."""
    told = []
    for query in ("--query-gpu=index,memory.used", "--query-compute-apps=pid,gpu_uuid,used_memory"):
        with contextlib.suppress(Exception):
            found = subprocess.run(
                ["nvidia-smi", query, "--format=csv,noheader,nounits"],  # noqa: S607
                capture_output=True,
                text=True,
                timeout=10,
                check=False,
            )
            told.append("; ".join(found.stdout.split("\n")).strip("; "))
    return " | ".join(told) or "nvidia-smi is not there"


def reads(home: Side, reader: Side, there: str, here: str, backend: str) -> list[str]:
    """One way from slab to slab: a row for each size."""
    rows, name = [], f"{there} -> {here} {backend}"
    home.do("open", there, backend, True, limit_s=40)
    reader.do("open", here, backend, False, limit_s=40)
    for mib in SIZES:
        seeds = list(range(mib, mib + READS))
        refs = home.do("put", seeds, mib * MIB, False)
        times, wrong = reader.do("get", seeds, refs)
        typical_s = statistics.median(times[1:])
        speed = mib / 1024 / typical_s
        rows.append(
            f"{name:28} {mib:3} MiB {typical_s * 1e3:9.2f} ms {speed:8.2f} GiB/s  wrong bytes {wrong}"
        )
        if typical_s > 1:
            break
    if there.startswith("cuda"):
        refs = home.do("put", [9], 8 * MIB, True)
        rows.append(f"{name:28} behind a busy stream: wrong bytes {reader.do('get', [9], refs)[1]}")
    if backend == "vmm" and there.startswith("cuda"):
        seeds = list(range(4))
        refs = home.do("put", seeds, 90 * MIB, False)
        wrong = reader.do("get", seeds, refs)[1]
        before, after = home.do("shrunk")
        refs = home.do("put", seeds, 90 * MIB, False)
        wrong += reader.do("get", seeds, refs)[1]
        rows.append(f"{name:28} grew to {before}, shrank to {after} MiB: wrong bytes {wrong}")
    return rows


def protocols(log: str) -> list[str]:
    """What UCX said of the ways it took, each once."""
    with contextlib.suppress(OSError):
        lines = Path(log).read_text(errors="replace").splitlines()
        errors = [line[:200] for line in lines if re.search("ERROR|WARN|^E[0-9]", line)]
        ways, wanted = [], False
        for line in lines:
            told = re.sub(r"^\[[^]]*\] *\[[^]]*\] *", "", line)
            if " by ucp_" in told:
                wanted = "remote memory" in told
            if wanted and told.startswith("|") and "Description" not in told:
                ways.append(told)
        return [*list(dict.fromkeys(ways))[:40], *list(dict.fromkeys(errors))[:12]]
    return []


def main() -> None:
    """Run all steps; the table comes last."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--nixl", default="")
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    give_up_s = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as folder:
        if options.nixl:
            tree = options.nixl
            if zipfile.is_zipfile(tree):
                tree = f"{folder}/nixl"
                zipfile.ZipFile(options.nixl).extractall(tree)
            _add_fallbacks(Path(tree, "fallback"))
            os.environ["PYTHONPATH"] = f"{tree}:{os.environ.get('PYTHONPATH', '')}"
        os.environ.setdefault("UCX_PROTO_INFO", "y")
        home, reader = Side(f"{folder}/home.log"), Side(f"{folder}/reader.log")
        rows, last = _steps(home, reader, give_up_s)
        home.end()
        reader.end()
        print("\nUCX, at the reader:", *protocols(reader.log), sep="\n  ")
        print("UCX, at the home:", *protocols(home.log), sep="\n  ")
        print("\nmemory:", *last, sep="\n  ")
        print("", *rows, sep="\n")


def _add_fallbacks(folder: Path) -> None:
    """Have the two processes find libraries that the tree brings and this machine has not."""
    for library in folder.glob("*.so*"):
        try:
            ctypes.CDLL(library.name)
        except OSError:
            before = os.environ.get("LD_LIBRARY_PATH", "")
            os.environ["LD_LIBRARY_PATH"] = f"{folder}:{before}"
            return


def _steps(home: Side, reader: Side, give_up_s: float) -> tuple[list[str], list[str]]:
    rows: list[str] = []
    memory = [f"before: {memory_used()}"]
    gpus = 1
    try:
        found = home.do("facts", "cuda:0", limit_s=40)
        gpus = found["gpus"]
        print("facts:", *(f"{name}: {value}" for name, value in found.items()), sep="\n  ")
    except RuntimeError as error:
        rows.append(f"facts: {error}")
    other = f"cuda:{gpus - 1}"
    steps = [
        ("cuda:0", other, "vmm"),
        ("cuda:0", other, "ipc"),
        ("cuda:0", "cpu", "vmm"),
        ("cpu", other, "vmm"),
        ("cuda:0", "cuda:0", "vmm"),
    ]
    for step in steps:
        if time.monotonic() > give_up_s:
            rows.append(f"{step}: no time left")
            continue
        try:
            rows += reads(home, reader, *step)
        except Exception as error:  # noqa: BLE001 - the next step stands alone
            rows.append(f"{step}: {error}")
            print(step, *_tail(home.log), *_tail(reader.log), sep="\n    ")
        memory.append(f"{step}: {memory_used()}")
    return rows, memory


def _tail(log: str) -> list[str]:
    with contextlib.suppress(OSError):
        return [line[:300] for line in Path(log).read_text(errors="replace").splitlines()[-12:]]
    return []


if __name__ == "__main__":
    main()
