"""The command line of the cloud: `serve`, `keys new`, `fleet`, `bench`, `bench-serve`. torch is loaded if needed."""

import asyncio
import os
import socket
import ssl
import sys
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import structlog
import typer
from prometheus_client import CollectorRegistry

from cloud_engine.bench.commands import SeveralValues, bench, bench_serve
from cloud_engine.fleet_commands import fleet_app
from cloud_engine.gateway.fleet import Fleet
from cloud_engine.gateway.pool import Pool
from cloud_engine.gateway.server import Backend, Gateway
from cloud_engine.gateway.upstream import Timeouts, Upstream
from cloud_engine.model.config import UnsupportedModel
from cloud_engine.settings import CloudSettings
from shared.binding import check_bind
from shared.config import InvalidSettings, load, read_secret
from shared.errors import CausewayError, UnknownModel
from shared.frames import MAX_FRAME
from shared.keys import Keys, new_key
from shared.models import default_store, model_name, resolve, verify
from shared.serving import bind
from shared.serving import serve as serve_app
from shared.signing import public_key
from shared.telemetry import RequestLog, set_up_logging

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
keys_app = typer.Typer(no_args_is_help=True, help="The keys that clients show.")
app.add_typer(keys_app, name="keys")
app.add_typer(fleet_app, name="fleet")
app.command(cls=SeveralValues)(bench)
app.command(cls=SeveralValues)(bench_serve)

SPINS = "10000"
"""How long torch's threads spin at a barrier before they sleep. OpenMP's default is no faster on an idle machine, and
on a shared one its spinning threads hold the cores that the awaited ones need (see tests/benchmarks/RESULTS.md)."""
CLOSE_S = 3.0
"""What draining may take beyond its limit, to say goodbye."""


@app.command()
def serve(
    model: Annotated[str | None, typer.Option(help="name in the model store, folder, GGUF; or upstream's name")] = None,
    backend: Annotated[
        str | None, typer.Option(help="native, openai, or auto: native if it can be, else openai")
    ] = None,
    upstream: Annotated[list[str] | None, typer.Option(help="OpenAI-compatible server; several are a pool")] = None,
    upstream_key_file: Annotated[Path | None, typer.Option(help="file with the key for the upstream")] = None,
    host: Annotated[str | None, typer.Option(help="beyond loopback needs --keys and TLS")] = None,
    port: Annotated[int | None, typer.Option(help="0 chooses one and prints it")] = None,
    keys: Annotated[Path | None, typer.Option(help="key file; without it loopback needs no key")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with any of the settings")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16")] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="of the KV cache: auto (that of dtype) or fp8")] = None,
    quantization: Annotated[str | None, typer.Option(help="none or int8")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda")] = None,
    tensor_parallel: Annotated[int | None, typer.Option(help="processes that share each matrix")] = None,
    pipeline_parallel: Annotated[int | None, typer.Option(help="stages with some of the layers each")] = None,
    expert_parallel: Annotated[bool | None, typer.Option(help="whole experts instead of parts of each")] = None,
    kv_blocks: Annotated[int | None, typer.Option(help="blocks of the KV cache; 0: by kv_bytes or free memory")] = None,
    model_len: Annotated[int | None, typer.Option(help="longest sequence, prompt and output")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="sequences in one batch")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="token budget of one step")] = None,
    concurrent: Annotated[int | None, typer.Option(help="requests at once of one tenant")] = None,
    fleet_policies: Annotated[Path | None, typer.Option(help="folder of signed policies for edges")] = None,
    fleet_key: Annotated[Path | None, typer.Option(help="the public key they are signed by")] = None,
    fleet_admins: Annotated[Path | None, typer.Option(help="keys of who may publish them over HTTP")] = None,
    tls_cert: Annotated[Path | None, typer.Option()] = None,
    tls_key: Annotated[Path | None, typer.Option()] = None,
    log_level: Annotated[str | None, typer.Option()] = None,
) -> None:
    """Serve one model over HTTP and the WebSocket. Any other setting: the file, or CAUSEWAY_<NAME>."""
    flags = {name: value for name, value in locals().items() if name != "config"}
    settings = load(CloudSettings, config, os.environ, flags)
    check_bind(settings.host, tls=settings.tls is not None, keys=settings.keys is not None)
    set_up_logging(settings.log_level)
    key_file = Keys(settings.keys, source="cloud") if settings.keys else None
    fleet = _fleet(settings)
    with bind(settings.host, settings.port) as listener:
        asyncio.run(_serve(settings, _backend(settings), key_file, fleet, listener))


@keys_app.command("new")
def keys_new(
    tenant: Annotated[str, typer.Option(help="whom the key's use is counted to")] = "default",
    keys: Annotated[Path | None, typer.Option(help="key file, made with mode 0600 if need be")] = None,
) -> None:
    """Make a key and show it, once."""
    file = keys or _default_keys()
    token = new_key(file, tenant, now=datetime.now(UTC))
    typer.echo(f"added a key of {tenant} to {file}; it is shown only now:", err=True)
    typer.echo(token)


def _backend(settings: CloudSettings) -> Backend:
    """`auto` takes the model that can be had here; a model that is here but damaged is an error all the same."""
    if settings.backend == "openai" or not settings.upstream:
        return _upstream(settings) if settings.upstream else _native(settings)
    try:
        return _native(settings)
    except (UnknownModel, UnsupportedModel, ImportError) as error:
        reason = error.message if isinstance(error, CausewayError) else "torch is not installed"
        structlog.get_logger("causeway.cloud").info("upstream_instead", reason=reason)
        return _upstream(settings)


def _native(settings: CloudSettings) -> Backend:
    """Our own engine: torch is imported here."""
    path = _resolved(settings.model)
    verify(path)
    from cloud_engine.engine.serving import load_engine

    try:
        return load_engine(path, settings.engine_config(), name=model_name(path))
    except ValueError as error:
        raise InvalidSettings(str(error)) from error


def _upstream(settings: CloudSettings) -> Upstream | Pool:
    """Other servers: this process then needs no torch."""
    key_file, ca = settings.upstream_key_file, settings.upstream_ca
    try:
        trusted = ssl.create_default_context(cafile=str(ca) if ca else None)
    except (OSError, ssl.SSLError) as error:
        raise InvalidSettings(f"upstream_ca: {ca} holds no certificates", param="upstream_ca") from error
    key = read_secret(key_file, "upstream_key_file") if key_file else ""
    members = [
        Upstream(
            base_url,
            settings.model,
            key,
            context_length=settings.model_len,
            timeouts=Timeouts(settings.connect_timeout, settings.first_token_timeout, settings.idle_timeout),
            concurrent=settings.max_num_seqs + settings.max_waiting,
            cache_salt=settings.upstream_cache_salt,
            verify=trusted,
        )
        for base_url in settings.upstream
    ]
    return members[0] if len(members) == 1 else Pool(members)


async def _serve(
    settings: CloudSettings, engine: Backend, keys: Keys | None, fleet: Fleet | None, listener: socket.socket
) -> None:
    await engine.start()
    try:
        await _serve_started(settings, engine, keys, fleet, listener)
    finally:
        await engine.aclose()


async def _serve_started(
    settings: CloudSettings, engine: Backend, keys: Keys | None, fleet: Fleet | None, listener: socket.socket
) -> None:
    registry = CollectorRegistry()
    gateway = Gateway(
        engine,
        engine.model_card(),
        others=engine.other_cards() if isinstance(engine, Upstream | Pool) else (),
        keys=keys,
        limits=settings.tenant_limits(),
        guard=settings.guard(),
        registry=registry,
        listeners=(RequestLog(),),
        fleet=fleet,
    )
    async with fleet.followed() if fleet else nullcontext():
        await serve_app(
            gateway.app,
            settings.host,
            settings.port,
            tls=settings.tls,
            drain=lambda: gateway.drain(settings.drain_s),
            drain_s=settings.drain_s + CLOSE_S,
            ws_max_size=MAX_FRAME,
            listener=listener,
        )


def _fleet(settings: CloudSettings) -> Fleet | None:
    if settings.fleet_policies is None or settings.fleet_key is None:
        return None
    admins = Keys(settings.fleet_admins, source="cloud") if settings.fleet_admins else None
    return Fleet(settings.fleet_policies, public_key(settings.fleet_key, "fleet_key"), admins)


def _resolved(model: str) -> Path:
    return resolve(model, store=default_store(os.environ, Path.home()))


def _default_keys() -> Path:
    base = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".config") / "causeway" / "cloud-keys"


def main() -> None:
    """Console entry: a typed error is one line on stderr and exit code 2."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    try:
        app()
    except CausewayError as error:
        typer.echo(f"cloud-engine: {error.message}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
