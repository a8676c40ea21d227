from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import BadRequest, CausewayError, Forbidden, TooLarge, UnsupportedMedia
from shared.guard import MAX_HEADERS, Guard, Guarded, HeadersTooLarge, error_headers, typed

GOOD = {b"host": b"127.0.0.1:8484", b"content-type": b"application/json"}


def scope(*extra: tuple[bytes, bytes], method: str = "POST", kind: str = "http", **replaced: bytes | None) -> Any:
    headers = {**GOOD, **{name.replace("_", "-").encode(): value for name, value in replaced.items()}}
    listed = [(name, value) for name, value in headers.items() if value is not None]
    return {"type": kind, "method": method, "headers": [*listed, *extra]}


@pytest.mark.parametrize(
    ("replaced", "error"),
    [
        ({"host": b"evil.example"}, Forbidden),
        ({"host": b"127.0.0.1.evil.example"}, Forbidden),
        ({"host": b"localhost."}, Forbidden),
        ({"host": b"127.0.0.1:"}, Forbidden),
        ({"host": b"[::2]"}, Forbidden),
        ({"host": b"\xff"}, Forbidden),
        ({"host": None}, Forbidden),
        ({"origin": b"http://127.0.0.1:8485"}, Forbidden),
        ({"origin": b"https://127.0.0.1:8484"}, Forbidden),
        ({"origin": b"http://localhost:8484"}, Forbidden),
        ({"origin": b"null"}, Forbidden),
        ({"content_type": None}, UnsupportedMedia),
        ({"content_type": b"application/json; charset=utf-16"}, UnsupportedMedia),
        ({"content_type": b"application/jsonp"}, UnsupportedMedia),
        ({"content_encoding": b"gzip"}, UnsupportedMedia),
        ({"content_length": b"4194305"}, TooLarge),
        ({"content_length": b"9" * 5000}, TooLarge),
        ({"content_length": b"5", "transfer_encoding": b"chunked"}, BadRequest),
        ({"x_large": b"a" * 40_000}, HeadersTooLarge),
    ],
)
def test_what_the_headers_alone_forbid(replaced: dict[str, bytes | None], error: type[CausewayError]) -> None:
    """Each is refused with its own type before a byte of the body is read."""
    with pytest.raises(error):
        Guard().check(scope(**replaced))


def test_too_many_headers() -> None:
    """However short they are."""
    with pytest.raises(HeadersTooLarge):
        Guard().check(scope(*[(b"a", b"b")] * MAX_HEADERS))


@pytest.mark.parametrize(
    "replaced",
    [
        {},
        {"content_type": b"APPLICATION/JSON ; charset=UTF-8"},
        {"content_type": b'application/json; charset="utf-8"'},
        {"content_encoding": b"identity"},
        {"content_length": b"4194304"},
        {"host": b"[::1]:1"},
    ],
)
def test_what_is_let_in(replaced: dict[str, bytes]) -> None:
    """Ordinary clients' ways of saying the same."""
    Guard().check(scope(**replaced))


def test_our_own_page_may_use_us_over_http_alone() -> None:
    """S-03: its Origin is ours; a WebSocket takes allow-listed ones only."""
    own = scope(origin=b"http://127.0.0.1:8484")
    Guard().check(own)
    with pytest.raises(Forbidden):
        Guard().check({**own, "type": "websocket"})


def test_reading_needs_no_content_type() -> None:
    """GET has no body; an upgrade neither."""
    Guard().check(scope(method="GET", content_type=None))
    Guard().check({**scope(content_type=None), "type": "websocket"})


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40))
def test_only_the_names_listed_are_hosts(host: bytes) -> None:
    """No other bytes are taken for one of our names."""
    names = (b"localhost", b"127.0.0.1", b"[::1]")
    name, _, port = host.lower().rpartition(b":") if host.lower() not in names else (host.lower(), b"", b"1")
    ours = name in names and port.isdigit() and len(port) <= 5
    try:
        Guard().check(scope(host=host))
    except Forbidden:
        assert not ours
    else:
        assert ours


async def test_other_scopes_pass() -> None:
    """The lifespan is none of the guard's business."""
    seen: list[str] = []

    async def app(inner: Any, receive: Any, send: Any) -> None:
        seen.append(inner["type"])

    guarded: Any = Guarded(app, guard=Guard(), source="edge")
    await guarded({"type": "lifespan"}, None, None)
    assert seen == ["lifespan"]


def test_retry_after_is_whole_seconds_and_never_zero() -> None:
    """A header of 0 would be an invitation to hammer."""
    for seconds, expected in ((0.01, b"1"), (1.0, b"1"), (1.01, b"2")):
        error = CausewayError("x", retry_after=seconds)
        assert (b"retry-after", expected) in error_headers(error, b"{}")


def test_a_foreign_exception_loses_its_text() -> None:
    """Only its place is known outside; a typed error stays what it is."""
    assert "prompt" not in str(typed(ValueError("my prompt"), "edge"))
    error = Forbidden("x", source="cloud")
    assert typed(error, "edge") is error
    assert error.source == "cloud"
