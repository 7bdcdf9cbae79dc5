"""Mutations that keep msgpack whole, so that inputs pass its decoder and reach the checks behind."""

from __future__ import annotations

import random
from typing import Any, Final

import msgspec

_NUMBERS: Final = (0, 1, -1, 2, 255, 256, 4096, 1 << 20, (1 << 32) - 1, 1 << 32, 1 << 48)
_MORE: Final = ((1 << 48) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63))
_FLOATS: Final = (0.0, -1.0, 0.5, 1e308, float("inf"), float("nan"), 5e-324)
_TEXTS: Final = ("", "uint8", "bfloat16", "float4_e2m1fn_x2", "x" * 257, "\0", "\u00fc", "discard")
_OTHERS: Final[tuple[Any, ...]] = (None, True, [], {}, b"", b"\0" * 16, [[]], {"type": "goodbye"})


def mutate_body(body: bytes, chance: random.Random) -> bytes | None:
    """Change one value somewhere in a msgpack object; None if the bytes are none."""
    try:
        tree = msgspec.msgpack.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    try:
        return msgspec.msgpack.encode(_mutated(tree, chance))
    except (TypeError, ValueError, OverflowError, RecursionError):
        return None


def _mutated(value: Any, chance: random.Random) -> Any:
    """Go down to a value by chance, and replace, drop or double it."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        changed = dict(value)
        if chance.random() < 0.1:
            del changed[key]
        else:
            changed[key] = _mutated(value[key], chance)
        return changed
    if isinstance(value, list) and value and chance.random() < 0.9:
        at = chance.randrange(len(value))
        whole = list(value)
        way = chance.random()
        if way < 0.1:
            del whole[at]
        elif way < 0.2:
            whole.insert(at, value[at])
        else:
            whole[at] = _mutated(value[at], chance)
        return whole
    return _other(value, chance)


def _other(value: Any, chance: random.Random) -> Any:
    if isinstance(value, bool) and chance.random() < 0.9:
        return not value
    if isinstance(value, int):
        near = value + chance.choice((-1, 1, 256, -256))
        return chance.choice((near, chance.choice(_NUMBERS + _MORE), chance.getrandbits(48)))
    if isinstance(value, float):
        return chance.choice(_FLOATS)
    if isinstance(value, str):
        return chance.choice((value + "x", value[:-1], chance.choice(_TEXTS)))
    if isinstance(value, bytes):
        at = chance.randrange(len(value) + 1)
        return chance.choice((value[:at], value[:at] + chance.randbytes(1) + value[at + 1 :]))
    return chance.choice(_OTHERS + _NUMBERS)
