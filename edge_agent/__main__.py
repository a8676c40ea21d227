"""The command line: `serve`, `chat`, `keys new`, models and the cache. Heavy imports wait until needed."""

import asyncio
import dataclasses
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_agent.cache_commands import cache_app
from edge_agent.models.commands import add_model_commands

if TYPE_CHECKING:
    from edge_agent.backends.spawn import Spare

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="One OpenAI-compatible endpoint on this device: answered by a local model, or offloaded to a cloud engine.",
)
keys_app = typer.Typer(no_args_is_help=True, help="The keys that clients beyond loopback must show.")
app.add_typer(keys_app, name="keys")
app.add_typer(cache_app, name="cache")
add_model_commands(app)

EXIT_ERROR = 2


@app.command()
def serve(
    model: Annotated[str | None, typer.Option(help="A name from the model store, or a GGUF file.")] = None,
    host: Annotated[str | None, typer.Option(help="Beyond loopback --keys and TLS are needed.")] = None,
    port: Annotated[int | None, typer.Option(help="0: any free one, which is printed.")] = None,
    cloud: Annotated[str | None, typer.Option(help="ws://HOST:PORT or wss://HOST:PORT.")] = None,
    key_file: Annotated[Path | None, typer.Option(help="File with the key for the cloud, mode 0600.")] = None,
    no_cloud: Annotated[bool | None, typer.Option("--no-cloud", help="Answer everything here.")] = None,
    policy: Annotated[Path | None, typer.Option(help="Routing policy in YAML; followed as it changes.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings in TOML; flags and CAUSEWAY_* beat it.")] = None,
    slots: Annotated[int | None, typer.Option(help="Requests answered at once by the local model.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of one request, prompt and output.")] = None,
    threads: Annotated[int | None, typer.Option(help="Processor threads of the local model.")] = None,
    queue: Annotated[int | None, typer.Option(help="Requests that may wait for the local model.")] = None,
    cache: Annotated[bool | None, typer.Option("--cache/--no-cache", help="Keep answers, to serve them again.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key, PEM.")] = None,
    keys: Annotated[Path | None, typer.Option(help="Hashes of the clients' keys, see `keys new`.")] = None,
    cloud_ca: Annotated[Path | None, typer.Option(help="Certificates to trust the cloud by, PEM.")] = None,
    allow_plaintext: Annotated[
        bool | None, typer.Option("--allow-plaintext", help="Permit ws:// beyond loopback.")
    ] = None,
    state_dir: Annotated[Path | None, typer.Option(help="This daemon's folder: token, journal, lock.")] = None,
    drain_s: Annotated[float | None, typer.Option(help="Seconds that running answers get on SIGTERM.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    log_file: Annotated[Path | None, typer.Option(help="Rotated at log_bytes; else the log goes to stderr.")] = None,
) -> None:
    """Serve until SIGTERM; prints `listening on URL` when ready."""
    flags = {name: value for name, value in locals().items() if name != "config"}
    from edge_agent.backends.spawn import spare

    with spare() as one:  # before all other imports: it has many of its own
        _serve(config, flags, one)


def _serve(config: Path | None, flags: dict[str, Any], spare: "Spare | None") -> None:
    from edge_agent.settings import EdgeSettings
    from shared.config import load

    def read() -> EdgeSettings:
        return load(EdgeSettings, config, os.environ, flags)

    settings = read()

    from edge_agent.log_file import LogFile
    from edge_agent.reload import LiveSettings
    from edge_agent.run import run
    from shared.telemetry import set_up_logging

    path = settings.log_file
    log = LogFile(path, max_bytes=settings.log_bytes, files=settings.log_files) if path else None

    def apply(now: EdgeSettings) -> None:
        set_up_logging(now.log_level, log)

    def read_again() -> EdgeSettings:
        if log:
            log.reopen()
        return read()

    apply(settings)
    asyncio.run(run(settings, LiveSettings(settings, load=read_again, file=config, apply=apply), spare))


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Option(help="Settings in TOML, as for `serve`.")] = None,
    model: Annotated[str | None, typer.Option(help="As for `serve`, like the options that follow.")] = None,
    host: Annotated[str | None, typer.Option()] = None,
    port: Annotated[int | None, typer.Option()] = None,
    cloud: Annotated[str | None, typer.Option()] = None,
    key_file: Annotated[Path | None, typer.Option()] = None,
    cloud_ca: Annotated[Path | None, typer.Option()] = None,
    policy: Annotated[Path | None, typer.Option()] = None,
    state_dir: Annotated[Path | None, typer.Option()] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A list of findings.")] = False,
) -> None:
    """Look for what is wrong or soon will be, and say what to do. Exit status 1 if anything FAILs."""
    flags = {name: value for name, value in locals().items() if name not in ("config", "as_json")}
    from edge_agent.doctor.report import diagnose, shown
    from edge_agent.settings import EdgeSettings
    from shared.config import load

    found = []
    for finding in diagnose(lambda: load(EdgeSettings, config, os.environ, flags), os.environ, Path.home()):
        found.append(finding)
        if not as_json:
            typer.echo(shown(finding))
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(finding) for finding in found], indent=2))
    raise typer.Exit(int(any(finding.status == "FAIL" for finding in found)))


@app.command()
def console(
    url: Annotated[str, typer.Option(help="Where the daemon listens.")] = "http://127.0.0.1:8484",
    state_dir: Annotated[Path | None, typer.Option(help="Its state folder; else the XDG one.")] = None,
) -> None:
    """Print the address of the administrator's page, with the token in it: keep it to yourself."""
    from edge_agent.api.credentials import admin_token, state_folder

    token = admin_token(state_dir or state_folder(os.environ, Path.home()))
    typer.echo(f"{url.rstrip('/')}/console/#token={token}")


@app.command()
def chat(
    url: Annotated[str | None, typer.Option(help="Where the daemon listens; else where the one here does.")] = None,
    model: Annotated[str, typer.Option(help="auto, edge, cloud or a real model's name.")] = "auto",
    private: Annotated[bool, typer.Option("--private", help="Nothing said may leave the device.")] = False,
    key_file: Annotated[Path | None, typer.Option(help="File with a key, where the daemon asks for one.")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="The daemon's, if it is not the usual one.")] = None,
) -> None:
    """Talk to the running daemon; /help lists commands, Ctrl-C ends an answer, Ctrl-D the conversation."""
    from edge_agent.api.credentials import state_folder
    from edge_agent.chat import converse
    from edge_agent.instance import find
    from edge_agent.screens import terminal

    url, key = find(state_dir or state_folder(os.environ, Path.home()), url, key_file)
    read, screen = terminal(sys.stdin, sys.stdout, sys.stderr)
    failures = converse(url, model, private=private, key=key, read=read, screen=screen)
    raise typer.Exit(int(failures > 0 and not sys.stdin.isatty()))


@keys_app.command("new")
def keys_new(
    keys: Annotated[Path, typer.Option(help="File to add the key's hash to, made with mode 0600 if need be.")],
    client: Annotated[str, typer.Option(help="Whose key it is.")] = "default",
) -> None:
    """Make a key for a client and print it; it is not kept, only its hash is."""
    from shared.keys import new_key

    typer.echo(new_key(keys, client, now=datetime.now(UTC)))


def main() -> None:
    """A typed error is one line and exit status 2; anything else is a bug and keeps its traceback."""
    from shared.errors import CausewayError

    try:
        app()
    except CausewayError as error:
        sys.stderr.write(f"edge-agent: {error.message}\n")
        sys.exit(EXIT_ERROR)


if __name__ == "__main__":
    main()
