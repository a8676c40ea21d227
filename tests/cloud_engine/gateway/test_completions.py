import json
from typing import Any

import msgspec
import pytest

from cloud_engine.gateway.completions import ChunkReader, fields_of, path_of
from shared.errors import BadRequest, RateLimited, UpstreamFailed
from shared.replies import error_object
from shared.schemas import (
    ChatRequest,
    Delta,
    Grammar,
    Message,
    Sampling,
    TokenLogprob,
    Tool,
    ToolCall,
    ToolPiece,
    TopLogprob,
    Usage,
)

MESSAGES = (Message(role="system", content="Be brief."), Message(role="user", content="Hi", name="bo"))


def chat(**sampling: Any) -> ChatRequest:
    return ChatRequest(id="r1", model="auto", messages=MESSAGES, sampling=Sampling(**sampling))


def completion(prompt: str = "Once", **sampling: Any) -> ChatRequest:
    return ChatRequest(id="r1", model="auto", prompt=prompt, sampling=Sampling(**sampling))


def calling() -> ChatRequest:
    called = Message(role="assistant", content="", tool_calls=(ToolCall(id="1", name="g", arguments="{}"),))
    turns = (MESSAGES[1], called, Message(role="tool", content="2", tool_call_id="1"))
    tools = (Tool(name="f"), Tool(name="g"))
    return ChatRequest(id="r", model="m", messages=turns, tools=tools, tool_choice="required", allowed_tools=("f",))


def call(index: int, id: str | None = None, **function: str) -> dict[str, Any]:  # noqa: A002 - the field's name
    return {"choices": [{"delta": {"tool_calls": [{"index": index, "id": id, "function": function}]}}]}


def deltas(request: ChatRequest, *events: Any) -> tuple[list[Delta], ChunkReader]:
    reader = ChunkReader(request, fields_of(request, "m", 100))
    texts = [event if isinstance(event, bytes) else json.dumps(event).encode() for event in events]
    return [delta for text in texts if (delta := reader.read(text)) is not None], reader


def piece(content: str | None, reason: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": reason, **more}]}


def test_a_plain_request_sends_only_what_every_server_knows() -> None:
    """Defaults are left out, extensions above all: OpenAI itself, Causeway and TGI refuse what they do not know."""
    request = chat()
    assert path_of(request) == "chat/completions"
    assert fields_of(request, "m", 100) == {
        "model": "m",
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 1.0,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi", "name": "bo"}],
    }


def test_every_sampling_field_is_sent_when_set() -> None:
    """None is dropped silently."""
    sampling = {
        "temperature": 0.0,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.1,
        "seed": 0,
        "max_tokens": 7,
        "stop": ("a", "b"),
        "ignore_eos": True,
        "min_tokens": 3,
        "stop_token_ids": (5,),
        "logit_bias": {7: -1.5},
    }
    assert set(sampling) | {"logprobs"} == set(Sampling.__struct_fields__)
    assert sampling.items() <= fields_of(chat(**sampling), "m", 100).items()
    assert sampling.items() <= fields_of(completion(**sampling), "m", 100).items()


@pytest.mark.parametrize(
    ("grammar", "sent"),
    [
        (
            Grammar(syntax="json_schema", text='{"type":"null"}'),
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "answer", "schema": {"type": "null"}, "strict": True},
                }
            },
        ),
        (Grammar(syntax="json_schema", text='{"type":"object"}'), {"response_format": {"type": "json_object"}}),
        (Grammar(syntax="regex", text="a+"), {"structured_outputs": {"regex": "a+"}}),
        (Grammar(syntax="lark", text="start: /a/"), {"structured_outputs": {"grammar": "start: /a/"}}),
    ],
)
def test_a_grammar_is_passed_on(grammar: Grammar, sent: dict[str, Any]) -> None:
    """Schemas in OpenAI's form, which most servers know; the rest in vLLM's."""
    request = ChatRequest(id="r", model="m", messages=MESSAGES, grammar=grammar)
    assert sent.items() <= fields_of(request, "m", 100).items()


@pytest.mark.parametrize("top", [0, 3])
def test_logprobs_are_asked_for_in_each_ones_form(top: int) -> None:
    """A flag and a count for chat, a count for completions."""
    asked = fields_of(chat(logprobs=top), "m", 100)
    assert asked["logprobs"] is True
    assert asked.get("top_logprobs", 0) == top
    assert fields_of(completion(logprobs=top), "m", 100)["logprobs"] == top


def test_a_completion_without_a_limit_asks_for_what_fits() -> None:
    """Left out it would be 16 tokens at the upstream, but the rest of the context here."""
    assert path_of(completion()) == "completions"
    assert fields_of(completion("abcd"), "m", 100)["max_tokens"] == 96
    assert fields_of(completion("a" * 99), "m", 100)["max_tokens"] == 16


def test_an_answer_is_read() -> None:
    """Text at once, one last delta with the upstream's usage, whether or not the chunk that finishes has text."""
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
    got, reader = deltas(
        chat(), piece(""), piece("Hel"), piece("lo", "length"), {"choices": [], "usage": usage}, b"[DONE]"
    )
    assert got == [Delta(text="Hel", tokens=1), Delta(text="lo", tokens=1)]
    assert reader.done
    usage_read = Usage(prompt_tokens=9, completion_tokens=2, cached_tokens=4)
    assert reader.last() == Delta(finish_reason="length", usage=usage_read)


def test_without_usage_the_deltas_are_counted() -> None:
    """The prompt's tokens are an estimate from its length."""
    got, reader = deltas(completion("p" * 40), {"choices": [{"text": "a"}]}, {"choices": [{"text": "b"}]},
                         {"choices": [{"text": "", "finish_reason": "stop"}], "usage": None}, b"[DONE]")  # fmt: skip
    assert [delta.text for delta in got] == ["a", "b"]
    assert reader.last().usage == Usage(prompt_tokens=10, completion_tokens=2)


def test_reasoning_counts_and_is_not_shown() -> None:
    """A server that thinks for long is not silent, and its thoughts are no answer."""
    got, reader = deltas(chat(), {"choices": [{"delta": {"reasoning_content": "hm"}}]}, piece("Yes", "stop"))
    assert got == [Delta(tokens=1), Delta(text="Yes", tokens=1)]
    assert reader.tokens == 2


def test_chats_logprobs_are_read() -> None:
    """Several tokens in a chunk count as that many; bytes may be missing, a probability may be null."""
    tops = [{"token": "a", "logprob": -0.5, "bytes": [97]}, {"token": "z", "logprob": None, "bytes": None}]
    content = [{"token": "a", "logprob": -0.5, "bytes": None, "top_logprobs": tops}, {"token": "b", "logprob": -1}]
    got, _ = deltas(chat(logprobs=2), piece("ab", logprobs={"content": content}))
    a = TokenLogprob("a", -0.5, (97,), (TopLogprob("a", -0.5, (97,)), TopLogprob("z", -9999.0, (122,))))
    assert got == [Delta(text="ab", tokens=2, logprobs=(a, TokenLogprob("b", -1.0, (98,))))]


def test_completions_logprobs_are_read() -> None:
    """The parallel lists; of rivals the likeliest, as many as were asked for."""
    said = {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"b": -2, "a": -0.5}], "text_offset": [0]}
    got, _ = deltas(completion(logprobs=1), {"choices": [{"text": "a", "logprobs": said}]})
    assert got[0].logprobs == (TokenLogprob("a", -0.5, (97,), (TopLogprob("a", -0.5, (97,)),)),)


def test_logprobs_that_do_not_come_are_missed() -> None:
    """A server that passes over the field is found out at the first text; a later piece may be without them."""
    with pytest.raises(BadRequest, match="no logprobs"):
        deltas(chat(logprobs=0), piece(""), piece("a"))
    content = [{"token": "a", "logprob": -0.5}]
    got, _ = deltas(chat(logprobs=0), piece("a", logprobs={"content": content}), piece("b"))
    assert [delta.text for delta in got] == ["a", "b"]


def test_a_stop_string_is_cut_here_too() -> None:
    """A server that leaves it in, or ignores it, is stopped; text that only looked like one is not lost."""
    got, reader = deltas(chat(stop=("END",)), piece("go E"), piece("ND more"), piece("x"))
    assert "".join(delta.text for delta in got) == "go "
    assert reader.done
    assert reader.last().finish_reason == "stop"

    got, reader = deltas(chat(stop=("END",)), piece("go E"), piece("N", "stop"))
    assert "".join(delta.text for delta in (*got, reader.last())) == "go EN"


@pytest.mark.parametrize(
    "event",
    [
        b"{",
        b"\xff",
        b"[" * 100_000,
        b"7",
        {"choices": "x"},
        {"choices": [{"delta": {"content": 5}}]},
        {"usage": {"prompt_tokens": -1}},
        {"usage": {"prompt_tokens": 1 << 70}},
        piece("a", logprobs={"content": [{"token": "a", "logprob": 0, "bytes": [256]}]}),
        piece("a", logprobs={"tokens": ["a"], "token_logprobs": [-1.0, -2.0]}),
        piece("a", "content_filter"),
        piece("a", "abort"),
        call(0, name="rm", id="1"),
        call(1, arguments="{}"),
    ],
)
def test_what_is_no_answer_is_upstream_failed(event: Any) -> None:
    """Malformed, mistyped, or ended for a reason that is no answer's: a typed error, never a guess."""
    with pytest.raises(UpstreamFailed):
        deltas(calling(), event)


def test_calls_are_passed_on_and_read() -> None:
    """Tools go out in OpenAI's form, only those that may be called; calls come back piece by piece."""
    fields = fields_of(calling(), "m", 100)
    assert fields["tools"][0]["function"] == {"name": "f", "description": "", "parameters": {"type": "object"}}
    assert fields["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    assert fields["messages"][1]["tool_calls"][0]["function"] == {"name": "g", "arguments": "{}"}
    assert fields["messages"][2] == {"role": "tool", "content": "2", "tool_call_id": "1"}
    got, reader = deltas(
        calling(), call(0, name="f", id="x"), call(0, arguments='{"a"'), call(0, arguments=":1}"), piece(None, "stop")
    )
    pieces = [one for delta in got for one in delta.tool_calls]
    assert pieces == [ToolPiece(0, "", "x", "f"), ToolPiece(0, '{"a"'), ToolPiece(0, ":1}")]
    assert reader.last().finish_reason == "tool_calls"


def test_a_call_that_is_announced_must_come() -> None:
    """An end for calls that were never made is no end of an answer."""
    _, reader = deltas(calling(), piece(None, "tool_calls"))
    with pytest.raises(UpstreamFailed):
        reader.last()


def test_an_answer_without_its_end_is_no_answer() -> None:
    """[DONE] alone does not make it whole."""
    _, reader = deltas(chat(), piece("a"), b"[DONE]")
    with pytest.raises(UpstreamFailed, match="middle"):
        reader.last()


def test_an_error_event_is_raised() -> None:
    """As the error that the upstream means."""
    with pytest.raises(RateLimited):
        deltas(chat(), piece("a"), error_object(RateLimited("later")))


def test_batch_work_is_flex_at_the_upstream() -> None:
    """OpenAI's name for it, sent only where it is asked for."""
    batch = msgspec.structs.replace(completion("abcd"), priority="batch")
    assert fields_of(batch, "m", 100)["service_tier"] == "flex"
    assert "service_tier" not in fields_of(completion("abcd"), "m", 100)
