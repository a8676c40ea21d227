"""Ranks as they are in earnest: processes that start, compute, fail and end."""

import os
import random
import signal
import subprocess
import sys
from contextlib import aclosing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_llama
from clients import until

from cloud_engine.engine.build import build
from cloud_engine.engine.chunk import Chunk
from cloud_engine.engine.config import EngineConfig
from cloud_engine.engine.parallel import processes
from cloud_engine.engine.parallel.messages import Begin
from cloud_engine.engine.parallel.processes import RankLost, environment
from cloud_engine.engine.serving import load_engine
from cloud_engine.model.config import UnsupportedModel
from shared.errors import UpstreamFailed
from shared.schemas import ChatRequest, Sampling

GREEDY = Sampling(temperature=0, max_tokens=8, ignore_eos=True)
LIMITS = {"model_len": 128, "num_blocks": 65, "block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 16}


@contextmanager
def started(folder, **config):
    engine = build(folder, EngineConfig(**(LIMITS | config)))
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture(scope="module")
def pair(tiny_model):
    """Two ranks, each with half of every matrix, started with a secret in the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAUSEWAY_KEY", "secret")
        with started(tiny_model, tensor_parallel=2) as engine:
            yield engine


def prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(3, 259) for _ in range(length)] for length in (30, 2, 9)]


def add(engine) -> list:
    return [engine.add(os.urandom(4).hex(), prompt, GREEDY) for prompt in prompts()]


def wanted() -> list[list[int]]:
    return [tiny_llama.naive_greedy(prompt, GREEDY.max_tokens) for prompt in prompts()]


def others(engine) -> list[subprocess.Popen]:
    return [other.process for other in engine.runner._others]


def gone(pid: int) -> bool:
    """Ended, if perhaps not yet waited for by whoever is its parent now."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_two_engines_at_once_equal_the_naive_loop(pair, tiny_model):
    """Tensor parallel beside pipeline parallel (launched ahead) on one host, stepped in turn: neither hears the other.
    Then a rank of the one fails, which is known before the next step and says why, while the other goes on."""
    with started(tiny_model, pipeline_parallel=2, async_depth=1) as stages:
        made = [add(pair), add(stages)]
        while pair.has_work or stages.has_work:
            pair.step()
            stages.step()
        assert [[sequence.output for sequence in sequences] for sequences in made] == [wanted()] * 2
        stages.runner._others[0].channel.send(Begin(stages.config, []))
        assert until(lambda: stages.failed)
        with pytest.raises(RankLost, match=r"rank 1 .*TypeError: Begin came where Step belongs"):
            stages.runner.run([Chunk([5], 0, [1], 1)])
        with pytest.raises(RankLost):
            stages.runner.run([Chunk([5], 0, [1], 1)])
    assert [process.poll() for process in others(stages)] != [None]
    assert not pair.failed
    again = add(pair)
    while pair.has_work:
        pair.step()
    assert [sequence.output for sequence in again] == wanted()


def test_a_rank_has_no_secrets(pair):
    """Of the environment only what its libraries read: no key or token, by its name or by another's."""
    assert environment({"HF_TOKEN": "t", "CAUSEWAY_X": "x", "OMP_NUM_THREADS": "1", "LC_ALL": "C"}, ["", "/a"]) == {
        "OMP_NUM_THREADS": "1",
        "LC_ALL": "C",
        "PYTHONPATH": ".:/a",
    }
    inside = Path(f"/proc/{others(pair)[0].pid}/environ").read_bytes()
    assert b"PATH=" in inside
    assert b"secret" not in inside


def test_a_stuck_rank_is_an_error_within_the_limit(tiny_model):
    """A rank that is stopped, not dead, holds up a step no longer than `rank_timeout`; nothing is left of it."""
    with started(tiny_model, tensor_parallel=2) as engine:
        add(engine)
        engine.step()
        engine.runner.config = replace(engine.runner.config, rank_timeout=1.0)
        (process,) = others(engine)
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(RankLost, match="stuck"):
            engine.step()
    assert process.poll() == -signal.SIGKILL


async def test_a_dead_rank_ends_the_answers(tiny_model):
    """A rank is killed while an answer is streamed: the client gets a typed error, as does the next one; closing is as
    always, twice too."""
    answer = load_engine(tiny_model, EngineConfig(**(LIMITS | {"pipeline_parallel": 2})), name="tiny")
    await answer.start()
    (process,) = others(answer._engine)
    request = ChatRequest(id="r", model="tiny", prompt="hello", sampling=Sampling(temperature=0, ignore_eos=True))
    with pytest.raises(UpstreamFailed, match="the engine failed: RankLost"):
        async with aclosing(answer.answer(request)) as deltas:
            async for _ in deltas:
                process.kill()
    assert isinstance(answer.failure, UpstreamFailed)
    with pytest.raises(UpstreamFailed):
        await anext(answer.answer(request))
    await answer.aclose()
    await answer.aclose()


def test_ranks_end_with_rank_0(tiny_model, tmp_path):
    """However rank 0 ends: here it is killed, and can tell nobody. The folder they met in is gone already."""
    code = (
        "import sys; from pathlib import Path; from cloud_engine.engine.build import build\n"
        "from cloud_engine.engine.config import EngineConfig\n"
        f"engine = build(Path({str(tiny_model)!r}), EngineConfig(model_len=64, num_blocks=65, tensor_parallel=2))\n"
        "print('pid', *(other.process.pid for other in engine.runner._others), flush=True)\n"
        "sys.stdin.read()\n"
    )
    command, env = [sys.executable, "-c", code], os.environ | {"TMPDIR": str(tmp_path)}
    lead = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    with lead:
        pid = next(int(line.split()[1]) for line in lead.stdout if line.startswith("pid"))  # the log is there too
        assert not gone(pid)
        lead.kill()
    assert until(lambda: gone(pid))
    assert not list(tmp_path.glob("causeway-*"))


def test_a_rank_that_cannot_start_is_an_error(tiny_model, monkeypatch, tmp_path):
    """Its program ends at once: no waiting for what will never come, and no folder left behind."""
    monkeypatch.setattr(processes.sys, "executable", "/bin/false")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.raises(RankLost, match=r"rank \d .*exit status 1"):
        build(tiny_model, EngineConfig(**(LIMITS | {"tensor_parallel": 4})))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "error", "named"),
    [
        ({"tensor_parallel": 3}, UnsupportedModel, "4 attention heads"),
        ({"pipeline_parallel": 3}, UnsupportedModel, "2 layers"),
        ({"tensor_parallel": 2, "expert_parallel": True}, UnsupportedModel, "no experts"),
        ({"expert_parallel": True}, ValueError, "expert_parallel"),
        ({"tensor_parallel": 9, "pipeline_parallel": 9}, ValueError, "at most 64"),
        ({"tensor_parallel": 2, "device": "cuda:1"}, ValueError, "cuda:1"),
        ({"tensor_parallel": 2, "rank_timeout": 0.0}, ValueError, "rank_timeout"),
        ({"pipeline_parallel": 2, "deterministic": True}, ValueError, "deterministic"),
        ({"tensor_parallel": 2, "deterministic": True}, ValueError, "deterministic"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(tiny_model, monkeypatch, config, error, named):
    """No process is started for a model that cannot be divided so, or for limits that cannot be kept."""
    monkeypatch.setattr(processes.sys, "executable", "/no/such/program")
    with pytest.raises(error, match=named):
        build(tiny_model, EngineConfig(**(LIMITS | config)))


def test_the_rank_with_least_room_decides(tiny_model, monkeypatch):
    """Without a size every rank measures what is free for it; all get the blocks that fit into the least."""
    monkeypatch.setattr("cloud_engine.engine.parallel.part.kv_room", lambda model, config: 100_000)
    with started(tiny_model, tensor_parallel=2, num_blocks=0, max_num_seqs=8) as engine:
        # Of a token's 384 bytes each rank keeps half; the other rank really measures, and has much more.
        assert engine.config.num_blocks == 100_000 // (192 * 4)
        made = add(engine)
        while engine.has_work:
            engine.step()
        assert [sequence.output for sequence in made] == wanted()
