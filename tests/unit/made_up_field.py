"""Run by test_made_up_field.py in a tree that declares `loudness`: follows it from all ways in."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import grpc
import pytest

from baton.services.launcher.commands import build_parser, generate_request
from baton.services.launcher.sampling_flags import add_sampling_flags
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import types_pb2
from tests.unit.gateway.whole_gateway import whole_gateway


def message(**sampling: float) -> pb.GenerateRequest:
    given = types_pb2.SamplingParams(max_tokens=1, **sampling)  # type: ignore[arg-type]
    return pb.GenerateRequest(token_ids=pb.TokenIds(token_ids=[1, 2]), sampling=given)


async def follow() -> None:
    body = {"prompt": [1, 2], "max_tokens": 1}
    with pytest.MonkeyPatch.context() as patch:
        async with whole_gateway(patch) as gateway:
            await gateway.ask_grpc(message(loudness=0.25))
            assert (await gateway.ask_http({**body, "loudness": 0.75})).status == 200
            await gateway.ask_grpc(message())
            assert (await gateway.ask_http({**body, "loudness": None})).status == 200
            params: list[Any] = [sequence.params for _, sequence in gateway.started]
            arrived = [each.loudness for each in params]
            assert arrived == [0.25, 0.75, 0.5, 0.5], arrived

            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await gateway.ask_grpc(message(loudness=2))
            assert refused.value.details() == "sampling.loudness is 2; limit: 0 to 1"
            for wrong in (2, "loud"):
                reply = await gateway.ask_http({**body, "loudness": wrong})
                assert (reply.status, reply.error["param"]) == (400, "loudness")
            assert len(gateway.started) == 4

    flags = build_parser().parse_args(["generate", "--token-ids", "1", "--loudness", "0.125"])
    assert generate_request(flags).sampling.loudness == 0.125  # type: ignore[attr-defined]
    parser = argparse.ArgumentParser()
    add_sampling_flags(parser)
    assert "--loudness L" in parser.format_help() and "how loud to speak" in parser.format_help()


if __name__ == "__main__":
    asyncio.run(follow())
