"""Chat templates with the constructs that those of real models use, in words of our own."""

from __future__ import annotations

TEXT: dict[str, str] = {
    "plain turns": """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    "a system prompt of its own": """{%- if messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}""",
    "system text within the first user turn": """{% if messages[0]['role'] == 'system' %}
{% set rest = messages[1:] %}{% set told = messages[0]['content'] %}
{% else %}{% set rest = messages %}{% set told = false %}{% endif %}
{% for m in rest %}
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Turns must alternate') }}
{% endif %}
{% if loop.index0 == 0 and told != false %}
{% set body = '<<RULES>>\\n' + told + '\\n<</RULES>>\\n\\n' + m['content'] %}
{% else %}{% set body = m['content'] %}{% endif %}
{% if m['role'] == 'user' %}{{ bos_token + '[ASK] ' + body.strip() + ' [/ASK]' }}
{% elif m['role'] == 'assistant' %}{{ ' ' + body.strip() + ' ' + eos_token }}{% endif %}
{% endfor %}""",
    "no system turns at all": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('No system role') }}{% endif %}
{% for m in messages %}{% if m['role'] == 'assistant' %}{% set who = 'model' %}
{% else %}{% set who = m['role'] %}{% endif %}
{{ '<|turn|>' + who + '\\n' + m['content'] | trim + '<|end|>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|turn|>model\\n' }}{% endif %}""",
    "the header once": """{% set loop_messages = messages %}
{%- for m in loop_messages -%}
{%- set content = '<|head|>' + m['role'] + '<|tail|>\\n\\n' + m['content'] | trim + '<|eot|>' -%}
{%- if loop.index0 == 0 -%}{%- set content = bos_token + content -%}{%- endif -%}
{{- content -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|head|>assistant<|tail|>\\n\\n' }}{%- endif -%}""",
    "the last turn told from the others": """{% for m in messages %}
{% if m['role'] == 'user' %}{{ '<|user|>\\n' + m['content'] + eos_token }}
{% elif m['role'] == 'system' %}{{ '<|system|>\\n' + m['content'] + eos_token }}
{% elif m['role'] == 'assistant' %}{{ '<|assistant|>\\n'  + m['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
{% endfor %}""",
    "tools asked for by none": """{{- bos_token }}
{%- if tools is not none %}{{- "TOOLS: " + (tools | tojson) }}{%- endif %}
{%- if not tools is defined %}{{- "tools undefined" }}{%- endif %}
{%- for m in messages %}{{- "[" + m.role + "] " + m.content }}{%- endfor %}""",
    "tools asked for as a truth": """{% if tools %}{{ tools | length }}{% else %}no tools
{% endif %}{% if documents %}{{ documents }}{% elif documents is none %}no documents
{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}""",
    "a date unless one is given": """{%- if not date is defined %}
{%- if strftime_now is defined %}{%- set date = strftime_now("%Y") %}
{%- else %}{%- set date = "2024" %}{%- endif %}{%- endif %}
{{- "Year: " + date + "\\n" }}
{%- for m in messages %}{{- m.role + ": " + m.content + "\\n" }}{%- endfor %}""",
    "counted in a namespace": """{%- set ns = namespace(users=0, text='', first=true) -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{%- set ns.users = ns.users + 1 -%}{%- endif -%}
{%- if ns.first -%}{%- set ns.first = false -%}{%- else -%}{%- set ns.text = ns.text + '|' -%}
{%- endif -%}
{%- set ns.text = ns.text + m.content -%}
{%- endfor -%}
{{- ns.users }} {{ ns.text -}}""",
    "searched from the end": """{%- set ns = namespace(last_user=-1) %}
{%- for m in messages[::-1] %}{%- set index = (messages | length - 1) - loop.index0 %}
{%- if ns.last_user == -1 and m.role == "user" %}{%- set ns.last_user = index %}{%- endif %}
{%- endfor %}
{%- for m in messages %}{{- '<|' ~ m.role ~ '|>' ~ m.content }}
{%- if loop.index0 == ns.last_user %}{{- '*' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think></think>' }}
{%- endif %}{%- endif %}""",
    "thoughts cut from earlier answers": """{% for m in messages %}{% set content = m['content'] %}
{% if m['role'] == 'assistant' and '</think>' in content %}
{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{{ '<|' + m['role'] + '|>' + content }}{% endfor %}""",
    "thoughts in a field": """{% for m in messages %}{% if m.reasoning_content is string %}
<think>{{ m.reasoning_content.strip('\\n') }}</think>{% endif %}
{% if m.thinking is defined %}({{ m.thinking | length }}){% endif %}
{{ m.role }}: {{ m.content }}
{% endfor %}""",
    "a message as JSON": """{% for m in messages %}{{ m | tojson }}
{% endfor %}""",
    "JSON with an indent": """{{ messages | tojson(indent=4) }}
{{ {'b': [1, 2.5, none, true], 'a': {}} | tojson(indent=2) }}""",
    "JSON sorted and dense": """{% for m in messages %}
{{ m | tojson(sort_keys=True, separators=(',', ':')) }}{% endfor %}""",
    "JSON in ASCII": """{{ messages | map(attribute='content') | list | tojson(ensure_ascii=True) }}
{{ messages[0].content | tojson }}""",
    "JSON with its options in order": """{{ messages[-1] | tojson(false, 1, none, true) }}""",
    "special tokens that may be missing": """{{ bos_token if bos_token is defined else 'no bos' }}
{{ eos_token if eos_token is defined }}{{ unk_token if unk_token is defined else 'no unk' }}
{{ pad_token is defined }}{{ sep_token is defined }}{{ mask_token | default('no mask') }}
{{ cls_token }}{% for m in messages %}{{ m.content }}{% endfor %}""",
    "special tokens with names of their own": """{{ image_token }}{{ nothing_token }}
{% for m in messages %}{{ m.content | replace(image_token, '<pic>') }}{{ eot_token }}
{% endfor %}""",
    "a macro for each turn": """{%- macro turn(role, text='', end='<|im_end|>') -%}
<|im_start|>{{ role }}
{{ text }}{{ end }}
{% endmacro -%}
{%- for m in messages -%}{{ turn(m.role, m.content) }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ turn('assistant', end='') }}{%- endif -%}""",
    "a macro that calls back": """{% macro wrap(tag) %}<{{ tag }}>{{ caller() }}</{{ tag }}>
{% endmacro %}{% for m in messages %}{% call wrap(m.role) %}{{ m.content }}{% endcall %}
{% endfor %}""",
    "blocks indented by hand": """
    {% for m in messages %}
        {% if m.role == 'user' %}
    Q: {{ m.content }}
        {% else %}
    A: {{ m.content }}
        {% endif %}
    {% endfor %}
    {% if add_generation_prompt %}
    A:
    {% endif %}
""",
    "whitespace kept with a plus": """{% for m in messages +%}
  {%+ if m.role == 'user' %}Q{% endif %} {{- m.content -}}  !
{% endfor %}""",
    "what is trained on": """{% set mark = 'out' %}{% for m in messages %}
{% if m.role == 'assistant' %}{% generation %}{% set mark = 'in' %}{{ m.content }}{{ mark }}
{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ mark }}{% endfor %}""",
    "loops left and skipped": """{% for m in messages %}
{% if m.role == 'system' %}{% continue %}{% endif %}
{% if loop.index > 3 %}{% break %}{% endif %}
{{ loop.index }}/{{ loop.length }} {{ loop.revindex }} {{ m.content }}
{% endfor %}""",
    "neighbours in a loop": """{% for m in messages %}
{% if loop.previtem is defined and loop.previtem.role == m.role %}same {% endif %}
{% if not loop.first and loop.changed(m.role) %}changed {% endif %}
{{ m.content }}{% if loop.nextitem is defined %}, then {{ loop.nextitem.role }}{% endif %}
{% else %}empty{% endfor %}""",
    "filters in a row": """{% for m in messages %}
{{ m.role | upper }} {{ m.role | title }} {{ m.role | capitalize }} {{ m.content | wordcount }}
{{ m.content | replace('a', 'b') | truncate(12) }} {{ m.content | indent(2, true) }}
{{ m.name | default('nobody', true) }} {{ m.content | first }}{{ m.content | last }}
{{ (m.content | length / 3) | round(1) }} {{ m.content | reverse | string | length }}
{% endfor %}""",
    "filters over all turns": """{{ messages | map(attribute='role') | unique | join('+') }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ messages | rejectattr('role', 'eq', 'user') | map(attribute='content') | join(' / ') }}
{% for role, turns in messages | groupby('role') %}{{ role }}={{ turns | length }};{% endfor %}
{% for pair in messages | batch(2, 'none') %}{{ pair | length }}{% endfor %}
{{ [3, 1, 2] | sort | join }}{{ [1, 2, 3] | sum }}{{ [1, 5] | max }}
{{ {'b': 1, 'a': 2} | dictsort }}
{{ messages | map(attribute='content') | map('trim') | map('length') | list }}""",
    "methods of text": """{% for m in messages %}
{{ m.content.strip() }}|{{ m.content.upper() }}|{{ m.content.startswith('H') }}
{{ m.content.split(' ')[0] }}|{{ m.content.rstrip('?!') }}|{{ m.content.find('e') }}
{{ m.content.replace('\\n', ' ') }}|{{ m.content[1:4] }}|{{ m.content[-1] }}|{{ m.role.title() }}
{{ m.content.count('e') }}|{{ ', '.join(['a', 'b']) }}|{{ m.content.isdigit() }}
{% endfor %}""",
    "tests of kinds": """{% for m in messages %}{{ m is mapping }}{{ m.content is string }}
{{ m.content is iterable }}{{ m.content is sequence }}{{ loop.index is odd }}
{{ 3 is divisibleby 3 }}
{{ m.missing is none }}{{ m.missing is defined }}{{ true is boolean }}{{ 1.5 is number }}
{{ m.role in ['user', 'system'] }}{{ 'name' not in m }}{{ m.role is eq 'user' }}
{% endfor %}""",
    "dictionaries": """{% set names = {'user': 'Human', 'assistant': 'Robot'} %}
{% set more = dict(names, system='Rules') %}{% for m in messages %}
{{ more[m.role] }}: {{ m.get('name', 'nobody') }} {{ names.get(m['role']) }}
{% for key, value in m.items() %}{{ key }}={{ value }};{% endfor %}{{ m.keys() | list }}
{% endfor %}{{ dict(a=1).values() | sum }}""",
    "conditions within expressions": """{% for m in messages %}
{{ 'Q' if m.role == 'user' else ('A' if m.role == 'assistant' else 'S') }}:
{{- m.content if m.content and m.content | length < 1000 }}{{ 'x' if false }}
{{ (m.name or m.role) ~ 1 ~ none }}{% endfor %}""",
    "text set as a block": """{% set header %}<|im_start|>{{ messages[0].role }}
{% endset %}{% for m in messages %}{% set body | trim %}
  {{ m.content }}
{% endset %}{{ header }}{{ body }}{% filter upper %}{{ m.role }}{% endfilter %}{% endfor %}""",
    "raw text and comments": """{# of the turns
 in two lines #}{% raw %}{{ not a variable }}{% endraw %}
{%- for m in messages -%}{#- dense -#} {{ m.content }} {#- dense -#}{%- endfor -%}""",
    "a condition on the loop": """{% for m in messages if m.role != 'system' %}
{{ loop.index }}. {{ m.content }}
{% else %}nothing{% endfor %}""",
    "a tree": """{% for item in [{'n': 1, 'c': [{'n': 2, 'c': []}]}] recursive %}
<{{ item.n }}>{{ loop(item.c) if item.c }}{% endfor %}{{ messages[-1].content }}""",
    "in turns": """{% set c = cycler('odd', 'even') %}{% set comma = joiner(', ') %}
{% for m in messages %}{{ comma() }}{{ c.next() }} {{ loop.cycle('a', 'b', 'c') }}{{ m.content }}
{% endfor %}""",
    "sums": """{% for m in messages %}{{ loop.index0 * 2 + 1 }} {{ 7 // 2 }} {{ 7 % 4 }}
{{ 2 ** 5 }}
{{ 1 < loop.index <= 3 }} {{ -loop.index | abs }} {{ '%03d-%s' | format(loop.index, m.role) }}
{{ '{}:{:>5}'.format(loop.index, m.role) }} {{ 10 / 4 }}
{% endfor %}{% for i in range(3, 0, -1) %}{{ i }}{% endfor %}""",
    "a name for a while": """{% with who = messages[0].role, what = messages[0].content %}
{{ who }} {{ what }}{% endwith %}{{ who is defined }}{% set a, b = 1, 'two' %}{{ a }}{{ b }}""",
    "every kind of quote": """{% for m in messages %}{{ "it's \\"so\\"" }} {{ 'a\\tb\\\\n' }}
{{ '\\u2019\\u00e9' }} {{ m.content | e | length >= m.content | length }}
<b>&amp;</b> {{ m.content }}
{% endfor %}""",
    "undefined things": """{{ nobody }}[{{ messages[0].nothing }}]
{{ messages[9] | default('none') }}
{{ (messages[0].a | default({})).b | default('c') }}{{ nothing is not defined }}
{% if nobody %}{% else %}{{ messages | length }}{% endif %}
{% for x in nothing %}{% endfor %}""",
    "a refusal with the role in it": """{% for m in messages %}
{% if m.role == 'user' %}U{{ m.content }}{% elif m.role == 'assistant' %}A{{ m.content }}
{% else %}{{ raise_exception('Unexpected role: ' + m.role) }}{% endif %}{% endfor %}""",
    "spaces that count": """{{ bos_token }}{% for m in messages %} {{ m.role }}:  {{ m.content }}
{{ eos_token }}
{% endfor %}
 {{ ' ' }}""",
    "all of it at the end": """{%- set system = messages | selectattr('role', 'equalto', 'system')
    | map(attribute='content') | join('\\n\\n') -%}
{%- set turns = messages | rejectattr('role', 'equalto', 'system') | list -%}
{%- if system %}<|system|>{{ system }}{% endif -%}
{%- for m in turns %}{{ '\\n' if not loop.first }}<|{{ m.role }}|>{{ m.content }}{%- endfor -%}
{%- if add_generation_prompt and turns[-1].role != 'assistant' %}
<|assistant|>{% endif -%}""",
}
"""Those that take the content of messages as text."""

PARTS: dict[str, str] = {
    "a loop over parts": """{% for m in messages %}<|im_start|>{{ m.role | capitalize }}:
{%- for part in m.content %}{% if part.type == 'image' %}<image>
{%- elif part['type'] == 'text' %} {{ part['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}""",
    "pictures first": """{% for m in messages %}[{{ m['role'] }}]
{% for part in m['content'] | selectattr('type', 'equalto', 'image') %}<image>{% endfor %}
{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}
{% endfor %}""",
    "texts of parts joined": """{% for m in messages %}
{{ m.role }}={{ m.content | map(attribute='text') | join('|') }};{% endfor %}""",
    "the first part only": """{% for m in messages %}{{ m.role }}: {{ m.content[0].text }}
{% endfor %}""",
}
"""Those that take it as a list of parts."""

EITHER: dict[str, str] = {
    "text or parts": """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}
{% else %}{% for part in m.content %}{% if part.type == 'text' or 'text' in part %}{{ part.text }}
{% else %}<image>{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}""",
    "by a macro": """{%- macro show(content) -%}
{%- if content is string -%}{{ content }}
{%- elif content is iterable and content is not mapping -%}
{%- for item in content -%}{{ item.text }}{%- endfor -%}
{%- elif content is none or content is undefined -%}
{%- else -%}{{ raise_exception('Unexpected content') }}{%- endif -%}
{%- endmacro -%}
{%- for m in messages -%}<|{{ m.role }}|>{{ show(m.content) | trim }}{%- endfor -%}""",
    "system in either, the rest in either": """{%- if messages[0].role == 'system' -%}
{%- if messages[0].content is string -%}{%- set first = messages[0].content + '\\n\\n' -%}
{%- else -%}{%- set first = messages[0].content[0].text + '\\n\\n' -%}{%- endif -%}
{%- set turns = messages[1:] -%}{%- else -%}{%- set first = '' -%}{%- set turns = messages -%}
{%- endif -%}
{%- for m in turns -%}<|turn|>{{ m.role }}
{{ first if loop.first }}{% if m.content is string -%}{{ m.content | trim }}
{%- else -%}{% for part in m.content %}{{ part.text | trim }}{% endfor %}{%- endif -%}<|end|>
{% endfor -%}""",
    "marked parts": """{% for m in messages %}{% if m['content'] is not string %}
{% for part in m['content'] %}{{ '(' ~ loop.index ~ ')' ~ part['text'] }}{% endfor %}
{% else %}{{ m['content'] }}{% endif %}{% endfor %}""",
}
"""Those that take it as it comes."""
