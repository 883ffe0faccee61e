"""The metrics of a target, read before and after a load."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from baton.loadtest.http_stream import HttpBroken, HttpClient
from baton.loadtest.metrics_check import MetricsCheck, Scrape, compare, read
from baton.loadtest.samples import Sample
from baton.loadtest.spec import LoadError
from baton.loadtest.target import Target

_SCRAPE_S = 5.0
_MAX_BYTES = 32 << 20
_SETTLE_S = 2.0
"""The gateway may notice later than we do that a request was given up."""
_LOOK_AGAIN_S = 0.05
_IN_FLIGHT = "baton_requests_in_flight"


class ScrapeError(Exception):
    """One line."""


@dataclass(frozen=True)
class Source:
    scheme: str
    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, text: str) -> Source:
        """Reads http://HOST:PORT[/PATH]; without a path it is /metrics. Raises LoadError."""
        try:
            parts = urlsplit(text if "://" in text else f"http://{text}")
            scheme, host, port = parts.scheme, parts.hostname, parts.port
        except ValueError:
            scheme, host, port = "", None, None
        if scheme not in ("http", "https") or not host or not text.isprintable() or " " in text:
            raise LoadError(f"--metrics {text}: must be http://HOST:PORT, or several with commas")
        default_port = 443 if scheme == "https" else 80
        return cls(scheme, host, port or default_port, parts.path.rstrip("/") or "/metrics")

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"


def sources_of(text: str | None, target: Target) -> list[Source]:
    """The sources that --metrics names; without it, a target that speaks HTTP. Raises LoadError."""
    if text == "none":
        return []
    if text is not None:
        return list(dict.fromkeys(Source.parse(one) for one in text.split(",")))
    return [] if target.is_grpc else [Source(target.scheme, target.host, target.port, "/metrics")]


@dataclass(frozen=True)
class Before:
    """What the sources said before a load."""

    sources: Sequence[Source]
    scrapes: Sequence[Scrape]
    problem: str = ""
    """Why there is nothing to compare; empty when there is."""

    async def check(self, samples: Sequence[Sample]) -> MetricsCheck | None:
        """Reads them again; None without sources. What goes wrong is part of the result."""
        if not self.sources:
            return None
        names = [str(source) for source in self.sources]
        try:
            if self.problem:
                raise ScrapeError(self.problem)
            after = await self._settled()
            return compare(names, self._pairs(after), samples)
        except ScrapeError as error:
            return MetricsCheck(names, problems=[f"no figures of the metrics: {error}"])

    async def _settled(self) -> Sequence[Scrape]:
        """Waits until as little is under way as before the load, though not for ever. Raises
        ScrapeError."""
        level = _in_flight(self.scrapes)
        deadline = asyncio.get_running_loop().time() + _SETTLE_S
        while True:
            scrapes = await _scrape_all(self.sources)
            if _in_flight(scrapes) <= level or asyncio.get_running_loop().time() > deadline:
                return scrapes
            await asyncio.sleep(_LOOK_AGAIN_S)

    def _pairs(self, after: Sequence[Scrape]) -> list[tuple[Scrape, Scrape]]:
        """Each process once, even if it has several addresses. Raises ScrapeError."""
        pairs: dict[str, tuple[Scrape, Scrape]] = {}
        for source, old, new in zip(self.sources, self.scrapes, after, strict=True):
            if old.process != new.process:
                raise ScrapeError(
                    f"{source} is another process than before the load; of several gateways behind"
                    " one port, name the metrics port of each"
                )
            pairs.setdefault(new.process or str(source), (old, new))
        return list(pairs.values())


async def before(sources: Sequence[Source]) -> Before:
    """What goes wrong is part of the result."""
    found = Before(sources, ())
    try:
        return replace(found, scrapes=await _scrape_all(sources))
    except ScrapeError as error:
        return replace(found, problem=str(error))


def _in_flight(scrapes: Sequence[Scrape]) -> float:
    return sum(scrape.of(_IN_FLIGHT) or 0.0 for scrape in scrapes)


async def _scrape_all(sources: Sequence[Source]) -> list[Scrape]:
    """Raises ScrapeError."""
    return list(await asyncio.gather(*map(_scrape, sources)))


async def _scrape(source: Source) -> Scrape:
    """Raises ScrapeError."""
    client, body = HttpClient(source.host, source.port, tls=source.scheme == "https"), bytearray()

    def take(data: bytes) -> None:
        if len(body) + len(data) > _MAX_BYTES:
            raise HttpBroken(f"more than {_MAX_BYTES >> 20} MiB of metrics")
        body.extend(data)

    try:
        async with asyncio.timeout(_SCRAPE_S):
            status = await client.exchange(client.encode(source.path, None), take)
    except TimeoutError:
        raise ScrapeError(f"{source}: no answer within {_SCRAPE_S:g} s") from None
    except OSError as error:
        reason = error.strerror or "cannot connect"
        raise ScrapeError(f"{source}: nobody answers: {reason}") from None
    except HttpBroken as error:
        raise ScrapeError(f"{source}: {error}") from None
    finally:
        client.close()
    if status != 200:
        raise ScrapeError(f"{source} answers {status}")
    try:
        return read(body.decode())
    except ValueError:
        raise ScrapeError(f"{source} does not answer in Prometheus's text format") from None
