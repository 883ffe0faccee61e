"""How to reach the gateway: channel options, TLS, tokens."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

Option = tuple[str, Any]
Token = str | Callable[[], str]

_MIN_KEEPALIVE_S = 10.0
"""The gateway ends connections that ping more often."""
_PATIENCE_MS = 10_000
"""For the answer to a ping."""


@dataclass(frozen=True, slots=True)
class Tls:
    """Certificates, as PEM. Without any, gRPC's own list says whom to trust."""

    root_certificates: bytes | None = None
    """Whom to trust."""
    certificate_chain: bytes | None = None
    """Of this client, where the server wants to know it; with `private_key`."""
    private_key: bytes | None = field(default=None, repr=False)
    server_name: str | None = None
    """The name in the server's certificate, where it is not that of the target."""

    def __post_init__(self) -> None:
        if (self.certificate_chain is None) != (self.private_key is None):
            raise ValueError("a client certificate needs both certificate_chain and private_key")

    @classmethod
    def from_files(
        cls,
        root_certificates: str | Path | None = None,
        certificate_chain: str | Path | None = None,
        private_key: str | Path | None = None,
        *,
        server_name: str | None = None,
    ) -> Tls:
        """Raises OSError for a file that cannot be read."""

        def read(path: str | Path | None) -> bytes | None:
            return None if path is None else Path(path).read_bytes()

        return cls(read(root_certificates), read(certificate_chain), read(private_key), server_name)


class Connection:
    """What both clients need to know of it."""

    def __init__(
        self,
        target: str,
        *,
        tls: Tls | bool = False,
        token: Token | None = None,
        allow_insecure_token: bool = False,
        keepalive_s: float | None = 20.0,
        max_message_bytes: int = 64 << 20,
        options: Sequence[Option] = (),
    ) -> None:
        """`target` is HOST:PORT, or any name that gRPC resolves (`dns:///…`, `unix:…`).

        `tls=True` takes the certificates that gRPC brings. `token` is sent as a bearer token; a
        function is asked before each call. Over a connection that anyone can read it goes only with
        `allow_insecure_token`. After `keepalive_s` without a sign the server is asked whether it
        lives; None never asks. `options` are gRPC's own; they win over those from here.

        Raises ValueError for arguments that cannot work.
        """
        if not target:
            raise ValueError("target is empty: HOST:PORT")
        if keepalive_s is not None and keepalive_s < _MIN_KEEPALIVE_S:
            raise ValueError(f"keepalive_s is {keepalive_s:g}: at least {_MIN_KEEPALIVE_S:g}")
        self._tls = Tls() if tls is True else tls or None
        if token is not None and self._tls is None and not allow_insecure_token:
            raise ValueError(
                "the token would travel in the open: give tls, or allow_insecure_token=True"
            )
        self.target = target
        self._token = token
        self._options = _options(target, self._tls, keepalive_s, max_message_bytes)
        self._options |= dict(options)

    @property
    def options(self) -> list[Option]:
        return list(self._options.items())

    def credentials(self) -> grpc.ChannelCredentials | None:
        """None for a connection that is not encrypted."""
        if self._tls is None:
            return None
        return grpc.ssl_channel_credentials(
            self._tls.root_certificates, self._tls.private_key, self._tls.certificate_chain
        )

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata of one call. Raises ValueError for a token that cannot be sent; the message
        does not repeat it."""
        if self._token is None:
            return ()
        token = self._token() if callable(self._token) else self._token
        # gRPC's own complaint would quote it.
        if not token or not all("!" <= character <= "~" for character in token):
            raise ValueError("the token must be visible ASCII characters without spaces")
        return (("authorization", f"Bearer {token}"),)


def _options(
    target: str, tls: Tls | None, keepalive_s: float | None, max_message_bytes: int
) -> dict[str, Any]:
    options: dict[str, Any] = {
        "grpc.max_receive_message_length": max_message_bytes,
        "grpc.max_send_message_length": max_message_bytes,
        # A gateway that comes back must be found at once.
        "grpc.initial_reconnect_backoff_ms": 100,
        "grpc.min_reconnect_backoff_ms": 1_000,
        "grpc.max_reconnect_backoff_ms": 2_000,
    }
    if keepalive_s is not None:
        options["grpc.keepalive_time_ms"] = int(keepalive_s * 1000)
        options["grpc.keepalive_timeout_ms"] = _PATIENCE_MS
        # gRPC also pings to measure. While such a ping is out, only that ping's own limit, of one
        # minute, would show that nobody is there.
        options["grpc.http2.ping_timeout_ms"] = _PATIENCE_MS
        # Pings go on however long the first token takes.
        options["grpc.http2.max_pings_without_data"] = 0
    if is_loopback(target):
        # A proxy named by the environment is meant for addresses beyond this machine.
        options["grpc.enable_http_proxy"] = 0
    if tls is not None and tls.server_name is not None:
        options["grpc.ssl_target_name_override"] = tls.server_name
    return options


def is_loopback(target: str) -> bool:
    """Whether `target` names this machine itself."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    name = target.rpartition("/")[2]
    for scheme in ("dns:", "ipv4:", "ipv6:"):
        name = name.removeprefix(scheme)
    host = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
