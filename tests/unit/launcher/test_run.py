"""What `make run` asks a model first."""

from __future__ import annotations

import pytest

from baton.services.launcher.run import first_request
from baton.v1 import inference_service_pb2 as pb


def asked(is_demo: bool = False, **info: object) -> pb.GenerateRequest:
    model = pb.GetModelInfoResponse(vocab_size=5, **info)  # type: ignore[arg-type]
    return first_request(model, is_demo=is_demo)


def test_a_question_by_the_models_template(capsys: pytest.CaptureFixture[str]) -> None:
    request = asked(has_tokenizer=True, chat_template="{{ messages }}")
    [message] = request.messages.messages
    assert message.role == "user" and message.content.endswith("?")
    assert capsys.readouterr().out == f"{message.content}\n\n"
    # It ends where the model ends.
    assert not request.sampling.ignore_eos and request.clamp_max_tokens


def test_others_go_on_with_a_text_or_with_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    for info in ({}, {"is_demo": True, "chat_template": "{{ messages }}"}):
        request = asked(has_tokenizer=True, **info)  # type: ignore[arg-type]
        assert request.text == capsys.readouterr().out != ""
    assert list(asked().token_ids.token_ids) == [1, 2, 3, 4]
    assert capsys.readouterr().out == ""
