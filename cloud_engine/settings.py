"""What `cloud-engine serve` can be told, by flag, `CAUSEWAY_<NAME>` or file. Each option is declared here, once."""

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from cloud_engine.engine.config import MAX_RANKS, DType, EngineConfig, KvDType, Pooling, Quantization
from cloud_engine.gateway.limits import TenantLimits
from shared.binding import Tls, is_loopback
from shared.config import Settings
from shared.guard import Guard


def _split(value: object) -> object:
    """An environment variable holds a list as `a,b`."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _base_url(url: str) -> str:
    """`http(s)://HOST:PORT`, with the path of the API or without: then `/v1`. No secret belongs in a URL."""
    try:
        parts = urlsplit(url)
        fits = parts.port is None or parts.port > 0
    except ValueError:
        raise PydanticCustomError("url", "is not a URL") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or not fits or not url.isascii():
        raise PydanticCustomError("url", "must be http://HOST:PORT or https://HOST:PORT, with or without a path")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise PydanticCustomError("url", "must hold no user, password, query or fragment")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"


BaseUrl = Annotated[str, AfterValidator(_base_url)]
Upstreams = Annotated[tuple[BaseUrl, ...], BeforeValidator(_split)]
Seconds = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]
Names = Annotated[frozenset[str], BeforeValidator(_split)]
Count = Annotated[int, Field(ge=0, le=1 << 40)]


class CloudSettings(Settings):
    """Settings of the cloud engine. Sizes in bytes, times in seconds; 0 means "choose for me" or "no limit"."""

    model: Annotated[str, Field(min_length=1)]
    """A name from the model store, a folder in Hugging Face layout, or a GGUF file; with `upstream`, its name there."""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8585
    keys: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    hosts: Names = frozenset()
    """Names besides loopback under which clients may address this server (the Host header)."""
    origins: Names = frozenset()
    """Web origins whose pages may use this server from a browser."""
    max_body: Annotated[int, Field(ge=1024, le=1 << 28)] = 4 << 20
    body_timeout: Annotated[float, Field(gt=0, le=600)] = 30.0
    drain_s: Annotated[float, Field(ge=0, le=600)] = 20.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    backend: Literal["auto", "native", "openai"] = "auto"
    """What answers: our own engine, or `upstream`; auto: our own where the model can be had here, else `upstream`."""
    upstream: Upstreams = ()
    """OpenAI-compatible servers, as `http://HOST:PORT/v1`; several are a pool."""
    upstream_key_file: Path | None = None
    """Holds the key that the upstream knows us by; no other user may read it."""
    upstream_ca: Path | None = None
    """Certificates to trust the upstream by, in PEM; none: those of the operating system."""
    upstream_plaintext: bool = False
    """Permit `http://` to another machine: the key and every prompt cross the network in the clear."""
    upstream_cache_salt: bool = False
    """Send `cache_salt`, which vLLM knows, so that tenants do not share its prefix cache."""
    connect_timeout: Seconds = 5.0
    first_token_timeout: Seconds = 120.0
    """From the request to the upstream's first token."""
    idle_timeout: Seconds = 60.0
    """Between two pieces of the upstream's answer."""

    dtype: DType = "float32"
    kv_dtype: KvDType = "auto"
    """Of the KV cache: that of the weights, or `fp8` (e4m3), a byte a number."""
    quantization: Quantization = "none"
    pooling: Pooling = "mean"
    """What an embedding is of the hidden states of its input: their mean, or the last one."""
    device: str = "cpu"
    tensor_parallel: Annotated[int, Field(ge=1, le=MAX_RANKS)] = 1
    """Processes, each with a GPU if `device` is cuda, that share every matrix of the model."""
    pipeline_parallel: Annotated[int, Field(ge=1, le=MAX_RANKS)] = 1
    """Stages, of `tensor_parallel` processes each, that have some of the layers each."""
    expert_parallel: bool = False
    """Divide a mixture of experts by experts, instead of dividing each expert."""
    rank_timeout: Seconds = 60.0
    """A step of several processes that takes longer counts as stuck, and the engine as failed."""
    model_len: Count = 0
    kv_blocks: Count = 0
    kv_bytes: Count = 0
    """For the KV cache; 0: as much as is of use and fits into the memory that is free."""
    kv_host_bytes: Count = 0
    """Host memory for prefixes that were evicted from the KV cache; 0: they are computed again."""
    block_size: Annotated[int, Field(ge=1, le=1024)] = 16
    max_num_seqs: Annotated[int, Field(ge=1, le=4096)] = 64
    max_num_batched_tokens: Count = 0
    max_waiting: Annotated[int, Field(ge=1, le=1 << 20)] = 256
    """Requests that may queue; of a full queue every tenant may still have an equal part."""
    batch_patience: Annotated[int, Field(ge=1, le=1 << 40)] = 8192
    """Tokens computed for interactive requests before one waiting batch request goes ahead of them."""
    prefix_caching: bool = True
    async_depth: Annotated[int, Field(ge=0, le=1)] | None = None
    """Steps launched before the last results are looked at; unset: 1 on a GPU, 0 on a CPU."""
    cuda_graphs: bool = True
    """On CUDA, replay decode steps as recorded; costs seconds at the start."""
    deterministic: bool = False
    """The same request gives the same logits, by a bit, whatever is computed beside it; several times slower."""
    drafting: bool | None = None
    """Guess tokens from those before and check them in the same step, where that is faster; unset: on a CPU."""
    free_rows: Annotated[int, Field(ge=0, le=1 << 16)] = 0
    """Rows of a step that cost as much as reading the weights once; how far drafts go depends on it."""
    draft_patience: Seconds = 60.0
    """How long a request with a drafter outside may stand still between two drafts."""

    fleet_policies: Path | None = None
    """A folder of signed policies (`cloud-engine fleet sign`) for edges that ask for them; followed as it changes."""
    fleet_key: Path | None = None
    """The public key, in PEM, that they are checked by here too."""
    fleet_admins: Path | None = None
    """Keys of who may see and publish them over HTTP, for owners `ROLE.NAME`: read, propose or activate."""

    concurrent: Count = 64
    """Of one tenant: requests at once."""
    connections: Annotated[int, Field(ge=1, le=1 << 16)] = 64
    """Of one tenant: edges connected at once."""
    requests_per_minute: Count = 0
    tokens_per_minute: Count = 0

    @model_validator(mode="after")
    def _tls_is_whole(self) -> "CloudSettings":
        if (self.tls_cert is None) != (self.tls_key is None):
            raise PydanticCustomError("tls", "tls_cert and tls_key belong together")
        return self

    @model_validator(mode="after")
    def _fleet_is_whole(self) -> "CloudSettings":
        if (self.fleet_policies is None) != (self.fleet_key is None):
            raise PydanticCustomError("fleet", "fleet_policies and fleet_key belong together")
        if self.fleet_admins is not None and self.fleet_policies is None:
            raise PydanticCustomError("fleet", "fleet_admins needs fleet_policies")
        return self

    @model_validator(mode="after")
    def _upstream_fits(self) -> "CloudSettings":
        if not self.upstream:
            given = {"upstream_key_file": self.upstream_key_file, "upstream_ca": self.upstream_ca}
            needing = next((name for name, value in given.items() if value is not None), None)
            if needing or self.backend == "openai":
                raise PydanticCustomError(
                    "upstream", f"{needing or 'backend openai'} needs upstream, a server's address"
                )
            return self
        if self.backend == "native":
            raise PydanticCustomError("upstream", "backend native has no upstream")
        if len(set(self.upstream)) < len(self.upstream):
            raise PydanticCustomError("upstream", "upstream: each address may be given once")
        addresses = map(urlsplit, self.upstream)
        plain = any(one.scheme == "http" and not is_loopback(one.hostname or "") for one in addresses)
        if plain and not self.upstream_plaintext:
            raise PydanticCustomError(
                "upstream", "upstream: beyond loopback it must be https:// (or set upstream_plaintext)"
            )
        return self

    @property
    def tls(self) -> Tls | None:
        return Tls(self.tls_cert, self.tls_key) if self.tls_cert and self.tls_key else None

    def engine_config(self) -> EngineConfig:
        return EngineConfig(
            model_len=self.model_len,
            block_size=self.block_size,
            num_blocks=self.kv_blocks,
            kv_bytes=self.kv_bytes,
            host_bytes=self.kv_host_bytes,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_waiting=self.max_waiting,
            batch_patience=self.batch_patience,
            prefix_caching=self.prefix_caching,
            async_depth=self.async_depth,
            cuda_graphs=self.cuda_graphs,
            deterministic=self.deterministic,
            drafting=self.drafting,
            free_rows=self.free_rows,
            draft_patience=self.draft_patience,
            dtype=self.dtype,
            kv_dtype=self.kv_dtype,
            quantization=self.quantization,
            pooling=self.pooling,
            device=self.device,
            tensor_parallel=self.tensor_parallel,
            pipeline_parallel=self.pipeline_parallel,
            expert_parallel=self.expert_parallel,
            rank_timeout=self.rank_timeout,
        )

    def tenant_limits(self) -> TenantLimits:
        return TenantLimits(self.concurrent, self.requests_per_minute, self.tokens_per_minute, self.connections)

    def guard(self) -> Guard:
        hosts = frozenset(name.lower() for name in self.hosts)
        return Guard(hosts=hosts, origins=self.origins, max_body=self.max_body, body_timeout=self.body_timeout)
