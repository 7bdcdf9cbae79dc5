"""What the tests of slabs share: a stream of their own, and a GPU that is left sound."""

from collections.abc import Iterator

import pytest
import torch

from support.slabs import HOME, stream_on, warm_up_gpus


@pytest.fixture
def side() -> torch.cuda.Stream:
    """A stream that is not torch's default one, and does not wait for it."""
    return stream_on(HOME)


@pytest.fixture(autouse=True)
def _sound(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test leaves the context broken, or work behind for the next."""
    on_gpu = request.node.get_closest_marker("gpu") is not None
    if on_gpu:
        warm_up_gpus()
    yield
    if on_gpu:
        torch.cuda.synchronize(HOME)
