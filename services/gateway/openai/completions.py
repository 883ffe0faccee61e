"""/v1/completions: prompts as text or token ids, one or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from baton.services.gateway.admission import Limits
from baton.services.gateway.frontend import Frontend
from baton.services.gateway.openai.errors import InvalidParam
from baton.services.gateway.openai.schema import CompletionRequest
from baton.v1 import inference_service_pb2 as pb

MAX_PROMPTS = 128
_DEFAULT_MAX_TOKENS = 16

FIELDS = {"text": "prompt", "token_ids": "prompt"}
"""What this endpoint calls the fields of GenerateRequest."""


async def completion_requests(
    request: CompletionRequest, frontend: Frontend
) -> list[pb.GenerateRequest]:
    """One for each prompt. Raises InvalidParam and BatonErrors."""
    sampling = request.sampling()
    if not sampling.HasField("max_tokens"):
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
    """Checks that they are token ids, before they become a message that could not carry others."""
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
