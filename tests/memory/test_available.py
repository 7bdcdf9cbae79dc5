"""What the host can still give, as files of the kernel's forms say it; and what a slab makes of it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import featcache
from featcache import BackendUnavailable, events
from featcache.memory.host import slab as host
from featcache.memory.host.available import available_bytes
from support.processes import Pipe, starting

KIB = 1 << 10
MIB = 1 << 20


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


OLD = {"proc/self/cgroup": "9:cpu,cpuacct:/x\n4:memory:/a/b\n0::/\n"}
UNLIMITED = "9223372036854771712"


def old_limit(
    name: str, most: str, now: int, cached: int = 0, *, memsw: str = ""
) -> dict[str, str]:
    files = {
        f"groups/memory/{name}memory.limit_in_bytes": f"{most}\n",
        f"groups/memory/{name}memory.usage_in_bytes": f"{now}\n",
        f"groups/memory/{name}memory.use_hierarchy": "1\n",
        f"groups/memory/{name}memory.stat": (
            f"cache 99\ninactive_file 98\ntotal_inactive_file {cached}\ntotal_active_file 0\n"
        ),
    }
    if memsw:
        files[f"groups/memory/{name}memory.memsw.limit_in_bytes"] = memsw
        files[f"groups/memory/{name}memory.memsw.usage_in_bytes"] = f"{now}\n"
    return files


def mounts(*lines: str) -> dict[str, str]:
    return {"proc/self/mountinfo": "".join(f"{line}\n" for line in lines)}


OLD_AT = "35 31 0:32 {} /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory"
NEW_AT = "41 31 0:38 {} /sys/fs/cgroup{} rw - cgroup2 cgroup2 rw"
OTHER = "30 31 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct"


@pytest.mark.parametrize(
    ("files", "bytes_left"),
    [
        (OLD | old_limit("a/b/", "4000", 1000), 3000),
        (OLD | old_limit("a/b/", "4000", 1000, 500), 3500),
        (OLD | old_limit("a/b/", "4000", 1000, memsw="3000"), 2000),
        (OLD | old_limit("a/b/", UNLIMITED, 7) | old_limit("a/", "2000", 500), 1500),
        (OLD | old_limit("a/b/", "4000", 10) | old_limit("", "600", 500), 100),
        (OLD | old_limit("a/b/", "10", 4000), 0),
        # a hierarchy that counts each group apart: the group above it limits others
        (
            OLD
            | old_limit("a/b/", "4000", 10)
            | old_limit("a/", "600", 500)
            | {"groups/memory/a/memory.use_hierarchy": "0\n"},
            3990,
        ),
        # both versions, of which the old one has the memory
        (
            OLD
            | mounts(OTHER, OLD_AT.format("/"), NEW_AT.format("/", "/unified"))
            | old_limit("a/b/", "4000", 1000),
            3000,
        ),
        # a container that has its own group mounted as the root
        (OLD | mounts(OLD_AT.format("/a/b")) | old_limit("", "4000", 1000), 3000),
        (OLD | mounts(OLD_AT.format("/a")) | old_limit("b/", "4000", 1000), 3000),
        # paths of another namespace
        (
            {"proc/self/cgroup": "4:memory:/../c\n"}
            | mounts(OLD_AT.format("/"))
            | old_limit("", "4000", 1000),
            3000,
        ),
        ({"proc/self/cgroup": "0::/../../c\n"} | limit("", "700", 200), 500),
        (
            {"proc/self/cgroup": "0::/\n"}
            | mounts(NEW_AT.format("/..", ""))
            | limit("", "700", 200),
            500,
        ),
        (
            {"proc/self/cgroup": "0::/a\n"}
            | mounts(NEW_AT.format("/b", ""))
            | limit("", "700", 200),
            500,
        ),
        # the new version's softer limit, from which on the kernel reclaims, and slows down
        (
            GROUP | limit("a/b/", "max", 100) | {"groups/a/b/memory.high": "300\n"},
            200,
        ),
        (
            MEMINFO | mounts("nonsense", "1 2 3 - cgroup2", NEW_AT.format("/", "")) | GROUP,
            6000 * KIB,
        ),
        (OLD | {"groups/memory/a/b/memory.limit_in_bytes": "much\n"}, None),
    ],
)
def test_groups_of_every_form(
    files: dict[str, str], bytes_left: int | None, tmp_path: Path
) -> None:
    assert available_bytes(*lay(tmp_path, files)) == bytes_left


def test_groups_that_are_mounted_somewhere_else(tmp_path: Path) -> None:
    there = tmp_path / "some where"
    escaped = str(there).replace(" ", "\\040")
    files = OLD | mounts(f"35 31 0:32 / {escaped} rw - cgroup cgroup rw,memory")
    files |= {
        name.replace("groups/memory", "some where"): text
        for name, text in old_limit("a/b/", "4000", 1000).items()
    }
    assert available_bytes(*lay(tmp_path, files)) == 3000


@pytest.fixture
def limited_group() -> Iterator[Path]:
    """A real control group of 512 MiB, of either version."""
    for root, name, files in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", ()),
        (Path("/sys/fs/cgroup"), "memory.max", ("memory.swap.max",)),
    ):
        group = root / f"featcache-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / name).write_text(str(512 * MIB))
            for other in files:
                (group / other).write_text("0")
        except OSError:
            group.rmdir()
            continue
        yield group
        group.rmdir()
        return
    pytest.skip("this process may make no control group that limits memory")


async def fill_the_group(pipe: Pipe, group: Path) -> None:
    """Put until the slab can't grow; what is there is read, and what is recycled serves again."""
    (group / "cgroup.procs").write_text(str(os.getpid()))
    failed: list[events.Event] = []
    events.add_hook(
        lambda event: failed.append(event) if isinstance(event, events.CommitFailed) else None
    )
    async with featcache.create(capacity="2GiB") as cache:
        refs: list[featcache.FeatureRef] = []
        while not failed:  # a put whose growth took long is tried again
            value = torch.full((32 * MIB,), len(refs), dtype=torch.uint8)
            with contextlib.suppress(featcache.PutTimeout):
                refs.append(await cache.put(value, timeout=0.2))
        del value
        for number, ref in enumerate(refs):
            feature = await cache.get(ref)
            assert isinstance(feature, torch.Tensor)
            assert torch.equal(feature, torch.full((32 * MIB,), number, dtype=torch.uint8))
            del feature
        await cache.put(torch.zeros(32 * MIB, dtype=torch.uint8), timeout=20)
        pipe.say("held", len(refs), len(failed))


async def test_an_owner_under_a_real_limit_is_not_killed(limited_group: Path) -> None:
    with starting() as start:
        child = start(fill_the_group, limited_group)
        said, held, failed = await child.hear()
        assert said == "held"
        assert held >= 8  # half of what the limit is
        assert failed
        assert await child.ends() == 0


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
        # The true reason comes before the bytes that are free: more capacity would change nothing.
        with pytest.raises(featcache.PutTimeout, match=r"the slab can't grow: .* bytes are free"):
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
