"""The two sides of an edge daemon, scripted: what its tests put where llama.cpp and the link would be."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

from fakes import EchoAnswer, ScriptedAnswer

from edge_agent.backends.base import Loaded
from edge_agent.cache.answers import AnswerCache
from edge_agent.daemon import Daemon, put_together
from edge_agent.policies.center import PolicyCenter
from router.features import UNTROUBLED, Trouble
from shared.errors import CausewayError, UnknownModel
from shared.schemas import Answer, ChatRequest, Delta, Message, ModelCard, Usage

LAST = Delta(finish_reason="stop", usage=Usage(prompt_tokens=3, completion_tokens=2))
HERE = (Delta(text="from ", tokens=1), Delta(text="here", tokens=1), LAST)
THERE = (Delta(text="from ", tokens=1), Delta(text="there", tokens=1), LAST)

Script = Delta | Exception | asyncio.Event | float


@dataclass
class Runtime:
    available: bool = True
    queue_depth: int = 0
    queue_capacity: int = 16
    running: int = 0
    slots: int = 4
    tokens_per_s: float | None = None
    prefill_tokens_per_s: float | None = None
    restarts: int = 0
    quarantined: int = 0


@dataclass
class Link:
    connected: bool = True
    draining: bool = False
    retry_after_s: float | None = None
    round_trip_s: float | None = 0.01
    trouble: Trouble = UNTROUBLED
    model: str | None = "large"
    context_length: int | None = 8192


class Local:
    """A LocalBackend over any Answer. `tokens` is what count_tokens says, or raises."""

    def __init__(self, inner: Answer, tokens: int | Exception = 5, context: int = 2048) -> None:
        self.inner = inner
        self.tokens = tokens
        self.runtime = Runtime()
        self.card = ModelCard(id="small", context_length=context)
        self.counted = 0
        self.closed = False

    def answer(self, request: ChatRequest) -> AsyncGenerator[Delta, None]:
        return self.inner.answer(request)

    async def count_tokens(self, request: ChatRequest) -> int:
        self.counted += 1
        if isinstance(self.tokens, Exception):
            raise self.tokens
        return self.tokens

    def reading(self) -> Runtime:
        return self.runtime

    def model_card(self) -> ModelCard:
        return self.card

    async def aclose(self) -> None:
        self.closed = True

    @property
    def store(self) -> Path:
        return Path("/nowhere")

    def named(self, model: str) -> "Local":
        return self

    def model_cards(self) -> tuple[ModelCard, ...]:
        return (self.card,)

    def taken(self) -> int | None:
        return None

    def loaded(self) -> list[Loaded]:
        card, file = self.card, Path("/nowhere/small.gguf")
        return [
            Loaded(card.id, file, "loaded", 2, 1, card.context_length, self.runtime.running, "cpu", None, None, True)
        ]

    async def load(self, name: str) -> None:
        raise UnknownModel(f"{name} is not on this device")

    async def stop(self, name: str) -> bool:
        raise UnknownModel(f"{name} is not loaded")

    def keep(self, name: str, seconds: float | None) -> None:
        pass


class Remote:
    """A RemoteBackend over any Answer. `seen` are the requests that left the device."""

    def __init__(self, inner: Answer) -> None:
        self.inner = inner
        self.state = Link()
        self.seen: list[ChatRequest] = []
        self.closed = False

    def answer(self, request: ChatRequest) -> AsyncGenerator[Delta, None]:
        self.seen.append(request)
        return self.inner.answer(request)

    def link(self) -> Link:
        return self.state

    async def aclose(self) -> None:
        self.closed = True


class Turns:
    """An Answer that plays one script a request, the last one for ever."""

    def __init__(self, *scripts: tuple[Script, ...]) -> None:
        self.scripts = [ScriptedAnswer(*script) for script in scripts]
        self.begun = 0

    def answer(self, request: ChatRequest) -> AsyncGenerator[Delta, None]:
        script = self.scripts[min(self.begun, len(self.scripts) - 1)]
        self.begun += 1
        return script.answer(request)


def policy_file(folder: Path, text: str) -> PolicyCenter:
    path = folder / "policy.yaml"
    path.write_text(text, "utf-8")
    return PolicyCenter(path, None)


def daemon_over(
    local: Answer | None, cloud: Answer | None, policy: PolicyCenter, cache: AnswerCache | None = None
) -> Daemon:
    """A whole daemon; its sides are `daemon.local` and, where there is one, the Remote that was given."""
    side = local if isinstance(local, Local) else Local(local or EchoAnswer())
    remote = cloud if isinstance(cloud, Remote) or cloud is None else Remote(cloud)
    return put_together(side, remote, policy, cache=cache)


def ask(content: str = "Hello there", *, id: str = "r1", model: str = "auto", label: str = "free") -> ChatRequest:  # noqa: A002
    message = Message(role="user", content=content)
    return ChatRequest(id=id, model=model, messages=(message,), label=label)  # type: ignore[arg-type]


async def collect(answer: Answer, request: ChatRequest) -> tuple[list[Delta], CausewayError | None]:
    """All deltas, and the error that ended them if one did."""
    deltas: list[Delta] = []
    try:
        async for delta in answer.answer(request):
            deltas.append(delta)  # noqa: PERF401  what came before an error counts
    except CausewayError as error:
        return deltas, error
    return deltas, None
