"""Where tests get models from: a tiny GGUF file, and a server on loopback that keeps or breaks its word on demand."""

import json
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def gguf_text(key: str, value: str) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<IQ", 8, len(value)) + value.encode()


def gguf_number(key: str, value: int) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<II", 4, value)


def model_bytes(padding: int = 100_000, template: str = TEMPLATE) -> bytes:
    """A GGUF file without tensors that passes every check: 2 layers of 4 heads of 8, 64 tokens of context."""
    entries = [
        gguf_text("general.architecture", "llama"),
        gguf_text("general.license", "mit"),
        gguf_text("tokenizer.chat_template", template),
        gguf_number("general.file_type", 15),
        gguf_number("llama.block_count", 2),
        gguf_number("llama.context_length", 64),
        gguf_number("llama.embedding_length", 32),
        gguf_number("llama.attention.head_count", 4),
        gguf_number("llama.attention.head_count_kv", 2),
    ]
    return (
        b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries)) + b"".join(entries) + bytes(i % 251 for i in range(padding))
    )


class Origin:
    """A server of one file under every path, but for the names of `files`, and of listings under /api.

    `cut` are the bytes after which each of the next replies breaks off, `statuses` what the next ones answer instead;
    `seen` are path, range and credential of each request."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.files: dict[str, bytes] = {}
        self.cut: list[int] = []
        self.statuses: list[int] = []
        self.headers: dict[str, str] = {}
        self.redirects: dict[str, str] = {}
        self.declared: int | None = None
        self.tag: str | None = '"v1"'
        self.obeys_ranges = True
        self.listing: object = []
        self.token: str | None = None
        self.seen: list[tuple[str, str | None, str | None]] = []

    @property
    def ranges(self) -> list[str | None]:
        return [wanted for _, wanted, _ in self.seen]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path, wanted = handler.path, handler.headers.get("range")
        self.seen.append((path, wanted, handler.headers.get("authorization")))
        if self.token is not None and handler.headers.get("authorization") != f"Bearer {self.token}":
            return self._plain(handler, 401)
        if self.statuses:
            return self._plain(handler, self.statuses.pop(0))
        if path in self.redirects:
            return self._plain(handler, 302, {"location": self.redirects[path]})
        if path.startswith("/api/"):
            return self._plain(handler, 200, body=json.dumps(self.listing).encode())
        return self._file(handler, wanted)

    def _file(self, handler: BaseHTTPRequestHandler, wanted: str | None) -> None:
        start = 0
        if self.obeys_ranges and wanted and handler.headers.get("if-range") == self.tag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        content = self.files.get(handler.path.rpartition("/")[2], self.content)
        body = content[start:]
        headers = {"content-length": str(len(body) if self.declared is None else self.declared)}
        if self.tag:
            headers["etag"] = self.tag
        if start:
            headers["content-range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._plain(handler, 206 if start else 200, headers, body[: self.cut.pop(0)] if self.cut else body)

    def _plain(
        self, handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str] | None = None, body: bytes = b""
    ) -> None:
        handler.send_response(status)
        for name, value in ({"content-length": str(len(body))} | (headers or {}) | self.headers).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)


@contextmanager
def serving(origin: Origin) -> Iterator[str]:
    """The origin on a free port of loopback; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            origin.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
