"""A scrape as Prometheus reads it."""

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

Scraped = dict[str, dict[tuple[str, ...], float]]
"""By the sample's name, and the values of its labels: pool and device, then the rest."""


def parsed(text: str) -> Scraped:
    """The samples of a scrape, by the parser of prometheus_client."""
    found: Scraped = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            key = (labels.pop("pool", ""), labels.pop("device", ""), *labels.values())
            assert key not in found.setdefault(sample.name, {}), f"{sample.name} {key} stands twice"
            found[sample.name][key] = sample.value
    return found


def scraped(registry: CollectorRegistry) -> Scraped:
    return parsed(generate_latest(registry).decode())


def one(found: Scraped, name: str) -> float:
    """The one sample of a name."""
    (value,) = found[name].values()
    return value


def buckets(found: Scraped, name: str) -> list[float]:
    return list(found[f"{name}_bucket"].values())


async def answer(app: Any, headers: Iterable[tuple[bytes, bytes]] = ()) -> tuple[int, str]:
    """What an ASGI app says to a GET."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/",
        "query_string": b"",
        "headers": list(headers),
    }
    await app(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:]).decode()
