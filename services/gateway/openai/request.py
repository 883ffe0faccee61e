"""What every endpoint reads of a request beside its body, and the model's name in it."""

from __future__ import annotations

import math

from fastapi import Request

from baton.services.gateway.frontend import Frontend
from baton.services.gateway.openai.errors import HttpError, InvalidParam

_TIMEOUT_HEADER = "x-request-timeout"
"""Seconds that the whole answer may take. Ours: neither OpenAI nor Anthropic has such a header."""
_MAX_TIMEOUT_S = 1e6


def time_left_s(request: Request) -> float | None:
    """Raises InvalidParam."""
    text = request.headers.get(_TIMEOUT_HEADER)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= _MAX_TIMEOUT_S:
        problem = f"must be seconds, above 0 and at most {_MAX_TIMEOUT_S:.0f}"
        raise InvalidParam(_TIMEOUT_HEADER, problem)
    return seconds


def check_model(name: str | None, frontend: Frontend) -> None:
    """A request without a name, or with an empty one, means the one model there is."""
    if name and name != frontend.model_name:
        message = f"the model {name[:200]!r} does not exist; this is {frontend.model_name!r}"
        raise HttpError(404, message, param="model", code="model_not_found")
