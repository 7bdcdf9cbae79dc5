"""Views that are made from nothing and emptied again."""

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.utils.dlpack import from_dlpack

from featcache.errors import StaleRef
from featcache.memory.views import invalidate, view_over

CPU = torch.device("cpu")


def view() -> torch.Tensor:
    storage = torch.arange(24, dtype=torch.int32).untyped_storage()
    return view_over(storage, 4, torch.int32, (2, 3), (3, 1), CPU)


def test_a_view_lies_where_it_is_told_to_and_is_no_view_of_torchs() -> None:
    made = view()
    assert made.tolist() == [[4, 5, 6], [7, 8, 9]]
    assert made._base is None


def test_an_emptied_view_has_nothing_and_cannot_grow() -> None:
    made, other = view(), view()
    row = made[0]
    invalidate(made)
    assert made.numel() == 0
    assert made.dtype is torch.int32
    assert row.tolist() == [4, 5, 6]
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(RuntimeError, match="resizable"):
        made.resize_(1)
    assert other.numel() == 6


def test_autograd_refuses_what_was_emptied_and_nothing_else() -> None:
    weight = torch.ones(2, 3, requires_grad=True)
    kept, emptied = view().view(torch.float32), view().view(torch.float32)
    sums = [(weight * each).sum() for each in (kept, emptied)]
    invalidate(emptied)
    invalidate(view())
    sums[0].backward()  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sums[1].backward()  # type: ignore[no-untyped-call]


def test_views_are_made_and_emptied_inside_inference_mode_and_out() -> None:
    with torch.inference_mode():
        inside = view()
        assert int(inside.sum()) == 39
    invalidate(inside)
    outside = view()
    with torch.inference_mode():
        invalidate(outside)
    assert inside.numel() == outside.numel() == 0


USES: dict[str, Callable[[torch.Tensor], object]] = {
    "a method": lambda ended: ended.sum(),
    "a function": torch.mean,
    "an operator": lambda ended: ended + 1,
    "the other operand": lambda ended: torch.ones(2, 3) * ended,
    "one of a list": lambda ended: torch.cat([torch.ones(2), ended]),
    "an index": lambda ended: ended[0],
    "a source": lambda ended: torch.zeros(0).copy_(ended),
    "a target": lambda ended: torch.add(torch.ones(0), 1, out=ended),
    "in place": lambda ended: ended.zero_(),
    "a shape": lambda ended: ended.view(-1),
    "a device": lambda ended: ended.to("cpu"),
    "a storage": lambda ended: ended.untyped_storage(),
    "a list": lambda ended: ended.tolist(),
    "a number": float,
    "a truth": bool,
    "a loop": list,
    "a layer": lambda ended: torch.nn.functional.linear(torch.ones(3), ended),
    "NumPy": np.asarray,
    "DLPack": from_dlpack,
    "a pickle": pickle.dumps,
    "a deep copy": copy.deepcopy,
    "a comparison": lambda ended: torch.equal(ended, torch.ones(0)),
}


@pytest.mark.parametrize("name", USES)
def test_what_computes_with_an_ended_view_is_refused(name: str) -> None:
    ended = view()
    invalidate(ended)
    with pytest.raises(StaleRef, match="end of its block"):
        USES[name](ended)


def test_an_ended_view_still_says_what_it_is() -> None:
    ended = view()
    invalidate(ended)
    assert (ended.numel(), len(ended), ended.nbytes, tuple(ended.shape)) == (0, 0, 0, (0,))
    assert (ended.dtype, ended.device, ended.is_cpu) == (torch.int32, CPU, True)
    assert "after its block" in repr(ended)
    assert "after its block" in f"{ended}"


def test_past_torchs_dispatch_an_ended_view_has_nothing() -> None:
    ended = view()
    invalidate(ended)
    assert ended.as_subclass(torch.Tensor).tolist() == []
    with torch._C.DisableTorchFunctionSubclass():
        assert ended.data_ptr() == 0
