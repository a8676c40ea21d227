"""Prompts through one endpoint, answered on the device or in the cloud, as a client sees it."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from clients import HELLO, metric, sent_and_left, stream, text_of, until

pytestmark = [pytest.mark.system, pytest.mark.model]

LONG = [{"role": "user", "content": "Tell a very long story about a river."}]
ROUTES = ["edge", "cloud"]


@pytest.mark.parametrize("route", ROUTES)
def test_each_side_answers_and_says_so(pair: Any, route: str) -> None:
    """Headers and the last chunk name the route, the reason and the failovers; the stream ends with its usage."""
    with pair.client() as client:
        events, headers = stream(client, model=route, stream_options={"include_usage": True})

    assert text_of(events).strip()
    assert headers["x-causeway-route"] == route
    assert headers["x-causeway-reason"]
    assert headers["x-causeway-failovers"] == "0"
    final = next(event for event in events if event["choices"] and event["choices"][0]["finish_reason"])
    assert final["causeway"]["route"] == route
    assert final["causeway"]["failovers"] == 0
    assert events[-1]["usage"]["completion_tokens"] > 0


def test_offloaded_answer_is_the_clouds_answer(pair: Any) -> None:
    """What comes through the edge and the wire is byte for byte what the cloud's own endpoint says."""
    with pair.client() as client, httpx.Client(base_url=pair.cloud.url, timeout=120) as direct:
        direct.headers["authorization"] = f"Bearer {pair.edge_key}"
        through, _ = stream(client, model="cloud")
        own, _ = stream(direct, model="cloud")

    assert text_of(through) == text_of(own)


@pytest.mark.parametrize("route", ROUTES)
def test_the_official_client_works_unchanged(pair: Any, route: str) -> None:
    """Streaming, usage, stop, seed, n, logprobs and errors, on both routes, with the fields OpenAI has."""
    client = openai.OpenAI(base_url=f"{pair.edge.url}/v1", api_key="any", max_retries=0)
    with client:
        whole = client.chat.completions.create(
            model=route, messages=HELLO, max_tokens=16, temperature=0.7, top_p=0.9, seed=7, n=2, logprobs=True,
            top_logprobs=3,
        )  # fmt: skip
        again = client.chat.completions.create(
            model=route, messages=HELLO, max_tokens=16, temperature=0.7, top_p=0.9, seed=7, n=2
        )
        chunks = list(
            client.chat.completions.create(
                model=route,
                messages=HELLO,
                max_tokens=16,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        raw = client.completions.create(model=route, prompt="One, two, three, four,", max_tokens=12, temperature=0)
        stopped = client.completions.create(
            model=route, prompt="One, two, three, four,", max_tokens=12, temperature=0, stop=[raw.choices[0].text[3:6]]
        )
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model=route, messages=HELLO, temperature=9)
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="no-such-model", messages=HELLO)
        names = {model.id for model in client.models.list()}

    assert len(whole.choices) == 2
    assert whole.usage.completion_tokens >= 2
    content = whole.choices[0].logprobs.content
    assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in content)
    assert [choice.message.content for choice in again.choices] == [choice.message.content for choice in whole.choices]
    assert chunks[-1].usage.completion_tokens > 0
    assert stopped.choices[0].finish_reason == "stop"
    assert raw.choices[0].text.startswith(stopped.choices[0].text)
    assert refused.value.param == "temperature"
    assert {"auto", "edge", "cloud"} <= names


@pytest.mark.parametrize("clients", [2, 20])
@pytest.mark.parametrize("route", ROUTES)
def test_many_clients_all_get_complete_answers(pair: Any, route: str, clients: int) -> None:
    """Simultaneous streams: every one ends with its finish reason, none is broken or cut."""

    def one(number: int) -> list[dict[str, Any]]:
        with pair.client() as client:
            messages = [{"role": "user", "content": f"Number {number}: tell me about the sea."}]
            return stream(client, model=route, messages=messages, max_tokens=20)[0]

    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(one, range(clients)))

    for events in answers:
        assert text_of(events).strip()
        assert any(choice["finish_reason"] in ("stop", "length") for choice in events[-1]["choices"])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_leaves_stops_costing_compute(pair: Any, route: str, streaming: bool) -> None:
    """Long before its answer would have ended nothing runs for it any more, on the side that was computing."""
    name = "causeway_edge_running" if route == "edge" else "causeway_engine_running"
    url = pair.edge.url if route == "edge" else pair.cloud.url
    body = {"model": route, "messages": LONG, "max_tokens": 1500, "ignore_eos": True, "stream": streaming}

    def computing() -> bool:
        return metric(url, name, pair.edge_key) > 0

    with sent_and_left(pair.edge.url, body):
        assert until(computing)

    assert until(lambda: not computing(), 10)


def test_over_long_prompts_are_refused_by_name_or_routed(pair: Any) -> None:
    """A prompt beyond both contexts is an error with both numbers, never a silent cut."""
    with pair.client() as client:
        body = {"messages": [{"role": "user", "content": "word " * 30_000}], "max_tokens": 4}
        replies = [
            client.post("/v1/chat/completions", json=body | {"model": model}) for model in ("auto", "edge", "cloud")
        ]

    for reply in replies:
        assert reply.status_code == 400, reply.text
        assert reply.json()["error"]["code"] == "context_length_exceeded"


def test_no_prompt_text_in_logs_or_metrics(pair: Any) -> None:
    """A canary in the prompt shows up in no log line and no metric of either side."""
    canary = "zebra-canary-4711"
    with pair.client() as client:
        for route in ROUTES:
            stream(client, model=route, messages=[{"role": "user", "content": f"My secret is {canary}."}], max_tokens=4)
        client.post(
            "/v1/chat/completions", json={"model": "auto", "messages": [{"role": "user", "content": canary}], "x": 1}
        )

    seen = [daemon.log.read_text() for daemon in (pair.edge, pair.cloud)]
    seen += [httpx.get(f"{pair.edge.url}/metrics").text]
    seen += [httpx.get(f"{pair.cloud.url}/metrics", headers={"authorization": f"Bearer {pair.edge_key}"}).text]
    assert all(len(text) > 100 for text in seen)
    assert not any(canary in text or pair.edge_key in text for text in seen)


def test_both_sides_count_what_they_did(pair: Any) -> None:
    """Prometheus counts requests by route, tokens, first-token times and the engine's cache, on both sides."""
    with pair.client() as client:
        before = metric(pair.edge.url, "causeway_requests_total", target="cloud", outcome="done")
        stream(client, model="cloud")
        stream(client, model="cloud")

    assert metric(pair.edge.url, "causeway_requests_total", target="cloud", outcome="done") == before + 2
    assert metric(pair.edge.url, "causeway_first_token_seconds_count", target="cloud") > 0
    for name in ("causeway_tokens_total", "causeway_engine_kv_blocks_total", "causeway_engine_prefix_hit_tokens_total"):
        assert metric(pair.cloud.url, name, pair.edge_key) > 0, name
