"""A second answer to the same question, drawn beside the first and never shown: how far the two agree says how sure the
model is.

It begins once the first has its first token, so that the prompt is not computed twice, and only where a slot is free
and nobody waits for one. Whatever goes wrong with it, there is none, and the first is judged alone.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Final

import msgspec

from edge_agent.backends.base import LocalModels
from router.cascade_rules import CascadeRules, SecondSample
from router.confidence import Tally
from shared.errors import CausewayError
from shared.schemas import ChatRequest

ID_CHARS: Final = 120


class Second:
    """Of one request, by a model of this device, as `drawn` says; heard as far as `rules` judge the first one by."""

    def __init__(
        self,
        request: ChatRequest,
        drawn: SecondSample,
        rules: CascadeRules,
        local: LocalModels,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._asked, self._drawn, self._rules, self._local, self._clock = request, drawn, rules, local, clock
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

    def start(self) -> None:
        """Returns at once; nothing is drawn where no slot is free, or the model is not of this device."""
        if self._task is None and self._has_room():
            self._task = asyncio.create_task(self._hear())

    async def said(self, within_s: float) -> str | None:
        """None if there is none, or not by then."""
        if self._task is None:
            return None
        done, _ = await asyncio.wait({self._task}, timeout=max(0.0, within_s))
        return self._task.result() if done else None

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

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
