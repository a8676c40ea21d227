import asyncio
import contextlib
import random
import resource
import shutil
import sqlite3
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from cache_parts import Clock, entry, query
from structlog.testing import capture_logs
from waiting import HANG_S

from edge_agent.cache.base import Entry
from edge_agent.cache.disk import DiskLayer
from edge_agent.cache.file import RETRY_S, AnswerFile
from edge_agent.cache.rows import Rows, Seal

QUESTIONS = [f"question {at}" for at in range(12)]
SEEDS = 200


def answer_to(question: str) -> Entry:
    return entry(f"the answer to {question} " * 40)


@contextlib.asynccontextmanager
async def disk(path: Path, *, max_bytes: int = 1 << 20, **options: Any) -> AsyncIterator[DiskLayer]:
    layer = DiskLayer(path, max_bytes, **({"rows": Rows(), "patience_s": 20.0, "clock": Clock()} | options))
    try:
        yield layer
    finally:
        await layer.aclose()


async def filled(path: Path, **options: Any) -> None:
    async with disk(path, **options) as layer:
        for question in QUESTIONS:
            await layer.put(query(question), answer_to(question))


def contents(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.iterdir())


def modes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir()}


async def hits(layer: DiskLayer) -> int:
    """How many questions are answered; each that is, rightly."""
    found = {question: await layer.get(query(question)) for question in QUESTIONS}
    assert all(one is None or one == answer_to(question) for question, one in found.items())
    return sum(one is not None for one in found.values())


async def works(layer: DiskLayer) -> bool:
    await layer.put(query("new"), entry("to new"))
    await layer.flush()
    return await layer.get(query("new")) == entry("to new")


async def test_outlives_the_process(tmp_path: Path) -> None:
    """What was put is there after the file was closed and opened again; it is its owner's alone."""
    path = tmp_path / "folder" / "answers.db"
    await filled(path)

    async with disk(path) as layer:
        assert await hits(layer) == len(QUESTIONS)
        assert layer.stats().entries == len(QUESTIONS)
        assert await layer.get(query(QUESTIONS[0], tenant="ann")) is None
        assert modes(path.parent) == {"answers.db": 0o600, "answers.db-wal": 0o600, "answers.db-shm": 0o600}


async def test_is_bounded_and_shared_out_by_tenant(tmp_path: Path) -> None:
    """S-48: a flood of one tenant stays within the bound and leaves another's answers where they are."""
    async with disk(tmp_path / "a.db", max_bytes=60_000) as layer:
        for name in "ab":
            await layer.put(query(name, tenant="ann"), entry(name * 300))
        for at in range(300):
            await layer.put(query(f"{at}", tenant="bob"), entry("x" * 300))
            await layer.flush()
        stats = layer.stats()

        assert [await layer.get(query(name, tenant="ann")) is not None for name in "ab"] == [True, True]
        assert await layer.get(query("299", tenant="bob")) is not None
        assert await layer.get(query("0", tenant="bob")) is None
    assert stats.size is not None
    assert 0 < stats.size <= 60_000
    assert stats.evictions > 100
    assert (tmp_path / "a.db").stat().st_size < 60_000 * 2 + 64 * 4096


async def test_drops_the_least_recently_used_first(tmp_path: Path) -> None:
    """What was asked for a minute ago stays, what nobody asked for goes."""
    clock = Clock()
    async with disk(tmp_path / "a.db", max_bytes=3_000, clock=clock) as layer:
        for name in "abc":
            await layer.put(query(name), entry(name * 300))
            await layer.flush()
            clock.now += 100
        await layer.get(query("a"))

        for name in "def":
            await layer.put(query(name), entry(name * 300))
            await layer.flush()
            clock.now += 1
        left = [name for name in "abcdef" if await layer.get(query(name))]

    assert "a" in left
    assert "b" not in left
    assert "f" in left


async def test_what_has_expired_is_removed(tmp_path: Path) -> None:
    """Now and then, while others are put: nobody will ask for it again."""
    clock = Clock()
    async with disk(tmp_path / "a.db", clock=clock) as layer:
        await layer.put(query("old"), entry(ttl_s=10))
        clock.now += 11
        for at in range(260):
            await layer.put(query(f"{at}"), entry(created=clock.now))
            await layer.flush()

        assert layer.stats().entries == 260


async def test_what_is_private_lies_on_disk_only_where_it_is_sealed(tmp_path: Path) -> None:
    """In the clear it is not even taken; and sealed, no text of it is in any file."""
    private, path = query(label="edge_only"), tmp_path / "a.db"
    async with disk(path) as layer:
        assert not layer.takes(private)
        assert not layer.takes(query(label="redact"))
        assert layer.takes(query())

    async with disk(path, rows=Rows(Seal("key"))) as layer:
        assert layer.takes(private)
        await layer.put(private, entry("quokka"))
        await layer.flush()
        assert await layer.get(private) == entry("quokka")
        files = contents(tmp_path)
        assert b"SQLite" in files
        assert b"quokka" not in files
    async with disk(path, rows=Rows(Seal("another key"))) as layer:
        assert await layer.get(private) is None
        assert await works(layer)


async def test_cleared_holds_nothing_of_it(tmp_path: Path) -> None:
    """Rows, pages, and what was moved aside are gone from the disk."""
    path = tmp_path / "a.db"
    await filled(path)
    path.with_suffix(".damaged").write_bytes(b"the answer to")
    async with disk(path) as layer:
        await layer.clear()
        assert await hits(layer) == 0
        assert (layer.stats().entries, layer.stats().size) == (0, 0)
        assert await works(layer)
    assert b"the answer to" not in contents(tmp_path)


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, bytes]]:
    """The bytes of a file and its write-ahead log, part of the answers in either."""
    folder = tmp_path_factory.mktemp("original")
    path = folder / "a.db"

    async def write() -> dict[str, bytes]:
        async with disk(path) as layer:
            for question in QUESTIONS[:8]:
                await layer.put(query(question), answer_to(question))
        async with disk(path) as layer:
            for question in QUESTIONS[8:]:
                await layer.put(query(question), answer_to(question))
            await layer.flush()
            return {name: (folder / name).read_bytes() for name in ("a.db", "a.db-wal")}

    yield asyncio.run(write())
    shutil.rmtree(folder)


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """One to a few hundred bytes overwritten, zeroed, repeated, or the end cut off."""
    broken = bytearray(raw)
    start, size = rng.randrange(len(raw)), rng.choice([1, 1, 4, 64, 512, 4096])
    match rng.randrange(5):
        case 0:
            del broken[start:]
        case 1:
            broken[start : start + size] = bytes(len(broken[start : start + size]))
        case 2:
            broken[start : start + size] = rng.randbytes(len(broken[start : start + size]))
        case 3:
            broken[start:start] = broken[start : start + size]
        case _:
            broken[rng.randrange(min(200, len(raw)))] ^= 1 << rng.randrange(8)
    return bytes(broken)


def test_bytes_of_damage_cost_answers_never_truth(tmp_path: Path, original: dict[str, bytes]) -> None:
    """200 seeds of damage to the file, its log or both: no wrong answer, no failure, and it keeps answers again."""
    outcomes = []
    for seed in range(SEEDS):
        folder = tmp_path / str(seed)
        folder.mkdir()
        outcomes.append(asyncio.run(_survives(folder, original, seed)))
        shutil.rmtree(folder)

    assert sum(found < len(QUESTIONS) for found, _ in outcomes) > SEEDS / 4  # the damage was real
    assert sum(aside for _, aside in outcomes) > SEEDS / 20
    assert max(found for found, _ in outcomes) == len(QUESTIONS)  # and some of it harmless


async def _survives(folder: Path, original: dict[str, bytes], seed: int) -> tuple[int, bool]:
    rng, clock = random.Random(seed), Clock()
    hurt = rng.choice([{"a.db"}, {"a.db"}, {"a.db-wal"}, {"a.db", "a.db-wal"}])
    for name, raw in original.items():
        (folder / name).write_bytes(damaged(raw, rng) if name in hurt else raw)
    with capture_logs():
        async with disk(folder / "a.db", clock=clock) as layer:
            found = await hits(layer)
            if not await works(layer):
                clock.now += 2 * RETRY_S
                assert await works(layer), f"seed {seed}"
            await hits(layer)
    return found, (folder / "a.damaged").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04\x95\x0f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94.",
        b"SQLite format 3\0" + bytes(84),
        b"\0" * 9000,
    ],
    ids=["empty", "a pickle", "a header alone", "zeros"],
)
async def test_what_is_no_cache_is_moved_aside(tmp_path: Path, content: bytes) -> None:
    """S-24: a pickle, or anything else in the file's place, is never read as an answer and never run."""
    path = tmp_path / "a.db"
    path.write_bytes(content)
    with capture_logs() as logs:
        async with disk(path) as layer:
            assert await hits(layer) == 0
            assert await works(layer)

    assert path.with_suffix(".damaged").exists() == bool(content)
    assert len(logs) == bool(content)


async def test_a_pickle_in_a_row_is_a_miss(tmp_path: Path) -> None:
    """S-24: also where the row of a question is found: it is none that was written."""
    path = tmp_path / "a.db"
    await filled(path)
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        poisons = (b"\x80\x04cposix\nsystem\n.", "text", 7, b"")
        for question, poison in zip(QUESTIONS, poisons, strict=False):
            database.execute("UPDATE answers SET answer=? WHERE key=?", (poison, query(question).key.raw))

    async with disk(path) as layer:
        assert await hits(layer) == len(QUESTIONS) - len(poisons)


async def test_another_versions_file_is_moved_aside(tmp_path: Path) -> None:
    """What a later one wrote is not guessed at."""
    path = tmp_path / "a.db"
    await filled(path)
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("PRAGMA user_version=99")

    with capture_logs() as logs:
        async with disk(path) as layer:
            assert await hits(layer) == 0
            assert await works(layer)

    assert [log["event"] for log in logs] == ["damaged, begun anew"]
    assert path.with_suffix(".damaged").exists()


# --- a place that cannot be used --------------------------------------------------------------------------------------


async def test_a_file_that_another_process_holds_is_left_alone_for_a_while(tmp_path: Path) -> None:
    """F15: locked: misses, one line in the log, nothing moved; once it is free it is used again."""
    path, clock = tmp_path / "a.db", Clock()
    await filled(path)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("PRAGMA locking_mode=EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    holder.execute("UPDATE answers SET used=0")

    with capture_logs() as logs:
        async with disk(path, clock=clock) as layer:
            assert await hits(layer) == 0
            assert not await works(layer)
            holder.execute("ROLLBACK")
            holder.close()
            assert await hits(layer) == 0
            clock.now += RETRY_S + 1
            assert await hits(layer) == len(QUESTIONS)

    assert [log["event"] for log in logs] == ["answers are not kept on disk"]
    assert not path.with_suffix(".damaged").exists()


async def test_two_daemons_may_share_a_file(tmp_path: Path) -> None:
    """F15: each finds what the other put, and neither takes the other's for damage, also while both make room."""
    with capture_logs() as logs:
        async with disk(tmp_path / "a.db", max_bytes=8_000) as one, disk(tmp_path / "a.db", max_bytes=8_000) as other:
            for at in range(60):
                layer, reader = (one, other) if at % 2 else (other, one)
                await layer.put(query(f"{at}"), entry(f"{at}" * 100))
                await layer.flush()
                assert await reader.get(query(f"{at}")) == entry(f"{at}" * 100)

    assert not logs


async def test_no_place_for_a_file_is_no_cache(tmp_path: Path) -> None:
    """A folder that cannot be made, or written to: misses, and one line."""
    (tmp_path / "taken").write_text("a file")
    for path in (tmp_path / "taken" / "a.db", Path("/proc/self/a.db")):
        with capture_logs() as logs:
            async with disk(path) as layer:
                assert await hits(layer) == 0
                assert not await works(layer)
                assert layer.stats().errors >= 1
        assert len(logs) == 1


async def test_a_full_disk_is_no_cache(tmp_path: Path) -> None:
    """F13: what is there is served on; what cannot be written is not, which is logged once; later it is tried again."""
    path, clock = tmp_path / "a.db", Clock()
    await filled(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with capture_logs() as logs:
        async with disk(path, max_bytes=1 << 26, clock=clock) as layer:
            assert await hits(layer) == len(QUESTIONS)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, hard))
            try:
                for at in range(8):
                    await layer.put(query(f"{at}"), entry(random.Random(at).randbytes(350_000).hex()))
                    await layer.flush()
                assert await hits(layer) == len(QUESTIONS)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert layer.stats().errors >= 1
            clock.now += RETRY_S + 1
            assert await works(layer)

    assert {log["event"] for log in logs} == {"answers are not kept on disk"}
    assert len(logs) <= 2
    assert not path.with_suffix(".damaged").exists()


async def test_a_slow_disk_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No request waits for it longer than the layer's patience, and works that pile up are bounded."""
    gate = threading.Event()
    monkeypatch.setattr(AnswerFile, "get", lambda self, key: gate.wait(2 * HANG_S) and None)
    async with disk(tmp_path / "a.db", patience_s=0.05) as layer:
        async with asyncio.timeout(HANG_S):
            assert await layer.get(query()) is None
            for at in range(200):
                await layer.put(query(f"{at}"), entry())
        gate.set()
    assert layer.stats().errors > 100


async def test_closed_it_keeps_and_finds_nothing(tmp_path: Path) -> None:
    """Requests that end after the layers were closed do not fail for it."""
    async with disk(tmp_path / "a.db") as layer:
        await layer.put(query(), entry())
    await layer.put(query("late"), entry())

    assert await layer.get(query()) is None
