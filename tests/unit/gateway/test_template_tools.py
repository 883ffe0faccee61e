"""Tools in chat templates: rendered as transformers renders them, in whatever way a template takes
them. The templates have the constructs of those of real models, in words of our own."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from baton.services.gateway.chat_format import ChatFormat
from baton.services.gateway.chat_template import ChatTemplate
from baton.services.gateway.formats.choose import REASONING_TAGS
from baton.services.gateway.formats.choose import TOOL_FORMATS as PARSED
from baton.shared.answer_formats import REASONING_FORMATS, TOOL_FORMATS
from baton.shared.rpc.errors import InvalidField

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Of <a> place\'s "sky".',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL: dict[str, Any] = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Straße", "days": 3}},
}
CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "How is it?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "Rain.", "tool_call_id": "abcdefghi", "name": "weather"},
]

OBJECTS = """{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}
<tool_call>{"name": ...}</tool_call>{% endif %}{% for m in messages %}[{{ m.role }}]
{% if m.content is string %}{{ m.content }}{% endif %}
{% for c in m.tool_calls %}<tool_call>{{ c.function.arguments | tojson }}{{ c.function.name }}
{% endfor %}{% endfor %}"""
ITEMS = """[gMASK]{% for t in tools or [] %}{{ t.function.name }}{% endfor %}
{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls %}
<tool_call>{{ c.function.name }}{% for k, v in c.function.arguments.items() %}
<arg_key>{{ k }}</arg_key><arg_value>{{ v | tojson if v is not string else v }}</arg_value>
{% endfor %}</tool_call>{% endfor %}{% endfor %}<|assistant|><think></think>"""
TEXT_AND_NONE = """{% for t in tools or [] %}{{ t.function.name }}{% endfor %}
{% for m in messages %}{% if m['role'] == 'assistant' and m['content'] is none %}
{% for c in m['tool_calls'] %}{{ '<｜tool▁call▁begin｜>' + c['type'] + '<｜tool▁sep｜>' +
c['function']['name'] + '```json' + c['function']['arguments'] + '```' }}{% endfor %}
{% elif m['role'] == 'assistant' %}{{ m['content'] + '</think>' }}{% else %}
{{ m['role'] + m['content'] }}{% endif %}{% endfor %}"""
SHORT_IDS = """{% if tools is not none %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}
{% for m in messages %}{% if m.tool_calls is defined %}[TOOL_CALLS] [{% for c in m.tool_calls %}
{% if c.id | length != 9 %}{{ raise_exception('ids have length 9') }}{% endif %}
{{ (c.function | tojson)[:-1] + ', "id": "' + c.id + '"}' }}{% endfor %}]
{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}
{{ raise_exception('ids have length 9') }}{% endif %}{{ m.content + m.tool_call_id }}
{% else %}[INST]{{ m.content }}[THINK][/THINK]{% endif %}{% endfor %}"""
KIMI = """{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_{{ m.role }}|>
{% if m.role == 'tool' %}## Return of {{ m.tool_call_id }}
{% endif %}{{ m.content or '' }}{% if m.tool_calls %}<|tool_calls_section_begin|>
{% for c in m.tool_calls %}<|tool_call_begin|>{{ c.id }}<|tool_call_argument_begin|>
{{ c.function.arguments | tojson }}<|tool_call_end|>{% endfor %}<|tool_calls_section_end|>
{% endif %}{% endfor %}"""
SWITCHED = """{% if tools and enable_thinking %}{{ tools[0].function.name }}{% endif %}
{% for m in messages %}{{ m.role }}{{ m.content }}{{ m.tool_calls }}{% endfor %}{{ effort }}
<function=f><parameter=p>"""
NONE = """{% for m in messages %}{% if m.role != 'tool' %}{{ m.role }}: {{ m.content }}
{% endif %}{% endfor %}"""


def theirs(source: str, chat: list[dict[str, Any]], **options: Any) -> str:
    rendered: Any = render_jinja_template(
        conversations=[chat], chat_template=source, add_generation_prompt=True, **options
    )
    return str(rendered[0][0])


def with_calls(**changes: Any) -> list[dict[str, Any]]:
    """The chat with another form of what calls have, or are given beside."""
    calls = [
        {**CALL, "function": {**CALL["function"], **changes.get("function", {})}} for _ in range(2)
    ]
    return [CHAT[0], {**CHAT[1], "content": changes.get("content"), "tool_calls": calls}, CHAT[2]]


@pytest.mark.parametrize("source", [OBJECTS, SHORT_IDS])
def test_as_transformers_renders_it(source: str) -> None:
    ours = ChatTemplate(source, {}).render(CHAT, tools=TOOLS)
    assert ours == theirs(source, CHAT, tools=TOOLS)
    assert ours.count("weather") == 3
    ours = ChatTemplate(source, {}).render(CHAT[:1])
    assert ours == theirs(source, CHAT[:1])


def test_content_that_is_not_there_is_none_or_empty_as_the_template_likes() -> None:
    ours = ChatTemplate(ITEMS, {}).render(CHAT, tools=TOOLS)
    assert ours == theirs(ITEMS, with_calls(content=""), tools=TOOLS)
    assert "None" not in ours and "<arg_value>3</arg_value>" in ours
    written = {"arguments": json.dumps(CALL["function"]["arguments"], ensure_ascii=False)}
    ours = ChatTemplate(TEXT_AND_NONE, {}).render(CHAT, tools=TOOLS)
    assert ours == theirs(TEXT_AND_NONE, with_calls(function=written), tools=TOOLS)
    assert "Straße" in ours


def test_arguments_that_are_no_json_stay_what_they_are() -> None:
    chat = with_calls(function={"arguments": "{oops"})
    assert "{oops" in ChatTemplate(TEXT_AND_NONE, {}).render(chat)
    assert '"{oops"' in ChatTemplate(OBJECTS, {}).render(chat)


def test_ids_from_elsewhere_fit() -> None:
    long = "call_0123456789abcdef"
    chat = [
        CHAT[0],
        {"role": "assistant", "content": None, "tool_calls": [{**CALL, "id": long}]},
        {**CHAT[2], "tool_call_id": long},
    ]
    text = ChatTemplate(SHORT_IDS, {}).render(chat)
    [made] = {text.split('"id": "')[1][:9], text.split("Rain.")[1][:9]}
    assert made.isalnum() and made.isascii()
    shown = OBJECTS.replace("{{ c.function.name }}", "{{ c.function.name }}{{ c.id }}")
    assert long in ChatTemplate(shown, {}).render(chat)


def test_ids_that_are_a_calls_only_name_are_made() -> None:
    """As Kimi's template has them, over all of the chat, wherever the client's come from."""
    chat = [
        CHAT[0],
        {"role": "assistant", "tool_calls": [{**CALL, "id": "abcdefgh1"}, {**CALL, "id": "c2"}]},
        {**CHAT[2], "tool_call_id": "c2"},
        {**CHAT[2], "tool_call_id": "abcdefgh1"},
        {"role": "assistant", "tool_calls": [{**CALL, "id": "c3"}]},
        {**CHAT[2], "tool_call_id": "unknown"},
    ]
    name = CALL["function"]["name"]
    calls = [f"functions.{name}:{number}" for number in range(3)]
    text = ChatTemplate(KIMI, {}).render(chat)
    assert [part.split("<")[0] for part in text.split("<|tool_call_begin|>")[1:]] == calls
    returns = [part.split("\n")[0] for part in text.split("## Return of ")[1:]]
    assert returns == [calls[1], calls[0], "unknown"]


@pytest.mark.parametrize(
    ("source", "chat", "tools", "field"),
    [
        (NONE, CHAT[:1], TOOLS, "tools"),
        (NONE, CHAT[:2], None, "messages[1].tool_calls"),
        (NONE, [CHAT[0], CHAT[2]], None, "messages[1].role"),
        (SWITCHED, CHAT[:1], TOOLS, "tools"),
    ],
)
def test_what_would_be_left_out_is_refused(
    source: str, chat: list[dict[str, Any]], tools: Any, field: str
) -> None:
    with pytest.raises(InvalidField) as caught:
        ChatTemplate(source, {}).render(chat, tools=tools)
    assert caught.value.field == field


def test_variables() -> None:
    told = ChatTemplate(SWITCHED, {}).render(CHAT[:1], variables={"effort": "high"})
    assert told == theirs(SWITCHED, CHAT[:1], effort="high")


@pytest.mark.parametrize(
    ("source", "tools", "reasoning"),
    [
        (OBJECTS, "hermes", "none"),
        (ITEMS, "glm", "think"),
        (TEXT_AND_NONE, "deepseek", "think"),
        (SHORT_IDS, "mistral", "mistral"),
        (SWITCHED, "qwen3-coder", "none"),
        (KIMI, "kimi", "none"),
        ("answer with <|tool_call|> followed by a JSON list", "granite", "none"),
        (NONE, "none", "none"),
        ("{{ '<|channel|>' }}<tool_call>{{ '<|message|>' }}</think>", "harmony", "harmony"),
        ("<|python_tag|>", "llama3", "none"),
        ('{{ \'{"name": function name, "parameters": x}\' }}', "llama3", "none"),
        ('{{ "{\\"name\\": function name, \\"parameters\\": x}" }}', "llama3", "none"),
        (
            '<|python_start|>{{ \'{"name": function name, "parameters": x}\' }}<|python_end|>',
            "llama3",
            "none",
        ),
        ("[func_name1(params_name1=params_value1)]", "pythonic", "none"),
    ],
)
def test_the_template_tells_the_formats(source: str, tools: str, reasoning: str) -> None:
    chosen = ChatFormat.choose(source, {})
    assert (chosen.tools, chosen.reasoning) == (tools, reasoning)
    given = ChatFormat.choose(source, {}, tools="hermes", reasoning="none")
    assert (given.tools, given.reasoning) == ("hermes", "none")
    assert ChatFormat.choose(None, {}) == ChatFormat()


def test_flags_name_what_there_is() -> None:
    assert set(TOOL_FORMATS) == {"auto", "none", *PARSED}
    assert set(REASONING_FORMATS) == {"auto", "none", "harmony", *REASONING_TAGS}
