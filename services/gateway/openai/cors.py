"""Which web pages may ask: the origins that `--cors-allow-origin` names, never with credentials.

Without it nothing is added anywhere, and a browser lets no page of another origin read an answer.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

_ANY = "*"


def allow_origins(app: ASGIApp, origins: Collection[str] | None) -> ASGIApp:
    """`app` for pages of `origins` as well; with none, as it is."""
    return _AllowedOrigins(app, origins) if origins else app


def origins(text: str) -> tuple[str, ...]:
    """`https://a.example,http://localhost:3000` or `*`, as browsers write origins."""
    return tuple(_origin(part.strip()) for part in text.split(",") if part.strip())


class _AllowedOrigins(CORSMiddleware):
    """Around the whole application, so that errors have the headers, too."""

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("GET", "HEAD", "POST", "DELETE", "OPTIONS"),
            # Clients send headers of their own; what is named here is what the browser may send,
            # not what it sends by itself.
            allow_headers=(_ANY,),
            allow_credentials=False,
            # From the web to this machine: a browser may ask for leave once more.
            allow_private_network=True,
            expose_headers=("X-Request-Id", "Request-Id", "Retry-After"),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origin = Headers(scope=scope).get("origin") if scope["type"] == "http" else None
        if origin is not None and not self.is_allowed_origin(origin):
            # Answered as if there were no such flag.
            await self.app(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def _origin(text: str) -> str:
    if text == _ANY:
        return text
    try:
        parts = urlsplit(text.lower().rstrip("/"))
        port, is_origin = parts.port, bool(parts.scheme and parts.hostname)
        is_origin &= not (parts.path or parts.query or parts.fragment or "@" in parts.netloc)
    except ValueError:
        is_origin = False
    if not is_origin:
        raise argparse.ArgumentTypeError(f"{text!r} is no origin, such as https://app.example")
    # Browsers leave the scheme's own port out.
    own_port = {"http": 80, "https": 443}.get(parts.scheme)
    host = parts.netloc.removesuffix(f":{own_port}") if port == own_port else parts.netloc
    return f"{parts.scheme}://{host}"
