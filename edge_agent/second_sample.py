"""A second answer to the same question, drawn beside the first and never shown: how far the two agree says how sure the
model is.

It begins once the first has its first token, so that the prompt is not computed twice, and only where a slot is free
and nobody waits for one. Whatever goes wrong with it, there is none, and the first is judged alone.

Where the first is an answer that the cache kept, it is drawn only if the two were not compared before: the same answer
to the same question is as sure as it was.
"""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import aclosing
from typing import Final

import msgspec

from edge_agent.backends.base import LocalModels
from router.cascade_rules import CascadeRules, SecondSample
from router.confidence import Tally, agreement
from shared.errors import CausewayError
from shared.schemas import ChatRequest

ID_CHARS: Final = 120
MAX_COMPARED: Final = 4096


class Compared:
    """How far answers agreed with their second samples, the latest of them: numbers under digests, and no text."""

    def __init__(self) -> None:
        self._agreements: OrderedDict[bytes, tuple[int, bytes, float]] = OrderedDict()

    def get(self, asked: bytes, said: str) -> float | None:
        """Of an answer to this that begins with what was compared: from the cache, more of it comes at once."""
        chars, digest, agreed = self._agreements.get(asked, (0, b"", 0.0))
        return agreed if digest == _digest(said[:chars]) else None

    def keep(self, asked: bytes, said: str, agreed: float) -> None:
        self._agreements[asked] = len(said), _digest(said), agreed
        if len(self._agreements) > MAX_COMPARED:
            self._agreements.popitem(last=False)


class Second:
    """Of one request, by a model of this device, as `drawn` says; heard as far as `rules` judge the first one by."""

    def __init__(
        self,
        request: ChatRequest,
        drawn: SecondSample,
        rules: CascadeRules,
        local: LocalModels,
        compared: Compared,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._asked, self._drawn, self._rules, self._local, self._clock = request, drawn, rules, local, clock
        self._compared, self._kept = compared, False
        self._task: asyncio.Task[str | None] | None = None

    @property
    def request(self) -> ChatRequest:
        """With a seed of its own, so that the same question is judged the same again."""
        drawn, sampling = self._drawn, self._asked.sampling
        sampling = msgspec.structs.replace(
            sampling,
            temperature=drawn.temperature,
            seed=(sampling.seed or 0) ^ 1,
            max_tokens=min(sampling.max_tokens or drawn.max_tokens, drawn.max_tokens),
            min_tokens=0,
            logprobs=0,
        )
        name = f"{self._asked.id[:ID_CHARS]}.second"
        return msgspec.structs.replace(self._asked, id=name, model=drawn.model or self._asked.model, sampling=sampling)

    def start(self, *, kept: bool = False) -> None:
        """Returns at once; nothing is drawn where no slot is free, or the model is not of this device. `kept`: the
        first is an answer from the cache, of which more may be known once it is heard."""
        self._kept = kept
        if not kept:
            self._draw()

    async def agreement(self, said: str, within_s: float) -> float | None:
        """How far it says the same as the first, which said this; None if there is none, or not by then."""
        if self._kept:
            if (known := self._compared.get(self._key, said)) is not None:
                return known
            self._draw()
        if self._task is None:
            return None
        done, _ = await asyncio.wait({self._task}, timeout=max(0.0, within_s))
        second = self._task.result() if done else None
        if second is None:
            return None
        agreed = agreement(said, second)
        self._compared.keep(self._key, said, agreed)
        return agreed

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _draw(self) -> None:
        if self._task is None and self._has_room():
            self._task = asyncio.create_task(self._hear())

    @property
    def _key(self) -> bytes:
        """All that the comparison depends on, but for the first answer."""
        card, rules = self._local.named(self._drawn.model or self._asked.model).model_card(), self._rules
        asked = [(name, value) for name, value in msgspec.structs.asdict(self.request).items() if name != "id"]
        far = (rules.hold, rules.min_tokens, rules.max_chars)
        return _digest((asked, card.id, card.digest, far))

    def _has_room(self) -> bool:
        model = self._local.named(self._drawn.model or self._asked.model)
        if self._drawn.model not in (None, model.model_card().id):
            return False
        reading = model.reading()
        return reading.available and not reading.queue_depth and reading.running < reading.slots

    async def _hear(self) -> str | None:
        tally, began = Tally(), self._clock()
        try:
            async with aclosing(self._local.answer(self.request)) as deltas:
                async for delta in deltas:
                    tally.push(delta)
                    if tally.enough(self._rules, self._clock() - began):
                        return tally.said
        except CausewayError:
            return None
        return None


def _digest(covered: object) -> bytes:
    return hashlib.blake2b(msgspec.msgpack.encode(covered, order="deterministic"), digest_size=32).digest()
