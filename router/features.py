"""What is measured of a request, of the device and of the link. Values only: whoever senses fills them in.

The hints (`code`, `maths`, `json`, `tools`) are lexical and cheap: one pass over at most SCAN_CHARS characters with all
patterns at once (RE2's set), so no text can make them slow. They guess; a policy should treat them so.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import re2

from router.classes import UNNAMED, Class
from router.money import NOTHING_SPENT, Spent
from router.privacy.inspect import CLEAN, Privacy
from shared.schemas import ChatRequest, Label

EXPECTED_OUTPUT_TOKENS: Final = 256
SCAN_CHARS: Final = 2048
CHARS_PER_TOKEN: Final = 4  # of ASCII text, in byte-pair vocabularies; other scripts are nearer one token a character
TOKENS_PER_MESSAGE: Final = 4  # what a chat template puts around each message


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFeatures:
    """One request, without its text."""

    prompt_tokens: int
    model: str = "auto"
    """As requested: a virtual model or a real one's name."""
    label: Label = "free"
    max_tokens: int | None = None
    """The caller's limit on the output, if one was given."""
    expected_output_tokens: int = EXPECTED_OUTPUT_TOKENS
    """A guess: the policy's, but never above `max_tokens`."""
    turns: int = 1
    """Messages by the user, this one included."""
    code: bool = False
    maths: bool = False
    json: bool = False
    tools: bool = False
    privacy: Privacy = CLEAN
    """What the detector found, if the policy or the label asked it."""
    difficulty: float | None = None
    """Probability that the cloud is right where the edge is wrong (`router.difficulty`), if the policy asks for it."""
    difficult_from: float | None = None
    """The difficulty from which the policy's goal sends a request to the cloud, if it has one."""
    tenant: str = ""
    """Whose request it is; empty where clients show no key."""
    key: str = ""
    """The id of the key that was shown."""
    bucket: float | None = None
    """In [0, 100), evenly spread over conversations and the same for every request of one."""
    spent: Spent = NOTHING_SPENT
    """What was spent before it."""
    scenario: Class = UNNAMED
    """How soon its first token should come."""

    @property
    def answer_tokens(self) -> int:
        """The output asked for or, if the caller did not say, expected."""
        return self.max_tokens or self.expected_output_tokens

    @property
    def required_context(self) -> int:
        """Tokens of context without which the request must be refused: the prompt and all that was asked for."""
        return self.prompt_tokens + (self.max_tokens or 1)

    @property
    def needs_context(self) -> int:
        """Tokens of context that answer it in comfort: the prompt and the output asked for or expected."""
        return self.prompt_tokens + self.answer_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceReading:
    """The device now. None means not measured; a rule that asks for it does not apply."""

    model: str
    context_length: int
    available: bool = True
    """False while the local model is loading, broken or switched off."""
    queue_depth: int = 0
    """Requests waiting, the running ones not counted."""
    queue_capacity: int = 1
    running: int = 0
    tokens_per_s: float | None = None
    """Decoded by all running requests together."""
    prefill_tokens_per_s: float | None = None
    slots: int | None = None
    """How many requests can run at once."""
    token_s: float | None = None
    """Seconds for each further token of an answer, were it to run beside those that run now: see `router.predict`."""
    memory_available: int | None = None
    """Bytes that can be had without swapping."""
    battery_percent: float | None = None
    on_battery: bool | None = None
    battery_j: float | None = None
    """Joules that are left in the battery."""
    work_w: float | None = None
    """Watts that the local model's work adds to what the device draws, and the radio while an answer comes from the
    cloud."""
    radio_w: float | None = None
    cpu_percent: float | None = None
    """Load of the whole machine, this program's own work included; the next one leaves that out."""
    cpu_percent_others: float | None = None
    temperature_c: float | None = None
    """Of the hottest processor sensor."""
    online: bool | None = None
    """Whether any network beyond the device can be reached at all, by its routes."""
    metered: bool | None = None
    """Whether traffic costs, as the user has set."""
    at: float | None = None
    """The time, in seconds since 1970."""
    weekday: str | None = None
    """`mon` to `sun`, and the hour of the day with its fraction, where the device is."""
    hour: float | None = None

    @property
    def queue_full(self) -> bool:
        return self.queue_depth >= self.queue_capacity


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """What got lost on the way to the cloud in the last minutes; None where nobody can tell."""

    loss: float | None = None
    """Share of what was sent that had to be sent again."""
    resend_s: float | None = None
    """How long one that was lost is waited for, the first time."""
    cuts_per_s: float | None = None
    """How often the connection broke, for each second that there was one."""
    reconnect_s: float | None = None
    """How long it took to have one again."""


UNTROUBLED: Final = Trouble()


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkReading:
    """The way to the cloud now, and what is known of the other side (None until it has said so)."""

    configured: bool = True
    connected: bool = True
    admitting: bool = True
    """The circuit breaker would let a request through: `CloudHealth.admits(now)`."""
    draining: bool = False
    retry_after_s: float | None = None
    """When the breaker opens up again, or the cloud asked to be left alone until."""
    round_trip_s: float | None = None
    first_token_s: float | None = None
    """What recent offloaded requests waited for their first token, on average."""
    first_token_base_s: float | None = None
    """That same wait as a line over the prompt's length: for an empty prompt, and for each token of it."""
    prompt_token_s: float | None = None
    token_s: float | None = None
    """Seconds for each token of an answer after the first."""
    failure_ratio: float | None = None
    """Share of the latest requests that the cloud failed, before their first token."""
    trouble: Trouble = UNTROUBLED
    model: str | None = None
    context_length: int | None = None


NO_CLOUD: Final = LinkReading(configured=False, connected=False)


def measure(
    request: ChatRequest,
    *,
    prompt_tokens: int,
    expected_output_tokens: int = EXPECTED_OUTPUT_TOKENS,
    privacy: Privacy = CLEAN,
    difficulty: float | None = None,
    difficult_from: float | None = None,
    tenant: str = "",
    key: str = "",
    bucket: float | None = None,
    spent: Spent = NOTHING_SPENT,
    scenario: Class = UNNAMED,
) -> RequestFeatures:
    """The request's own measures, with those that others made of it; see `router.observe`."""
    hints = _hints(_excerpt(request))
    limit = request.sampling.max_tokens
    return RequestFeatures(
        prompt_tokens=prompt_tokens,
        model=request.model,
        label=request.label,
        max_tokens=limit,
        expected_output_tokens=min(expected_output_tokens, limit or expected_output_tokens),
        turns=max(1, sum(message.role == "user" for message in request.messages)),
        code="code" in hints,
        maths="maths" in hints,
        json="json" in hints,
        tools="tools" in hints or any(message.role == "tool" for message in request.messages),
        privacy=privacy,
        difficulty=difficulty,
        difficult_from=difficult_from,
        tenant=tenant,
        key=key,
        bucket=bucket,
        spent=spent,
        scenario=scenario,
    )


def estimate_tokens(request: ChatRequest) -> int:
    """How many tokens the prompt takes, about, for when no tokenizer is at hand. Linear in the text."""
    return sum(_estimate(text) + TOKENS_PER_MESSAGE for text in _texts(request))


def _estimate(text: str) -> int:
    ascii_chars = len(text.encode("ascii", "ignore"))
    return math.ceil(ascii_chars / CHARS_PER_TOKEN) + len(text) - ascii_chars


def _texts(request: ChatRequest) -> Iterator[str]:
    """Newest first."""
    if request.prompt is not None:
        yield request.prompt
    yield from (message.content for message in reversed(request.messages))


def _excerpt(request: ChatRequest) -> str:
    """About SCAN_CHARS characters at most, newest message first; of a long one its ends, where questions are asked."""
    parts: list[str] = []
    left = SCAN_CHARS
    for text in _texts(request):
        if left <= 0:
            break
        half = left // 2
        parts.append(text if len(text) <= left else f"{text[:half]}\n{text[len(text) - half :]}")
        left -= len(text)
    return "\n".join(parts)


HINTS: Final[Mapping[str, str]] = {
    "code": r"(?im)```"
    r"|^[ \t]*(?:def \w+\(|class \w+[:({]|import [\w.{]|from [\w.]+ import |#include[ \t]*[<\"]|(?:pub )?fn \w+[(<]"
    r"|func \w+\(|function \w*\(|(?:const|let|var) \w+ ?=|public (?:static|class|void)\b|#!/)"
    r"|\) ?[;{][ \t]*$"
    r"|(?-i:\bSELECT\b[^;\n]+\bFROM \w)|\bselect \*"
    r"|\b(?:python|javascript|typescript|golang|regexp?|sql|traceback|stack trace|segfault|refactor)\b|\bc\+\+(?:\W|$)",
    "maths": r"(?i)\\(?:frac|sum|int|sqrt|prod|lim|begin\{(?:equation|align|matrix|cases))"
    "|[\u2200\u2202\u2203\u2208\u2211\u221a\u221e\u222b\u2248\u2260\u2264\u2265\u03c0]"
    "|\\d ?[*+^\u00d7\u00f7] ?\\(?\\d"
    r"|\d - \d|[\w)] ?= ?[-(]?[\d?]"
    r"|\b(?:solve|equation|integral|derivative|probability|theorem|calculate|compute|square root|percent|how many)\b",
    "json": r"""(?i)\bjson\b|\{[ \t\r\n]*"[^"\n]+"[ \t\r\n]*:""",
    "tools": r"(?i)\b(?:tool|function)[ _]calls?\b"
    r"|\b(?:call|use|using|invoke) (?:the |a |this )?(?:tool|function|api)\b",
}
"""What each hint goes by: linear patterns, in which no repetition needs a bound."""


@functools.cache
def _patterns() -> Any:
    """Of all hints, as one set that a text is run through once."""
    patterns = re2.Set.SearchSet()
    for pattern in HINTS.values():
        patterns.Add(pattern)
    patterns.Compile()
    return patterns


def _hints(text: str) -> set[str]:
    names = tuple(HINTS)
    return {names[index] for index in _patterns().Match(text.encode("utf-8", "surrogatepass")) or ()}
