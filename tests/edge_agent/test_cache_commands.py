import asyncio
from pathlib import Path

import httpx
import pytest
from edge_sides import HERE, daemon_over, policy_file
from fakes import ScriptedAnswer
from serving import served
from typer.testing import CliRunner

from edge_agent.__main__ import app
from edge_agent.api.admin import add_admin
from edge_agent.api.credentials import admin_token
from edge_agent.api.openai import openai_app
from edge_agent.cache.answers import AnswerCache
from edge_agent.cache.memory import MemoryLayer
from edge_agent.cache.store import Store
from edge_agent.instance import hold
from shared.errors import Unreachable
from shared.guard import Guard

BODY = {"model": "auto", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}


async def test_stats_and_clear_ask_the_daemon_that_runs(tmp_path: Path) -> None:
    """Found by its state folder: what each layer holds, and that it is empty then."""
    cache = AnswerCache(Store([MemoryLayer(1 << 20)]))
    daemon = daemon_over(ScriptedAnswer(*HERE), None, policy_file(tmp_path, "mode: prefer_edge"), cache)
    web = openai_app(daemon, keys=None, guard=Guard())
    add_admin(web, daemon, token=admin_token(tmp_path))

    def run(command: str) -> str:
        return CliRunner().invoke(app, ["cache", command, "--state-dir", str(tmp_path)], catch_exceptions=False).output

    with hold(tmp_path) as held:
        async with served(web) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            held.say(f"http://127.0.0.1:{port}")
            for _ in range(3):
                await client.post("/v1/chat/completions", json=BODY)
            before = await asyncio.to_thread(run, "stats")
            said = await asyncio.to_thread(run, "clear")
            after = await asyncio.to_thread(run, "stats")

    assert before.startswith("hit 2, shared 0, miss 1, bypass 0\n")
    assert [line.split()[:2] for line in before.splitlines()[2:]] == [["memory", "1"]]
    assert said == "cleared\n"
    assert [line.split()[:2] for line in after.splitlines()[2:]] == [["memory", "0"]]


def test_without_a_daemon_it_says_so(tmp_path: Path) -> None:
    """One line that names the folder."""
    with pytest.raises(Unreachable, match=str(tmp_path)):
        CliRunner().invoke(app, ["cache", "stats", "--state-dir", str(tmp_path)], catch_exceptions=False)
