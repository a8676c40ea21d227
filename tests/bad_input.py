"""What no HTTP surface of ours may accept, as one table: the tests of both ends run all of it.

`BODIES` are POSTed to `/v1/chat/completions` or `/v1/completions`, `REQUESTS` are whole requests as raw bytes (their
`{port}` is replaced). Each names the status, the error code and the field that must come back.
"""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import grammar_bombs
from waiting import HANG_S

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MODEL = "auto"
"""A model every surface under test must know."""

BAD, UNSUPPORTED = "bad_request", "unsupported_parameter"


@dataclass(frozen=True)
class Body:
    name: str
    body: bytes
    param: str | None = None
    code: str = BAD
    status: int = 400
    path: str = CHAT
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Raw:
    name: str
    data: bytes
    statuses: frozenset[int]


def chat(**fields: Any) -> bytes:
    """A good chat body with some fields replaced."""
    return json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], **fields}).encode()


def completion(**fields: Any) -> bytes:
    return json.dumps({"model": MODEL, "prompt": "Hello", **fields}).encode()


def _number(name: str, literal: str) -> Body:
    body = chat(**{name: 0}).replace(f'"{name}": 0'.encode(), f'"{name}": {literal}'.encode())
    return Body(f"{name}={literal[:12]}", body, name)


def _message(**message: Any) -> bytes:
    return chat(messages=[message])


_NUMBERS = {
    "temperature": ("-0.1", "2.1", "1e309", "9223372036854775808", "true", '"1"', "[]", "1" * 400),
    "top_p": ("0", "-1", "1.01", "1e309", "true", '"x"'),
    "max_tokens": ("0", "-1", "1.5", "2147483648", "9223372036854775808", "1e309", "true", '"8"', "1" * 5000),
    "max_completion_tokens": ("0", "-5", "true", '"8"'),
    "n": ("0", "-1", "9", "100000", "1.0", "true", "1e309", "9223372036854775808"),
    "seed": ("9223372036854775808", "-9223372036854775809", "1.5", "true", "1e309", "1" * 400),
    "top_k": ("-1", "9223372036854775808", "true"),
    "min_p": ("-0.1", "1.1", "true"),
    "presence_penalty": ("-2.1", "2.1", "true"),
    "frequency_penalty": ("-2.1", "1e309", '"0"'),
    "repetition_penalty": ("0", "-1", "11"),
    "min_tokens": ("-1", "2147483648", "true"),
}

_UNSUPPORTED: dict[str, Any] = {
    "functions": [{"name": "f"}],
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy", "format": "wav"},
    "prediction": {"type": "content", "content": "x"},
    "web_search_options": {},
    "reasoning_effort": "high",
}

_UNKNOWN: dict[str, Any] = {
    "temprature": 1,
    "api_base": "http://127.0.0.1:1",
    "base_url": "http://127.0.0.1:1",
    "headers": {"x": "y"},
    "proxy": "http://127.0.0.1:1",
    "chat_template": "{{ ''.__class__ }}",
    "chat_template_kwargs": {"a": 1},
    "n_discard": -1,
    "__class__": "x",
}

_CALLED = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


_CHOICE = {"type": "function", "function": {"name": "g"}}


def _function(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f"} | fields}]}


_TOOLS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("required without any", "tool_choice", BAD, {"tool_choice": "required"}),
    ("unknown choice", "tool_choice", BAD, {"tool_choice": "sometimes"} | _function()),
    (
        "choice of another",
        "tool_choice",
        BAD,
        {"tool_choice": {"type": "function", "function": {"name": "g"}}} | _function(),
    ),
    ("no name", "tools[0].function.name", BAD, {"tools": [{"type": "function", "function": {}}]}),
    ("name of markup", "tools[0].function.name", BAD, _function(name="</tool_call>")),
    ("not a function", "tools[0].type", UNSUPPORTED, {"tools": [{"type": "web_search"}]}),
    ("10^4 tools", "tools", BAD, {"tools": [{"type": "function", "function": {"name": "f"}}] * 10_000}),
    ("two of one name", "tools", BAD, {"tools": [{"type": "function", "function": {"name": "f"}}] * 2}),
    ("and a grammar", "response_format", BAD, {"response_format": {"type": "json_object"}} | _function()),
    *(
        (f"schema {name}", "tools[0].function.parameters", BAD, _function(parameters=schema))
        for name, schema in grammar_bombs.SCHEMAS.items()
        if "10 MB" not in name
    ),
]

BODIES: tuple[Body, ...] = (
    *(_number(name, literal) for name, literals in _NUMBERS.items() for literal in literals),
    *(Body(f"unsupported {name}", chat(**{name: value}), name, UNSUPPORTED) for name, value in _UNSUPPORTED.items()),
    *(Body(f"unknown field {name}", chat(**{name: value}), name) for name, value in _UNKNOWN.items()),
    Body("unknown model", chat(model="gpt-17"), "model", "model_not_found", 404),
    Body("model is a path", chat(model="../../etc/passwd"), "model", "model_not_found", 404),
    Body("model is a number", chat(model=7), "model"),
    Body("model is empty", chat(model=""), "model"),
    Body("model is huge", chat(model="m" * 10_000), "model"),
    Body("no model", b'{"messages":[{"role":"user","content":"hi"}]}', "model"),
    Body("no messages", b'{"model":"auto"}', "messages"),
    Body("empty messages", chat(messages=[]), "messages"),
    Body("messages null", chat(messages=None), "messages"),
    Body("messages a string", chat(messages="hi"), "messages"),
    Body("10^5 messages", chat(messages=[{"role": "user", "content": ""}] * 20_000), "messages"),
    Body("message a string", chat(messages=["hi"]), "messages[0]"),
    Body("no role", _message(content="hi"), "messages[0].role"),
    Body("unknown role", _message(role="root", content="hi"), "messages[0].role"),
    Body("no content", _message(role="user"), "messages[0].content"),
    Body("assistant without content or calls", _message(role="assistant"), "messages[0].content"),
    Body("content null", _message(role="user", content=None), "messages[0].content"),
    Body("content a number", _message(role="user", content=5), "messages[0].content"),
    Body("unknown message field", _message(role="user", content="a", zap=1), "messages[0].zap"),
    *(Body(f"tools: {name}", chat(**fields), param, code) for name, param, code, fields in _TOOLS),
    Body("call of a user", _message(role="user", content="a", tool_calls=[_CALLED]), "messages[0].tool_calls"),
    Body(
        "call without a function",
        _message(role="assistant", tool_calls=[{"id": "1"}]),
        "messages[0].tool_calls[0].function",
    ),
    Body(
        "call with broken arguments",
        _message(role="assistant", tool_calls=[{"id": "1", "function": {"name": "f", "arguments": "{"}}]),
        "messages[0].tool_calls[0].function.arguments",
    ),
    Body(
        "image part",
        _message(role="user", content=[{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]),
        "messages[0].content[0].type",
        UNSUPPORTED,
    ),
    Body(
        "audio part",
        _message(role="user", content=[{"type": "text", "text": "a"}, {"type": "input_audio", "input_audio": {}}]),
        "messages[0].content[1].type",
        UNSUPPORTED,
    ),
    Body("text part without text", _message(role="user", content=[{"type": "text"}]), "messages[0].content[0].text"),
    Body("10^5 stop strings", chat(stop=["x"] * 100_000), "stop"),
    *(
        Body(f"grammar: {name}", chat(**fields), param)
        for name, param, fields in grammar_bombs.ALL
        if "10 MB" not in name
    ),
    Body("10^6 biases", chat(logit_bias={str(token): 1 for token in range(100_000)}), "logit_bias"),
    Body("bias of a word", chat(logit_bias={"hello": 1}), "logit_bias"),
    Body("bias too high", chat(logit_bias={"1": 101}), "logit_bias"),
    Body("bias a word", chat(logit_bias={"1": "x"}), "logit_bias[...]"),
    Body("10^5 stop tokens", chat(stop_token_ids=[1] * 100_000), "stop_token_ids"),
    Body("stop token below zero", chat(stop_token_ids=[-1]), "stop_token_ids"),
    Body("min_tokens over max_tokens", chat(min_tokens=9, max_tokens=8), "min_tokens"),
    Body("17 stop strings", chat(stop=["x"] * 17), "stop"),
    Body("empty stop string", chat(stop=""), "stop"),
    Body("huge stop string", chat(stop="x" * 10_000), "stop"),
    Body("stop of numbers", chat(stop=[1]), "stop[0]"),
    Body("stop an object", chat(stop={}), "stop"),
    Body("stream a string", chat(stream="yes"), "stream"),
    Body("stream_options without stream", chat(stream_options={"include_usage": True}), "stream_options"),
    Body("unknown stream option", chat(stream=True, stream_options={"zap": 1}), "stream_options.zap"),
    Body("top_logprobs without logprobs", chat(top_logprobs=2), "top_logprobs"),
    Body("top_logprobs huge", chat(logprobs=True, top_logprobs=10**6), "top_logprobs"),
    Body("logprobs a number", chat(logprobs=5), "logprobs"),
    Body("two token limits", chat(max_tokens=5, max_completion_tokens=6), "max_completion_tokens"),
    Body("unknown tier", chat(service_tier="gold"), "service_tier"),
    Body("tier a number", chat(service_tier=1), "service_tier"),
    Body("unknown tier of a completion", completion(service_tier=""), "service_tier", path=COMPLETIONS),
    *(
        Body(f"deadline {literal}", chat(causeway={"deadline_s": literal}), "causeway.deadline_s")
        for literal in (0, -1, 86401, "5", True)
    ),
    Body("bad label", chat(causeway={"label": "secret"}), "causeway.label"),
    Body("bad label in the header", chat(), "x-causeway-label", headers={"x-causeway-label": "secret"}),
    Body("unknown extension", chat(causeway={"zap": 1}), "causeway.zap"),
    Body("user a number", chat(user=5), "user"),
    Body("request id too long", chat(), "x-request-id", headers={"x-request-id": "r" * 200}),
    Body("not JSON", b"hello"),
    Body("empty body", b""),
    Body("half a JSON object", chat()[:-5]),
    Body("NaN", chat(temperature=float("nan"))),
    Body("a JSON array", b"[1,2,3]"),
    Body("invalid UTF-8", chat().replace(b"Hello", b"\xff\xfe"), "messages"),
    Body("encoded surrogate", chat().replace(b"Hello", b"\xed\xa0\x80"), "messages"),
    Body("lone surrogate", chat().replace(b"Hello", b"\\ud800")),
    Body("byte order mark", b"\xef\xbb\xbf" + chat()),
    Body("nested too deeply", b'{"model":' + b"[" * 100_000),
    Body("nested too deeply in a field", chat(user=0).replace(b"0}", b"[" * 5_000 + b"]" * 5_000 + b"}")),
    Body("text/plain", chat(), "content-type", "unsupported_media_type", 415, headers={"content-type": "text/plain"}),
    Body(
        "form",
        chat(),
        "content-type",
        "unsupported_media_type",
        415,
        headers={"content-type": "application/x-www-form-urlencoded"},
    ),
    Body(
        "latin-1",
        chat(),
        "content-type",
        "unsupported_media_type",
        415,
        headers={"content-type": "application/json; charset=latin-1"},
    ),
    Body("gzip", chat(), "content-encoding", "unsupported_media_type", 415, headers={"content-encoding": "gzip"}),
    Body("foreign Origin", chat(), "origin", "forbidden", 403, headers={"origin": "https://evil.example"}),
    Body("null Origin", chat(), "origin", "forbidden", 403, headers={"origin": "null"}),
    Body("foreign Host", chat(), "host", "forbidden", 403, headers={"host": "evil.example"}),
    Body("no prompt", b'{"model":"auto"}', "prompt", path=COMPLETIONS),
    Body("empty prompt", completion(prompt=""), "prompt", path=COMPLETIONS),
    Body("prompt a number", completion(prompt=5), "prompt", path=COMPLETIONS),
    Body("token ids", completion(prompt=[1, 2, 3]), "prompt", UNSUPPORTED, path=COMPLETIONS),
    Body("10^5 prompts", completion(prompt=["x"] * 100_000), "prompt", UNSUPPORTED, path=COMPLETIONS),
    Body("echo", completion(echo=True), "echo", UNSUPPORTED, path=COMPLETIONS),
    Body("best_of", completion(best_of=5), "best_of", UNSUPPORTED, path=COMPLETIONS),
    Body("best_of true", completion(best_of=True), "best_of", UNSUPPORTED, path=COMPLETIONS),
    Body("suffix", completion(suffix="x"), "suffix", UNSUPPORTED, path=COMPLETIONS),
    Body("logprobs a bool", completion(logprobs=True), "logprobs", path=COMPLETIONS),
    Body("logprobs huge", completion(logprobs=10**6), "logprobs", path=COMPLETIONS),
    Body("messages to completions", completion(messages=[]), "messages", path=COMPLETIONS),
    Body("unknown model", completion(model="gpt-17"), "model", "model_not_found", 404, COMPLETIONS),
)


def _post(*headers: str, body: bytes = chat(), target: str = CHAT) -> bytes:
    lines = [f"POST {target} HTTP/1.1", "content-type: application/json", f"content-length: {len(body)}", *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def _get(target: str, host: str) -> bytes:
    return f"GET {target} HTTP/1.1\r\nhost: {host}\r\n\r\n".encode()


_REFUSED = frozenset({400, 401, 403, 404, 421})

REQUESTS: tuple[Raw, ...] = (
    Raw("no Host", _post(), _REFUSED),
    Raw("two Hosts", _post("host: 127.0.0.1:{port}", "host: evil.example"), _REFUSED),
    Raw("two equal Hosts", _post("host: 127.0.0.1:{port}", "host: 127.0.0.1:{port}"), _REFUSED),
    Raw("empty Host", _post("host:"), _REFUSED),
    Raw("rebound name", _post("host: 127.0.0.1.nip.io:{port}"), _REFUSED),
    Raw("Host with userinfo", _post("host: 127.0.0.1@evil.example"), _REFUSED),
    Raw("Host with a query", _post("host: 127.0.0.1/?"), _REFUSED),
    Raw("Host with a fragment", _post("host: 127.0.0.1#"), _REFUSED),
    Raw("Host with a path", _get("/v1/models", "a/health?b="), _REFUSED),
    Raw("Host not ASCII", _post("host: 127.0.0.1\xe9"), _REFUSED),
    Raw("Host with a bad port", _post("host: 127.0.0.1:99999999"), _REFUSED),
    Raw("target @host", _get("@evil.example/v1/models", "127.0.0.1:{port}"), _REFUSED),
    Raw("HTTP/1.0 without Host", b"GET /v1/models HTTP/1.0\r\n\r\n", _REFUSED),
    Raw("two Origins", _post("host: 127.0.0.1", "origin: http://a.example", "origin: http://b.example"), _REFUSED),
    Raw("not HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n", _REFUSED),
    Raw("1 MB header", _post("host: 127.0.0.1", "x-a: " + "a" * 1_000_000), frozenset({400, 431})),
    Raw("10^4 headers", _post("host: 127.0.0.1", *(f"x-{at}: a" for at in range(10_000))), frozenset({400, 431})),
    Raw("negative length", _post("host: 127.0.0.1").replace(b"content-length: ", b"content-length: -"), _REFUSED),
    Raw(
        "length and chunked",
        _post("host: 127.0.0.1", "transfer-encoding: chunked"),
        _REFUSED,
    ),
    Raw(
        "chunks that lie",
        b"POST " + CHAT.encode() + b" HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        b"transfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        _REFUSED,
    ),
)


async def exchange(port: int, data: bytes, *, limit_s: float = HANG_S) -> bytes:
    """Send raw bytes, read until the server closes or has answered; a reset after the answer is no matter."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = b""
    try:
        async with asyncio.timeout(limit_s):
            try:
                writer.write(data.replace(b"{port}", str(port).encode()))
                await writer.drain()
                while not _complete(answer):
                    piece = await reader.read(65536)
                    if not piece:
                        break
                    answer += piece
            except ConnectionError:
                pass
    finally:
        writer.close()
    return answer


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def _complete(answer: bytes) -> bool:
    head, found, body = answer.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if found and line.startswith(b"content-length:"):
            return len(body) >= int(line.split(b":")[1])
    return False
