"""What a service does with nothing but the wheel: `python wheel_probe.py ADDRESS CUT1 CUT2`.

CUT1 and CUT2 lead to the same gateway over networks that break. Prints one JSON object: versions,
and what the synchronous and the asynchronous client saw.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import sys
import warnings
from typing import Any

import baton_client
from baton_client import AsyncClient, BatonError, Client, RetryPolicy

PROMPT = "In the beginning God created"
SAMPLING: dict[str, Any] = {"max_tokens": 128, "temperature": 0.8, "seed": 7, "stops": ["\0"]}
ENDLESS: dict[str, Any] = {"max_tokens": 1500, "temperature": 0, "ignore_eos": True}
RETRY = RetryPolicy(first_backoff_s=0.05, max_backoff_s=0.5)


def main() -> None:
    warnings.simplefilter("error")
    address, *cut_addresses = sys.argv[1:]
    seen = {
        "sync": ask(cut_addresses[0], address),
        "async": asyncio.run(ask_async(cut_addresses[1], address)),
    }
    names = ("baton-client", "grpcio", "protobuf")
    versions = {name: importlib.metadata.version(name) for name in names}
    installed = sorted(d.metadata["Name"].lower() for d in importlib.metadata.distributions())
    result = {**seen, "versions": versions, "installed": installed, "python": sys.version}
    sys.stdout.write(json.dumps(result) + "\n")
    assert baton_client.__version__ == versions["baton-client"]


def ask(cut_address: str, address: str) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    with Client(cut_address, retry=RETRY) as client:
        stream = client.generate(PROMPT, **SAMPLING)
        chunks = list(stream)
        answer = stream.result()
        seen["cut"] = [answer.text, answer.token_ids, answer.num_resumes]
        seen["joined"] = ["".join(c.text for c in chunks), [i for c in chunks for i in c.token_ids]]
    with Client(address) as client:
        client.wait_ready()
        answer = client.generate(PROMPT, **SAMPLING).result()
        seen["whole"] = [answer.text, answer.token_ids, answer.num_resumes]
        token_ids = client.tokenize(PROMPT)
        seen["text"] = client.detokenize(token_ids)
        by_tokens = client.generate(token_ids=token_ids, **SAMPLING)
        seen["by_tokens"] = by_tokens.text()
        info = client.model_info()
        seen["info"] = [info.model_name, info.has_tokenizer, len(client.server_info().workers)]
        seen["deadline"] = error_of(
            lambda: client.generate(PROMPT, deadline_s=0.5, **ENDLESS).text()
        )
        with client.generate(PROMPT, **ENDLESS) as stream:
            next(stream)
            stream.cancel()
            seen["cancel"] = error_of(stream.text)
        seen["invalid"] = error_of(client.generate(PROMPT, top_p=2).text)
    return seen


async def ask_async(cut_address: str, address: str) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    async with AsyncClient(cut_address, retry=RETRY) as client:
        stream = client.generate(PROMPT, **SAMPLING)
        chunks = [chunk async for chunk in stream]
        answer = await stream.result()
        seen["cut"] = [answer.text, answer.token_ids, answer.num_resumes]
        seen["joined"] = ["".join(c.text for c in chunks), [i for c in chunks for i in c.token_ids]]
    async with AsyncClient(address) as client:
        await client.wait_ready()
        answer = await client.generate(PROMPT, **SAMPLING).result()
        seen["whole"] = [answer.text, answer.token_ids, answer.num_resumes]
        token_ids = await client.tokenize(PROMPT)
        seen["text"] = await client.detokenize(token_ids)
        seen["by_tokens"] = await client.generate(token_ids=token_ids, **SAMPLING).text()
        info, server = await asyncio.gather(client.model_info(), client.server_info())
        seen["info"] = [info.model_name, info.has_tokenizer, len(server.workers)]
        seen["deadline"] = await error_of_async(client.generate(PROMPT, deadline_s=0.5, **ENDLESS))
        async with client.generate(PROMPT, **ENDLESS) as stream:
            await anext(stream)
            stream.cancel()
            seen["cancel"] = await error_of_async(stream)
        seen["invalid"] = await error_of_async(client.generate(PROMPT, top_p=2))
    return seen


def error_of(ask: Any) -> list[str]:
    try:
        ask()
    except BatonError as error:
        return [type(error).__name__, getattr(error, "field", ""), getattr(error, "limit", "")]
    return []


async def error_of_async(stream: Any) -> list[str]:
    try:
        await stream.text()
    except BatonError as error:
        return [type(error).__name__, getattr(error, "field", ""), getattr(error, "limit", "")]
    return []


if __name__ == "__main__":
    main()
