"""The examples are run as scripts, in processes of their own."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.programs import Program

EXAMPLES = Path(__file__).parents[2] / "examples"


Start = Callable[..., AbstractContextManager[Program]]


@pytest.fixture(scope="session")
def start() -> Start:
    """Start an example by its path under examples/ and its arguments; killed at the end."""

    @contextmanager
    def started(path: str, *arguments: object) -> Iterator[Program]:
        # Not pytest's folder: a socket's path has to be short.
        with tempfile.TemporaryDirectory(prefix="fc-") as runtime:
            program = Program(EXAMPLES / path, *arguments, runtime=Path(runtime))
            with closing(program):
                yield program

    return started


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three small picture files, each of another kind and shape."""
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(7).integers(0, 256, (300, 400, 4), dtype=np.uint8)
    files = [folder / "colour.png", folder / "grey.jpg", folder / "alpha.png"]
    Image.fromarray(noise[:, :, :3]).save(files[0])
    Image.fromarray(noise[:250, :250, 0]).save(files[1])
    Image.fromarray(noise[:120]).save(files[2])
    return files
