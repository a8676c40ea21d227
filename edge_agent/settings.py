"""What an administrator can set, by flag, `CAUSEWAY_*` variable or TOML file; checked before anything starts."""

from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit, urlunsplit

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from shared.binding import Tls, check_bind, is_loopback
from shared.config import InvalidSettings, Settings
from shared.frames import WIRE_PATH

Watts = Annotated[float, Field(gt=0, le=2000, allow_inf_nan=False)]
LogLevel = Literal["debug", "info", "warning", "error"]


class EdgeSettings(Settings):
    """Sizes in tokens, times in seconds."""

    model: Annotated[str, Field(min_length=1, max_length=4096)] = "smollm2:135m"
    """A name from the model store, or a GGUF file."""
    host: Annotated[str, Field(min_length=1, max_length=253)] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8484
    """0: any free one."""
    cloud: str | None = None
    """`ws://HOST:PORT` or `wss://HOST:PORT`; none: everything is answered here."""
    key_file: Path | None = None
    """Holds the key that the cloud knows this device by; mode 0600. A cloud on loopback may do without."""
    cloud_ca: Path | None = None
    """Certificates to trust the cloud by, in PEM; none: those of the operating system."""
    allow_plaintext: bool = False
    """Permit `ws://` to another machine, say inside a VPN: the key and every prompt cross the network in the clear."""
    resume_s: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] = 60.0
    """How long a stream that has begun waits for a lost cloud to come back, before it ends with an error."""
    fleet_key: Path | None = None
    """The public key, in PEM, of who may send this device policies through its cloud; none: nobody may."""
    fleet_group: Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9._-]*$")] = ""
    """The part of the fleet that this device is in, for policies that are meant for some."""
    no_cloud: bool = False
    """Connect to no cloud, whatever else is set."""
    metered: bool | None = None
    """Whether this device's traffic costs, for rules that ask (`metered`); none: nobody has said."""
    edge_watts: Watts | None = None
    """What the local model's work adds to the device's draw, until that was measured; none: not known until then."""
    radio_watts: Watts = 1.0
    """What the radio draws while an answer is waited for and comes from the cloud: nothing measures that."""
    battery_wh: Annotated[float, Field(gt=0, le=100_000, allow_inf_nan=False)] | None = None
    """What the battery holds when it is full, where the system tells only a percentage (all but Linux)."""
    policy: Path | None = None
    slots: Annotated[int, Field(ge=1, le=64)] | None = None
    """How many requests the local model answers at once; none: 8 to 16, as the machine has memory for their context."""
    context: Annotated[int, Field(ge=64, le=1 << 20)] | None = None
    """Of one request, prompt and output together; none: what the model was trained for, within reason."""
    context_shift: bool = False
    """An answer whose `max_tokens` do not fit beside its prompt goes on at the context's end: what came after the
    prompt's beginning is forgotten, the older half first. Otherwise it ends there (`length`)."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    queue: Annotated[int, Field(ge=0, le=4096)] = 64
    """How many requests may wait for a slot."""
    embedding_model: Annotated[str, Field(min_length=1, max_length=4096)] = "all-minilm"
    """Makes embeddings, once it is pulled: a name from the model store, or a file that was converted from one."""
    keep_s: Annotated[float, Field(ge=0, le=31_536_000, allow_inf_nan=False)] = 300.0
    """How long a model other than `model` stays loaded after its last answer."""
    memory_mb: Annotated[int, Field(ge=1)] | None = None
    """What all loaded models together may take; none: four fifths of the machine's memory, if that much is free."""
    cache: bool = True
    """Keep answers, to serve them again to the same question; the policy says which."""
    cache_memory_mb: Annotated[int, Field(ge=0, le=1 << 16)] = 32
    cache_memory_ttl_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3600.0
    cache_disk_mb: Annotated[int, Field(ge=0, le=1 << 20)] = 256
    cache_disk_ttl_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 604_800.0
    cache_dir: Path | None = None
    """Where `answers.db` lies; none: the state folder."""
    cache_key: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """Encrypts what is kept outside this process: a file with a secret, mode 0600, or `keyring`: the system's own."""
    redis_url: str | None = None
    """`redis://HOST:PORT`, `rediss://HOST:PORT` or `unix:///SOCKET`: where devices share answers to `free` requests."""
    redis_password_file: Path | None = None
    """Holds its password; mode 0600."""
    cache_redis_ttl_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 86_400.0
    prefix_memory_mb: Annotated[int, Field(ge=0, le=1 << 20)] = 128
    """MiB of memory for what was computed of prompts and has no slot any more."""
    prefix_disk_mb: Annotated[int, Field(ge=0, le=1 << 20)] = 256
    """MiB in the state folder for the same between two starts; 0: none. Readable there are the tokens of prompts and
    answers, but of none that is labelled `edge_only` or `redact`."""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    keys: Path | None = None
    """Hashes of the keys that clients must show; none: on loopback any client is served."""
    require_key: bool = False
    """Also on loopback each client shows a key: one of `keys`, or the token in `client.token` of the state folder."""
    hosts: tuple[str, ...] = ()
    """Names, besides the loopback ones and `host`, under which clients may ask for this server."""
    origins: tuple[str, ...] = ()
    """Web pages that may use it, as `https://name`."""
    state_dir: Path | None = None
    """Where the administration's token lies; none: the XDG state folder."""
    drain_s: Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)] = 20.0
    log_level: LogLevel = "info"
    log_file: Path | None = None
    """Where the log goes, for its owner's eyes; none: stderr."""
    log_bytes: Annotated[int, Field(ge=4096, le=1 << 40)] = 10_000_000
    """Of one log file; then it is renamed and another begun."""
    log_files: Annotated[int, Field(ge=1, le=100)] = 5
    """How many are kept, the current one included."""

    @field_validator("cloud")
    @classmethod
    def _with_wire_path(cls, url: str | None) -> str | None:
        return None if url is None else cloud_url(url)

    @field_validator("redis_url")
    @classmethod
    def _plain_redis(cls, url: str | None) -> str | None:
        return None if url is None else redis_address(url)

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise PydanticCustomError("tls", "tls_cert and tls_key belong together")
        return self

    @property
    def tls(self) -> Tls | None:
        return Tls(self.tls_cert, self.tls_key) if self.tls_cert and self.tls_key else None

    @property
    def cloud_in_use(self) -> str | None:
        return None if self.no_cloud else self.cloud

    @property
    def redis_in_use(self) -> str | None:
        """None also where it is on another machine and nothing may leave this one."""
        parts = urlsplit(self.redis_url or "")
        here = parts.scheme == "unix" or is_loopback(parts.hostname or "")
        return self.redis_url if here or not self.no_cloud else None


def check(settings: EdgeSettings) -> None:
    """What would be unsafe to start with. Raises InvalidSettings."""
    check_bind(settings.host, tls=settings.tls is not None, keys=settings.keys is not None)
    redis = urlsplit(settings.redis_url or "")
    if redis.scheme == "redis" and not is_loopback(redis.hostname or "") and not settings.allow_plaintext:
        raise InvalidSettings(
            "redis_url: beyond loopback it must be rediss:// (or set allow_plaintext)", param="redis_url"
        )
    url = settings.cloud_in_use
    if url is None:
        return
    parts = urlsplit(url)
    if is_loopback(parts.hostname or ""):
        return
    if parts.scheme == "ws" and not settings.allow_plaintext:
        raise InvalidSettings("cloud: beyond loopback it must be wss:// (or set allow_plaintext)", param="cloud")
    if settings.key_file is None:
        raise InvalidSettings("cloud needs key_file, a file with the key it knows this device by", param="key_file")


def redis_address(url: str) -> str:
    try:
        parts = urlsplit(url)
        port_fits = parts.port is None or parts.port > 0
    except ValueError:
        raise PydanticCustomError("url", "is not a URL") from None
    there = parts.path if parts.scheme == "unix" else parts.hostname
    if parts.scheme not in ("redis", "rediss", "unix") or not there or not port_fits:
        raise PydanticCustomError("url", "must be redis://HOST:PORT, rediss://HOST:PORT or unix:///SOCKET")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise PydanticCustomError("url", "must hold no user, password, query or fragment: see redis_password_file")
    return url


def cloud_url(url: str) -> str:
    """`ws://host:port`, with or without a path, as the address of the wire. No secret belongs in a URL."""
    try:
        parts = urlsplit(url)
        port_fits = parts.port is None or parts.port > 0
    except ValueError:
        raise PydanticCustomError("url", "is not a URL") from None
    if parts.scheme not in ("ws", "wss") or not parts.hostname or not port_fits:
        raise PydanticCustomError("url", "must be ws://HOST:PORT or wss://HOST:PORT")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise PydanticCustomError("url", "must hold no user, password, query or fragment")
    return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/") or WIRE_PATH, "", ""))
