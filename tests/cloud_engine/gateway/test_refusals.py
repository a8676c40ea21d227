import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from cloud_engine.gateway.refusals import MAX_RETRY_AFTER, broken_off, refused
from shared.errors import ContextTooLong, Overloaded, RateLimited
from shared.replies import error_body, error_object

FIELDS = {"model": "m", "messages": [], "temperature": 1.0}
SECRET = "the prompt and sk-key"


def shaped(**error: Any) -> bytes:
    return json.dumps({"error": error}).encode()


CASES: list[tuple[str, int, bytes, str, str | None]] = [
    ("causeway", 400, shaped(code="bad_request", param="temperature", message=SECRET), "bad_request", "temperature"),
    ("a part", 400, shaped(param="messages[0].role"), "bad_request", "messages[0].role"),
    ("no field of ours", 400, shaped(param="sk_key", message=SECRET), "bad_request", None),
    ("context by code", 400, shaped(code="context_length_exceeded"), "context_length_exceeded", "messages"),
    (
        "vllm",
        400,
        json.dumps({"object": "error", "message": f"{SECRET} maximum context length is 9", "code": 400}).encode(),
        "context_length_exceeded",
        "messages",
    ),
    ("llama-server", 400, shaped(type="exceed_context_size_error", code=400), "context_length_exceeded", "messages"),
    (
        "tgi",
        422,
        json.dumps({"error": "`inputs` tokens + `max_new_tokens` must be <= 9", "error_type": "validation"}).encode(),
        "context_length_exceeded",
        "messages",
    ),
    ("tgi other", 422, b'{"error": "x", "error_type": "validation"}', "bad_request", None),
    ("key", 401, shaped(message=SECRET), "upstream_failed", None),
    ("forbidden", 403, b'{"error":"Unauthorized"}', "upstream_failed", None),
    ("model", 404, shaped(message="The model `x` does not exist."), "model_not_found", "model"),
    ("path", 404, b'{"detail":"Not Found"}', "upstream_failed", None),
    ("html", 404, b"<html>model</html>", "upstream_failed", None),
    ("large", 413, b"", "too_large", None),
    ("rate", 429, b"{}", "rate_limited", None),
    ("full", 503, b"null", "overloaded", None),
    ("gateway", 504, b"[]", "deadline_exceeded", None),
    ("redirect", 307, b"", "upstream_failed", None),
    ("teapot", 418, b"\xff\xfe", "upstream_failed", None),
    ("broken", 500, b"[" * 100_000, "upstream_failed", None),
]


@pytest.mark.parametrize(("name", "status", "body", "code", "param"), CASES, ids=[case[0] for case in CASES])
def test_a_refusal_becomes_our_error(name: str, status: int, body: bytes, code: str, param: str | None) -> None:
    """Status and error object of every known server, and of none; nothing that the upstream wrote is repeated."""
    error = refused(status, body, None, fields=FIELDS)

    assert (error.code, error.param, error.source) == (code, param, "cloud")
    assert "sk-key" not in str(error_object(error))
    assert "prompt and" not in str(error_object(error))


NOW = datetime(2026, 11, 21, tzinfo=UTC)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7.0),
        (" 2.5 ", 2.5),
        ("-3", 0.0),
        ("1e99", MAX_RETRY_AFTER),
        ("nan", None),
        ("soon", None),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), 90.0),
        (format_datetime(NOW - timedelta(days=9), usegmt=True), 0.0),
        (None, None),
    ],
)
def test_retry_after_is_kept_within_reason(header: str | None, seconds: float | None) -> None:
    """Seconds or a date; at least 0, at most an hour; rubbish is as good as nothing."""
    error = refused(429, b"", header, fields={}, now=NOW)

    assert isinstance(error, RateLimited)
    assert error.retry_after == seconds


def test_retry_after_may_be_in_the_body() -> None:
    """Another Causeway says it there too, with fractions."""
    body = error_body(Overloaded("full", retry_after=0.25))
    assert refused(503, body, None, fields={}).retry_after == 0.25


@pytest.mark.parametrize(
    ("event", "code"),
    [
        ({"error": {"code": 400, "message": "bad"}}, "bad_request"),
        ({"object": "error", "message": "x", "code": 503}, "overloaded"),
        (error_object(ContextTooLong("x")), "context_length_exceeded"),
        (error_object(RateLimited("x")), "rate_limited"),
        ({"error": "x", "error_type": "overloaded"}, "overloaded"),
        ({"error": "x", "error_type": "generation"}, "upstream_failed"),
        ({"error": {"code": True}}, "upstream_failed"),
        ({"error": {"code": 200}}, "upstream_failed"),
        ({"error": [1]}, "upstream_failed"),
    ],
)
def test_an_error_in_a_stream_becomes_ours(event: dict[str, Any], code: str) -> None:
    """There is no status: the code, number or word, stands for it."""
    assert broken_off(event, FIELDS).code == code
