"""Chat templates: the author's code in a sandbox."""

import pytest

from edge_agent.backends.template import ChatTemplate
from shared.errors import BadRequest
from shared.schemas import Message

HELLO = (Message(role="user", content="hello"),)


def render(source: str, messages: tuple[Message, ...] = HELLO) -> str:
    return ChatTemplate(source, bos="<s>", eos="</s>").render(messages)


def test_a_conversation_becomes_one_text() -> None:
    """Roles, contents, special tokens, and the place where the assistant speaks."""
    source = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )

    assert render(source) == "<s>[user]hello</s>[assistant]"


def test_what_a_user_writes_is_not_a_template() -> None:
    """Braces in a message are text."""
    assert render("{{ messages[0].content }}", (Message(role="user", content="{{ 7*7 }}"),)) == "{{ 7*7 }}"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ raise_exception(messages[0].content) }}",
        "{% for i in range(10 ** 9) %}{{ i }}{% endfor %}",
        "{{ messages[0].content + 1 }}",
    ],
)
def test_a_hostile_or_refusing_template_is_a_typed_error(source: str) -> None:
    """S-22: it reaches nothing, names the field and repeats nothing of what was said."""
    with pytest.raises(BadRequest) as raised:
        render(source)

    assert raised.value.param == "messages"
    assert "hello" not in raised.value.message


@pytest.mark.parametrize("source", ["{% for", "{{ x | nofilter }}", "x" * (1 << 19)])
def test_a_broken_template_is_found_at_load(source: str) -> None:
    """Before any request comes."""
    with pytest.raises(BadRequest) as raised:
        ChatTemplate(source, bos="", eos="")

    assert raised.value.param == "model"
