"""Views that are made from nothing and emptied again."""

import pytest
import torch

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
    with pytest.raises(RuntimeError, match="resizable"):
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
