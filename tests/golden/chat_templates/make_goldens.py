#!/usr/bin/env python3
"""Regenerates cases.json: what Jinja, set up as transformers sets it up, makes of templates.

    pip install jinja2==3.1.6
    python3 tests/golden/chat_templates/make_goldens.py

The templates are this project's own; the two long ones follow the published structure of the Qwen3 and
LLaDA prompts. Each case is {template (its index), variables, text} or, where rendering fails, {..., error}.
"""
import json
import pathlib

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

HERE = pathlib.Path(__file__).resolve().parent

LLADA = """{%- for message in messages -%}
  {%- if loop.first -%}{{ bos_token }}{%- endif -%}
  {{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
"""

LLADA2 = """{% set thinking = 'on' if enable_thinking is defined and enable_thinking else 'off' %}
{{- '<role>SYSTEM</role>' -}}
{% if messages[0].role == 'system' %}{{ messages[0].content ~ '\\n' }}{% endif %}
{{- 'detailed thinking ' ~ thinking ~ '<|role_end|>' -}}
{% for message in messages if message.role != 'system' -%}
  {% if message.role == 'user' %}
    {{- '<role>HUMAN</role>' ~ message.content ~ '<|role_end|>' -}}
  {% elif message.role == 'assistant' %}
    {{- '<role>ASSISTANT</role>' ~ message.content ~ '<|role_end|>' -}}
  {% else %}
    {{- raise_exception('Unknown role: ' + message.role) -}}
  {% endif %}
{%- endfor -%}
{% if add_generation_prompt %}{{ '<role>ASSISTANT</role>' }}{% endif %}
"""

QWEN3 = """{#- a chat with tools and reasoning -#}
{%- macro open(role) -%}{{ '<|im_start|>' ~ role ~ '\\n' }}{%- endmacro -%}
{%- set has_system = messages[0].role == 'system' -%}
{%- if tools -%}
  {{- open('system') -}}
  {%- if has_system -%}{{- messages[0].content + '\\n\\n' -}}{%- endif -%}
  {{- '# Tools\\n\\nYou have these functions:\\n<tools>' -}}
  {%- for tool in tools -%}{{- '\\n' ~ (tool | tojson) -}}{%- endfor -%}
  {{- '\\n</tools>\\n\\nAnswer with <tool_call> and JSON.<|im_end|>\\n' -}}
{%- elif has_system -%}
  {{- open('system') + messages[0].content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- set ns = namespace(looking=true, last_query=messages|length - 1) -%}
{%- for message in messages[::-1] -%}
  {%- set index = messages|length - 1 - loop.index0 -%}
  {%- if ns.looking and message.role == 'user' and message.content is string
        and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) -%}
    {%- set ns.looking = false -%}
    {%- set ns.last_query = index -%}
  {%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
  {%- set content = message.content if message.content is string else '' -%}
  {%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}
    {{- open(message.role) + content + '<|im_end|>' + '\\n' -}}
  {%- elif message.role == 'assistant' -%}
    {%- set reasoning = '' -%}
    {%- if message.reasoning_content is defined and message.reasoning_content is not none -%}
      {%- set reasoning = message.reasoning_content -%}
    {%- elif '</think>' in content -%}
      {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
      {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {{- open('assistant') -}}
    {%- if loop.index0 > ns.last_query and (loop.last or reasoning) -%}
      {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') -}}
    {%- else -%}
      {{- content -}}
    {%- endif -%}
    {%- for call in message.tool_calls or [] -%}
      {%- if not loop.first or content -%}{{- '\\n' -}}{%- endif -%}
      {%- set call = call.function if call.function else call -%}
      {{- '<tool_call>\\n{"name": "' ~ call.name ~ '", "arguments": ' -}}
      {{- call.arguments if call.arguments is string else call.arguments | tojson -}}
      {{- '}\\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
  {%- elif message.role == 'tool' -%}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
    {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' -}}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- open('assistant') -}}
  {%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""

TOOLS = [{"type": "function", "function": {
    "name": "weather", "description": "Tells the \"weather\" in a city: 天気\n",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {
        "type": "integer", "default": 3, "maximum": 7.5, "items": []}}, "required": ["city"]}}}]
USER = {"role": "user", "content": "How is the weather? <|im_end|>"}
CONVERSATIONS = [
    [USER],
    [{"role": "system", "content": "Be brief."}, USER],
    [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nFine."},
     {"role": "user", "content": "  And tomorrow?\n"}],
    [USER, {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "days": 2}}},
        {"name": "weather", "arguments": "{\"city\": \"Bonn\"}"}]},
     {"role": "tool", "content": "rain"}, {"role": "tool", "content": "sun"},
     {"role": "assistant", "reasoning_content": "two results\n", "content": "\nRain and sun."}],
    [USER, {"role": "assistant", "content": "Sunny.", "tool_calls": None}],
    [{"role": "alien", "content": "zog"}],
]

# (template, variables); each exercises one thing.
SMALL = [
    # Whitespace.
    ("a\n{% if true %}\nb\n{% endif %}\nc\n", {}), ("  {% if true %}x{% endif %}  \n", {}),
    ("a {%- if true -%} b {%- endif -%} c", {}), ("a\n  {%+ if true +%}\n b\n  {%+ endif %}\nc", {}),
    ("  {# c #}\n x {#- d -#} y\n\n", {}), ("{{ 1 }}\n{{ 2 }}\n\n", {}), ("a\r\nb\r{{ 'c' }}\r\n", {}),
    ("   {{ 1 }}   {%- set x = 1 %}\n  {{- x }}\n", {}), ("x\n\t {% set y = 2 %}\n\t {{ y }}", {}),
    ("{% raw %}{{ x }}{% y %}{% endraw %}\nz", {}), ("a {%- raw -%}  {{ }} {%- endraw -%}  b", {}),
    ("{{ 'a' }}{% if 1 %}\n\n{{ 'b' }}{% endif %}", {}), ("{{-1}}|{{ -1 }}", {}), ("  {{- 'x' -}}  \n y", {}),
    # Loops.
    ("{% for a in [1,2,3] %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}"
     "{{ loop.revindex }}{{ loop.revindex0 }},{% endfor %}", {}),
    ("{% for a in [] %}x{% else %}none{% endfor %}", {}), ("{% for a in xs if a > 1 %}{{ loop.index }}:{{ a }} {% endfor %}", {"xs": [1, 2, 3]}),
    ("{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}", {"d": {"z": 1, "a": [1, "x"]}}),
    ("{% for k in d %}{{ k }}{% endfor %}{{ d | length }}{{ d.keys() | list }}{{ d.values() | list }}", {"d": {"z": 1, "a": 2}}),
    ("{% for (a, b), c in [((1, 2), 3)] %}{{ a + b * c }}{% endfor %}", {}),
    ("{% for c in 'añ你' %}[{{ c }}]{% endfor %}", {}), ("{% for x in nothing %}x{% else %}-{% endfor %}", {}),
    ("{% for x in [1,2,3,4] %}{% if x == 2 %}{% continue %}{% elif x == 4 %}{% break %}{% endif %}{{ x }}{% endfor %}", {}),
    ("{% set x = 0 %}{% for i in [1,2] %}{% set x = x + i %}{{ x }}{% endfor %}{{ x }}", {}),
    ("{% set n = namespace(x=0) %}{% for i in [1,2] %}{% set n.x = n.x + i %}{% endfor %}{{ n.x }}", {}),
    ("{% for a in [1,2] %}{% for b in [3,4] %}{{ loop.depth }}{{ a }}{{ b }}{% endfor %}{{ loop.index }}{% endfor %}", {}),
    ("{% for a in [1,2,3] %}{{ loop.previtem }}-{{ loop.nextitem }}-{{ loop.cycle('x','y') }};{% endfor %}", {}),
    ("{% for a in range(3) %}{{ a }}{% endfor %}{{ range(5, 1, -2) | list }}", {}),
    # Expressions.
    ("{{ 1 + 2 * 3 - 4 / 2 }} {{ 7 // 2 }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 2 ** 10 }} {{ 7 % -3 }} {{ 2 ** -1 }}", {}),
    ("{{ 1.5 + 1 }} {{ 1e20 }} {{ 1e-5 }} {{ 0.1 + 0.2 }} {{ 100.0 }} {{ 1e16 }} {{ 123456789012345.0 }} {{ 5e-324 }}", {}),
    ("{{ -7.5 // 2 }} {{ -7.5 % 2 }} {{ 3 / 2 }} {{ 1_000 + 0x10 + 0b11 + 0o7 }}", {}),
    ("{{ 'a' ~ 1 ~ none ~ true ~ undefined_name ~ 1.0 }}", {}), ("{{ 'a' 'b' \"c\" }}", {}),
    ("{{ 'x' * 3 }}{{ [1] * 2 + [3] }}{{ (1, 2) + (3,) }}", {}), ("{{ 1 < 2 < 3 }}{{ 1 < 2 > 3 }}{{ 'a' < 'b' }}{{ [1,2] < [1,3] }}", {}),
    ("{{ 1 == 1.0 }}{{ 1 == true }}{{ '1' == 1 }}{{ none == none }}{{ [1, [2]] == [1, [2]] }}{{ {'a': 1} == {'a': 1.0} }}", {}),
    ("{{ 'b' in 'abc' }}{{ 4 not in [1,2] }}{{ 'k' in {'k': 1} }}{{ 1 in (1,) }}{{ 'x' in nothing }}", {}),
    ("{{ not true or true and false }}{{ 0 or 'x' }}{{ '' and 'y' }}{{ none or [] }}", {}),
    ("{{ 'a' if x else 'b' }}{{ 'a' if y }}{{ 1 if true else 2 if true else 3 }}", {"x": 0, "y": 0}),
    ("{{ [1, 2, 3][::-1] }}{{ [1,2,3,4][1:3] }}{{ [1,2,3][-2:] }}{{ 'héllo'[1:4] }}{{ 'héllo'[::-1] }}{{ 'abc'[-1] }}{{ 'abcdef'[::2] }}{{ [1,2,3][5:] }}{{ 'abc'[-9:2] }}", {}),
    ("{{ [1, 'a', none, true, 1.5, {'k': 'v'}, (1,), ()] }}", {}), ("{{ ['it\\'s', 'a\"b', 'both\\'\"', 'tab\\t\\n\\\\', 'é你'] }}", {}),
    ("{{ {'a': {'b': [1, 2]}}.a.b[1] }}{{ d['a-b'] }}{{ d.missing }}{{ d.get('q') }}{{ d.get('q', 5) }}", {"d": {"a-b": 9}}),
    ("{{ {'a': 1, 'a': 2} }}", {}), ("{{ (1) }}{{ (1,) }}{{ 1, 2 }}", {}), ("{{ x.0 }}{{ x[0][1] }}", {"x": [["p", "q"]]}),
    ("{{ '\\n\\t\\x41\\u00e9\\U0001F600\\q' }}", {}), ("{{ -x }}{{ +x }}{{ - 2 ** 2 }}", {"x": 3}),
    ("{{ 'a' is string }}{{ 1 is string }}{{ x is defined }}{{ y is not defined }}{{ x is none }}{{ none is none }}{{ x is undefined }}", {"x": 1}),
    ("{{ {} is mapping }}{{ [] is sequence }}{{ 'a' is sequence }}{{ {} is iterable }}{{ 1 is number }}{{ true is number }}{{ 1 is iterable }}", {}),
    ("{{ true is true }}{{ 1 is true }}{{ false is false }}{{ 3 is odd }}{{ 3 is even }}{{ 6 is divisibleby 3 }}{{ 1 is integer }}{{ 1.0 is float }}{{ true is boolean }}", {}),
    ("{{ 3 is eq 3 }}{{ 3 is in [1,3] }}{{ 3 is gt 2 }}{{ 'ab' is lower }}{{ 'AB' is upper }}{{ 1 is sameas true }}{{ not x is defined }}", {}),
    ("{{ 'yes' if x is defined and x is not none and x | length > 1 else 'no' }}", {"x": [1, 2]}),
    # Filters.
    ("[{{ '  a b\\n' | trim }}][{{ 'xxaxx' | trim('x') }}]{{ 'aé' | upper }}{{ 'AÉ' | lower }}{{ 'hello wORLD' | capitalize }}{{ 'hello-wORLD foo' | title }}", {}),
    ("{{ d | tojson }}", {"d": {"b": [1, 2.5, None, True], "a": "q\"\\\n\u0001\u007fé你😀", "e": {}, "f": []}}),
    ("{{ d | tojson(indent=2) }}", {"d": {"b": [1, {"x": []}], "a": {}}}), ("{{ d | tojson(sort_keys=true, separators=(',', ':')) }}", {"d": {"b": 1, "a": [1, 2]}}),
    ("{{ 'é😀' | tojson(ensure_ascii=true) }}", {}), ("{{ [1.0, 1e100, -0.0, 9007199254740993] | tojson }}", {}),
    ("{{ x | default('d') }}{{ none | default('d') }}{{ '' | default('d', true) }}{{ y | d(1) }}", {"y": 0}),
    ("{{ [1, 2] | length }}{{ 'añ' | length }}{{ {} | count }}{{ [1, 'a', 2.5] | join('-') }}{{ [1,2]|join }}{{ [{'n': 'a'}, {'n': 'b'}] | join(', ', attribute='n') }}", {}),
    ("{{ 'abc' | list }}{{ {'a': 1} | list }}{{ {'b': 1, 'a': 2} | items | list }}{{ {'b': 1, 'a': 2} | dictsort }}", {}),
    ("{{ [1, 2] | first }}{{ [1, 2] | last }}{{ [] | first }}{{ 'abc' | last }}{{ 5 | string + 'x' }}", {}),
    ("{{ 'a-b-c' | replace('-', '+') }}{{ 'aaa' | replace('a', 'b', 2) }}{{ 'ab' | replace('', '-') }}", {}),
    ("{{ m | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}{{ m | rejectattr('role', 'eq', 'user') | list | length }}{{ m | selectattr('x') | list }}{{ m | selectattr('x', 'defined') | list | length }}",
     {"m": [{"role": "user", "content": "a", "x": 1}, {"role": "bot", "content": "b"}, {"role": "user", "content": "c"}]}),
    ("{{ ['a', 'b'] | map('upper') | list }}{{ [1, 2, 3] | select('odd') | list }}{{ [1, 0] | reject | list }}", {}),
    ("{{ ['b', 'A', 'c'] | sort }}{{ ['b', 'A'] | sort(case_sensitive=true) }}{{ [3, 1, 2] | sort(reverse=true) }}{{ [{'n': 2}, {'n': 1}] | sort(attribute='n') }}", {}),
    ("{{ [1, 2, 1] | unique | list }}{{ [3, 1] | min }}{{ [3, 1] | max }}{{ [1, 2] | sum }}{{ [1, 2] | reverse | list }}{{ 'abc' | reverse }}", {}),
    ("{{ '42' | int }}{{ 'x' | int }}{{ 'x' | int(7) }}{{ 3.9 | int }}{{ '2.5' | float }}{{ -3 | abs }}{{ 2.567 | round(2) }}{{ 2.5 | round }}", {}),
    ("{{ 'a\\nb\\n\\nc' | indent }}|{{ 'a\\nb' | indent(2, true) }}", {}), ("{% filter upper %}a{{ 'b' }}{% endfilter %}", {}),
    ("{% set x %} a {{ 1 }} {% endset %}[{{ x }}]{% set y | trim | upper %} b {% endset %}[{{ y }}]", {}), ("{% set a, b = 1, 'z' %}{{ a }}{{ b }}", {}),
    # Methods.
    ("{{ 'a,b,,c'.split(',') }}{{ ' a  b '.split() }}{{ 'a,b,c'.split(',', 1) }}{{ 'a,b,c'.rsplit(',', 1) }}{{ 'a\\nb\\r\\nc\\n'.splitlines() }}", {}),
    ("[{{ ' x '.strip() }}][{{ 'xyax'.strip('xy') }}][{{ '\\n a'.lstrip('\\n') }}][{{ 'a \\n'.rstrip() }}][{{ '\u3000a\u00a0'.strip() }}]", {}),
    ("{{ 'abc'.startswith('ab') }}{{ 'abc'.endswith(('x', 'bc')) }}{{ 'aBc'.upper() }}{{ 'aBc'.lower() }}{{ 'a b'.title() }}{{ 'aBC'.capitalize() }}", {}),
    ("{{ 'a-b'.replace('-', '') }}{{ 'abcb'.find('b') }}{{ 'abcb'.rfind('b') }}{{ 'aaa'.count('a') }}{{ ','.join(['a', 'b']) }}{{ '12'.isdigit() }}", {}),
    ("{{ 'prefix-x'.removeprefix('prefix-') }}{{ [1,2,1].count(1) }}{{ [1,2].index(2) }}", {}),
    # Macros.
    ("{% macro f(a, b=2, c='x') %}{{ a }}-{{ b }}-{{ c }}{% endmacro %}{{ f(1) }} {{ f(1, c=3) }} {{ f(b=5, a=4) }}{{ f() }}", {}),
    ("{% set g = 'G' %}{% macro f(n) %}{{ n }}{{ g }}{% if n > 0 %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(3) | upper }}", {}),
    ("{% for x in [1, 2] %}{% macro m() %}{{ 'in' }}{% endmacro %}{{ m() }}{% endfor %}", {}),
    ("{% generation %}a{{ 1 }}{% endgeneration %}b", {}),
    # Errors.
    ("{{ raise_exception('no ' ~ 'way') }}", {}), ("{{ nothing.x }}", {}), ("{{ 1 + 'a' }}", {}), ("{{ nothing + 1 }}", {}), ("{{ 1 // 0 }}", {}),
    ("{% for x in 5 %}{% endfor %}", {}), ("{{ nothing() }}", {}), ("{{ nothing | tojson }}", {}), ("{{ 1 < 'a' }}", {}), ("{% if x %}", {}),
    ("{% endif %}", {}), ("{{ 1", {}), ("{% for x %}{% endfor %}", {}), ("{{ 'a }}", {}), ("{# x", {}), ("{{ (1 }}", {}), ("{% set 1 = 2 %}", {}),
    ("{{ ''.split('') }}", {}), ("{% set x = {} %}{% set x.a = 1 %}", {}), ("{{ range(1000000) | list | length }}", {}),
]


def environment():
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                        extensions=[Generation, jinja2.ext.loopcontrols])

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    return env


class Generation(jinja2.ext.Extension):
    """The generation tag, which only marks its content."""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def main():
    cases = []
    templates = []

    def add(template, variables):
        if template not in templates:
            templates.append(template)
        case = {"template": templates.index(template), "variables": variables}
        try:
            case["text"] = environment().from_string(template).render(**variables)
        except Exception as error:  # whatever Python raises is an error for us
            case["error"] = f"{type(error).__name__}: {error}"
        cases.append(case)

    for template, variables in SMALL:
        add(template, variables)
    for template in (LLADA, LLADA2, QWEN3):
        for messages in CONVERSATIONS:
            for tools in (None, TOOLS):
                for extra in ({}, {"enable_thinking": False}):
                    for prompt in (True, False):
                        if template is not QWEN3 and (tools or not prompt and extra):
                            continue
                        add(template, {"messages": messages, "tools": tools, "add_generation_prompt": prompt,
                                       "bos_token": "<|startoftext|>", **extra})
    def lines(items):
        return ",\n".join(json.dumps(i, ensure_ascii=False, separators=(",", ":")) for i in items)

    text = '{"templates":[\n' + lines(templates) + '\n],\n"cases":[\n' + lines(cases) + "\n]}\n"
    (HERE / "cases.json").write_text(text, encoding="utf-8")
    print(len(cases), "cases,", sum("error" in case for case in cases), "errors")


if __name__ == "__main__":
    main()
