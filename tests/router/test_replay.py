"""A candidate policy over recorded decisions: what would move, and what that would cost."""

import random
import sqlite3
import time
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from router.__main__ import app
from router.confidence import Heard, Judged
from router.features import DeviceReading, LinkReading, RequestFeatures
from router.money import Spent
from router.policy import parse
from router.privacy.inspect import Privacy
from router.records import INSERT, SCHEMA, Outcome, Recorded, decoded, encode, read
from router.replay import plain, replay, said

EDGE = Outcome(served="edge", ending="done", first_token_s=0.1, total_s=1.0, completion_tokens=9)
CLOUD = replace(EDGE, served="cloud", first_token_s=0.4)
TO_CLOUD = parse("mode: prefer_cloud")
LONG_TO_CLOUD = parse('mode: prefer_edge\nrules: [{name: long, when: {prompt_tokens: {">": 100}}, target: cloud}]')


def record(tokens: int = 10, outcome: Outcome = EDGE, **request: object) -> Recorded:
    return Recorded(
        at=1.0,
        request=RequestFeatures(prompt_tokens=tokens, **request),  # type: ignore[arg-type]
        device=DeviceReading(model="small", context_length=2048),
        link=LinkReading(model="large", context_length=8192),
        policy="0123456789ab",
        target=outcome.served,
        rule="mode",
        outcome=outcome,
    )


def journal(path: Path, records: list[Recorded]) -> Path:
    with sqlite3.connect(path) as database:
        database.execute(SCHEMA)
        database.executemany(INSERT, [(one.at, encode(one)) for one in records])
    database.close()
    return path


def test_the_same_policy_changes_nothing() -> None:
    """Replaying the policy that decided gives the decisions that were made."""
    comparison = replay([record(), record(20)], parse("mode: prefer_edge"))
    assert (comparison.total, comparison.changed, comparison.rules) == (2, 0, {"mode": 2})
    assert said(comparison) == "change nothing (of 2); 0 redacted, 0 private leaks"


def test_what_was_held_back_tells_no_times() -> None:
    """A cascade shows an answer later than it came: its times are nobody's."""
    judged = Judged(heard=Heard(tokens=3), p=0.9, threshold=0.6)
    held = [replace(one, judged=judged) for one in (record(10), record(200), record(300), record(250, CLOUD))]

    comparison = replay(held, LONG_TO_CLOUD)

    assert comparison.moved == {("edge", "cloud"): 2}
    assert comparison.estimated == 0
    assert not any(one.went_well for one in held)


def test_what_moves_is_counted_and_its_time_estimated() -> None:
    """The long ones move; how long the cloud takes is known from those that it answered."""
    records = [record(10), record(200), record(300), record(250, CLOUD)]
    comparison = replay(records, LONG_TO_CLOUD)
    assert comparison.moved == {("edge", "cloud"): 2}
    assert comparison.first_token_change_s == pytest.approx(0.3)
    assert comparison.estimated == 2
    assert "move 2 to the cloud (of 4)" in said(comparison)
    assert "first token +300 ms on 2 of the moved" in said(comparison)


def test_a_candidates_budget_counts_what_the_candidate_spends() -> None:
    """Not what was spent at the time: each day anew, by tenant, from what had been spent where the records begin."""
    day, one = 86_400.0, PRICED + "budgets: {day: 0.6}\nmode: prefer_cloud"
    records = [
        replace(record(91, tenant=who), at=at * day) for at, who in ((0.1, "a"), (0.2, "b"), (0.3, "a"), (0.4, "a"))
    ]
    records += [replace(record(91), at=1.5 * day), replace(record(91, replace(CLOUD, cost=0.2)), at=1.6 * day)]
    comparison = replay(records, parse(one), local_time=time.gmtime)

    assert {name: (it.recorded, pytest.approx(it.candidate)) for name, it in comparison.days.items()} == {
        "1970-01-01": (0.0, 0.3),
        "1970-01-02": (0.2, 0.3),
    }
    assert {name: pytest.approx(it.candidate) for name, it in comparison.tenants.items()} == {
        "a": 0.2,
        "b": 0.1,
        "": 0.3,
    }
    assert comparison.over_budget == 1
    assert said(comparison).endswith("; at most 0.3 EUR a day; 1 beyond the budget")
    assert plain(comparison)["days"]["1970-01-02"]["recorded"] == 0.2

    begun = replace(records[0], request=replace(records[0].request, spent=Spent(day=0.3, tenant=0.1)))
    later = replay([begun, *records[1:]], parse(one), local_time=time.gmtime)
    assert (later.over_budget, later.days["1970-01-01"].candidate) == (4, 0.0)


def test_a_candidate_that_refuses_beyond_its_budget_is_told() -> None:
    """Refusals for money are counted apart from the others."""
    policy = parse(PRICED + "budgets: {tenant_day: 0.4, over: refuse}\nmode: prefer_cloud")
    comparison = replay([record(91, tenant=who) for who in ("a", "a", "b")], policy, local_time=time.gmtime)
    assert comparison.moved == {("edge", "cloud"): 2, ("edge", "refused"): 1}
    assert comparison.over_budget == 1


PRICED = "prices: {cloud: {input_per_million: 1000, output_per_million: 1000, currency: EUR}}\n"


def test_what_moves_is_told_in_money() -> None:
    """Upwards by the length that the answer had, downwards by what was paid; without prices nothing is said."""
    records = [record(91), record(191), record(10, replace(CLOUD, cost=0.5)), record(20, CLOUD)]
    up = replay(records, parse("mode: prefer_cloud\n" + PRICED))
    down = replay(records, parse("mode: prefer_edge\n" + PRICED))
    assert up.cost_change == pytest.approx(0.3)
    assert said(up).endswith("; +0.3 EUR; at most 0.8 EUR a day")
    assert down.cost_change == pytest.approx(-0.529)
    assert said(down).endswith("; -0.529 EUR; at most 0.00 EUR a day")
    assert replay(records, TO_CLOUD).cost_change is None


def test_a_tenants_decisions_are_replayed_by_its_own_part() -> None:
    """As they would be decided."""
    candidate = parse("mode: prefer_edge\ntenants: {lab: {mode: prefer_cloud}}")
    assert replay([record(tenant="lab"), record()], candidate).moved == {("edge", "cloud"): 1}


def test_without_anything_to_go_by_no_time_is_said() -> None:
    assert replay([record(200)], LONG_TO_CLOUD).first_token_change_s is None


def test_private_requests_never_move() -> None:
    """Whatever the candidate says, what is labelled edge_only stays; what would be redacted is counted."""
    records = [record(label="edge_only"), record(privacy=Privacy(("email",))), record()]
    comparison = replay(records, TO_CLOUD)
    assert (comparison.moved, comparison.leaks, comparison.redacted) == ({("edge", "cloud"): 2}, 0, 1)


def test_refusals_are_moves() -> None:
    """A policy that refuses what was answered says so."""
    comparison = replay([record(label="edge_only")], parse("mode: only_cloud"))
    assert comparison.moved == {("edge", "refused"): 1}
    assert "refuse 1 more" in said(comparison)


def test_a_record_is_read_as_it_was_written() -> None:
    """Also one with everything in it."""
    full = record(privacy=Privacy(("card", "jwt"), secret=True, undecided=None), difficulty=0.25, label="redact")
    assert decoded(encode(full)) == full
    assert decoded(encode(replace(full, target=None, refused="policy_denied"))).refused == "policy_denied"


def test_records_of_another_version_are_passed_over(tmp_path: Path) -> None:
    """The newest are read, oldest first; what cannot be understood is no reason to stop."""
    path = journal(tmp_path / "journal.db", [record(number) for number in range(1, 6)])
    with sqlite3.connect(path) as database:
        database.execute(INSERT, (1.0, b'{"at": "long ago"}'))
    database.close()
    assert [one.request.prompt_tokens for one in read(path, limit=4)] == [3, 4, 5]


def test_the_command_line(tmp_path: Path) -> None:
    """`router replay` says it in a sentence; a file that is no journal is an error on one line."""
    path = journal(tmp_path / "journal.db", [record(10), record(200)])
    candidate = tmp_path / "candidate.yaml"
    candidate.write_text("mode: prefer_cloud\n")
    shown = CliRunner().invoke(app, ["replay", str(path), "--policy", str(candidate)])
    assert shown.exit_code == 0
    assert "move 2 to the cloud (of 2)" in " ".join(shown.output.split())
    assert CliRunner().invoke(app, ["replay", str(candidate), "--policy", str(candidate)]).exit_code == 1
    assert CliRunner().invoke(app, ["replay", "nowhere.db", "--policy", str(candidate)]).exit_code == 1


def test_thousands_are_replayed_the_same_every_time() -> None:
    """The same records and policy give the same numbers."""
    noise = random.Random(0)
    records = [record(noise.randrange(1, 400), noise.choice([EDGE, CLOUD])) for _ in range(500)]
    first, second = replay(records, LONG_TO_CLOUD), replay(list(records), LONG_TO_CLOUD)
    assert first == second
    assert first.changed > 100
