"""`cloud-engine bench`: its options, read and checked before anything is loaded."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from pydantic import TypeAdapter, ValidationError
from typer.core import TyperCommand

from cloud_engine.bench.figures import Report
from cloud_engine.bench.workload import SHAREGPT, Lengths
from cloud_engine.engine.config import EngineConfig
from shared.config import InvalidSettings
from shared.models import default_store, resolve

BATCHES = (1, 8, 32, 64)


class SeveralValues(TyperCommand):
    """Lets an option that may be repeated take several values at once: `--n 1 8 32` is `--n 1 --n 8 --n 32`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        several = {name for param in self.params if getattr(param, "multiple", False) for name in param.opts}
        return super().parse_args(ctx, repeated(args, several))


def bench(
    model: Annotated[str, typer.Option(help="name in the model store, folder, or GGUF file")],
    n: Annotated[list[int] | None, typer.Option("--n", min=1, help="requests at once: --n 1 8 32")] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option("--in", min=1, help="prompt tokens of each [128; mix: 161]")
    ] = None,
    output_tokens: Annotated[
        int | None, typer.Option("--out", min=1, help="output tokens of each [128; mix: 338]")
    ] = None,
    mixed: Annotated[bool, typer.Option("--mixed", help="log-normal lengths; --in and --out are the means")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="of each row, with other prompts")] = 1,
    seed: Annotated[int, typer.Option(help="of the first repeat's prompts")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    options: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE: any field of EngineConfig")] = None,
    csv: Annotated[Path | None, typer.Option(help="file to write the rows to as well")] = None,
) -> None:
    """Measure the engine alone: one JSON object a line, `n in out wall_s out_tok_s ...`, medians with their range."""
    lengths: Lengths = "mixed" if mixed else "fixed"
    usual = SHAREGPT if mixed else (128, 128)
    given = engine_options([f"dtype={dtype}", f"device={device}", *(options or ())])
    path = resolve(model, store=default_store(os.environ, Path.home()))
    from cloud_engine.bench.offline import Plan, run

    plan = Plan(n or BATCHES, prompt_tokens or usual[0], output_tokens or usual[1], lengths, repeats, seed)
    try:
        run(path, plan, given, Report(csv))
    except ValueError as error:
        raise InvalidSettings(str(error)) from error


def engine_options(pairs: Sequence[str]) -> Mapping[str, Any]:
    """`NAME=VALUE` each, as values of EngineConfig's fields. Raises InvalidSettings naming the field."""
    hints = get_type_hints(EngineConfig)
    known = {field.name: hints[field.name] for field in fields(EngineConfig)}
    return {name: _value(name, text, known) for name, _, text in (pair.partition("=") for pair in pairs)}


def _value(name: str, text: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        raise InvalidSettings(f"{name} is no field of EngineConfig; there are {', '.join(known)}", param=name)
    try:
        return TypeAdapter(known[name]).validate_strings(text)
    except ValidationError as error:
        raise InvalidSettings(f"{name}: {error.errors()[0]['msg']}", param=name) from error


def repeated(args: list[str], several: set[str]) -> list[str]:
    """Put an option that takes several values before each of them."""
    result: list[str] = []
    current: str | None = None
    for arg in args:
        if arg.startswith("--"):
            current = arg if arg in several else None
            result += [] if current else [arg]
        else:
            result += [current, arg] if current else [arg]
    return result
