"""What a user asks and what a model answers: the values both ends pass around. Frozen, and valid once they exist.

Every HTTP surface turns its own JSON into a `ChatRequest` and turns `Delta`s back; the wire carries the same values.
Anything that answers a request is an `Answer`: the edge's Agent, each of its backends, the cloud's engine.
"""

import re
from collections.abc import AsyncGenerator
from typing import Final, Literal, Protocol

import msgspec

from shared.errors import BadRequest
from shared.grammars import check_lark, check_regex, check_schema

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]
ToolChoice = Literal["none", "auto", "required"]
Target = Literal["edge", "cloud"]
CacheUse = Literal["hit", "shared", "miss", "bypass"]
Syntax = Literal["json_schema", "regex", "lark"]
Label = Literal["free", "redact", "edge_only"]
"""`redact`: only with its personal data and secrets replaced may this request leave the device; such a copy is free.
`edge_only`: not one byte of it may. Nothing but what is free is ever put on the wire."""
LABELS: Final[tuple[Label, ...]] = ("edge_only", "redact", "free")
"""Strictest first."""
Priority = Literal["interactive", "batch"]
"""`batch`: nobody waits for it, so it makes room for what somebody waits for. It is answered in the end."""

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_TOP_LOGPROBS = 20
MAX_STOP_TOKENS = 16
MAX_LOGIT_BIAS = 300
MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_CALLS = 128
MAX_OUTPUT_TOKENS = 1 << 20
MAX_DEADLINE_S = 86_400.0
MAX_TOKEN_ID = 1 << 24
SEED_BITS = 63


def _in_range(name: str, value: float | None, low: float, high: float, *, open_low: bool = False) -> None:
    if value is None:
        return
    if not low <= value <= high or (open_low and value == low):  # false for NaN too
        raise BadRequest(f"{name} must be {'over' if open_low else 'at least'} {low} and at most {high}", param=name)


class ToolCall(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an assistant called in an earlier turn. `arguments` is a JSON object, as text."""

    id: str
    name: str
    arguments: str


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`tool_calls` are the assistant's; a message of a `tool` answers the one with the id `tool_call_id`."""

    role: Role
    content: str
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    def __post_init__(self) -> None:
        if self.tool_calls and self.role != "assistant":
            raise BadRequest("only an assistant has tool_calls", param="tool_calls")
        if len(self.tool_calls) > MAX_CALLS:
            raise BadRequest(f"at most {MAX_CALLS} tool_calls", param="tool_calls")

    @property
    def size(self) -> int:
        """Characters that a prompt is made of."""
        return len(self.content) + sum(len(call.name) + len(call.arguments) for call in self.tool_calls)


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How the next token is picked. Applied in this order: penalties, bias, temperature, top-k, top-p, min-p.

    `temperature` 0 means greedy: the argmax of the raw logits (after penalties). `top_k` 0, `top_p` 1 and `min_p` 0 are
    off. `logprobs` None is off, k >= 0 asks for each chosen token's log probability and the k likeliest alternatives.
    `logit_bias` is what each token's logit is raised by. No end token is drawn before `min_tokens`; those of
    `stop_token_ids` end the answer like the model's own, whatever `ignore_eos` says.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: dict[int, float] = {}

    def __post_init__(self) -> None:
        _in_range("temperature", self.temperature, 0, 2)
        _in_range("top_p", self.top_p, 0, 1, open_low=True)
        _in_range("top_k", self.top_k, 0, 1 << 20)
        _in_range("min_p", self.min_p, 0, 1)
        _in_range("presence_penalty", self.presence_penalty, -2, 2)
        _in_range("frequency_penalty", self.frequency_penalty, -2, 2)
        _in_range("repetition_penalty", self.repetition_penalty, 0, 10, open_low=True)
        _in_range("seed", self.seed, -(1 << SEED_BITS), (1 << SEED_BITS) - 1)
        _in_range("max_tokens", self.max_tokens, 1, MAX_OUTPUT_TOKENS)
        _in_range("top_logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS)
        _in_range("min_tokens", self.min_tokens, 0, self.max_tokens or MAX_OUTPUT_TOKENS)
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise BadRequest(f"at most {MAX_STOP_TOKENS} stop tokens", param="stop_token_ids")
        for token in self.stop_token_ids:
            _in_range("stop_token_ids", token, 0, MAX_TOKEN_ID)
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise BadRequest(f"at most {MAX_LOGIT_BIAS} tokens with a bias", param="logit_bias")
        for token, bias in self.logit_bias.items():
            _in_range("logit_bias", token, 0, MAX_TOKEN_ID)
            _in_range("logit_bias", bias, -100, 100)
        if len(self.stop) > MAX_STOPS:
            raise BadRequest(f"at most {MAX_STOPS} stop strings, got {len(self.stop)}", param="stop")
        if any(not 0 < len(text) <= MAX_STOP_CHARS for text in self.stop):
            raise BadRequest(f"each stop string must have 1 to {MAX_STOP_CHARS} characters", param="stop")


class Grammar(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an answer must look like, from first character to last: `text` is a JSON Schema, a regular expression or a
    Lark grammar. Limits and refusals: `shared.grammars`."""

    syntax: Syntax
    text: str

    def __post_init__(self) -> None:
        check = {"json_schema": check_schema, "regex": check_regex, "lark": check_lark}[self.syntax]
        try:
            check(self.text)
        except BadRequest as error:
            error.param = "grammar"
            raise


class Tool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A function that may be called. `parameters` is a JSON Schema as text; with `strict` a call must follow it."""

    name: str
    description: str = ""
    parameters: str = '{"type":"object"}'
    strict: bool = False

    def __post_init__(self) -> None:
        if not _TOOL_NAME.fullmatch(self.name):
            raise BadRequest("a tool's name must have 1 to 64 letters, digits, _ and -", param="name")
        try:
            check_schema(self.parameters)
        except BadRequest as error:
            error.param = "parameters"
            raise


_TOOL_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


class ChatRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One request, from any surface. Exactly one of `messages` (chat) and `prompt` (raw text, no template) is given.

    `id` is chosen by the client and is the idempotency key of the wire: the same id and body never run twice.
    `deadline_s` counts from when the request has arrived at whoever answers it: what cannot be answered by then is not
    computed, and ends with DeadlineExceeded.
    """

    id: str
    model: str
    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    sampling: Sampling = Sampling()
    grammar: Grammar | None = None
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = "auto"
    allowed_tools: tuple[str, ...] = ()
    """Of the tools, those that may be called now; none named: all. A choice of one tool is `required` and its name."""
    parallel_tool_calls: bool = True
    label: Label = "free"
    priority: Priority = "interactive"
    deadline_s: float | None = None
    scenario: str | None = None
    """The class that the caller asks for: matter for the edge's policy, never sent."""
    streamed: bool = False
    """Its answer is read while it comes, and is the only one of its reply. Set by the surface, never sent."""

    def __post_init__(self) -> None:
        if not 0 < len(self.id) <= 128 or not self.id.isascii() or not self.id.isprintable():
            raise BadRequest("request id must be 1 to 128 printable ASCII characters", param="id")
        if not 0 < len(self.model) <= 256:
            raise BadRequest("model must have 1 to 256 characters", param="model")
        if (self.prompt is None) == (not self.messages):
            raise BadRequest("give either a prompt or at least one message", param="messages")
        if self.prompt == "":
            raise BadRequest("prompt must not be empty", param="prompt")
        if len(self.messages) > MAX_MESSAGES:
            raise BadRequest(f"at most {MAX_MESSAGES} messages", param="messages")
        self._check_tools()
        _in_range("deadline_s", self.deadline_s, 0, MAX_DEADLINE_S, open_low=True)

    def _check_tools(self) -> None:
        names = [tool.name for tool in self.tools]
        if len(names) > MAX_TOOLS or len(set(names)) < len(names):
            raise BadRequest(f"there must be at most {MAX_TOOLS} tools, each with a name of its own", param="tools")
        if not set(self.allowed_tools) <= set(names) or (self.tool_choice == "required" and not names):
            raise BadRequest("tool_choice must be of the tools that are given", param="tool_choice")
        if names and self.prompt is not None:
            raise BadRequest("tools need messages", param="tools")
        if self.calling and self.grammar is not None:
            raise BadRequest("tools and a grammar for the answer exclude each other", param="grammar")

    @property
    def calling(self) -> tuple[Tool, ...]:
        """The tools that the answer may call."""
        if self.tool_choice == "none":
            return ()
        return tuple(tool for tool in self.tools if tool.name in (self.allowed_tools or (tool.name,)))

    @property
    def size(self) -> int:
        """Characters of all that a prompt is made of."""
        tools = sum(len(tool.name) + len(tool.description) + len(tool.parameters) for tool in self.tools)
        return len(self.prompt or "") + sum(message.size for message in self.messages) + tools


class TopLogprob(msgspec.Struct, frozen=True, array_like=True):
    token: str
    logprob: float
    bytes: tuple[int, ...] = ()


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """One generated token's log probability (natural log, after penalties, before temperature) and its rivals'."""

    token: str
    logprob: float
    bytes: tuple[int, ...] = ()
    top: tuple[TopLogprob, ...] = ()


class Usage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Of the prompt's tokens, how many came from a prefix cache."""


class Cached(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the edge's cache had to do with an answer. `hit`: it came from `layer`, `age_s` old; `shared`: from the
    execution of an identical request; `miss`: made anew; `bypass`: made anew, and neither looked for nor kept."""

    use: CacheUse
    layer: str = ""
    age_s: float = 0.0

    @property
    def saved(self) -> bool:
        """No model has worked for this one."""
        return self.use in ("hit", "shared")


class Switched(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Above an answer stands the beginning of another, by `target`'s `model`, and a mark between the two. Its own part
    of the text starts at character `starts_at`; `usage` is the other's part of the whole."""

    target: Target
    model: str
    starts_at: int
    usage: Usage


class Route(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Who serves a request and why: what `x-causeway-route`, `-reason`, `-failovers` and `-cache` say."""

    target: Target
    reason: str
    failovers: int = 0
    model: str = ""
    cached: Cached | None = None
    switched: Switched | None = None


class ToolPiece(msgspec.Struct, frozen=True, array_like=True):
    """A part of call number `index` of an answer: the first has its id and name, all of them pieces of its arguments,
    which together are JSON as the model wrote it: whether it is valid, and fits the tool, is the client's to check."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


class Delta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One piece of an answer. The last one of a stream, and only it, has `finish_reason` and `usage`.

    `tokens` counts the model's tokens behind `text` (0 while text is held back for a stop string or half a character).
    `route` is set by the Agent on the first and the last delta, and on a mark. `stop`, on the last, is the stop string
    that ended it.
    """

    text: str = ""
    tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    tool_calls: tuple[ToolPiece, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    route: Route | None = None
    stop: str | None = None

    @property
    def marks(self) -> bool:
        """Its text is the mark between two answers: what comes from here on is of the side that its route names."""
        return self.finish_reason is None and self.route is not None and self.route.switched is not None


class Answer(Protocol):
    """The one seam of Causeway: a request in, deltas out.

    Raises CausewayError, before the first delta or between two. A generator that is closed (`aclose`) or whose task is
    cancelled stops costing compute within 2 s. A stream that ends without an error has had its last delta.
    """

    def answer(self, request: ChatRequest) -> AsyncGenerator[Delta, None]: ...


class ModelCard(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a surface says about a model it serves. `context_length` in tokens, prompt and output together."""

    id: str
    context_length: int
    owned_by: str = "causeway"
    digest: str = ""
    """Names the very bytes of the model, where that is known: what it answered is not served for another's."""
