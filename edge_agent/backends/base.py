"""What the Agent needs of the two sides that can answer. Both are `Answer`s; beyond that it only looks and closes.

`llama.py` and `cloud.py` implement these; tests put scripted ones in their place.
"""

from typing import Protocol

from shared.schemas import Answer, ChatRequest, Delta, ModelCard

DEFAULT_CONTEXT = 2048
"""Tokens of one request at the local model, prompt and output together, where nothing else is said."""


class LocalReading(Protocol):
    """The local runtime now. Cheap to read: never waits, never wakes a model."""

    @property
    def available(self) -> bool:
        """False while the model is loading, broken or closed."""

    @property
    def queue_depth(self) -> int:
        """Requests waiting, the running ones not counted."""

    @property
    def queue_capacity(self) -> int: ...

    @property
    def running(self) -> int: ...

    @property
    def slots(self) -> int:
        """How many can run at once."""

    @property
    def tokens_per_s(self) -> float | None:
        """Decoded by all running requests together; None until measured."""

    @property
    def prefill_tokens_per_s(self) -> float | None: ...

    @property
    def restarts(self) -> int:
        """How often the model's process died and another was started."""

    @property
    def quarantined(self) -> int:
        """Requests refused by name, for having been there when it died twice."""


class LocalBackend(Answer, Protocol):
    """The model on this device."""

    def model_card(self) -> ModelCard: ...

    def reading(self) -> LocalReading: ...

    async def count_tokens(self, request: ChatRequest) -> int:
        """Tokens of the whole templated prompt, counted off the event loop."""

    async def aclose(self) -> None: ...


class LinkState(Protocol):
    """The connection to the cloud now."""

    @property
    def connected(self) -> bool: ...

    @property
    def draining(self) -> bool:
        """The cloud has said that it takes no new request."""

    @property
    def retry_after_s(self) -> float | None: ...

    @property
    def round_trip_s(self) -> float | None: ...

    @property
    def model(self) -> str | None:
        """The model that the cloud serves; None until it has said so."""

    @property
    def context_length(self) -> int | None: ...


class RemoteBackend(Answer, Protocol):
    """The cloud engine behind its link. Must itself refuse what is labelled `edge_only`."""

    def link(self) -> LinkState: ...

    async def aclose(self) -> None: ...


def is_empty(delta: Delta) -> bool:
    """Nothing for a client in it: until the first delta that is not, a request counts as not yet answered."""
    return not (delta.text or delta.tokens or delta.logprobs or delta.tool_calls or delta.finish_reason)
