"""The bodies of OpenAI's `chat.completions`, `completions` and `embeddings`, as types: what is implemented, harmless or
neutral."""

from collections.abc import Mapping
from typing import Any

import msgspec


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool = False
    include_obfuscation: bool = False  # padding of chunks: no part of the answer


class CausewayOptions(msgspec.Struct, forbid_unknown_fields=True):
    label: str = "free"
    deadline_s: float | None = None
    scenario: str | None = msgspec.field(name="class", default=None)


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    """vLLM's field. Exactly one is given; `grammar` is in Lark's notation."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class JsonSchema(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    schema: dict[str, Any] | None = None
    description: str = ""
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    json_schema: JsonSchema | None = None


class FunctionBody(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    function: FunctionBody | None = None


class CalledBody(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    arguments: str


class ToolCallBody(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    function: CalledBody
    type: str = "function"
    index: int = 0


class NamedBody(msgspec.Struct, forbid_unknown_fields=True):
    name: str


class AllowedTool(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    function: NamedBody | None = None


class AllowedTools(msgspec.Struct, forbid_unknown_fields=True):
    mode: str
    tools: list[AllowedTool]


class ToolChoiceBody(msgspec.Struct, forbid_unknown_fields=True):
    """One function by name, or several that may be called."""

    type: str
    function: NamedBody | None = None
    allowed_tools: AllowedTools | None = None


class CommonBody(msgspec.Struct, kw_only=True):
    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = 1
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    min_tokens: int = 0
    stop_token_ids: list[int] | None = None
    logit_bias: dict[str, float] = msgspec.field(default_factory=dict)
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None
    causeway: CausewayOptions = msgspec.field(default_factory=CausewayOptions)
    service_tier: str = "auto"
    user: str = ""
    metadata: dict[str, str] | None = None
    store: bool = False


class ChatBody(CommonBody, kw_only=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    safety_identifier: str = ""
    prompt_cache_key: str = ""
    prompt_cache_retention: str = ""
    prompt_cache_options: dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    tools: list[ToolBody] = []
    tool_choice: str | ToolChoiceBody = "auto"


class CompletionBody(CommonBody, kw_only=True):
    prompt: str | list[Any]
    logprobs: int | None = None


class EmbeddingBody(msgspec.Struct, kw_only=True):
    model: str
    input: str | list[Any]
    encoding_format: str = "float"
    dimensions: int | None = None
    user: str = ""


class MessageBody(msgspec.Struct, kw_only=True):
    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[ToolCallBody] = []
    tool_call_id: str | None = None


class PartBody(msgspec.Struct, kw_only=True):
    type: str
    text: str


# What OpenAI takes when the field is left out; any other value would change the answer.
NEUTRAL_CHAT: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
NEUTRAL_COMPLETION: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
NEUTRAL_MESSAGE: Mapping[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
}
NEUTRAL_PART: Mapping[str, tuple[Any, ...]] = {"file": (), "image_url": (), "input_audio": (), "refusal": ()}
