"""Which templates only copy texts: whatever sees more of a text than that it is there is not one of them."""

import pytest

from tests.tiny_parts import CHAT_TEMPLATES
from vlm.data.encoding.template_analysis import copied_unless


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_packaged_templates_and_those_of_tokenizers_only_copy_texts(name: str):
    expected = {"</think>", "<think>"} if name == "own-qwen3" else set()
    assert copied_unless(CHAT_TEMPLATES[name].text) == expected


@pytest.mark.parametrize(
    ("template", "strings"),
    [
        ("{% for m in messages[1:] %}{{ m['content'].strip() }}{% endfor %}", set()),
        ("{{ messages[0].get('content', '') ~ (messages | last).content | trim }}", set()),
        ("{% if messages and messages[0].role == 'user' %}{% set s = messages[0].content %}{% endif %}{{ s }}", set()),
        ("{% if messages[0].content is string and messages[0].content %}{{ messages[0].content }}{% endif %}", set()),
        ("{{ messages[0].content.split('[x]')[-1].lstrip('\n').replace('#', '') }}", {"[x]", "#"}),
        ("{% if '/no_think' in messages[0].content %}a{% endif %}{{ messages | length }}", {"/no_think"}),
        ("{{ messages[0].content.split(image_token) | length }}", set()),
        ("{% set ns = namespace(s='') %}{% set ns.s = messages[0].content %}{{ ns.s }}", set()),
    ],
)
def test_stripping_joining_and_looking_for_constants_is_copying(template: str, strings: set[str]):
    assert copied_unless(template) == strings


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages }}",
        "{{ messages[0] | tojson }}",
        "{{ messages | map(attribute='content') | join }}",
        "{{ messages.pop().content }}",
        "{{ messages[0].values() }}",
        "{{ messages[0]['con' ~ 'tent'] }}",
        "{{ messages[0] | attr('content') }}",
        "{{ messages[0].get('content') | length }}",
        "{{ messages[0].content | length }}",
        "{{ messages[0].content | upper }}",
        "{{ messages[0].content.title() }}",
        "{{ messages[0].content[:3] }}",
        "{{ messages[0].content * 2 }}",
        "{{ messages[0].content.split(x)[0] }}",
        "{{ messages[0].content.split('a') | join('b') }}",
        "{{ (messages[0].content ~ 'a') | length }}",
        "{{ (messages[0].content or '') | length }}",
        "{{ '%s' % messages[0].content }}",
        "{{ 'abc'.replace('a', messages[0].content) }}",
        "{{ [messages[0].content] | join }}",
        "{{ messages[0].content < 'a' }}{{ messages[0].content == messages[1].content }}",
        "{% if messages[0].content in 'abc' %}a{% endif %}",
        "{% for c in messages[0].content %}{{ c }}{% endfor %}",
        "{% for role, content in messages %}{{ content }}{% endfor %}",
        "{% for k, v in messages[0].items() %}{{ v }}{% endfor %}",
        "{% for m in messages %}{{ loop.previtem.content | length }}{% endfor %}",
        "{% for m in messages %}{{ (loop | attr('previtem')).content | length }}{% endfor %}",
        "{% for m in messages if m.content | length %}a{% endfor %}",
        "{% set ns = namespace(s='') %}{% set ns.s = messages[0].content %}{{ ns }}",
        "{% set x %}{{ messages[0].content }}{% endset %}{{ x | length }}",
        "{% set image_token = 'a' %}{{ messages[0].content.split(image_token) | length }}",
        "{% set get = messages[0].get %}{{ get('content') | length }}",
        "{% macro shown(x) %}{{ x }}{% endmacro %}{{ shown(messages[0].content) }}",
        "{% filter upper %}{{ messages[0].content }}{% endfilter %}",
        "{{ lipsum() }}",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}",
        "{{ unfinished",
    ],
)
def test_a_template_that_sees_more_of_a_text_is_not_one_that_copies(template: str):
    assert copied_unless(template) is None
