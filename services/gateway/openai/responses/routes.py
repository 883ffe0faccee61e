"""/v1/responses: created and streamed, never stored."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from baton.services.gateway.frontend import Frontend
from baton.services.gateway.openai.answer import Answer, Ask
from baton.services.gateway.openai.body import read_json
from baton.services.gateway.openai.chat_form import (
    ChatForm,
    Prepared,
    num_prompt_tokens,
    prepared,
)
from baton.services.gateway.openai.errors import HttpError, renamed, to_http_error
from baton.services.gateway.openai.logprobs import (
    ChatLogprobs,
    Logprobs,
    TokenTexts,
    bound_logprobs,
)
from baton.services.gateway.openai.request import check_model, time_left_s
from baton.services.gateway.openai.responses.reading import chat_form, responses_request
from baton.services.gateway.openai.responses.schema import ResponsesRequest
from baton.services.gateway.openai.responses.wire import ResponsesWire
from baton.shared.rpc.errors import BatonError
from baton.v1 import types_pb2


def responses_router(frontend: Frontend) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/responses")
    async def create(request: Request) -> Response:
        body = await read_json(request)
        fields = responses_request(body)
        check_model(fields.model, frontend)
        form = chat_form(fields, body)
        asked = await prepared(form, frontend)
        ask = Ask(
            requests=[asked.chat.request],
            reading=asked.chat.reading,
            identity=request.state.identity,
            fields=asked.names,
            places=form.places,
            new_wire=partial(
                ResponsesWire,
                told=_told(fields, body, frontend),
                is_streamed=bool(fields.stream),
            ),
            is_streamed=bool(fields.stream),
            new_logprobs=_logprobs(asked, form, frontend),
            time_left_s=time_left_s(request),
        )
        return Answer(frontend, ask)

    @router.post("/v1/responses/input_tokens")
    async def input_tokens(request: Request) -> Response:
        body = await read_json(request)
        fields = responses_request(body)
        check_model(fields.model, frontend)
        num_tokens = await num_prompt_tokens(chat_form(fields, body), frontend)
        return JSONResponse({"object": "response.input_tokens", "input_tokens": num_tokens})

    @router.api_route("/v1/responses/{response_id}", methods=["GET", "HEAD", "DELETE"])
    @router.get("/v1/responses/{response_id}/input_items")
    @router.post("/v1/responses/{response_id}/cancel")
    async def stored(response_id: str) -> Response:
        message = f"there is no response {response_id[:100]!r}: responses are not stored"
        raise HttpError(404, message, param="response_id", code="response_not_found")

    return router


def _logprobs(asked: Prepared, form: ChatForm, frontend: Frontend) -> Callable[[], Logprobs] | None:
    """Streamed or not, the last events have all of them. Raises HttpError for too many."""
    num_top = asked.fields.num_top_logprobs
    if num_top is None:
        return None
    try:
        bound_logprobs([asked.chat.request], num_top)
    except BatonError as error:
        raise renamed(to_http_error(error, asked.names), form.places) from error
    return partial(ChatLogprobs, TokenTexts(frontend.codec), num_top)


def _told(fields: ResponsesRequest, body: dict[str, Any], frontend: Frontend) -> dict[str, Any]:
    """Of the request, and of what holds where it says nothing."""
    sampling = frontend.defaults.sampling
    text = fields.text.model_dump(exclude_none=True) if fields.text else {}
    reasoning = fields.reasoning
    return {
        "model": frontend.model_name,
        "instructions": fields.instructions,
        "max_output_tokens": fields.max_output_tokens,
        "max_tool_calls": fields.max_tool_calls,
        "metadata": fields.metadata or {},
        "parallel_tool_calls": fields.parallel_tool_calls is not False,
        "reasoning": {
            "effort": reasoning.effort if reasoning else None,
            "summary": reasoning.summary if reasoning else None,
        },
        "temperature": _number(body.get("temperature"), sampling, "temperature"),
        "top_p": _number(body.get("top_p"), sampling, "top_p"),
        "text": {"format": {"type": "text"}, **text},
        "top_logprobs": fields.top_logprobs or 0,
        "tool_choice": "auto" if fields.tool_choice is None else fields.tool_choice,
        "tools": fields.tools or [],
        "user": fields.user,
        "safety_identifier": fields.safety_identifier,
        "prompt_cache_key": fields.prompt_cache_key,
        # What is the same for all.
        "background": False,
        "previous_response_id": None,
        "service_tier": "default",
        "store": False,
        "truncation": "disabled",
    }


def _number(given: float | None, defaults: types_pb2.SamplingParams, name: str) -> float:
    if given is not None:
        return given
    return float(getattr(defaults, name)) if defaults.HasField(name) else 1.0
