"""Ways in which what is private could slip by, or come back wrong: in other spellings, within JSON, out of context."""

import base64
import json
import unicodedata
from urllib.parse import quote

import pytest

from router.privacy.detect import MAX_WORD_CHARS, MAX_WORDS, TOO_MUCH, Detector
from router.privacy.inspect import inspect, redacted
from shared.schemas import ChatRequest, Grammar, Message, Sampling, Tool, ToolCall

DETECTOR = Detector()
CARD = "4111111111111111"
ADDRESS = "bob@example.com"


def asked(*contents: str, tools: tuple[Tool, ...] = (), calls: tuple[ToolCall, ...] = ()) -> ChatRequest:
    messages = [Message(role="user", content=text) for text in contents]
    if calls:
        messages += [Message(role="assistant", content="", tool_calls=calls)]
    return ChatRequest(id="r1", model="auto", messages=tuple(messages), tools=tools)


def sent(request: ChatRequest, detector: Detector = DETECTOR) -> ChatRequest:
    return redacted(request, detector, b"secret")[0]


SPELLINGS = {
    "percent, twice": ADDRESS.replace("@", "%2540"),
    "percent, thrice": ADDRESS.replace("@", "%252540"),
    "percent of a zero-width space": "bob%E2%80%8B%40example.com",
    "percent of full-width letters": quote("\uff42\uff4f\uff42@example.com", safe="@"),
    "entity in an entity": ADDRESS.replace("@", "&amp;#64;"),
    "entity without its end": ADDRESS.replace("@", "&#64"),
    "named entity": ADDRESS.replace("@", "&commat;").replace(".", "&period;"),
    "escape of JSON in JSON": ADDRESS.replace("@", "\\\\u0040"),
    "escape of two digits": ADDRESS.replace("@", "\\x40"),
    "escape in braces": ADDRESS.replace("@", "\\u{40}"),
    "surrogates": "bob@example.com".replace("o", "\\ud835\\udc5c"),
    "in brackets": "bob [at] example [dot] com",
    "in parentheses": "bob(at)example(dot)com",
    "hexadecimal": ADDRESS.encode().hex(),
    "base64": base64.b64encode(f"write to {ADDRESS}".encode()).decode(),
    "base64, twice": base64.b64encode(base64.b64encode(f"write to {ADDRESS}".encode())).decode(),
    "base64 of percent": base64.b64encode(b"to=bob%40example.com&x=1").decode(),
    "base64 at the end of a path": "/v1/u/" + base64.b64encode(f"mail {ADDRESS} ok".encode()).decode(),
    "base64 in lines": base64.encodebytes(f"{'x' * 50} {ADDRESS} {'y' * 60} abc".encode()).decode().strip(),
    "ideographic full stop": ADDRESS.replace(".", "\u3002"),
    "struck out": "".join(char + "\u0336" for char in ADDRESS),
    "tags": "".join(char + "\U000e0061" for char in ADDRESS),
    "Hangul fillers": "\u3164".join(ADDRESS),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_an_address_in_another_spelling_is_found_and_hidden(name: str) -> None:
    """P-5: whatever a reader or a model would see through is seen through; all of it is replaced."""
    text = f"please tell {SPELLINGS[name]} about it"
    (finding,) = {one.kind for one in DETECTOR.find(text)}
    assert finding == "email"
    (message,) = sent(asked(text)).messages
    assert SPELLINGS[name] not in message.content
    assert message.content.startswith("please tell")
    assert inspect(asked(message.content), DETECTOR).kinds == ()


@pytest.mark.parametrize(
    "separator",
    [
        "\u2011",
        "\u2013",
        "\u2014",
        "\u2212",
        "\u00a0",
        "\u202f",
        "\u3000",
        "\u00b7",
        "\u30fb",
        "&nbsp;",
        "%20",
        "+",
        " - ",
        "  ",
    ],
    ids=ascii,
)
def test_numbers_with_other_separators(separator: str) -> None:
    """Word processors, web pages and forms put other dashes and spaces between the groups of a number."""
    number = separator.join(CARD[at : at + 4] for at in range(0, 16, 4))
    found = DETECTOR.find(f"it is {number}, thanks")
    assert [(one.kind, one.start, one.end) for one in found] == [("card", 6, 6 + len(number))]


def test_own_words_however_they_are_typed() -> None:
    """Accents apart or within, other widths, a line's end or an underscore in between: the same word."""
    detector = Detector(only=[], words=["Projekt Müller", "\uff2b\uff4f\uff42\uff45", "東京 工場"])
    for text in (
        unicodedata.normalize("NFD", "projekt müller"),
        "PROJEKT\nMÜLLER",
        "projekt_müller",
        "Projekt\u00a0Mu\u0308ller",
        "kobe",
        "東京\u3000工場",
    ):
        assert [one.kind for one in detector.find(f"- {text} -")] == ["word"], text
    assert detector.find("kobes, projektmüller") == []


ESCAPED = {
    "a card after a line's end": f"one\\n{CARD} two",
    "a key after a tab": "one\\tAKIA" + "ABCDEFGH" * 2,
    "an address after a line's end": f"one\\n{ADDRESS}",
    "a password in JSON in JSON": '{\\"password\\": \\"Tr0ub4dor&3x\\"}',
}


@pytest.mark.parametrize("name", ESCAPED)
def test_what_stands_after_an_escape_is_found(name: str) -> None:
    """P-5: in a call's arguments a line ends in two characters, of which the second is a letter: it is not part of the
    word after it, which would hide that word or come back with it."""
    arguments = f'{{"text": "{ESCAPED[name]}"}}'
    call = ToolCall(id="c1", name="note", arguments=arguments)
    hidden, redaction = redacted(asked("go on", calls=(call,)), DETECTOR, b"secret")
    written = hidden.messages[-1].tool_calls[0].arguments
    (value,) = redaction.values.values()
    assert value in (CARD, "AKIA" + "ABCDEFGH" * 2, ADDRESS, "Tr0ub4dor&3x")
    assert value not in written
    assert json.loads(written)["text"].count("<") == 1


def test_arguments_stay_json() -> None:
    """Numbers, keys and escaped text: what was valid is valid with placeholders, and equal values are equal ones."""
    written = {
        "card": int(CARD),
        "to": [ADDRESS, 5],
        ADDRESS: None,
        "password": 'Tr0ub4dor&"3x',
        "note": f"a\n{ADDRESS}",
    }
    arguments = json.dumps(written).replace("@", "\\u0040")
    call = ToolCall(id="c1", name="pay", arguments=arguments)
    hidden, redaction = redacted(asked(f"from {ADDRESS}", calls=(call,)), DETECTOR, b"secret")
    found = json.loads(hidden.messages[-1].tool_calls[0].arguments)
    (address,) = {name for name, value in redaction.values.items() if value == ADDRESS}
    assert found["to"] == [address, 5]
    assert found[address] is None
    assert found["note"] == f"a\n{address}"
    assert redaction.values[found["card"]] == CARD
    assert hidden.messages[0].content == f"from {address}"
    assert redaction.values[found["password"]] == written["password"]
    assert "Tr0ub4dor" not in str(hidden)


def test_definitions_of_tools_stay_schemas() -> None:
    """A schema that names a person is sent without the name, and is a schema still."""
    schema = {"type": "object", "properties": {"to": {"enum": [ADDRESS, "x"]}, "card": {"const": int(CARD)}}}
    tool = Tool(name="mail", parameters=json.dumps(schema), description=f"as {ADDRESS}")
    hidden = sent(asked("hello", tools=(tool,)))
    assert ADDRESS not in str(hidden)
    assert CARD not in str(hidden)
    assert set(json.loads(hidden.tools[0].parameters)["properties"]) == {"to", "card"}


def test_only_the_value_of_a_password_is_hidden() -> None:
    """The model still sees that there is one, and JSON around it stays whole."""
    for text in ('{"password": "Tr0ub4dor&3x"}', "password = Tr0ub4dor&3x", "api_key='Tr0ub4dor&,3;x'"):
        hidden, redaction = redacted(asked(text), DETECTOR, b"secret")
        (placeholder,) = redaction.values
        assert hidden.messages[0].content == text.replace(redaction.values[placeholder], placeholder)
        assert redaction.values[placeholder].endswith("3x") or redaction.values[placeholder].endswith("3;x")


REPEATED = {
    "in a later message": ("my social security number is 123456788", "is 123456788 valid?"),
    "in an earlier message": ("what is 123456788?", "it is my ssn: 123456788"),
    "in the same message": ("ssn 123456788" + " and so on" * 20 + ": 123456788",),
    "in a path": ("ssn 123456788", "it lies in /home/123456788/tax"),
}


@pytest.mark.parametrize("name", REPEATED)
def test_what_was_found_once_is_hidden_everywhere(name: str) -> None:
    """P-6: a number that only its sentence makes an identity number is hidden in every other sentence, too: the answer
    of one turn repeats it, and is sent with the next."""
    hidden, redaction = redacted(asked(*REPEATED[name]), DETECTOR, b"secret")
    assert redaction.values
    assert "123456788" not in str(hidden)


def test_a_repeated_value_is_no_part_of_a_longer_one() -> None:
    """What only contains the same digits is another number."""
    hidden, _ = redacted(asked("my ssn is 123456788", "order 99123456788 and x123456788y"), DETECTOR, b"secret")
    assert hidden.messages[1].content == "order 99123456788 and x123456788y"


@pytest.mark.parametrize("word", ["user", "system", "content", "messages", "auto", "json_schema", "function"])
def test_a_word_of_the_protocol_may_be_in_the_dictionary(word: str) -> None:
    """Only what users wrote is looked through: not how a request spells its roles and fields."""
    detector = Detector(only=[], words=[word])
    request = ChatRequest(
        id="r1",
        model="auto",
        messages=(Message(role="system", content="be kind"), Message(role="user", content="hello")),
        grammar=Grammar(syntax="json_schema", text='{"type":"string"}'),
        sampling=Sampling(logit_bias={5: 1.0}),
    )
    assert inspect(request, detector).kinds == ()
    assert sent(request, detector) == request
    assert inspect(asked(f"the {word} said"), detector).kinds == ("word",)


def test_a_dictionary_too_large_to_search_is_refused() -> None:
    """A search without memory would find nothing, and say so: such a dictionary is no detector."""
    words = [chr(0x4E00 + number) + "\u6771" * (MAX_WORD_CHARS - 1) for number in range(MAX_WORDS)]
    try:
        detector = Detector(only=[], words=words)
    except ValueError as error:
        assert str(error) == TOO_MUCH  # noqa: PT017
    else:
        assert [one.kind for one in detector.find(f"- {words[-1]} -")] == ["word"]


def test_a_dictionary_of_nothing_visible_is_refused() -> None:
    """A word of invisible characters alone would be found everywhere, or nowhere."""
    with pytest.raises(ValueError, match="seen"):
        Detector(words=["\u200b\u200b\u200b"])
