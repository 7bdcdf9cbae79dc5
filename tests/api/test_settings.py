"""Settings, the environment, budgets, and the arguments of create and connect."""

import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import attrs
import pytest
import structlog
import torch

import featcache
from featcache import BackendUnavailable, Settings, SettingsError, split_budget


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


@pytest.mark.parametrize(
    ("variable", "text"),
    [("CAPACITY", "lots"), ("SLOTS", "0"), ("PREFAULT", "maybe"), ("BACKEND", "x"), ("TTL", "0")],
)
def test_a_variable_that_is_invalid_is_named(
    variable: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"FEATCACHE_{variable}", text)
    with pytest.raises(SettingsError, match=f"FEATCACHE_{variable}.*{text}"):
        Settings()
    with pytest.raises(SettingsError, match=f"FEATCACHE_{variable}"):
        featcache.create()


@pytest.mark.parametrize("name", ["CAPACTY", "SLOT", "RECYCLE_INTERVALL", "capacity"])
def test_a_misspelt_variable_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"FEATCACHE_{name}", "7")
    meant = "FEATCACHE_(CAPACITY|SLOTS|RECYCLE_INTERVAL) is"
    with pytest.raises(SettingsError, match=f"FEATCACHE_{name} .*{meant}"):
        Settings()
    with pytest.raises(SettingsError, match=meant):
        featcache.connect()


def test_a_variable_of_nobodys_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    structlog.reset_defaults()  # as of an application that configured nothing
    monkeypatch.setenv("FEATCACHE_CAPACITY_OF_SLAB", "7")
    monkeypatch.setenv("FEATCACHE_OF_ANOTHER_PROGRAM", "7")
    Settings()
    Settings()
    found = sorted(record.getMessage() for record in caplog.records)
    assert len(found) == 2
    assert "FEATCACHE_CAPACITY_OF_SLAB" in found[0]
    assert "did you mean FEATCACHE_CAPACITY?" in found[0]


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
    {"device": "cpu:1"},
    {"device": torch.device("cpu", 3)},
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


@pytest.mark.parametrize("size", ["1PiB", "3 EB"])
def test_a_size_beyond_any_machine_is_refused_for_its_size(size: str) -> None:
    with pytest.raises(SettingsError, match="out of range"):
        Settings(capacity=size)


def test_an_unknown_variable_is_told_of_to_structlog_where_that_is_configured(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FEATCACHE_OF_ANOTHER_PROGRAM_ENTIRELY", "1")
    told = list[str]()

    def keep(_: object, __: str, event: MutableMapping[str, Any]) -> str:
        told.append(str(event["event"]))
        raise structlog.DropEvent

    structlog.configure(processors=[keep])
    try:
        Settings()
    finally:
        structlog.reset_defaults()
    assert len(told) == 1
    assert "FEATCACHE_OF_ANOTHER_PROGRAM_ENTIRELY" in told[0]
    assert not caplog.records


def test_the_command_line_s_variables_are_neither_settings_nor_slips(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("DEVICE", "ENDPOINT", "SPILL", "LOG", "LOG_LEVEL", "NAME", "CONFIG"):
        monkeypatch.setenv(f"FEATCACHE_{name}", "x")
    for name in ("METRICS_PORT", "METRICS_HOST", "SHUTDOWN_GRACE"):
        monkeypatch.setenv(f"FEATCACHE_{name}", "x")
    Settings()
    assert caplog.records == []


def test_the_grace_of_a_revocation_is_not_taken_for_that_of_a_shutdown() -> None:
    """Of `featcache serve`: each ref that is taken back would wait for so long."""
    assert Settings(grace=1.0).grace == 1.0
    with pytest.raises(SettingsError, match="shutdown_grace"):
        Settings(grace=30)
