"""Where events go: structlog if it is configured, else the logger of the standard library."""

import inspect
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import structlog
from structlog.testing import capture_logs

from featcache import SettingsError, events
from support.caches import filled, pair

ALL = [
    kind
    for _, kind in inspect.getmembers(events, inspect.isclass)
    if issubclass(kind, events.Event) and kind is not events.Event
]
VALUES = {"str": "x", "int": 3, "float": 0.5, "bool": True, "tuple": ("x", "y")}
STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
RESERVED = STANDARD | {
    "event",
    "level",
    "timestamp",
    "logger",
    "log_level",
    "positional_args",
    "_record",
}


def made(kind: type[events.Event]) -> events.Event:
    """A record with a value of the right kind in each field."""
    types = {
        field.name: str(getattr(field.type, "__name__", field.type)) for field in attrs.fields(kind)
    }
    values: dict[str, Any] = {
        name: VALUES[kind.split("[")[0].split(" ")[0]] for name, kind in types.items()
    }
    return kind(**values)


def pressure(**given: Any) -> events.PoolPressure:
    record = made(events.PoolPressure)
    assert isinstance(record, events.PoolPressure)
    return attrs.evolve(record, **given)


@pytest.fixture
def plain() -> Iterator[None]:
    """A program that did not configure structlog."""
    was_configured, before = structlog.is_configured(), structlog.get_config()
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()
    if was_configured:
        structlog.configure(**before)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
@pytest.mark.usefixtures("plain")
def test_no_field_takes_a_name_that_a_log_has_of_its_own(
    kind: type[events.Event], caplog: pytest.LogCaptureFixture
) -> None:
    record = made(kind)
    logged = record.logged()
    assert not logged.keys() & RESERVED
    assert list(logged.values()) == list(record.facts().values())
    with caplog.at_level(logging.DEBUG, logger="featcache"):
        events.log_event(record)
    (line,) = caplog.records
    assert line.levelname == record.severity.upper()
    assert line.getMessage().startswith(f"{kind.name} pool=x ")
    assert {name: getattr(line, name) for name in logged} == logged


@pytest.mark.usefixtures("plain")
def test_the_pressure_stands_in_a_log_of_structlog(capsys: pytest.CaptureFixture[str]) -> None:
    structlog.configure(
        processors=[
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(),
            structlog.processors.JSONRenderer(),
        ]
    )
    events.emit(pressure(level="exhausted", previous="high"))
    line = json.loads(capsys.readouterr().out)
    assert (line["pressure"], line["previous"], line["level"]) == ("exhausted", "high", "info")
    assert line["event"] == "featcache.pool.pressure"


def test_puts_that_wait_without_a_break_are_worth_a_warning() -> None:
    given = [("high", "high"), ("exhausted", "high"), ("exhausted", "exhausted")]
    levels = [pressure(level=level, previous=before).urgency for level, before in given]
    assert levels == ["info", "info", "warning"]


@pytest.mark.usefixtures("plain")
async def test_a_pool_says_nothing_on_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    async with pair() as (owner, client):
        await client.get(await owner.put(filled(64)))
    assert capfd.readouterr().out == ""


@pytest.mark.usefixtures("plain")
def test_structlog_that_is_configured_later_is_used_from_then_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="featcache"):
        events.emit(made(events.PutWaited))
        with capture_logs() as logs:
            events.emit(made(events.PutWaited))
    assert (len(caplog.records), len(logs)) == (1, 1)


@pytest.mark.usefixtures("plain")
def test_a_record_that_is_filtered_is_never_formatted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events.PutWaited, "facts", lambda _: pytest.fail("it was"))
    logging.getLogger("featcache").setLevel(logging.WARNING)
    try:
        events.log_event(made(events.PutWaited))
    finally:
        logging.getLogger("featcache").setLevel(logging.NOTSET)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    events.log_event(made(events.PutWaited))


@pytest.mark.usefixtures("plain")
def test_what_others_named_stays_on_its_line(caplog: pytest.LogCaptureFixture) -> None:
    names = ("two words", 'a"quote', "line\nbreak", "é ü", "a=b", "\ud800")
    with caplog.at_level(logging.INFO, logger="featcache"):
        for name in names:
            events.log_event(events.ReaderLeft(pool="ab", session=1, reader=name, pid=7))
    for name, line in zip(names, caplog.messages, strict=True):
        start, end = "featcache.reader.left pool=ab session=1 reader=", " pid=7"
        assert json.loads(line.removeprefix(start).removesuffix(end)) == name
        assert line.isprintable()


ALONE = """
import logging, sys
from featcache import events
def tell():
    events.emit(events.ReaderLeft(pool="ab", session=1, reader=None, pid=7))
    events.emit(events.OwnerGone(pool="ab", endpoint="e", reason="it ended"))
tell()
logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(levelname)s %(name)s %(endpoint)s")
tell()
"""


def test_with_nothing_configured_warnings_reach_stderr_and_nothing_stdout() -> None:
    ran = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=True)
    assert ran.stderr == 'featcache.owner.lost pool=ab endpoint=e reason="it ended"\n'
    assert ran.stdout == "WARNING featcache e\n"  # where the program asked for it, and no more


# --- hooks ---------------------------------------------------------------------------------------


class Asleep:
    async def __call__(self, event: events.Event) -> None:
        raise NotImplementedError


async def coroutine(event: events.Event) -> None:
    raise NotImplementedError


@pytest.mark.parametrize("hook", [None, "print", 3, [], coroutine, Asleep()])
def test_a_hook_that_can_not_be_called_is_refused(hook: Any) -> None:
    with pytest.raises(SettingsError, match="hook"):
        events.add_hook(hook)


class Counting:
    def __init__(self) -> None:
        self.seen = 0

    def count(self, _: events.Event) -> None:
        self.seen += 1


def test_a_method_that_was_added_is_removed() -> None:
    counting = Counting()
    events.add_hook(counting.count)
    events.emit(made(events.PutWaited))
    events.remove_hook(counting.count)
    events.emit(made(events.PutWaited))
    assert counting.seen == 1


def test_the_log_can_be_removed_by_either_name(capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("log_event", "log_to_structlog"):
        with capture_logs() as logs:
            events.remove_hook(getattr(events, name))
            try:
                events.emit(made(events.OwnerGone))
            finally:
                events.add_hook(events.log_event)
        assert logs == []
    assert capfd.readouterr() == ("", "")


def test_a_hook_that_fails_where_there_is_no_stderr_harms_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(event: events.Event) -> None:
        raise ZeroDivisionError

    events.add_hook(broken)
    monkeypatch.setattr(sys, "stderr", None)
    try:
        events.emit(made(events.PutWaited))
    finally:
        events.remove_hook(broken)
    assert "ZeroDivisionError" not in capsys.readouterr().out
