"""The local model in its process, the real one: many at once, cancelled at will, refused by name; and when it dies."""

import asyncio
import math
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import pytest_asyncio
from fakes import text_of
from waiting import HANG_S, until

from edge_agent.backends import llama
from edge_agent.backends.keeper import KeeperRules
from edge_agent.backends.llama import LlamaBackend
from shared.errors import (
    BadRequest,
    CausewayError,
    ContextTooLong,
    DeadlineExceeded,
    Overloaded,
    Quarantined,
    UpstreamFailed,
)
from shared.gguf import ModelInvalid
from shared.schemas import ChatRequest, Delta, Message, Sampling

pytestmark = [pytest.mark.model, pytest.mark.asyncio(loop_scope="module")]


def ask(content: str, **sampling: Any) -> ChatRequest:
    fields = {"temperature": 0.0, "max_tokens": 12} | sampling
    return ChatRequest(
        id="r", model="edge", messages=(Message(role="user", content=content),), sampling=Sampling(**fields)
    )


async def answer(backend: LlamaBackend, request: ChatRequest) -> list[Delta]:
    async with asyncio.timeout(HANG_S):
        return [delta async for delta in backend.answer(request)]


def process_of(backend: LlamaBackend) -> psutil.Process:
    pid = backend._keeper.pid
    assert pid is not None
    return psutil.Process(pid)


def computed(backend: LlamaBackend) -> float:
    """Seconds of processor time that the model's process has used."""
    used = process_of(backend).cpu_times()
    return float(used.user + used.system)


async def until_idle(backend: LlamaBackend) -> None:
    await until(lambda: not (backend.reading().running or backend.reading().queue_depth))


@asynccontextmanager
async def started(path: Path, **options: Any) -> AsyncIterator[LlamaBackend]:
    backend = LlamaBackend(path, **options)
    try:
        await backend.start()
        yield backend
    finally:
        await backend.aclose()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def backend(model_path: Path) -> AsyncIterator[LlamaBackend]:
    """Eight slots, as by default; smaller contexts, to start sooner."""
    async with started(model_path, context=512) as backend:
        yield backend


@pytest_asyncio.fixture(loop_scope="module")
async def narrow(model_path: Path) -> AsyncIterator[LlamaBackend]:
    """One slot, one place in the queue; each test has its own, since some break it."""
    async with started(model_path, slots=1, queue=1, context=256) as backend:
        yield backend


async def test_twenty_at_once_all_get_complete_answers(backend: LlamaBackend) -> None:
    """More than there are slots: each ends once, with its reason and a usage that agrees with its deltas."""
    answers = await asyncio.gather(*(answer(backend, ask(f"Count from {n}.", max_tokens=10)) for n in range(20)))

    for deltas in answers:
        last = deltas[-1]
        assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
        assert last.finish_reason in ("stop", "length")
        assert last.usage is not None
        assert last.usage.completion_tokens == sum(delta.tokens for delta in deltas) <= 10
        assert text_of(deltas)
    assert backend.reading().tokens_per_s is not None
    await until_idle(backend)


async def test_greedy_is_deterministic_alone(backend: LlamaBackend) -> None:
    """The second time from a prefix already computed, which is said in the usage and changes nothing."""
    request = ask("Name three colours of the rainbow.", max_tokens=16)

    first, second = [await answer(backend, request) for _ in range(2)]

    assert text_of(first) == text_of(second)
    assert second[-1].usage is not None
    assert second[-1].usage.cached_tokens == second[-1].usage.prompt_tokens - 1


async def test_a_request_that_is_left_stops_costing_compute(backend: LlamaBackend) -> None:
    """Soon the model's process does nothing more, and until then it has not computed for as much as two seconds."""
    request = ask("Write a very long story.", max_tokens=400, ignore_eos=True)

    async with aclosing(backend.answer(request)) as deltas:
        await anext(deltas)
        assert backend.reading().running == 1
        before = computed(backend)
        await until(lambda: computed(backend) > before)
    left = used = computed(backend)
    await asyncio.sleep(0.3)
    while computed(backend) > used + 0.05:  # of signs of life there are always some
        used = computed(backend)
        assert used - left < 2
        await asyncio.sleep(0.3)
    again = await answer(backend, ask("Say yes.", max_tokens=1))

    assert again[-1].usage is not None


async def test_a_cancelled_task_leaves_the_queue_and_its_slot(backend: LlamaBackend) -> None:
    """Cancelled while a long prompt is read or while waiting: either is gone."""
    long = ask("word " * 400, max_tokens=100, ignore_eos=True)
    tasks = [asyncio.create_task(answer(backend, long)) for _ in range(12)]
    await until(lambda: backend.reading().running == 8)

    for task in tasks:
        task.cancel()
    await until_idle(backend)

    assert all(isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*tasks, return_exceptions=True))


async def test_a_full_queue_is_refused_at_once(narrow: LlamaBackend) -> None:
    """With the time to come back in; who waits is served when the slot is free."""
    async with aclosing(narrow.answer(ask("Count.", max_tokens=200, ignore_eos=True))) as running:
        await anext(running)
        waiting = asyncio.create_task(answer(narrow, ask("Say hello.", max_tokens=2)))
        await until(lambda: narrow.reading().queue_depth == 1)
        with pytest.raises(Overloaded) as raised:
            await answer(narrow, ask("Me too.", max_tokens=2))
    deltas = await waiting

    assert raised.value.retry_after is not None
    assert raised.value.source == "edge"
    assert deltas[-1].usage is not None


async def test_a_stop_string_ends_the_answer(backend: LlamaBackend) -> None:
    """The text is what it is without it, cut before the first place it occurs."""
    whole = text_of(await answer(backend, ask("Name three colours of the rainbow.", max_tokens=16)))
    stop = whole[len(whole) // 2 :][:4]

    deltas = await answer(backend, ask("Name three colours of the rainbow.", max_tokens=16, stop=(stop,)))

    assert text_of(deltas) == whole[: whole.index(stop)]
    assert deltas[-1].finish_reason == "stop"


async def test_a_seed_is_reproducible(backend: LlamaBackend) -> None:
    """The same seed twice, another seed, and no seed at all."""
    request = [ask("Invent a name.", temperature=1.5, seed=seed, max_tokens=10) for seed in (7, 7, 8, None, None)]

    texts = [text_of(await answer(backend, item)) for item in request]

    assert texts[0] == texts[1]
    assert len(set(texts)) == 4


async def test_log_probabilities_are_probabilities(backend: LlamaBackend) -> None:
    """Greedy picks the best of the top, and no top sums to more than one; one entry a token that is text."""
    deltas = await answer(backend, ask("Say hello.", max_tokens=6, logprobs=20))
    entries = [entry for delta in deltas for entry in delta.logprobs]

    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == text_of(deltas)
    for entry in entries:
        assert len(entry.top) == 20
        assert entry.logprob == entry.top[0].logprob <= 0
        assert 0 < sum(math.exp(rival.logprob) for rival in entry.top) <= 1 + 1e-6


async def test_a_prompt_that_does_not_fit_is_refused_by_name(narrow: LlamaBackend) -> None:
    """Numbers in the message, and nothing is cut; one that just fits is answered up to the end of the context."""
    tokens = await narrow.count_tokens(ask("word"))
    per_word = await narrow.count_tokens(ask("word word")) - tokens
    fits = ask(" ".join(["word"] * ((255 - tokens) // per_word + 1)), max_tokens=50, ignore_eos=True)
    count = await narrow.count_tokens(fits)

    deltas = await answer(narrow, fits)
    with pytest.raises(ContextTooLong, match=r"257 tokens.*256"):
        await answer(narrow, ask(" ".join(["word"] * (257 - tokens + 1)), max_tokens=1))
    with pytest.raises(ContextTooLong, match="at least"):
        await answer(narrow, ask("x" * 2_000_000))

    assert deltas[-1].finish_reason == "length"
    assert deltas[-1].usage is not None
    assert count + deltas[-1].usage.completion_tokens == 256


@pytest.mark.parametrize("text", ["a" * 40_000, "<|im_start|>" * 3_000, " " * 40_000, "\ud800é" * 10])
async def test_strange_prompts_cost_bounded_time(backend: LlamaBackend, text: str) -> None:
    """Tokenized or refused, but not thought about for ever."""
    with suppress(ContextTooLong, BadRequest):
        async with asyncio.timeout(HANG_S):
            assert await backend.count_tokens(ask(text)) > 0


async def test_a_raw_prompt_is_continued_without_a_template(backend: LlamaBackend) -> None:
    """What /v1/completions asks for: fewer tokens than the same text as a chat, and a continuation."""
    request = ChatRequest(
        id="r", model="edge", prompt="The capital of France is", sampling=Sampling(temperature=0, max_tokens=3)
    )

    assert await backend.count_tokens(request) == 5
    assert "Paris" in text_of(await answer(backend, request))


async def test_closing_ends_what_runs(model_path: Path) -> None:
    """With a typed error; afterwards it is refused; closing again is harmless."""
    async with started(model_path, slots=1, context=256) as backend:
        running = backend.answer(ask("Count.", max_tokens=200, ignore_eos=True))
        await anext(running)
        await backend.aclose()
        with pytest.raises(UpstreamFailed, match="closed"):
            async with asyncio.timeout(HANG_S):
                while True:
                    await anext(running)
        with pytest.raises(CausewayError):
            await answer(backend, ask("Hello?"))


async def test_a_file_that_is_no_model_is_refused_before_native_code(tmp_path: Path, model_path: Path) -> None:
    """Cut short, its tensors lie beyond its end: a typed error, and closing what never started is harmless."""
    broken = tmp_path / "broken.gguf"
    with model_path.open("rb") as whole:
        broken.write_bytes(whole.read(4_000_000))

    with pytest.raises(ModelInvalid, match="beyond the end"):
        async with started(broken):
            pass


async def test_the_card_and_the_reading(backend: LlamaBackend, model_path: Path) -> None:
    """What the router and the surfaces are told."""
    card, reading = backend.model_card(), backend.reading()

    assert card.context_length == reading.context_length == 512
    assert (reading.slots, reading.queue_capacity, reading.available) == (8, 64, True)
    assert reading.prefill_tokens_per_s is not None


async def test_who_runs_when_the_process_dies_gets_an_error_and_who_waits_an_answer(
    narrow: LlamaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, typed, to be tried again; the waiting one is answered by the next process."""
    monkeypatch.setattr(llama, "PATIENCE_S", HANG_S)  # however slowly this machine starts one
    async with aclosing(narrow.answer(ask("Count.", max_tokens=200, ignore_eos=True))) as running:
        await anext(running)
        waiting = asyncio.create_task(answer(narrow, ask("Say hello.", max_tokens=3)))
        await until(lambda: narrow.reading().queue_depth == 1)
        process_of(narrow).send_signal(signal.SIGSEGV)
        with pytest.raises(UpstreamFailed, match="SIGSEGV") as raised:
            async with asyncio.timeout(HANG_S):
                while True:
                    await anext(running)
        assert not narrow.reading().available
        with pytest.raises(Overloaded) as refused:
            await answer(narrow, ask("And me?"))
    deltas = await waiting

    assert (raised.value.source, raised.value.retryable) == ("edge", True)
    assert raised.value.retry_after is not None
    assert refused.value.retry_after is not None
    assert deltas[-1].usage is not None
    assert (narrow.reading().available, narrow.reading().restarts) == (True, 1)


async def test_a_request_that_was_there_at_two_deaths_is_refused(
    narrow: LlamaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under whatever id it comes back; who merely waited, or asks something else, is served."""
    monkeypatch.setattr(llama, "PATIENCE_S", HANG_S)
    poison = ask("Count.", max_tokens=200, ignore_eos=True)
    for number in range(2):
        async with aclosing(narrow.answer(msgspec.structs.replace(poison, id=f"try{number}"))) as running:
            await anext(running)
            waiting = asyncio.create_task(answer(narrow, ask("Say hello.", max_tokens=2)))
            await until(lambda: narrow.reading().queue_depth == 1)
            process_of(narrow).kill()
            with pytest.raises(UpstreamFailed):
                while True:
                    await anext(running)
        assert text_of(await waiting)

    with pytest.raises(Quarantined) as refused:
        await answer(narrow, msgspec.structs.replace(poison, id="try3"))
    with pytest.raises(Quarantined):
        await narrow.count_tokens(poison)
    assert not refused.value.retryable
    assert narrow.reading().quarantined == 1
    assert text_of(await answer(narrow, ask("Count!", max_tokens=2)))


async def test_who_waits_for_a_process_that_does_not_come_back_is_told_so(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before there is a process again, and when to come back; what is asked later is answered."""
    monkeypatch.setattr(llama, "PATIENCE_S", 0.2)
    rules = KeeperRules(first_delay_s=3.0)
    async with started(model_path, slots=1, context=256, rules=rules) as backend:
        running = asyncio.create_task(answer(backend, ask("Count.", max_tokens=200, ignore_eos=True)))
        await until(lambda: backend.reading().running == 1)
        waiting = asyncio.create_task(answer(backend, ask("Say hello.")))
        await until(lambda: backend.reading().queue_depth == 1)
        process_of(backend).kill()
        ends = await asyncio.gather(running, waiting, return_exceptions=True)
        assert not backend.reading().available
        await until(lambda: backend.reading().available)

        assert [type(end) for end in ends] == [UpstreamFailed, Overloaded]
        assert isinstance(ends[1], Overloaded)
        assert ends[1].retry_after is not None
        assert text_of(await answer(backend, ask("Say hello.", max_tokens=2)))


async def test_a_process_that_hangs_is_ended(model_path: Path) -> None:
    """It is asked for a sign of life while it works; without one its requests end with an error, and it is replaced."""
    rules = KeeperRules(beat_s=0.1, silent_s=3.0)
    async with started(model_path, slots=1, context=256, rules=rules) as backend:
        async with aclosing(backend.answer(ask("Count.", max_tokens=200, ignore_eos=True))) as running:
            await anext(running)
            hung = process_of(backend)
            hung.suspend()
            with pytest.raises(UpstreamFailed, match="no sign of life"):
                async with asyncio.timeout(HANG_S):
                    while True:
                        await anext(running)
        await until(lambda: backend.reading().available)

        assert not hung.is_running()
        assert text_of(await answer(backend, ask("Say hello.", max_tokens=2)))


async def test_closing_ends_the_process_also_while_it_restarts(model_path: Path) -> None:
    """Nothing is left running, whatever it was doing."""
    before = {child.pid for child in psutil.Process().children()}
    async with started(model_path, slots=1, context=256) as backend:
        first = process_of(backend)
        first.kill()
        await until(lambda: backend.reading().restarts == 1)
        await backend.aclose()

        assert not first.is_running()
        assert not {child.pid for child in psutil.Process().children()} - before


async def test_a_system_prompt_is_not_computed_again_not_even_after_a_restart(model_path: Path, tmp_path: Path) -> None:
    """The answers stay the same; the usage says what was found. Nothing of an edge-only request is on disk."""
    system = " ".join(f"Rule {number}: be kind." for number in range(20))
    requests = [raw(f"{system} Name a {name}.", label) for name, label in (("colour", "free"), ("secret", "edge_only"))]
    options: dict[str, Any] = {"slots": 1, "context": 256, "saved": tmp_path / "p", "saved_bytes": 1 << 26}
    told = []
    for _ in range(2):
        async with started(model_path, **options, prefix_bytes=1 << 26) as backend:
            told.append([await answer(backend, request) for request in requests])
    cached = [[deltas[-1].usage.cached_tokens for deltas in life if deltas[-1].usage] for life in told]

    assert [text_of(deltas) for deltas in told[0]] == [text_of(deltas) for deltas in told[1]]
    assert cached[0][0] == 0
    assert min(cached[0][1], *cached[1]) > 64
    async with started(model_path, **options) as backend:
        found = await answer(backend, raw(requests[1].prompt or "", "edge_only"))
    assert found[-1].usage is not None
    assert cached[0][1] <= found[-1].usage.cached_tokens < found[-1].usage.prompt_tokens - 1


def raw(prompt: str, label: Any) -> ChatRequest:
    return ChatRequest(id="r", model="edge", prompt=prompt, label=label, sampling=Sampling(temperature=0, max_tokens=6))


async def test_an_answer_goes_on_beyond_the_context_only_when_that_is_set(
    narrow: LlamaBackend, model_path: Path
) -> None:
    """By default it ends there and says `length`; with `context_shift` it has all its tokens."""
    cut = await answer(narrow, ask("Count for ever.", max_tokens=300, ignore_eos=True))
    async with started(model_path, slots=1, context=96, context_shift=True) as shifting:
        whole = await answer(shifting, ask("Count for ever.", max_tokens=120, ignore_eos=True))

    assert cut[-1].usage is not None
    assert whole[-1].usage is not None
    assert cut[-1].usage.prompt_tokens + cut[-1].usage.completion_tokens == 256
    assert whole[-1].usage.completion_tokens == 120
    assert cut[-1].finish_reason == whole[-1].finish_reason == "length"


async def test_a_deadline_ends_an_answer(backend: LlamaBackend) -> None:
    """What cannot be answered by then is an error that says so, and costs nothing more."""
    request = msgspec.structs.replace(ask("Write a long story.", max_tokens=400, ignore_eos=True), deadline_s=0.3)

    with pytest.raises(DeadlineExceeded) as raised:
        await answer(backend, request)

    assert raised.value.source == "edge"
    await until_idle(backend)


async def test_the_length_of_the_same_prompt_is_counted_once(
    narrow: LlamaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under another id too: the second time no process is asked."""
    first = await narrow.count_tokens(ask("counted once"))
    monkeypatch.setattr(narrow, "_ask", None)

    assert await narrow.count_tokens(msgspec.structs.replace(ask("counted once"), id="another")) == first
    with pytest.raises(TypeError):
        await narrow.count_tokens(ask("another"))
