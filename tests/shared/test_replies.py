import json
from typing import Any

import pytest
from bad_input import chat, completion

from shared.errors import Cancelled, RateLimited, UpstreamFailed
from shared.openai import parse_chat, parse_completion
from shared.replies import NO_LOGPROB, Chunks, Whole, error_object, model_list
from shared.schemas import Delta, ModelCard, Route, TokenLogprob, TopLogprob, Usage

ROUTE = Route(target="cloud", reason="code", failovers=1, model="real")
LAST = Delta(finish_reason="stop", usage=Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1), route=ROUTE)


def events(data: bytes) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in data.decode().split("\n\n") if line]
    return [json.loads(line) if line != "[DONE]" else line for line in lines]


def test_a_chat_stream_has_openais_shape() -> None:
    """Role first, then content, then finish_reason with the route, then usage with no choices, then [DONE]."""
    call = parse_chat(chat(stream=True, stream_options={"include_usage": True}), request_id="r")
    chunks = Chunks(call, reply_id="chatcmpl-r", created=7)
    deltas = (Delta(text="Hé", tokens=1), Delta(tokens=1), LAST)
    found = events(b"".join(chunks.push(0, delta) for delta in deltas) + chunks.end())
    choices = [event["choices"][0] for event in found[:3]]

    assert choices == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None},
        {"index": 0, "delta": {"content": "Hé"}, "logprobs": None, "finish_reason": None},
        {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"},
    ]
    assert found[2]["causeway"] == {"route": "cloud", "reason": "code", "failovers": 1, "model": "real"}
    assert [event["usage"] for event in found[:3]] == [None, None, None]
    assert found[3]["choices"] == []
    assert found[3]["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert found[4:] == ["[DONE]"]
    assert {(event["id"], event["object"], event["created"], event["model"]) for event in found[:4]} == {
        ("chatcmpl-r", "chat.completion.chunk", 7, "auto")
    }


@pytest.mark.parametrize("model", ["auto", 'a""b', '"content":""'])
@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_a_text_is_what_all_of_a_chunk_says(kind: str, model: str) -> None:
    """The chunk is made once and each text put into it: the same as one made for it, whatever names hold."""
    body, parse = (chat, parse_chat) if kind == "chat" else (completion, parse_completion)
    call = parse(body(stream=True, model=model), request_id="r")  # type: ignore[operator]
    for text in ('"', "\\", "\n\u2028", '"",""', "a"):
        fast, slow = (Chunks(call, reply_id="c", created=7) for _ in range(2))
        fast.push(0, Delta(tokens=1))
        said = fast.push(0, Delta(text=text, tokens=1))

        assert said == slow._chunk(0, slow._piece(0, Delta(text=text)))
        assert events(said)[0]["model"] == model


def test_usage_is_only_sent_when_asked_for() -> None:
    """Without include_usage no chunk has the field and no chunk is without choices."""
    chunks = Chunks(parse_chat(chat(stream=True), request_id="r"), reply_id="c", created=7)
    found = events(chunks.push(0, Delta(text="a", tokens=1)) + chunks.push(0, LAST) + chunks.end())
    assert all("usage" not in event and event["choices"] for event in found[:-1])


def test_a_text_stream_has_openais_shape() -> None:
    """`completions` streams `text`, without roles."""
    chunks = Chunks(parse_completion(completion(stream=True), request_id="r"), reply_id="cmpl-r", created=7)
    found = events(chunks.push(0, Delta(text="a", tokens=1)) + chunks.push(0, LAST) + chunks.end())
    assert [event["choices"][0]["text"] for event in found[:2]] == ["a", ""]
    assert found[0]["object"] == "text_completion"
    assert found[1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(("asked", "told"), [({}, "default"), ({"service_tier": "flex"}, "flex")])
def test_replies_say_the_tier_they_were_given(asked: dict[str, str], told: str) -> None:
    """`flex` for batch work, else `default`: in every chunk and in the whole reply."""
    call = parse_chat(chat(**asked), request_id="r")
    chunks, whole = Chunks(call, reply_id="c", created=7), Whole(call, reply_id="c", created=7)
    whole.push(0, LAST)

    tiers = {event["service_tier"] for event in events(chunks.push(0, LAST))}
    assert tiers | {json.loads(whole.end())["service_tier"]} == {told}


def test_choices_are_told_apart_and_their_usage_added_up() -> None:
    """Deltas of two choices keep their index; the prompt is counted once."""
    call = parse_chat(chat(n=2), request_id="r")
    whole = Whole(call, reply_id="c", created=7)
    for index, text in ((1, "b"), (0, "a"), (1, "B"), (0, "A")):
        whole.push(index, Delta(text=text, tokens=1))
    whole.push(1, LAST)
    whole.push(0, Delta(finish_reason="length", usage=Usage(prompt_tokens=3, completion_tokens=5)))
    reply = json.loads(whole.end())

    assert [choice["message"]["content"] for choice in reply["choices"]] == ["aA", "bB"]
    assert [choice["finish_reason"] for choice in reply["choices"]] == ["length", "stop"]
    assert (reply["usage"]["prompt_tokens"], reply["usage"]["completion_tokens"]) == (3, 7)
    assert reply["causeway"]["route"] == "cloud"


def test_logprobs_have_both_of_openais_forms() -> None:
    """Chat nests them per token; completions have parallel lists with offsets that go on over chunks."""
    token = TokenLogprob("ab", -0.5, (97, 98), (TopLogprob("ab", -0.5, (97, 98)), TopLogprob("x", float("-inf"))))
    delta = Delta(text="ab", tokens=1, logprobs=(token,))
    whole = Whole(parse_chat(chat(logprobs=True, top_logprobs=2), request_id="r"), reply_id="c", created=7)
    whole.push(0, delta)
    whole.push(0, LAST)
    (found,) = json.loads(whole.end())["choices"][0]["logprobs"]["content"]
    assert (found["token"], found["logprob"], found["bytes"]) == ("ab", -0.5, [97, 98])
    assert [top["logprob"] for top in found["top_logprobs"]] == [-0.5, NO_LOGPROB]

    call = parse_completion(completion(logprobs=2, stream=True), request_id="r")
    chunks = Chunks(call, reply_id="c", created=7)
    streamed = events(chunks.push(0, delta) + chunks.push(0, delta))
    assert [event["choices"][0]["logprobs"]["text_offset"] for event in streamed] == [[0], [2]]
    assert streamed[0]["choices"][0]["logprobs"]["top_logprobs"] == [{"ab": -0.5, "x": NO_LOGPROB}]


def test_an_unfinished_answer_cannot_be_ended() -> None:
    """One choice without its last delta is enough to refuse."""
    call = parse_chat(chat(n=2), request_id="r")
    for reply in (Chunks(call, reply_id="c", created=7), Whole(call, reply_id="c", created=7)):
        reply.push(0, LAST)
        with pytest.raises(UpstreamFailed):
            reply.end()


def test_a_cancelled_answer_is_an_error_to_openais_clients() -> None:
    """They know no such finish_reason."""
    chunks = Chunks(parse_chat(chat(stream=True), request_id="r"), reply_id="c", created=7)
    with pytest.raises(Cancelled):
        chunks.push(0, Delta(finish_reason="cancelled", usage=Usage(prompt_tokens=1, completion_tokens=0)))


def test_the_error_object_says_who_failed_and_whether_to_retry() -> None:
    """OpenAI's four fields and ours."""
    error = RateLimited("slow down", param="n", source="cloud", retry_after=1.5)
    assert error_object(error)["error"] == {
        "message": "slow down",
        "type": "rate_limit_error",
        "param": "n",
        "code": "rate_limited",
        "source": "cloud",
        "retryable": True,
        "retry_after": 1.5,
    }


def test_models_say_their_context() -> None:
    """A client can see how long a prompt may be."""
    (model,) = json.loads(model_list([ModelCard(id="m", context_length=2048)], 7))["data"]
    assert model == {"id": "m", "object": "model", "created": 7, "owned_by": "causeway", "context_length": 2048}
