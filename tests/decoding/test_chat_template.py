"""Chat templates: what they get, what they may cost, and where an answer's thinking ends."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from comparator.core.errors import UserError
from comparator.core.request import ChatTemplate, parse_variables, written_variables
from comparator.decoding import chat_template, template_process
from comparator.decoding.text import encode, thinking

PLAIN = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
QWEN = PLAIN + (
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
    "{% endif %}"
)


@pytest.fixture(scope="module")
def builtin_tokenizer(builtin):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(builtin.path)


@pytest.fixture
def with_template(builtin_tokenizer):
    def make(template):
        tokenizer = copy.deepcopy(builtin_tokenizer)
        tokenizer.chat_template = template
        return tokenizer

    return make


def test_it_is_rendered_as_transformers_does(builtin_tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": 'Say "hi" & <b>é</b>'},
    ]
    ours = chat_template.render(
        builtin_tokenizer, messages[1]["content"], messages[0]["content"], ChatTemplate()
    )
    assert ours == builtin_tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def test_variables_reach_the_template(with_template):
    tokenizer = with_template(QWEN)
    on = chat_template.render(tokenizer, "Hi", None, ChatTemplate())
    off = chat_template.render(tokenizer, "Hi", None, ChatTemplate(variables={"enable_thinking": False}))
    assert on.endswith("<think>\n") and off.endswith("</think>\n\n")
    assert chat_template.opened(on) == "<think>" and chat_template.opened(off) == ""
    assert encode(tokenizer, "Hi", None, None).opened == "<think>"


@pytest.mark.parametrize(
    ("template", "asked", "system", "problem", "advice"),
    [
        (QWEN, ChatTemplate(variables={"enable_thinkin": False}), None, "no variable", "enable_thinking"),
        (PLAIN, ChatTemplate(variables={"messages": "x"}), None, "filled in here", "Leave it out"),
        (PLAIN, ChatTemplate("tool_use"), None, "no template “tool_use”", "default"),
        ({"rag": PLAIN, "tool_use": PLAIN}, ChatTemplate(), None, "none of them is the default", "rag, tool_use"),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}hi", ChatTemplate(),
         "Be brief.", "system prompt: No system role", "beginning of the prompt"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", ChatTemplate(), "Be brief.",
         "ignores the system prompt", "beginning of the prompt"),
        ("{{ raise_exception('Never') }}", ChatTemplate(), None, "refused this conversation: Never", "template off"),
        ("{% for", ChatTemplate(), None, "cannot be used", "template off"),
        ("{{ ''.__class__.__mro__ }}{{ messages[0].content.__class__.__init__.__globals__ }}", ChatTemplate(), None,
         "unsafe", "template off"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_the_way_out(with_template, template, asked, system, problem, advice):
    with pytest.raises(UserError) as refused:
        chat_template.render(with_template(template), "Hi", system, asked)
    assert problem in refused.value.problem and advice in refused.value.advice, refused.value


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% if a == -1 %}x{% endif %}{% endfor %}{% endfor %}",
        "{{ 'x' * 9000000000 }}",
    ],
)
def test_a_template_without_end_is_ended(with_template, monkeypatch, template):
    monkeypatch.setattr(chat_template, "CPU_S", 1)
    with pytest.raises(UserError, match="chat template"):
        chat_template.render(with_template(template), "Hi", None, ChatTemplate())


def test_a_named_template_is_used(with_template):
    tokenizer = with_template({"default": PLAIN, "rag": "RAG " + PLAIN})
    assert chat_template.render(tokenizer, "Hi", None, ChatTemplate("rag")) == "RAG <user>Hi"


def test_variables_need_a_template(builtin_tokenizer, with_template):
    with pytest.raises(UserError, match="need the chat template"):
        encode(builtin_tokenizer, "Hi", None, False, ChatTemplate(variables={"a": 1}))
    with pytest.raises(UserError, match="no chat template"):
        encode(with_template(None), "Hi", None, None, ChatTemplate(variables={"a": 1}))


def test_one_beginning_of_sequence_token(with_template):
    tokenizer = with_template("{{ bos_token }}{{ bos_token }}" + PLAIN)
    ids = encode(tokenizer, "Hi", None, None).token_ids
    assert ids[0] == tokenizer.bos_token_id != ids[1]


@pytest.mark.parametrize(
    ("opened", "answer", "end"),
    [
        ("", "<think>Hm, so.</think>Paris.", "<think>Hm, so.</think>"),
        ("<think>", "Hm, so.</think>\n\nParis.", "Hm, so.</think>"),
        ("<think>", "Hm, and so on", "Hm, and so on"),
        ("", "Paris.", None),
    ],
)
def test_where_the_thinking_ends(builtin_tokenizer, opened, answer, end):
    ids = builtin_tokenizer(answer, add_special_tokens=False)["input_ids"]
    found = thinking(builtin_tokenizer, ids, answer, opened)
    if end is None:
        assert found is None
        return
    assert found.opened == opened and answer[: found.characters].startswith(end)
    assert len(answer[: found.characters]) - len(end) <= 4, "the answer's own words are counted as thinking"
    assert found.characters == len(builtin_tokenizer.decode(ids[: found.tokens]))


def test_variables_are_written_and_read():
    given = parse_variables(
        ["enable_thinking=false", "effort=high", "budget=512", "note=a = b", 'text="5"', "x=null"]
    )
    assert given == {
        "enable_thinking": False, "effort": "high", "budget": 512, "note": "a = b", "text": "5", "x": None,
    }  # fmt: skip
    assert parse_variables(written_variables(given)) == given
    assert parse_variables(["on=True", "list=[1]", "far=1e999"]) == {
        "on": True,
        "list": "[1]",
        "far": "1e999",
    }
    for wrong in ("enable_thinking", "=1", "a b=1"):
        with pytest.raises(UserError, match="not a template variable"):
            parse_variables([wrong])


TALK = [
    {"role": "system", "content": "Be “brief”."},
    {"role": "user", "content": "안녕 🦜\n<b>1 & 2</b>", "name": None},
    {"role": "assistant", "content": "Arr!"},
]


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m['content'] | trim }} {{ m.name is defined }}\n{% endfor %}",
        "{{ messages | tojson }}{{ messages[1] | tojson(indent=2) }}{{ tools is none }}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{{ strftime_now('%Y-%m') }}{{ dict(a=1) }}  \n  {%- if add_generation_prompt %}\n  x\n  {%- endif %}\n\n",
    ],
)
def test_whole_conversations_are_written_as_transformers_does(builtin_tokenizer, with_template, template):
    tokenizer = builtin_tokenizer if template is None else with_template(template)
    for asking in (True, False):
        ours = chat_template.written(tokenizer, TALK, asking)
        theirs = tokenizer.apply_chat_template(TALK, add_generation_prompt=asking, tokenize=False)
        assert ours == theirs


def test_the_process_is_reused_and_gets_no_secrets(with_template, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    template_process.process.close()
    chat_template.written(with_template("a"), TALK, True)
    child = template_process.process.child
    chat_template.written(with_template("b"), TALK, True)
    assert template_process.process.child is child, "a process is started for each conversation"
    if (environment := Path(f"/proc/{child.pid}/environ")).exists():
        assert b"hf_secret" not in environment.read_bytes()


def test_training_data_meets_the_same_limits(with_template, monkeypatch):
    monkeypatch.setattr(chat_template, "CPU_S", 1)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% if a < 0 %}x{% endif %}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match="took longer than"):
        chat_template.written(with_template(endless), TALK, True)
    assert chat_template.written(with_template("ok"), TALK, True) == "ok", (
        "the next template finds no process"
    )
