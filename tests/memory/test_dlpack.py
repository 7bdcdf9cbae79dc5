"""Storages over memory that torch did not allocate: whose it is says when it may go."""

import ctypes
import gc
import threading
from collections.abc import Iterator

import pytest
import torch

from featcache.memory import dlpack
from featcache.memory.dlpack import storage_over

CPU = torch.device("cpu")
NBYTES = 4096


class Lender:
    """Memory, and how often it was said to be free again, by which threads."""

    def __init__(self) -> None:
        self.memory = (ctypes.c_uint8 * NBYTES)(*[n % 251 for n in range(NBYTES)])
        self.gone: list[int] = []

    def lend(self) -> torch.UntypedStorage:
        address = ctypes.addressof(self.memory)
        return storage_over(address, NBYTES, CPU, lambda: self.gone.append(threading.get_ident()))


@pytest.fixture
def lender() -> Iterator[Lender]:
    before = len(dlpack._lent)
    yield Lender()
    gc.collect()
    assert len(dlpack._lent) == before


def test_it_is_the_very_memory(lender: Lender) -> None:
    storage = lender.lend()
    assert storage.data_ptr() == ctypes.addressof(lender.memory)
    assert storage.nbytes() == NBYTES
    seen = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (NBYTES,), (1,))
    assert seen.tolist() == list(lender.memory)
    lender.memory[7] = 99
    assert int(seen[7]) == 99
    with pytest.raises(RuntimeError, match="not resizable"):
        storage.resize_(2 * NBYTES)


def test_it_is_given_back_once_with_the_last_tensor(lender: Lender) -> None:
    storage = lender.lend()
    first = torch.empty(0, dtype=torch.int16).set_(storage, 2, (8,), (1,))
    part = first[3:5].view(torch.uint8)
    del storage, first
    gc.collect()
    assert lender.gone == []
    assert int(part[0]) == (2 * (2 + 3)) % 251
    del part
    assert lender.gone == [threading.get_ident()]
    gc.collect()
    assert len(lender.gone) == 1


def test_another_thread_drops_the_last_tensor(lender: Lender) -> None:
    box = [torch.empty(0, dtype=torch.uint8).set_(lender.lend(), 0, (NBYTES,), (1,))]
    worker = threading.Thread(target=box.clear)
    worker.start()
    worker.join(20)
    assert len(lender.gone) == 1
    assert lender.gone[0] != threading.get_ident()


def test_each_storage_is_a_loan_of_its_own(lender: Lender) -> None:
    loans = [lender.lend() for _ in range(50)]
    del loans[::2]
    assert len(lender.gone) == 25
    loans.clear()
    assert len(lender.gone) == 50


def test_the_graph_keeps_it_until_the_backward_pass(lender: Lender) -> None:
    weight = torch.ones(4, requires_grad=True)
    seen = torch.empty(0, dtype=torch.float32).set_(lender.lend(), 0, (4,), (1,))
    loss = (weight * seen).sum()
    del seen
    assert lender.gone == []
    torch.autograd.grad(loss, weight)
    del loss
    assert len(lender.gone) == 1


def test_torch_refuses(lender: Lender, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_capsule: object) -> torch.Tensor:
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setattr(dlpack, "from_dlpack", refuse)
        with pytest.raises(RuntimeError, match="no"):
            lender.lend()
    assert len(lender.gone) == 1


def test_at_the_end_of_the_process_nobody_is_called(
    lender: Lender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dlpack, "_lent", {})  # what others have lent here is not at its end
    storage = lender.lend()
    dlpack._forget()
    del storage
    assert lender.gone == []
