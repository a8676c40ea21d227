import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from cache_parts import SCOPE, Clock, entry, greedy
from edge_sides import HERE, daemon_over, policy_file
from fakes import ScriptedAnswer
from serving import served

from edge_agent.api.openai import openai_app
from edge_agent.cache.answers import AnswerCache
from edge_agent.cache.base import Query, Scope
from edge_agent.cache.key import key_of
from edge_agent.cache.memory import MemoryLayer
from edge_agent.cache.semantic import DOUBT_S, PENDING, SemanticLayer
from edge_agent.cache.store import Store
from router.clauses import CacheRules, SemanticRules
from shared.errors import UnknownModel
from shared.guard import Guard
from shared.schemas import ChatRequest, Grammar, Message, ModelCard, Tool

ON = CacheRules(semantic=SemanticRules())
ASKED, AGAIN = "Why is the sky blue?", "Can you explain why the sky is blue?"


@dataclass
class Embedding:
    """Every text has the same vector, unless `angles` says otherwise."""

    angles: dict[str, float] = field(default_factory=dict)
    installed: bool = True
    failure: Exception | None = None
    wait: Callable[[], Any] | None = None
    asked: int = 0

    def model_card(self) -> ModelCard | None:
        return ModelCard(id="e", context_length=256) if self.installed else None

    async def embed(self, texts: Sequence[str]) -> np.ndarray:
        self.asked += 1
        if self.wait is not None:
            await self.wait()
        if self.failure is not None:
            raise self.failure
        angles = [self.angles.get(text, 0.0) for text in texts]
        return np.array([[np.cos(angle), np.sin(angle)] for angle in angles], np.float32)


class Parts:
    def __init__(self, **fields: Any) -> None:
        self.embedding, self.memory, self.clock = Embedding(**fields), MemoryLayer(1 << 20), Clock()
        self.layer = SemanticLayer(self.embedding, [self.memory], clock=self.clock, wall_clock=self.clock, rows=100)
        self.store = Store([self.memory, self.layer], clock=self.clock)

    async def remember(self, query: Query, text: str = "an answer") -> None:
        await self.store.put(query, entry(text, created=self.clock.now))
        await self.layer.settle()

    async def found(self, query: Query) -> str | None:
        found = await self.store.get(query)
        return None if found is None else found.layer


def query(content: str = ASKED, rules: CacheRules = ON, scope: Scope = SCOPE, **fields: Any) -> Query:
    request = msgspec.structs.replace(greedy(content), **fields)
    return Query(key_of(request, scope), request, scope, rules)


async def test_the_same_question_in_other_words_has_the_same_answer() -> None:
    """And says which layer it came from; the exact layers are not told that the two are one."""
    parts = Parts()
    await parts.remember(query(ASKED), "Rayleigh")
    found = await parts.store.get(query(AGAIN))
    assert found is not None
    assert (found.layer, found.entry.deltas[0].text) == ("semantic", "Rayleigh")
    assert await parts.found(query(ASKED)) == "memory"
    assert await parts.memory.get(query(AGAIN)) is None


async def test_off_unless_the_policy_says_so() -> None:
    """Not even a vector is made."""
    parts = Parts()
    await parts.remember(query(ASKED, CacheRules()))
    assert await parts.found(query(AGAIN, CacheRules())) is None
    assert parts.embedding.asked == 0


@pytest.mark.parametrize("other", ["Why is the sky not blue?", "Why is the sea blue?", "When is the sky blue?"])
async def test_a_near_vector_is_not_enough(other: str) -> None:
    """Cosine 1, and the guards keep them apart; statistics say which."""
    parts = Parts()
    await parts.remember(query(ASKED))
    assert await parts.found(query(other)) is None
    assert sum(parts.layer.stats().refused.values()) == 1


async def test_the_guards_are_not_enough_either() -> None:
    """The same words, and a vector below the policy's threshold."""
    parts = Parts(angles={AGAIN: 0.7})
    await parts.remember(query(ASKED))
    assert await parts.found(query(AGAIN)) is None
    assert await parts.found(query(AGAIN, CacheRules(semantic=SemanticRules(threshold=0.7)))) == "semantic"


def with_history(*before: str) -> tuple[Message, ...]:
    roles = ["system", "user", "assistant"]
    said = [Message(role=roles[at], content=text) for at, text in enumerate(before)]  # type: ignore[arg-type]
    return (*said, Message(role="user", content=AGAIN))


@pytest.mark.parametrize(
    "other",
    [
        {"messages": with_history("Be brief.")}, {"messages": with_history("s", "u", "a")}, {"model": "edge"},
        {"sampling": msgspec.structs.replace(greedy().sampling, max_tokens=7)},
        {"sampling": msgspec.structs.replace(greedy().sampling, seed=7)},
        {"scope": replace(SCOPE, tenant="other")}, {"scope": replace(SCOPE, label="edge_only")},
        {"scope": replace(SCOPE, label="redact")}, {"scope": replace(SCOPE, target="cloud")},
        {"scope": replace(SCOPE, model="large")}, {"scope": replace(SCOPE, weights="def")},
        {"scope": replace(SCOPE, redaction="r2")},
    ],
)  # fmt: skip
async def test_everything_but_the_last_message_must_be_the_same(other: dict[str, Any]) -> None:
    """Earlier turns, system prompt, parameters, tenant, label, target, model: one of them differs, and it is a miss."""
    parts = Parts()
    await parts.remember(query(ASKED))
    assert await parts.found(query(AGAIN)) == "semantic"
    assert await parts.found(query(AGAIN, **other)) is None


TOOL, GRAMMAR = Tool(name="f"), Grammar(syntax="regex", text="a+")


@pytest.mark.parametrize(
    "request_",
    [
        msgspec.structs.replace(greedy(ASKED), tools=(TOOL,)),
        msgspec.structs.replace(greedy(ASKED), grammar=GRAMMAR),
        ChatRequest(id="r", model="auto", prompt=ASKED),
        msgspec.structs.replace(
            greedy(), messages=(Message(role="user", content="u"), Message(role="assistant", content="a"))
        ),
    ],
)
async def test_only_plain_chats(request_: ChatRequest) -> None:
    """Tools, grammars, raw prompts, and a conversation that ends with the assistant are none of this layer's."""
    parts = Parts()
    assert not parts.layer.takes(Query(key_of(request_, SCOPE), request_, SCOPE, ON))
    assert parts.layer.takes(query())


async def test_edge_only_is_served_to_edge_only_where_that_may_be_kept() -> None:
    """By the same policy as every other layer."""
    scope, never = replace(SCOPE, label="edge_only"), CacheRules(edge_only=False, semantic=SemanticRules())
    parts = Parts()
    await parts.remember(query(ASKED, scope=scope))
    assert await parts.found(query(AGAIN, scope=scope)) == "semantic"
    assert not parts.layer.takes(query(AGAIN, never, scope))


async def test_an_answer_that_is_gone_or_too_old_is_not_served() -> None:
    """No answer lies here: once the exact layers have lost it, the question is forgotten, too."""
    parts = Parts()
    await parts.remember(query(ASKED))
    parts.clock.now += parts.memory.ttl_s + 1
    assert await parts.found(query(AGAIN)) is None
    assert parts.layer.stats().entries == 0
    await parts.remember(query(ASKED))
    await parts.memory.clear()
    assert await parts.found(query(AGAIN)) is None


async def test_a_question_asked_anew_at_once_is_a_suspected_false_hit() -> None:
    """`Cache-Control: no-cache` right after an answer from here: counted, with its share; later, a refresh."""
    parts = Parts()
    await parts.remember(query(ASKED))
    for wait, suspected in ((5.0, 1), (DOUBT_S + 1, 1)):
        assert await parts.layer.get(query(AGAIN)) is not None
        parts.clock.now += wait
        await parts.remember(query(AGAIN))
        assert parts.layer.stats().suspected == suspected
    assert parts.layer.stats().false_hit_rate == 0.5


@pytest.mark.parametrize("failure", [UnknownModel("gone"), TimeoutError()])
async def test_without_vectors_it_is_a_miss_and_counted(failure: Exception) -> None:
    """A broken embedder costs nobody an answer."""
    parts = Parts()
    await parts.remember(query(ASKED))
    parts.embedding.failure = failure
    assert await parts.found(query(AGAIN)) is None
    await parts.remember(query("Why is grass green?"))
    assert parts.layer.stats().errors == 2
    parts.embedding.installed = False
    assert not parts.layer.takes(query(AGAIN))


async def test_over_http_it_is_told_apart_and_asked_anew(tmp_path: Path) -> None:
    """`cache hit: semantic` in the reason; `no-cache` makes it anew, and the status counts a suspected false hit."""
    memory = MemoryLayer(1 << 20)
    layer = SemanticLayer(Embedding(), [memory])
    cache = AnswerCache(Store([memory, layer]))
    policy = policy_file(tmp_path, "{mode: prefer_edge, cache: {semantic: {threshold: 0.9}}}")
    daemon = daemon_over(ScriptedAnswer(*HERE), None, policy, cache)
    app = openai_app(daemon, keys=None, guard=Guard())

    async with served(app) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:

        async def reason(text: str, **headers: str) -> str:
            body = {"model": "auto", "messages": [{"role": "user", "content": text}], "temperature": 0}
            reply = await client.post("/v1/chat/completions", json=body, headers=headers)
            await layer.settle()
            return f"{reply.headers['x-causeway-cache']} {reply.headers['x-causeway-reason']}"

        assert (await reason(ASKED)).startswith("miss")
        assert "cache hit: semantic" in await reason(AGAIN)
        assert (await reason("Why is the sky not blue?")).startswith("miss")
        assert (await reason(AGAIN, **{"cache-control": "no-cache"})).startswith("miss")
        assert "cache hit: memory" in await reason(AGAIN)
    assert cache.stats()["layers"]["semantic"]["false_hit_rate"] == 1.0
    assert daemon.registry.get_sample_value("causeway_cache_suspected_total", {"layer": "semantic"}) == 1


async def test_what_waits_for_vectors_is_bounded_and_ends_with_the_layer() -> None:
    """`put` returns at once; a flood is not queued without end, and closing leaves no task behind."""
    parts = Parts(wait=asyncio.Event().wait)
    for number in range(PENDING + 20):
        await parts.layer.put(query(f"What is the number {number}?"), entry())
    await asyncio.sleep(0)
    assert parts.embedding.asked == PENDING
    await parts.layer.aclose()
    assert len(asyncio.all_tasks()) == 1
