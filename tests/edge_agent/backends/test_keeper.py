"""One model process is kept alive, whatever becomes of it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from waiting import until

from edge_agent.backends import keeper as module
from edge_agent.backends.child import Child
from edge_agent.backends.keeper import Keeper, KeeperRules
from edge_agent.backends.pipe import Cancel, Frame, FromModel, Load, Ready
from edge_agent.backends.spawn import Spare, spare
from shared.errors import UpstreamFailed
from shared.gguf import ModelInvalid


class Life:
    """What a keeper said: the process came up, or it went down and why, and in how many seconds the next starts."""

    def __init__(self) -> None:
        self.ups: list[int] = []
        self.downs: list[tuple[str, float]] = []

    def up(self, ready: Ready) -> None:
        self.ups.append(ready.context_length)

    def down(self, why: str, delay: float) -> None:
        self.downs.append((why, delay))

    async def until_up(self, times: int) -> None:
        await until(lambda: len(self.ups) >= times)


@asynccontextmanager
async def kept(
    path: Path, life: Life, rules: KeeperRules | None = None, spare: Spare | None = None
) -> AsyncIterator[Keeper]:
    keeper = Keeper(
        Load(str(path), "m", 1, 64),
        received=_ignore,
        up=life.up,
        down=life.down,
        busy=lambda: False,
        rules=rules or KeeperRules(first_delay_s=0.01),
        spare=spare,
        jitter=lambda: 1.0,
    )
    try:
        yield keeper
    finally:
        await keeper.aclose()


def _ignore(_: FromModel) -> None:
    pass


@pytest.mark.model
async def test_it_starts_later_after_each_death_until_an_answer_is_complete(model_path: Path) -> None:
    """The time doubles up to its limit; progress makes the next death the first again."""
    life = Life()
    async with kept(model_path, life, KeeperRules(first_delay_s=0.01, max_delay_s=0.02)) as keeper:
        await keeper.start()
        for death in range(4):
            await life.until_up(death + 1)
            if death == 3:
                keeper.progressed()
            assert keeper.pid
            psutil.Process(keeper.pid).kill()
        await life.until_up(5)

        assert keeper.restarts == 4
    assert life.downs == [("was ended by SIGKILL", delay) for delay in (0.01, 0.02, 0.02, 0.01)]
    assert life.ups == [64] * 5


@pytest.mark.model
async def test_the_first_life_is_that_of_the_spare(model_path: Path) -> None:
    """It was started before anybody knew the model; after its death others are, as ever."""
    life = Life()
    with spare() as one:
        assert one is not None
        assert one._spawned is not None
        first = one._spawned[0].pid
        async with kept(model_path, life, spare=one) as keeper:
            await keeper.start()
            assert (keeper.pid, one.take()) == (first, None)
            psutil.Process(first).kill()
            await life.until_up(2)

            assert keeper.pid not in (None, first)


async def test_a_spare_that_died_is_said_at_the_start(model_path: Path) -> None:
    """As a process is that dies while it loads; nothing hangs."""
    with spare() as one:
        assert one is not None
        assert one._spawned is not None
        one._spawned[0].kill()
        one._spawned[0].wait()
        async with kept(model_path, Life(), spare=one) as keeper:
            with pytest.raises(UpstreamFailed, match="was ended by SIGKILL while it loaded the model"):
                await keeper.start()


@pytest.mark.model
async def test_a_frame_out_of_turn_ends_the_process_and_not_the_daemon(model_path: Path) -> None:
    """Either end is strict: the process refuses a second Load, says so by its status, and is replaced."""
    life = Life()
    async with kept(model_path, life) as keeper:
        await keeper.start()
        keeper.send(Cancel(7))  # of nothing: harmless
        keeper.send(Load(str(model_path), "m", 1, 64))
        await life.until_up(2)

    assert life.downs == [("ended with status 70", 0.01)]


@pytest.mark.model
async def test_noise_from_the_process_ends_it(model_path: Path) -> None:
    """What is no frame is believed no further."""
    life = Life()
    async with kept(model_path, life) as keeper:
        await keeper.start()
        assert keeper._child is not None
        keeper._child.data_received(b"\xff" * 100)
        await life.until_up(2)

    assert "no frame" in life.downs[0][0]


async def test_what_is_wrong_with_a_model_is_said_at_the_start(tmp_path: Path) -> None:
    """By the process that found it, as the typed error it is there; no other is started."""
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    life = Life()
    async with kept(path, life) as keeper:
        with pytest.raises(ModelInvalid):
            await keeper.start()

        assert (keeper.pid, keeper.restarts, life.ups, life.downs) == (None, 0, [], [])


async def test_a_machine_without_room_for_a_process_is_a_typed_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start; nothing hangs."""

    async def full(*_: object) -> Child:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(module.Child, "start", full)
    async with kept(tmp_path, Life()) as keeper:
        with pytest.raises(UpstreamFailed, match="cannot be started"):
            await keeper.start()


@pytest.mark.model
async def test_a_fault_of_ours_is_a_death_like_any_other(model_path: Path) -> None:
    """Said and followed by the next process."""
    life = Life()
    async with kept(model_path, life) as keeper:
        await keeper.start()
        keeper._busy = lambda: 1 // 0 == 0
        await until(lambda: len(life.downs) == 1)
        keeper._busy = lambda: False
        await life.until_up(2)

    assert life.downs == [("was given up after ZeroDivisionError", 0.01)]


async def test_frames_to_no_process_go_nowhere(tmp_path: Path) -> None:
    """Before the start and after the end."""
    async with kept(tmp_path, Life()) as keeper:
        frame: Frame = Cancel(1)
        keeper.send(frame)
        await keeper.aclose()
        keeper.send(frame)
