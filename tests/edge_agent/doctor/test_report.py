import json
import os
import subprocess
from pathlib import Path

import pytest
from processes import command, environment

from edge_agent.doctor.findings import fail, ok
from edge_agent.doctor.report import shown


def doctor(folder: Path, *args: str, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command("doctor", *args),
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(folder, **env),
        check=False,
    )


@pytest.mark.model
def test_a_machine_in_order(tmp_path: Path, model_path: Path) -> None:
    """A line for each check, exit status 0; the same as JSON."""
    args = ("--model", str(model_path), "--port", "0")
    plain, listed = doctor(tmp_path, *args), doctor(tmp_path, *args, "--json")

    assert (plain.returncode, plain.stderr) == (0, "")
    assert {line.split()[0] for line in plain.stdout.splitlines() if line[0] != " "} <= {"OK", "WARN"}
    found = json.loads(listed.stdout)
    assert [one["check"] for one in found][:3] == ["settings", "runtime", "model"]
    assert set(found[0]) == {"check", "status", "said", "todo"}


def test_what_is_wrong_is_said_with_what_to_do(tmp_path: Path) -> None:
    """No such model, a policy with a mistake: FAIL with its reason, exit status 1, no traceback; the rest is done."""
    (tmp_path / "policy.yaml").write_text("mode: sideways\n")
    done = doctor(tmp_path, "--model", "nobody:7b", "--policy", str(tmp_path / "policy.yaml"), "--port", "0", "--json")

    found = {one["check"]: one for one in json.loads(done.stdout)}
    assert done.returncode == 1
    assert done.stderr == ""
    assert (found["model"]["status"], found["policy"]["status"]) == ("FAIL", "FAIL")
    assert "nobody:7b" in found["model"]["said"]
    assert "policy.yaml:1" in found["policy"]["said"]
    assert found["daemon"]["status"] == "OK"


def test_settings_that_cannot_be_read_are_a_finding(tmp_path: Path) -> None:
    """FAIL with the file and the field, and what needs no settings is still looked at."""
    (tmp_path / "edge.toml").write_text("prot = 1\n")
    done = doctor(tmp_path, "--config", str(tmp_path / "edge.toml"), "--json")

    found = {one["check"]: one["status"] for one in json.loads(done.stdout)}
    assert done.returncode == 1
    assert (found["settings"], found["runtime"]) == ("FAIL", "OK")
    assert "prot" in done.stdout


@pytest.mark.parametrize("columns", [40, 60, 200])
def test_lines_fit_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long findings are wrapped under their own column; paths are not broken."""
    monkeypatch.setitem(os.environ, "COLUMNS", str(columns))
    path = "/a/path/not/to/break"
    text = shown(
        fail("model", f"something long is wrong with the file {path} and with others", "do this and then that")
    )

    assert all(len(line) <= columns for line in text.splitlines())
    assert path in text
    assert "-> do this" in text
    assert "->" not in shown(ok("model", "fine"))
