"""Readers in processes of their own, with their own CUDA contexts, that read what they are told."""

import faulthandler
from typing import Any

import torch

import featcache
from featcache import FeatureRef
from support.caches import small, tensor
from support.processes import Pipe

BUSY_CYCLES = 100_000_000


def of_seed(seed: int, nbytes: int, device: torch.device | str) -> torch.Tensor:
    """Bytes that tell by themselves which feature they are of, at every place."""
    places = torch.arange(nbytes, device=device, dtype=torch.int64)
    return ((places * 7 + places // 256 + seed * 13) % 251).to(torch.uint8)


def wrong_in(found: Any, seed: int) -> torch.Tensor:
    """Whether a feature is not the one of this seed: a flag that comes in the stream's order."""
    value = tensor(found)
    return (value != of_seed(seed, value.numel(), value.device)).any()


async def far_reader(pipe: Pipe) -> None:
    """Follow orders: ("read", endpoint, device, settings), then ("ref", how, seed, data)…, ("end",)."""
    while (order := await pipe.hear())[0] != "stop":
        _, endpoint, device, changes = order
        async with featcache.connect(endpoint, device=device, settings=small(**changes)) as client:
            pipe.say("attached")
            flags = []
            while (message := await pipe.hear())[0] == "ref":
                _, how, seed, data = message
                flags.append(await read(client, how, seed, FeatureRef.from_bytes(data)))
            wrong = sum(bool(flag) for flag in flags)
            on_gpu = sum(flag.is_cuda for flag in flags)
        pipe.say("read", len(flags), wrong, on_gpu)


async def read(
    client: featcache.FeatureClient, how: str, seed: int, ref: FeatureRef
) -> torch.Tensor:
    if how == "get":
        return wrong_in(await client.get(ref), seed)
    async with client.borrow(ref) as view:
        if how == "slow" and tensor(view).is_cuda:
            torch.cuda._sleep(BUSY_CYCLES)  # type: ignore[no-untyped-call]
        return wrong_in(view, seed)


async def named_reader(pipe: Pipe, endpoint: str, name: str) -> None:
    """Get or borrow what it is sent, and answer with the sum, until told to leave."""
    async with featcache.connect(endpoint, name=name) as client:
        pipe.say("ready")
        while (order := await pipe.hear())[0] != "leave":
            how, ref = order[0], FeatureRef.from_bytes(order[1])
            if how == "get":
                total = tensor(await client.get(ref)).long().sum()
            else:
                async with client.borrow(ref) as view:
                    total = tensor(view).long().sum()
            pipe.say(int(total))


async def view_writer(_: Pipe, endpoint: str, data: bytes) -> None:
    """Break the rule: write to what is borrowed."""
    faulthandler.disable()
    ref = FeatureRef.from_bytes(data)
    async with featcache.connect(endpoint) as client, client.borrow(ref) as view:
        tensor(view).fill_(9)
