"""Who answers: a cluster's workers are all of one model, and gateways know which."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import grpc
import pytest
from safetensors.torch import load_file, save_file

from baton.v1 import inference_service_pb2_grpc
from tests.e2e.harness import Stack, collect

PROMPT = [3, 141, 59, 26, 5]
LONG = 3000
"""More tokens than there is time for."""


@pytest.fixture(scope="module")
def negated(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same but for the sign of its last norm: the likeliest token becomes the unlikeliest."""
    directory = tmp_path_factory.mktemp("negated") / tiny_model.name
    shutil.copytree(tiny_model, directory)
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"].neg_()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_an_answer_is_of_one_model_whoever_comes_and_goes(
    tiny_model: Path, negated: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare)
    (bare / "model.safetensors").unlink()

    with Stack(tiny_model, tmp_path / "stack", {"first": "both"}) as stack:
        stack.spawn_gateway("without weights", bare)
        own, adopted = (channel_to(stack, name) for name in ("gateway", "without weights"))
        with own, adopted:
            of_first = answer(stack, own)
            assert answer(stack, adopted) == of_first
            refused = [
                stack.spawn_worker("too early", "both", negated, is_ready=False),
                stack.spawn_gateway("of the second", negated, is_ready=False),
            ]
            for process in refused:
                assert process.popen.wait(60) == 2
                *_, line = process.log.read_text().splitlines()
                assert line.count(f"'{tiny_model.name}' (digest ") == 2, "it names both"
            assert answer(stack, adopted) == of_first

            begun = [stack.start(PROMPT, max_tokens=LONG, stub=stub(c)) for c in (own, adopted)]
            for stream in begun:
                assert next(stream).HasField("started") and next(stream).chunk.token_ids
            stack.kill("first")
            stack.spawn_worker("second", "both", negated)
            for stream in begun:
                assert code_of(stream) is grpc.StatusCode.FAILED_PRECONDITION
            assert answer(stack, adopted) != of_first
            assert code_of(stack.start(PROMPT, stub=stub(own))) is (
                grpc.StatusCode.FAILED_PRECONDITION
            )
            log = stack.processes["gateway"].log.read_text()
            assert log.count("nothing to serve") == 1


def channel_to(stack: Stack, name: str) -> grpc.Channel:
    return grpc.insecure_channel(stack.processes[name].address)


def stub(channel: grpc.Channel) -> inference_service_pb2_grpc.InferenceServiceStub:
    return inference_service_pb2_grpc.InferenceServiceStub(channel)


def answer(stack: Stack, channel: grpc.Channel) -> Sequence[int]:
    return collect(stack.start(PROMPT, max_tokens=16, stub=stub(channel))).token_ids


def code_of(stream: object) -> grpc.StatusCode:
    """What it ends with."""
    with pytest.raises(grpc.RpcError) as raised:
        for _ in stream:  # type: ignore[attr-defined]
            pass
    code: grpc.StatusCode = raised.value.code()
    return code
