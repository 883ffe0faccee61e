"""One way to ask for both clients: what holds for one holds for the other."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from baton_client import Answer, AsyncClient, BatonError, Chunk, Client, RetryPolicy

FAST = RetryPolicy(max_tries=4, first_backoff_s=0.001, max_backoff_s=0.002)


@dataclass
class Outcome:
    """What a reader had in the end."""

    chunks: list[Chunk] = field(default_factory=list)
    token_ids: tuple[int, ...] = ()
    answer: Answer | None = None
    answers: tuple[Answer, ...] | None = None
    """Of all samples."""
    error: BatonError | None = None

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)


class Asker:
    """`kind` is sync or async."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def generate(
        self, target: str, client: dict[str, Any] | None = None, **arguments: Any
    ) -> Outcome:
        """Reads to the end. `client` are arguments of the client."""
        options = {"retry": FAST, **(client or {})}
        arguments = arguments or {"prompt": "x"}
        if self.kind == "async":
            return asyncio.run(_generate_async(target, options, arguments))
        return _generate(target, options, arguments)

    def call(
        self, target: str, name: str, *arguments: Any, client: dict[str, Any] | None = None,
        **named: Any,
    ) -> Any:  # fmt: skip
        """One of the other methods."""
        options = {"retry": FAST, **(client or {})}
        if self.kind == "sync":
            with Client(target, **options) as sync_client:
                return getattr(sync_client, name)(*arguments, **named)

        async def call() -> Any:
            async with AsyncClient(target, **options) as async_client:
                return await getattr(async_client, name)(*arguments, **named)

        return asyncio.run(call())


def _generate(target: str, options: dict[str, Any], arguments: dict[str, Any]) -> Outcome:
    outcome = Outcome()
    with Client(target, **options) as client:
        try:
            stream = client.generate(**arguments)
        except BatonError as error:
            return Outcome(error=error)
        try:
            for chunk in stream:
                outcome.chunks.append(chunk)
            outcome.answer, outcome.answers = stream.result(), stream.results()
        except BatonError as error:
            outcome.error = error
        outcome.token_ids = stream.token_ids
    return outcome


async def _generate_async(
    target: str, options: dict[str, Any], arguments: dict[str, Any]
) -> Outcome:
    outcome = Outcome()
    async with AsyncClient(target, **options) as client:
        try:
            stream = client.generate(**arguments)
        except BatonError as error:
            return Outcome(error=error)
        try:
            async for chunk in stream:
                outcome.chunks.append(chunk)
            outcome.answer, outcome.answers = await stream.result(), await stream.results()
        except BatonError as error:
            outcome.error = error
        outcome.token_ids = stream.token_ids
    return outcome
