"""What the tests of the plugin share: tensors that pass for a GPU's, processors, ranks."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from integrations.sglang import real
from support.processes import Pipe

real.import_sglang()  # before the imports in the functions here


class OnGpu(torch.Tensor):
    """A tensor that SGLang takes for one on a GPU: it wraps no other."""

    is_cuda = True


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Any:
    return torch.randn(*shape).to(dtype).as_subclass(OnGpu)


@contextlib.contextmanager
def published(**fields: Any) -> Iterator[None]:
    """Publish SGLang's settings in this process, as its launcher does."""
    from sglang.srt.runtime_context import get_context

    override = get_context().override_server_args(mm_process_config={}, **fields)
    override.install()
    try:
        yield
    finally:
        override.restore()


@contextlib.contextmanager
def as_rank(rank: int) -> Iterator[None]:
    """Be a tensor-parallel rank, on a GPU whose number torch would know."""
    from sglang.srt.runtime_context import get_parallel

    with (
        get_parallel().override(tp_rank=rank),
        patch("torch.cuda.current_device", return_value=0),  # from_processor_output asks for it
    ):
        yield


def processor() -> Any:
    """SGLang's base processor, with its pool, in the server that is published."""
    from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor

    class Processor(BaseMultimodalProcessor):  # type: ignore[misc]
        models: list[Any] = []  # noqa: RUF012 - SGLang's form

        async def process_mm_data_async(self, *_: Any, **__: Any) -> None: ...

    return Processor(
        SimpleNamespace(), SimpleNamespace(base_gpu_id=0), SimpleNamespace(), "default"
    )


def item(feature: Any, **more: Any) -> Any:
    from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem

    return MultimodalDataItem(modality=Modality.IMAGE, hash=1, pad_value=1, feature=feature, **more)


def output(*items: Any) -> Any:
    from sglang.srt.managers.schedule_batch import MultimodalProcessorOutput

    return MultimodalProcessorOutput(input_ids=[1], mm_items=list(items))


async def rank(pipe: Pipe, number: int) -> None:
    """A scheduler rank: reads or gives up the requests that it hears, until it hears of no more."""
    from sglang.srt.managers.schedule_batch import MultimodalInputs

    while True:
        what, request = await pipe.hear()
        with as_rank(number):
            if what == "read":
                inputs = MultimodalInputs.from_processor_output(request)
                pipe.say([one.feature for one in inputs.mm_items])
            elif what == "give up":
                for one in request.mm_items:
                    one.release_transport_proxies()
                pipe.say("given up")
            elif what == "hold":
                borrowed = request.mm_items[0].feature.borrow_on_target_device(0)
                pipe.say(borrowed.sum().item())
