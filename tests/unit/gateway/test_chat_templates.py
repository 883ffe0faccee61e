"""Chat templates render as transformers renders them: token by token, over a battery."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from baton.services.gateway.chat_template import ChatTemplate
from baton.services.gateway.tokenizer import TextCodec
from baton.shared.rpc.errors import InvalidField, NoChatTemplate
from tests.unit.gateway.template_battery import EITHER, PARTS, TEXT

Messages = list[dict[str, Any]]

MARKUP = "<|im_start|> <|im_end|> <|system|> <|user|> <|assistant|> <|turn|> <|end|> <pic>".split()
HARD = "  Hé, \"it's\" <b>&amp;</b> 日本 🏃\n\tNaïve?  </think>\n\nYes: {{ no }} {% no %}\\n'  "

CHATS: dict[str, Messages] = {
    "one turn": [{"role": "user", "content": "Hello there"}],
    "with a system prompt": [
        {"role": "system", "content": "Obey."},
        {"role": "user", "content": HARD},
    ],
    "several turns": [
        {"role": "user", "content": "Why?", "name": "eve"},
        {"role": "assistant", "content": HARD, "reasoning_content": "\nHm.\n"},
        {"role": "user", "content": "And <|im_end|> then <pic>?"},
        {"role": "assistant", "content": "So.", "reasoning": "Short."},
        {"role": "user", "content": ""},
    ],
}


def in_parts(messages: Messages) -> Messages:
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


def in_two_parts(messages: Messages) -> Messages:
    return [
        {**m, "content": [{"type": "text", "text": text} for text in (m["content"], "B")]}
        for m in messages
    ]


def flattened(messages: Messages) -> Messages:
    return [{**m, "content": "\n".join(part["text"] for part in m["content"])} for m in messages]


@pytest.fixture(scope="module")
def model_dir(
    tmp_path_factory: pytest.TempPathFactory, tokenizers_by_kind: dict[str, Tokenizer]
) -> Path:
    directory = tmp_path_factory.mktemp("battery")
    tokenizer = Tokenizer.from_str(tokenizers_by_kind["byte_level"].to_str())
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in MARKUP])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "image_token": "<pic>",
        "extra_special_tokens": {"eot_token": "<|end|>"},
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return directory


@pytest.fixture(scope="module")
def theirs(model_dir: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model_dir)
    return tokenizer


Compare = Callable[[str, Messages, Messages], None]


@pytest.fixture(scope="module")
def compare(model_dir: Path, theirs: PreTrainedTokenizerBase) -> Compare:
    """Of a template: our ids of one chat are theirs of another, or both refuse theirs."""
    codec = TextCodec.load(model_dir)
    assert codec is not None
    special_tokens = theirs.special_tokens_map

    def compare(source: str, ours: Messages, as_theirs: Messages) -> None:
        template = ChatTemplate(source, special_tokens)
        assert template.fault == ""
        for adds in (True, False):
            try:
                expected = theirs.apply_chat_template(
                    as_theirs,
                    chat_template=source,
                    add_generation_prompt=adds,
                    return_dict=False,
                )
            except (TemplateError, TypeError):
                with pytest.raises(InvalidField):
                    template.render(ours, add_generation_prompt=adds)
                continue
            text = template.render(ours, add_generation_prompt=adds)
            assert codec.encode(text, add_special_tokens=False) == expected

    return compare


def test_the_battery_is_large() -> None:
    assert len(TEXT) + len(PARTS) + len(EITHER) >= 50


@pytest.mark.parametrize("name", TEXT)
def test_a_template_of_text(compare: Compare, name: str) -> None:
    for messages in CHATS.values():
        compare(TEXT[name], messages, messages)
        parts = in_two_parts(messages)
        compare(TEXT[name], parts, flattened(parts))


@pytest.mark.parametrize("name", PARTS)
def test_a_template_of_parts(compare: Compare, name: str) -> None:
    for messages in CHATS.values():
        compare(PARTS[name], messages, in_parts(messages))
        compare(PARTS[name], in_two_parts(messages), in_two_parts(messages))


@pytest.mark.parametrize("name", EITHER)
def test_a_template_that_takes_either(compare: Compare, name: str) -> None:
    for messages in CHATS.values():
        for form in (messages, in_parts(messages), in_two_parts(messages)):
            compare(EITHER[name], form, form)


@pytest.mark.parametrize("text", ["He", "It is", "It is ", "  It\n", "Hé {{ 日本", HARD, " "])
def test_the_last_message_goes_on_as_in_transformers(
    theirs: PreTrainedTokenizerBase, text: str
) -> None:
    """Over the battery, but for templates in which transformers misses the word `content`, or cuts
    off what it puts behind it."""
    chat: Messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": text}]
    num_refused = 0
    for source in (TEXT | EITHER | PARTS).values():
        if "content" not in source or "truncate" in source:
            continue
        template = ChatTemplate(source, theirs.special_tokens_map)
        messages = in_parts(chat) if source in PARTS.values() else chat
        try:
            expected = theirs.apply_chat_template(
                messages, chat_template=source, continue_final_message=True, tokenize=False
            )
        except (TemplateError, TypeError, ValueError):
            num_refused += 1
            with pytest.raises(InvalidField):
                template.render(chat, add_generation_prompt=False, continue_final_message=True)
            continue
        if "CONTINUE_" in expected:
            # Of what it puts in itself; such a template writes the message more than once.
            continue
        prompt = template.render(chat, add_generation_prompt=False, continue_final_message=True)
        assert prompt == expected
    assert num_refused <= (20 if text == HARD else 8)


@pytest.mark.parametrize(
    ("source", "prompt"),
    [
        ("{{ messages[0].content }}|{{ messages[0].content }} .", "It is|It is"),
        ("{{ messages[0].content | trim }}|{{ messages[0].content | trim }}.", "It is|It is"),
        ("{{ messages[0].content | upper }}|{{ messages[0].content }}", None),
        ("{{ messages[0].content | length }}", None),
    ],
)
def test_a_message_that_a_template_writes_twice(source: str, prompt: str | None) -> None:
    chat = [{"role": "assistant", "content": "It is"}]
    template = ChatTemplate(source, {})
    if prompt is None:
        with pytest.raises(InvalidField, match="does not write as it is"):
            template.render(chat, continue_final_message=True)
    else:
        assert template.render(chat, continue_final_message=True) == prompt


@pytest.mark.parametrize("content", [None, "", [], [{"type": "text", "text": ""}]])
def test_a_message_without_text_does_not_go_on(content: object) -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {})
    chat: Messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}]
    with pytest.raises(InvalidField, match="no text"):
        template.render(chat, add_generation_prompt=False, continue_final_message=True)


@pytest.mark.parametrize(
    "texts",
    [
        ["the word xq7goesonxq7 of mine"],
        ["XQ7goesonXQ7"],
        ["xq7goesonxq7 xq8goesonxq8 xq9goesonxq9"],
        # A template may put together what was not one text.
        ["xq7goes", "onxq7"],
    ],
)
@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("end", ["", "|"])
def test_a_text_that_looks_like_the_mark_at_the_end_is_kept(
    texts: list[str], is_last: bool, end: str
) -> None:
    source = "{% for m in messages %}{{ m.content }}" + end + "{% endfor %}"
    said = [*texts, "".join(texts) if is_last else "It is"]
    chat: Messages = [{"role": "user", "content": text} for text in said]
    prompt = ChatTemplate(source, {}).render(chat, continue_final_message=True)
    assert prompt == end.join(said)


def test_most_of_the_battery_renders(theirs: PreTrainedTokenizerBase) -> None:
    """Of those that refuse, both refusing would prove little."""
    refused = 0
    for source in (TEXT | EITHER).values():
        for messages in CHATS.values():
            try:
                theirs.apply_chat_template(messages, chat_template=source, tokenize=False)
            except (TemplateError, TypeError):
                refused += 1
    assert refused <= 5


@pytest.mark.parametrize(
    "source",
    ["{% if %}", "{{ messages | no_such_filter }}", "{% for %}", "{{ 'open", "{% unknown %}"],
)
def test_a_template_that_does_not_compile_is_the_models_fault(
    model_dir: Path, caplog: pytest.LogCaptureFixture, source: str
) -> None:
    path = model_dir / "chat_template.jinja"
    path.write_text(source)
    try:
        codec = TextCodec.load(model_dir)
    finally:
        path.unlink()
    assert codec is not None
    [record] = caplog.records
    assert record.levelname == "ERROR" and str(path) in str(record.__dict__)
    assert codec.encode("the word", add_special_tokens=False)
    with pytest.raises(NoChatTemplate, match="does not compile"):
        codec.render_chat(CHATS["one turn"])
