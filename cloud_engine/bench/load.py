"""Load on any OpenAI-compatible server, over real streaming HTTP, and what each client saw of it.

Open loop: requests are due at times that were drawn beforehand (Poisson), whether or not earlier ones were answered,
and every time counts from when a request was due, not from when it was sent: a server that stalls cannot keep its
clients from asking, so nothing of the wait is left out (coordinated omission). Closed loop: n clients, each asking
anew once it was answered. Bytes are stamped as they come and read when all is over, since the reader runs on the
machine that is measured.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Annotated, Any

import httpx
import msgspec

from cloud_engine.bench.figures import Row, milliseconds
from cloud_engine.gateway.completions import DONE
from cloud_engine.gateway.events import EventStream
from shared.errors import UpstreamFailed

Clock = Callable[[], float]
MAX_REPLY = 16 << 20
"""Bytes of one answer."""

WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they "
    "which one you were all her she there would their we him been has when who will no more if out so up said "
    "what its about than into them can only other time new some could these two may first then do any like my now "
    "over such our man me even most made after also did many off before must well back through years where much "
    "your way down should because long each just state people those too how little good world make very year "
    "still see work life being day men here"
)
"""English words that most vocabularies hold whole: about one token each."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: its body, and how many tokens an answer has that is whole."""

    body: bytes
    output: int


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go. `path` is `completions` or `chat/completions`."""

    base_url: str
    model: str
    key: str = ""
    path: str = "completions"
    timeout_s: float = 600.0

    def ask(self, words: int, output: int, rng: random.Random) -> Ask:
        """A prompt of this many random words (tokens, nearly): no prefix of it is in a cache."""
        text = " ".join(rng.choices(WORDS.split(), k=words))
        content = {"prompt": text} if self.path == "completions" else {"messages": [{"role": "user", "content": text}]}
        fixed = {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        return Ask(msgspec.json.encode({"model": self.model, "max_tokens": output, **content, **fixed}), output)


@dataclass(slots=True)
class Reply:
    """What came of one request. Seconds count from when it was due; `late_s` is how long after that it was sent."""

    late_s: float = 0.0
    end_s: float = 0.0
    status: int = 0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    broken: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply that was read: when each piece of text came, and `error` unless it is whole."""

    texts: list[float]
    end_s: float
    prompt_tokens: int
    output_tokens: int
    error: str | None

    def is_good(self, ttft_s: float, itl_s: float) -> bool:
        """Whole, its first token in time, and its mean gap between tokens within the limit."""
        if self.error is not None or self.texts[0] > ttft_s:
            return False
        return (self.texts[-1] - self.texts[0]) / max(1, self.output_tokens - 1) <= itl_s


@dataclass(frozen=True, slots=True)
class Objective:
    """What a user is content with, in seconds."""

    ttft_s: float = 1.0
    itl_s: float = 0.1


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """Seconds from the start at which `count` requests are due, `rate` a second on average."""
    rng = random.Random(seed)  # noqa: S311 - not a secret
    return list(accumulate((rng.expovariate(rate) for _ in range(count - 1)), initial=0.0))


async def open_loop(
    target: Target, asks: Sequence[Ask], due: Sequence[float], clock: Clock = time.perf_counter
) -> tuple[list[Reply], float]:
    """Send each request when it is due. Replies, and the seconds until the last was over."""
    async with _client(target) as client, asyncio.TaskGroup() as group:
        start, tasks = clock(), []
        for ask, at in zip(asks, due, strict=True):
            await asyncio.sleep(start + at - clock())
            tasks.append(group.create_task(_send(client, target, ask, start + at, clock)))
    return [task.result() for task in tasks], clock() - start


async def closed_loop(
    target: Target, asks: Sequence[Ask], clients: int, clock: Clock = time.perf_counter
) -> tuple[list[Reply], float]:
    """`clients` of them, each asking the next thing as soon as it was answered."""
    replies, left = [Reply() for _ in asks], iter(enumerate(asks))

    async def one(client: httpx.AsyncClient) -> None:
        for at, ask in left:
            replies[at] = await _send(client, target, ask, clock(), clock)

    async with _client(target) as client:
        start = clock()
        await asyncio.gather(*(one(client) for _ in range(clients)))
    return replies, clock() - start


def _client(target: Target) -> httpx.AsyncClient:
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {target.key}"} if target.key else {})
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(headers=headers, timeout=None, limits=limits, trust_env=False)  # noqa: S113 - see _send


async def _send(client: httpx.AsyncClient, target: Target, ask: Ask, due: float, clock: Clock) -> Reply:
    reply, size = Reply(late_s=clock() - due), 0
    try:
        async with (
            asyncio.timeout(target.timeout_s),
            client.stream("POST", f"{target.base_url}/{target.path}", content=ask.body) as stream,
        ):
            reply.status = stream.status_code
            async for piece in stream.aiter_raw():
                reply.pieces.append((clock() - due, piece))
                if (size := size + len(piece)) > MAX_REPLY:
                    reply.broken = "too_long"
                    break
    except TimeoutError:
        reply.broken = "timeout"
    except httpx.HTTPError as error:
        reply.broken = type(error).__name__
    reply.end_s = clock() - due
    return reply


# What was received


class _Text(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Text | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: Annotated[int, msgspec.Meta(ge=0)]
    completion_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


def read(reply: Reply, output: int) -> Answer:
    """An answer is whole if it ended as a stream does and has `output` tokens by its own usage."""
    texts: list[float] = []
    usage, error, done = _Usage(0), reply.broken, False
    if reply.status not in (0, 200):
        error = error or f"http_{reply.status}"
    for at, event in _events(reply) if error is None else ():
        if event == DONE:
            done = True
            break
        try:
            chunk = msgspec.json.decode(event, type=_Chunk)
        except (ValueError, RecursionError):
            chunk = _Chunk(error="no chunk")
        if chunk.error is not None:
            error = "error_event"
            break
        usage = chunk.usage or usage
        if any(choice.text or (choice.delta and choice.delta.content) for choice in chunk.choices):
            texts.append(at)
    if error is None and not (done and texts):
        error = "no_end"
    if error is None and usage.completion_tokens != output:
        error = "other_length"
    return Answer(texts, reply.end_s, usage.prompt_tokens, usage.completion_tokens, error)


def _events(reply: Reply) -> Iterator[tuple[float, bytes]]:
    stream = EventStream()
    with suppress(UpstreamFailed):  # an event without an end: then the answer has none either
        for at, piece in reply.pieces:
            for event in stream.feed(piece):
                yield at, event.strip()


def summary(replies: Sequence[Reply], outputs: Sequence[int], wall_s: float, objective: Objective) -> Row:
    """Latencies are those of whole answers; errors are counted by kind; goodput is good answers a second."""
    answers = [read(reply, output) for reply, output in zip(replies, outputs, strict=True)]
    whole = [answer for answer in answers if answer.error is None]
    good = sum(answer.is_good(objective.ttft_s, objective.itl_s) for answer in answers)
    gaps = [after - before for answer in whole for before, after in pairwise(answer.texts)]
    return {
        "requests": len(answers),
        "ok": len(whole),
        "errors": dict(Counter(answer.error for answer in answers if answer.error is not None)),
        "wall_s": round(wall_s, 3),
        "req_s": round(len(whole) / wall_s, 3),
        "out_tok_s": round(sum(answer.output_tokens for answer in whole) / wall_s, 1),
        "good": good,
        "goodput_req_s": round(good / wall_s, 3),
        **milliseconds("ttft", [answer.texts[0] for answer in whole]),
        **milliseconds("itl", gaps),
        **milliseconds("e2e", [answer.end_s for answer in whole]),
        "late_ms_max": round(max(reply.late_s for reply in replies) * 1e3, 2),
        "prompt_tokens": sum(answer.prompt_tokens for answer in whole),
        "output_tokens": sum(answer.output_tokens for answer in whole),
    }
