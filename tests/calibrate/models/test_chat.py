"""Chat templates: as transformers renders them, from every place that they are kept in."""

import json

import pytest
from model_files import GOLDEN, copy_of, write
from transformers.utils.chat_template_utils import render_jinja_template

from turboq.errors import TurboqError
from turboq_calibrate.models import load_model
from turboq_calibrate.models.chat import TODAY, ChatTemplate, check_messages, from_folder

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "  Grüße?\n"},
    {"role": "assistant", "content": "Ja."},
]
# What published templates use: whitespace control, loops left early, namespaces, macros, tojson.
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}\n{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim }}"
        "<|im_end|>\n  {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "loops": (
        "{{ bos_token }}{% set ns = namespace(n=0) %}{% for m in messages %}"
        "{% if m.role == 'system' %}{% continue %}{% endif %}{% set ns.n = ns.n + 1 %}"
        "{{ loop.index0 }}:{{ ns.n }}{{ m.content }}{{ eos_token }}{% break %}{% endfor %}"
    ),
    "json": (
        "{%- macro line(m) -%}{{ m | tojson }}|{{ m.content | tojson(indent=2) }}{%- endmacro -%}"
        "{%- for m in messages -%}{{ line(m) }}{%- endfor -%}{{ tools | tojson }}"
    ),
    "generation": (
        "{% set x = 1 %}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{{ x }}{% set x = 2 %}{% endgeneration %}{{ x }}{% else %}{{ m.content }}"
        "{% endif %}{% endfor %}"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("answer", [False, True])
def test_templates_render_as_transformers_renders_them(name, answer):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"é": "<"}}}]
    expected, _ = render_jinja_template(
        [TALK], tools=tools, chat_template=TEMPLATES[name], add_generation_prompt=answer, **SPECIAL
    )
    found = ChatTemplate(source=TEMPLATES[name], special=SPECIAL)
    assert found.render(TALK, answer=answer, tools=tools) == expected[0]


def test_the_date_stands_still():
    template = ChatTemplate(source="{{ strftime_now('%d %b %Y') }}")
    assert template.render(TALK) == f"{TODAY:%d %b %Y}" == "26 Jul 2024"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no system here') }}", "chat template: no system here"),
        ("{% for %}", "chat template: Expected"),
        ("{{ messages.append(1) }}", "chat template: "),  # the sandbox keeps what it is given
        ("{{ ''.__class__.__mro__ }}", "chat template: "),
        ("{{ messages[9].content + 'x' }}", "chat template"),
        ("{{ 1 // 0 }}", "chat template fails on these messages: integer"),
        ("{{ messages[0].content + 1 }}", "chat template fails on these messages: can only"),
    ],
)
def test_what_a_template_refuses_is_one_line(source, message):
    with pytest.raises(TurboqError) as error:
        ChatTemplate(source=source).render(TALK)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "a list of one message at least"),
        ("hi", "a list of one message at least"),
        (["hi"], "message 0 must be an object with a role, not 'hi'"),
        ([{"content": "x"}], "message 0 must be an object with a role"),
        ([*TALK, {"role": "user", "content": [{"type": "image"}]}], "message 3 of role 'user' has"),
        ([{"role": "user", "content": None}], "content None: give text"),
    ],
)
def test_messages_of_another_form_are_named(messages, message):
    with pytest.raises(TurboqError, match=message):
        check_messages(messages)


def test_a_tool_call_needs_no_content():
    call = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}]
    template = ChatTemplate(source="{{ messages[0].tool_calls[0].function.name }}")
    assert template.render(call) == "f"


def test_templates_of_a_folder(tmp_path):
    def config(**fields):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
        return from_folder(tmp_path)

    assert from_folder(tmp_path) is None
    assert config(bos_token="<s>") is None
    token = {"content": "</s>", "lstrip": False}
    found = config(chat_template="one", bos_token="<s>", eos_token=token, pad_token=None)
    assert found == ChatTemplate(source="one", special=SPECIAL)
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    found = config(chat_template=named)
    assert found is not None
    assert found.source == "d"
    for fields in ({"chat_template": 3}, {"chat_template": "x", "eos_token": 3}):
        with pytest.raises(TurboqError, match="=3 must be text"):
            config(**fields)
    config(chat_template="one", eos_token="</s>")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "two"}))
    (tmp_path / "chat_template.jinja").write_text("three")
    found = from_folder(tmp_path)
    assert found == ChatTemplate(source="three", special={"eos_token": "</s>"})
    (tmp_path / "chat_template.jinja").unlink()
    found = from_folder(tmp_path)
    assert found is not None
    assert found.source == "two"


def test_templates_of_models(tmp_path):
    """What a tokenizer has; a template that cannot be read hurts nobody who does not ask for it."""
    folder = copy_of(tmp_path, "llama3")
    assert load_model(folder).tokenizer.chat is None
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    tokenizer = load_model(folder).tokenizer
    with pytest.raises(TurboqError, match="cannot read"):
        _ = tokenizer.chat
    assert load_model(GOLDEN / "llama3" / "model.gguf").tokenizer.chat is None
    key = "tokenizer.chat_template"
    path = write(tmp_path / "model.gguf", "llama3", fields={key: "{{ bos_token }}:"})
    found = load_model(path).tokenizer
    assert found.chat is not None
    assert found.chat.render(TALK) == f"{found.backend.id_to_token(found.bos_id)}:"
    odd = {key: "x", "tokenizer.ggml.padding_token_id": 10**6}
    tokenizer = load_model(write(tmp_path / "odd.gguf", "llama3", fields=odd)).tokenizer
    with pytest.raises(TurboqError, match="padding_token_id=1000000 is no token"):
        _ = tokenizer.chat
