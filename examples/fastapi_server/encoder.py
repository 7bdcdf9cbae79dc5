"""Stands for a vision encoder: patches, attention, one vector for each patch. On the CPU, untrained."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

VERSION = b"toy-vit-1\0"  # part of every key: other weights make other features
SIDE, PATCH, WIDTH = 224, 16, 192
MAX_PIXELS = 64_000_000


class BadPicture(ValueError):
    """The bytes are no picture, or one that is too large."""


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True, dropout=0.0)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """From (3, 224, 224) to (196, 192)."""
        patches = self.embed(pixels[None]).flatten(2).transpose(1, 2)
        encoded: Tensor = self.layers(patches)
        return encoded[0]


def load() -> Encoder:
    """The same weights in every process, as from a file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return Encoder().eval().requires_grad_(False)


def encode(encoder: Encoder, data: bytes) -> Tensor:
    """Decode a picture's file and encode it. Runs in a thread: torch and Pillow drop the GIL."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadPicture(f"a picture may have {MAX_PIXELS} pixels")
            picture = np.array(image.convert("RGB").resize((SIDE, SIDE)))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadPicture(f"not a picture that can be read: {error}") from error
    features: Tensor = encoder(torch.from_numpy(picture).permute(2, 0, 1).float().div_(255))
    return features
