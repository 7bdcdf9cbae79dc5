"""Settings, the environment, budgets, and the arguments of create and connect."""

import os
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

import featcache
from featcache import BackendUnavailable, Settings, SettingsError, events, split_budget
from support.caches import KIB, filled, small, tensor


def test_the_defaults_are_those_of_the_design() -> None:
    settings = Settings()
    assert settings.capacity == 1 << 30
    assert settings.segment == 64 << 20
    assert settings.idle == 30
    assert settings.recycle_interval == 0.05
    assert (settings.slots, settings.sessions, settings.ttl) == (4096, 64, 300)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512MiB", 512 << 20),
        ("512mib", 512 << 20),
        (" 1.5 GB ", 1_500_000_000),
        ("4096", 4096),
        ("4096B", 4096),
        ("2 KiB", 2048),
        ("0.5TiB", 1 << 39),
        (77, 77),
    ],
)
def test_sizes_are_parsed(text: int | str, size: int) -> None:
    assert Settings(capacity=text).capacity == size


@pytest.mark.parametrize(
    "size", ["", "12 parsecs", "MiB", "-1", "1e9", "0", "0.1", 0, -5, None, 1.5, True, "200TiB", []]
)
def test_invalid_sizes_are_refused(size: Any) -> None:
    with pytest.raises(SettingsError, match="capacity"):
        Settings(capacity=size)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("capacity", "3MiB", 3 << 20),
        ("initial", "1MiB", 1 << 20),
        ("initial", "None", None),
        ("ttl", "none", None),
        ("evict_above", "none", None),
        ("evict_to", "NONE", None),
        ("ttl", "2.5", 2.5),
        ("slots", "7", 7),
        ("prefault", "off", False),
        ("huge_pages", "YES", True),
        ("recycle_interval", "0.01", 0.01),
    ],
)
def test_a_field_defaults_to_its_environment_variable(
    name: str, text: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"FEATCACHE_{name.upper()}", text)
    assert getattr(Settings(), name) == value
    monkeypatch.setenv(f"FEATCACHE_{name.upper()}", "")
    blank = getattr(Settings(), name)
    monkeypatch.delenv(f"FEATCACHE_{name.upper()}")
    assert blank == getattr(Settings(), name)


def test_an_argument_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATCACHE_SLOTS", "7")
    assert Settings(slots=9).slots == 9


@pytest.mark.parametrize("name", [field.name for field in attrs.fields(Settings)])
def test_an_invalid_value_is_refused_by_the_name_of_its_field(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong: Any
    for wrong in ("nonsense", [], -1, float("nan")):
        with pytest.raises(SettingsError, match=name):
            Settings(**{name: wrong})
    monkeypatch.setenv(f"FEATCACHE_{name.upper()}", "nonsense")
    with pytest.raises(SettingsError, match=name):
        Settings()


@pytest.mark.parametrize(
    "change",
    [
        {"slots": 0},
        {"slots": 1 << 21},
        {"slots": 1.0},
        {"slots": True},
        {"sessions": 0},
        {"waiters": -1},
        {"readers": 0},
        {"tensors": 5000},
        {"ttl": 0},
        {"recycle_interval": 0},
        {"attach_timeout": 0},
        {"message_bytes": 1},
        {"segment": 4095},
    ],
    ids=str,
)
def test_bounds_are_enforced(change: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(change))):
        Settings(**change)


def test_settings_are_frozen() -> None:
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        Settings().slots = 3  # type: ignore[misc]  # that it can't be set is the point
    with pytest.raises(TypeError):
        Settings(speed=3)  # type: ignore[call-arg]


# --- budgets -------------------------------------------------------------------------------------


def test_a_budget_is_never_exceeded() -> None:
    for total in (1 << 30, 1_000_000_007):
        for workers in (1, 2, 3, 7):
            share = split_budget(total, workers, floor=1)
            assert share * workers <= total < (share + 1) * workers
    assert split_budget("1GiB", 4) == 256 << 20
    assert split_budget("1GiB", 8) == 128 << 20


def test_a_share_under_the_floor_names_how_many_fit() -> None:
    with pytest.raises(SettingsError, match="carries 8 workers"):
        split_budget("1GiB", 9)
    with pytest.raises(SettingsError, match="carries 3 workers"):
        split_budget("100MiB", 4, floor="30MiB")


@pytest.mark.parametrize("workers", [0, -1, 1.5, True, None, "2"])
def test_an_invalid_number_of_workers_is_refused(workers: Any) -> None:
    with pytest.raises(SettingsError, match="workers"):
        split_budget("1GiB", workers)


def test_invalid_budgets_are_refused() -> None:
    with pytest.raises(SettingsError, match="total"):
        split_budget("much", 2)
    with pytest.raises(SettingsError, match="floor"):
        split_budget("1GiB", 2, floor="low")


# --- arguments -----------------------------------------------------------------------------------

BAD: list[dict[str, Any]] = [
    {"device": "no such"},
    {"device": "meta"},
    {"device": []},
    {"name": ""},
    {"name": "n" * 257},
    {"name": 3},
    {"name": "a\ud800"},
    {"endpoint": ""},
    {"endpoint": "/" + 107 * "x"},
    {"endpoint": "/" + 54 * "é"},
    {"endpoint": "/run/a\0b"},
    {"endpoint": b"/run/socket"},
    {"endpoint": 3},
    {"endpoint": "/run/a\ud800"},
    {"endpoint": "/run/a\udcff"},  # a path that is no UTF-8, which a ref can't say
    {"settings": {}},
    {"settings": 3},
]


@pytest.mark.parametrize("arguments", BAD, ids=ascii)
def test_invalid_arguments_are_refused_by_name(arguments: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(arguments))):
        featcache.create(**arguments)
    with pytest.raises(SettingsError, match=next(iter(arguments))):
        featcache.connect(**arguments)


def test_a_device_that_is_missing_is_refused() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable):
            featcache.create(device="cuda:0")
        with pytest.raises(BackendUnavailable):
            featcache.connect(device="cuda:0")


def test_an_endpoint_may_be_a_path(runtime_dir: Path) -> None:
    featcache.connect(runtime_dir / "socket")  # type: ignore[arg-type]  # harmless, so not refused
    featcache.create(endpoint=os.fspath(runtime_dir / "socket"))


# --- the environment says which variable is at fault ------------------------------------------------


@pytest.mark.parametrize("field", attrs.fields(Settings), ids=lambda field: str(field.name))
def test_a_variable_that_is_refused_is_named(
    monkeypatch: pytest.MonkeyPatch, field: "attrs.Attribute[Any]"
) -> None:
    monkeypatch.setenv(f"FEATCACHE_{field.name.upper()}", "lots")
    with pytest.raises(
        SettingsError, match=f"^FEATCACHE_{field.name.upper()}: {field.name}='lots'"
    ):
        Settings()
    with pytest.raises(SettingsError, match=f"^{field.name}='lots'"):  # given by hand: by its name
        Settings(**{field.name: "lots"})


@pytest.mark.parametrize("text", ["0", "-1", "9" * 30])
def test_a_variable_out_of_range_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("FEATCACHE_SLOTS", text)
    with pytest.raises(SettingsError, match="FEATCACHE_SLOTS: slots="):
        featcache.create()


UNKNOWN = {
    "FEATCACHE_CAPACTIY": "FEATCACHE_CAPACITY",
    "FEATCACHE_TLL": "FEATCACHE_TTL",
    "FEATCACHE_RECYCLE_INTERVALL": "FEATCACHE_RECYCLE_INTERVAL",
    "FEATCACHE_COLOUR": None,
}


@pytest.mark.parametrize("variable", UNKNOWN)
def test_an_unknown_variable_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    told: list[events.Event] = []
    monkeypatch.setattr("featcache.hooks._hooks", (told.append,))
    monkeypatch.setattr("featcache.api.arguments._warned", set())
    monkeypatch.setenv(variable, "1GiB")
    for make in (featcache.create, featcache.connect, featcache.blocking.create):
        make()
    assert told == [events.VariableUnknown(pool="", variable=variable, nearest=UNKNOWN[variable])]
    assert told[0].severity == "warning"


def test_the_variables_of_other_parts_are_not_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("FEATCACHE_CLUSTER_KEY", "FEATCACHE_SLOTS", "FEATCACHES", "FEATCACHE_BENCH_X"):
        monkeypatch.setenv(variable, "7")
    told: list[events.Event] = []
    monkeypatch.setattr("featcache.hooks._hooks", (told.append,))
    monkeypatch.setattr("featcache.api.arguments._warned", set())
    featcache.create()
    assert told == []


# --- devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu:1", torch.device("cpu", 7), "a\ud800", "cpu:x", ""])
async def test_a_device_that_is_none_is_refused_wherever_one_is_given(device: Any) -> None:
    for make in (
        featcache.create,
        featcache.connect,
        featcache.blocking.create,
        featcache.blocking.connect,
    ):
        with pytest.raises(SettingsError, match="device="):
            make(device=device)
    async with featcache.create(settings=small()) as owner:
        ref = await owner.put(filled(KIB), key="k")
        with pytest.raises(SettingsError, match="device="):
            await owner.get(ref, device=device)
        with pytest.raises(SettingsError, match="device="):
            await owner.get("k", device=device)
        with pytest.raises(SettingsError, match="device="):
            owner.get_nowait(ref, device=device)
        with pytest.raises(SettingsError, match="device="):
            await owner.get_or_put("k", lambda: filled(KIB), device=device)


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu", 0)])
async def test_the_host_has_two_names(device: Any) -> None:
    async with featcache.create(device=device, settings=small()) as owner:
        found = await owner.get(await owner.put(filled(KIB, 5)), device=device)
        assert torch.equal(tensor(found), filled(KIB, 5))
        assert tensor(found).device == torch.device("cpu")
