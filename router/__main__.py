"""The command line: `router check|explain|replay|calibrate|train|report|schema`; each says more with `--help`."""

import dataclasses
import json
import sqlite3
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from router.calibrate import calibrate, section
from router.calibrate import read as read_outcomes
from router.cascade_rules import CascadeRules, Hold
from router.conditions import WEEKDAYS
from router.decide import Decision, decide
from router.defaults import default_policy
from router.document import MAX_BYTES
from router.features import NO_CLOUD, DeviceReading, LinkReading, RequestFeatures, estimate_tokens
from router.money import Price, spelled
from router.observe import observe, usable
from router.policy import InvalidPolicy, Policy, json_schema
from router.records import MAX_ROWS, read
from router.replay import plain, replay, said
from shared.errors import BadRequest, CausewayError
from shared.schemas import LABELS, ChatRequest, Label, Message, Sampling

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Check and try routing policies.")


def _file(what: str) -> Any:
    return typer.Option(exists=True, dir_okay=False, readable=True, help=what)


PolicyFile = Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True, help="A policy in YAML.")]


@app.command()
def check(file: PolicyFile) -> None:
    """Is this policy valid? Prints each problem with its line; exit status 0 or 1."""
    policy = _load(file)
    rules = f"{len(policy.rules)} rule{'' if len(policy.rules) == 1 else 's'}"
    typer.echo(f"{file}: valid; mode {policy.mode}, fallback {policy.fallback}, {rules}")


@app.command()
def explain(
    prompt: Annotated[str, typer.Option(help="The user's message.")],
    policy: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Else the default policy.")] = None,
    model: Annotated[str, typer.Option(help="auto, edge, cloud or a real model's name.")] = "auto",
    label: Annotated[str, typer.Option(help="free, redact or edge_only.")] = "free",
    max_tokens: Annotated[int | None, typer.Option(help="The request's own limit on the answer.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=0, help="Else estimated from the prompt.")] = None,
    edge_model: Annotated[str, typer.Option(help="The local model's name.")] = "edge-model",
    edge_context: Annotated[int, typer.Option(min=1, help="Its context, in tokens.")] = 2048,
    queue_depth: Annotated[int, typer.Option(min=0, help="Requests waiting on the device.")] = 0,
    queue_capacity: Annotated[int, typer.Option(min=1, help="How many may wait.")] = 16,
    cloud_model: Annotated[str, typer.Option(help="The cloud model's name.")] = "cloud-model",
    cloud_context: Annotated[int, typer.Option(min=1, help="Its context, in tokens.")] = 8192,
    round_trip_ms: Annotated[float | None, typer.Option(min=0, help="To the cloud and back.")] = None,
    at: Annotated[
        datetime | None, typer.Option(help="For schedules: the local time, else unknown.", formats=["%Y-%m-%dT%H:%M"])
    ] = None,
    cloud_down: Annotated[bool, typer.Option("--cloud-down", help="Not connected.")] = False,
    no_cloud: Annotated[bool, typer.Option("--no-cloud", help="None configured.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Where would this request go, and why? Runs nothing. Exit status 1 if it would be refused."""
    chosen = _load(policy) if policy else default_policy()
    request = _request(prompt, model, label, max_tokens)
    tokens = estimate_tokens(request) if prompt_tokens is None else prompt_tokens
    features = observe(request, chosen, prompt_tokens=tokens)
    device = DeviceReading(
        model=edge_model,
        context_length=edge_context,
        queue_depth=queue_depth,
        queue_capacity=queue_capacity,
        at=None if at is None else at.timestamp(),
        weekday=None if at is None else WEEKDAYS[at.weekday()],
        hour=None if at is None else at.hour + at.minute / 60,
    )
    link = LinkReading(
        connected=not cloud_down,
        round_trip_s=None if round_trip_ms is None else round_trip_ms / 1000,
        model=cloud_model,
        context_length=cloud_context,
    )
    try:
        decision = decide(features, chosen, device=device, link=NO_CLOUD if no_cloud else link)
    except CausewayError as error:
        _refused(error, features, as_json=as_json)
        raise typer.Exit(1) from None
    _show(decision, features, chosen.price, as_json=as_json)


@app.command("replay")
def replay_journal(
    journal: Annotated[Path, typer.Argument(help="The edge agent's journal.db.")],
    policy: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="The candidate.")],
    last: Annotated[int, typer.Option(min=1, help="How many of the newest decisions.")] = MAX_ROWS,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """What would this policy have done with the decisions that were recorded? Runs no model."""
    candidate = _load(policy)
    try:
        comparison = replay(read(journal, limit=last), candidate)
    except (OSError, sqlite3.Error) as error:
        typer.echo(f"{journal}: {error}", err=True)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(plain(comparison)))
        return
    off = {"first token": comparison.first_token_error_s, "whole answer": comparison.total_error_s}
    errors = ", ".join(f"{what} {seconds * 1000:.0f} ms" for what, seconds in off.items() if seconds is not None)
    rows = {"would": said(comparison), "decided by": _counted(comparison.rules)}
    _print(rows | ({"predictions off by": f"{errors} (median)"} if errors else {}))


@app.command("calibrate")
def calibrate_cascade(
    outcomes: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Answers known to be right or wrong.")],
    hold: Annotated[str, typer.Option(help="none, sentence or answer, as the policy has it.")] = "sentence",
) -> None:
    """Fit the cascade to a model: prints what belongs under `cascade` in the policy, with its reliability as comments.

    OUTCOMES has one JSON object a line: `model`, `right` (true or false), `logprobs` (a chat completion's
    `choices[0].logprobs.content`, asked for with `top_logprobs: 5`) and, for one file of the model alone, `digest`.
    With `second`, the same of another reply, drawn as the policy's `second_sample` says (and `second_model`, if it is
    another model's), there are two curves: without and with the agreement of the two.
    """
    held: dict[str, Hold] = {"none": "none", "sentence": "sentence", "answer": "answer"}
    if hold not in held:
        raise typer.BadParameter(f"must be one of {', '.join(held)}", param_hint="--hold")
    try:
        fitted = calibrate(read_outcomes(outcomes), CascadeRules(threshold=0.5, hold=held[hold]))
    except (OSError, CausewayError) as error:
        typer.echo(f"{outcomes}: {error}", err=True)
        raise typer.Exit(1) from None
    for one in fitted:
        typer.echo(f"# {one.model}: {one.answers} answers, {one.right:.0%} right; of answers not fitted to:")
        for what, curve in {"calibration error": one.alone, "with second samples: error": one.agreed}.items():
            if curve is not None:
                ranked = f"a right one ranks above a wrong one with probability {curve.ranked:.2f}"
                typer.echo(f"# {what} {curve.error:.3f}, {ranked}")
                for part in curve.bins:
                    typer.echo(f"#   said {part.said:.2f}   right {part.right:.2f}   of {part.count}")
    typer.echo(section(fitted))


@app.command("report")
def write_report(
    journal: Annotated[Path | None, _file("The edge agent's journal.db.")] = None,
    outcomes: Annotated[Path | None, typer.Option(exists=True, help="Outcome tables: a folder, or a file.")] = None,
    answers: Annotated[Path | None, _file("Judged answers, as for `router calibrate`.")] = None,
    policy: Annotated[Path | None, _file("Its goal, its prices, and what it would change.")] = None,
    out: Annotated[Path, typer.Option(dir_okay=False, help="The page to write.")] = Path("report.html"),
    last: Annotated[int, typer.Option(min=1, help="How many of the newest decisions.")] = MAX_ROWS,
) -> None:
    """One HTML page: what the router is worth, what it did, and what a policy would change.

    Without options, it has the curves of the shipped weights. Nothing is fetched, and no model is run.
    """
    from router.report.command import Sources, write

    chosen = _load(policy) if policy else None
    sources = Sources(journal, outcomes, answers, chosen, str(policy or ""), last)
    try:
        write(sources, out, datetime.now(UTC))
    except BadRequest as error:
        typer.echo(f"--{error.param}: {error.message}", err=True)
        raise typer.Exit(1) from None
    except CausewayError as error:
        typer.echo(error.message, err=True)
        raise typer.Exit(1) from None
    typer.echo(f"written: {out}")


@app.command("train", add_help_option=False, context_settings={"ignore_unknown_options": True})
def train_difficulty(arguments: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Learn the weights of the difficulty anew from outcome tables, or measure them: `router train --help`."""
    try:
        from router import train
    except ImportError as error:
        typer.echo(f"training needs the extra `train` (pip install causeway[train]): {error}", err=True)
        raise typer.Exit(1) from None
    train.main(arguments or [])


@app.command()
def schema() -> None:
    """The JSON Schema of a policy file, for editors."""
    typer.echo(json.dumps(json_schema(), indent=2))


def main() -> None:
    app()


def _load(file: Path) -> Policy:
    """The policy in `file`, or each problem printed with the line it is on, and exit status 1."""
    with file.open("rb") as stream:
        source = stream.read(MAX_BYTES + 1)
    try:
        return usable(source, name=str(file))
    except InvalidPolicy as invalid:
        lines = source.decode(errors="replace").splitlines()
        for problem in invalid.problems:
            typer.echo(f"{file}:{problem}", err=True)
            if problem.line <= len(lines):
                typer.echo(f"    {lines[problem.line - 1]}\n    {' ' * (problem.column - 1)}^", err=True)
        raise typer.Exit(1) from None


def _request(prompt: str, model: str, label: str, max_tokens: int | None) -> ChatRequest:
    labels: dict[str, Label] = {known: known for known in LABELS}
    if label not in labels:
        raise typer.BadParameter(f"must be one of {', '.join(labels)}", param_hint="--label")
    try:
        return ChatRequest(
            id="explain",
            model=model,
            messages=(Message(role="user", content=prompt),),
            sampling=Sampling(max_tokens=max_tokens),
            label=labels[label],
        )
    except BadRequest as error:
        raise typer.BadParameter(str(error)) from None


def _show(decision: Decision, features: RequestFeatures, price: Price | None, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({**dataclasses.asdict(decision), "features": dataclasses.asdict(features)}))
        return
    rows = {
        "target": decision.target,
        "fallback": decision.fallback or "none",
        "judged": "yes, the cloud may answer after all" if decision.escalates else "no",
        "redacted": "yes" if decision.redact else "no",
        "rule": decision.rule,
        "reason": "\n".join(decision.reasons),
        "measured": _measured(features),
    }
    if (cost := decision.predictions.cloud.cost) is not None and price is not None:
        rows["cost"] = f"{spelled(cost)} {price.currency} in the cloud"
    _print(rows)


def _refused(error: CausewayError, features: RequestFeatures, *, as_json: bool) -> None:
    if as_json:
        refusal = {"code": error.code, "message": error.message, "param": error.param, "retryable": error.retryable}
        typer.echo(json.dumps({"error": refusal, "features": dataclasses.asdict(features)}))
        return
    _print({"refused": error.code, "reason": error.message, "measured": _measured(features)})


def _counted(counts: Counter[str]) -> str:
    return "\n".join(f"{count:>6}  {name}" for name, count in counts.most_common(12))


def _measured(features: RequestFeatures) -> str:
    hints = [hint for hint in ("code", "maths", "json", "tools") if getattr(features, hint)]
    said = [f"{features.prompt_tokens} prompt tokens, {features.expected_output_tokens} tokens of answer expected"]
    if hints:
        said.append(f"looks like {', '.join(hints)}")
    if features.privacy.personal:
        said.append(features.privacy.undecided or f"{', '.join(features.privacy.kinds)} found")
    if features.difficulty is not None:
        said.append(f"difficulty {features.difficulty:.2f}")
    return "; ".join(said)


def _print(rows: dict[str, str]) -> None:
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/bold]", escape(value))
    Console().print(table)


if __name__ == "__main__":
    main()
