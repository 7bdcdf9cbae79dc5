"""The examples are run as a user runs them: as scripts, in processes of their own."""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import psutil
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
MARK = "FEATCACHE_TEST_MARK"  # in the environment of an example and of all that it starts


class Example:
    """A running example."""

    def __init__(self, process: subprocess.Popen[str], mark: str) -> None:
        self.process = process
        self.mark = mark

    def line(self, start: str) -> str:
        """The rest of the next line of output that begins with `start`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(start):
                return line.removeprefix(start).strip()
        raise AssertionError(f"no line began with {start!r}; exit code {self.process.wait()}")

    def children(self) -> list[psutil.Process]:
        """The processes that it started and that still run, whoever their parent is by now."""
        found = []
        for process in psutil.process_iter():
            try:
                marked = process.environ().get(MARK) == self.mark
            except psutil.Error:  # gone, or of somebody else
                continue
            if marked and process.pid != self.process.pid:
                found.append(process)
        return found

    def assert_no_children(self, within: float = 5.0) -> None:
        give_up = time.monotonic() + within
        while (children := self.children()) and time.monotonic() < give_up:
            time.sleep(0.02)
        assert children == []


Start = Callable[..., AbstractContextManager[Example]]


@pytest.fixture(scope="session")
def start() -> Start:
    """Start an example by its path under examples/ and its arguments; killed at the end."""

    @contextmanager
    def started(path: str, *arguments: object, stderr: IO[str] | None = None) -> Iterator[Example]:
        mark = uuid.uuid4().hex
        source = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "examples" / path), *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | {MARK: mark, "PYTHONPATH": source.rstrip(os.pathsep)},
        )
        example = Example(process, mark)
        with process:
            try:
                yield example
            finally:
                for child in [process, *example.children()]:
                    child.kill()

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
