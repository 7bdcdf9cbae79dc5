"""Records of a pool that there is not, and frames of them."""

from typing import Any, Final

import attrs

from featcache import (
    HomeView,
    KeysPage,
    KeyView,
    ReadingHostView,
    SessionView,
    SlabMap,
    Snapshot,
    Statistics,
)
from featcache.cli.top.frame import draw
from featcache.cli.top.look import Look
from featcache.cli.top.model import Model, Seen
from featcache.observation import UnpaidRef, WaitingPut

MIB: Final = 1 << 20
PLAIN: Final = Look("none", unicode=True)
HOSTILE: Final = "\x1b[2J\x07[red]\u202e\n\x9b1m"
"""A name that would clear the screen, ring, colour, turn the direction round and break the line."""


def session(number: int, **changes: Any) -> SessionView:
    """An attached session that does nothing."""
    nothing: dict[str, Any] = {
        field.name: 0 for field in attrs.fields(SessionView) if field.type in {int, "int"}
    }
    given = {"session": number, "name": f"s{number}", "pid": 1000 + number, "state": "active"}
    return SessionView(**(nothing | {"age_s": 60.0, **given} | changes))


def unpaid(ref: str, age_s: float, *owed_by: str, **changes: Any) -> UnpaidRef:
    """A ref of a MiB that owes a read to each."""
    given: dict[str, Any] = {
        "nbytes": MIB,
        "ttl_s": None,
        "reads_left": max(1, len(owed_by)),
        "read_by": (),
    }
    return UnpaidRef(**(given | {"ref": ref, "age_s": age_s, "owed_by": owed_by} | changes))


def waiting(nbytes: int, age_s: float, number: int = 0, name: str | None = None) -> WaitingPut:
    """A put that waits."""
    return WaitingPut(nbytes=nbytes, age_s=age_s, session=number, name=name)


def key(label: str | bytes, nbytes: int = MIB, **changes: Any) -> KeyView:
    """A feature under a key."""
    name = label.encode() if isinstance(label, str) else label
    given: dict[str, Any] = {
        "age_s": 5.0,
        "unused_s": 1.0,
        "hits": 3,
        "pinned": False,
        "reads": 0,
        "ref": "1:1",
    }
    return KeyView(**(given | {"key": name, "nbytes": nbytes} | changes))


def page(*keys: KeyView, total: int | None = None) -> KeysPage:
    """A page of keys."""
    return KeysPage(keys=keys, total=len(keys) if total is None else total, next=None)


def home(address: str, nbytes: int = MIB, **changes: Any) -> HomeView:
    """A connected home that something was fetched from."""
    given: dict[str, Any] = {
        field.name: 0 for field in attrs.fields(HomeView) if field.type in {int, "int"}
    }
    given |= {"pool": "ab" * 16, "state": "connected", "reason": "", "fetched": 3}
    given |= {"last_s": 0.002, "mean_s": 0.0032, "longest_s": 0.01, "total_s": 0.0096}
    given |= {"round_trip_s": 0.0004, "silent_s": 0.2}
    return HomeView(**(given | {"address": address, "fetched_bytes": nbytes} | changes))


def reading_host(address: str, nbytes: int = MIB, **changes: Any) -> ReadingHostView:
    """A connected host that has read something."""
    given: dict[str, Any] = {
        field.name: 0 for field in attrs.fields(ReadingHostView) if field.type in {int, "int"}
    }
    given |= {"host": "cd" * 16, "state": "connected", "names": (), "reads": 2}
    given |= {"lease_s": 9.5, "silent_s": 0.4}
    return ReadingHostView(**(given | {"address": address, "told_bytes": nbytes} | changes))


def slab(states: str, *, used: float = 1.0, age_s: float = 0.5) -> SlabMap:
    """A map with these cells, all as full and as old."""
    count = len(states)
    return SlabMap(
        capacity_bytes=count * MIB,
        committed_bytes=count * MIB,
        cell_bytes=float(MIB),
        states=states,
        used=tuple(0.0 if state in "f." else used for state in states),
        ages_s=(age_s,) * count,
    )


def snapshot(**changes: Any) -> Snapshot:
    """A pool of 64 MiB at rest; figures of `Statistics` may be given beside those of the snapshot."""
    figures = {"capacity_bytes": 64 * MIB, "free_bytes": 64 * MIB, "slots": 64}
    names = {field.name for field in attrs.fields(Statistics)} - {"sessions"}
    figures |= {name: changes.pop(name) for name in names & set(changes)}
    given: dict[str, Any] = {
        "pool": "ab" * 16,
        "endpoint": "/run/pool.sock",
        "name": "main",
        "kind": "host",
        "device": "cpu",
        "version": "1",
        "protocol": 1,
        "pid": 4711,
        "uptime_s": 100.0,
        "level": "normal",
        "holders": (),
        "remedy": "",
        "statistics": Statistics(**figures),
        "observers": 1,
        "unpaid_refs": len(changes.get("unpaid", ())),
        "unpaid": (),
        "waiting": (),
        "sessions": (),
    }
    return Snapshot(**(given | changes))


def lively() -> Model:
    """A model that has looked twice, at a pool in which much goes on."""
    model = Model("/run/pool.sock")
    before = snapshot(hits=900, misses=100, puts=10)
    after = snapshot(
        hits=990,
        misses=110,
        puts=30,
        evicted=2,
        level="high",
        used_bytes=60 * MIB,
        resident_bytes=8 * MIB,
        pinned_bytes=4 * MIB,
        largest_free_bytes=3 * MIB,
        slots_used=40,
        keys=3,
        waiters=2,
        waiting_bytes=9 * MIB,
        oldest_unpaid_s=75.0,
        unpaid_refs=40,
        sessions=(
            session(
                1, name="rank-0", reading=2, reading_bytes=3 * MIB, owes=12, owes_bytes=20 * MIB
            ),
            session(2, name="rank-1", state="quarantined", owes=28, owes_bytes=30 * MIB),
            session(7, name="encoder", ahead=4, ahead_bytes=MIB, pins=1, pinned_bytes=4 * MIB),
        ),
        unpaid=(
            unpaid("3:14", 75.0, "rank-9 (never attached)", ttl_s=90.0),
            unpaid(
                "5:2",
                12.0,
                "rank-0 (session 1, pid 1001)",
                read_by=("rank-0 (session 1, pid 1001)",),
            ),
        ),
        waiting=(waiting(6 * MIB, 1.5), waiting(3 * MIB, 0.2, 7, "encoder")),
    )
    model.saw(Seen(snapshot=before), 100.0)
    keys = page(
        key("image/1", 2 * MIB, pinned=True), key("image/2", age_s=50.0), key("text", hits=9)
    )
    model.saw(Seen(snapshot=after, slab=slab("f.sokpr" * 16), keys=keys), 102.0)
    return model


def among_hosts() -> Model:
    """The same, with other hosts."""
    model = lively()
    assert model.snapshot is not None
    model.snapshot = attrs.evolve(
        model.snapshot,
        peers=3,
        homes=(
            home("10.0.0.7:7400", 3 * MIB, failed=1, in_progress=2),
            home("10.0.0.8:7400", MIB, state="lost", reason="it closed", silent_s=75.0),
        ),
        reading_hosts=(reading_host("10.0.0.9:41234", 2 * MIB, reading=1, reading_bytes=MIB),),
    )
    return model


def shown(
    model: Model, width: int = 80, height: int = 24, look: Look = PLAIN, now_s: float = 102.0
) -> list[str]:
    """The lines of a frame, without what fills them up."""
    return [line.plain.rstrip() for line in draw(model, look, width, height, now_s)]
