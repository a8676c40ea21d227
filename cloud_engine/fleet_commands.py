"""The commands about the fleet's policies: `fleet keys`, `fleet sign`, `fleet show`. They need no server.

The private key belongs on the desk of who signs, not on the server that offers: see shared/PROTOCOL.md.
"""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from cloud_engine.gateway.fleet import described
from router.policy import parse
from shared.config import InvalidSettings
from shared.errors import TooLarge
from shared.fleet import MAX_SOURCE, FleetPolicy, Terms, opened, sign
from shared.frames import MAX_OFFER
from shared.signing import new_keys, private_key, public_key

fleet_app = typer.Typer(no_args_is_help=True, help="Policies that edges take from the cloud they are connected to.")


@fleet_app.command("keys")
def keys(key: Annotated[Path, typer.Argument(help="where the private key goes; the public one: KEY.pub")]) -> None:
    """Make the pair of keys that signs a fleet's policies."""
    public = new_keys(key)
    typer.echo(f"{key}: keep it to yourself; {public}: `fleet_key` of every edge, and of the cloud")


@fleet_app.command("sign")
def sign_policy(
    policy: Annotated[Path, typer.Argument(help="the policy, in YAML")],
    key: Annotated[Path, typer.Option(help="the private key")],
    version: Annotated[int, typer.Option(help="above every one before", min=1)],
    why: Annotated[str, typer.Option(help="goes into every edge's history")],
    out: Annotated[Path, typer.Option(help="a file NAME.policy, or a folder for it")],
    group: Annotated[list[str] | None, typer.Option(help="only edges with this fleet_group; several may be")] = None,
    percent: Annotated[float, typer.Option(help="of the edges")] = 100.0,
) -> None:
    """Check a policy and sign it. To go back to an old one, sign its text again as a newer version."""
    signer, source = private_key(key, "key"), _read(policy, MAX_SOURCE)
    parse(source, name=policy.name)
    terms = Terms(version=version, why=why, groups=tuple(group or ()), percent=percent)
    signed = sign(terms, source, signer)
    path = out / f"{version:016d}.policy" if out.is_dir() else out
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as stream:
            stream.write(signed)
    except OSError as error:
        raise InvalidSettings(f"{path}: {error.strerror}", param="out") from error
    typer.echo(path)


@fleet_app.command("show")
def show(
    signed: Annotated[Path, typer.Argument(help="a signed policy")],
    key: Annotated[Path, typer.Option(help="the public key")],
) -> None:
    """Say whose it is, for whom, and what it says; an error if it is not signed by the key."""
    found: FleetPolicy = opened(_read(signed, MAX_OFFER), public_key(key, "key"))
    typer.echo(json.dumps(described(found), indent=2))
    typer.echo(found.source.decode("utf-8", "replace"))


def _read(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as stream:
            content = stream.read(most + 1)
    except OSError as error:
        raise InvalidSettings(f"{path}: {error.strerror}") from error
    if len(content) > most:
        raise TooLarge(f"{path} has more than {most} bytes")
    return content
