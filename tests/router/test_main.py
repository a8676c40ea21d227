import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner, Result

import router
from router.__main__ import app
from router.policy import json_schema, parse

DEPLOYED = Path(__file__).parents[2] / "deploy" / "policy.yaml"


def run(*args: str) -> Result:
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, [str(arg) for arg in args])


def test_check_accepts():
    """A good policy: one line, exit status 0."""
    result = run("check", DEPLOYED)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{DEPLOYED}: valid; mode prefer_edge, fallback edge, 9 rules")


def test_what_the_deployed_policy_leaves_out_can_be_put_in():
    """Its lines that are commented out are valid where they stand."""
    shown = "cascade", "classes", "default_class", "prices", "budgets"
    text = re.sub(rf"^# (?=({'|'.join(shown)}|  \w+):)", "", DEPLOYED.read_text(), flags=re.MULTILINE)
    assert parse(text).model_fields_set >= {*shown}


def test_check_shows_each_mistake_with_its_line(tmp_path):
    """A bad one: `file:line: field: message`, the line itself and a mark below it; exit status 1."""
    file = tmp_path / "policy.yaml"
    file.write_text("mode: prefer_edge\nbreaker:\n  windw: 3\nfallback: maybe\n")
    result = run("check", file)
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"{file}:3: breaker.windw: unknown field; did you mean window?",
        "      windw: 3",
        "      ^",
        f"{file}:4: fallback: must be 'edge' or 'none'",
        "    fallback: maybe",
        "    ^",
    ]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"x" * (1 << 20), b"[" * 1000], ids=repr)
def test_check_survives_any_file(tmp_path, content):
    """No file makes the command crash."""
    file = tmp_path / "policy.yaml"
    file.write_bytes(content[: 1 << 20])
    result = run("check", file)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert f"{file}:1: " in result.stderr


def explain(*args: str) -> dict:
    return json.loads(run("explain", "--json", *args).stdout)


@pytest.mark.parametrize(
    ("args", "target", "rule"),
    [
        (["--prompt", "hello"], "edge", "mode"),
        (["--prompt", "hello", "--prompt-tokens", "900"], "cloud", "rule long-prompts"),
        (["--prompt", "hello", "--prompt-tokens", "900", "--cloud-down"], "edge", "cloud_disconnected"),
        (["--prompt", "hello", "--prompt-tokens", "900", "--no-cloud"], "edge", "no_cloud"),
        (["--prompt", "hello", "--prompt-tokens", "900", "--round-trip-ms", "9000"], "edge", "slow_link"),
        (["--prompt", "hello", "--prompt-tokens", "3000"], "cloud", "edge_context"),
        (["--prompt", "hello", "--prompt-tokens", "900", "--label", "edge_only"], "edge", "label"),
        (["--prompt", "hello", "--model", "cloud"], "cloud", "requested_model"),
        (["--prompt", "hello", "--model", "m", "--edge-model", "m"], "edge", "requested_model"),
        (["--prompt", "hello", "--max-tokens", "1000"], "edge", "mode"),
        (["--prompt", "hello", "--queue-depth", "16"], "cloud", "edge_queue_full"),
        (["--prompt", "8 * 9", "--policy", str(DEPLOYED)], "cloud", "rule mathematics"),
    ],
)
def test_explain(args, target, rule):
    """The decision that the daemon would take, from the values on the command line."""
    found = explain(*args)
    assert (found["target"], found["rule"]) == (target, rule)
    assert found["reasons"]
    assert found["features"]["prompt_tokens"] > 0


def test_explain_for_people():
    """Target, rule and reason in words, with what was measured."""
    result = run("explain", "--prompt", "What is 8 * 9?")
    assert result.exit_code == 0
    for said in ("cloud", "rule mathematics: maths true", "looks like maths", "prompt tokens"):
        assert said in result.stdout


def test_explain_a_refusal():
    """A request that would be refused says so by the error's name; exit status 1."""
    args = ("explain", "--prompt", "[b]hi[/b]", "--label", "edge_only", "--model", "cloud")
    result = run(*args)
    assert result.exit_code == 1
    assert "policy_denied" in result.stdout
    assert json.loads(run(*args, "--json").stdout)["error"]["code"] == "policy_denied"


@pytest.mark.parametrize(
    ("option", "value"), [("--label", "secret"), ("--max-tokens", "0"), ("--prompt-tokens", "-1"), ("--model", "")]
)
def test_explain_refuses_bad_options(option, value):
    """A value that no request could have is a usage error."""
    assert run("explain", "--prompt", "x", option, value).exit_code == 2


def test_explain_a_schedule(tmp_path):
    """With the time given, rules on it are tried; without, they do not hold."""
    file = tmp_path / "policy.yaml"
    file.write_text(
        "mode: prefer_edge\nrules: [{name: night, when: {hour: {'>=': 22}, weekday: sat}, target: cloud}]\n"
    )
    args = ("--prompt", "hello", "--policy", str(file))
    assert explain(*args, "--at", "2026-11-21T22:30")["rule"] == "rule night"
    assert explain(*args, "--at", "2026-11-22T22:30")["rule"] == explain(*args)["rule"] == "mode"
    assert run("explain", *args, "--at", "tonight").exit_code == 2


def test_train_is_handed_on_whole(monkeypatch):
    """With its own options; without the extra that it needs, one line says which."""
    seen = []
    monkeypatch.setattr(router, "train", SimpleNamespace(main=seen.append), raising=False)
    assert run("train", "build", "--data", "tables", "--help").exit_code == 0
    assert seen == [["build", "--data", "tables", "--help"]]
    monkeypatch.delattr(router, "train")
    monkeypatch.setitem(sys.modules, "router.train", None)
    missing = run("train", "build")
    assert missing.exit_code == 1
    assert "extra `train`" in missing.stderr


def test_schema():
    """The schema printed is the schema published."""
    assert json.loads(run("schema").stdout) == json_schema()


def test_a_bad_policy_explains_nothing(tmp_path):
    """`explain` with a broken policy names the mistake as `check` does."""
    file = tmp_path / "policy.yaml"
    file.write_text("mode: nowhere\n")
    result = run("explain", "--prompt", "x", "--policy", file)
    assert result.exit_code == 1
    assert f"{file}:1: mode: " in result.stderr
