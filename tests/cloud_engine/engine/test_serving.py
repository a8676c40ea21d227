import asyncio
import itertools
import threading
from collections import Counter
from contextlib import aclosing

import pytest
import tiny_llama
from tiny_serving import LONG, collect, idle, request, serving_tiny, until
from waiting import HANG_S

from cloud_engine.engine import serving
from cloud_engine.engine.serving import EngineAnswer, load_engine
from cloud_engine.model.tokenizer import Tokenizer
from shared.errors import (
    BadRequest,
    CausewayError,
    ContextTooLong,
    DeadlineExceeded,
    Internal,
    Overloaded,
    UpstreamFailed,
)
from shared.schemas import ChatRequest, Message, Sampling


def decoded(tokens: list[int]) -> str:
    return tiny_llama.tokenizer().decode(tokens, skip_special_tokens=True)


async def test_streams_the_greedy_answer(tiny_model):
    """Deltas join to the decoded greedy tokens; the last one has the reason and the usage."""
    async with serving_tiny(tiny_model) as answer:
        deltas = await collect(answer, request(sampling=Sampling(temperature=0, max_tokens=12, ignore_eos=True)))
    prompt = tiny_llama.tokenizer().encode("hello")
    assert "".join(delta.text for delta in deltas) == decoded(tiny_llama.naive_greedy(prompt, 12))
    assert deltas[-1].finish_reason == "length"
    assert (deltas[-1].usage.prompt_tokens, deltas[-1].usage.completion_tokens) == (5, 12)
    assert sum(delta.tokens for delta in deltas) == 12


async def test_messages_go_through_the_template(tiny_model):
    """A conversation is answered from its rendered template."""
    sampling = Sampling(temperature=0, max_tokens=6, ignore_eos=True)
    chat = request(prompt=None, messages=(Message(role="user", content="hi"),), sampling=sampling)
    async with serving_tiny(tiny_model) as answer:
        deltas = await collect(answer, chat)
    inner = tiny_llama.tokenizer()
    prompt = inner.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
    assert "".join(delta.text for delta in deltas) == decoded(tiny_llama.naive_greedy(prompt, 6))


async def test_a_second_turn_hits_the_cache_of_its_own_tenant(tiny_model):
    """The same prompt again reports cached tokens under the same salt, none under another."""
    asked = request("a common beginning of many bytes")
    async with serving_tiny(tiny_model) as answer:
        cached = []
        for salt in ("a", "a", "b"):
            deltas = [delta async for delta in answer.answer(asked, salt=salt)]
            cached.append(deltas[-1].usage.cached_tokens)
        assert answer.stats().prefix_hit_tokens == 16
    assert cached == [0, 16, 0]


async def test_a_stop_string_ends_the_answer_and_the_work(tiny_model):
    """The text is cut before the stop string and no token is generated after it."""
    prompt = tiny_llama.tokenizer().encode("hello")
    text = decoded(tiny_llama.naive_greedy(prompt, 40))
    stop = next(character for character in text[4:] if character.isalnum())
    async with serving_tiny(tiny_model) as answer:
        deltas = await collect(answer, request(sampling=Sampling(temperature=0, stop=(stop,), ignore_eos=True)))
        await idle(answer)
        generated = answer.stats().generated_tokens
    assert "".join(delta.text for delta in deltas) == text[: text.find(stop)]
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].usage.completion_tokens == generated


async def test_closing_the_answer_stops_the_work(tiny_model):
    """A client that leaves gives its sequence and its blocks back long before the answer would have ended."""
    async with serving_tiny(tiny_model) as answer:
        async with aclosing(answer.answer(request())) as deltas:
            await anext(deltas)
        await idle(answer)
        assert answer.stats().generated_tokens < 200


async def test_cancelling_the_task_stops_the_work(tiny_model):
    """Cancelled in the middle, waiting or decoding, requests leave nothing behind; the others complete."""
    async with serving_tiny(tiny_model, max_num_seqs=2) as answer:
        tasks = [asyncio.create_task(collect(answer, request())) for _ in range(6)]
        await until(answer, lambda stats: stats.running > 0)
        for task in tasks[1:]:
            task.cancel()
        assert (await tasks[0])[-1].finish_reason == "length"
        await asyncio.gather(*tasks[1:], return_exceptions=True)
        await idle(answer)


async def test_many_at_once_all_complete(tiny_model):
    """Twenty simultaneous requests, more than run at once, give the same complete answer each."""
    sampling = Sampling(temperature=0, max_tokens=20, ignore_eos=True)
    async with serving_tiny(tiny_model) as answer:
        answers = await asyncio.gather(*(collect(answer, request(sampling=sampling)) for _ in range(20)))
    assert len({"".join(delta.text for delta in deltas) for deltas in answers}) == 1
    assert all(deltas[-1].usage.completion_tokens == 20 for deltas in answers)


async def test_what_cannot_be_served_is_refused_by_name(tiny_model):
    """Over-long prompts (also absurdly long ones, untokenised) and outputs are typed errors with their numbers."""
    async with serving_tiny(tiny_model) as answer:
        for prompt, sampling, numbers in (
            ("x" * 250, LONG, "250 tokens"),
            ("x" * 10_000_000, LONG, "at least"),
            ("x" * 100, LONG, "make 300"),
        ):
            with pytest.raises(ContextTooLong, match=numbers):
                await collect(answer, request(prompt, sampling))
        assert len(await collect(answer, request(sampling=Sampling(max_tokens=3)))) > 0


async def test_a_full_queue_refuses_and_keeps_serving(tiny_model):
    """Beyond the bounds on running and waiting requests, new ones get Overloaded; those within complete."""
    async with serving_tiny(tiny_model, max_num_seqs=1, max_waiting=2) as answer:
        results = await asyncio.gather(*(collect(answer, request()) for _ in range(12)), return_exceptions=True)
    refused = [result for result in results if isinstance(result, Overloaded)]
    complete = [result for result in results if isinstance(result, list)]
    assert len(refused) + len(complete) == 12
    assert refused
    assert complete
    assert all(error.retryable and error.retry_after for error in refused)


async def test_one_tenant_cannot_fill_the_way_in(tiny_model, monkeypatch):
    """While the tokenizer is held up one tenant's prompts fill the queue before it: another still gets its part."""
    release = threading.Event()
    async with serving_tiny(tiny_model, max_waiting=4) as answer:
        encode = answer._tokenizer.encode
        monkeypatch.setattr(answer._tokenizer, "encode", lambda text: (release.wait(HANG_S), encode(text))[1])
        short = request(sampling=Sampling(temperature=0, max_tokens=2, ignore_eos=True))

        async def one(tenant: str) -> str:
            try:
                async with aclosing(answer.answer(short, salt=tenant)) as deltas:
                    return [delta async for delta in deltas][-1].finish_reason
            except Overloaded:
                return "overloaded"

        flood = [asyncio.create_task(one("flood")) for _ in range(10)]
        await asyncio.sleep(0)
        other = [asyncio.create_task(one("other")) for _ in range(3)]
        await asyncio.sleep(0)
        release.set()
        assert Counter(await asyncio.gather(*flood)) == {"length": 4, "overloaded": 6}
        assert Counter(await asyncio.gather(*other)) == {"length": 2, "overloaded": 1}


async def test_an_engine_that_fails_leaves_nobody_waiting(tiny_model, monkeypatch):
    """A fault in a step ends every live request with UpstreamFailed, and every later one."""
    async with serving_tiny(tiny_model, max_num_seqs=1) as answer:
        live = [answer.answer(request()) for _ in range(3)]
        await anext(live[0])

        def broken(*args):
            raise RuntimeError("a fault with the prompt 'hello' in its text")

        monkeypatch.setattr(answer._engine.runner, "run", broken)
        for deltas in live:
            with pytest.raises(UpstreamFailed) as failed:
                async with asyncio.timeout(HANG_S):
                    async for _ in deltas:
                        pass
            assert "hello" not in str(failed.value)
        with pytest.raises(UpstreamFailed):
            await collect(answer, request())
        assert isinstance(answer.failure, UpstreamFailed)


async def test_unusable_logits_end_one_request(tiny_model, monkeypatch):
    """A request whose logits are NaN ends with Internal; the engine serves the next one."""
    async with serving_tiny(tiny_model) as answer:
        run = answer._engine.runner.run
        monkeypatch.setattr(answer._engine.runner, "run", lambda work: run(work) * float("nan"))
        with pytest.raises(Internal):
            await collect(answer, request())
        monkeypatch.undo()
        assert (await collect(answer, request()))[-1].finish_reason == "length"


async def test_closing_ends_live_requests_and_threads(tiny_model):
    """After `aclose` live requests have ended with Overloaded, later ones get it too, and no thread is left."""
    before = set(threading.enumerate())
    async with serving_tiny(tiny_model) as answer:
        deltas = answer.answer(request())
        await anext(deltas)
        await answer.aclose()
        with pytest.raises(Overloaded):
            async with asyncio.timeout(HANG_S):
                async for _ in deltas:
                    pass
        with pytest.raises(Overloaded):
            await collect(answer, request())
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("engine")]


async def test_a_template_that_does_not_end_times_out(tiny_model, monkeypatch):
    """Tokenising has a deadline; the loop stays free meanwhile and later requests are served."""
    async with serving_tiny(tiny_model) as answer:
        release = threading.Event()
        monkeypatch.setattr(serving, "ENCODE_TIMEOUT_S", 0.05)
        monkeypatch.setattr(answer, "_tokens", lambda asked: release.wait(HANG_S))
        with pytest.raises(DeadlineExceeded):
            await collect(answer, request())
        release.set()
        monkeypatch.undo()
        assert (await collect(answer, request()))[-1].finish_reason == "length"


async def test_a_model_without_a_template_refuses_messages(tiny_model, monkeypatch):
    """Messages need a template; the refusal names the field."""
    async with serving_tiny(tiny_model) as answer:
        monkeypatch.setattr(answer._tokenizer._inner, "chat_template", None)
        with pytest.raises(BadRequest) as refused:
            await collect(answer, request(prompt=None, messages=(Message(role="user", content="hi"),)))
        assert refused.value.param == "messages"


async def test_the_card_says_what_is_served(tiny_model):
    """Name and context length, the configured one or what model and pool allow."""
    async with serving_tiny(tiny_model) as answer:
        assert (answer.model_card().id, answer.model_card().context_length) == ("tiny", 250)
    assert load_engine(tiny_model).model_card().context_length == tiny_llama.CONTEXT
    assert Tokenizer(tiny_model).stop_ids == {0, 2}


async def test_a_deadline_ends_a_request_before_and_after_its_first_token(tiny_model):
    """By the engine's clock: one that runs ends after some tokens, one that waits before its first; others go on."""
    async with serving_tiny(tiny_model, max_num_seqs=1) as answer:
        answer._engine.clock = map(float, itertools.count()).__next__
        running = asyncio.create_task(outcome(answer, request(deadline_s=200.0)))
        await until(answer, lambda stats: stats.generated_tokens > 0)
        waiting = asyncio.create_task(outcome(answer, request(deadline_s=30.0)))
        (text, error), (nothing, late) = await running, await waiting
        assert text
        assert not nothing
        assert (error.code, late.code) == ("deadline_exceeded",) * 2
        assert "after the first token" in str(error)
        short = Sampling(temperature=0, max_tokens=3, ignore_eos=True)
        assert (await collect(answer, request(sampling=short)))[-1].finish_reason == "length"
        await idle(answer)
        assert answer.stats().expired == 2


async def outcome(answer: EngineAnswer, asked: ChatRequest):
    text = ""
    try:
        async for delta in answer.answer(asked):
            text += delta.text
    except CausewayError as error:
        return text, error
    return text, None


async def test_priority_deadline_and_tenant_reach_the_engine(tiny_model, monkeypatch):
    """What a request says of how it wants to be served is what the scheduler goes by."""
    async with serving_tiny(tiny_model) as answer:
        seen = []
        add = answer._engine.scheduler.add
        monkeypatch.setattr(answer._engine.scheduler, "add", lambda one, now: (seen.append((one, now)), add(one, now)))
        answer._engine.clock = lambda: 100.0
        short = Sampling(temperature=0, max_tokens=2, ignore_eos=True)
        asked = request(sampling=short, priority="batch", deadline_s=7.0)
        async with aclosing(answer.answer(asked, salt="acme")) as deltas:
            assert [delta async for delta in deltas][-1].finish_reason == "length"
        ((sequence, now),) = seen
        assert (sequence.priority, sequence.tenant, sequence.deadline, now) == ("batch", "acme", 107.0, 100.0)
