"""TextCodec: loading, encoding, decoding, chat templates."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders

from baton.services.gateway.tokenizer import TextCodec
from baton.shared.model_files.fields import ModelError
from baton.shared.rpc.errors import InvalidField


def load(model_dir: Path) -> TextCodec:
    codec = TextCodec.load(model_dir)
    assert codec is not None
    return codec


def test_without_a_tokenizer_there_is_no_codec(tmp_path: Path) -> None:
    assert TextCodec.load(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0"}'])
def test_a_broken_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json: ") as raised:
        TextCodec.load(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"chat_template": 3}', '{"eos_token": {"text": "</s>"}}']
)
def test_a_broken_tokenizer_config_is_named(model_dir: Path, content: str) -> None:
    (model_dir / "tokenizer_config.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: "):
        TextCodec.load(model_dir)


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.CTC(),
        decoders.BPEDecoder(),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
        decoders.Sequence([decoders.Replace("a", "b"), decoders.ByteLevel()]),
    ],
)
def test_a_decoder_whose_text_cannot_be_streamed_is_refused(
    tmp_path: Path, tokenizers_by_kind: dict[str, Tokenizer], decoder: decoders.Decoder
) -> None:
    tokenizer = Tokenizer.from_str(tokenizers_by_kind["byte_level"].to_str())
    tokenizer.decoder = decoder
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match="cannot be streamed"):
        TextCodec.load(tmp_path)


def test_encode_follows_the_post_processor(byte_level: TextCodec) -> None:
    plain = byte_level.encode("the word", add_special_tokens=False)
    assert byte_level.encode("the word") == [0, *plain]
    assert byte_level.decode(plain) == "the word"


def test_special_tokens_in_the_text_are_recognised(byte_level: TextCodec) -> None:
    token_ids = byte_level.encode("word</s>", add_special_tokens=False)
    assert token_ids[-1] == 1
    assert byte_level.decode(token_ids) == "word"
    assert byte_level.decode(token_ids, skip_special=False) == "word</s>"


def test_truncation_and_padding_of_the_file_do_not_apply(
    tmp_path: Path, tokenizers_by_kind: dict[str, Tokenizer]
) -> None:
    tokenizer = Tokenizer.from_str(tokenizers_by_kind["byte_level"].to_str())
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    codec = load(tmp_path)
    text = "the word was with the baton"
    assert codec.decode(codec.encode(text)) == text
    assert len(codec.encode("the")) < 64


async def test_other_tasks_run_while_a_huge_text_is_encoded(byte_level: TextCodec) -> None:
    text = "".join(f"the word {number} was with the baton. " for number in range(6000))
    encoding = asyncio.create_task(byte_level.encode_async(text))
    num_turns = 0
    while not encoding.done():
        await asyncio.sleep(0.001)
        num_turns += 1
    # A call that kept the interpreter to itself would leave one or two.
    assert num_turns > 5
    assert await encoding == byte_level.encode(text)
    plain = await byte_level.encode_async("the", add_special_tokens=False)
    assert plain == byte_level.encode("the")[1:]


TEMPLATE = """{{ bos_token }}
{% for message in messages %}
    {% if message.role == "tool" %}{{ raise_exception("no tools") }}{% endif %}
[{{ message.role }}] {{ message.content }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}
[assistant]
{% endif %}
"""
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "{{ bos_token }}"}]


@pytest.fixture
def chat_codec(model_dir: Path) -> TextCodec:
    config = {"chat_template": TEMPLATE, "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (model_dir / "tokenizer_config.json").write_text(json.dumps(config))
    return load(model_dir)


def test_chat_is_rendered_by_the_models_template(chat_codec: TextCodec) -> None:
    told = "<s>\n[user] Hi</s>\n[assistant] {{ bos_token }}</s>\n"
    assert chat_codec.render_chat(CHAT, add_generation_prompt=False) == told
    assert chat_codec.render_chat(CHAT) == told + "[assistant]\n"


def test_a_template_gets_what_transformers_gives_it(model_dir: Path) -> None:
    template = """{% set who = "a" %}
{% generation %}
{% set who = "b" %}
{{ messages[0].content }} {{ who }}
{% endgeneration %}
{{ who }} {{ strftime_now("%%|%Y") }}
"""
    (model_dir / "chat_template.jinja").write_text(template)
    codec = load(model_dir)
    before, text, after = time.localtime(), codec.render_chat(CHAT), time.localtime()
    assert text in {f"Hi b\na %|{now.tm_year}" for now in (before, after)}


def test_what_the_template_refuses_is_the_clients_error(chat_codec: TextCodec) -> None:
    with pytest.raises(InvalidField, match="no tools"):
        chat_codec.render_chat([{"role": "tool", "content": ""}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages + 1 }}",
        "{{ undefined.attribute }}",
    ],
)
def test_a_template_cannot_reach_out_or_crash(model_dir: Path, template: str) -> None:
    (model_dir / "chat_template.jinja").write_text(template)
    codec = load(model_dir)
    assert codec.chat_template == template
    with pytest.raises(InvalidField):
        codec.render_chat(CHAT)


def test_of_named_templates_the_default_is_taken(model_dir: Path) -> None:
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    (model_dir / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert load(model_dir).chat_template == "d"


def test_files_of_templates_go_before_the_configuration(model_dir: Path) -> None:
    (model_dir / "tokenizer_config.json").write_text(json.dumps({"chat_template": "c"}))
    more = model_dir / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("t")
    # As in transformers: they are all that counts, and none of them is the default.
    assert load(model_dir).chat_template is None
    (model_dir / "chat_template.jinja").write_text("j")
    assert load(model_dir).chat_template == "j"
    (more / "default.jinja").write_text("d")
    assert load(model_dir).chat_template == "d"


def test_no_template_no_chat(byte_level: TextCodec) -> None:
    assert byte_level.chat_template is None
    with pytest.raises(InvalidField, match="chat template"):
        byte_level.render_chat(CHAT)
