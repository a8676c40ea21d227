"""`router report`: reads what its options name, and writes the page."""

import contextlib
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Final

from router.activity import mean_call_cost, summarise
from router.assess import Assessment, assess, pooled, shipped_assessments
from router.calibrate import Fitted, calibrate
from router.calibrate import read as read_answers
from router.cascade_rules import CascadeRules
from router.classes import KNOWN
from router.difficulty import Difficulty
from router.features import CHARS_PER_TOKEN
from router.policy import Policy
from router.records import Recorded
from router.records import read as read_journal
from router.replay import replay
from router.report.curves import CallCost, Tables, aims
from router.report.page import Report, page
from router.tables import Table
from router.tables import read as read_tables
from shared.errors import BadRequest

SHIPPED: Final = (
    "By cross-validation when the weights were made: no question was scored by a model that had seen it, or another "
    "wording of it."
)
GIVEN: Final = (
    "Scored by the weights that decide, or by the table's own scores. On tables that the weights were learned from, "
    "these numbers flatter."
)


@dataclass(frozen=True, slots=True)
class Sources:
    """What the options name; `last`: how many of the newest decisions."""

    journal: Path | None = None
    outcomes: Path | None = None
    answers: Path | None = None
    policy: Policy | None = None
    policy_name: str = ""
    last: int = 100_000


def write(sources: Sources, out: Path, now: datetime) -> None:
    """Raises BadRequest whose `param` is the option that is wrong, InvalidWeights."""
    text = page(gather(sources, now), style())
    beside = out.with_name(f"{out.name}.new")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(out)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise BadRequest(f"cannot be written: {error.strerror or error}", param="out") from error


def style() -> str:
    """The console's sheet, and what the page adds."""
    files = resources.files("router")
    return "".join((files / part).read_text(encoding="utf-8") for part in ("console/style.css", "report/report.css"))


def gather(sources: Sources, now: datetime) -> Report:
    model, policy = Difficulty.load(), sources.policy
    tables, others = _tables(sources.outcomes)
    given = [Tables("outcomes", "Quality and cost: the tables given", _note(tables, others), _assessed(tables, model))]
    records = None if sources.journal is None else _records(sources.journal, sources.last)
    return Report(
        made=now,
        sources=_named(sources),
        tables=[*(given if tables else []), Tables("shipped", "Quality and cost", SHIPPED, shipped_assessments())],
        aims=aims(model, policy),
        cost=_cost(policy, records, tables),
        cascade=_cascade(sources),
        activity=None if records is None else summarise(records, KNOWN if policy is None else policy.targets),
        comparison=None if records is None or policy is None else replay(records, policy),
    )


def _named(sources: Sources) -> dict[str, str]:
    named = {"journal": sources.journal, "outcomes": sources.outcomes, "answers": sources.answers}
    said = {option: str(path) for option, path in named.items() if path is not None}
    return said | ({"policy": sources.policy_name} if sources.policy is not None else {})


def _tables(path: Path | None) -> tuple[list[Table], list[str]]:
    if path is None:
        return [], []
    try:
        return read_tables(path)
    except OSError as error:
        raise BadRequest(f"{path}: {error.strerror or error}", param="outcomes") from error


def _assessed(tables: Sequence[Table], model: Difficulty) -> list[Assessment]:
    scored = [table.scored(model) for table in tables]
    return [assess(table) for table in ([pooled(scored), *scored] if len(scored) > 1 else scored)]


def _note(tables: Sequence[Table], others: Sequence[str]) -> str:
    said = [GIVEN]
    said += [
        f"{table.name}: {table.left_out} rows with broken labels are left out." for table in tables if table.left_out
    ]
    if others:
        said.append(f"Not read, for their columns are others: {', '.join(others)}.")
    return " ".join(said)


def _records(path: Path, last: int) -> list[Recorded]:
    try:
        return list(read_journal(path, limit=last))
    except (OSError, sqlite3.Error) as error:
        raise BadRequest(f"{path}: {error}", param="journal") from error


def _cascade(sources: Sources) -> list[Fitted]:
    if sources.answers is None:
        return []
    rules = sources.policy.cascade if sources.policy is not None else None
    try:
        fitted = calibrate(read_answers(sources.answers), rules or CascadeRules(threshold=0.5))
    except (OSError, BadRequest) as error:
        raise BadRequest(f"{sources.answers}: {error}", param="answers") from error
    if not fitted:
        raise BadRequest(f"{sources.answers}: no answers", param="answers")
    return fitted


def _cost(policy: Policy | None, records: Sequence[Recorded] | None, tables: Sequence[Table]) -> CallCost | None:
    """By the policy's prices: of the requests that were recorded, else of the tables' questions."""
    if policy is None or policy.price is None:
        return None
    price = policy.price
    if records:
        return CallCost(mean_call_cost(records, price), price.currency, "at the length of those recorded")
    lengths = [len(row.query) // CHARS_PER_TOKEN for table in tables for row in table.rows]
    tokens = round(sum(lengths) / len(lengths)) if lengths else 0
    said = f"at {tokens} tokens of prompt and {policy.expected_output_tokens} of answer"
    return CallCost(price.of(tokens, policy.expected_output_tokens), price.currency, said)
