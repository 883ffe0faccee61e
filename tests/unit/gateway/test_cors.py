"""Which web pages get an answer that their browser lets them read."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator

import pytest

from baton.services.gateway.openai.app import build_app
from baton.services.gateway.openai.cors import allow_origins, origins
from baton.services.gateway.openai.endpoint import HttpEndpoint
from tests.unit.gateway.null_frontend import NullFrontend, ask, num_refused

PAGE, FOREIGN = "https://app.example", "https://evil.example"
CHAT = "/v1/chat/completions"
PREFLIGHT = (
    "access-control-request-method: POST\r\n"
    "access-control-request-headers: authorization,content-type,x-stainless-os\r\n"
    "access-control-request-private-network: true\r\n"
)


@pytest.fixture
def frontend() -> NullFrontend:
    return NullFrontend()


@pytest.fixture
async def address(frontend: NullFrontend, allowed: str) -> AsyncIterator[str]:
    app = allow_origins(build_app(frontend), origins(allowed))
    endpoint = HttpEndpoint(app, on_refused=frontend.metrics.http_refused)
    await endpoint.start("127.0.0.1", 0)
    yield endpoint.address
    await endpoint.stop()


@pytest.mark.parametrize("allowed", [PAGE, f"http://localhost:3000, {PAGE}/", "*"])
async def test_an_allowed_page_asks_first_and_then_reads_answers_and_errors(
    address: str, allowed: str
) -> None:
    names = "*" if allowed == "*" else PAGE
    origin = f"origin: {PAGE}\r\n"
    first = await ask(address, CHAT, method="OPTIONS", headers=origin + PREFLIGHT)
    assert (first.status, first.headers["access-control-allow-origin"]) == (200, names)
    assert "POST" in first.headers["access-control-allow-methods"]
    # Authorization is no part of `*`: browsers want it by name.
    assert "authorization" in first.headers["access-control-allow-headers"]
    assert first.headers["access-control-allow-private-network"] == "true"
    replies = [
        await ask(address, "/v1/completions", {"prompt": "hello"}, headers=origin),
        await ask(address, "/v1/completions", {"prompt": "hello", "stream": True}, headers=origin),
        await ask(address, "/v1/completions", {"prompt": 5}, headers=origin),
        await ask(address, "/nowhere", headers=origin + "cookie: a=b\r\n"),
    ]
    assert [reply.status for reply in replies] == [200, 200, 400, 404]
    for reply in [first, *replies]:
        assert reply.headers["access-control-allow-origin"] == names
        assert "access-control-allow-credentials" not in reply.headers
    assert "X-Request-Id" in replies[0].headers["access-control-expose-headers"]


@pytest.mark.parametrize("allowed", ["", PAGE])
async def test_a_foreign_page_is_answered_as_without_the_flag(
    address: str, frontend: NullFrontend, allowed: str
) -> None:
    headers = f"origin: {FOREIGN}\r\n"
    first = await ask(address, CHAT, method="OPTIONS", headers=headers + PREFLIGHT)
    assert (first.status, first.error["message"]) == (405, f"wrong method: OPTIONS {CHAT}")
    assert num_refused(frontend) == {"405": 1}
    reply = await ask(address, "/v1/completions", {"prompt": "hello"}, headers=headers)
    for one in (first, reply):
        assert not any(name.startswith("access-control") for name in one.headers)


@pytest.mark.parametrize("allowed", [PAGE])
async def test_who_is_no_browser_notices_nothing(address: str, allowed: str) -> None:
    reply = await ask(address, "/v1/completions", {"prompt": "hello"})
    assert reply.status == 200 and "access-control-allow-origin" not in reply.headers


def test_origins_are_taken_as_browsers_write_them() -> None:
    assert origins("HTTPS://App.Example:443/, http://localhost:3000,*") == (
        "https://app.example",
        "http://localhost:3000",
        "*",
    )
    assert origins("http://[::1]:80") == ("http://[::1]",)
    assert origins("") == ()


@pytest.mark.parametrize(
    "text",
    [
        "app.example",
        "https://",
        "https://a.example/path",
        "https://u@a.example",
        "https://a:b",
        "x",
    ],
)
def test_what_is_no_origin_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no origin"):
        origins(text)
