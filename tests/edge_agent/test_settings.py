from pathlib import Path
from typing import Any

import pytest

from edge_agent.settings import EdgeSettings, check
from shared.config import InvalidSettings, load


def settings(**flags: Any) -> EdgeSettings:
    return load(EdgeSettings, None, {}, flags)


def test_defaults_are_safe() -> None:
    """Loopback, the fixed port, no cloud, no plain text beyond this machine."""
    plain = settings()

    check(plain)

    assert (plain.host, plain.port, plain.cloud, plain.allow_plaintext) == ("127.0.0.1", 8484, None, False)


def test_flag_beats_environment_beats_file(tmp_path: Path) -> None:
    """The three sources, and how a value from the environment is read."""
    file = tmp_path / "edge.toml"
    file.write_text('port = 1\nslots = 2\nqueue = 3\norigins = ["https://app.example"]\n')

    loaded = load(EdgeSettings, file, {"CAUSEWAY_SLOTS": "20", "CAUSEWAY_QUEUE": "30", "HOME": "/"}, {"queue": 300})

    assert (loaded.port, loaded.slots, loaded.queue) == (1, 20, 300)
    assert loaded.origins == ("https://app.example",)


def test_no_cloud_wins_over_any_cloud() -> None:
    """CAUSEWAY_NO_CLOUD=1 switches offloading off, whatever file and flags say."""
    loaded = load(EdgeSettings, None, {"CAUSEWAY_NO_CLOUD": "1"}, {"cloud": "ws://10.0.0.1:1"})

    check(loaded)

    assert loaded.cloud_in_use is None


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("ws://127.0.0.1:8585", "ws://127.0.0.1:8585/v1/connect"),
        ("ws://127.0.0.1:8585/", "ws://127.0.0.1:8585/v1/connect"),
        ("wss://cloud.example", "wss://cloud.example/v1/connect"),
        ("wss://cloud.example/causeway/v1/connect", "wss://cloud.example/causeway/v1/connect"),
        ("ws://[::1]:8585", "ws://[::1]:8585/v1/connect"),
    ],
)
def test_cloud_address_gets_the_wires_path(url: str, address: str) -> None:
    """A host and port are enough; a path behind a proxy is kept."""
    assert settings(cloud=url).cloud == address


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8585",
        "http://127.0.0.1:8585",
        "ws://",
        "ws://:80",
        "ws://h:99999",
        "ws://h:x",
        "ws://h:0",
        "ws://user:secret@h",
        "ws://key@h",
        "ws://h?token=secret",
        "ws://h#x",
        "ws://[::1",
        "",
    ],
)
def test_bad_cloud_addresses_are_refused(url: str) -> None:
    """The error names the field and repeats nothing of what may be a secret."""
    with pytest.raises(InvalidSettings) as error:
        settings(cloud=url)

    assert error.value.param == "cloud"
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("port", -1),
        ("port", 65536),
        ("port", "http"),
        ("slots", 0),
        ("slots", 65),
        ("queue", -1),
        ("context", 1),
        ("threads", 0),
        ("drain_s", float("nan")),
        ("drain_s", float("inf")),
        ("model", ""),
        ("log_level", "loud"),
        ("prot", 8484),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: object) -> None:
    """Wrong type, out of bounds, or a name that does not exist."""
    with pytest.raises(InvalidSettings) as error:
        settings(**{field: value})

    assert error.value.param == field
    assert "command line" in str(error.value)


SECURE = {"tls_cert": Path("c.pem"), "tls_key": Path("k.pem"), "keys": Path("keys")}


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.7", "::", "edge.example"])
@pytest.mark.parametrize("missing", [("keys",), ("tls_cert", "tls_key"), ("tls_cert", "tls_key", "keys")])
def test_beyond_loopback_only_with_keys_and_tls(host: str, missing: tuple[str, ...]) -> None:
    """S-08: both, or the daemon does not start."""
    check(settings(host=host, **SECURE))

    with pytest.raises(InvalidSettings) as error:
        check(settings(host=host, **{name: path for name, path in SECURE.items() if name not in missing}))

    assert error.value.param == "host"


def test_half_a_tls_setting_is_refused() -> None:
    """A certificate without its key is a mistake, not a wish for plain text."""
    with pytest.raises(InvalidSettings, match="belong together"):
        settings(tls_cert=Path("c.pem"))


@pytest.mark.parametrize("url", ["ws://cloud.example:80", "ws://10.0.0.1:8585", "ws://127.0.0.1.nip.io:1"])
def test_no_key_and_no_prompt_over_a_network_in_the_clear(url: str) -> None:
    """`ws://` beyond loopback refuses to start unless it was permitted in as many words."""
    with pytest.raises(InvalidSettings) as error:
        check(settings(cloud=url, key_file=Path("k")))

    assert error.value.param == "cloud"
    check(settings(cloud=url, key_file=Path("k"), allow_plaintext=True))
    check(settings(cloud=url.replace("ws://", "wss://"), key_file=Path("k")))


def test_a_cloud_beyond_loopback_needs_its_key() -> None:
    """Better told now than refused by the cloud later; on loopback a cloud may serve without keys."""
    check(settings(cloud="ws://127.0.0.1:1"))

    with pytest.raises(InvalidSettings) as error:
        check(settings(cloud="wss://cloud.example"))

    assert error.value.param == "key_file"


@pytest.mark.parametrize(
    "url", ["http://h", "redis://", "redis://user:pass@h", "redis://h:x", "redis://h?db=1", "unix://", "redis://h:0"]
)
def test_a_redis_address_is_one_and_holds_no_secret(url: str) -> None:
    """What cannot be connected to, or would have a password in it, is refused by name."""
    with pytest.raises(InvalidSettings) as refused:
        settings(redis_url=url)
    assert refused.value.param == "redis_url"


def test_what_is_shared_crosses_networks_encrypted_or_not_at_all() -> None:
    """In the clear to another machine: refused; with no_cloud nothing goes to another machine, but a local one may."""
    with pytest.raises(InvalidSettings) as refused:
        check(settings(redis_url="redis://10.0.0.1:6379"))
    assert refused.value.param == "redis_url"

    for url in ("rediss://10.0.0.1:6379", "redis://127.0.0.1:6379", "unix:///run/redis.sock"):
        check(settings(redis_url=url))
        assert settings(redis_url=url).redis_in_use == url
    assert settings(redis_url="rediss://10.0.0.1:6379", no_cloud=True).redis_in_use is None
    assert settings(redis_url="unix:///run/redis.sock", no_cloud=True).redis_in_use == "unix:///run/redis.sock"
