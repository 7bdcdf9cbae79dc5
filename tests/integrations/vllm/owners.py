"""An owner in a process of its own, to be killed and started again at one endpoint."""

import subprocess
import sys
from pathlib import Path
from typing import Any

_SCRIPT = """
import sys
from featcache import blocking
endpoint, capacity = sys.argv[1:]
with blocking.create(endpoint=endpoint, capacity=int(capacity)) as cache:
    print("serving", flush=True)
    sys.stdin.read()
"""


class Owner:
    """The process. It ends with its standard input."""

    def __init__(self, endpoint: Path, capacity_bytes: int = 64 << 20) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, str(endpoint), str(capacity_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "serving\n"

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        self._process.kill()
        self._end()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._end()

    def _end(self) -> None:
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def __enter__(self) -> "Owner":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._process.poll() is None:
            self.close()
