"""What `ps` shows: what is in memory, how fast it was, and what the router predicts; a dash for the unmeasured."""

import json
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from edge_sides import THERE, Local, Remote, daemon_over, policy_file
from fakes import EchoAnswer, ScriptedAnswer

from edge_agent import __main__ as command
from edge_agent.api.models import model_routes
from edge_agent.daemon import Daemon
from edge_agent.ps import shown
from edge_agent.running import Running
from router.features import RequestFeatures
from router.predict import predict
from shared.administrators import Administrator

NOW = datetime(2030, 1, 1, tzinfo=UTC)
PRICES = "prices: {cloud: {input_per_million: 1000, output_per_million: 2000, currency: EUR}}"


def told(name: str = "a:1b", **changes: object) -> dict[str, Any]:
    """A model, as /admin/models tells of it."""
    unknown = {"first_token_s": None, "total_s": None, "cost": None, "battery_percent": None}
    return {
        "name": name, "state": "loaded", "size": 300_000_000, "processor": "cpu", "context_length": 2048, "running": 3,
        "queued": 2, "prompt_tokens_per_s": None, "answer_tokens_per_s": None,
        "expires_at": (NOW + timedelta(minutes=4)).isoformat(), "stays": False, "predicted": unknown, **changes,
    }  # fmt: skip


def found(*models: dict[str, Any], cloud: dict[str, Any] | None = None) -> dict[str, Any]:
    asked = {"prompt_tokens": 200, "answer_tokens": 256}
    return {"asked": asked, "memory_available": 3_200_000_000, "loaded": list(models), "cloud": cloud}


def lines(said: dict[str, Any], width: int | None = None) -> list[list[str]]:
    """The cells of each line."""
    return [re.split(r"  +", line) for line in shown(said, now=NOW, width=width).splitlines()]


def test_what_was_measured_and_what_it_would_take() -> None:
    """Two tables under titles; the heading says for which prompt."""
    there = {"first_token_s": 0.25, "total_s": 120.0, "cost": 0.0123, "battery_percent": 0.0}
    cloud = {"model": "large", "connected": True, "currency": "EUR", "predicted": there}
    here = {"first_token_s": 1.78, "total_s": 13.6, "cost": None, "battery_percent": 0.0234}
    model = told(prompt_tokens_per_s=112.4, answer_tokens_per_s=25.2, predicted=here)

    assert lines(found(model, cloud=cloud)) == [
        ["NAME", "SIZE", "PROCESSOR", "CONTEXT", "RUNNING", "QUEUED", "UNTIL"],
        ["a:1b", "300 MB", "cpu", "2048", "1", "2", "4 min idle"],
        ["3200 MB of memory can still be had"],
        [""],
        ["Tokens/s as measured; predicted for a prompt of 200 tokens, an answer of 256:"],
        ["NAME", "PROMPT", "WRITING", "FIRST TOKEN", "WHOLE ANSWER", "BATTERY", "COST"],
        ["a:1b", "112", "25", "1.8 s", "13.6 s", "0.023 %", "-"],
        ["cloud", "-", "-", "250 ms", "2 min", "0 %", "0.0123 EUR"],
    ]


def test_nothing_measured_is_a_dash() -> None:
    """No rate and no time is made up; a cloud that is away is said to be."""
    unknown = {"first_token_s": None, "total_s": None, "cost": None, "battery_percent": None}
    cloud = {"model": None, "connected": False, "currency": None, "predicted": unknown}
    loading = told("b", state="loading", expires_at=None, running=0, queued=0)
    *_, before, last = lines(found(loading, cloud=cloud))

    assert before == ["b", *["-"] * 6]
    assert last == ["cloud (away)", *["-"] * 6]
    assert lines(found(loading))[1][1] == "loading"


def test_until_when() -> None:
    """What works has no end yet; what the settings name stays, whether it works or not."""
    models = (told(expires_at=None), told(expires_at=None, stays=True), told(expires_at=None, stays=True, running=0))
    assert [line[-1] for line in lines(found(*models))[1:4]] == ["its last answer", "it is stopped", "it is stopped"]


@pytest.mark.parametrize("width", [80, 120])
def test_it_fits_a_terminal(width: int) -> None:
    """A long name is cut there; nothing is in a pipe."""
    said = found(told("organisation/a-model-with-a-very-long-name:q4_k_m" + "x" * 70))

    assert max(map(len, shown(said, now=NOW, width=width).splitlines())) <= width
    assert "x" * 70 in shown(said, now=NOW)


@pytest.fixture
async def daemon(tmp_path: Path) -> Daemon:
    return daemon_over(
        Local(EchoAnswer()), Remote(ScriptedAnswer(*THERE)), policy_file(tmp_path, f"mode: prefer_edge\n{PRICES}")
    )


async def test_the_predictions_are_the_routers_own(daemon: Daemon) -> None:
    """The same values from the same function as a decision's, for both sides."""
    daemon.local.runtime.prefill_tokens_per_s = 100.0  # type: ignore[attr-defined]
    handler = next(iter(model_routes(daemon))).handler
    said = await handler(_request(b"prompt_tokens=50&answer_tokens=7"), Administrator("x", "read"))
    asked = RequestFeatures(prompt_tokens=50, expected_output_tokens=7)
    by_router = predict(asked, daemon.device.reading(), daemon.agent.link(), daemon.policy.policy.price)

    assert said["loaded"][0]["predicted"]["first_token_s"] == by_router.edge.first_token_s == 0.5
    assert said["cloud"]["predicted"]["cost"] == by_router.cloud.cost == pytest.approx(0.064)
    assert said["cloud"]["currency"] == "EUR"
    json.dumps(said)


def _request(query: bytes) -> Any:
    from starlette.requests import Request

    return Request({"type": "http", "method": "GET", "path": "/admin/models", "query_string": query, "headers": []})


class Found(Running):
    """A daemon that is asked for what it is told to predict."""

    def __init__(self, _: Path) -> None:
        self.asked: tuple[int | None, ...] = ()

    def models(self, *asked: int | None) -> dict[str, Any]:
        assert asked in ((), (1200, 50), (1200,), (36, 256))
        return found(told())

    def length(self, prompt: str) -> tuple[int, int]:
        return 36, 256


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ([], 0),
        (["--tokens", "1200/50"], 0),
        (["--tokens", "1200"], 0),
        (["--prompt", "How high is it?"], 0),
        (["--json"], 0),
        (["--tokens", "a/b"], 2),
        (["--tokens", "0/5"], 2),
        (["--tokens", "1/2/3"], 2),
        (["--tokens", "5", "--prompt", "x"], 2),
    ],
)
def test_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str], status: int
) -> None:
    """What is no length is refused at its option; --json is what the daemon said."""
    monkeypatch.setattr("edge_agent.running.Running", Found)
    monkeypatch.setattr(sys, "argv", ["edge-agent", "ps", "--state-dir", str(tmp_path), *options])
    with pytest.raises(SystemExit) as left:
        command.main()
    out, err = capsys.readouterr()

    assert int(left.value.code or 0) == status
    assert ("--tokens" in err) is bool(status)
    if options == ["--json"]:
        assert json.loads(out) == found(told())
    elif not status:
        assert out.splitlines()[1].startswith("a:1b")
