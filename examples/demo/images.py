"""The pictures: those that scikit-image ships in its wheel, or files that the user names."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

SHIPPED = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "horse.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
    "text.png",
)


class BadPicture(Exception):
    """A picture that is not there or cannot be read."""


def choose(named: Sequence[Path]) -> list[Path]:
    """The files that the user named, else those of scikit-image."""
    if named:
        return list(named)
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise BadPicture("scikit-image is not installed: install it, or name files with --images")
    folder = Path(package.origin).parent / "data"
    found = [folder / name for name in SHIPPED if (folder / name).is_file()]
    if not found:
        raise BadPicture(f"no pictures in {folder}: name files with --images")
    return found


def load(path: Path) -> Tensor:
    """The picture as bytes in the shape (height, width, 3)."""
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(ImageOps.exif_transpose(image).convert("RGB")))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise BadPicture(f"cannot read {path}: {error}") from error
