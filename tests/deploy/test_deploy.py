"""Every file in deploy/ is loaded by the code that would read it."""

import configparser
import shlex
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
LOADED_HERE = {"policy.yaml", "edge.toml", "cloud.toml", "edge-agent.service", "cloud-engine.service"}
RUN_BY_SYSTEM_TESTS = {"local.py"}


def test_no_file_is_left_out() -> None:
    """A new file in deploy/ needs a test that loads it."""
    assert {path.name for path in DEPLOY.iterdir() if path.is_file()} == LOADED_HERE | RUN_BY_SYSTEM_TESTS


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
