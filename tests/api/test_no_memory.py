"""Tensors without the memory that they speak of: refused, or taken for what they mean; never a crash."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import featcache
from featcache import FeatureCache, FeatureClient, SettingsError, content_key
from support.caches import KIB, filled, full, pair, small, spent, tensor, until

BASE = torch.arange(12.0).view(3, 4)


class Wrapper(torch.Tensor):
    """As DTensor and torchao's are: made of another tensor, with no memory of its own."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Wrapper":
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.__dict__["whole"] = inner
        return made

    def dequantize(self) -> torch.Tensor:
        whole: torch.Tensor = self.__dict__["whole"]
        return whole

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own is a constant
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"{func} of a wrapper")


class Labelled(torch.Tensor):
    """A subclass with memory, as those of torchvision are."""


def freed(value: torch.Tensor) -> torch.Tensor:
    value.untyped_storage().resize_(0)
    return value


def cut(value: torch.Tensor, nbytes: int) -> torch.Tensor:
    value.untyped_storage().resize_(nbytes)
    return value


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(3, 4)


def inside(transform: Any) -> torch.Tensor:
    """A tensor as a transform of torch.func passes it to its function."""
    found: list[torch.Tensor] = []

    def keep(value: torch.Tensor) -> torch.Tensor:
        found.append(value)
        return value.sum()

    transform(keep)(torch.ones(3, 4))
    return found[0]


NOTHING: dict[str, Callable[[], torch.Tensor]] = {
    "freed": lambda: freed(BASE.clone()),
    "freed, with an offset": lambda: freed(BASE.clone()[1:]),
    "freed, strided": lambda: freed(BASE.clone()[:, ::2]),
    "cut": lambda: cut(BASE.clone(), 40),
    "cut, with an offset": lambda: cut(BASE.clone()[1:], 40),
    "cut, with gaps": lambda: cut(torch.zeros(1000, 100)[:, ::50], 360_000),
    "a wrapper": lambda: Wrapper(BASE),
    "fake": fake,
    "functional": lambda: inside(torch.func.functionalize),
    "of vmap": lambda: inside(torch.vmap),
    "of grad": lambda: inside(torch.func.grad),
    "meta": lambda: torch.empty(3, 4, device="meta"),
    "sparse": BASE.to_sparse,
    "sparse by rows": BASE.to_sparse_csr,
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged),
    "lazy": torch.nn.UninitializedParameter,
}
NOT_FILLED = NOTHING | {
    "zeros": lambda: torch._efficientzerotensor((3, 4)),
    "expanded": lambda: torch.zeros(4).expand(3, 4),
    "overlapping": lambda: torch.zeros(6).as_strided((3, 4), (1, 1)),
}


async def refused_puts(name: str) -> None:
    """Put it in every way there is; each is refused, and nothing is left."""
    async with pair() as (owner, client):
        for form in (lambda x: x, lambda x: {"ok": BASE, "x": x}):
            value = form(NOTHING[name]())
            calls: list[Callable[[Any], Awaitable[Any]]] = [
                owner.put,
                client.put,
                lambda x: owner.put(x, key="k"),
                lambda x: client.get_or_put("k", lambda: x),
                lambda x: owner.get_or_put("k", lambda: x),
                lambda x: asyncio.to_thread(content_key, x),
            ]
            for call in calls:
                with pytest.raises(SettingsError):
                    await call(value)
            with pytest.raises(SettingsError):
                owner.put_nowait(value)
        await spent(owner)


async def refused_outs(name: str) -> None:
    """Get into it in every way there is; each is refused, and the read is still owed."""
    async with pair() as (owner, client):
        for user in (owner, client):
            for form in (lambda x: x, lambda x: {"ok": BASE.clone(), "x": x}):
                ref = await owner.put(form(BASE))
                await owner.put(form(BASE), key="k")
                value = form(NOT_FILLED[name]())
                with pytest.raises(SettingsError):
                    await user.get(ref, out=value)
                with pytest.raises(SettingsError):
                    user.get_nowait(ref, out=value)
                with pytest.raises(SettingsError):
                    await user.get("k", out=value)
                await user.get(ref)
        await owner.evict("k")
        await spent(owner)


async def gets_where_torch_makes_no_memory() -> None:
    async with pair() as (owner, client):
        for user in (owner, client):
            for value in (BASE, {"a": BASE}):
                ref = await owner.put(value)
                with FakeTensorMode(), pytest.raises(SettingsError, match="without memory"):
                    user.get_nowait(ref)
                with FakeTensorMode(), pytest.raises(SettingsError, match="without memory"):
                    await user.get(ref)
                await user.release(ref)
        await spent(owner)


def run_alone(case: str, name: str) -> None:
    """Run a case in a process of its own, which it may end."""
    source = Path(__file__)
    paths = [str(source.parents[1]), *sys.path]
    script = f"import asyncio; from api import test_no_memory as t; asyncio.run(t.{case})"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{name}: {done.returncode}\n{done.stderr[-2000:]}"


def test_puts_of_what_has_no_memory() -> None:
    run_alone("each(t.refused_puts, t.NOTHING)", "puts")


def test_gets_into_what_has_no_memory() -> None:
    run_alone("each(t.refused_outs, t.NOT_FILLED)", "outs")


def test_gets_where_torch_makes_no_memory() -> None:
    run_alone("gets_where_torch_makes_no_memory()", "modes")


async def each(case: Callable[[str], Awaitable[None]], names: dict[str, Any]) -> None:
    """Run a case with each name; the error says with which it failed."""
    for name in names:
        try:
            await case(name)
        except BaseException as error:
            error.add_note(f"with {name!r}")
            raise


# --- what torch can say the meaning of ---------------------------------------------------------------


def meant() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tensors of odd kinds, each with a plain one of its value."""
    zeros = torch._efficientzerotensor((3, 4))
    yield zeros, torch.zeros(3, 4)
    yield zeros[1:].T, torch.zeros(4, 2)
    odd = torch._efficientzerotensor((2, 3), dtype=torch.complex64).conj()
    yield odd, torch.zeros(2, 3, dtype=torch.complex64)
    yield odd.imag, torch.zeros(2, 3)
    yield torch.nn.Parameter(BASE.clone()), BASE
    yield BASE.clone().as_subclass(Labelled), BASE
    yield BASE.clone().T.as_subclass(Labelled), BASE.T
    yield torch.ones(2).expand(3, 2), torch.ones(3, 2)
    number = torch.tensor([1 + 2j, 3 - 4j])
    yield number.conj(), number.conj().resolve_conj()
    yield number.conj().imag, torch.tensor([-2.0, 4.0])


def test_what_torch_can_say_the_meaning_of() -> None:
    run_alone("right_values()", "values")


async def right_values() -> None:
    async with pair() as (owner, client):
        for given, value in meant():
            for writer in (owner, client):
                for form in (lambda x: x, lambda x: {"x": x}):
                    found = await client.get(await writer.put(form(given)))
                    copy = found["x"] if isinstance(found, dict) else found
                    assert type(copy) is torch.Tensor
                    assert torch.equal(copy, value)
            assert content_key(given) == content_key(value.clone())
        await spent(owner)


async def test_a_strided_put_in_a_mode_that_copies_nothing() -> None:
    value = BASE.T
    async with pair() as (owner, client):
        for writer in (owner, client):
            with FakeTensorMode():
                ref = await writer.put(value)
            assert torch.equal(tensor(await client.get(ref)), BASE.T)


async def test_the_error_says_how_to_make_it_plain() -> None:
    async with pair() as (owner, _):
        with pytest.raises(SettingsError, match=r"is a Wrapper.*dequantize\(\)"):
            await owner.put(Wrapper(BASE))
        with pytest.raises(SettingsError, match=r"feature\['x'\].*its storage has 0 bytes"):
            await owner.put({"x": freed(BASE.clone())})


# --- what loses its memory while a call waits --------------------------------------------------------


async def freed_in_the_queue(who: str) -> None:
    async with pair() as (owner, client):
        writer: FeatureCache | FeatureClient = owner if who == "owner" else client
        ref = await full(owner)
        source = filled(KIB, 3)
        putting = asyncio.create_task(writer.put(source))
        await until(lambda: owner.statistics().waiters == 1)
        freed(source)
        await client.release(ref)
        with pytest.raises(SettingsError, match="lost its memory"):
            await putting
        await spent(owner)


async def grown_in_the_queue(who: str) -> None:
    chosen = small(inline_bytes=0)
    async with (
        featcache.create(settings=chosen) as owner,
        featcache.connect(owner.endpoint, settings=chosen) as client,
    ):
        writer: FeatureCache | FeatureClient = owner if who == "owner" else client
        await client.get(await writer.put(filled(KIB)))
        ref = await full(owner)
        source = filled(KIB, 3)
        putting = asyncio.create_task(writer.put(source))
        await until(lambda: owner.statistics().waiters == 1)
        source.resize_(2 * KIB)  # would be copied over the next slot
        await client.release(ref)
        with pytest.raises(SettingsError, match="its shape"):
            await putting
        await spent(owner)


@pytest.mark.parametrize("who", ["owner", "client"])
@pytest.mark.parametrize("case", ["freed_in_the_queue", "grown_in_the_queue"])
def test_a_source_that_changes_while_its_put_waits(case: str, who: str) -> None:
    run_alone(f"{case}({who!r})", who)


def test_an_out_that_is_freed_while_its_get_waits() -> None:
    run_alone("out_freed()", "out")


async def out_freed() -> None:
    async with pair() as (owner, client):
        out = filled(KIB)
        getting = asyncio.create_task(client.get("k", out=out, timeout=20))
        await asyncio.sleep(0)
        freed(out)
        await owner.put(filled(KIB, 3), key="k")
        with pytest.raises(SettingsError, match="its storage has 0 bytes"):
            await getting
        await owner.evict("k")
        await spent(owner)


# --- out -------------------------------------------------------------------------------------------


async def test_a_borrowed_view_is_not_filled() -> None:
    async with pair() as (owner, client):
        for user in (owner, client):
            first, second = await owner.put(filled(KIB, 1)), await owner.put(filled(KIB, 2))
            async with user.borrow(first) as view:
                for out in (tensor(view), tensor(view)[:]):
                    with pytest.raises(SettingsError, match="borrowed view"):
                        await user.get(second, out=out)
                assert (tensor(view) == 1).all()
            await user.release(second)
        await spent(owner)


async def test_one_tensor_is_not_filled_twice() -> None:
    async with pair() as (owner, client):
        ref = await owner.put({"a": BASE, "b": BASE + 1, "none": torch.empty(0)})
        one, empty = BASE.clone(), torch.empty(0)
        with pytest.raises(SettingsError, match="two begin at one address"):
            await client.get(ref, out={"a": one, "b": one, "none": empty})
        both = torch.zeros(3, 8)  # side by side is well
        await client.get(ref, out={"a": both[:, :4], "b": both[:, 4:], "none": empty})
        assert torch.equal(both, torch.cat([BASE, BASE + 1], 1))


async def test_outs_of_autograd_and_of_inference_mode() -> None:
    with torch.inference_mode():
        inference = [torch.zeros(3, 4), torch.zeros(4, 3).T]
    leaves = [torch.nn.Parameter(torch.zeros(3, 4)), torch.nn.Parameter(torch.zeros(4, 3)).T]
    async with pair() as (owner, client):
        for out in inference + leaves:
            await client.get(await owner.put(BASE), out=out)
            assert torch.equal(out.detach(), BASE)


async def test_a_backward_that_saved_an_out_fails_rather_than_read_other_values() -> None:
    async with pair() as (owner, client):
        out, weight = torch.ones(3, 4), torch.ones(3, 4, requires_grad=True)
        total = (out * weight).sum()
        await client.get(await owner.put(BASE), out=out)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()  # type: ignore[no-untyped-call]
