"""What runs in other processes than the tests."""

from multiprocessing.connection import Connection


def read_refs(endpoint: str, name: str, pipe: Connection) -> None:
    """A reader: gets or borrows what it is sent, and answers with the sum."""
    import asyncio

    import featcache
    from featcache import FeatureRef

    async def main() -> None:
        async with featcache.connect(endpoint, name=name) as client:
            pipe.send("ready")
            while (order := await asyncio.to_thread(pipe.recv)) is not None:
                how, data = order
                ref = FeatureRef.from_bytes(data)
                if how == "get":
                    feature = await client.get(ref)
                    assert not isinstance(feature, dict)
                    pipe.send(int(feature.long().sum()))
                else:
                    async with client.borrow(ref) as view:
                        assert not isinstance(view, dict)
                        pipe.send(int(view.long().sum()))

    asyncio.run(main())


def write_into_view(endpoint: str, data: bytes) -> None:
    """A reader that breaks the rule: it writes to what it borrowed."""
    import asyncio
    import faulthandler

    import featcache
    from featcache import FeatureRef

    faulthandler.disable()

    async def main() -> None:
        ref = FeatureRef.from_bytes(data)
        async with featcache.connect(endpoint) as client, client.borrow(ref) as view:
            assert not isinstance(view, dict)
            view.fill_(9)

    asyncio.run(main())
