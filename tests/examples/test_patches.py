import math
import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor

patches = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "demo" / "patches.py"))


def rows_by_loops(frames: Tensor) -> Tensor:
    """The layout written out: one patch after the other, one value after the other."""
    time, channels, height, width = frames.shape
    rows = []
    for t in range(0, time, 2):
        for block_y in range(0, height, 28):
            for block_x in range(0, width, 28):
                for y in (block_y, block_y + 14):
                    for x in (block_x, block_x + 14):
                        row = [
                            frames[t + frame, channel, y : y + 14, x : x + 14].flatten()
                            for channel in range(channels)
                            for frame in range(2)
                        ]
                        rows.append(torch.cat(row))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("time", "height", "width"), [(2, 28, 28), (2, 56, 28), (2, 28, 84), (4, 84, 56)]
)
def test_rows_come_in_merge_blocks(time: int, height: int, width: int) -> None:
    frames = torch.arange(time * 3 * height * width, dtype=torch.float32)
    frames = frames.view(time, 3, height, width)
    rows, grid = patches["cut"](frames)
    assert grid == (time // 2, height // 14, width // 14)
    assert rows.shape == (math.prod(grid), 1176)
    assert rows.is_contiguous()
    assert torch.equal(rows, rows_by_loops(frames))


def test_features_of_a_picture() -> None:
    picture = torch.randint(0, 256, (100, 150, 3), dtype=torch.uint8)
    features = patches["features"](picture)
    rows, grid = features["pixel_values"], features["image_grid_thw"]
    assert grid.dtype == torch.int64
    assert grid.tolist() == [[1, 8, 10]]
    assert rows.dtype == torch.float32
    assert rows.shape == (80, 1176)
    both = rows.view(80, 3, 2, 196)
    assert torch.equal(both[:, :, 0], both[:, :, 1])  # the same frame twice


def test_normalisation_is_that_of_clip() -> None:
    # 140 x 140 is already a multiple of 28: nothing is resized.
    colours = torch.tensor([10, 128, 250], dtype=torch.uint8)
    rows = patches["features"](colours.expand(140, 140, 3))["pixel_values"].view(-1, 3, 392)
    mean = [0.48145466, 0.4578275, 0.40821073]
    deviation = [0.26862954, 0.26130258, 0.27577711]
    for channel, colour in enumerate([10, 128, 250]):
        expected = (colour / 255 - mean[channel]) / deviation[channel]
        torch.testing.assert_close(rows[:, channel], torch.full_like(rows[:, channel], expected))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((280, 560), (280, 560)),
        ((300, 451), (308, 448)),
        ((1411, 1411), (980, 980)),  # shrunk to the most pixels that are allowed
        ((10, 10), (56, 56)),  # grown to the fewest
        ((20, 3000), (28, 2996)),
        ((42, 70), (56, 56)),  # halves go to the even multiple
    ],
)
def test_sizes_are_multiples_of_28_within_the_limits(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert patches["smart_size"](*size) == expected


def test_a_picture_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="too long and thin"):
        patches["smart_size"](10, 2001)


def test_resizing_keeps_to_bytes() -> None:
    picture = torch.zeros(3, 30, 30, dtype=torch.uint8)
    picture[:, :, 15:] = 255  # an edge, where bicubic filters overshoot
    resized = patches["resize"](picture, (56, 56))
    assert resized.min() == 0
    assert resized.max() == 255
    assert torch.equal(resized, resized.round())
