"""The prompt of a request's samples: one computes it, the others find it in the workers' caches.

    first     starts at once ─► its first token says that the prompt's blocks are sealed, and where
    others    wait for that ─► start beside it, and compute what of the prompt fills no block

A sample is a sequence like any other, to workers and on the recovery path.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from baton.services.gateway.router import Route
from baton.v1 import types_pb2


@dataclass(frozen=True, slots=True)
class Beside:
    """Where another sample of the request is."""

    route: Route
    num_prompt_tokens: int
    """Of the request: what the two have in common."""
    num_cached_tokens: int
    """Of these, what was in a cache before the request came."""


class SharedPrompt:
    def __init__(self, num_tokens: int) -> None:
        """`num_tokens`: the prompt's."""
        self.beside: Beside | None = None
        """None until a sample has a token."""
        self.is_told = asyncio.Event()
        """Who computed it has sent its logprobs, which come before all tokens."""
        self._num_tokens = num_tokens
        self._is_computed = asyncio.Event()
        self._next = asyncio.Lock()
        self._spec: types_pb2.SequenceSpec | None = None

    async def computed(self) -> Beside:
        """Waits until a sample has a token. Those that wait go on one by one: between two of them
        others have their turn."""
        await self._is_computed.wait()
        async with self._next:
            await asyncio.sleep(0)
        assert self.beside is not None
        return self.beside

    def spec(self, make: Callable[[], types_pb2.SequenceSpec]) -> types_pb2.SequenceSpec:
        """What the sequences of all samples have in common, made once: to write a long prompt's
        tokens down takes milliseconds."""
        if self._spec is None:
            self._spec = make()
        return self._spec

    def note_computed(self, route: Route, num_cached_tokens: int) -> None:
        """A sample has a token, from these workers. Called again, it changes nothing."""
        if self.beside is None:
            self.beside = Beside(route, self._num_tokens, num_cached_tokens)
            self._is_computed.set()
