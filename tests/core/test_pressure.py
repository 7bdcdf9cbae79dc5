"""The level of use, and how often it is worth an event."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featcache.core.pressure import PressureGauge, PressureLevel

NORMAL, ELEVATED, HIGH, EXHAUSTED = PressureLevel
LOG_S, REPEAT_S = 1.0, 10.0


def gauge(log_s: float = LOG_S, repeat_s: float = REPEAT_S) -> PressureGauge:
    return PressureGauge(log_s, repeat_s)


def level_of(*steps: tuple[int, int]) -> PressureLevel:
    """The level after these percentages and numbers of waiters."""
    made = gauge()
    for percent, waiters in steps:
        made.observe(percent, 100, waiters)
    return made.level


# --- levels -----------------------------------------------------------------------------------


def test_levels_are_ranked_by_how_bad_they_are() -> None:
    assert [level.rank for level in (NORMAL, ELEVATED, HIGH, EXHAUSTED)] == [0, 1, 2, 3]
    assert [level.value for level in PressureLevel] == ["normal", "elevated", "high", "exhausted"]


@pytest.mark.parametrize(
    ("percent", "level"),
    [(0, NORMAL), (74, NORMAL), (75, ELEVATED), (89, ELEVATED), (90, HIGH), (100, HIGH)],
)
def test_a_level_is_reached_at_its_mark(percent: int, level: PressureLevel) -> None:
    assert level_of((percent, 0)) is level


@pytest.mark.parametrize("percent", [0, 80, 100])
def test_a_pool_is_exhausted_when_somebody_waits_however_full_it_is(percent: int) -> None:
    """Slots run out, or a large feature waits for one piece, with bytes to spare."""
    assert level_of((percent, 1)) is EXHAUSTED


@pytest.mark.parametrize(
    ("before", "after", "level"),
    [
        (90, 86, HIGH),
        (90, 84, ELEVATED),
        (90, 71, ELEVATED),
        (90, 69, NORMAL),
        (75, 71, ELEVATED),
        (75, 69, NORMAL),
        (75, 89, ELEVATED),
        (74, 71, NORMAL),
        (89, 86, ELEVATED),
    ],
)
def test_a_level_is_left_only_clearly_under_its_mark(
    before: int, after: int, level: PressureLevel
) -> None:
    assert level_of((before, 0), (after, 0)) is level


def test_a_level_that_was_left_is_reached_again_at_its_mark_only() -> None:
    assert level_of((90, 0), (84, 0), (86, 0)) is ELEVATED
    assert level_of((90, 0), (84, 0), (90, 0)) is HIGH
    assert level_of((75, 0), (69, 0), (71, 0)) is NORMAL


@pytest.mark.parametrize(
    ("percent", "level"), [(90, HIGH), (86, HIGH), (84, ELEVATED), (71, ELEVATED), (69, NORMAL)]
)
def test_when_nobody_waits_any_more_the_use_decides(percent: int, level: PressureLevel) -> None:
    assert level_of((100, 2), (percent, 0)) is level


def test_use_around_a_mark_does_not_flap() -> None:
    made = gauge()
    changes = sum(made.observe(percent, 100, 0) for percent in [89, 91] * 20 + [74, 76] * 20)
    assert changes == 3  # elevated, high, elevated


def test_observe_tells_whether_the_level_changed() -> None:
    made = gauge()
    assert not made.observe(10, 100, 0)
    assert made.observe(80, 100, 0)
    assert not made.observe(81, 100, 0)
    assert made.observe(81, 100, 1)
    assert not made.observe(99, 100, 5)
    assert made.observe(0, 100, 0)


# --- reports ----------------------------------------------------------------------------------


def test_a_calm_pool_reports_nothing() -> None:
    made = gauge()
    for now_s in range(100):
        made.observe(50, 100, 0)
        assert made.due(float(now_s)) is None


def test_a_rise_is_reported_at_once_with_the_level_before_it() -> None:
    made = gauge()
    reports = []
    for percent, waiters in [(75, 0), (90, 0), (90, 1)]:
        made.observe(percent, 100, waiters)
        reports.append((made.due(0.0), made.reported))
        assert made.due(0.0) is None
    assert reports == [(NORMAL, ELEVATED), (ELEVATED, HIGH), (HIGH, EXHAUSTED)]


def test_a_level_that_was_passed_over_is_not_reported() -> None:
    made = gauge()
    made.observe(80, 100, 0)
    made.observe(100, 100, 3)
    assert made.due(0.0) is NORMAL
    assert made.reported is EXHAUSTED


def test_a_fall_is_reported_an_interval_after_the_last_report() -> None:
    made = gauge()
    made.observe(100, 100, 1)
    made.due(0.0)
    made.observe(0, 100, 0)
    assert made.due(0.0) is None
    assert made.due(LOG_S - 0.25) is None
    assert made.due(LOG_S) is EXHAUSTED
    assert made.reported is NORMAL
    assert made.due(LOG_S) is None


def test_a_fall_that_ended_before_its_report_is_no_event() -> None:
    made = gauge()
    made.observe(95, 100, 0)
    made.due(0.0)
    made.observe(10, 100, 0)
    assert made.due(LOG_S / 2) is None
    made.observe(95, 100, 0)
    assert made.due(LOG_S) is None
    assert made.due(LOG_S * 2) is None


@pytest.mark.parametrize(("percent", "waiters"), [(90, 0), (90, 1)])
def test_a_high_level_is_reported_again_at_its_interval(percent: int, waiters: int) -> None:
    made = gauge()
    made.observe(percent, 100, waiters)
    times = [now_s for now_s in range(35) if made.due(float(now_s)) is not None]
    assert times == [0, 10, 20, 30]


@pytest.mark.parametrize("percent", [0, 80])
def test_a_level_that_is_not_high_is_reported_once(percent: int) -> None:
    made = gauge()
    made.observe(95, 100, 0)
    made.due(0.0)
    made.observe(percent, 100, 0)
    times = [now_s for now_s in range(1, 50) if made.due(float(now_s)) is not None]
    assert times == [1]


def test_a_repetition_says_that_the_level_is_the_same() -> None:
    made = gauge()
    made.observe(90, 100, 0)
    made.due(0.0)
    assert made.due(REPEAT_S) is HIGH
    assert made.reported is HIGH


def test_exhausted_flapping_does_not_spam() -> None:
    """A pool that runs full at every burst: a put waits for a moment, many times a second."""
    made = gauge()
    reports = 0
    for step in range(1000):  # 10 s, each put waiting for a hundredth of one
        made.observe(80, 100, step % 2)
        reports += made.due(step / 100) is not None
    assert 2 <= reports <= 2 * 10 + 2  # to exhausted and back, once a second


def test_observe_alone_never_counts_as_a_report() -> None:
    made = gauge()
    for waiters in [1, 0] * 50:
        made.observe(10, 100, waiters)
    assert made.reported is NORMAL
    made.observe(10, 100, 1)
    assert made.due(0.0) is NORMAL


# Pauses whose sums are exact.
ticks = st.tuples(st.sampled_from([0.0, 0.0625, 0.25, 1.0]), st.integers(0, 100), st.integers(0, 1))


@given(st.lists(ticks, max_size=60))
def test_each_level_is_reported_at_most_once_an_interval(
    steps: list[tuple[float, int, int]],
) -> None:
    made = gauge(repeat_s=2.0)
    now_s, told = 0.0, dict[PressureLevel, float]()
    for pause_s, percent, waiters in steps:
        now_s += pause_s
        made.observe(percent, 100, waiters)
        before = made.reported
        previous = made.due(now_s)
        if previous is None:
            assert made.reported is before
            assert made.level.rank <= before.rank or now_s - told[made.level] < LOG_S
            continue
        assert previous is before
        assert made.reported is made.level
        assert now_s - told.get(made.level, -REPEAT_S) >= LOG_S
        told[made.level] = now_s


@given(st.lists(ticks, max_size=60))
def test_a_level_that_stays_is_reported_in_the_end(steps: list[tuple[float, int, int]]) -> None:
    made, now_s = gauge(), 0.0
    for pause_s, percent, waiters in steps:
        now_s += pause_s
        made.observe(percent, 100, waiters)
        made.due(now_s)
    made.due(now_s + LOG_S)
    assert made.reported is made.level
