"""`cloud-engine bench` and `bench-serve`: their options, read and checked before anything is loaded."""

import asyncio
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from pydantic import TypeAdapter, ValidationError
from typer.core import TyperCommand

from cloud_engine.bench.figures import Report
from cloud_engine.bench.workload import SHAREGPT, Lengths
from cloud_engine.engine.config import EngineConfig
from cloud_engine.settings import CloudSettings
from shared.config import InvalidSettings, read_secret
from shared.models import default_store, resolve
from shared.telemetry import set_up_logging

BATCHES = (1, 8, 32, 64)
RATES = (1.0, 2.0, 4.0)


class SeveralValues(TyperCommand):
    """Lets an option that may be repeated take several values at once: `--n 1 8 32` is `--n 1 --n 8 --n 32`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        several = {name for param in self.params if getattr(param, "multiple", False) for name in param.opts}
        return super().parse_args(ctx, repeated(args, several))


def bench(
    model: Annotated[str | None, typer.Option(help="name in the model store, folder, or GGUF file")] = None,
    shape: Annotated[
        str | None, typer.Option(help="instead: random weights of this shape, 0.6b, 8b, 30b-a3b, tiny or tiny-moe")
    ] = None,
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
    if (model is None) == (shape is None):
        raise InvalidSettings("one of --model and --shape is needed", param="model")
    path = resolve(model, store=default_store(os.environ, Path.home())) if model else None
    from cloud_engine.bench.offline import Plan, run
    from cloud_engine.model.shapes import find_shape

    set_up_logging("warning")  # on stderr: stdout is the report's
    plan = Plan(n or BATCHES, prompt_tokens or usual[0], output_tokens or usual[1], lengths, repeats, seed)
    try:
        run(path or find_shape(shape or ""), plan, given, Report(csv))
    except ValueError as error:
        raise InvalidSettings(str(error)) from error


def bench_serve(
    model: Annotated[str, typer.Option(help="with --url the model's name there; else what to start an engine with")],
    url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible server, http://HOST:PORT/v1; none: start one")
    ] = None,
    key_file: Annotated[Path | None, typer.Option(help="file with the key for the server")] = None,
    rate: Annotated[
        list[float] | None, typer.Option(min=0.001, help="requests a second, Poisson: --rate 1 2 4")
    ] = None,
    clients: Annotated[list[int] | None, typer.Option(min=1, help="closed loop: clients at once, each in turn")] = None,
    requests: Annotated[int, typer.Option(min=1, help="of each row")] = 64,
    prompt_tokens: Annotated[
        int | None, typer.Option("--in", min=1, help="words of each prompt [128; mix: 161]")
    ] = None,
    output_tokens: Annotated[
        int | None, typer.Option("--out", min=1, help="output tokens of each [128; mix: 338]")
    ] = None,
    mixed: Annotated[bool, typer.Option("--mixed", help="log-normal lengths; --in and --out are the means")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="ask chat/completions, not completions")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="of each row, with other prompts and arrivals")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="of the first repeat")] = 0,
    warm_up: Annotated[int, typer.Option(min=0, help="requests before the first row, not counted")] = 4,
    slo_ttft_ms: Annotated[float, typer.Option(min=0, help="objective: first token within")] = 1000.0,
    slo_itl_ms: Annotated[float, typer.Option(min=0, help="objective: mean gap between tokens within")] = 100.0,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds until a request counts as failed")] = 600.0,
    options: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE: a setting of the engine started")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="file to write the rows to as well")] = None,
) -> None:
    """Measure a server under load, over streaming HTTP: first-token time, gaps, goodput at an objective, errors."""
    from cloud_engine.bench.load import Objective, Target
    from cloud_engine.bench.serving import Plan, run, started

    usual = SHAREGPT if mixed else (128, 128)
    plan = Plan(
        rates=rate or (() if clients else RATES),
        clients=clients or (),
        requests=requests,
        prompt_tokens=prompt_tokens or usual[0],
        output_tokens=output_tokens or usual[1],
        lengths="mixed" if mixed else "fixed",
        repeats=repeats,
        seed=seed,
        warm_up=warm_up,
        objective=Objective(slo_ttft_ms / 1e3, slo_itl_ms / 1e3),
    )
    key, path = read_secret(key_file, "key_file") if key_file else "", "chat/completions" if chat else "completions"
    with nullcontext(url) if url else started(model, _settings(options or ())) as base:
        target = Target(base.rstrip("/"), model if url else "cloud", key, path, timeout)
        asyncio.run(run(target, plan, Report(csv)))


def _settings(pairs: Sequence[str]) -> Mapping[str, str]:
    """`NAME=VALUE` each. Raises InvalidSettings for what is no setting: in the environment it would be ignored."""
    given = {name: value for name, _, value in (pair.partition("=") for pair in pairs)}
    if unknown := given.keys() - CloudSettings.model_fields.keys():
        raise InvalidSettings(f"{min(unknown)} is no setting of `cloud-engine serve`", param=min(unknown))
    return given


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
