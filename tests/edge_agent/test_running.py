"""`ps` and `stop`: the running daemon is found by its state folder and asked over HTTP; without one, that is said."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from edge_sides import HERE, Local, daemon_over, policy_file
from fakes import ScriptedAnswer
from fastapi import FastAPI
from serving import served

from edge_agent.api.admin import add_admin
from edge_agent.api.credentials import admin_token
from edge_agent.api.openai import openai_app
from edge_agent.api.plan import add_route_plan
from edge_agent.backends.base import Loaded
from edge_agent.caller import ANYONE
from edge_agent.instance import hold
from edge_agent.running import Running
from shared.errors import BadRequest, UnknownModel, Unreachable, UpstreamFailed
from shared.guard import Guard

NOW = datetime(2030, 1, 1, tzinfo=UTC)


class Models(Local):
    """With two models in memory; `stopped` are those that were to go."""

    def __init__(self) -> None:
        super().__init__(ScriptedAnswer(*HERE))
        self.stopped: list[str] = []

    def loaded(self) -> list[Loaded]:
        file = Path("/nowhere/x.gguf")
        return [
            Loaded("a:1b", file, "loaded", 300_000_000, 1, 2048, 0, "cpu", NOW, NOW + timedelta(minutes=4), False),
            Loaded("default", file, "loading", 0, 1, 2048, 3, "cpu", None, None, True),
        ]

    async def stop(self, name: str) -> bool:
        if name not in ("a:1b", "default"):
            raise UnknownModel(f"{name} is not loaded", param="name", source="edge")
        self.stopped.append(name)
        return name == "a:1b"


@pytest.fixture
async def models(tmp_path: Path) -> AsyncIterator[tuple[Models, Path]]:
    """A daemon that listens, and its state folder."""
    state, local = tmp_path / "state", Models()
    daemon = daemon_over(local, None, policy_file(tmp_path, "mode: only_edge\nexpected_output_tokens: 77"))
    app = openai_app(daemon, keys=None, guard=Guard())
    add_route_plan(app, lambda _: ANYONE, daemon.agent)
    add_admin(app, daemon, token=admin_token(state))
    with ExitStack() as stack:
        held = stack.enter_context(hold(state))
        async with served(app) as port:
            held.say(f"http://127.0.0.1:{port}")
            yield local, state


async def test_the_models_are_told_with_what_a_prompt_would_take(models: tuple[Models, Path]) -> None:
    """For the lengths that are given, else for a typical prompt and the answer that the policy expects."""
    local, state = models
    local.runtime.prefill_tokens_per_s, local.runtime.queue_depth = 100.0, 2

    usual, given = await asyncio.to_thread(lambda: (Running(state).models(), Running(state).models(1200, 50)))

    assert [model["name"] for model in usual["loaded"]] == ["a:1b", "default"]
    assert usual["asked"] == {"prompt_tokens": 200, "answer_tokens": 77}
    assert given["asked"] == {"prompt_tokens": 1200, "answer_tokens": 50}
    assert given["loaded"][0]["queued"] == 2
    assert given["cloud"] is None


async def test_the_length_of_a_prompt_is_the_routers(models: tuple[Models, Path]) -> None:
    """Counted by the local tokenizer (5, says this one), the answer as the policy expects it; nothing is run."""
    local, state = models

    assert await asyncio.to_thread(lambda: Running(state).length("How high is it?")) == (5, 77)
    assert local.counted == 1


@pytest.mark.parametrize("tokens", [0, -1, 1 << 20 | 1, 10**12])
async def test_a_length_that_is_none_is_refused_by_name(models: tuple[Models, Path], tokens: int) -> None:
    with pytest.raises(BadRequest, match="prompt_tokens must be"):
        await asyncio.to_thread(lambda: Running(models[1]).models(tokens, 1))


async def test_stop_unloads_by_name(models: tuple[Models, Path]) -> None:
    """Also a name with a colon; what is not loaded is the daemon's own typed error."""
    local, state = models

    gone, stays = await asyncio.to_thread(lambda: (Running(state).stop("a:1b"), Running(state).stop("default")))
    with pytest.raises(UnknownModel, match="nobody is not loaded"):
        await asyncio.to_thread(lambda: Running(state).stop("nobody"))

    assert (gone, stays, local.stopped) == (True, False, ["a:1b", "default"])


@pytest.mark.parametrize("name", ["../../status", "a/b", "", "?x", "a%2fb"])
async def test_a_name_that_is_none_does_nothing(models: tuple[Models, Path], name: str) -> None:
    """S-12: it leads to no other path of the administration."""
    local, state = models

    with pytest.raises(Exception, match=r"not loaded|no such path"):
        await asyncio.to_thread(lambda: Running(state).stop(name))

    assert local.stopped == []


@pytest.mark.parametrize("leave", [lambda state: None, lambda state: state.mkdir()])
def test_without_a_daemon_that_is_said(tmp_path: Path, leave: Callable[[Path], None]) -> None:
    """With the command that starts one."""
    leave(tmp_path / "state")

    with pytest.raises(Unreachable, match="edge-agent serve"):
        Running(tmp_path / "state")


def test_a_daemon_that_does_not_answer_is_unreachable(tmp_path: Path) -> None:
    """It holds its folder and names an address, but nobody is there."""
    admin_token(tmp_path)
    with hold(tmp_path) as held:
        held.say("http://127.0.0.1:1")
        with pytest.raises(Unreachable, match="does not answer"):
            Running(tmp_path).models()


async def test_a_daemon_of_an_older_version_is_to_be_restarted(tmp_path: Path) -> None:
    """The package was replaced under it: that is said, whatever its replies lack."""
    admin_token(tmp_path)
    app = FastAPI()
    app.get("/admin/models")(lambda: {"loaded": []})
    with hold(tmp_path) as held:
        async with served(app) as port:
            held.say(f"http://127.0.0.1:{port}")
            with pytest.raises(UpstreamFailed, match="another version: restart it"):
                await asyncio.to_thread(lambda: Running(tmp_path).models())
