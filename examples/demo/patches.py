"""From a picture to the tensors that Qwen2-VL's vision encoder takes.

A picture is resized so that both sides are multiples of 28, normalised, repeated to make two
frames, and cut into patches of 2 frames x 14 x 14 pixels. Each patch is one row of `pixel_values`.
The encoder merges 2 x 2 neighbouring patches into one token, so the rows come merge block by merge
block, not line by line; `image_grid_thw` says how many patches there are in time, height and width.
"""

import math

import torch
from torch import Tensor

PATCH = 14
MERGE = 2
TEMPORAL = 2
FEATURES = 3 * TEMPORAL * PATCH * PATCH
FACTOR = PATCH * MERGE
MIN_PIXELS = 4 * FACTOR * FACTOR
MAX_PIXELS = 1280 * FACTOR * FACTOR
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def smart_size(
    height: int, width: int, *, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """The size nearest to (height, width) in multiples of 28, with as many pixels as is allowed."""
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"a picture of {width} x {height} is too long and thin: 200 to 1 at most")
    high = max(FACTOR, round(height / FACTOR) * FACTOR)
    wide = max(FACTOR, round(width / FACTOR) * FACTOR)
    if high * wide > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        high = max(FACTOR, math.floor(height / shrink / FACTOR) * FACTOR)
        wide = max(FACTOR, math.floor(width / shrink / FACTOR) * FACTOR)
    elif high * wide < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        high = math.ceil(height * grow / FACTOR) * FACTOR
        wide = math.ceil(width * grow / FACTOR) * FACTOR
    return high, wide


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """A (3, height, width) picture of whole numbers from 0 to 255 in another size, as floats."""
    resized = torch.nn.functional.interpolate(
        image[None].float(), size=size, mode="bicubic", antialias=True
    )
    return resized[0].round().clamp(0, 255)


def normalise(image: Tensor) -> Tensor:
    """A (3, height, width) picture with CLIP's mean taken off and divided by its deviation."""
    mean = torch.tensor(MEAN, device=image.device).view(3, 1, 1)
    std = torch.tensor(STD, device=image.device).view(3, 1, 1)
    return (image / 255 - mean) / std


def cut(frames: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Rows of patches from (time, 3, height, width), and the grid that they make."""
    time, channels, height, width = frames.shape
    grid = (time // TEMPORAL, height // PATCH, width // PATCH)
    blocks = frames.reshape(
        *(grid[0], TEMPORAL, channels),
        *(grid[1] // MERGE, MERGE, PATCH),
        *(grid[2] // MERGE, MERGE, PATCH),
    )
    # A row: time, block down, block across, patch down and across in its block.
    # In the row: channel, frame, pixel down, pixel across.
    rows = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return rows.reshape(math.prod(grid), -1).contiguous(), grid


def features(
    image: Tensor, *, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> dict[str, Tensor]:
    """The features of a (height, width, 3) picture of bytes, on its device."""
    size = smart_size(image.shape[0], image.shape[1], min_pixels=min_pixels, max_pixels=max_pixels)
    frame = normalise(resize(image.permute(2, 0, 1), size))
    rows, grid = cut(frame.expand(TEMPORAL, -1, -1, -1))
    return {
        "pixel_values": rows,
        "image_grid_thw": torch.tensor([grid], dtype=torch.int64, device=image.device),
    }
