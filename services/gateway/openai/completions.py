"""/v1/completions: prompts as text or token ids, one or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from baton.services.gateway.admission import MAX_SAMPLES, Limits, check_num_logprobs
from baton.services.gateway.frontend import Frontend
from baton.services.gateway.openai.constraint import Asked
from baton.services.gateway.openai.content import PREDICTION, prediction_of
from baton.services.gateway.openai.errors import InvalidParam, context_too_long
from baton.services.gateway.openai.fields import whole
from baton.services.gateway.openai.schema import CompletionRequest
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import types_pb2

MAX_PROMPTS = 128
MAX_CHOICES = 1024
"""Of all prompts together."""
_DEFAULT_MAX_TOKENS = 16

FIELDS = {"text": "prompt", "token_ids": "prompt", **PREDICTION}


@dataclass(frozen=True)
class Completions:
    """What a request asks for."""

    requests: Sequence[pb.GenerateRequest]
    """One for each prompt."""
    echoes: Sequence[str]
    """The texts of the prompts, where the answers begin with them."""


def completion_fields(request: CompletionRequest, asked: Asked) -> dict[str, str]:
    """What this request calls the fields of GenerateRequest."""
    names = FIELDS | asked.names
    if request.prompt_logprobs is None:
        # Those of an echo.
        names["sampling.prompt_logprobs"] = "logprobs"
    return names


async def completion_requests(
    request: CompletionRequest, asked: Asked, frontend: Frontend
) -> Completions:
    """`asked`: of `asked_constraint`. Raises InvalidParam and BatonErrors."""
    limits = frontend.cluster.limits()
    sampling = request.sampling(limits.vocab_size)
    if request.echo:
        _ask_of_prompts(sampling)
    is_length_given = sampling.HasField("max_tokens")
    if request.asks_for_all:
        sampling.max_tokens = limits.max_model_len
    elif not is_length_given:
        default = frontend.defaults.sampling.max_tokens or _DEFAULT_MAX_TOKENS
        sampling.max_tokens = min(default, _DEFAULT_MAX_TOKENS)
    prediction = prediction_of(request.prediction)
    prompts = split_prompts(request.prompt, limits)
    if request.n and request.n <= MAX_SAMPLES and len(prompts) * request.n > MAX_CHOICES:
        problem = f"is {request.n}, for each of {len(prompts)} prompts; limit: {MAX_CHOICES} in all"
        raise InvalidParam("n", problem)
    # Admission counts those of each; and whose logprobs are told must be known by its tokens.
    tells_of_prompts = sampling.HasField("prompt_logprobs")
    adds_special = request.add_special_tokens is not False
    requests = []
    for prompt in prompts:
        one = pb.GenerateRequest(
            sampling=sampling,
            clamp_max_tokens=not is_length_given,
            prediction=prediction,
            n=request.n,
            constraint=asked.constraint,
        )
        if isinstance(prompt, str) and adds_special and not (tells_of_prompts or request.echo):
            one.text = prompt
        elif isinstance(prompt, str):
            token_ids = await frontend.tokenize(prompt, add_special_tokens=adds_special)
            one.token_ids.CopyFrom(pb.TokenIds(token_ids=token_ids))
        else:
            one.token_ids.CopyFrom(pb.TokenIds(token_ids=prompt))
        requests.append(one)
    if tells_of_prompts:
        num_tokens = sum(len(one.token_ids.token_ids) * max(one.n, 1) for one in requests)
        check_num_logprobs("sampling.prompt_logprobs", sampling.prompt_logprobs, num_tokens)
    echoes = [await _text_of(prompt, frontend) for prompt in prompts] if request.echo else []
    return Completions(requests, echoes)


def _ask_of_prompts(sampling: types_pb2.SamplingParams) -> None:
    """An echo tells of the prompt what it tells of the answer. That there be no answer may be asked
    only where something is asked of the prompt."""
    if sampling.HasField("logprobs"):
        sampling.prompt_logprobs = max(sampling.logprobs, sampling.prompt_logprobs)
    elif sampling.HasField("max_tokens") and not sampling.max_tokens:
        # Set, if it is not; a client's own stays.
        sampling.prompt_logprobs = sampling.prompt_logprobs or 0


async def _text_of(prompt: str | Sequence[int], frontend: Frontend) -> str:
    """Of tokens with special ones, as their logprobs show them; none without a tokenizer."""
    if isinstance(prompt, str):
        return prompt
    if frontend.codec is None:
        return ""
    return await frontend.detokenize(list(prompt), skip_special_tokens=False)


def split_prompts(prompt: Any, limits: Limits) -> list[str | Sequence[int]]:
    """Raises InvalidParam for what is neither text, token ids nor a list of one of them."""
    if prompt is None:
        raise InvalidParam("prompt", "is missing")
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise InvalidParam("prompt", "must be text, token ids, or a list of either")
    if type(whole(prompt[0])) is int:
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
        raise context_too_long(path, problem, limits.max_model_len)
    token_ids = [whole(value) for value in values]
    for index, value in enumerate(token_ids):
        if type(value) is not int or not 0 <= value < limits.vocab_size:
            problem = f"is no token id; limit: 0 to {limits.vocab_size - 1}"
            raise InvalidParam(f"{path}[{index}]", problem)
    return token_ids
