"""Who asks. Nobody is asked who he is yet: all requests come from one tenant without a name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Identity:
    tenant: str = ""
    """Prompts of one tenant share cached prefixes, those of different ones never do."""

    @property
    def cache_salt(self) -> bytes:
        """What separates the tenant's block hashes from others'; empty without a tenant."""
        return self.tenant.encode()


ANONYMOUS = Identity()

Identify = Callable[[Mapping[str, str]], Awaitable[Identity]]
"""A call's metadata, or a request's headers, names in lower case → who asks.

Raises a BatonError for those who may not ask.
"""


async def ask_nobody(headers: Mapping[str, str]) -> Identity:
    return ANONYMOUS


def with_bearer(headers: Mapping[str, str]) -> Mapping[str, str]:
    """A key in `x-api-key` is the bearer token, whatever else is given: so it is at Anthropic's."""
    key = headers.get("x-api-key")
    if key is None:
        return headers
    return {**headers, "authorization": f"Bearer {key}"}
