import asyncio
import io
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from edge_sides import HERE, THERE, Remote, Turns, daemon_over, policy_file
from fakes import ScriptedAnswer
from serving import served
from waiting import HANG_S

from edge_agent.api.openai import openai_app
from edge_agent.chat import converse
from edge_agent.instance import find, hold
from edge_agent.screens import Plain
from shared.errors import Overloaded, UpstreamFailed
from shared.guard import Guard
from shared.schemas import Answer

Line = str | type[BaseException] | Callable[[], str]


class Terminal:
    """What a user types, and what the two streams show. A line may be an exception to raise instead."""

    def __init__(self, *lines: Line) -> None:
        self.lines: Iterator[Line] = iter(lines)
        self.out, self.aside = io.StringIO(), io.StringIO()
        self.screen = Plain(self.out, self.aside)
        self.failures = 0

    def read(self) -> str:
        line = next(self.lines, EOFError)
        if isinstance(line, str):
            return line
        if isinstance(line, type):
            raise line
        return line()

    @property
    def notes(self) -> list[str]:
        return self.aside.getvalue().splitlines()


async def talk(folder: Path, local: Answer, cloud: Answer | None, *said: Line, private: bool = False) -> Terminal:
    """What the terminal shows when the user says this."""
    daemon = daemon_over(local, cloud, policy_file(folder, "mode: prefer_cloud"))
    async with served(openai_app(daemon, keys=None, guard=Guard())) as port:
        return await asyncio.to_thread(_converse, f"http://127.0.0.1:{port}", said, private)


def _converse(url: str, said: tuple[Line, ...], private: bool = False) -> Terminal:
    terminal = Terminal(*said)
    terminal.failures = converse(url, "auto", private=private, read=terminal.read, screen=terminal.screen)
    return terminal


async def test_a_conversation_remembers_what_was_said(tmp_path: Path) -> None:
    """The second question carries the first and its answer; empty lines are not sent; each says who answered."""
    side = ScriptedAnswer(*HERE)

    terminal = await talk(tmp_path, side, None, "one", "  ", "two")

    assert terminal.out.getvalue() == "from here\n" * 2
    assert [note.partition(";")[0].rstrip("]") for note in terminal.notes] == ["[edge: no cloud is in use"] * 2
    assert "tokens/s" in terminal.notes[0]
    assert [len(request.messages) for request in side.requests] == [1, 3]
    assert [message.content for message in side.requests[1].messages] == ["one", "from here", "two"]
    assert terminal.failures == 0


async def test_failures_are_shown_and_forgotten(tmp_path: Path) -> None:
    """An error before or in the middle of an answer ends that answer; the next question does not carry it."""
    side = Turns((Overloaded("queue full"),), (HERE[0], UpstreamFailed("broke")), HERE)

    terminal = await talk(tmp_path, side, None, "one", "two", "three")

    assert terminal.notes[:2] == ["[overloaded: queue full]", "[upstream_failed: broke]"]
    assert terminal.out.getvalue() == "\nfrom \nfrom here\n"
    assert len(side.scripts[2].requests[0].messages) == 1
    assert terminal.failures == 2


async def test_private_stays_here(tmp_path: Path) -> None:
    """--private labels every request edge_only."""
    remote = Remote(Turns(THERE))

    terminal = await talk(tmp_path, Turns(HERE), remote, "secret", private=True)

    assert terminal.out.getvalue() == "from here\n"
    assert not remote.seen


def test_nobody_listening_is_said() -> None:
    """And what to do about it."""
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"

    assert "is `edge-agent serve` running?" in _converse(url, ("hello",)).notes[0]


async def test_ctrl_c_ends_the_answer_and_not_the_program(tmp_path: Path) -> None:
    """The request is cancelled at the daemon, what was said stays, and the next is answered."""
    gate = asyncio.Event()
    side = Turns((HERE[0], gate), HERE)
    daemon = daemon_over(side, None, policy_file(tmp_path, "mode: only_edge"))

    class Interrupted(Plain):
        def _show(self, piece: str) -> None:
            super()._show(piece)
            if piece == "from ":
                self._show = super()._show  # type: ignore[method-assign]
                raise KeyboardInterrupt

    terminal = Terminal("one", "two")
    terminal.screen = Interrupted(terminal.out, terminal.aside)
    async with served(openai_app(daemon, keys=None, guard=Guard())) as port:
        url = f"http://127.0.0.1:{port}"
        await asyncio.to_thread(
            lambda: converse(url, "auto", private=False, read=terminal.read, screen=terminal.screen)
        )
        await asyncio.wait_for(side.scripts[0].idle(), HANG_S)

    assert terminal.notes[0] == "[cancelled]"
    assert terminal.out.getvalue() == "from \nfrom here\n"
    assert [message.content for message in side.scripts[1].requests[0].messages] == ["one", "from ", "two"]


async def test_ctrl_c_at_the_prompt_takes_back_the_line(tmp_path: Path) -> None:
    """And says how to end."""
    terminal = await talk(tmp_path, ScriptedAnswer(*HERE), None, KeyboardInterrupt, "one")

    assert "[Ctrl-D ends the conversation]" in terminal.notes
    assert terminal.out.getvalue() == "from here\n"


async def test_commands(tmp_path: Path) -> None:
    """/model, /system, /clear change what is sent next; /help and what is unknown are answered here; /quit ends it."""
    side, remote = ScriptedAnswer(*HERE), Remote(ScriptedAnswer(*THERE))

    terminal = await talk(
        tmp_path, side, remote, "one", "/model edge", "/system Be brief.", "two", "/clear", "/system", "three",
        "/dance", "/help", "/quit", "never",
    )  # fmt: skip

    assert [request.model for request in remote.seen] == ["auto"]
    assert [[message.content for message in request.messages] for request in side.requests] == [
        ["Be brief.", "one", "from there", "two"],
        ["three"],
    ]
    assert "[no command /dance; /help lists them]" in terminal.notes
    assert any(note.startswith("/save FILE") for note in terminal.notes)


async def test_a_conversation_is_saved(tmp_path: Path) -> None:
    """As Markdown, 0600; a file that is there is not overwritten, one that cannot be is named, and so is none."""
    path = tmp_path / "talk.md"

    terminal = await talk(
        tmp_path, ScriptedAnswer(*HERE), None, "one", f"/save {path}", f"/save {path}", "/save", f"/save {tmp_path}/x/y"
    )

    assert path.read_text() == "**user**\n\none\n\n**assistant**\n\nfrom here\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert terminal.notes[1] == f"[saved to {path}]"
    assert "is there already" in terminal.notes[2]
    assert "name a file" in terminal.notes[3]
    assert "cannot be written" in terminal.notes[4]


@pytest.mark.parametrize("token", [True, False])
def test_the_daemon_here_is_found(tmp_path: Path, token: bool) -> None:
    """Where its lock says that it listens, with the token of its clients if it has one; what was given wins."""
    key = tmp_path / "other.key"
    key.touch(0o600)
    key.write_text("other\n")
    assert find(tmp_path, None, None) == ("http://127.0.0.1:8484", "any")
    if token:
        (tmp_path / "client.token").touch(0o600)
        (tmp_path / "client.token").write_text("secret\n")
    with hold(tmp_path) as held:
        held.say("http://127.0.0.1:4321")
        assert find(tmp_path, None, None) == ("http://127.0.0.1:4321", "secret" if token else "any")
        assert find(tmp_path, "http://127.0.0.1:1", key) == ("http://127.0.0.1:1", "other")
