"""What a terminal can show, and what the states of a slab look like on it.

The colours of the states are of the palette of Okabe and Ito, which those who don't tell red from green
tell apart; letters say the same where there is no colour.
"""

import os
from collections.abc import Mapping
from functools import cache
from typing import Final, Literal

import attrs

Colours = Literal["full", "basic", "none"]

STATES: Final = (
    ("f", "free"),
    ("s", "reserved"),
    ("o", "owed"),
    ("k", "kept"),
    ("p", "pinned"),
    ("r", "read"),
)
"""The letter of each state in a `SlabMap`, and its name."""
UNCOMMITTED: Final = "."
AGES_S: Final = (1.0, 10.0, 60.0, 600.0)
"""Where the next darker shade begins."""
OLD: Final = 3
"""The first shade that has a capital where letters stand for colours."""

_RGB: Final = {
    "s": (240, 228, 66),
    "o": (230, 130, 0),
    "k": (70, 150, 220),
    "p": (222, 88, 176),
    "r": (0, 190, 135),
}
_BASIC: Final = {"s": "yellow", "o": "red", "k": "blue", "p": "magenta", "r": "green"}
_SHADES: Final = (1.0, 0.82, 0.66, 0.52, 0.4)
FREE: Final = "#39404b"
_LEVELS: Final = {
    "full": {"normal": "#00be87", "elevated": "#f0e442", "high": "#e68200", "exhausted": "#ff5555"},
    "basic": {"normal": "green", "elevated": "yellow", "high": "red", "exhausted": "bold red"},
    "none": {"exhausted": "bold"},
}
_EIGHTHS: Final = " ▁▂▃▄▅▆▇█"
_INK: Final = " .:-=+*#%@"
LEVEL_LETTERS: Final = {"normal": ".", "elevated": "e", "high": "h", "exhausted": "X"}


@attrs.frozen
class Look:
    """The means of a terminal."""

    colours: Colours = "none"
    unicode: bool = True
    letters: bool = False
    """Letters for the states of the map, though there are colours."""

    @property
    def in_letters(self) -> bool:
        """Whether the map is drawn with letters."""
        return self.letters or self.colours == "none" or not self.unicode

    def other(self) -> "Look":
        """Return the same with letters for colours, or colours for letters."""
        return attrs.evolve(self, letters=not self.letters)

    def level(self, level: str) -> str:
        """Return the style of a pressure level."""
        return _LEVELS[self.colours].get(level, "")

    def state(self, letter: str, shade: int) -> str:
        """Return the style of a state's ink; shade 0 is the youngest."""
        if letter not in _RGB:
            return "" if self.colours == "none" else "bright_black"
        if self.colours == "full":
            return _rgb(letter, shade)
        if self.colours == "basic":
            return _basic(letter, shade)
        return ("bold", "bold", "", "dim", "dim")[shade]

    def cell(self, letter: str, used: float, age_s: float) -> tuple[str, str]:
        """Return what a cell of the map is drawn as, and its style: a text of one column."""
        shade = shade_of(age_s)
        known = letter in _RGB
        if self.in_letters:
            if not known:
                return self.empty(letter), self.state(letter, 0)
            return (letter.upper() if shade >= OLD else letter), self.state(letter, shade)
        if not known:
            style = f"on {FREE}" if letter == "f" and self.colours == "full" else "bright_black"
            return (" " if style.startswith("on ") else self.empty(letter)), style
        ink = self.state(letter, shade)
        eighth = min(8, max(1, round(used * 8)))
        if self.colours == "full":
            # A full cell by its background, which leaves no seam between rows.
            return (
                (" ", f"on {ink}")
                if eighth == len(_EIGHTHS) - 1
                else (
                    _EIGHTHS[eighth],
                    f"{ink} on {FREE}",
                )
            )
        return _EIGHTHS[eighth], ink

    def empty(self, letter: str) -> str:
        """Return what a cell without a feature is drawn as where it has no background."""
        if letter == UNCOMMITTED:
            return " " if self.unicode and not self.in_letters else "-"
        return "·" if self.unicode else "."

    def bar(self, share: float, height: int, row: int, style: str) -> tuple[str, str]:
        """Return the part of a bar, `height` rows high, in a row counted from the bottom, and its style."""
        part = min(1.0, max(0.0, share * height - row))
        ramp = _EIGHTHS if self.unicode else _INK
        steps = len(ramp) - 1
        step = round(part * steps)
        if share > 0 and row == 0:
            step = max(1, step)
        if step == steps and self.colours == "full" and self.unicode and style:
            return " ", f"on {style}"
        return ramp[step], style


def shade_of(age_s: float) -> int:
    """Return how dark something of an age is, 0 to 4."""
    return sum(age_s >= from_s for from_s in AGES_S)


@cache
def _rgb(letter: str, shade: int) -> str:
    red, green, blue = (round(part * _SHADES[shade]) for part in _RGB[letter])
    return f"#{red:02x}{green:02x}{blue:02x}"


@cache
def _basic(letter: str, shade: int) -> str:
    name = _BASIC[letter]
    return (f"bright_{name}", f"bright_{name}", name, name, f"dim {name}")[shade]


def look_of(
    environment: Mapping[str, str], encoding: str | None, color_system: str | None, *, plain: bool
) -> Look:
    """Return what a terminal can show.

    Args:
        environment: that of the process: ``NO_COLOR``, ``TERM``.
        encoding: of what is written to.
        color_system: as rich has it: None, ``standard``, ``256``, ``truecolor``.
        plain: ASCII alone was asked for.

    """
    dumb = environment.get("TERM", "").lower() in {"dumb", "unknown"}
    unicode = not plain and not dumb and "utf" in (encoding or "").lower()
    if environment.get("NO_COLOR") or dumb or color_system is None:
        return Look("none", unicode)
    return Look("basic" if color_system == "standard" else "full", unicode)


def this_look(color_system: str | None, encoding: str | None, *, plain: bool) -> Look:
    """Return `look_of` this process's environment."""
    return look_of(os.environ, encoding, color_system, plain=plain)
