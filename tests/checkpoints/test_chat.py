"""Chat templates render as in transformers."""

import pytest

from jint8.checkpoints._tokenizer.chat import render_chat

USER = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "é<"}]

EACH = "{% for m in messages %}"
CASES = {
    "blocks_trim": (EACH + "\n    {% if m.role == 'user' %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}", "hi\n"),
    "loop_controls": (EACH + "{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "user"),
    "tojson": ("{{ messages[1] | tojson }}", '{"role": "assistant", "content": "é<"}'),
    "tojson_indent": ("{{ [1] | tojson(indent=1) }}", "[\n 1\n]"),
    "generation": (EACH + "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "hié<"),
    "namespace": ("{% set ns = namespace(n=0) %}" + EACH + "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
    "variables": ("{{ bos_token }}{% if add_generation_prompt %}>{% endif %}{{ missing }}", "<s>>"),
    "strftime_now": ("{{ strftime_now('%Y') | length }}", "4"),
    "strings": ("{{ messages[0].content.split('i')[0].strip() }}", "h"),
}


@pytest.mark.parametrize(("template", "expected"), CASES.values(), ids=CASES)
def test_render(template, expected):
    assert render_chat(template, USER, bos_token="<s>", add_generation_prompt=True) == expected


FAULTS = {
    "refused": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "syntax": ("{% for %}", "Expected a chat"),
    "sandbox": ("{{ messages.append(1) }}", "Expected a chat"),
    "escape": ("{{ ''.__class__.__mro__ }}", "Expected a chat"),
    "type": ("{{ 1 + 'a' }}", "Expected a chat"),
}


@pytest.mark.parametrize(("template", "message"), FAULTS.values(), ids=FAULTS)
def test_fault(template, message):
    with pytest.raises(ValueError, match=message):
        render_chat(template, USER)
