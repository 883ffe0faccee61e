"""The HTTP application: OpenAI's and Anthropic's endpoints, vLLM's small ones, health, metrics."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client.exposition import choose_encoder
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from baton.services.gateway.answer_parts import PLAIN, Reading
from baton.services.gateway.anthropic.errors import error_response
from baton.services.gateway.anthropic.routes import is_messages_path, messages_router
from baton.services.gateway.frontend import Frontend
from baton.services.gateway.openai.answer import Answer, Ask, is_asked
from baton.services.gateway.openai.body import read_json
from baton.services.gateway.openai.chat import (
    chat_fields,
    form_of,
    prepared_chat,
    rendered_prompt,
    tools_of,
)
from baton.services.gateway.openai.completions import (
    FIELDS,
    completion_fields,
    completion_requests,
)
from baton.services.gateway.openai.constraint import asked_constraint
from baton.services.gateway.openai.errors import HttpError, InvalidParam, to_http_error
from baton.services.gateway.openai.guard import is_refused
from baton.services.gateway.openai.logprobs import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprobs,
    TokenTexts,
    bound_logprobs,
)
from baton.services.gateway.openai.request import check_model, time_left_s
from baton.services.gateway.openai.responses.routes import responses_router
from baton.services.gateway.openai.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Sampled,
    TokenizeRequest,
    parse,
)
from baton.services.gateway.openai.wire import OpenAiWire
from baton.shared.rpc.convert import sampling_to_json
from baton.shared.rpc.errors import BatonError
from baton.shared.telemetry import baton_version
from baton.v1 import inference_service_pb2 as pb

_UINT32 = 2**32 - 1
_SLASHES = re.compile("/{2,}")


def build_app(frontend: Frontend) -> FastAPI:
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)

    async def on_error(request: Request, error: Exception) -> Response:
        return refuse(request, to_http_error(error))

    async def on_routing_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        response = refuse(request, _routing_error(request, error))
        response.headers.update(error.headers or {})
        return response

    def refuse(request: Request, error: HttpError) -> Response:
        # The frontend counts what reached it, and the connection what it refused.
        if not is_asked(request.scope) and not is_refused(request.scope):
            frontend.metrics.http_refused(error.status)
        is_anthropic = is_messages_path(request.scope["path"])
        return error_response(error) if is_anthropic else error.response()

    app.add_middleware(_PlainPath)
    for kind in (HttpError, BatonError, Exception):
        app.add_exception_handler(kind, on_error)
    app.add_exception_handler(HTTPException, on_routing_error)
    app.include_router(_inference(frontend))
    app.include_router(messages_router(frontend))
    app.include_router(_operations(frontend))
    return app


def _inference(frontend: Frontend) -> APIRouter:
    async def identify(request: Request) -> None:
        """Before the body is read. Raises a BatonError for those who may not ask."""
        request.state.identity = await frontend.who_asks(request.headers)

    router = APIRouter(dependencies=[Depends(identify)])
    started = int(time.time())

    def card() -> dict[str, Any]:
        return {
            "id": frontend.model_name,
            "object": "model",
            "created": started,
            "owned_by": "baton",
            "root": frontend.model_name,
            "parent": None,
            "max_model_len": frontend.cluster.limits().max_model_len,
            "default_sampling_params": sampling_to_json(frontend.defaults.sampling),
        }

    @router.api_route("/v1/models", methods=["GET", "HEAD"])
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [card()]})

    @router.api_route("/v1/models/{model:path}", methods=["GET", "HEAD"])
    async def model(model: str) -> Response:
        check_model(model, frontend)
        return JSONResponse(card())

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        fields = parse(CompletionRequest, await read_json(request))
        check_model(fields.model, frontend)
        constraint = asked_constraint(fields)
        names = completion_fields(fields, constraint)
        try:
            asked = await completion_requests(fields, constraint, frontend)
        except BatonError as error:
            raise to_http_error(error, names) from error
        ask = _ask(request, fields, asked.requests, names, frontend)
        return Answer(frontend, replace(ask, echoes=asked.echoes))

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        fields = parse(ChatRequest, await read_json(request))
        check_model(fields.model, frontend)
        form = form_of(fields)
        names = chat_fields(fields, form)
        try:
            chat = await prepared_chat(fields, form, frontend)
        except BatonError as error:
            raise to_http_error(error, names) from error
        return Answer(
            frontend, _ask(request, fields, [chat.request], names, frontend, chat.reading)
        )

    router.include_router(responses_router(frontend))

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        fields = parse(TokenizeRequest, await read_json(request))
        check_model(fields.model, frontend)
        try:
            token_ids = await _tokenized(fields, frontend)
            codec = frontend.text_codec()
        except BatonError as error:
            raise to_http_error(error, FIELDS) from error
        strings = codec.token_strings(token_ids) if fields.return_token_strs else None
        return JSONResponse(
            {
                "count": len(token_ids),
                "max_model_len": frontend.cluster.limits().max_model_len,
                "tokens": token_ids,
                "token_strs": strings,
            }
        )

    @router.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        fields = parse(DetokenizeRequest, await read_json(request))
        check_model(fields.model, frontend)
        if fields.tokens and not 0 <= min(fields.tokens) <= max(fields.tokens) <= _UINT32:
            raise InvalidParam("tokens", "has what is no token id")
        try:
            text = await frontend.detokenize(fields.tokens, skip_special_tokens=False)
        except BatonError as error:
            raise to_http_error(error, {"token_ids": "tokens"}) from error
        return JSONResponse({"prompt": text})

    return router


def _operations(frontend: Frontend) -> APIRouter:
    router = APIRouter()

    @router.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        """Whether a request would find a route now."""
        is_ready = frontend.cluster.has_route() and not frontend.is_leaving
        return Response(status_code=200 if is_ready else 503)

    @router.api_route("/version", methods=["GET", "HEAD"])
    async def version() -> Response:
        return JSONResponse({"version": baton_version()})

    @router.api_route("/metrics", methods=["GET", "HEAD"])
    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(frontend.metrics.registry), media_type=content_type)

    return router


def _ask(
    request: Request,
    fields: Sampled,
    requests: Sequence[pb.GenerateRequest],
    names: dict[str, str],
    frontend: Frontend,
    reading: Reading = PLAIN,
) -> Ask:
    is_streamed = bool(fields.stream)
    options = fields.stream_options if is_streamed else None
    if is_streamed and fields.prompt_logprobs is not None:
        raise InvalidParam("prompt_logprobs", "is not for answers that are streamed")
    texts, num_top = TokenTexts(frontend.codec), fields.num_top_logprobs
    if num_top is not None and not is_streamed:
        try:
            bound_logprobs(requests, num_top)
        except BatonError as error:
            raise to_http_error(error, names) from error
    form = ChatLogprobs if isinstance(fields, ChatRequest) else CompletionLogprobs
    return Ask(
        requests=requests,
        identity=request.state.identity,
        fields=names,
        new_wire=partial(
            OpenAiWire,
            model=frontend.model_name,
            is_chat=isinstance(fields, ChatRequest),
            says_usage=bool(options and options.include_usage),
            says_usage_always=bool(options and options.continuous_usage_stats),
            says_tokens=bool(fields.return_token_ids),
        ),
        is_streamed=is_streamed,
        time_left_s=time_left_s(request),
        reading=reading,
        new_logprobs=None if num_top is None else partial(form, texts, num_top),
        new_prompt_logprobs=None
        if fields.prompt_logprobs is None
        else partial(PromptLogprobs, texts, fields.prompt_logprobs),
    )


async def _tokenized(fields: TokenizeRequest, frontend: Frontend) -> list[int]:
    if (fields.prompt is None) == (fields.messages is None):
        raise InvalidParam("prompt", "or messages must be given, and not both")
    if fields.prompt is not None:
        adds_special = fields.add_special_tokens is not False
        return await frontend.tokenize(fields.prompt, add_special_tokens=adds_special)
    assert fields.messages is not None
    prompt = await rendered_prompt(fields, fields.messages, tools_of(fields), frontend)
    return prompt.token_ids


class _PlainPath:
    """`/v1/models/` and `/v1//models` are `/v1/models`: base URLs end with a slash or without."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["path"] = _SLASHES.sub("/", scope["path"]).rstrip("/") or "/"
        await self._app(scope, receive, send)


def _routing_error(request: Request, error: HTTPException) -> HttpError:
    where = f"{request.method[:20]} {request.url.path[:200]}"
    problem = {404: "unknown path", 405: "wrong method"}.get(error.status_code, error.detail)
    return HttpError(error.status_code, f"{problem}: {where}")
