"""The class of a borrowed view after its block: it tells that it has nothing, and refuses to compute."""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from featcache.errors import StaleRef

ENDED: Final = (
    "this view was lent until the end of its block, and its bytes may be another feature's by now: use "
    "it inside the block, or get() a copy"
)
_ATTRIBUTES: Final = (
    "dtype device layout shape ndim nbytes itemsize is_cpu is_cuda requires_grad grad_fn"
)
_METHODS: Final = (
    "numel nelement size stride dim element_size get_device __len__ data_ptr is_contiguous"
)
_ANSWERED: Final[frozenset[Any]] = frozenset(
    [getattr(torch.Tensor, name).__get__ for name in _ATTRIBUTES.split()]
    + [getattr(torch.Tensor, name) for name in _METHODS.split()]
)
"""What an ended view still tells of itself: how much it has, which is nothing, and of which kind."""


class EndedView(torch.Tensor):
    """A borrowed view after its block: it has no elements, and every use of its values is refused.

    A view becomes one by assignment to its ``__class__``, which is what torch does to a lazy
    parameter that gets its memory: no new tensor, and the caller's own object is the one that refuses.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Tell what there is, which is nothing; raise StaleRef for whatever would compute with it."""
        if func in _ANSWERED:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        raise StaleRef(ENDED)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # untyped there
        """Say what it is; debuggers print it."""
        return "<a borrowed view after its block: no elements>"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        """Format as `repr`."""
        return format(repr(self), spec)
