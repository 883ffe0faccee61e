"""Errors in Anthropic's shape: {"type": "error", "error": {"type", "message"}, "request_id"}."""

from __future__ import annotations

import json
from collections.abc import Mapping

from starlette.responses import Response

from baton.services.gateway.openai.errors import HttpError

_KINDS: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    499: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""What a status is called there."""


def error_body(error: HttpError, request_id: str | None = None) -> bytes:
    kind = _KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    body = {"type": "error", "error": {"type": kind, "message": error.message}}
    return json.dumps({**body, "request_id": request_id}).encode()


def error_response(error: HttpError) -> Response:
    response = error.response()
    response.body = error_body(error)
    response.headers["content-length"] = str(len(response.body))
    return response
