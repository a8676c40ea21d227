"""edge_agent.originals: what was redacted comes back into every part of an answer."""

import json

from edge_agent.originals import Originals
from router.privacy.detect import Detector
from router.privacy.inspect import redacted
from shared.schemas import ChatRequest, Delta, Grammar, Message, Sampling, TokenLogprob

SAID = 'password="abc12345\\!x", card 4111111111111111'
SCHEMA = json.dumps({"enum": [4111111111111111, "anna@example.org"]})


def test_an_answer_that_must_be_json_stays_json() -> None:
    """An original that JSON writes with escapes is written so in the text of an answer with a schema, and in its
    tokens; the schema itself stays JSON, too, and a number that it asks for comes back as a number."""
    request = ChatRequest(
        id="r",
        model="auto",
        messages=(Message(role="user", content=SAID),),
        grammar=Grammar(syntax="json_schema", text=SCHEMA),
        sampling=Sampling(logprobs=0),
    )
    hidden, redaction = redacted(request, Detector(), b"secret")
    assert hidden.grammar is not None
    card, mail = json.loads(hidden.grammar.text)["enum"]
    assert card.startswith("<CARD_")
    assert mail.startswith("<EMAIL_")
    (password,) = [name for name in redaction.values if name.startswith("<PASSWORD_")]

    answer = json.dumps({"password": password, "card": card, "mail": mail})
    originals = Originals(redaction, in_json=True)
    deltas = [
        originals.restored(
            Delta(text=sign, logprobs=(TokenLogprob(token=sign, logprob=-0.1, bytes=tuple(sign.encode())),))
        )
        for sign in answer
    ]
    deltas.append(originals.restored(Delta(text="", finish_reason="stop")))
    whole = "".join(delta.text for delta in deltas)
    assert json.loads(whole) == {
        "password": redaction.values[password], "card": 4111111111111111, "mail": "anna@example.org"
    }  # fmt: skip
    assert "".join(token.token for delta in deltas for token in delta.logprobs) == whole
