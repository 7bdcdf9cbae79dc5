"""`FeatureCache`: the owner of a pool, as users hold it; `create`."""

import threading
from collections.abc import Iterable
from os import PathLike
from types import EllipsisType
from typing import Any, Literal, Self

import torch

from featcache.api import forks, serving
from featcache.api.arguments import check_tier, parse_device, parse_name, settings_with
from featcache.api.base import CacheBase
from featcache.api.cluster import parse_cluster
from featcache.api.lifecycle import Lifecycle
from featcache.control import endpoint as endpoints
from featcache.control.turns import CALL_UNITS
from featcache.memory.host.slab import HostSlab
from featcache.owner.beyond import Cluster
from featcache.owner.owner import Owner
from featcache.pool.limits import limits_of
from featcache.pool.pressure import Pressure
from featcache.ref import FeatureRef
from featcache.session.arguments import check_on_full
from featcache.settings import Settings, parse_bytes, parse_seconds, parse_timeout
from featcache.tier import Tier

OnFull = Literal["wait", "raise", "spill"]


class FeatureCache(CacheBase):
    """Owns a pool: a slab, its slots, and the socket that readers attach at. Made by `create`.

    It belongs to the event loop that opens it; elsewhere its calls raise WrongLoop, but for those that say
    that they are safe in any thread.
    """

    def __init__(
        self,
        device: torch.device,
        settings: Settings,
        endpoint: str | None,
        name: str | None,
        spill_bytes: int | None = None,
        cluster: Cluster | None = None,
        tier: Tier | None = None,
    ) -> None:
        self._life: Lifecycle[Owner] = Lifecycle("cache", "create")
        self._device = device
        self._settings = settings
        self._wanted_endpoint = endpoint
        self._name = name
        self._spill_bytes = spill_bytes
        self._cluster = cluster
        self._tier = tier
        self._pressure = Pressure(lambda: self._opened().pool, lambda: self._life.here().pool)

    async def open(self) -> Self:
        """Make the slab and listen.

        Raises:
            BackendUnavailable: the memory or the kernel's help for it is not there.
            SettingsError: the endpoint can't be used.
            CacheClosed: it was opened before, or is closed meanwhile; make another.
            WrongLoop: no asyncio loop runs here (trio's does, perhaps).

        """
        await self._life.open(
            lambda: Owner.open(
                *(self._device, self._settings, self._spill_bytes, self._wanted_endpoint),
                *(self._name, self._cluster, self._tier),
            )
        )
        forks.watch(self)
        serving.add(self)
        return self

    async def aclose(self) -> None:
        """Close the pool: waiting puts raise CacheClosed, sessions are told, the socket's file goes.

        Slabs that readers have mapped stay readable to them until their borrows end. Idempotent; an
        `open` in progress is cancelled and raises CacheClosed.
        """
        await super().aclose()

    async def drain(self, timeout: float) -> bool:
        """Prepare the end: take no more puts, and let those who read now finish.

        From here on every put raises: CacheClosed in this process, OwnerLost in clients. So does every
        wait for room or for a key, at once. Reads go on; close the cache when this returns.

        Args:
            timeout: seconds that reads in progress, borrows most of all, may go on.

        Returns:
            Whether they have all ended.

        Raises:
            CacheClosed: it is not open; WrongLoop: called outside the cache's loop.

        """
        timeout_s = parse_seconds(timeout, "timeout")
        return await self._life.here().drain(timeout_s)

    def _opened(self) -> Owner:
        owner = self._life.engine
        if owner is None:
            raise self._life.closed()
        return owner

    def _serves_here(self) -> list[str]:
        owner, home = self._life.engine, self._life.home
        if owner is None or home is None or not home.is_here():
            return []
        return [served.pool.endpoint for served in owner.served]

    @property
    def endpoint(self) -> str:
        """The path of the socket, a str, that `connect` takes. Safe in any thread."""
        return self._opened().pool.endpoint

    @property
    def address(self) -> str | None:
        """Where other hosts find it, ``host:port``, as its refs carry it; None if it does not listen to them.

        Safe in any thread.
        """
        beyond = self._opened().beyond
        return None if beyond is None else beyond.address

    @property
    def pressure(self) -> Pressure:
        """The pool's `Pressure`: its `level` now, and `below(level)` to await a lower one."""
        return self._pressure

    async def put(
        self,
        feature: torch.Tensor | dict[str, torch.Tensor],
        *,
        readers: int | Iterable[str] | EllipsisType = ...,
        key: str | bytes | None = None,
        ttl: float | EllipsisType | None = ...,
        timeout: float | None = None,
        on_full: OnFull = "wait",
    ) -> FeatureRef:
        """Copy a feature into the slab and return its ref.

        Args:
            feature: a dense tensor of any dtype (but quantized ones) and shape, on any device,
                contiguous or not; or a dict of them, packed in one slot.
            readers: how many reads the ref owes, each by another session; or the names of the
                sessions that owe one each (`connect(name=…)`). 1 if it is left out; with a `key` none:
                the feature can be read by its key as often as wanted; reads that it owes besides
                keep it from being evicted.
            key: a str or bytes of 1 to 1024 bytes (a str is its UTF-8; `content_key` makes one of the
                content). The feature is kept under it until it is evicted, the longest unused first,
                when a put needs its room. The feature that was under the key before is dropped.
            ttl: seconds until the ref expires unpaid; None is never, left out is as in Settings. A
                feature under a key stays.
            timeout: seconds to wait for room; None waits without limit.
            on_full: ``"wait"`` stands in the queue, first come, first served; ``"raise"`` does not;
                ``"spill"`` puts it into the host slab instead (`create(spill=…)`), and waits only
                when that is full too. The ref looks the same to its readers. Not with a `key`.

        Raises:
            FeatureTooLarge: it can never fit.
            PoolFull: no room and ``on_full="raise"``, or `Settings.waiters` puts wait already.
            PutTimeout: no room in time.
            CacheClosed: closed, also while waiting.
            WrongLoop: called outside the cache's loop.
            SettingsError: an argument is invalid.

        A feature on a GPU is copied in the order of the stream that is torch's current one at the
        call: the work that makes it need not be done. One on the host can be changed once the call
        returns; copies of more than `Settings.inline_bytes` run in a thread. If the call is
        cancelled, its room or its place in the queue goes to the next.

        """
        timeout_s = None if timeout is None else parse_timeout(timeout)
        life = self._life
        owner = life.engine
        # The most usual, by the shortest way: `here`, inline.
        if (
            on_full == "wait"
            and owner is not None
            and life.runs._thread_id == threading.get_ident()  # noqa: SLF001 - see `Runs`
        ):
            writer, turn = owner.main.writer, owner.turn
            turn.left -= CALL_UNITS
            if turn.left < 0 and not owner.stages_at_call:
                return await writer.put_in_line(feature, readers, ttl, key, timeout_s)
            return await writer.put(writer.stage(feature, readers, ttl, key), timeout_s, wait=True)
        check_on_full(on_full, key)
        owner = life.here()
        owner.turn.left -= CALL_UNITS
        staged = owner.writers_nowait(on_full, key).stage(feature, readers, ttl, key)
        return await staged.put(timeout_s, owner.spills, wait=on_full != "raise")

    def put_nowait(
        self,
        feature: torch.Tensor | dict[str, torch.Tensor],
        *,
        readers: int | Iterable[str] | EllipsisType = ...,
        key: str | bytes | None = None,
        ttl: float | EllipsisType | None = ...,
    ) -> FeatureRef:
        """`put` with no await: PoolFull at once if there is no room or others wait for it.

        The copy runs in the loop whatever its size, and so does all else that it needs: the growth of
        the slab, and the recycling and evicting of however many features are in its way (some
        microseconds each), which `put` does in pieces. WrongLoop outside the cache's
        loop.
        """
        writer = self._life.here().main.writer
        return writer.put_nowait(writer.stage(feature, readers, ttl, key))

    def __repr__(self) -> str:
        owner = self._life.engine
        where = self._life.hint if owner is None else owner.pool.endpoint
        return f"<FeatureCache on {self._device}: {where}>"


def create(  # noqa: PLR0913 - all by keyword, and each is an owner's
    *,
    device: Any = "cpu",
    capacity: int | str | None = None,
    endpoint: str | None = None,
    name: str | None = None,
    spill: int | str | None = None,
    settings: Settings | None = None,
    initial: int | str | None = None,
    segment: int | str | None = None,
    idle: float | None = None,
    listen: str | None = None,
    cluster_key: str | bytes | PathLike[str] | None = None,
    upstream: Iterable[str] | None = None,
    tier: Tier | None = None,
) -> FeatureCache:
    """Return a cache to be opened with ``async with``: this process will own its slab.

    Args:
        device: where the slab is: ``"cpu"``, or a GPU such as ``"cuda:0"`` (which needs cuda-bindings).
        capacity: bytes the slab may grow to (or ``"512MiB"``); 1 GiB if neither this, `settings` nor
            ``FEATCACHE_CAPACITY`` says otherwise.
        endpoint: the path of the Unix socket to listen at; None makes one that only this user can
            reach.
        name: the name under which the owner itself owes reads (``readers=[name, …]``).
        spill: bytes of a second slab in host memory, which ``put(on_full="spill")`` uses when this one
            is full; pinned if this one is on a GPU.
        settings: everything else; without it, the environment's ``FEATCACHE_…``.
        initial: bytes committed from the beginning; ``initial=capacity`` fails at the start rather
            than under load. One segment by default.
        segment: bytes committed and given back at a time, 64 MiB by default.
        idle: seconds an empty tail is kept, 30 by default.
        listen: ``"HOST:PORT"`` at which other hosts may read this pool (port 0 is any); refs carry it. It
            needs the extra ``reach`` and a cluster key. None listens to none.
        cluster_key: the secret, best of 16 random bytes or more, that all hosts of a cluster prove to each
            other, or the `pathlib.Path` of its file; ``FEATCACHE_CLUSTER_KEY`` without it. With a
            key, refs of other hosts can be read here, and by the clients of this cache. Neither, and no
            `listen`: this host alone.
        upstream: the addresses, ``"HOST:PORT"`` each, of the hosts that are the homes of keys, the same
            list for all owners. A key that is not here is looked up at its home, fetched and kept;
            `get_or_put` makes it once over all hosts; what is put under a key is offered to its home.
            An owner whose own `listen` is in the list is the home of its share of the keys.
        tier: a larger, slower store below the pool, a `featcache.tier.Tier`: what is evicted to make room is
            put there, a key that is missed is looked up there. The cache closes it. None is none.

    Raises:
        SettingsError: an argument is invalid.
        BackendUnavailable: the device is not there.

    """
    target = parse_device(device)
    chosen = settings_with(settings, capacity=capacity, initial=initial, segment=segment, idle=idle)
    limits_of(chosen, HostSlab.granularity_bytes)  # sizes that clash are told now, not by `open`
    spill_bytes = None if spill is None else parse_bytes(spill, "spill")
    path = None if endpoint is None else endpoints.check_endpoint(endpoint)
    cluster = parse_cluster(listen, cluster_key, upstream, chosen.peers)
    below = None if tier is None else check_tier(tier)
    return FeatureCache(target, chosen, path, parse_name(name), spill_bytes, cluster, below)
