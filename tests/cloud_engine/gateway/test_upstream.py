import asyncio
import contextlib
import gc
from contextlib import aclosing

import msgspec
import pytest
from fakes import EchoAnswer, ScriptedAnswer
from stand_ins import (
    FAULTS,
    FINISH,
    HEAD,
    KEY,
    LAST,
    ONE,
    PIECE,
    Faulty,
    chunked,
    collect,
    events,
    faulty,
    http,
    opened,
    real,
    request,
)
from waiting import HANG_S, until

from cloud_engine.gateway.upstream import Timeouts, Upstream
from shared.config import InvalidSettings
from shared.errors import (
    BadRequest,
    CausewayError,
    ContextTooLong,
    Overloaded,
    PolicyDenied,
    RateLimited,
    Unreachable,
    UpstreamFailed,
)
from shared.schemas import ChatRequest, Delta, Message, ModelCard, Sampling, Usage

QUICK = Timeouts(60, 0.3, 60)


async def failed(upstream: Upstream, one: ChatRequest | None = None) -> CausewayError:
    """The error of a request that has one; nothing of it may stay behind, or tell of the key."""
    with pytest.raises(CausewayError) as caught:
        await collect(upstream, one or request())
    assert upstream.stats().running == upstream.stats().waiting == 0
    assert KEY not in f"{caught.value!r}{caught.value.__cause__!r}"
    assert caught.value.source == "cloud"
    return caught.value


class TestRealServer:
    async def test_an_answer_comes_through(self) -> None:
        """Text, tokens, the end and the upstream's own usage; chat and completion alike."""
        async with real(EchoAnswer("cloud")) as upstream:
            for one in (request("a b c", max_tokens=2), ChatRequest(id="r", model="x", prompt="a b c",
                                                                    sampling=Sampling(max_tokens=2))):  # fmt: skip
                got = await collect(upstream, one)
                assert [delta.text for delta in got] == ["a ", "b ", ""]
                assert [delta.tokens for delta in got] == [1, 1, 0]
                last = Delta(finish_reason="length", usage=Usage(prompt_tokens=3, completion_tokens=2))
                assert got[-1] == last
            assert upstream.stats().generated_tokens == 4

    async def test_every_field_arrives(self) -> None:
        """What one Causeway is asked is what the next one reads: sampling, messages, all but id, model and label."""
        inner = EchoAnswer("cloud")
        sampling = Sampling(temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, presence_penalty=1.0, frequency_penalty=1.0,
                            repetition_penalty=1.1, seed=-7, max_tokens=3, stop=("x", "y"), logprobs=2,
                            ignore_eos=True)  # fmt: skip
        messages = (Message(role="system", content="é ✓"), Message(role="user", content="hello", name="bo"))
        async with real(inner) as upstream:
            await collect(upstream, ChatRequest(id="r", model="auto", messages=messages, sampling=sampling))
            await collect(upstream, ChatRequest(id="r", model="auto", prompt="hello", sampling=sampling))
        assert [one.sampling for one in inner.requests] == [sampling, sampling]
        assert inner.requests[0].messages == messages
        assert inner.requests[1].prompt == "hello"
        assert {one.model for one in inner.requests} == {"real"}

    async def test_logprobs_come_through(self) -> None:
        """Token for token what the upstream's Answer said; completions have no bytes of their own."""
        inner = EchoAnswer("cloud")
        async with real(inner) as upstream:
            chat = request("é b", logprobs=2)
            said = [delta.logprobs for delta in await collect(inner, chat)]
            assert [delta.logprobs for delta in await collect(upstream, chat)] == said
            prompt = ChatRequest(id="r", model="x", prompt="é b", sampling=Sampling(logprobs=2))
            got = [token for delta in await collect(upstream, prompt) for token in delta.logprobs]
        assert [(token.token, token.logprob, [top.token for top in token.top]) for token in got] == [
            ("é ", -0.5, ["alt0", "alt1"]),
            ("b ", -0.5, ["alt0", "alt1"]),
        ]

    async def test_a_connection_is_used_again(self) -> None:
        """An answer read to its end leaves its connection to the next request; no two ever share one."""
        async with real(EchoAnswer("cloud")) as upstream:
            for _ in range(3):
                await collect(upstream, request())
            assert len(upstream._idle) == 1
            await asyncio.gather(*(collect(upstream, request()) for _ in range(20)))
            assert len(upstream._idle) == 20

    @pytest.mark.parametrize("stage", ["waiting", "running"])
    async def test_a_cancel_is_seen_at_the_upstream(self, stage: str) -> None:
        """Closed before or after the first token, the upstream computes no more."""
        never = asyncio.Event()
        inner = ScriptedAnswer(never) if stage == "waiting" else ScriptedAnswer(ONE, never)
        async with real(inner) as upstream:
            begun = asyncio.Event()
            task = asyncio.create_task(collect(upstream, request(), begun))
            await (inner.begun if stage == "waiting" else begun).wait()
            assert getattr(upstream.stats(), stage) == 1
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            async with asyncio.timeout(HANG_S):
                await inner.idle()
            assert upstream.stats().running == upstream.stats().waiting == 0

    async def test_a_generator_closed_early_is_a_cancel_too(self) -> None:
        """Leaving the loop after one delta."""
        inner = ScriptedAnswer(ONE, asyncio.Event())
        async with real(inner) as upstream:
            async with aclosing(upstream.answer(request())) as deltas:
                assert (await anext(deltas)).text == "one"
            async with asyncio.timeout(HANG_S):
                await inner.idle()

    async def test_200_cancels_at_any_moment_lose_nothing(self) -> None:
        """Cancelled while connecting, sending, waiting, reading or not at all: every place is free again."""
        inner = ScriptedAnswer(ONE, 0.0, ONE, 0.0, ONE, LAST)
        async with real(inner, concurrent=4) as upstream:
            await collect(upstream, request())
            before = len(asyncio.all_tasks())
            for at in range(200):
                task = asyncio.create_task(collect(upstream, request()))
                for _ in range(at % 50):
                    await asyncio.sleep(0)
                await asyncio.sleep(at % 7 / 1000)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            assert upstream.stats().running == upstream.stats().waiting == 0
            assert len(inner.requests) > 1  # not all were cancelled before they arrived
            async with asyncio.timeout(HANG_S):
                await inner.idle()
                results = await asyncio.gather(*(collect(upstream, request()) for _ in range(4)))
            assert [result[-1] for result in results] == [LAST] * 4
            assert len(upstream._idle) <= 5
            gc.collect()
            await until(lambda: len(asyncio.all_tasks()) <= before + 5)

    @pytest.mark.parametrize(
        "error",
        [ContextTooLong("x", param="messages"), Overloaded("x", retry_after=3), RateLimited("x", retry_after=3)],
    )
    async def test_an_error_keeps_its_kind(self, error: CausewayError) -> None:
        """Before the first token by its status, after it by its event."""
        for script in ([error], [ONE, error]):
            async with real(ScriptedAnswer(*script)) as upstream:
                got = await failed(upstream)
                assert type(got) is type(error)
                assert got.retry_after == error.retry_after

    async def test_what_the_upstream_refuses_names_the_field(self) -> None:
        """A field that it does not know is the caller's bad request."""
        async with real(EchoAnswer("cloud"), cache_salt=True) as upstream:
            error = await failed(upstream)
        assert type(error) is BadRequest
        assert error.param == "cache_salt"

    async def test_more_than_the_most_at_once_is_overloaded(self) -> None:
        """And the place is free again afterwards."""
        gate = asyncio.Event()
        inner = ScriptedAnswer(ONE, gate, LAST)
        async with real(inner, concurrent=1) as upstream:
            first = asyncio.create_task(collect(upstream, request()))
            await inner.begun.wait()
            with pytest.raises(Overloaded):
                await collect(upstream, request())
            gate.set()
            await first
            await collect(upstream, request())

    async def test_closing_ends_what_runs(self) -> None:
        """With Overloaded, at once; whoever comes later is told the same; closing twice does no harm."""
        inner = ScriptedAnswer(ONE, asyncio.Event())
        async with real(inner) as upstream:
            begun = asyncio.Event()
            task = asyncio.create_task(collect(upstream, request(), begun))
            await begun.wait()
            await upstream.aclose()
            async with asyncio.timeout(HANG_S):
                with pytest.raises(Overloaded, match="stopping"):
                    await task
                await inner.idle()
            with pytest.raises(Overloaded):
                await collect(upstream, request())

    async def test_what_must_stay_on_a_device_goes_no_further(self) -> None:
        """A request labelled edge_only is refused before a connection is made."""
        inner = EchoAnswer("cloud")
        async with real(inner) as upstream:
            with pytest.raises(PolicyDenied):
                await collect(upstream, request(label="edge_only"))
        assert not inner.requests

    async def test_the_context_length_is_asked_for(self) -> None:
        """Started without one, the upstream's own is taken; a length that was given stays."""
        for given, known in ((0, 2048), (100, 100)):
            async with real(EchoAnswer("cloud"), context_length=given) as upstream:
                await upstream.start()
                assert upstream.model_card() == ModelCard(id="real", context_length=known)
                assert upstream.failure is None


class TestFaultyServer:
    async def test_nobody_there_is_unreachable(self) -> None:
        """Refused at once; retryable, so that a fallback may answer."""
        server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        async with opened(port) as upstream:
            error = await failed(upstream)
            assert type(error) is Unreachable
            assert error.retryable

    @pytest.mark.parametrize(("reply", "code"), FAULTS.values(), ids=FAULTS)
    async def test_whatever_it_answers_is_a_typed_error(self, reply: bytes, code: str) -> None:
        """At once, of the right kind, with nothing of what it wrote."""
        async with faulty(reply) as (upstream, _):
            error = await failed(upstream)
            assert error.code == code
            assert error.retry_after == (9.0 if code == "rate_limited" else None)
            assert not upstream._idle

    async def test_a_redirect_is_not_followed(self) -> None:
        """Neither the key nor the prompt goes where an upstream points to."""
        async with faulty(http(events(FINISH, "[DONE]"))) as (other, target):
            location = f"location: {other._base}/chat/completions"
            async with faulty(http(b"", "307 Temporary Redirect", "text/plain", location)) as (upstream, _):
                assert "redirects" in (await failed(upstream)).message
            assert not target.heads

    async def test_the_environment_is_not_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No proxy of the environment sees the key."""
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        async with faulty(http(events(PIECE, FINISH, "[DONE]"))) as (upstream, _):
            assert len(await collect(upstream, request())) == 2

    @pytest.mark.parametrize(
        "reply", [b"", HEAD, HEAD + chunked(b": still here\n\n")], ids=["head", "body", "comments"]
    )
    async def test_silence_before_the_first_token_has_an_end(self, reply: bytes) -> None:
        """And the connection is closed: the upstream need not go on."""
        async with faulty(reply, hang=True, timeouts=QUICK) as (upstream, stand_in):
            assert (await failed(upstream)).code == "deadline_exceeded"
            async with asyncio.timeout(HANG_S):
                await stand_in.left.wait()

    async def test_comments_do_not_put_off_the_first_token(self) -> None:
        """A server that only says it is still there is silent all the same."""
        async with faulty(HEAD, repeat=chunked(b": still here\n\n"), timeouts=QUICK) as (upstream, stand_in):
            assert (await failed(upstream)).code == "deadline_exceeded"
            async with asyncio.timeout(HANG_S):
                await stand_in.left.wait()

    async def test_a_deadline_ends_an_answer_that_goes_on(self) -> None:
        """However steadily the upstream sends, the request's own deadline holds."""
        begun = asyncio.Event()
        endless = chunked(events(PIECE))
        async with faulty(HEAD + endless, repeat=endless) as (upstream, stand_in):
            with pytest.raises(CausewayError) as caught:
                await collect(upstream, msgspec.structs.replace(request(), deadline_s=2.0), begun)
            assert caught.value.code == "deadline_exceeded"
            assert begun.is_set()
            async with asyncio.timeout(HANG_S):
                await stand_in.left.wait()

    async def test_silence_after_it_has_an_end_too(self) -> None:
        """What came before was delivered."""
        begun = asyncio.Event()
        quick = Timeouts(60, 60, 0.3)
        async with faulty(HEAD + chunked(events(PIECE)), hang=True, timeouts=quick) as (upstream, stand_in):
            with pytest.raises(CausewayError) as caught:
                await collect(upstream, request(), begun)
            assert caught.value.code == "deadline_exceeded"
            assert begun.is_set()
            async with asyncio.timeout(HANG_S):
                await stand_in.left.wait()

    async def test_no_usage_is_counted(self) -> None:
        """A server without usage: the deltas are, and a prompt of 5 characters is one token."""
        async with faulty(http(events(PIECE, PIECE, FINISH, "[DONE]"))) as (upstream, _):
            got = await collect(upstream, request())
        assert got[-1].usage == Usage(prompt_tokens=1, completion_tokens=2)

    async def test_a_stream_that_does_not_end_after_its_end_is_left(self) -> None:
        """The answer is whole at [DONE]; the connection is not kept."""
        async with faulty(HEAD + chunked(events(PIECE, FINISH, "[DONE]")), hang=True) as (upstream, stand_in):
            assert len(await collect(upstream, request())) == 2
            assert not upstream._idle
            async with asyncio.timeout(HANG_S):
                await stand_in.left.wait()


class TestHealth:
    async def test_failure_follows_the_upstream(self) -> None:
        """Down, then up: seen without a request."""
        stand_in = Faulty(http(b"no", "500 Internal Server Error"))
        server = await asyncio.start_server(stand_in, "127.0.0.1", 0)
        async with opened(server.sockets[0].getsockname()[1], probe_s=0.02) as upstream:
            await upstream.start()
            assert isinstance(upstream.failure, UpstreamFailed)
            stand_in.reply = http(b'{"data": []}', kind="application/json")
            async with asyncio.timeout(HANG_S):
                while upstream.failure is not None:  # noqa: ASYNC110  it has nothing to wait on
                    await asyncio.sleep(0.01)
        server.close()
        await server.wait_closed()

    @pytest.mark.parametrize(
        ("reply", "reason"),
        [
            (b"", "broke"),
            (http(b"", "401 Unauthorized"), "key"),
            (http(b"<html>", kind="text/html"), "context length"),
            (http(b'{"data": [{"id": "a"}, {"id": "b", "context_length": 9}]}'), "context length"),
        ],
    )
    async def test_an_unknown_context_length_stops_the_start(self, reply: bytes, reason: str) -> None:
        """Saying why, and what to set."""
        async with faulty(reply, context_length=0) as (upstream, _):
            with pytest.raises(InvalidSettings, match=rf"{reason}.*model_len"):
                await upstream.start()

    async def test_vllms_name_for_the_length_is_known(self) -> None:
        """And a server with one model has the one we mean."""
        body = b'{"object": "list", "data": [{"id": "/models/x", "max_model_len": 4096}]}'
        async with faulty(http(body, kind="application/json"), context_length=0) as (upstream, _):
            await upstream.start()
            assert upstream.model_card().context_length == 4096
