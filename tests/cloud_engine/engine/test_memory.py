import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from cloud_engine.engine import build, memory
from cloud_engine.engine.config import EngineConfig, TooLittleMemory, resolve
from cloud_engine.engine.memory import BYTES_PER_LOGIT, UNMEASURED, host_free, kv_room, peak_of_a_step, taking
from cloud_engine.engine.runner import Runner
from cloud_engine.model.weights import load_model

GB = 10**9
ASKED = EngineConfig(block_size=16, max_num_seqs=4)


def sized(room: int, **changes: object) -> EngineConfig:
    """For a model of context 1000 whose token takes 100 bytes."""
    return resolve(replace(ASKED, **changes), model_len=1000, token_bytes=100, room=room)


def test_as_many_blocks_as_fit():
    """Below what could be used, the cache takes all the room there is, and no more."""
    config = sized(200_000)
    assert config.num_blocks == 125
    assert config.model_len == 1000


def test_no_more_blocks_than_can_be_used():
    """With room to spare there is enough for every sequence at its longest, the null block and nothing beyond."""
    assert sized(GB).num_blocks == 1 + 4 * 63
    assert sized(GB, model_len=160).num_blocks == 1 + 4 * 10


def test_sequences_get_shorter_before_the_engine_gives_up():
    """Without a `model_len` what fits decides it, down to a length that is still of use."""
    assert sized(1600 * 21).model_len == 320
    with pytest.raises(TooLittleMemory, match="27200 bytes for one sequence of 256 tokens; 27199 may be taken"):
        sized(27199)
    assert sized(27200).model_len == 256


def test_a_length_that_was_asked_for_must_fit():
    """The error says how much one sequence needs, how much there is, and what to lower."""
    with pytest.raises(TooLittleMemory, match=r"102400 bytes for one sequence of 1000 tokens; 102399 .*model_len"):
        sized(102_399, model_len=1000)
    assert sized(102_400, model_len=1000).num_blocks == 64


def test_explicit_sizes_are_not_second_guessed():
    """`num_blocks` and `kv_bytes` stand, whatever was measured and whatever could be used."""
    assert sized(0, num_blocks=1234).num_blocks == 1234
    assert sized(0, kv_bytes=1_600_000).num_blocks == 1001


@dataclass
class Fake:
    """A GPU whose numbers the test knows. A step holds `step` bytes more than what is held already."""

    available: int
    step: int = 0
    base: int = 777
    measured: bool = False

    def free(self) -> int:
        return self.available

    def held(self) -> int:
        return self.base

    def peak(self) -> int:
        assert self.measured
        return self.base + self.step

    def reset(self) -> None:
        self.measured = True


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(tiny_model)


def test_a_cpu_keeps_a_reserve_and_room_for_swaps(model):
    """85 % of what is free, and prefixes swapped out live in the same memory."""
    assert kv_room(model, ASKED, host=lambda: 1000 * GB) == 850 * GB
    assert kv_room(model, replace(ASKED, host_bytes=50 * GB), host=lambda: 1000 * GB) == 800 * GB
    with pytest.raises(TooLittleMemory, match=f"host_bytes {900 * GB} is {50 * GB} more"):
        kv_room(model, replace(ASKED, host_bytes=900 * GB), host=lambda: 1000 * GB)


def test_a_gpu_keeps_what_a_step_needs_at_its_peak(model, monkeypatch):
    """The largest step is computed once to see what it takes beside the weights; sampling comes on top. The host's
    memory is another one."""
    monkeypatch.setattr(memory, "peak_of_a_step", lambda model, config, gauge: 3 * GB)
    asked = replace(ASKED, device="cuda", host_bytes=GB)
    assert kv_room(model, asked, host=lambda: 2 * GB, meter=lambda device: Fake(100 * GB)) == 82 * GB
    assert kv_room(model, asked, host=lambda: 2 * GB, meter=lambda device: Fake(GB)) == 0


def test_the_largest_step_is_a_whole_budget(model, monkeypatch):
    """As many tokens as a step may have, in sequences no longer than the model's, with a row to sample for each that
    may run."""
    steps = []
    monkeypatch.setattr(Runner, "run", lambda self, chunks: steps.append((self.config, chunks)))
    gauge = Fake(0, step=5000)
    asked = replace(ASKED, max_num_batched_tokens=600, kv_dtype="fp8", host_blocks=7)
    assert peak_of_a_step(model, asked, gauge) == 5000 + BYTES_PER_LOGIT * 4 * model.config.vocab_size
    ((config, chunks),) = steps
    assert [chunk.count for chunk in chunks] == [256] * 3
    assert sum(chunk.sampled for chunk in chunks) >= 4
    assert config.num_blocks == 17
    monkeypatch.undo()
    assert peak_of_a_step(model, asked, gauge) > 0, "and it can be computed"


def test_two_engines_share_a_gpu(model, monkeypatch):
    """The second one measures what the first has left; with too little of that it says so."""
    monkeypatch.setattr(memory, "peak_of_a_step", lambda model, config, gauge: 0)
    gpu = Fake(1_000_000)
    asked = replace(ASKED, device="cuda")
    sizes = []
    for _ in range(2):
        room = kv_room(model, asked, host=lambda: GB, meter=lambda device: gpu)
        sizes.append(resolve(asked, model_len=10_000, token_bytes=100, room=room))
        gpu.available -= sizes[-1].num_blocks * 1600
    assert 0 < sizes[1].num_blocks < sizes[0].num_blocks / 5
    with pytest.raises(TooLittleMemory):
        resolve(asked, model_len=10_000, token_bytes=100, room=kv_room(model, asked, lambda: GB, lambda device: gpu))


def test_memory_that_somebody_else_took_meanwhile():
    """The allocator's words become the same typed error; any other error stays what it is."""
    with pytest.raises(TooLittleMemory, match="another process may have taken"), taking(ASKED):
        torch.empty(1 << 55)
    with pytest.raises(TooLittleMemory), taking(ASKED):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(RuntimeError, match="shape"), taking(ASKED):
        torch.empty(2).view(3)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:  24000 kB\nMemFree:  100 kB\nMemAvailable:  9000 kB\nHugePages_Total: 0\n"}
V1 = "sys/fs/cgroup/memory"
V2 = "sys/fs/cgroup"


def test_what_the_kernel_says_is_available(tmp_path):
    """Not what is merely unused: files that are cached can go."""
    assert host_free(write(tmp_path, MEMINFO)) == 9000 * 1024


@pytest.mark.parametrize(
    ("group", "limits", "left"),
    [
        ("0::/a/b\n", {f"{V2}/a/b/memory.max": "5000000", f"{V2}/a/b/memory.current": "1000000"}, 4_000_000),
        ("0::/a/b\n", {f"{V2}/a/memory.max": "3000000", f"{V2}/a/memory.current": "1000000"}, 2_000_000),
        (
            "0::/\n",
            {
                f"{V2}/memory.max": "3000000",
                f"{V2}/memory.current": "2500000",
                f"{V2}/memory.stat": "anon 5\ninactive_file 400000\n",
            },
            900_000,
        ),
        ("0::/a\n", {f"{V2}/a/memory.max": "max", f"{V2}/a/memory.current": "1"}, 9000 * 1024),
        (
            "4:memory:/docker/x\n0::/\n",
            {
                f"{V1}/memory.limit_in_bytes": "3000000",
                f"{V1}/memory.usage_in_bytes": "1000000",
                f"{V1}/memory.stat": "inactive_file 7\ntotal_inactive_file 200000\n",
            },
            2_200_000,
        ),
        (
            "5:cpu,memory:/x\n",
            {f"{V1}/x/memory.limit_in_bytes": "9223372036854771712", f"{V1}/x/memory.usage_in_bytes": "5"},
            9000 * 1024,
        ),
        ("0::/a\n", {f"{V2}/a/memory.max": "1000", f"{V2}/a/memory.current": "2000"}, 0),
    ],
    ids=["v2", "v2, above", "v2, page cache", "v2, none", "v1 in a container", "v1, none", "over the limit"],
)
def test_the_limits_of_control_groups(tmp_path, group, limits, left):
    """The least that any group on the way up leaves, in both versions, counts if it is below what the machine has."""
    assert host_free(write(tmp_path, MEMINFO | {"proc/self/cgroup": group} | limits)) == left


def test_a_system_that_does_not_say(tmp_path):
    """Elsewhere than on Linux a fixed size is taken; here something is measured."""
    assert host_free(tmp_path) == UNMEASURED
    assert host_free() > 0


def test_loading_measures(tiny_model, monkeypatch):
    """An engine that is told nothing gets the blocks its sequences can use, or a clear error if memory is lacking."""
    made = build.build(tiny_model, EngineConfig(max_num_seqs=2))
    assert made.config.num_blocks == 1 + 2 * 256 // 16
    made.close()
    monkeypatch.setattr(memory, "host_free", lambda: 50_000)
    with pytest.raises(TooLittleMemory, match=re.escape("needs at least 104448 bytes for one sequence of 256 tokens")):
        build.build(tiny_model, EngineConfig(max_num_seqs=2))
