"""The examples are run as a user runs them: as scripts, in processes of their own."""

import os
import subprocess
import sys
import tempfile
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
    """A running example, with a runtime folder of its own."""

    def __init__(
        self, path: str, *arguments: object, runtime: Path, stderr: IO[str] | None
    ) -> None:
        self.mark = uuid.uuid4().hex
        self.runtime = runtime
        environment = {MARK: self.mark, "XDG_RUNTIME_DIR": str(runtime)}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "examples" / path), *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | environment | {"PYTHONPATH": str(ROOT / "src")},
        )

    def line(self, start: str) -> str:
        """The rest of the next line of output that begins with `start`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(start):
                return line.removeprefix(start).strip()
        raise AssertionError(f"no line began with {start!r}; exit code {self.process.wait()}")

    def output(self) -> str:
        """What it prints until it ends."""
        return self.process.communicate()[0]

    def ends(self, within: float = 20.0) -> int:
        """The exit code; nothing that it made may be left."""
        code = self.process.wait(within)
        self.assert_no_children()
        assert list((self.runtime / "featcache").glob("*")) == []
        return code

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

    def assert_no_children(self) -> None:
        give_up = time.monotonic() + 5
        while (children := self.children()) and time.monotonic() < give_up:
            time.sleep(0.02)
        assert children == []


Start = Callable[..., AbstractContextManager[Example]]


@pytest.fixture(scope="session")
def start() -> Start:
    """Start an example by its path under examples/ and its arguments; killed at the end."""

    @contextmanager
    def started(path: str, *arguments: object, stderr: IO[str] | None = None) -> Iterator[Example]:
        # Not pytest's folder: a socket's path has to be short.
        with tempfile.TemporaryDirectory(prefix="fc-") as runtime:
            example = Example(path, *arguments, runtime=Path(runtime), stderr=stderr)
            with example.process:
                try:
                    yield example
                finally:
                    for child in example.children():
                        child.kill()
                    example.process.kill()

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
