"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from starlette.responses import Response

from baton.shared.rpc.errors import HTTP_STATUS, BatonError, InvalidField
from baton.shared.sampling import FIELDS
from baton.v1 import error_details_pb2

_INDEX = re.compile(r"\[\d+\]$")
_RETRY_AFTER_S = 1


class HttpError(Exception):
    """An answer that is an error. `param` is the request's field, `code` is for programs."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> bytes:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    def response(self) -> Response:
        headers = {"Retry-After": str(_RETRY_AFTER_S)} if self.status == 503 else None
        return Response(self.body(), self.status, headers, media_type="application/json")


class InvalidParam(HttpError):
    def __init__(self, param: str, problem: str, *, code: str = "invalid_value") -> None:
        super().__init__(400, f"{param} {problem}", param=param, code=code)


def context_too_long(param: str, problem: str, context_length: int) -> HttpError:
    """In the words that clients look for."""
    message = f"This model's maximum context length is {context_length} tokens. However, {param} "
    return HttpError(400, message + problem, param=param, code="context_length_exceeded")


def to_http_error(error: Exception, fields: dict[str, str] | None = None) -> HttpError:
    """`fields`: what this endpoint calls the fields of GenerateRequest, where it differs.

    An error that is not one of ours becomes an internal error that tells nothing about it.
    """
    if isinstance(error, HttpError):
        return error
    if isinstance(error, InvalidField):
        param = _http_name(error.field, fields or {})
        problem = error.message.removeprefix(error.field).lstrip()
        if error.context_length is not None:
            return context_too_long(param, problem, error.context_length)
        message = f"{param} {problem}"
        return HttpError(400, message, param=_INDEX.sub("", param), code="invalid_value")
    if isinstance(error, BatonError):
        reason = error_details_pb2.FailureReason.Name(error.reason)
        code = reason.removeprefix("FAILURE_REASON_").lower()
        return HttpError(HTTP_STATUS[error.code], error.message, code=code)
    return HttpError(500, "internal error", code="internal_error")


def renamed(error: HttpError, places: Mapping[str, str]) -> HttpError:
    """The error in the names of another endpoint. `places`: a path of chat completions → where
    that endpoint's request has it; what is below a path keeps its name below it."""
    if error.param is None:
        return error
    param = _at_place(error.param, places)
    # In the message it may be with the index of an entry.
    message = error.message.replace(error.param, param, 1)
    return HttpError(error.status, message, param=param, code=error.code)


def _at_place(path: str, places: Mapping[str, str]) -> str:
    """By the longest path that begins it."""
    end = len(path)
    while end > 0:
        if path[:end] in places:
            return places[path[:end]] + path[end:]
        end = max(path.rfind(".", 0, end), path.rfind("[", 0, end))
    return path


def _http_name(field: str, fields: dict[str, str]) -> str:
    """`sampling.stops[3]` → `stop[3]`."""
    index = _INDEX.search(field)
    name = _INDEX.sub("", field)
    known = {f"sampling.{field.name}": field.public_name for field in FIELDS} | fields
    return _at_place(name, known) + (index[0] if index else "")
