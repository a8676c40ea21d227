import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

from edge_sides import HERE, THERE, Remote, Turns, daemon_over, policy_file
from fakes import ScriptedAnswer
from serving import served

from edge_agent.api.openai import openai_app
from edge_agent.chat import converse
from shared.errors import Overloaded, UpstreamFailed
from shared.guard import Guard
from shared.schemas import Answer


async def talk(folder: Path, local: Answer, cloud: Answer | None, *said: str, private: bool = False) -> str:
    """What the terminal shows when the user says this."""
    daemon = daemon_over(local, cloud, policy_file(folder, "mode: prefer_cloud"))
    async with served(openai_app(daemon, keys=None, guard=Guard())) as port:
        return await asyncio.to_thread(_converse, f"http://127.0.0.1:{port}", said, private)


def _converse(url: str, said: tuple[str, ...], private: bool) -> str:
    lines: Iterator[str] = iter(said)
    shown: list[str] = []

    def read() -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    converse(url, "auto", private=private, read=read, write=shown.append)
    return "".join(shown)


async def test_a_conversation_remembers_what_was_said(tmp_path: Path) -> None:
    """The second question carries the first and its answer; empty lines are not sent."""
    side = ScriptedAnswer(*HERE)

    shown = await talk(tmp_path, side, None, "one", "  ", "two")

    assert shown == "from here\n[edge: no cloud is configured]\n" * 2
    assert [len(request.messages) for request in side.requests] == [1, 3]
    assert [message.content for message in side.requests[1].messages] == ["one", "from here", "two"]


async def test_failures_are_shown_and_forgotten(tmp_path: Path) -> None:
    """An error before or in the middle of an answer ends that answer; the next question does not carry it."""
    side = Turns((Overloaded("queue full"),), (HERE[0], UpstreamFailed("broke")), HERE)

    shown = await talk(tmp_path, side, None, "one", "two", "three")

    assert "[overloaded: queue full]" in shown
    assert "from \n[upstream_failed: broke]" in shown
    assert shown.endswith("from here\n[edge: no cloud is configured]\n")
    assert len(side.scripts[2].requests[0].messages) == 1


async def test_private_stays_here(tmp_path: Path) -> None:
    """--private labels every request edge_only."""
    remote = Remote(Turns(THERE))

    shown = await talk(tmp_path, Turns(HERE), remote, "secret", private=True)

    assert shown.startswith("from here")
    assert not remote.seen


def test_nobody_listening_is_said(tmp_path: Path) -> None:
    """And what to do about it."""
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"

    assert "is `edge-agent serve` running?" in _converse(url, ("hello",), private=False)
