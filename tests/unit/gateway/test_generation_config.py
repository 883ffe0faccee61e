"""Sampling defaults of generation_config.json: read, applied to what requests leave out, shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from baton.services.gateway import generate as path
from baton.services.gateway.admission import Limits, ModelDefaults, admit
from baton.services.gateway.generation_config import read_default_sampling
from baton.services.gateway.process import parse_args
from baton.services.gateway.tokenizer import TextCodec
from baton.shared.model_files.fields import ModelError
from baton.shared.rpc.convert import sampling_to_json
from baton.shared.sampling import SamplingParams
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import types_pb2
from tests.unit.gateway.null_frontend import ask, serving
from tests.unit.gateway.scripted_frontend import ScriptedFrontend

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
VOCAB_SIZE = 100


def read(model_dir: Path, **values: Any) -> dict[str, Any]:
    (model_dir / "generation_config.json").write_text(json.dumps(values))
    return sampling_to_json(read_default_sampling(model_dir, VOCAB_SIZE))


def test_what_the_file_says_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_default_sampling(tmp_path, VOCAB_SIZE) == types_pb2.SamplingParams()
    given = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1}
    # What does not count: how transformers chooses, and ids that others read.
    others = {"do_sample": False, "eos_token_id": [1], "typical_p": 0.5, "max_length": 4096}
    assert read(tmp_path, **given, **others) == given
    assert read(tmp_path, temperature=None, top_k=None) == {}
    assert read(tmp_path, temperature=1, top_k=20.0, max_new_tokens=99) == {
        "max_tokens": 99,
        "temperature": 1.0,
        "top_k": 20,
    }
    for off in (0, -1, VOCAB_SIZE + 1):
        assert read(tmp_path, top_k=off) == {"top_k": 0}
    assert caplog.records == []


def test_a_repetition_penalty_is_a_default(tmp_path: Path) -> None:
    assert read(tmp_path, repetition_penalty=1.0) == {}
    given = {"repetition_penalty": 1.05, "temperature": 0.5}
    assert read(tmp_path, **given) == given


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": -0.5}, "top_p"),
        ({"top_k": "all"}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
    ],
)
def test_a_default_that_no_request_may_have_is_refused(
    tmp_path: Path, values: dict[str, Any], field: str
) -> None:
    with pytest.raises(ModelError, match=rf"generation_config\.json: {field}: "):
        read(tmp_path, **values)


async def test_defaults_are_for_what_a_request_leaves_out() -> None:
    defaults = ModelDefaults(
        sampling=types_pb2.SamplingParams(temperature=0.5, top_k=20, min_p=0.25, max_tokens=30)
    )
    limits = Limits(vocab_size=VOCAB_SIZE, max_model_len=64, max_pool_tokens=None)

    async def params(num_prompt: int = 1, **sampling: Any) -> SamplingParams:
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(token_ids=[1] * num_prompt),
            sampling=types_pb2.SamplingParams(seed=1, **sampling),
        )
        admitted = await admit(request, limits, encode=None, defaults=defaults)
        return admitted.params

    assert await params() == SamplingParams(
        temperature=0.5, top_k=20, min_p=0.25, max_tokens=30, seed=1
    )
    assert await params(temperature=0.0, top_k=0, max_tokens=5) == SamplingParams(
        temperature=0.0, top_k=0, min_p=0.25, max_tokens=5, seed=1
    )
    assert (await params(num_prompt=60)).max_tokens == 4


@pytest.mark.parametrize(
    ("max_tokens", "completion", "chat"), [(None, 16, 507), (40, 16, 40), (5, 5, 5)]
)
async def test_the_length_of_answers_without_one(
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    max_tokens: int | None,
    completion: int,
    chat: int,
) -> None:
    (model_dir / "chat_template.jinja").write_text("{{ messages[0].content }}")
    codec = TextCodec.load(model_dir)
    assert codec is not None
    sampling = types_pb2.SamplingParams(temperature=0.6, top_p=0.95, max_tokens=max_tokens)
    frontend = ScriptedFrontend(codec, {}, default_sampling=sampling)
    monkeypatch.setattr(path, "attempts", frontend.attempts)
    async with serving(frontend) as http:
        reply = await ask(http.address, COMPLETIONS, {"prompt": [5]})
        assert json.loads(reply.body)["usage"]["completion_tokens"] == completion
        messages = [{"role": "user", "content": "abc xy"}]
        reply = await ask(http.address, CHAT, {"messages": messages})
        assert json.loads(reply.body)["usage"]["completion_tokens"] == chat

        [card] = json.loads((await ask(http.address, "/v1/models")).body)["data"]
        shown = {"temperature": 0.6, "top_p": 0.95}
        if max_tokens is not None:
            shown["max_tokens"] = max_tokens
        assert card["default_sampling_params"] == shown


def test_a_flag_switches_them_off(tmp_path: Path) -> None:
    assert parse_args(["--model", str(tmp_path)]).generation_config == "auto"
    args = parse_args(["--model", str(tmp_path), "--generation-config", "none"])
    assert args.generation_config == "none"
