"""Shared by the proof scripts: the GPUs' memory by NVML, claims, and the result.

A proof is a coroutine that makes claims. Each is printed as a line of the table with what was found,
what was wanted, and whether it holds; one that does not hold makes the script end with 1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import faulthandler
import importlib
import importlib.metadata
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import torch

import featcache
from bench import machine, resultfile
from bench.crew import quiet

MIB = 1 << 20
SLACK_BYTES = 2 * MIB
"""Noise of NVML's figures: the driver gives out memory in pages of 2 MiB."""


# --- the GPUs -------------------------------------------------------------------------------------


def is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def gpu_index(device: str) -> int:
    return torch.device(device).index or 0


def gpu_uuid(index: int) -> str:
    """The name that CUDA_VISIBLE_DEVICES and NVML know a device of torch's by."""
    return f"GPU-{torch.cuda.get_device_properties(index).uuid}"


class Nvml:
    """Used memory of the GPUs that torch sees, in torch's order; none on a machine without any."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        if torch.cuda.is_available():
            self._nvml = importlib.import_module("pynvml")
            self._nvml.nvmlInit()
            by_uuid = self._nvml.nvmlDeviceGetHandleByUUID
            self._handles = [by_uuid(gpu_uuid(n)) for n in range(torch.cuda.device_count())]

    def __len__(self) -> int:
        return len(self._handles)

    def used_bytes(self) -> list[int]:
        return [int(self._nvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in self._handles]

    def process_bytes(self, index: int) -> dict[int, int]:
        """Bytes of a GPU by process, as the driver says; empty where it tells of none."""
        users = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handles[index])
        return {int(user.pid): int(user.usedGpuMemory or 0) for user in users}

    async def settled(self, timeout_s: float = 10.0) -> list[int]:
        """Used bytes once they have not moved for half a second (or after `timeout_s`)."""
        give_up_s = time.monotonic() + timeout_s
        last, alike = self.used_bytes(), 0
        while alike < 5 and self._handles and time.monotonic() < give_up_s:
            await asyncio.sleep(0.1)
            now = self.used_bytes()
            alike = alike + 1 if now == last else 0
            last = now
        return last

    def describe(self) -> dict[str, Any] | None:
        if not self._handles:
            return None
        return {
            "gpus": [torch.cuda.get_device_name(n) for n in range(len(self))],
            "driver": self._nvml.nvmlSystemGetDriverVersion(),
        }


def mib(count_bytes: float) -> float:
    return round(count_bytes / MIB, 1)


# --- options, claims, the result ------------------------------------------------------------------


def options(doc: str | None, *, limit_s: float = 540.0) -> argparse.ArgumentParser:
    """A parser with the options that all proofs have."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--device", default="cuda:0", help="the owner's; cpu is a host slab")
    parser.add_argument("--backends", default="", help="vmm,ipc; both by default on a GPU")
    parser.add_argument("--limit", type=float, default=limit_s, help="seconds for the whole run")
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    return parser


def backends(chosen: argparse.Namespace, default: str = "vmm,ipc") -> list[str]:
    if not is_cuda(chosen.device):
        return ["host"]
    return [name for name in (chosen.backends or default).split(",") if name]


def settings(backend: str, **fields: Any) -> featcache.Settings:
    """Settings of one backend; the host slab needs no word about it."""
    return featcache.Settings(**fields | ({} if backend == "host" else {"backend": backend}))


class Proof:
    """The claims of one script, its result file and its table."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.options = chosen
        self.nvml = Nvml()
        self.claims: list[dict[str, Any]] = []
        self.details: dict[str, Any] = {}

    def claim(self, name: str, found: Any, wanted: str, holds: object) -> None:
        self.claims.append({"claim": name, "found": found, "wanted": wanted, "holds": bool(holds)})
        print(f"{name}: {found} (wanted: {wanted})", file=sys.stderr, flush=True)

    def not_run(self, name: str, reason: str) -> None:
        self.claims.append({"claim": name, "found": "not run", "wanted": reason, "holds": None})

    def note(self, name: str, found: Any) -> None:
        """A figure that nothing is claimed of."""
        self.claims.append({"claim": name, "found": found, "wanted": "-", "holds": None})

    @property
    def holds(self) -> bool:
        return all(claim["holds"] is not False for claim in self.claims)

    def result(self) -> dict[str, Any]:
        versions = machine.versions(None)
        for package in ("cuda-bindings", "nvidia-ml-py"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[package] = importlib.metadata.version(package)
        script, *arguments = sys.argv
        given = [Path(word).name if word.startswith("/") else word for word in arguments]
        return {
            "date": machine.now(),
            "command": " ".join(["python", f"tests/bench/{Path(script).name}", *given]),
            "machine": machine.machine() | (self.nvml.describe() or {"gpus": []}),
            "versions": versions | {"torch_cuda": torch.version.cuda},
            "holds": self.holds,
            "claims": self.claims,
            "details": self.details,
        }

    def table(self) -> str:
        word = {True: "yes", False: "NO", None: "-"}
        rows = [("claim", "found", "wanted", "holds"), ("---",) * 4]
        rows += [(c["claim"], str(c["found"]), c["wanted"], word[c["holds"]]) for c in self.claims]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def run(body: Callable[[Proof], Awaitable[None]], chosen: argparse.Namespace) -> int:
    """Run a proof within its limit, write its result, print its table; return the exit status."""
    quiet()
    if is_cuda(chosen.device) and not torch.cuda.is_available():
        print("no CUDA device here: --device cpu runs the same on a host slab")
        return 1
    # Should this very thread hang in the driver, no timeout of the loop can end it.
    faulthandler.dump_traceback_later(chosen.limit + 30, exit=True)
    proof = Proof(chosen)

    async def bounded() -> None:
        with anyio.fail_after(chosen.limit):
            await body(proof)

    began_s = time.monotonic()
    try:
        asyncio.run(bounded())
    except BaseException as raised:  # noqa: BLE001 - whatever it is, what was found is written
        traceback.print_exc()
        error: BaseException = raised
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        last = str(error).strip().splitlines()[-1:] or [""]
        proof.claim("ran to its end", f"{type(error).__name__}: {last[0]}"[:200], "no error", False)
    proof.details["seconds"] = round(time.monotonic() - began_s, 1)
    resultfile.write(chosen.out, proof.result())
    print(proof.table(), flush=True)
    return 0 if proof.holds else 1
