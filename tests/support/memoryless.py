"""Tensors that have not the memory that they speak of, or speak of it in an odd way."""

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses import FakeTensorMode

COUNT = 8
Make = Callable[[], torch.Tensor]


class Wrapper(torch.Tensor):
    """A subclass over another tensor, as torchao's are."""

    within: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Wrapper":
        """Make one that has its form, not its memory."""
        made: Wrapper = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device
        )
        made.within = inner
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch gives a function as its form
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Do nothing that a tensor does."""
        raise NotImplementedError(func)


def _whole() -> torch.Tensor:
    return torch.arange(1.0, COUNT + 1)


def freed() -> torch.Tensor:
    """One whose memory was given back, as FSDP does."""
    value = _whole()
    value.untyped_storage().resize_(0)
    return value


def shortened() -> torch.Tensor:
    """One whose memory ends before it does."""
    value = _whole()
    value.untyped_storage().resize_(16)
    return value


def past_the_end() -> torch.Tensor:
    """One that begins beyond its memory."""
    value = torch.ones(4 * COUNT)[3 * COUNT :]
    value.untyped_storage().resize_(COUNT)
    return value


def gaps_past_the_end() -> torch.Tensor:
    """One whose bytes would fit its memory, but not with the gaps between them."""
    value = torch.ones(2 * COUNT)[::2]
    value.untyped_storage().resize_(COUNT * value.element_size())
    return value


def fake() -> torch.Tensor:
    """One of torch.compile's."""
    with FakeTensorMode():
        return torch.ones(COUNT)


def batched() -> torch.Tensor:
    """One inside vmap."""
    seen: list[torch.Tensor] = []

    def see(one: torch.Tensor) -> torch.Tensor:
        seen.append(one)
        return one

    torch.vmap(see)(torch.ones(2, COUNT))
    return seen[0]


def differentiated() -> torch.Tensor:
    """One inside torch.func.grad, after its end."""
    seen: list[torch.Tensor] = []

    def see(one: torch.Tensor) -> torch.Tensor:
        seen.append(one)
        return one.sum()

    torch.func.grad(see)(torch.ones(COUNT))
    return seen[0]


def distributed() -> torch.Tensor:
    """One of a mesh of processes, which here is this one."""
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate

    if not dist.is_initialized():
        store = torch._C._distributed_c10d.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    return DTensor.from_local(torch.ones(COUNT), mesh, [Replicate()])


MEMORYLESS: dict[str, Make] = {
    "freed": freed,
    "shortened": shortened,
    "past the end": past_the_end,
    "gaps past the end": gaps_past_the_end,
    "fake": fake,
    "functional": lambda: torch._to_functional_tensor(torch.ones(COUNT)),
    "a wrapper": lambda: Wrapper(torch.ones(COUNT)),
    "masked": lambda: torch.masked.masked_tensor(
        torch.ones(COUNT), torch.ones(COUNT, dtype=torch.bool)
    ),
    "batched": batched,
    "differentiated": differentiated,
    "lazy": torch.nn.UninitializedParameter,
    "meta": lambda: torch.ones(COUNT, device="meta"),
    "sparse": lambda: torch.ones(COUNT).to_sparse(),
    "sparse rows": lambda: torch.eye(COUNT).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(COUNT), 1.0, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: torch.nested.nested_tensor(
        [torch.ones(2), torch.ones(3)], layout=torch.jagged
    ),
}
if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
    MEMORYLESS["mkldnn"] = lambda: torch.ones(COUNT).to_mkldnn()
if torch.distributed.is_available() and torch.distributed.is_gloo_available():
    MEMORYLESS["distributed"] = distributed


def _conjugated() -> torch.Tensor:
    return torch.complex(_whole(), _whole()).conj()


def _inference() -> torch.Tensor:
    with torch.inference_mode():
        return _whole()


ODD: dict[str, Make] = {
    "zeros": lambda: torch._efficientzerotensor(COUNT),
    "no zeros": lambda: torch._efficientzerotensor(0),
    "conjugated": _conjugated,
    "negated": lambda: _conjugated().imag,
    "a parameter": lambda: torch.nn.Parameter(_whole()),
    "a buffer": lambda: torch.nn.Buffer(_whole()),
    "with a gradient": lambda: _whole().requires_grad_() * 2,
    "expanded": lambda: torch.ones(1).expand(COUNT),
    "in the middle": lambda: _whole()[2:6],
    "with gaps": lambda: _whole()[1::2],
    "freed, of no elements": lambda: freed()[:0],
    "made in inference mode": _inference,
}
"""Those that torch can say the value of."""
