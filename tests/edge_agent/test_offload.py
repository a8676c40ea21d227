import asyncio
import json
import re
from contextlib import aclosing
from typing import Any

import msgspec
import pytest
from edge_sides import LAST, THERE, Link, Remote, Turns, ask
from fakes import ScriptedAnswer

from edge_agent.offload import Offload
from router.policy import parse
from router.privacy.detect import MAX_CHARS
from shared.errors import (
    BadRequest,
    CausewayError,
    ContextTooLong,
    DeadlineExceeded,
    PolicyDenied,
    RateLimited,
    Unreachable,
    Unrecoverable,
    UpstreamFailed,
)
from shared.schemas import ChatRequest, Delta, Sampling, TokenLogprob, Tool, ToolPiece

POLICY = parse(
    "mode: prefer_cloud\nfirst_token_timeout_s: 5\n"
    "breaker: {consecutive_failures: 2, cool_down_s: 10, probe_timeout_s: 5}"
)


class Door:
    """An Offload over scripts, one a request, with its clock in the test's hands."""

    def __init__(self, *scripts: tuple[Any, ...]) -> None:
        self.now = 0.0
        self.turns = Turns(*scripts)
        self.remote = Remote(self.turns)
        self.offload = Offload(self.remote, clock=lambda: self.now)
        self.offload.reading()

    async def send(self, request: ChatRequest | None = None) -> list[Delta] | CausewayError:
        try:
            async with aclosing(self.offload.answer(request or ask(), POLICY)) as deltas:
                return [delta async for delta in deltas]
        except CausewayError as error:
            return error


async def test_label_is_checked_again_at_the_door() -> None:
    """Whatever was decided: what is labelled edge_only is refused before the backend hears of it."""
    door = Door(THERE)

    refused = await door.send(ask(label="edge_only"))

    assert isinstance(refused, PolicyDenied)
    assert not door.remote.seen


async def test_what_is_the_edges_own_is_not_sent() -> None:
    """The cloud knows no classes, and need not know how its answer is read."""
    door = Door(THERE)
    request = ask()

    await door.send(msgspec.structs.replace(request, scenario="voice", streamed=True))

    assert door.remote.seen == [request]


async def test_redacted_on_the_way_out_and_restored_on_the_way_back() -> None:
    """What is labelled redact reaches the backend with placeholders and as free; its answer, cut inside a placeholder,
    reaches the client with the originals."""
    door = Door(THERE)
    await door.send(ask("Write to anna@example.org", label="redact"))
    (sent,) = door.remote.seen
    (placeholder,) = re.findall(r"<EMAIL_[0-9a-f]+>", sent.messages[-1].content)
    assert (sent.label, "anna" in str(sent)) == ("free", False)

    pieces = [Delta(text="To "), Delta(text=placeholder[:5]), Delta(text=placeholder[5:] + " at"), LAST]
    door.turns.scripts = [ScriptedAnswer(*pieces)]
    answered = await door.send(ask("Write to anna@example.org", label="redact"))

    assert isinstance(answered, list)
    assert "".join(delta.text for delta in answered) == "To anna@example.org at" + LAST.text


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
async def test_arguments_of_calls_get_their_originals_back(size: int) -> None:
    """However the arguments are cut, each call's are JSON with the originals in it, escaped; what only begins like a
    placeholder stays, and comes before the next call."""
    question = "Mail anna@example.org and ben@example.org"
    tools = (Tool(name="mail", description="Not to carl@example.org"),)
    asked = msgspec.structs.replace(ask(question, label="redact"), tools=tools)
    door = Door(THERE)
    await door.send(asked)
    (sent,) = door.remote.seen
    assert not re.search(r"anna|ben@|carl", str(sent))
    anna, ben = re.findall(r"<EMAIL_[0-9a-f]+>", sent.messages[-1].content)
    (carl,) = re.findall(r"<EMAIL_[0-9a-f]+>", sent.tools[0].description)

    written = [f'{{"to": "{anna}", "cc": ["{ben}", "{carl}"]}}', f'{{"to": "{ben}", "sign": "<EMAIL', '{"to": "x"}']
    deltas = []
    for index, text in enumerate(written):
        deltas.append(Delta(tool_calls=(ToolPiece(index=index, id=f"c{index}", name="mail"),)))
        parts = [text[at : at + size] for at in range(0, len(text), size)]
        deltas += [Delta(tool_calls=(ToolPiece(index=index, arguments=part),)) for part in parts]
    door.turns.scripts = [ScriptedAnswer(*deltas, LAST)]
    answered = await door.send(asked)

    assert isinstance(answered, list)
    pieces = [piece for delta in answered for piece in delta.tool_calls]
    assert [piece.index for piece in pieces] == sorted(piece.index for piece in pieces)
    joined = ["".join(piece.arguments for piece in pieces if piece.index == index) for index in range(3)]
    assert json.loads(joined[0]) == {"to": "anna@example.org", "cc": ["ben@example.org", "carl@example.org"]}
    assert joined[1:] == ['{"to": "ben@example.org", "sign": "<EMAIL', '{"to": "x"}']


async def test_what_cannot_be_redacted_does_not_leave() -> None:
    """Too long to be looked through: refused at the door, and the backend hears of nothing."""
    door = Door(THERE)

    refused = await door.send(ask("a" * (MAX_CHARS + 1), label="redact"))

    assert isinstance(refused, PolicyDenied)
    assert not door.remote.seen


async def test_answers_from_the_first_token_on() -> None:
    """Deltas with nothing in them come before the first token; from there on all is passed through."""
    door = Door((Delta(), Delta(), THERE[0], Delta(), LAST))

    assert await door.send() == [THERE[0], Delta(), LAST]


async def test_time_runs_until_the_first_token() -> None:
    """Empty deltas are no sign of life: the limit is on the first token, and the work behind is closed."""
    side = ScriptedAnswer(Delta(), asyncio.Event())
    offload = Offload(Remote(side))

    with pytest.raises(DeadlineExceeded):
        await anext(offload.answer(ask(), parse("mode: prefer_cloud\nfirst_token_timeout_s: 0.01")))

    assert side.running == 0


async def test_an_answer_without_a_token_or_an_end_has_failed() -> None:
    """Nothing at all is not an answer."""
    assert isinstance(await Door((Delta(),)).send(), UpstreamFailed)


async def test_breaker_opens_probes_once_and_closes() -> None:
    """After two failures nothing is sent; after the cool-down exactly one request probes; its success closes it."""
    gate = asyncio.Event()
    door = Door((Unreachable("gone"),), (Unreachable("gone"),), (gate, *THERE), THERE)

    results = [await door.send() for _ in range(4)]
    assert [type(result) for result in results] == [Unreachable] * 4
    assert len(door.remote.seen) == 2
    assert door.offload.breaker_state() == "open"
    assert results[3].retry_after == 10  # type: ignore[union-attr]

    door.now = 10.5
    probe = asyncio.create_task(door.send())
    await door.turns.scripts[2].begun.wait()
    beside = await door.send()
    gate.set()

    assert isinstance(beside, Unreachable)
    assert await probe == list(THERE)
    assert await door.send() == list(THERE)
    assert door.offload.breaker_state() == "closed"
    assert len(door.remote.seen) == 4


async def test_a_probe_that_fails_waits_twice_as_long() -> None:
    """The cool-down doubles."""
    door = Door((Unreachable("gone"),))
    for _ in range(2):
        await door.send()
    door.now = 10.5
    await door.send()

    door.now = 25.0
    await door.send()
    assert len(door.remote.seen) == 3
    door.now = 31.0
    await door.send()
    assert len(door.remote.seen) == 4


@pytest.mark.parametrize(
    ("error", "opens"),
    [
        (BadRequest("no"), False),
        (ContextTooLong("no"), False),
        (Unrecoverable("no"), True),
        (RateLimited("no"), True),
    ],
)
async def test_the_requests_own_faults_do_not_open_the_breaker(error: CausewayError, opens: bool) -> None:
    """Refusals that a request deserves show that the cloud lives; other errors count against it."""
    door = Door((error,))

    for _ in range(5):
        await door.send()

    assert (door.offload.breaker_state() == "open") is opens


async def test_errors_after_the_first_token_are_not_counted_twice() -> None:
    """A request is reported once, at its first token; what became of the stream is the link's to show."""
    door = Door((THERE[0], UpstreamFailed("broke")))

    for _ in range(5):
        assert isinstance(await door.send(), UpstreamFailed)

    assert door.offload.breaker_state() == "closed"


async def test_leaving_before_the_first_token_says_nothing_of_the_cloud() -> None:
    """Impatient clients do not open the breaker."""
    door = Door((asyncio.Event(),))

    for turn in range(5):
        sent = asyncio.create_task(door.send())
        await door.turns.scripts[0].begun.wait()
        door.turns.scripts[0].begun.clear()
        sent.cancel()
        await asyncio.gather(sent, return_exceptions=True)
        assert len(door.remote.seen) == turn + 1

    assert door.offload.breaker_state() == "closed"
    assert door.turns.scripts[0].running == 0


async def test_a_new_connection_is_probed_at_once() -> None:
    """The link coming back ends the cool-down."""
    door = Door((Unreachable("gone"),))
    for _ in range(2):
        await door.send()
    assert not door.offload.reading().admitting

    door.remote.state = Link(connected=False)
    door.offload.reading()
    door.remote.state = Link(connected=True)

    assert door.offload.reading().admitting


async def test_reading_puts_link_and_experience_together() -> None:
    """What the connection says of itself, and what requests have met."""
    door = Door(THERE)
    door.remote.state = Link(draining=True, retry_after_s=7.0, round_trip_s=0.04)
    await door.send()
    reading = door.offload.reading()

    assert (reading.connected, reading.draining, reading.retry_after_s) == (True, True, 7.0)
    assert (reading.round_trip_s, reading.first_token_s) == (0.04, 0.0)
    assert (reading.model, reading.context_length) == ("large", 8192)


def cut(text: str, size: int) -> list[Delta]:
    """An answer in tokens of this length, with each one's probability."""
    tokens = [text[at : at + size] for at in range(0, len(text), size)]
    said = [TokenLogprob(token=token, logprob=-0.5, bytes=tuple(token.encode())) for token in tokens]
    return [Delta(text=one.token, tokens=1, logprobs=(one,)) for one in said]


@pytest.mark.parametrize("size", [1, 3, 7, 100])
async def test_probabilities_are_of_the_originals(size: int) -> None:
    """The tokens of a placeholder become one token, the original: what is told of tokens spells the text that the
    client gets, and no placeholder is left in it."""
    door = Door(THERE)
    request = ask("Write to anna@example.org", label="redact")
    await door.send(request)
    (placeholder,) = re.findall(r"<EMAIL_[0-9a-f]+>", door.remote.seen[0].messages[-1].content)
    text = f"To {placeholder}, <EMA and {placeholder}<"
    deltas = cut(text, size)
    door.turns.scripts = [ScriptedAnswer(*deltas, LAST)]
    answered = await door.send(request)

    assert isinstance(answered, list)
    tokens = [token for delta in answered for token in delta.logprobs]
    spelled = "".join(token.token for token in tokens)
    assert spelled == "".join(delta.text for delta in answered) == text.replace(placeholder, "anna@example.org")
    assert b"".join(bytes(token.bytes) for token in tokens) == spelled.encode()
    assert sum(token.logprob for token in tokens) == -0.5 * len(deltas)


async def test_the_stop_string_that_ended_it_is_the_callers_own() -> None:
    """A stop string is redacted like all text; which one it was is said in the caller's words."""
    door = Door(THERE)
    request = msgspec.structs.replace(ask("hello", label="redact"), sampling=Sampling(stop=("anna@example.org",)))
    await door.send(request)
    (stop,) = door.remote.seen[0].sampling.stop
    assert stop.startswith("<EMAIL_")

    door.turns.scripts = [ScriptedAnswer(THERE[0], msgspec.structs.replace(LAST, stop=stop))]
    answered = await door.send(request)

    assert isinstance(answered, list)
    assert answered[-1].stop == "anna@example.org"


async def test_arguments_whose_brackets_are_escaped() -> None:
    """Some write `<` as an escape in JSON: a placeholder is one all the same, however it is cut."""
    door = Door(THERE)
    request = msgspec.structs.replace(ask("Mail anna@example.org", label="redact"), tools=(Tool(name="mail"),))
    await door.send(request)
    (placeholder,) = re.findall(r"<EMAIL_[0-9a-f]+>", door.remote.seen[0].messages[-1].content)
    written = f'{{"to": "\\u003c{placeholder[1:-1]}\\u003E"}}'
    for size in (1, 5, 100):
        parts = [written[at : at + size] for at in range(0, len(written), size)]
        begin = Delta(tool_calls=(ToolPiece(index=0, id="c", name="mail"),))
        deltas = [begin, *(Delta(tool_calls=(ToolPiece(index=0, arguments=part),)) for part in parts)]
        door.turns.scripts = [ScriptedAnswer(*deltas, LAST)]
        answered = await door.send(request)
        assert isinstance(answered, list)
        joined = "".join(piece.arguments for delta in answered for piece in delta.tool_calls)
        assert json.loads(joined) == {"to": "anna@example.org"}
