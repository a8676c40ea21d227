import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from edge_sides import HERE, THERE, Turns, ask, collect, daemon_over, policy_file
from structlog.testing import capture_logs
from waiting import until

from edge_agent import policy_file as module
from edge_agent.policy_file import PolicyFile
from router.policy import InvalidPolicy, parse
from router.records import Recorded

EDGE, CLOUD = "mode: only_edge\n", "mode: prefer_cloud\n"
BAD = "mode: prefer_cloud\nrules:\n  - name: a\n    whem: {}\n    target: edge\n"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files here are tiny and written by this test: they settle at once."""
    monkeypatch.setattr(module, "SETTLE_S", 0.001)
    monkeypatch.setattr(module, "POLL_S", 0.05)


@contextlib.asynccontextmanager
async def watched(policy: PolicyFile) -> AsyncIterator[None]:
    task = asyncio.create_task(policy.watch())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def put(path: Path, text: str) -> None:
    """Replace a file as editors and administrators' tools do: whole."""
    draft = path.with_name("draft")
    draft.write_text(text, "utf-8")
    draft.rename(path)


async def test_without_a_file_the_built_in_policy_holds() -> None:
    """No file, nothing to watch, and a reload changes nothing."""
    policy = PolicyFile(None)

    await policy.watch()

    assert (await policy.reload()).name == "default"
    assert policy.policy.mode == "prefer_edge"


@pytest.mark.parametrize("content", [BAD, "", "mode: fast", "mode: [", "\x00"])
def test_a_bad_file_does_not_start(tmp_path: Path, content: str) -> None:
    """The error names file and line."""
    with pytest.raises(InvalidPolicy, match=r"policy\.yaml:\d+"):
        policy_file(tmp_path, content)


def test_a_missing_file_does_not_start(tmp_path: Path) -> None:
    """The error names the file and says why."""
    with pytest.raises(InvalidPolicy, match=r"gone\.yaml.*No such file"):
        PolicyFile(tmp_path / "gone.yaml")


@pytest.mark.parametrize("notified", [True, False], ids=["notified", "polled"])
async def test_a_changed_file_is_taken_over(tmp_path: Path, notified: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaced or written in place, with file notifications or without: the new policy holds soon."""
    if not notified:
        monkeypatch.setitem(__import__("sys").modules, "watchfiles", None)
    policy = policy_file(tmp_path, EDGE)
    old = policy.current
    async with watched(policy):
        put(tmp_path / "policy.yaml", CLOUD)
        await until(lambda: policy.policy.mode == "prefer_cloud")
        (tmp_path / "policy.yaml").write_text(EDGE, "utf-8")
        await until(lambda: policy.policy.mode == "only_edge")

    assert policy.current.sha256 == old.sha256
    assert policy.failures == 0


async def test_a_bad_change_is_rejected_whole_and_reported_once(tmp_path: Path) -> None:
    """The old policy stays, one warning names line and field, and the next good file is taken."""
    policy = policy_file(tmp_path, EDGE)
    old = policy.current
    with capture_logs() as logs:
        async with watched(policy):
            put(tmp_path / "policy.yaml", BAD)
            await until(lambda: policy.failures > 0)
            await asyncio.sleep(0.3)
            assert policy.current is old
            put(tmp_path / "policy.yaml", CLOUD)
            await until(lambda: policy.policy.mode == "prefer_cloud")

    rejected = [entry["rejected"] for entry in logs if "rejected" in entry]
    assert len(rejected) == policy.failures == 1
    assert rejected[0].startswith("policy.yaml:4: rules[0].whem: ")


async def test_a_vanished_file_changes_nothing(tmp_path: Path) -> None:
    """The policy outlives its file, and takes it up again when it is back."""
    policy = policy_file(tmp_path, EDGE)
    async with watched(policy):
        (tmp_path / "policy.yaml").unlink()
        await until(lambda: policy.failures > 0)
        assert policy.policy.mode == "only_edge"
        put(tmp_path / "policy.yaml", CLOUD)
        await until(lambda: policy.policy.mode == "prefer_cloud")


async def test_a_half_written_file_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a policy that would parse by itself is never in force: only what has stopped changing is read."""
    monkeypatch.setattr(module, "SETTLE_S", 0.01)
    policy = policy_file(tmp_path, EDGE)
    rules = [f"  - {{name: r{i}, when: {{turns: {i}}}, target: edge}}\n" for i in range(1, 21)]
    lines, seen, read = iter(["rules:\n", *rules]), set[int](), module._read

    def growing(path: Path) -> bytes:
        """Whoever writes is one line further at each look."""
        with path.open("a", encoding="utf-8") as stream:
            stream.write(next(lines, ""))
        seen.add(len(policy.policy.rules))
        return read(path)

    (tmp_path / "policy.yaml").write_text(CLOUD)
    monkeypatch.setattr(module, "_read", growing)
    await policy.reload()

    assert seen == {0}
    assert len(policy.policy.rules) == 20


async def test_a_file_that_never_rests_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting has an end."""
    policy = policy_file(tmp_path, EDGE)
    numbers = iter(range(10**6))
    monkeypatch.setattr(module, "_read", lambda _: f"mode: only_cloud # {next(numbers)}".encode())

    with pytest.raises(InvalidPolicy, match="does not stop changing"):
        await policy.reload()

    assert policy.policy.mode == "only_edge"


async def test_a_hundred_reloads_under_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Policies good and bad come and go while requests run: each ends well, and its record names the version that it
    was decided by."""
    monkeypatch.setattr(module, "SETTLE_S", 0.01)
    policy = policy_file(tmp_path, EDGE)
    daemon = daemon_over(Turns(HERE), Turns(THERE), policy)
    stop, answers, records = asyncio.Event(), [], list[Recorded]()
    daemon.experience._keep = records.append

    async def client(name: int) -> None:
        while not stop.is_set():
            deltas, error = await collect(daemon.intake, ask(id=f"r{name}"))
            answers.append((deltas, error))
            await asyncio.sleep(0)

    clients = [asyncio.create_task(client(name)) for name in range(5)]
    for turn in range(100):
        put(tmp_path / "policy.yaml", (EDGE, BAD, CLOUD)[turn % 3])
        with contextlib.suppress(InvalidPolicy):
            await policy.reload()
    stop.set()
    await asyncio.gather(*clients)

    assert policy.failures == 33
    assert not any(error for _, error in answers)
    routed = [(deltas[0].route.target, "".join(delta.text for delta in deltas)) for deltas, _ in answers]  # type: ignore[union-attr]
    assert set(routed) == {("edge", "from here"), ("cloud", "from there")}
    named = {(record.policy, record.target) for record in records}
    assert named == {(parse(EDGE).fingerprint, "edge"), (parse(CLOUD).fingerprint, "cloud")}
    assert len(records) == len(answers)
