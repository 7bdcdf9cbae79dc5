"""Features whose every word tells which feature it belongs to and where in it."""

from __future__ import annotations

import struct
from functools import cache
from typing import Any, Final

import attrs
import torch

from featcache import FeatureRef
from soak.turns import aside

_MASK: Final = (1 << 64) - 1
_PLACE: Final = 0x1E3779B97F4A7C15  # odd and irregular: no two features share a word at one place
_SEED: Final = 0x9E3779B97F4A7C15 ^ 0x5DEECE66D
_HEAD: Final = struct.Struct("<QI")
KEYS: Final = 48
_KEY_SEED: Final = 1 << 60
_LEAST_WORDS: Final = 16

Feature = torch.Tensor | dict[str, torch.Tensor]


@attrs.frozen
class Content:
    """What a feature holds: a function of its seed and its length in words of 8 bytes."""

    seed: int
    words: int

    @aside
    def make(self, device: Any) -> Feature:
        """Make the feature: a tensor, bytes of an odd number, or a dict of two."""
        whole = _words(self.seed, self.words, device)
        match self.seed % 4:
            case 1:
                return whole.view(torch.uint8)[:-3]
            case 2:
                return {"whole": whole, "few": _words(self.seed + 1, 5, device)}
            case _:
                return whole

    @aside
    def is_right(self, found: Feature) -> bool:
        """Whether these are the bytes, all of them and no others."""
        wanted = self.make(_device(found))
        if isinstance(wanted, dict) or isinstance(found, dict):
            return (
                isinstance(wanted, dict)
                and isinstance(found, dict)
                and wanted.keys() == found.keys()
                and all(_equal(found[name], wanted[name]) for name in wanted)
            )
        return _equal(found, wanted)


def _equal(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return (
        found.dtype == wanted.dtype and found.shape == wanted.shape and torch.equal(found, wanted)
    )


def _device(found: Feature) -> torch.device:
    return next(iter(found.values())).device if isinstance(found, dict) else found.device


@cache
def _places(device: str, words: int) -> torch.Tensor:
    """The places of as many words, on a device, made once in a process."""
    return torch.arange(words, dtype=torch.int64, device=device) * _PLACE


def _words(seed: int, words: int, device: Any) -> torch.Tensor:
    most = 1 << max(17, (words - 1).bit_length())
    start = (seed * _SEED + words) & _MASK
    return _places(str(device), most)[:words] + (start - (1 << 64) if start >> 63 else start)


def is_one_feature(found: Feature) -> bool:
    """Whether the bytes are a part of any one feature, from its beginning."""
    part = found["whole"] if isinstance(found, dict) and "whole" in found else found
    if isinstance(part, dict):
        return False
    flat = part.reshape(-1).view(torch.uint8)
    words = flat[: flat.numel() // 8 * 8].view(torch.int64)
    if not words.numel():
        return False
    starts = (
        words
        - _places(str(words.device), 1 << max(17, words.numel().bit_length()))[: words.numel()]
    )
    return bool((starts == starts[0]).all())


def warm() -> None:
    """Make what all processes share, before they are forked."""
    _places("cpu", 1 << 17)


def of_key(number: int, most_words: int) -> tuple[str, Content]:
    """A key, and all that is ever kept under it."""
    words = max(_LEAST_WORDS, most_words >> (number % 8))
    return f"key-{number}", Content(_KEY_SEED + number, words)


def pack(content: Content, ref: FeatureRef) -> bytes:
    """A message: what a ref's feature holds, and the ref."""
    return _HEAD.pack(content.seed, content.words) + ref.to_bytes()


def unpack(message: bytes) -> tuple[Content, FeatureRef]:
    """What `pack` made."""
    return Content(*_HEAD.unpack_from(message)), FeatureRef.from_bytes(message[_HEAD.size :])
