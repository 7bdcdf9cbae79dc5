"""Where a result comes from: the machine, the versions, the command. No names, no absolute paths."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.peers import vllmstore

PACKAGES = ("featcache", "torch", "numpy", "anyio", "msgspec", "pyzmq", "uvloop")
CUDA_PACKAGES = ("featcache", "torch", "cuda-bindings", "numpy", "anyio", "msgspec", "uvloop")


def machine() -> dict[str, Any]:
    return {
        "cpu": _field("/proc/cpuinfo", "model name"),
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)),
        "memory": _field("/proc/meminfo", "MemTotal"),
        "kernel": platform.release(),
        "shmem_huge_pages": _text("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        "load_before": round(os.getloadavg()[0], 2),
    }


def versions(vllm_file: str | None, packages: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    if vllm_file is not None and Path(vllm_file).is_file():
        found["vllm (one file)"] = vllmstore.version(vllm_file)
    found["commit"] = _commit()
    return found


def gpus() -> list[dict[str, str]]:
    """The GPUs, as the driver's own tool names them; none where there is none."""
    fields = ("name", "driver_version", "memory.total", "compute_mode")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = [line.split(", ") for line in done.stdout.strip().splitlines()]
    return [dict(zip(fields, line, strict=False)) for line in lines]


def command(argv: list[str], script: str = "host.py") -> str:
    """The command as it was given, paths cut down to their last part."""
    parts = [Path(part).name if part.startswith("/") else part for part in argv]
    return " ".join([f"python tests/bench/{script}", *parts])


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _commit() -> str | None:
    """The commit of the tree that this file lies in, marked when it has changes.

    Where a copy of the tree has no history, FEATCACHE_BENCH_COMMIT can say it.
    """
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],  # noqa: S607 - whichever git is used here
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FEATCACHE_BENCH_COMMIT")
    return done.stdout.strip()


def _field(path: str, name: str) -> str | None:
    for line in (_text(path) or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None
