import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keyring
import pytest
from cache_parts import entry, query
from keyring.backend import KeyringBackend
from structlog.testing import capture_logs

from edge_agent.cache.answers import AnswerCache
from edge_agent.cache.layers import open_cache
from edge_agent.cache.rows import Seal
from edge_agent.cache.secret import cache_secret
from edge_agent.settings import EdgeSettings
from shared.config import InvalidSettings
from shared.schemas import ModelCard

SECRET = "a-secret-of-thirty-two-characters"


async def names(folder: Path, **settings: Any) -> list[str]:
    cache = await opened(folder, **settings)
    if cache is None:
        return []
    layers = list(cache.stats()["layers"])
    await cache.aclose()
    return layers


def secret_file(folder: Path, secret: str = SECRET, mode: int = 0o600) -> str:
    path = folder / "cache.key"
    path.touch(mode)
    path.write_text(secret)
    path.chmod(mode)
    return str(path)


class NoEmbedding:
    """A device that has pulled no embedding model."""

    async def embed(self, texts: Sequence[str], /) -> Any:
        raise AssertionError("there is no model")

    def model_card(self) -> ModelCard | None:
        return None


async def opened(folder: Path, **settings: Any) -> AnswerCache | None:
    return await open_cache(EdgeSettings(**settings), folder, NoEmbedding())


class Ring(KeyringBackend):
    """A keyring in memory."""

    priority = 1  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[tuple[str, str], str] = {}

    def get_password(self, service: str, username: str) -> str | None:
        return self.kept.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        self.kept[service, username] = password


class Locked(Ring):
    def get_password(self, service: str, username: str) -> str | None:
        raise keyring.errors.KeyringLocked("nobody is there to unlock it")


@pytest.fixture
def use_ring(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda ring: monkeypatch.setattr(keyring.core, "_keyring_backend", ring)


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({}, ["memory", "disk", "semantic"]),
        ({"cache_memory_mb": 0}, ["disk", "semantic"]),
        ({"redis_url": "unix:///nowhere/redis.sock"}, ["memory", "disk", "redis", "semantic"]),
        ({"cache_disk_mb": 0}, ["memory", "semantic"]),
        ({"cache_disk_mb": 0, "cache_memory_mb": 0}, []),
        ({"cache": False}, []),
    ],
)
async def test_the_settings_say_which_layers_there_are(
    tmp_path: Path, settings: dict[str, Any], layers: list[str]
) -> None:
    """The fastest first; with none of them there is no cache."""
    assert await names(tmp_path, **settings) == layers


async def test_the_file_lies_in_the_state_folder_or_where_it_is_told(tmp_path: Path) -> None:
    """And what one daemon kept there, the next one finds: with the same secret."""
    file = secret_file(tmp_path)
    for folder, settings in ((tmp_path / "state", {}), (tmp_path / "other", {"cache_dir": tmp_path / "other"})):
        for use in ("miss", "hit"):
            cache = await opened(tmp_path / "state", cache_key=file, **settings)
            assert cache is not None
            store = cache._store
            assert (await store.get(query()) is not None) == (use == "hit")
            await store.put(query(), entry(created=time.time()))
            await cache.aclose()
        assert (folder / "answers.db").exists()


async def test_the_keys_are_made_with_the_secret(tmp_path: Path) -> None:
    """So that nobody can try out in the file what was asked."""
    sealed = await opened(tmp_path, cache_key=secret_file(tmp_path))
    plain = await opened(tmp_path / "plain")
    assert isinstance(sealed, AnswerCache)
    assert isinstance(plain, AnswerCache)

    assert (sealed._secret, plain._secret) == (Seal(SECRET).key_secret, b"")
    await sealed.aclose()
    await plain.aclose()


@pytest.mark.parametrize(("secret", "mode"), [("short", 0o600), ("", 0o600), (SECRET, 0o644)])
async def test_a_secret_that_is_none_does_not_start(tmp_path: Path, secret: str, mode: int) -> None:
    """Missing, too short or readable by all: the error names the setting."""
    for source in (secret_file(tmp_path, secret, mode), str(tmp_path / "nothing")):
        with pytest.raises(InvalidSettings) as refused:
            await opened(tmp_path, cache_key=source)
        assert refused.value.param == "cache_key"
        assert SECRET not in refused.value.message


async def test_the_keyring_keeps_one_secret(use_ring: Any) -> None:
    """Made at first use, the same from then on."""
    ring = Ring()
    use_ring(ring)

    first, second = await cache_secret("keyring"), await cache_secret("keyring")

    assert first == second
    assert first is not None
    assert len(first) == 64
    assert list(ring.kept) == [("causeway", "cache")]


async def test_without_a_keyring_nothing_is_kept_outside(tmp_path: Path, use_ring: Any) -> None:
    """It cannot be unlocked: the daemon serves, keeps answers in memory and says so; nothing is written in clear."""
    use_ring(Locked())

    with capture_logs() as logs:
        layers = await names(tmp_path, cache_key="keyring")

    assert layers == ["memory", "semantic"]
    assert [log["event"] for log in logs] == ["no keyring: answers are kept in memory alone"]
    assert not (tmp_path / "answers.db").exists()
