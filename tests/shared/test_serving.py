import asyncio
import os
import signal
import socket
import ssl
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from serving import served
from waiting import HANG_S

from shared.binding import Tls, check_bind, is_loopback
from shared.config import InvalidSettings
from shared.serving import serve

SERVER = """
import asyncio, sys
from shared.serving import serve

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"one", "more_body": True})
    try:
        await release.wait()
        end = b"two"
    except asyncio.CancelledError:
        end = b"cut"
    await send({"type": "http.response.body", "body": end})

async def drain():
    print("draining", flush=True)
    if sys.argv[1] == "finish":
        release.set()
        await asyncio.sleep(0)
    else:
        await asyncio.Event().wait()

async def main():
    global release
    release = asyncio.Event()
    await serve(app, "127.0.0.1", 0, drain=drain, drain_s=float(sys.argv[2]))

asyncio.run(main())
print("bye", flush=True)
"""


async def hello(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": scope["scheme"].encode()})


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.5", False),
        ("localhost.evil.example", False),
        ("", False),
    ],
)
def test_beyond_loopback_only_with_keys_and_tls(host: str, loopback: bool) -> None:
    """S-08: every other combination refuses to start, naming what is missing."""
    assert is_loopback(host) == loopback
    check_bind(host, tls=True, keys=True)
    for tls, keys in ((False, False), (True, False), (False, True)):
        if loopback:
            check_bind(host, tls=tls, keys=keys)
        else:
            with pytest.raises(InvalidSettings, match="TLS" if not tls else "keys"):
                check_bind(host, tls=tls, keys=keys)


async def test_a_taken_port_is_a_typed_error() -> None:
    """The address is in the message; nothing is left open."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidSettings, match=str(port)):
            await serve(hello, "127.0.0.1", port, stop=asyncio.Event())


@pytest.mark.parametrize("host", ["no.such.name.invalid", "203.0.113.7"])
async def test_an_address_that_is_not_ours_is_a_typed_error(host: str) -> None:
    """Neither an unknown name nor another machine's address."""
    with pytest.raises(InvalidSettings, match="cannot listen"):
        await serve(hello, host, 0, stop=asyncio.Event())


async def test_tls_is_served(tmp_path: Path) -> None:
    """With a certificate the server speaks HTTPS, and only that."""
    authority = trustme.CA()
    own = authority.issue_cert("127.0.0.1")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    own.cert_chain_pems[0].write_to_path(str(cert))
    own.private_key_pem.write_to_path(str(key))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    async with served(hello, tls=Tls(cert, key)) as port, httpx.AsyncClient(verify=context) as client:
        assert (await client.get(f"https://127.0.0.1:{port}/")).text == "https"
        with pytest.raises(httpx.TransportError):
            await client.get(f"http://127.0.0.1:{port}/")


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_pieces_of_a_stream_arrive_as_they_were_sent(method: str) -> None:
    """Chunks of any size, empty ones among them, on a connection that goes on to the next request."""
    pieces = [b"a", b"", b"0\r\n\r\n", b"x" * 70000]

    async def streams(scope: Any, _: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"end"})

    async with served(streams) as port, httpx.AsyncClient() as client:
        for _ in range(2):
            found = await client.request(method, f"http://127.0.0.1:{port}/")
            assert found.headers["transfer-encoding"] == "chunked"
            assert found.content == (b"".join(pieces) + b"end" if method == "GET" else b"")
        old = await raw(port, b"GET / HTTP/1.0\r\nhost: a\r\n\r\n")
        assert old.endswith(b"\r\n\r\n" + b"".join(pieces) + b"end")


async def raw(port: int, request: bytes) -> bytes:
    """All that comes until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    said = await asyncio.wait_for(reader.read(), HANG_S)
    writer.close()
    return said


async def test_connections_are_kept_alive() -> None:
    """Two requests of one client use one connection: it is not closed in between."""
    async with served(hello) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):
            writer.write(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert (await reader.readuntil(b"0\r\n\r\n")).startswith(b"HTTP/1.1 200")
        writer.close()


async def started(
    mode: str, limit: str
) -> tuple[asyncio.subprocess.Process, asyncio.StreamReader, asyncio.StreamWriter]:
    """A server process with one request half answered."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVER, mode, limit, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode().strip()
    assert line.startswith("listening on http://127.0.0.1:")
    reader, writer = await asyncio.open_connection("127.0.0.1", int(line.rpartition(":")[2]))
    writer.write(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
    await reader.readuntil(b"one")
    return process, reader, writer


@pytest.mark.parametrize(
    ("mode", "limit", "number", "end"),
    [
        ("finish", "20", signal.SIGTERM, b"two"),
        ("finish", "20", signal.SIGINT, b"two"),
        ("hang", "0.2", signal.SIGTERM, b"cut"),
    ],
)
async def test_a_signal_drains_then_ends(mode: str, limit: str, number: int, end: bytes) -> None:
    """The process says where it listens, finishes what runs within the limit, and exits 0."""
    process, reader, writer = await started(mode, limit)
    os.kill(process.pid, number)
    async with asyncio.timeout(HANG_S):
        assert end in await reader.read()
        assert process.stdout is not None
        assert (await process.stdout.read()).decode().split() == ["draining", "bye"]
        assert await process.wait() == 0
    writer.close()


async def test_a_second_signal_does_not_wait() -> None:
    """Who is in a hurry asks twice."""
    process, reader, writer = await started("hang", "600")
    os.kill(process.pid, signal.SIGTERM)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"draining\n"
    os.kill(process.pid, signal.SIGTERM)
    async with asyncio.timeout(HANG_S):
        assert b"cut" in await reader.read()
        assert await process.wait() == 0
    writer.close()
