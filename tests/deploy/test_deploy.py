"""Every file in deploy/ is loaded by the code that would read it."""

import configparser
import os
import plistlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import cloud_engine.__main__
import edge_agent.__main__
import router.__main__
from cloud_engine.settings import CloudSettings
from edge_agent.settings import EdgeSettings, check
from router.policy import parse
from shared.config import load

DEPLOY = Path(__file__).parents[2] / "deploy"
PLIST = "org.causeway.edge-agent.plist"
LOADED_HERE = {
    "policy.yaml",
    "edge.toml",
    "cloud.toml",
    "edge-agent.service",
    "cloud-engine.service",
    PLIST,
    "windows.md",
}
RUN_BY_SYSTEM_TESTS = {"local.py"}
LOADED_BY_THE_ROUTERS_TESTS = {"policy.schema.json"}


def test_no_file_is_left_out() -> None:
    """A new file in deploy/ needs a test that loads it."""
    there = {path.name for path in DEPLOY.iterdir() if path.is_file()}
    assert there == LOADED_HERE | RUN_BY_SYSTEM_TESTS | LOADED_BY_THE_ROUTERS_TESTS


def test_policy_is_valid() -> None:
    """The example policy parses, and `router check` agrees."""
    parse((DEPLOY / "policy.yaml").read_text(), name="policy.yaml")
    result = CliRunner().invoke(router.__main__.app, ["check", str(DEPLOY / "policy.yaml")])

    assert result.exit_code == 0, result.output


def test_edge_settings_load_and_may_start() -> None:
    """The example names only settings that exist, and is safe to start with."""
    settings = load(EdgeSettings, DEPLOY / "edge.toml", {}, {})

    check(settings)
    assert settings.port == 8484
    assert settings.cloud


def test_commented_out_edge_settings_exist_too(tmp_path: Path) -> None:
    """Every setting the example shows is a real one, the commented ones included."""
    text = (DEPLOY / "edge.toml").read_text()
    shown = [line.removeprefix("# ") if " = " in line else line for line in text.splitlines()]
    (tmp_path / "edge.toml").write_text("\n".join(shown))

    settings = load(EdgeSettings, tmp_path / "edge.toml", {}, {})

    assert settings.context == 2048


def test_cloud_settings_load() -> None:
    """The example names only settings that exist."""
    settings = load(CloudSettings, DEPLOY / "cloud.toml", {}, {})

    assert settings.port == 8585
    assert settings.engine_config().prefix_caching


def test_commented_out_cloud_settings_exist_too(tmp_path: Path) -> None:
    """Every setting the example shows is a real one, the commented ones included."""
    text = (DEPLOY / "cloud.toml").read_text()
    shown = [line.removeprefix("# ") if " = " in line else line for line in text.splitlines()]
    (tmp_path / "cloud.toml").write_text("\n".join(shown))

    settings = load(CloudSettings, tmp_path / "cloud.toml", {}, {})

    assert settings.backend == "openai"
    assert settings.upstream == ("http://127.0.0.1:8000/v1",)
    assert settings.tls is not None


@pytest.mark.parametrize(
    ("unit", "app"),
    [("edge-agent.service", edge_agent.__main__.app), ("cloud-engine.service", cloud_engine.__main__.app)],
)
def test_units_start_a_command_that_exists(unit: str, app: object) -> None:
    """systemd can parse the unit, and the options it passes are ours."""
    file = configparser.ConfigParser(interpolation=None, strict=False)
    file.optionxform = str  # type: ignore[assignment,method-assign]
    file.read(DEPLOY / unit)

    program, command, *options = shlex.split(file["Service"]["ExecStart"])
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output  # type: ignore[arg-type]

    assert Path(program).name == unit.removesuffix(".service")
    assert int(file["Service"]["TimeoutStopSec"]) > EdgeSettings().drain_s
    assert all(option in shown for option in options if option.startswith("--"))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd")
@pytest.mark.parametrize("unit", ["edge-agent.service", "cloud-engine.service"])
def test_systemd_takes_the_units(tmp_path: Path, unit: str) -> None:
    """Every directive is one that systemd knows, with a value that it takes; and it would notice one that is not."""
    text = re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={sys.executable}", (DEPLOY / unit).read_text())

    def verified(content: str) -> str:
        (tmp_path / unit).write_text(content)
        command = ["systemd-analyze", "verify", "--user", str(tmp_path / unit)]
        env = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=False)
        return "\n".join(line for line in done.stderr.splitlines() if unit in line)

    assert verified(text) == ""
    assert "Restrat" in verified(text.replace("Restart=", "Restrat="))


def test_launchd_starts_a_command_that_exists() -> None:
    """The property list can be read, gives the drain its time, and passes options that are ours."""
    with (DEPLOY / PLIST).open("rb") as stream:
        agent = plistlib.load(stream)

    shell, flag, line = agent["ProgramArguments"]
    word, program, command, *options = shlex.split(line)
    assert (shell, flag, word) == ("/bin/sh", "-c", "exec")
    assert Path(program).name == "edge-agent"
    assert set(filter(lambda option: option.startswith("--"), options)) <= options_of(command)
    assert f"{agent['Label']}.plist" == PLIST
    assert agent["ExitTimeOut"] > EdgeSettings().drain_s
    assert agent["KeepAlive"] == {"SuccessfulExit": False}
    assert agent["Umask"] == 0o077


def test_the_windows_notes_name_commands_that_exist() -> None:
    """Each `edge-agent.exe` line of theirs passes options that are ours."""
    lines = re.findall(r'edge-agent\.exe\\"? (\w+)(.*)', (DEPLOY / "windows.md").read_text())

    assert lines
    for command, rest in lines:
        assert set(re.findall(r"--[a-z-]+", rest)) <= options_of(command)


def options_of(command: str) -> set[str]:
    shown = CliRunner().invoke(edge_agent.__main__.app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    return set(re.findall(r"--[a-z][a-z-]+", shown.output))
