"""Takes the few files of sglang's CUDA IPC pool out of its wheel, into a folder that git ignores.

    pip download --no-deps --only-binary=:all: --python-version 3.12 sglang==0.5.23
    python tests/bench/peers/unpack_sglang.py sglang-0.5.23-*.whl

They are not changed in any way; sglang_stubs.py stands in for the rest of sglang, which they import.
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
POOLS = {
    "one file": ("sglang/srt/utils/cuda_ipc_transport_utils.py",),
    "stream ordered": (
        "sglang/srt/multimodal/transport/cuda_ipc.py",
        "sglang/srt/multimodal/transport/memory_pool.py",
        "sglang/srt/utils/cuda_vmm_utils.py",
    ),
}
"""where the pool was in the versions up to 0.5.11, and where it is since"""


def unpack(wheel: Path, into: Path) -> Path:
    """Write the pool's files under `into`; return the folder of this version."""
    version = wheel.name.split("-")[1]
    folder = into / f"sglang-{version}"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        wanted = POOLS["stream ordered"]
        if not names.issuperset(wanted):
            wanted = POOLS["one file"]
        licenses = [name for name in names if ".dist-info/" in name and "LICENSE" in name]
        for name in (*wanted, *licenses):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(name))
    return folder


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheels", type=Path, nargs="+")
    parser.add_argument("--into", type=Path, default=ROOT / ".peers")
    options = parser.parse_args(argv)
    for wheel in options.wheels:
        print(unpack(wheel, options.into).name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
