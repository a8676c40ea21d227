"""What the Agent needs of the two sides that can answer. Both are `Answer`s; beyond that it only looks and closes.

`llama.py` and `cloud.py` implement these; tests put scripted ones in their place.
"""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from shared.schemas import Answer, ChatRequest, Delta, ModelCard

if TYPE_CHECKING:  # the model's process, which needs the local side alone, starts without the router
    from router.features import Trouble

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


class LocalView(Protocol):
    """A model on this device, to be looked at."""

    def model_card(self) -> ModelCard: ...

    def reading(self) -> LocalReading: ...

    async def count_tokens(self, request: ChatRequest) -> int:
        """Tokens of the whole templated prompt, counted off the event loop."""


class LocalBackend(LocalView, Answer, Protocol):
    """A model on this device."""

    async def aclose(self) -> None: ...


class LoadableBackend(LocalBackend, Protocol):
    async def start(self) -> None:
        """Load the model. Raises ModelInvalid."""

    def taken(self) -> int | None:
        """Bytes of memory that it has now, beside its file's pages; None if that is not known."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory, or on its way there. `size` is estimated, in bytes; `expires_at` None: it works, or it
    `stays` until it is stopped."""

    name: str
    file: Path
    state: Literal["loading", "loaded"]
    size: int
    file_size: int
    context_length: int
    running: int
    processor: str
    loaded_at: datetime | None
    expires_at: datetime | None
    stays: bool


class LocalModels(LocalBackend, Protocol):
    """All models on this device; itself the default one."""

    def named(self, model: str) -> LocalView:
        """The one that would answer a request for this model, as it is now: the default, unless the name is another's.
        Loads nothing, waits for nothing."""

    def model_cards(self) -> tuple[ModelCard, ...]:
        """The default first."""

    @property
    def store(self) -> Path:
        """Where models lie; see `edge_agent.models.installed`."""

    def loaded(self) -> list[Loaded]:
        """What is in memory, by name."""

    async def load(self, name: str) -> None:
        """Have it in memory. Raises UnknownModel, or what keeps it from being loaded."""

    async def stop(self, name: str) -> bool:
        """Unload it: now if it is idle, else after its last answer; says whether it is gone.

        Raises UnknownModel if it is not loaded."""

    def keep(self, name: str, seconds: float | None) -> None:
        """How long this model shall stay after its last answer, from now on until it is unloaded; None: for ever. For a
        model that is not loaded, it holds once it is. A name that is not of this device changes nothing."""


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
    def trouble(self) -> "Trouble": ...

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
