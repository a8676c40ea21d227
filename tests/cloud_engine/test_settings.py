from pathlib import Path

import pytest

from cloud_engine.engine.config import EngineConfig
from cloud_engine.gateway.limits import TenantLimits
from cloud_engine.settings import CloudSettings
from shared.config import InvalidSettings, load


def test_the_defaults_are_the_engines_own() -> None:
    """With nothing but a model, engine and limits are as their own defaults say, on loopback 8585 without keys."""
    settings = load(CloudSettings, None, {}, {"model": "m"})

    assert settings.engine_config() == EngineConfig()
    assert settings.tenant_limits() == TenantLimits()
    assert (settings.host, settings.port, settings.keys, settings.tls) == ("127.0.0.1", 8585, None, None)


def test_every_engine_setting_reaches_the_engine() -> None:
    """Each option changes the config, and lists may be given in one environment variable."""
    flags = {
        "model": "m",
        "model_len": 100,
        "block_size": 8,
        "kv_blocks": 50,
        "kv_bytes": 1 << 21,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 77,
        "max_waiting": 5,
        "prefix_caching": False,
        "async_depth": 1,
        "cuda_graphs": False,
        "dtype": "bfloat16",
        "device": "cuda",
        "tensor_parallel": 4,
        "pipeline_parallel": 2,
        "expert_parallel": True,
        "rank_timeout": 7,
    }
    env = {"CAUSEWAY_HOSTS": "Cloud.lan, other", "CAUSEWAY_ORIGINS": "https://a.example", "CAUSEWAY_CONCURRENT": "9"}
    settings = load(CloudSettings, None, env, flags)

    assert settings.engine_config() == EngineConfig(
        model_len=100,
        block_size=8,
        num_blocks=50,
        kv_bytes=1 << 21,
        max_num_seqs=3,
        max_num_batched_tokens=77,
        max_waiting=5,
        prefix_caching=False,
        async_depth=1,
        cuda_graphs=False,
        dtype="bfloat16",
        device="cuda",
        tensor_parallel=4,
        pipeline_parallel=2,
        expert_parallel=True,
        rank_timeout=7.0,
    )
    assert settings.guard().hosts == {"cloud.lan", "other"}
    assert settings.guard().origins == {"https://a.example"}
    assert settings.tenant_limits().concurrent == 9


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ({"model": ""}, "model"),
        ({"port": 65536}, "port"),
        ({"dtype": "int4"}, "dtype"),
        ({"kv_blocks": -1}, "kv_blocks"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"tensor_parallel": 0}, "tensor_parallel"),
        ({"pipeline_parallel": 65}, "pipeline_parallel"),
        ({"rank_timeout": float("inf")}, "rank_timeout"),
        ({"drain_s": float("nan")}, "drain_s"),
        ({"log_level": "loud"}, "log_level"),
        ({"tls_cert": Path("c.pem")}, "tls"),
        ({"zap": 1}, "zap"),
        ({"backend": "vllm"}, "backend"),
        ({"backend": "openai"}, "upstream"),
        ({"upstream_key_file": Path("k")}, "upstream_key_file"),
        ({"backend": "native", "upstream": "http://localhost:1"}, "native"),
        ({"upstream": "localhost:8000"}, "upstream"),
        ({"upstream": "ftp://h"}, "upstream"),
        ({"upstream": "http://user:pw@localhost"}, "upstream"),
        ({"upstream": "http://@localhost"}, "upstream"),
        ({"upstream": "http://localhost?key=k"}, "upstream"),
        ({"upstream": "http://localhost:99999"}, "upstream"),
        ({"upstream": "http://localhost:0"}, "upstream"),
        ({"upstream": "http://[::1"}, "upstream"),
        ({"upstream": "http://10.0.0.1:8000"}, "upstream_plaintext"),
        ({"upstream": ["http://localhost:1", "http://10.0.0.1:8000"]}, "upstream_plaintext"),
        ({"upstream": "http://localhost:1,http://localhost:1/v1"}, "once"),
        ({"upstream": "http://localhost", "idle_timeout": float("inf")}, "idle_timeout"),
        ({"upstream": "http://localhost", "connect_timeout": 0}, "connect_timeout"),
    ],
)
def test_bad_settings_are_named(flags: dict[str, object], field: str) -> None:
    """The process does not start, and says which setting is why."""
    with pytest.raises(InvalidSettings, match=field):
        load(CloudSettings, None, {}, {"model": "m", **flags})


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("http://localhost:8000/v1/", "http://localhost:8000/v1"),
        ("https://api.example/openai/v1", "https://api.example/openai/v1"),
        ("http://[::1]:8000/", "http://[::1]:8000/v1"),
    ],
)
def test_an_upstreams_address_has_a_path(given: str, base: str) -> None:
    """Without one it is /v1, where every known server has it."""
    assert load(CloudSettings, None, {}, {"model": "m", "upstream": given}).upstream == (base,)


def test_plain_http_to_another_machine_can_be_permitted() -> None:
    """By name: the key and every prompt then cross the network in the clear."""
    flags = {"model": "m", "upstream": "http://10.0.0.1:8000", "upstream_plaintext": True}
    assert load(CloudSettings, None, {}, flags).upstream == ("http://10.0.0.1:8000/v1",)
