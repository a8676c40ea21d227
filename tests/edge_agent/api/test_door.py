"""The daemon's door, in front of every route there is: the list is taken from the application itself."""

import asyncio
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import websockets
from bad_input import exchange, status_of
from edge_apps import TOKEN, Edge, edge
from edge_sides import Local
from fakes import EchoAnswer
from starlette.routing import Route
from waiting import HANG_S

from edge_agent.api.access import Access
from edge_agent.api.credentials import client_token

SECRET = "of-this-user"
OPEN = {"/", "/health"}
"""What says that somebody is there, and no more; all else needs a key where one is required."""
SOCKET = "/v1/responses"
REFUSED = {400, 403, 421}
HELLO: list[Any] = [{"role": "user", "content": "hi"}]
ASKING: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": HELLO, "max_tokens": 4},
    "/v1/messages/count_tokens": {"messages": HELLO},
    "/api/chat": {"messages": HELLO},
    "/api/generate": {"prompt": "hi"},
}


def routes(it: Edge) -> list[tuple[str, str]]:
    """Method and path of everything that is served, names in paths filled in."""
    found = [route for route in it.app.router.routes if isinstance(route, Route)]
    pairs = {(method, re.sub(r"\{[^}]*\}", "x", route.path)) for route in found for method in route.methods or ()}
    assert len(pairs) > 30
    return sorted(pairs)


def raw(method: str, path: str, *headers: str, body: bytes = b"{}") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "content-type: application/json", f"content-length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@pytest.mark.parametrize(
    "hosts",
    [["evil.example:{port}"], ["127.0.0.1.nip.io:{port}"], ["127.0.0.1:{port}", "evil.example"], []],
    ids=["foreign", "rebound", "two", "none"],
)
async def test_only_our_own_name_is_served(tmp_path: Path, hosts: list[str]) -> None:
    """S-01, S-02: a foreign Host, a name that resolves to us, two Hosts or none: refused on every route."""
    async with edge(tmp_path, EchoAnswer()) as it:
        for method, path in routes(it):
            reply = await exchange(it.port, raw(method, path, *(f"host: {host}" for host in hosts)))
            assert status_of(reply) in REFUSED, (method, path)


async def test_foreign_pages_and_simple_requests_are_refused(tmp_path: Path) -> None:
    """S-04, S-05, S-06: a foreign Origin by any method is 403 without a word of permission; a body that is not JSON is
    415; no side is asked."""
    local = Local(EchoAnswer())
    foreign = {"origin": "https://evil.example"}
    async with edge(tmp_path, local) as it, it.http() as http:
        for method, path in routes(it):
            for kind in ("application/json", "text/plain"):
                reply = await http.request(method, path, content=b"{}", headers={**foreign, "content-type": kind})
                assert reply.status_code == 403, (method, path)
                assert not [name for name in reply.headers if name.startswith("access-control")], (method, path)
            if method in ("POST", "PUT", "PATCH"):
                for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
                    reply = await http.request(method, path, content=b"{}", headers={"content-type": kind})
                    assert reply.status_code == 415, (method, path, kind)
            reply = await http.options(path, headers={**foreign, "access-control-request-method": "POST"})
            assert reply.status_code == 403

    assert not local.inner.requests  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "evil.example"}, 403),
        ({"authorization": "Bearer wrong"}, 401),
    ],
)
async def test_a_websocket_is_as_well_guarded(tmp_path: Path, headers: dict[str, str], status: int) -> None:
    """S-03: Origin, Host and key are looked at before the upgrade; with the right key and no Origin it opens."""
    async with edge(tmp_path, EchoAnswer(), keys=Access(token=SECRET)) as it:
        url = f"ws://127.0.0.1:{it.port}{SOCKET}"
        good = {"authorization": f"Bearer {SECRET}"}
        sent = {"host": headers.get("host", f"127.0.0.1:{it.port}"), **good, **headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in sent.items())
        upgrade = "upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\n"
        request = f"GET {SOCKET} HTTP/1.1\r\n{lines}{upgrade}sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        assert status_of(await exchange(it.port, request.encode())) == status
        async with websockets.connect(url, additional_headers=good) as opened:
            await opened.send("{}")
            assert json.loads(await opened.recv())["type"] == "error"


async def test_every_route_asks_for_the_key_where_one_is_required(tmp_path: Path) -> None:
    """S-07: without it, or with a wrong one, 401 on every route but those that only say that somebody is there; with
    it, however it is shown, never 401. Administration has a token of its own, always."""
    local = Local(EchoAnswer())
    good = [{"authorization": f"Bearer {SECRET}"}, {"x-api-key": SECRET}]
    bad = [{}, {"authorization": "Bearer wrong"}, {"x-api-key": "wrong"}, {"authorization": f"Basic {SECRET}"}]
    async with edge(tmp_path, local, keys=Access(token=SECRET)) as it, it.http() as http:
        for method, path in routes(it):
            if path in OPEN:
                assert (await http.request(method, path)).status_code == 200
                continue
            if path.startswith(("/api/blobs", "/api/copy", "/api/create", "/api/delete", "/api/push")):
                continue  # nothing is there for anybody
            own = path.startswith("/admin") or path == "/api/pull"
            for headers in [*bad, *(good if own else ())]:
                reply = await http.request(method, path, content=b"{}", headers=headers)
                assert reply.status_code == 401, (method, path, headers)
            for headers in [{"authorization": f"Bearer {TOKEN}"}] if own else good:
                reply = await http.request(method, path, content=b"{}", headers=headers)
                assert reply.status_code not in (401, 403), (method, path, headers)

    assert not local.inner.requests  # type: ignore[attr-defined]


def test_the_clients_token_is_this_users_alone(tmp_path: Path) -> None:
    """S-09: mode 0600, made once, and another one than the administration's."""
    token = client_token(tmp_path)

    assert (tmp_path / "client.token").stat().st_mode & 0o777 == 0o600
    assert client_token(tmp_path) == token
    assert not (tmp_path / "admin.token").exists()


NAMES = [
    "../../etc/passwd", "..%2f..%2fetc%2fpasswd", "/etc/passwd", "sha256:../../x", "a\x00b", "small\x00", "..", ".",
    "~/.ssh/id_rsa", "file:///etc/passwd", "small/../../etc/passwd", "\\\\host\\share", "a" * 10_000,
]  # fmt: skip


async def test_a_model_is_a_name_and_never_a_path(tmp_path: Path) -> None:
    """S-12: on every surface that takes one, a path is an unknown name, and no side is asked."""
    local = Local(EchoAnswer())
    async with edge(tmp_path, local) as it, it.http() as http:
        for name in NAMES:
            for path, body in ASKING.items():
                if path.endswith("count_tokens"):
                    continue  # counts for whichever model is here
                reply = await http.post(path, json={**body, "model": name})
                assert reply.status_code in (400, 404), (path, name)
            shown = await http.post("/api/show", json={"model": name})
            assert shown.status_code in (400, 404), name
            if "\x00" not in name:
                found = await http.get(f"/v1/models/{name}")
                assert found.status_code in (200, 400, 404, 431), name
                assert "root:" not in found.text

    assert not local.inner.requests  # type: ignore[attr-defined]


async def test_an_encoded_or_oversized_body_is_not_read(tmp_path: Path) -> None:
    """S-15, S-20: a gzip bomb is refused by its header, a body over the limit by its length or as it comes."""
    local = Local(EchoAnswer())
    bomb = gzip.compress(b" " * (8 << 20))
    async with edge(tmp_path, local) as it, it.http() as http:
        for path in ASKING:
            reply = await http.post(path, content=bomb, headers={"content-encoding": "gzip"})
            assert reply.status_code == 415, path
            declared = raw("POST", path, "host: 127.0.0.1").replace(b"content-length: 2", b"content-length: 999999999")
            assert status_of(await exchange(it.port, declared)) == 413, path
        long = json.dumps({"model": "auto", "prompt": "x" * (5 << 20)}).encode()
        assert (await http.post("/api/generate", content=long)).status_code == 413

    assert not local.inner.requests  # type: ignore[attr-defined]


BAD_NUMBERS = ["-1e9", "1e309", str(1 << 63), "true", '"1"', "[]", "{}", "0.5e"]
NUMBERS: dict[str, tuple[str, ...]] = {
    "/v1/chat/completions": ("temperature", "top_p", "n", "max_tokens", "seed", "top_k", "min_p", "presence_penalty"),
    "/v1/completions": ("temperature", "top_p", "max_tokens", "logprobs"),
    "/v1/responses": ("temperature", "top_p", "max_output_tokens", "top_logprobs"),
    "/v1/messages": ("temperature", "top_p", "top_k", "max_tokens"),
    "/api/chat": ("temperature", "top_p", "top_k", "min_p", "seed", "num_predict", "repeat_penalty"),
    "/api/generate": ("temperature", "num_predict", "seed"),
}


async def test_every_number_is_a_number_in_its_range(tmp_path: Path) -> None:
    """S-18: too low, too high, 2^63, bool, text, list, object, half a literal: 400 on every surface, no side asked."""
    local = Local(EchoAnswer())
    async with edge(tmp_path, local) as it, it.http() as http:
        for path, fields in NUMBERS.items():
            for field in fields:
                for value in BAD_NUMBERS:
                    if (field, value) == ("seed", "-1e9"):
                        value = "-1e99"  # any 64 bits are a seed
                    body = json.dumps({"model": "auto", **ASKING[path]})[:-1]
                    given = f'{{"{field}": {value}}}' if path.startswith("/api/") else value
                    name = "options" if path.startswith("/api/") else field
                    reply = await http.post(path, content=f'{body}, "{name}": {given}}}')
                    assert reply.status_code == 400, (path, field, value)

    assert not local.inner.requests  # type: ignore[attr-defined]


async def test_odd_texts_are_answered_or_refused_in_bounded_time(tmp_path: Path) -> None:
    """S-20: a megabyte of one character, lone surrogates, a hundred thousand special tokens."""
    async with edge(tmp_path, EchoAnswer()) as it, it.http() as http:
        for path, body in ASKING.items():
            for text, status in (("a" * (1 << 20), 200), ("<|im_end|>" * 100_000, 200), ("\ud800", 400)):
                sent = json.dumps({**body, "model": "auto"}).replace('"hi"', json.dumps(text))
                async with asyncio.timeout(HANG_S):
                    reply = await http.post(path, content=sent)
                assert reply.status_code == status, (path, text[:10])


def test_no_part_of_ours_opens_the_native_librarys_rpc() -> None:
    """S-21: neither what is installed nor what is deployed starts or mentions an rpc-server."""
    root = Path(__file__).parents[3]
    files = [
        *(root / "deploy").rglob("*"),
        root / "Makefile",
        root / "pyproject.toml",
        *(root / "edge_agent").rglob("*.py"),
    ]
    texts = [file.read_text("utf-8", "replace") for file in files if file.is_file()]

    assert len(texts) > 30
    assert not [text for text in texts if re.search(r"rpc-server|--rpc|GGML_RPC=ON", text)]
