"""A gateway that is killed in mid-answer: the launcher starts another, the client finds it."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest
from baton_client import Answer, AsyncClient, Client, RetryPolicy

from tests.e2e.launched import Launched

pytestmark = [pytest.mark.e2e, pytest.mark.exact]

PATIENT = RetryPolicy(max_tries=200, first_backoff_s=0.1, max_backoff_s=0.5)
QUESTION: dict[str, Any] = {
    "prompt": "And God said, Let there be light:",
    "max_tokens": 300,
    "temperature": 0.7,
    "seed": 11,
    "ignore_eos": True,
}


def test_sync_and_async_answers_go_on(stack: Launched) -> None:
    address = stack.wait_ready()
    with Client(address) as client:
        whole = client.generate(**QUESTION).result()
    gateway = stack.pids()["gateway"]
    with Client(address, retry=PATIENT) as client, client.generate(**QUESTION) as stream:
        texts = [next(stream).text for _ in range(5)]
        os.kill(gateway, signal.SIGKILL)
        texts += [chunk.text for chunk in stream]
        _assert_same(stream.result(), whole)
        assert "".join(texts) == whole.text
    _assert_same(asyncio.run(_ask_async(stack, address)), whole)


async def _ask_async(stack: Launched, address: str) -> Answer:
    async with AsyncClient(address, retry=PATIENT) as client:
        await client.wait_ready()
        gateway = stack.pids()["gateway"]
        stream = client.generate(**QUESTION)
        for _ in range(5):
            await anext(stream)
        os.kill(gateway, signal.SIGKILL)
        return await stream.result()


def _assert_same(answer: Answer, whole: Answer) -> None:
    assert (answer.text, answer.token_ids) == (whole.text, whole.token_ids)
    assert answer.num_resumes == 1 and len(answer.token_ids) == 300
