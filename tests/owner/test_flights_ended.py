"""A run that has ended is joined by nobody, also before the loop has told so."""

import asyncio

from featcache.owner.flights import Flight, Flights


async def test_a_run_that_has_just_ended_is_not_joined() -> None:
    """Else who asks again and again for what is gone already would never let the loop go on."""
    flights: Flights[str, int] = Flights()

    async def work(number: int) -> int:
        return number

    over = asyncio.ensure_future(work(1))
    await over
    flights._flights["k"] = Flight(over)  # as between a task's end and its callback
    assert "k" not in flights
    assert await flights.join("k", lambda: work(2)) == 2
