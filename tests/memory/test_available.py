"""What the host can still give, as files of the kernel's forms say it; and what a slab makes of it."""

from pathlib import Path

import pytest
import torch

import featcache
from featcache import BackendUnavailable
from featcache.memory.host import slab as host
from featcache.memory.host.available import available_bytes

KIB = 1 << 10


def lay(root: Path, files: dict[str, str]) -> tuple[Path, Path]:
    """Write files under a /proc and a /sys/fs/cgroup of the test's own; return the two."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root / "proc", root / "groups"


MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    5000 kB\nSwapFree:  1000 kB\n"}
GROUP = {"proc/self/cgroup": "0::/a/b\n"}


def limit(name: str, most: str, now: int, cached: int = 0) -> dict[str, str]:
    return {
        f"groups/{name}memory.max": f"{most}\n",
        f"groups/{name}memory.current": f"{now}\n",
        f"groups/{name}memory.stat": f"anon 7\ninactive_file {cached}\nactive_file 0\n",
    }


@pytest.mark.parametrize(
    ("files", "bytes_left"),
    [
        (MEMINFO, 6000 * KIB),
        (MEMINFO | GROUP | limit("a/b/", "max", 5), 6000 * KIB),
        (MEMINFO | GROUP | limit("a/b/", "4000000", 1000000), 3000000),
        (MEMINFO | GROUP | limit("a/b/", "4000000", 1000000, 500000), 3500000),
        (MEMINFO | GROUP | limit("a/b/", "4000000", 10) | limit("a/", "2000", 500), 1500),
        (MEMINFO | GROUP | limit("a/b/", "4000", 5000), 0),
        (MEMINFO | {"proc/self/cgroup": "0::/\n"} | limit("", "700", 200), 500),
        (GROUP | limit("a/b/", "4000", 1000), 3000),
        (GROUP, None),
        ({}, None),
        ({"proc/meminfo": "MemFree: 3 kB\n", "proc/self/cgroup": "4:memory:/old\n"}, None),
        ({"proc/meminfo": "MemAvailable: much\n"}, None),
        ({"proc/meminfo": "MemAvailable:\n"}, None),
    ],
)
def test_the_least_of_what_host_and_groups_have_left(
    files: dict[str, str], bytes_left: int | None, tmp_path: Path
) -> None:
    assert available_bytes(*lay(tmp_path, files)) == bytes_left


def test_this_host_has_some() -> None:
    left_bytes = available_bytes()
    assert left_bytes is None or left_bytes > 0


async def test_more_than_the_host_has_is_refused_before_any_of_it_is_taken(no_leaks: None) -> None:
    with pytest.raises(BackendUnavailable, match="where the host has"):
        await featcache.create(capacity="64TiB", initial="64TiB").open()


async def test_growth_beyond_what_the_host_has_is_a_full_slab(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    segment = 64 * KIB
    cache = featcache.create(capacity=4 * segment, segment=segment, initial=segment)
    async with cache:
        monkeypatch.setattr(host, "available_bytes", lambda: segment - 1)
        with pytest.raises(featcache.PutTimeout):
            await cache.put(torch.zeros(2 * segment, dtype=torch.uint8), timeout=0.05)
        assert cache.statistics().committed_bytes == segment


async def test_a_fault_in_growing_is_told_and_is_not_the_end_of_growth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fault() -> int:
        raise ZeroDivisionError

    segment = 64 * KIB
    cache = featcache.create(capacity=4 * segment, segment=segment, initial=segment)
    async with cache:
        large = torch.zeros(2 * segment, dtype=torch.uint8)
        with monkeypatch.context() as odd:
            odd.setattr(host, "available_bytes", fault)
            with pytest.raises(ZeroDivisionError):
                await cache.put(large, on_full="raise")
        store = cache._opened().pool.store
        store.size._grow_after_s = float("-inf")  # as after a second
        await cache.put(large, on_full="raise")
        assert cache.statistics().committed_bytes == 2 * segment
