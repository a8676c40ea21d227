"""The cloud dies, stops or was never there; the link is cut; the daemons are told to stop."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import local
import pytest
from clients import HELLO, metric, stream, text_of, until
from waiting import HANG_S

pytestmark = [pytest.mark.system, pytest.mark.model]

STORY = [{"role": "user", "content": "Tell a long story about a lighthouse."}]
CODE = [{"role": "user", "content": "Write a Python function that adds two numbers."}]


def linked(pair: Any) -> bool:
    return metric(pair.edge.url, "causeway_link_connected") == 1


def test_kill_before_the_first_token_is_answered_by_the_edge(start_pair: Callable[[], Any]) -> None:
    """kill -9 of a cloud that has the request but has said nothing: the edge answers, and says why; it stays alive."""
    pair = start_pair()
    assert until(lambda: linked(pair))
    os.kill(pair.cloud.process.pid, signal.SIGSTOP)  # it has the request in its socket, and no token comes
    timer = threading.Timer(4.0, os.kill, (pair.cloud.process.pid, signal.SIGKILL))
    timer.start()

    with pair.client() as client:
        events, headers = stream(client, model="auto", messages=CODE)
        timer.join()
        again, later = stream(client, model="auto", messages=CODE)

    assert text_of(events).strip()
    assert headers["x-causeway-route"] == "edge"
    assert headers["x-causeway-failovers"] == "1"
    assert "cloud" in headers["x-causeway-reason"]
    assert text_of(again).strip()
    assert later["x-causeway-route"] == "edge"


def test_kill_during_the_answer_ends_it_openly(start_pair: Callable[[], Any]) -> None:
    """kill -9 after the first token: an explicit error event, no [DONE], nothing spliced in; the edge still answers."""
    pair = start_pair()
    assert until(lambda: linked(pair))
    body = {
        "model": "cloud",
        "messages": STORY,
        "max_tokens": 1500,
        "ignore_eos": True,
        "stream": True,
        "temperature": 0,
    }

    with pair.client() as client:
        lines = []
        with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            for line in reply.iter_lines():
                lines.append(line)
                if len(lines) == 8:
                    os.kill(pair.cloud.process.pid, signal.SIGKILL)
        after, headers = stream(client, model="auto")

    error = httpx.Response(200, text=lines[-2].removeprefix("data: ")).json()["error"]
    assert len(lines) > 8
    assert "data: [DONE]" not in lines
    assert error["code"] in ("unrecoverable", "upstream_failed", "unreachable")
    assert headers["x-causeway-route"] == "edge"
    assert text_of(after).strip()


def test_edge_serves_with_the_cloud_down_from_the_start(
    model_path: Path, tmp_path: Path, stop_all: Callable[[local.Daemon], local.Daemon]
) -> None:
    """A cloud that nobody runs costs the edge neither its start nor its local answers."""
    edge = stop_all(
        local.start(
            "edge-agent",
            tmp_path / "log",
            "serve",
            "--model",
            str(model_path),
            "--port",
            "0",
            "--cloud",
            "ws://127.0.0.1:9",
        )
    )

    with httpx.Client(base_url=edge.url, timeout=60) as client:
        health = client.get("/health")
        events, headers = stream(client, model="auto", messages=CODE)

    assert health.status_code == 200
    assert headers["x-causeway-route"] == "edge"
    assert text_of(events).strip()


def test_sigterm_drains(start_pair: Callable[[], Any]) -> None:
    """SIGTERM while an answer runs: it finishes, and the process exits with 0."""
    pair = start_pair()
    body = {"model": "edge", "messages": HELLO, "max_tokens": 60, "ignore_eos": True, "stream": True}

    with pair.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as reply:
        lines = reply.iter_lines()
        first = [next(lines) for _ in range(3)]
        os.kill(pair.edge.process.pid, signal.SIGTERM)
        rest = list(lines)

    assert first[0].startswith("data: ")
    assert "data: [DONE]" in rest
    assert pair.edge.process.wait(HANG_S) == 0


def test_the_demo_leaves_nothing_running(model_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`make demo`'s script answers on both sides, falls back when the cloud is gone, and ends all it started."""
    local.console.width = 200

    local.demo(str(model_path))

    shown = capfd.readouterr().out
    assert "Who answered" in shown
    assert shown.count("edge") > 2
    assert "cloud" in shown
