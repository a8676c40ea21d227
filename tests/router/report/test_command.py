"""`router report`: from files to a page, and what it says when a file is none."""

import json
import re
from pathlib import Path

import pytest
from reported import journal, records
from typer.testing import CliRunner, Result

from router.__main__ import app

POLICY = "mode: prefer_edge\ngoal: {cloud_share: 0.3}\n"
ANSWER = {"token": "a", "logprob": -0.1, "top_logprobs": [{"token": "a", "logprob": -0.1}]}


def run(*args: object) -> Result:
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, ["report", *map(str, args)])


def test_everything_on_one_page(tmp_path: Path) -> None:
    """A journal, tables, judged answers and a policy: each has its part, and the page is one file."""
    rows = [{"query": f"What is {number} + 1?", "edge": number % 2, "cloud": 1} for number in range(60)]
    (tmp_path / "ours.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokens = [[{**ANSWER, "logprob": -0.1 * (number % 7)}] * 3 for number in range(90)]
    judged = [{"model": "m", "right": at % 3 > 0, "logprobs": said} for at, said in enumerate(tokens)]
    (tmp_path / "answers").write_text("\n".join(map(json.dumps, judged)))
    (tmp_path / "policy.yaml").write_text(POLICY)
    out = tmp_path / "page.html"

    done = run(
        "--journal", journal(tmp_path / "journal.db", records(120)), "--outcomes", tmp_path / "ours.jsonl",
        "--answers", tmp_path / "answers", "--policy", tmp_path / "policy.yaml", "--out", out,
    )  # fmt: skip
    text = out.read_text()

    assert (done.exit_code, done.stdout) == (0, f"written: {out}\n"), done.output
    for title in ("Recorded decisions", "Spending", "What the policy would change", "the tables given", "Cascade"):
        assert title in text
    assert "120" in text
    assert not list(tmp_path.glob("*.new"))


def test_without_options_it_has_the_shipped_curves(tmp_path: Path, monkeypatch) -> None:
    """`router report` alone writes report.html where one stands."""
    monkeypatch.chdir(tmp_path)

    assert run().exit_code == 0
    assert "mmlu: Mixtral-8x7B → GPT-4" in (tmp_path / "report.html").read_text()


def test_the_newest_decisions_are_taken(tmp_path: Path) -> None:
    """`--last` bounds how many."""
    out = tmp_path / "page.html"
    run("--journal", journal(tmp_path / "journal.db", records(50)), "--last", 7, "--out", out)

    assert "<dt>decisions</dt><dd>7</dd>" in out.read_text()


@pytest.mark.parametrize(
    ("option", "content", "said"),
    [
        ("--journal", b"no database, but quite long enough to be told from one" * 9, "--journal: .*not a database"),
        ("--journal", b"", "--journal: .*no such table"),
        ("--outcomes", b"", "--outcomes: .*no outcome table there"),
        ("--answers", b"{", "--answers: .*line 1"),
        ("--answers", b"", "--answers: "),
        ("--policy", b"mode: maybe", "1: mode: must be"),
    ],
)
def test_what_is_wrong_is_named_by_its_option(tmp_path: Path, option: str, content: bytes, said: str) -> None:
    """Exit status 1, the option and what is wrong; a page that was there stays as it was."""
    out, file = tmp_path / "page.html", tmp_path / "file"
    out.write_text("before")
    file.write_bytes(content)

    done = run(option, file, "--out", out)

    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert re.search(said, done.stderr), done.stderr
    assert out.read_text() == "before"


@pytest.mark.parametrize("option", ["--journal", "--outcomes", "--answers", "--policy"])
def test_a_file_that_is_not_there_is_a_usage_error(tmp_path: Path, option: str) -> None:
    """Named by its option, before anything is read."""
    done = run(option, tmp_path / "nowhere")

    assert done.exit_code == 2
    assert option in done.stderr


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A folder that is not there."""
    done = run("--out", tmp_path / "nowhere" / "page.html")

    assert done.exit_code == 1
    assert done.stderr.startswith("--out: ")
