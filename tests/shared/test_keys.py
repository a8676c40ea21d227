import hashlib
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest

from shared.config import InvalidSettings
from shared.errors import Unauthorized
from shared.keys import Keys, key_id, new_key

NOW = datetime(2026, 11, 21, tzinfo=UTC)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "sub" / "keys"


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def test_a_new_key_opens_and_only_its_hash_is_kept(file: Path) -> None:
    """The file has mode 0600 and not the secret; the key names its tenant."""
    one, two = new_key(file, "a", now=NOW), new_key(file, "b", now=NOW)
    keys = Keys(file, source="cloud")

    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [keys.tenant_of(bearer(token)) for token in (one, two)] == ["a", "b"]
    assert len(keys) == 2
    secret = one.rsplit("_", 1)[1]
    assert len(secret) == 64
    assert secret not in file.read_text()
    assert hashlib.sha256(secret.encode()).hexdigest() in file.read_text()


def test_keys_are_random(file: Path) -> None:
    """No two are alike."""
    assert len({new_key(file, "a", now=NOW) for _ in range(50)}) == 50


def test_whatever_is_not_a_key_is_refused(file: Path) -> None:
    """Every wrong credential, hostile ones too, gets one and the same answer."""
    token = new_key(file, "a", now=NOW)
    other = new_key(file.with_name("other"), "a", now=NOW)
    keys = Keys(file, source="cloud")
    _, key_id, secret = token.split("_")
    wrong = [
        "",
        "Bearer",
        "Bearer ",
        f"Basic {token}",
        token,
        f"Bearer {other}",
        f"Bearer cw_{key_id}_{secret[:-1]}0" if secret[-1] != "0" else f"Bearer cw_{key_id}_{secret[:-1]}1",
        f"Bearer cw_{key_id}_",
        f"Bearer cw_{key_id}_{secret.upper()}x",
        f"Bearer cw_{'0' * 16}_{secret}",
        f"Bearer {token} {token}",
        f"Bearer {token}\x00",
        "Bearer x' OR (SELECT pg_sleep(8))--",
        "Bearer " + "A" * 1_000_000,
        "Bearer cw_" + "é" * 16 + "_" + "é" * 64,
    ]
    messages = set()
    for value in wrong:
        with pytest.raises(Unauthorized) as refused:
            keys.tenant_of({"authorization": value})
        messages.add(str(refused.value))
    with pytest.raises(Unauthorized):
        keys.tenant_of({})
    assert len(messages) == 1
    assert keys.tenant_of({"authorization": f"bEARER  {token} "}) == "a"


def test_the_comparison_is_made_for_unknown_ids_too(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong id and a wrong secret do the same work: one hash, one constant-time comparison."""
    import shared.keys as auth

    token = new_key(file, "a", now=NOW)
    keys = Keys(file, source="cloud")
    calls: list[tuple[int, int]] = []
    real = auth.hmac.compare_digest

    def counting(left: str, right: str) -> bool:
        calls.append((len(left), len(right)))
        return real(left, right)

    monkeypatch.setattr(auth.hmac, "compare_digest", counting)
    for value in (f"cw_{'0' * 16}_{'0' * 64}", token[:-64] + "0" * 64, "rubbish"):
        with pytest.raises(Unauthorized):
            keys.tenant_of(bearer(value))
    assert calls == [(64, 64)] * 3


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o602])
def test_a_file_that_others_may_read_is_refused(file: Path, mode: int) -> None:
    """Neither read nor added to; the message says what to do."""
    new_key(file, "a", now=NOW)
    file.chmod(mode)
    with pytest.raises(InvalidSettings, match="chmod 600"):
        Keys(file, source="cloud")
    with pytest.raises(InvalidSettings, match="chmod 600"):
        new_key(file, "a", now=NOW)


def test_a_file_that_holds_no_keys_is_refused(tmp_path: Path) -> None:
    """Missing, empty, a folder, or something else: the server must not start open."""
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.touch(0o600)
    broken.touch(0o600)
    broken.write_text('{"id": "x"}\n')
    for path, text in (
        (tmp_path / "none", "No such file"),
        (empty, "no key"),
        (broken, "line 1"),
        (tmp_path, "directory"),
    ):
        with pytest.raises(InvalidSettings, match=text):
            Keys(path, source="cloud")


def test_a_link_is_not_followed_when_a_key_is_added(tmp_path: Path) -> None:
    """Nobody can have us append to another file."""
    target, link = tmp_path / "target", tmp_path / "link"
    target.touch(0o600)
    link.symlink_to(target)
    with pytest.raises(InvalidSettings):
        new_key(link, "a", now=NOW)
    assert target.read_bytes() == b""


@pytest.mark.parametrize("tenant", ["", "a b", "a\n", "x" * 65, '"', "é"])
def test_a_tenant_is_a_plain_name(file: Path, tenant: str) -> None:
    """It goes into logs and tables."""
    with pytest.raises(InvalidSettings) as refused:
        new_key(file, tenant, now=NOW)
    assert refused.value.param == "tenant"


def test_changes_are_followed(file: Path) -> None:
    """A key added while serving works, one removed stops working, a broken or readable file changes nothing."""
    one = new_key(file, "a", now=NOW)
    keys = Keys(file, source="cloud")
    two = new_key(file, "b", now=NOW)
    assert keys.tenant_of(bearer(two)) == "b"

    file.write_text(file.read_text().splitlines()[1] + "\n")
    with pytest.raises(Unauthorized):
        keys.tenant_of(bearer(one))
    assert keys.tenant_of(bearer(two)) == "b"

    file.write_text("rubbish\n")
    assert keys.tenant_of(bearer(two)) == "b"
    file.chmod(0o644)
    assert keys.tenant_of(bearer(two)) == "b"
    file.unlink()
    assert keys.tenant_of(bearer(two)) == "b"


def test_the_id_of_a_key_tells_which_one_was_shown(file: Path) -> None:
    """From either header; nothing of a credential of another shape, which may be a secret whole."""
    key = new_key(file, "a", now=NOW)
    assert key_id(bearer(key)) == key_id({"x-api-key": key}) == key.split("_")[1]
    for other in ("", "sk-" + "a" * 40, key + "x", "cw_1_2", key[:-1]):
        assert key_id(bearer(other)) == ""
