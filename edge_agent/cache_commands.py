"""The commands about the cache of answers, `cache stats` and `cache clear`: they ask the daemon that runs."""

import os
from pathlib import Path
from typing import Annotated, Any, Final

import typer

ASK_S: Final = 30.0
StateDir = Annotated[Path | None, typer.Option(help="The daemon's state folder; else the XDG one.")]

cache_app = typer.Typer(no_args_is_help=True, help="What the running daemon keeps of its answers.")


@cache_app.command()
def stats(state_dir: StateDir = None) -> None:
    """What each layer holds and has done since the daemon started."""
    said = _asked("GET", "/admin/status", state_dir)
    if said["cache"] is None:
        typer.echo("the daemon keeps no answers")
        return
    uses = said["cache"]["requests"]
    typer.echo(", ".join(f"{name} {count}" for name, count in uses.items()))
    typer.echo(f"{'layer':<10} {'entries':>9} {'MB':>9} {'hits':>9} {'misses':>9} {'evicted':>9} {'errors':>9}")
    for name, layer in said["cache"]["layers"].items():
        size = None if layer["size"] is None else f"{layer['size'] / 1e6:.1f}"
        row = (layer["entries"], size, layer["hits"], layer["misses"], layer["evictions"], layer["errors"])
        typer.echo(f"{name:<10} " + " ".join(f"{'-' if cell is None else cell:>9}" for cell in row))


@cache_app.command()
def clear(state_dir: StateDir = None) -> None:
    """Forget all answers, in every layer; in a shared Redis for all who share it."""
    _asked("POST", "/admin/cache/clear", state_dir)
    typer.echo("cleared")


def _asked(method: str, path: str, state_dir: Path | None) -> Any:
    """Raises Unreachable if no daemon runs or it does not answer."""
    import httpx

    from edge_agent.api.credentials import admin_token, state_folder
    from edge_agent.instance import running
    from shared.errors import Unreachable

    state = state_dir or state_folder(os.environ, Path.home())
    daemon = running(state)
    if daemon is None or not daemon.url:
        raise Unreachable(f"no edge-agent listens that uses {state}: start one, or name its --state-dir")
    headers = {"authorization": f"Bearer {admin_token(state)}", "content-type": "application/json"}
    try:
        reply = httpx.request(method, daemon.url + path, headers=headers, timeout=ASK_S)
        reply.raise_for_status()
        return reply.json()
    except (httpx.HTTPError, ValueError) as error:
        raise Unreachable(f"{daemon.url} did not answer: {type(error).__name__}") from error
