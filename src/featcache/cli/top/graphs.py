"""The map of the slab and the graphs over time, as lines."""

from collections.abc import Callable, Sequence

from rich.text import Text

from featcache import SlabMap
from featcache.cli.top.history import Sample
from featcache.cli.top.look import AGES_S, LEVEL_LETTERS, OLD, STATES, UNCOMMITTED, Look
from featcache.cli.top.short import short_age, short_size


def map_lines(slab: SlabMap | None, look: Look, width: int, height: int) -> list[Text]:
    """Return the slab by offset, row by row, the lowest first; it fills so many cells."""
    lines = [Text(no_wrap=True) for _ in range(height)]
    if slab is None or not slab.states:
        return lines
    count = len(slab.states)
    for at in range(width * height):
        cell = at * count // (width * height)
        text, style = look.cell(slab.states[cell], slab.used[cell], slab.ages_s[cell])
        lines[at // width].append(text, style)
    return lines


def legend(slab: SlabMap | None, look: Look, width: int) -> Text:
    """Return what the letters or colours of the map stand for, with the share of each, and of age."""
    shares, ages = _shares(slab), Text(no_wrap=True)
    if look.in_letters:
        ages.append(f"CAPS >{AGES_S[OLD - 1] / 60:.0f}m")
    else:
        for age_s in (0.0, *AGES_S):
            ages.append(*look.cell("k", 1.0, age_s))
        ages.append(f" >{AGES_S[-1] / 60:.0f}m")
    for gap in ("  ", " "):
        text = Text(no_wrap=True)
        for letter, name in STATES:
            share = shares.get(letter, 0.0)
            few = "<1%" if 0 < share < 0.005 else f"{share:.0%}"  # noqa: PLR2004 - less than shown
            text.append(*look.cell(letter, 1.0, 0.0)).append(f" {name} {few}{gap}")
        room = width - text.cell_len - ages.cell_len
        if room >= 0:
            return text.append(f"{'older ' if room > len('older ') else '':>{room}}").append_text(
                ages
            )
    return text


def _shares(slab: SlabMap | None) -> dict[str, float]:
    """Return the share of each state in the capacity, as far as the cells tell."""
    if slab is None or not slab.states:
        return {}
    found: dict[str, float] = {}
    for letter, used in zip(slab.states, slab.used, strict=True):
        if letter in "f" + UNCOMMITTED:
            found["f"] = found.get("f", 0.0) + 1
        else:
            found[letter] = found.get(letter, 0.0) + used
            found["f"] = found.get("f", 0.0) + 1 - used
    return {letter: amount / len(slab.states) for letter, amount in found.items()}


def map_title(slab: SlabMap | None, age_s: float) -> str:
    """Return what the map is of; its age, if it is not that of the frame."""
    if slab is None:
        return "slab: not seen yet"
    cell = slab.capacity_bytes / max(1, len(slab.states))
    old = f", {short_age(age_s)} old" if age_s else ""
    return f"slab by offset, 0 to {short_size(slab.capacity_bytes)}, {short_size(cell)} a cell{old}"


Value = Callable[[Sample, Look], tuple[float | None, str]]
"""The height of a sample's bar, 0 to 1 or None, and its style."""


def graph(
    samples: Sequence[Sample | None], value: Value, look: Look, width: int, height: int
) -> list[Text]:
    """Return bars over time, the newest at the right."""
    recent = samples[-width:]
    bars = [(None, "") if one is None else value(one, look) for one in recent]
    lines: list[Text] = []
    for row in reversed(range(height)):
        line = Text(" " * (width - len(recent)), no_wrap=True)
        for share, style in bars:
            line.append(*((" ", "") if share is None else look.bar(share, height, row, style)))
        lines.append(line)
    return lines


def level_strip(samples: Sequence[Sample | None], look: Look, width: int) -> Text:
    """Return a letter for the level at each moment; ``?`` where no look succeeded."""
    recent = samples[-width:]
    line = Text(" " * (width - len(recent)), no_wrap=True)
    for one in recent:
        if one is None:
            line.append("?", "bold")
        else:
            line.append(LEVEL_LETTERS.get(one.level, "?"), look.level(one.level))
    return line
