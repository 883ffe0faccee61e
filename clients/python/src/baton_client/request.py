"""Requests from arguments. Ranges are the server's to check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from baton_client.errors import InvalidRequest
from baton_client.sampling import Sampling
from baton_client.v1 import inference_service_pb2 as pb


def generate_request(
    prompt: str | None,
    token_ids: Sequence[int] | None,
    messages: Sequence[Mapping[str, str]] | None,
    received_token_ids: Sequence[int],
    sampling: Sampling,
    *,
    n: int | None = None,
    received_samples: Sequence[Sequence[int]] = (),
) -> pb.GenerateRequest:
    """Raises TypeError for arguments of a wrong kind, InvalidRequest for numbers and texts that no
    message can hold."""
    request = pb.GenerateRequest()
    if sum(given is not None for given in (prompt, token_ids, messages)) != 1:
        raise TypeError("give one of prompt, token_ids and messages")
    if prompt is not None:
        _set(request, "text", prompt, field="text")
    if token_ids is not None:
        request.token_ids.SetInParent()
        _set(request.token_ids, "token_ids", token_ids, field="token_ids")
    if messages is not None:
        request.messages.SetInParent()
        for index, each in enumerate(messages):
            _add_message(request.messages, each, f"messages[{index}]")
    _set(request, "received_token_ids", received_token_ids, field="received_token_ids")
    if n is not None:
        _set(request, "n", n, field="n")
    for index, received in enumerate(received_samples):
        sample = request.received_samples.add()
        _set(sample, "token_ids", received, field=f"received_samples[{index}]")
    request.sampling.SetInParent()
    for name, value in sampling.items():
        if name not in Sampling.__annotations__:
            raise TypeError(f"generate() has no argument {name!r}")
        if value is not None:
            if name in ("stops", "bad_words") and isinstance(value, str):
                raise TypeError(f"{name} is a list of texts, not one text")
            _set(request.sampling, name, value, field=f"sampling.{name}")
    return request


def _add_message(chat: pb.Messages, given: Mapping[str, str], path: str) -> None:
    if set(given) != {"role", "content"}:
        raise TypeError(f"{path} has not just role and content")
    message = chat.messages.add()
    for name in ("role", "content"):
        if not isinstance(given[name], str):
            raise TypeError(f"{path}: {name} is no text")
        _set(message, name, given[name], field=f"{path}.{name}")


def _set(message: Any, name: str, value: Any, *, field: str) -> None:
    try:
        if isinstance(value, (str, int, float)):
            setattr(message, name, value)
        elif isinstance(value, Mapping):
            getattr(message, name).update(value)
        else:
            getattr(message, name).extend(value)
    except ValueError as error:
        # The library's text may quote a whole prompt.
        problem = "is no text" if isinstance(error, UnicodeError) else "is out of its range"
        raise InvalidRequest(
            f"{field} {problem}", field=field, limit=f"what the contract's {field} can hold"
        ) from None
