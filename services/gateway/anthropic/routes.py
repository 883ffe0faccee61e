"""/v1/messages and /v1/messages/count_tokens, as Anthropic has them."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from baton.services.gateway.anthropic.reading import chat_form, prompt_request
from baton.services.gateway.anthropic.schema import MessagesRequest, Prompt
from baton.services.gateway.anthropic.wire import MessagesWire
from baton.services.gateway.frontend import Frontend
from baton.services.gateway.openai.answer import Answer, Ask
from baton.services.gateway.openai.body import read_json
from baton.services.gateway.openai.chat_form import num_prompt_tokens, prepared
from baton.services.gateway.openai.errors import InvalidParam
from baton.services.gateway.openai.request import check_model, time_left_s

_PATH = "/v1/messages"
_VERSION_HEADER = "anthropic-version"
_OLD_VERSION = "2023-01-01"
"""Its streams have another form. Later ones differ in what they refuse."""


def is_messages_path(path: str) -> bool:
    """Whether errors there have Anthropic's form."""
    return path == _PATH or path.startswith(f"{_PATH}/")


def messages_router(frontend: Frontend) -> APIRouter:
    async def identify(request: Request) -> None:
        """Before the body is read. Raises a BatonError for those who may not ask."""
        request.state.identity = await frontend.who_asks(request.headers)
        if request.headers.get(_VERSION_HEADER) == _OLD_VERSION:
            raise InvalidParam(_VERSION_HEADER, f"is {_OLD_VERSION}; limit: 2023-06-01 or later")

    router = APIRouter(dependencies=[Depends(identify)])
    template = frontend.codec.chat_template if frontend.codec else None

    @router.post(_PATH)
    async def create(request: Request) -> Response:
        body = await read_json(request)
        fields = prompt_request(MessagesRequest, body)
        check_model(fields.model, frontend)
        form = chat_form(fields, body, template)
        asked = await prepared(form, frontend)
        # Coding agents ask for more than there is room for. The answer says that it met the end.
        asked.chat.request.clamp_max_tokens = True
        thinking = fields.thinking
        ask = Ask(
            requests=[asked.chat.request],
            reading=asked.chat.reading,
            identity=request.state.identity,
            fields=asked.names,
            places=form.places,
            new_wire=partial(
                MessagesWire,
                model=frontend.model_name,
                max_tokens=fields.max_tokens,
                shows_thinking=thinking is None or thinking.display != "omitted",
            ),
            is_streamed=bool(fields.stream),
            time_left_s=time_left_s(request),
            id_headers=(b"x-request-id", b"request-id"),
        )
        return Answer(frontend, ask)

    @router.post(f"{_PATH}/count_tokens")
    async def count_tokens(request: Request) -> Response:
        body = await read_json(request)
        fields = prompt_request(Prompt, body)
        check_model(fields.model, frontend)
        num_tokens = await num_prompt_tokens(chat_form(fields, body, template), frontend)
        return JSONResponse({"input_tokens": num_tokens})

    return router
