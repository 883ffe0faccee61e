"""/v1/completions: prompts as text or token ids, one or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from baton.services.gateway.admission import Limits
from baton.services.gateway.frontend import Frontend
from baton.services.gateway.openai.errors import InvalidParam
from baton.services.gateway.openai.schema import CompletionRequest, Sampled
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import types_pb2

MAX_PROMPTS = 128
_DEFAULT_MAX_TOKENS = 16

FIELDS = {"text": "prompt", "token_ids": "prompt"}
"""What this endpoint calls the fields of GenerateRequest."""


async def completion_requests(
    request: CompletionRequest, frontend: Frontend
) -> list[pb.GenerateRequest]:
    """One for each prompt. Raises InvalidParam and BatonErrors."""
    sampling = sampling_params(request, request.max_tokens)
    if request.max_tokens is None:
        sampling.max_tokens = _DEFAULT_MAX_TOKENS
    limits = frontend.cluster.limits()
    adds_special = request.add_special_tokens is not False
    requests = []
    for prompt in split_prompts(request.prompt, limits):
        if isinstance(prompt, str) and adds_special:
            requests.append(pb.GenerateRequest(text=prompt, sampling=sampling))
            continue
        if isinstance(prompt, str):
            prompt = await frontend.tokenize(prompt, add_special_tokens=False)
        token_ids = pb.TokenIds(token_ids=prompt)
        requests.append(pb.GenerateRequest(token_ids=token_ids, sampling=sampling))
    return requests


def split_prompts(prompt: Any, limits: Limits) -> list[str | Sequence[int]]:
    """Raises InvalidParam for what is neither text, token ids nor a list of one of them."""
    if prompt is None:
        raise InvalidParam("prompt", "is missing")
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise InvalidParam("prompt", "must be text, token ids, or a list of either")
    if type(prompt[0]) is int:
        return [_token_ids("prompt", prompt, limits)]
    if len(prompt) > MAX_PROMPTS:
        raise InvalidParam("prompt", f"has {len(prompt)} prompts; limit: {MAX_PROMPTS}")
    return [
        one if isinstance(one, str) else _token_ids(f"prompt[{index}]", one, limits)
        for index, one in enumerate(prompt)
    ]


def _token_ids(path: str, values: Any, limits: Limits) -> Sequence[int]:
    """Their range is admission's; that they are numbers which a message can carry is checked."""
    if not isinstance(values, list):
        raise InvalidParam(path, "must be text or token ids")
    if len(values) > limits.max_model_len:
        problem = f"has {len(values)} tokens; limit: {limits.max_model_len}, the model's length"
        raise InvalidParam(path, problem)
    for index, value in enumerate(values):
        if type(value) is not int or not 0 <= value < limits.vocab_size:
            problem = f"is no token id; limit: 0 to {limits.vocab_size - 1}"
            raise InvalidParam(f"{path}[{index}]", problem)
    return values


def sampling_params(request: Sampled, max_tokens: int | None) -> types_pb2.SamplingParams:
    """Only what was given is set: admission knows the defaults, and checks the ranges."""
    sampling = types_pb2.SamplingParams(
        temperature=request.temperature,
        top_p=request.top_p,
        min_p=request.min_p,
        max_tokens=max_tokens,
        stop_token_ids=request.stop_token_ids,
        ignore_eos=bool(request.ignore_eos),
    )
    if request.top_k is not None:
        sampling.top_k = max(request.top_k, 0)
    if request.seed is not None:
        # OpenAI's seeds have a sign; those without it are the same numbers as over gRPC.
        sampling.seed = request.seed % 2**64
    if request.stop is not None:
        sampling.stops.extend([request.stop] if isinstance(request.stop, str) else request.stop)
    return sampling
