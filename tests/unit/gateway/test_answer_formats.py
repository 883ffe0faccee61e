"""How models write calls and reasoning: what is made of it, however the text is cut."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest

from baton.services.gateway.answer_parts import Arguments, Content, Part, Reasoning, ToolCall
from baton.services.gateway.chat_format import ChatFormat
from baton.services.gateway.formats.calls import call_id
from baton.services.gateway.formats.source import merged

TOOLS: dict[str, dict[str, Any]] = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "when": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "exact": {"type": "boolean"},
        },
    },
    "time": {},
}

Told = list[str | tuple[str, str]]
"""Texts are content, ("think", text) is reasoning, (name, arguments) a call."""


def read(
    form: str,
    pieces: list[str],
    *,
    reasoning: str = "none",
    prompt: str = "",
    tools: dict[str, dict[str, Any]] = TOOLS,
    is_parallel: bool = True,
) -> list[Part]:
    chat_format = ChatFormat(form, reasoning)
    reading = chat_format.reading(prompt, tools, is_parallel=is_parallel)
    parser = reading.new_parser("answer")
    parts = [part for piece in pieces for part in parser.feed([], piece)]
    return merged([*parts, *parser.finish("")])


def told(parts: list[Part]) -> Told:
    result: Told = []
    names: list[str] = []
    for part in parts:
        match part:
            case Content(text):
                result.append(text)
            case Reasoning(text):
                result.append(("think", text))
            case ToolCall(index, made_id, name):
                assert index == len(names)
                assert made_id == call_id("answer", index)
                names.append(name)
                result.append((name, ""))
            case Arguments(index, text):
                assert index == len(names) - 1
                result[-1] = (names[-1], text)
    return result


DEEPSEEK_V3 = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    '{"city": "Ulm"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n'
    "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
DEEPSEEK_V31 = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Ulm"}'
    "<｜tool▁call▁end｜><｜tool▁call▁begin｜>time<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
    "<｜tool▁calls▁end｜>"
)
GLM = (
    "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Ulm</arg_value>\n</tool_call>\n"
    "<tool_call>time</tool_call>"
)
QWEN3_CODER = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nUlm\n</parameter>\n</function>\n"
    "</tool_call>\n<tool_call>\n<function=time>\n</function>\n</tool_call>"
)
HARMONY = (
    '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Ulm"}'
    "<|call|><|start|>assistant to=functions.time<|channel|>commentary json<|message|>{}<|call|>"
)
KIMI = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"
    '<|tool_call_argument_begin|>{"city": "Ulm"}<|tool_call_end|>\n<|tool_call_begin|>'
    "functions.time:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>"
)
HERMES = (
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
)
TWO_CALLS: Told = [("weather", '{"city": "Ulm"}'), ("time", "{}")]

WELL_WRITTEN = {
    "hermes": HERMES,
    "llama3": (
        '{"name": "weather", "parameters": {"city": "Ulm"}}; {"name": "time", "parameters": {}}'
    ),
    "llama3 ": (
        '<|python_start|>{"name": "weather", "parameters": {"city": "Ulm"}}<|python_end|>\n'
        '<|python_tag|>{"name": "time", "parameters": {}}'
    ),
    "pythonic": '[weather(city="Ulm"), time()]',
    "mistral": (
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Ulm"}}, '
        '{"name": "time", "arguments": {}, "id": "123456789"}]'
    ),
    "mistral ": '[TOOL_CALLS]weather[ARGS]{"city": "Ulm"}[TOOL_CALLS]time[CALL_ID]c1[ARGS]{}',
    "deepseek": DEEPSEEK_V3,
    "kimi": KIMI,
    "kimi ": KIMI.replace("functions.", "").replace(":1", ""),
    "granite": (
        '<|tool_call|>[{"name": "weather", "arguments": {"city": "Ulm"}}, '
        '{"name": "time", "arguments": {}}]'
    ),
    "granite ": (
        '<tool_call>[{"name": "weather", "arguments": {"city": "Ulm"}}]'
        '<tool_call>[{"name": "time", "arguments": {}}]'
    ),
    "deepseek ": DEEPSEEK_V31,
    "glm": GLM,
    "qwen3-coder": QWEN3_CODER,
    "harmony": HARMONY,
}
ALONE = {"llama3", "pythonic", "harmony"}
"""Written so, calls are the whole answer, or have headers."""


def kept(form: str, *texts: str) -> list[tuple[str, str, Told]]:
    return [(form, text, [text]) for text in texts]


BADLY_WRITTEN: list[tuple[str, str, Told]] = [
    ("hermes", "<tool_call>no</tool_call> x", ["<tool_call>no</tool_call> x"]),
    ("hermes", '<tool_call>{"name": 3}</tool_call>', ['<tool_call>{"name": 3}</tool_call>']),
    (
        "hermes",
        '<tool_call>{"name": "time", "arguments": [1]}</tool_call>',
        ['<tool_call>{"name": "time", "arguments": [1]}</tool_call>'],
    ),
    ("hermes", '<tool_call>{"name": "ti', ['<tool_call>{"name": "ti']),
    ("hermes", "a <tool_ b", ["a <tool_ b"]),
    # Once its arguments have begun it stays a call, with what there is of them.
    (
        "hermes",
        '<tool_call>{"name": "time", "arguments": {"a": 1</tool_call> x',
        [("time", '{"a": 1'), " x"],
    ),
    ("hermes", '<tool_call>{"name": "time", "arguments": {"a": "b', [("time", '{"a": "b')]),
    # An end too many, and one too few.
    (
        "hermes",
        '<tool_call>{"name": "time", "arguments": {}}}</tool_call>',
        [("time", "{}"), "}"],
    ),
    ("hermes", '<tool_call>{"name": "time", "arguments": {}</tool_call>', [("time", "{}")]),
    # A marker within a text is a text.
    (
        "hermes",
        '<tool_call>{"name": "time", "arguments": {"a": "</tool_call>"}}</tool_call>',
        [("time", '{"a": "</tool_call>"}')],
    ),
    ("hermes", '<tool_call>{"name": "time"}</tool_call>', [("time", "{}")]),
    ("hermes", '<tool_call>{"name": "time", "arguments": null}</tool_call>', [("time", "{}")]),
    (
        "hermes",
        '<tool_call>{"arguments": "{\\"a\\": 1}", "name": "time"}</tool_call>',
        [("time", '{"a": 1}')],
    ),
    (
        "hermes",
        '<tool_call>{"name": "time", "arguments": {}}\n{"name": "time", "arguments": {}}',
        [("time", "{}"), ("time", "{}")],
    ),
    # What it says for arguments is none of them: no call is made up of its name.
    *kept(
        "hermes",
        '<tool_call>{"name": "weather", "arguments": "not json"}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": 5}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": true}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": "\\q"}</tool_call>',
        '<tool_call>{"name": "weather", "arguments"}</tool_call>',
        '<tool_call>{"name": "weather", "Ulm"}</tool_call>',
        '<tool_call>{"name": "weather", "\\q"}</tool_call>',
        '<tool_call>{"parameters": "Ulm", "name": "weather"}</tool_call>',
    ),
    ("hermes", '<tool_call>{"name": "time", "arguments": ""}</tool_call>', [("time", "{}")]),
    ("hermes", '<tool_call>{"name": "time", "id": "a"}</tool_call>', [("time", "{}")]),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "weather", "arguments": "not json"}]',
        ['[TOOL_CALLS] [{"name": "weather", "arguments": "not json"}]'],
    ),
    # Marked as a call it is one, even of what is no tool: who offers the tools can say so.
    ("hermes", '<tool_call>{"name": "no", "arguments": {}}</tool_call>', [("no", "{}")]),
    ("llama3", '<|python_tag|>{"name": "no", "parameters": {}}', [("no", "{}")]),
    # Unmarked, it is what was said.
    ("llama3", '{"name": "no", "parameters": {}}', ['{"name": "no", "parameters": {}}']),
    ("llama3", '{"name": "time"}', ['{"name": "time"}']),
    ("llama3", '{"city": "Ulm"}', ['{"city": "Ulm"}']),
    # Nor is it a call where it says more, or is cut.
    *kept(
        "llama3",
        '{"name": "weather", "parameters": {"a": 1}, "note": "Take a coat."}',
        '{"note": "Take a coat.", "name": "weather", "parameters": {"a": 1}}',
        '{"name": "weather", "note": "Take a coat.", "parameters": {"a": 1}}',
        '{"name": "weather", "parameters": {"a": 1}, "note":}',
        '{"name": "weather", "parameters": {"a": 1}, "arguments": {"b": 2}}',
        '{"name": "weather", "parameters": {"a": 1}, "type": "a poem"}',
        '{"name": "weather", "parameters": {"a": 1}, "id": {"b": 2}}',
        '{"name": "weather", "parameters": {"a": 1} or so}',
        '{"name": "weather", "parameters": {"a": 1}',
        '{"name": "weather", "parameters": "not json"}',
    ),
    (
        "llama3",
        '{"type": "function", "name": "weather", "parameters": {"a": 1}, "id": "b"}',
        [("weather", '{"a": 1}')],
    ),
    (
        "llama3",
        '{"parameters": {"a": 1}, "name": "weather"}; {"name": "time", "parameters": {}, "b": 1}',
        [("weather", '{"a": 1}'), '; {"name": "time", "parameters": {}, "b": 1}'],
    ),
    (
        "llama3",
        'So: {"name": "time", "parameters": {}}',
        ['So: {"name": "time", "parameters": {}}'],
    ),
    ("llama3", "<|python_tag|>print(1)", ["<|python_tag|>print(1)"]),
    ("pythonic", "[no(a=1)]", ["[no(a=1)]"]),
    ("pythonic", "[1] says", ["[1] says"]),
    *kept(
        "pythonic",
        "<|python_start|><|python_end|>",
        "<|python_start|>[]<|python_end|> x",
        "<|python_start|> <|python_end|><|python_start|>no<|python_end|>",
    ),
    ("pythonic", "<|python_start|>[time()]\n<|python_end|> x", [("time", "{}"), " x"]),
    ("pythonic", "[time(1)]", ["[time(1)]"]),
    ("pythonic", "[time(a=open())]", ["[time(a=open())]"]),
    ("pythonic", "[time(a=1e999)]", ["[time(a=1e999)]"]),
    ("pythonic", "[time(a='x)", ["[time(a='x)"]),
    ("pythonic", "[time(), no()]", [("time", "{}"), ", no()]"]),
    (
        "pythonic",
        '<|python_start|>[time(a=[True, none], b={\'x)\': "\\"y"})]<|python_end|>',
        ['<|python_start|>[time(a=[True, none], b={\'x)\': "\\"y"})]<|python_end|>'],
    ),
    (
        "pythonic",
        '<|python_start|>[time(a=[True, null], b={\'x)\': "\\"y"})]<|python_end|>',
        [("time", '{"a": [true, null], "b": {"x)": "\\"y"}}')],
    ),
    ("mistral", "[TOOL_CALLS] no", ["[TOOL_CALLS] no"]),
    ("mistral", "[TOOL_CALLS]time[ARGS]12", ["[TOOL_CALLS]time[ARGS]12"]),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "time", "arguments": {}}, no]',
        [("time", "{}"), ", no]"],
    ),
    ("deepseek", "<｜tool▁calls▁begin｜>no", ["<｜tool▁calls▁begin｜>no"]),
    *kept("kimi", "<|tool_calls_section_begin|>no", KIMI[:60] + "<|tool_call_end|>"),
    *kept("granite", "<|tool_call|>no", '<|tool_call|>[{"name": 3}]', "<tool_call>[]"),
    (
        "deepseek",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>time<｜tool▁sep｜>no",
        ["<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>time<｜tool▁sep｜>no"],
    ),
    ("glm", "<tool_call>time\nno</tool_call>", ["<tool_call>time\nno</tool_call>"]),
    (
        "glm",
        "<tool_call>weather<arg_key>city</arg_key><arg_value>Ul",
        [("weather", '{"city": "Ul')],
    ),
    (
        "glm",
        "<tool_call>weather<arg_key>city</arg_key><arg_value>12</arg_value><arg_key>days</arg_key>"
        "<arg_value>12</arg_value><arg_key>when</arg_key><arg_value>null</arg_value>"
        "<arg_key>exact</arg_key><arg_value>True</arg_value><arg_key>more</arg_key>"
        '<arg_value>a "b"\n</arg_value></tool_call>',
        [
            (
                "weather",
                '{"city": "12", "days": 12, "when": null, "exact": true, "more": "a \\"b\\"\\n"}',
            )
        ],
    ),
    ("qwen3-coder", "<function=no>\n</function>", ["<function=no>\n</function>"]),
    ("qwen3-coder", "<function=time>\n</function>", [("time", "{}")]),
    *kept(
        "qwen3-coder",
        "I would write <function=weather>, and so on.",
        "<function=weather>\nand <parameter=city>",
        "<function=weather>\n",
        "<function=weather><param",
    ),
    (
        "qwen3-coder",
        "<function=weather> begins <function=weather>\n<parameter=city>\nUlm\n</parameter>",
        ["<function=weather> begins", ("weather", '{"city": "Ulm"')],
    ),
    ("qwen3-coder", "<tool_call><function=time> x", [("time", "{}"), " x"]),
    (
        "qwen3-coder",
        "<tool_call><function=weather><parameter=when>\na\n\nb\n</parameter></function></tool_call>",
        [("weather", '{"when": "a\\n\\nb"}')],
    ),
    ("harmony", "It rains.", ["It rains."]),
    ("harmony", "<|channel|>final<|message|>It {rains}.<|return|>", ["It {rains}."]),
    (
        "harmony",
        "<|channel|>commentary to=functions.time",
        ["<|channel|>commentary to=functions.time"],
    ),
    # Without arguments it is a call; where they may have been cut, it is what was written.
    (
        "harmony",
        "<|channel|>commentary to=functions.weather <|constrain|>json<|message|><|call|>",
        [("weather", "{}")],
    ),
    (
        "harmony",
        "<|channel|>commentary to=functions.weather<|message|>\n<|end|><|start|>assistant"
        "<|channel|>commentary to=functions.time<|message|><|start|>assistant"
        "<|channel|>final<|message|>So.",
        [("weather", "{}"), ("time", "{}"), "So."],
    ),
    *kept(
        "harmony",
        "<|channel|>commentary to=functions.weather<|message|>",
        "<|channel|>commentary to=functions.weather<|message|> ",
        "<|channel|>commentary to=functions.weather<|message|><|ca",
    ),
    (
        "harmony",
        "<|channel|>commentary to=functions.weather<|message|>in Ulm<|call|>",
        ["in Ulm"],
    ),
]


def cuts(text: str) -> list[list[str]]:
    """Into single characters, as a whole, and at random."""
    draw = random.Random(0)
    places = [sorted(draw.choices(range(len(text)), k=draw.randint(1, 6))) for _ in range(8)]
    pairs = [zip([0, *at], [*at, None], strict=True) for at in places]
    return [[*text], [text], *([text[a:b] for a, b in each] for each in pairs)]


@pytest.mark.parametrize("name", WELL_WRITTEN)
def test_calls_and_what_is_said_before_them(name: str) -> None:
    form, text = name.strip(), WELL_WRITTEN[name]
    for pieces in cuts(text):
        assert told(read(form, pieces)) == TWO_CALLS
    if name not in ALONE:
        for pieces in cuts(f"I look.\n\n{text}\n"):
            assert told(read(form, pieces)) == ["I look.", *TWO_CALLS]
    assert told(read(form, [text], is_parallel=False)) == TWO_CALLS[:1]
    # Where there are no tools, nothing is a call.
    if form != "harmony":
        assert read(form, [text], tools={}) == [Content(text)]


@pytest.mark.parametrize("name", WELL_WRITTEN)
def test_arguments_are_streamed(name: str) -> None:
    form, text = name.strip(), WELL_WRITTEN[name].replace("Ulm", "Ulm" * 100)
    parser = ChatFormat(form).reading("", TOOLS).new_parser("answer")
    pieces = [parser.feed([], character) for character in text]
    deltas = [part for parts in pieces for part in parts if isinstance(part, Arguments)]
    # These are held until it is certain that they are calls.
    assert len(deltas) > (1 if name in ("pythonic", "llama3") else 300)


@pytest.mark.parametrize(("form", "text", "expected"), BADLY_WRITTEN)
def test_what_is_badly_written_is_not_lost(form: str, text: str, expected: Told) -> None:
    reasoning = "harmony" if form == "harmony" else "none"
    for pieces in cuts(text):
        assert told(read(form, pieces, reasoning=reasoning)) == expected


@pytest.mark.parametrize("name", WELL_WRITTEN)
def test_what_is_cut_off_is_kept(name: str) -> None:
    """Whatever the place: a call that has begun is the beginning of the whole one."""
    form, text = name.strip(), WELL_WRITTEN[name]
    for length in range(len(text)):
        whole = told(read(form, [*text[:length]]))
        assert whole == told(read(form, [text[:length]]))
        for index, part in enumerate(each for each in whole if isinstance(each, tuple)):
            expected = TWO_CALLS[index]
            assert part[0] == expected[0] and expected[1].startswith(part[1])


FORMS = [
    *("hermes", "llama3", "pythonic", "mistral", "deepseek", "glm", "qwen3-coder", "harmony"),
    *("kimi", "granite"),
]


@pytest.mark.parametrize("form", FORMS)
def test_no_text_breaks_a_parser(form: str) -> None:
    draw = random.Random(form)
    pieces = [*'{}[]"\\:,', " ", "\n", "name", "arguments", "time", "null", "to=functions."]
    pieces += [text[:6] for text in WELL_WRITTEN.values()]
    pieces += ["[", "(", ")", "a=", "arguments", "parameters", '"name": "time"']
    markers_of = (GLM, HERMES, DEEPSEEK_V3, HARMONY, QWEN3_CODER, *WELL_WRITTEN.values())
    for markers in markers_of:
        pieces += [part + end for part in markers.split("<") for end in ("", "<")]
    for _ in range(120):
        text = "".join(draw.choices(pieces, k=draw.randint(1, 30)))
        whole = read(form, [text], reasoning="harmony" if form == "harmony" else "think")
        assert whole == read(form, [*text], reasoning="harmony" if form == "harmony" else "think")
        if form != "harmony" and not any(isinstance(part, ToolCall) for part in whole):
            assert "".join(map(str, told(read(form, [text])))) == text


def test_deep_values_and_long_names() -> None:
    deep = "[" * 100_000
    text = f'<tool_call>{{"name": "time", "arguments": {{"a": {deep}'
    assert told(read("hermes", [text])) == [("time", f'{{"a": {deep}')]
    written = f"[time(a={deep})]"
    assert told(read("pythonic", [written])) == [written]
    # Python's own parser is not given more than it reads at once.
    for length, is_call in ((16_000, True), (17_000, False)):
        text = f"[time(a='{'x' * length}')]"
        expected: Told = [("time", f'{{"a": "{"x" * length}"}}')] if is_call else [text]
        for pieces in cuts(text):
            assert told(read("pythonic", pieces)) == expected
    text = f"<tool_call>weather<arg_key>days</arg_key><arg_value>{deep}</arg_value></tool_call>"
    assert json.loads(told(read("glm", [text]))[0][1]) == {"days": deep}


REFERRED: dict[str, Any] = {
    "allOf": [{"properties": {"beside": {"type": "string"}}}, {"$ref": "#/$defs/More"}],
    "properties": {
        "plain": {"$ref": "#/$defs/City"},
        "all": {"allOf": [{"$ref": "#/$defs/City"}, {"maxLength": 9}]},
        "both": {"allOf": [{"type": ["string", "null"]}, {"type": ["string", "integer"]}]},
        "any": {"anyOf": [{"$ref": "#/$defs/City"}, {"$ref": "#/$defs/a~1b~0%25"}]},
        "chain": {"$ref": "#/$defs/Chain"},
        "number": {"$ref": "#/$defs/a~1b~0%25"},
        "nowhere": {"$ref": "#/$defs/Nowhere"},
        "elsewhere": {"$ref": "https://example.org/schema"},
        "loop": {"$ref": "#/$defs/Loop"},
        "tree": {"$ref": "#/$defs/Tree"},
    },
    "$defs": {
        "City": {"type": "string"},
        "a/b~%": {"type": "integer"},
        "Chain": {"$ref": "#/$defs/City"},
        "More": {"properties": {"more": {"enum": ["1", "2"]}}},
        "Loop": {"$ref": "#/$defs/Loop"},
        "Tree": {"anyOf": [{"$ref": "#/$defs/Tree"}] * 9, "allOf": [{"$ref": "#/$defs/Tree"}] * 9},
    },
}


def test_types_that_a_schema_refers_to() -> None:
    texts = ["plain", "all", "both", "chain", "beside", "more"]
    others = ["any", "number", "nowhere", "elsewhere", "loop", "tree", "none"]
    written = [f"<arg_key>{key}</arg_key><arg_value>1</arg_value>" for key in texts + others]
    text = f"<tool_call>weather{''.join(written)}</tool_call>"
    [call] = told(read("glm", [text], tools={"weather": REFERRED}))
    arguments = call[1]
    expected = {**dict.fromkeys(texts, "1"), **dict.fromkeys(others, 1)}
    assert json.loads(arguments) == expected


def test_how_long_a_name_is_follows_from_no_cut() -> None:
    for length in (254, 255, 256, 257, 300, 511, 512, 513, 600):
        name = "n" * length
        for form, text in (
            ("harmony", f"<|channel|>final {name[16:]}<|message|>x<|return|>"),
            ("deepseek", f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{{}}<｜tool▁call▁end｜>"),
            ("glm", f"<tool_call>{name}</tool_call>"),
            ("qwen3-coder", f"<tool_call><function={name}></function></tool_call>"),
            ("mistral", f"[TOOL_CALLS]{name}[ARGS]{{}}"),
            ("kimi", KIMI.replace("functions.time:1", name)),
        ):
            expected = read(form, [text], reasoning="harmony" if form == "harmony" else "none")
            for pieces in cuts(text):
                reasoning = "harmony" if form == "harmony" else "none"
                assert read(form, pieces, reasoning=reasoning) == expected


THOUGHT: list[tuple[str, str, str, Told]] = [
    (
        "think",
        "",
        "<think>\nHm.\n\nYes.\n</think>\n\nBlue.\n",
        [("think", "Hm.\n\nYes."), "Blue.\n"],
    ),
    ("think", "<|assistant|><think>\n", "Hm.\n</think>\n\nBlue.", [("think", "Hm."), "Blue."]),
    ("think", "<|assistant|><think>\n", "<think>Hm.</think>Blue.", [("think", "Hm."), "Blue."]),
    ("think", "<think>\n\n</think>\n\n", "Blue.", ["Blue."]),
    ("think", "", "Blue.", ["Blue."]),
    ("think", "", "<think>\n\n</think>\n\nBlue.", ["Blue."]),
    ("think", "", "<think>\nHm", [("think", "Hm")]),
    ("think", "", "The tag <think> is </think> one.", ["The tag <think> is </think> one."]),
    ("think", "", "<thin", ["<thin"]),
    ("mistral", "", "[THINK]Hm.[/THINK]Blue.", [("think", "Hm."), "Blue."]),
    (
        "harmony",
        "",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>"
        "I look.<|end|><|start|>assistant<|channel|>final<|message|>Blue.<|return|>",
        [("think", "Hm."), "I look.Blue."],
    ),
    (
        "harmony",
        "",
        "<|channel|>analysis to=python<|message|>1+1<|end|><|channel|>final<|message|>2",
        [("think", "1+1"), "2"],
    ),
]


@pytest.mark.parametrize(("reasoning", "prompt", "text", "expected"), THOUGHT)
def test_reasoning(reasoning: str, prompt: str, text: str, expected: Told) -> None:
    for pieces in cuts(text):
        assert told(read("none", pieces, reasoning=reasoning, prompt=prompt, tools={})) == expected


def test_reasoning_before_calls() -> None:
    for pieces in cuts(f"<think>\nA <tool_call>?\n</think>\n\n{HERMES}\n"):
        parts = read("hermes", pieces, reasoning="think")
        assert told(parts) == [("think", "A <tool_call>?"), *TWO_CALLS]


def test_ids_are_those_of_the_answer() -> None:
    """And of the form that mistral's templates ask for."""
    ids = {call_id(answer, index) for answer in ("a", "b") for index in range(50)}
    assert len(ids) == 100
    assert all(len(each) == 9 and each.isalnum() and each.isascii() for each in ids)
    assert call_id("a", 1) == call_id("a", 1)


AROUND = {
    text: number
    for number, text in enumerate(
        ["<think>", "</think>", "<|message|>", "<|end|>", "<|call|>", "<|return|>", "<|start|>"]
    )
}
ANALYSIS = "<|channel|>analysis<|message|>Hm. So.<|end|>"
COUNTED = [
    ("think", "", "<think>\nHm. So.\n</think>\n\nBlue.", "\nHm. So.\n</think>"),
    ("think", "<think>\n", "Hm. So.\n</think>\n\nBlue.", "Hm. So.\n</think>"),
    ("think", "<think>\n", "Hm. <think>So", "Hm. <think>So"),
    ("think", "", " <think></think><think>Blue</think>", "</think>"),
    ("think", "", "Blue <think> is </think>", ""),
    ("harmony", "", f"{ANALYSIS}<|start|>assistant<|channel|>final<|message|>B.<|return|>", "1"),
    (
        "harmony",
        "",
        f"{ANALYSIS}<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        f"<|start|>assistant{ANALYSIS}<|start|>assistant<|channel|>commentary to=functions.time"
        "<|message|>{}<|call|>",
        "2",
    ),
]


@pytest.mark.parametrize(("reasoning", "prompt", "text", "thought"), COUNTED)
def test_reasoning_tokens_are_those_between_the_markers(
    reasoning: str, prompt: str, text: str, thought: str
) -> None:
    """Whatever came together, and however far the text lags behind."""
    chat_format = ChatFormat.choose(
        None, {}, token_id=AROUND.get, tools="none", reasoning=reasoning
    )
    if reasoning == "harmony":
        thought = "Hm. So.<|end|>" * int(thought)
    expected = len(tokens_of(thought))
    tokens = tokens_of(text)
    draw = random.Random(0)
    for _ in range(60):
        reading = chat_format.reading(prompt, TOOLS)
        parser = reading.new_parser("answer")
        num_fed, written = 0, ""
        for at in sorted(draw.choices(range(len(tokens) + 1), k=draw.randint(0, 9))):
            new, num_fed = tokens[num_fed:at], max(num_fed, at)
            told_text = "".join(tokens[: max(0, at - draw.choice([0, 0, 1, 3]))])
            piece = told_text.removeprefix(written) if told_text.startswith(written) else ""
            parser.feed([AROUND.get(token, 99) for token in new], piece)
            written += piece
        parser.feed([AROUND.get(token, 99) for token in tokens[num_fed:]], "")
        parser.finish(text.removeprefix(written))
        assert parser.num_reasoning_tokens == expected


def tokens_of(text: str) -> list[str]:
    """Markers, and single characters."""
    return re.findall("|".join([*map(re.escape, AROUND), "(?s:.)"]), text)
