"""What all tests share: profiles, the gpu mark, a runtime folder of their own, a look for leaks."""

import gc
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from featcache.memory.key_table import UNKNOWN, KeyTable
from support.leaks import difference, endpoint_files, mapped_memfds, open_descriptors, threads_ended
from support.slabs import PLACES, Place, Slab, check_devices, slab_params, warm_up_gpus

# A time limit on one example says more about the machine than about the code.
hypothesis.settings.register_profile("dev", deadline=None, max_examples=50)
hypothesis.settings.register_profile(
    "ci",
    deadline=None,
    derandomize=False,  # each run looks somewhere new; print_blob tells how to repeat a find
    max_examples=200,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],  # a busy machine is not a failure
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")

torch.set_num_threads(1)  # filling small tensors, two threads wait for each other more than they do


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: torch finds none here"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say in one line how many tests were skipped, and why."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    if reasons:
        counts = [f"{count} ({reason})" for reason, count in reasons.most_common()]
        terminalreporter.write_line(f"skipped: {', '.join(counts)}")


@pytest.fixture(scope="session", autouse=True)
def _thawed() -> Iterator[None]:
    """What `no_leaks` froze is looked through once more at the end, where pytest asks for it."""
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def runtime_dir() -> Iterator[Path]:
    """Gives each test, and the processes it starts, a runtime folder of its own.

    Not pytest's tmp_path: the path of a Unix socket holds 107 bytes, and that one is long.
    """
    path = Path(tempfile.mkdtemp(prefix="fc-"))  # mode 0700
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(path))
        yield path
    shutil.rmtree(path)


@pytest.fixture
def no_key_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions that can tell nothing by the key table: every lookup goes by message."""
    monkeypatch.setattr(KeyTable, "entry", lambda *_: (UNKNOWN, 0))


@pytest.fixture
def no_leaks(runtime_dir: Path) -> Iterator[None]:
    """Fails a test that leaves descriptors, mappings or endpoints behind, or closes others'.

    What lives before the test, all of torch among it, is frozen: the collection after it looks
    through what the test made, in a millisecond instead of a fifth of a second.
    """

    def state() -> dict[str, Counter[str]]:
        gc.collect()
        threads_ended()
        gc.collect()
        return {
            "descriptors": open_descriptors(),
            "mappings": mapped_memfds(),
            "endpoint files": endpoint_files(runtime_dir),
        }

    before = state()
    gc.freeze()
    yield
    after = state()
    changes = {kind: difference(before[kind], after[kind]) for kind in before}
    assert not any(changes.values()), f"not as before the test (+ left, - lost): {changes}"


@pytest.fixture(params=slab_params("host", "vmm", "ipc"))
def slab(request: pytest.FixtureRequest) -> Slab:
    """A kind of slab; those on a GPU are skipped where there is none."""
    found: Slab = request.param
    if found.kind != "host":
        warm_up_gpus()
    return found


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    """A kind of slab and who reads it."""
    found: Place = request.param
    check_devices(found)
    if torch.cuda.is_available():
        warm_up_gpus()
    return found
