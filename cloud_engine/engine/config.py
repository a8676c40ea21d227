"""What an engine is built with: one frozen value, and the pure function that fills in what was left to the machine."""

from dataclasses import dataclass, replace
from typing import Literal

DType = Literal["float32", "bfloat16", "float16"]
KvDType = Literal["auto", "fp8"]
Pooling = Literal["mean", "last"]
Quantization = Literal["none", "int8"]
MAX_RANKS = 64
DTYPE_BYTES: dict[DType, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits of one engine. Zero means "choose for me" where the docstring says so; `resolve` then picks a number.

    model_len: tokens of one sequence, prompt and output together (0: the model's own, or what the blocks hold).
    num_blocks: blocks in the KV tensors, the null block included (0: as many as `kv_bytes` holds; if that is 0 too, as
        many as are of use and fit into the memory that is free, see `memory`).
    max_num_batched_tokens: the budget of one step (0: 256 on a CPU, 4096 elsewhere). It bounds the gap between two
        tokens of everybody else while a long prompt is prefilled.
    max_waiting: requests that may queue before `Overloaded`. Of a full queue every tenant may still have an equal part.
    quantization: "int8" keeps the weights of matrix products as int8 (`model/packing.py`); all else stays in `dtype`.
    tensor_parallel, pipeline_parallel: ranks that share each matrix, and stages with some of the layers each. Their
        product is the number of processes; `kv_bytes` is then of each.
    expert_parallel: the ranks of a stage have some experts whole each, instead of a part of all.
    rank_timeout: seconds after which a step of several ranks counts as stuck.
    batch_patience: tokens computed for interactive requests before one waiting batch request is admitted ahead of them.
    host_blocks: blocks of evicted prefixes kept in host memory (0: as many as `host_bytes` holds, by default none).
    drafting: guess tokens from those before (see `drafting`) and check them in the same step, where that is faster. In
        float32 no token changes by it; in half precision only the distribution is the same. Unset: on a CPU. On a GPU a
        step with drafts is neither replayed from a graph nor launched ahead.
    deterministic: a request's logits do not depend on what is computed beside it, by a bit: not on the batch, chunks,
        cached prefixes, preemption or drafts. Several times slower; needs `async_depth` 0 and one rank.
    draft_patience: seconds that a request with a drafter outside stands still between two drafts before it is ended.
    free_rows: rows of a step that cost as much as reading the weights once (0: 16 on a CPU, 256 elsewhere). How far
        drafts go depends on it.
    kv_dtype: of the cache; "auto" is `dtype`, "fp8" takes a byte a number, and needs `kv_scales`.
    kv_scales: for each layer what its keys and its values are divided by. Frozen like all else here, and part of what
        prefixes are found by: a block is never read under other scales than it was written with.
    pooling: what an embedding is of the hidden states of its input: their mean, or the last one.
    async_depth: steps that are launched before the results of the step before are looked at, 0 or 1 (None: 1 on a GPU,
        0 on a CPU). With 1, scheduling and text are made while the device computes; outputs are the same.
    cuda_graphs: on CUDA, record decode steps once and replay them, if the kernel and the model allow.
    """

    model_len: int = 0
    block_size: int = 16
    num_blocks: int = 0
    kv_bytes: int = 0
    host_bytes: int = 0
    host_blocks: int = 0
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 0
    max_waiting: int = 256
    batch_patience: int = 8192
    prefix_caching: bool = True
    deterministic: bool = False
    drafting: bool | None = None
    free_rows: int = 0
    draft_patience: float = 60.0
    dtype: DType = "float32"
    kv_dtype: KvDType = "auto"
    kv_scales: tuple[tuple[float, float], ...] = ()
    quantization: Quantization = "none"
    pooling: Pooling = "mean"
    device: str = "cpu"
    async_depth: int | None = None
    cuda_graphs: bool = True
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    expert_parallel: bool = False
    rank_timeout: float = 60.0

    @property
    def num_ranks(self) -> int:
        """Processes that compute one step together."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def kv_value_bytes(self) -> int:
        """What one number of a key or value takes."""
        return 1 if self.kv_dtype == "fp8" else DTYPE_BYTES[self.dtype]

    @property
    def kv_format(self) -> str:
        """Names how blocks hold numbers: only under the same name may they be shared."""
        return f"{self.dtype} {self.kv_dtype} {self.kv_scales}"

    @property
    def kv_tokens(self) -> int:
        """How many tokens the pool can hold; block 0 holds nobody's."""
        return (self.num_blocks - 1) * self.block_size

    def checked(self) -> "EngineConfig":
        """This config, or ValueError naming the limit that cannot be kept."""
        counts = (self.block_size, self.max_num_seqs, self.max_waiting, self.batch_patience)
        if min(counts) < 1 or self.num_blocks < 2:
            raise ValueError(
                "block_size, max_num_seqs, max_waiting and batch_patience must be at least 1, num_blocks at least 2"
            )
        self.check_ranks()
        if not 2 <= self.model_len <= self.kv_tokens:
            raise ValueError(f"model_len {self.model_len} must be 2 to {self.kv_tokens}, what the KV blocks hold")
        if self.async_depth not in (None, 0, 1):
            raise ValueError(f"async_depth is {self.async_depth}; it must be 0 or 1")
        if self.deterministic and self.async_depth == 1:
            raise ValueError("deterministic needs async_depth 0")
        if self.free_rows < 0:
            raise ValueError("free_rows must not be negative")
        if self.draft_patience <= 0:
            raise ValueError("draft_patience must be positive")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                "max_num_batched_tokens must be at least max_num_seqs: every running sequence is served each step"
            )
        if self.host_blocks and not self.prefix_caching:
            raise ValueError("host_blocks keep prefixes: they need prefix_caching")
        return self

    def check_ranks(self) -> None:
        """Raises ValueError if there can be no such processes."""
        if min(self.tensor_parallel, self.pipeline_parallel) < 1 or self.num_ranks > MAX_RANKS:
            raise ValueError(
                f"tensor_parallel and pipeline_parallel must be at least 1, their product at most {MAX_RANKS}"
            )
        if self.expert_parallel and self.tensor_parallel == 1:
            raise ValueError("expert_parallel divides experts over the ranks of tensor_parallel, which is 1")
        if self.num_ranks > 1 and self.device not in ("cpu", "cuda"):
            raise ValueError(f"device {self.device!r} is one; with several ranks it is cpu or cuda, a GPU for each")
        if self.deterministic and self.num_ranks > 1:
            raise ValueError("deterministic needs the whole model in one process")
        if not 0 < self.rank_timeout <= 3600:
            raise ValueError("rank_timeout must be above 0 and at most 3600 seconds")


class TooLittleMemory(ValueError):
    """There is not memory enough for what was asked, or for anything of use."""


LEAST_LEN = 256
"""Without a `model_len` sequences may be as long as the memory allows, but an engine for shorter ones is of no use."""


def step_budget(config: EngineConfig) -> int:
    """Tokens in a step."""
    return config.max_num_batched_tokens or max(256 if config.device == "cpu" else 4096, config.max_num_seqs)


def resolve(config: EngineConfig, *, model_len: int, token_bytes: int, room: int = 0) -> EngineConfig:
    """Fill in every zero from the model's own context length, the bytes that one token's keys and values take, and the
    `room` for blocks that was measured. Raises ValueError for limits that cannot be kept, TooLittleMemory for one."""
    if config.model_len > model_len:
        raise ValueError(f"model_len {config.model_len} is over the model's context length of {model_len}")
    block_bytes = token_bytes * config.block_size
    num_blocks = config.num_blocks or 1 + config.kv_bytes // block_bytes
    if not config.num_blocks and not config.kv_bytes:
        num_blocks = _fitting(config, model_len, block_bytes, room)
    if 0 < config.host_bytes < block_bytes:
        raise ValueError(f"host_bytes {config.host_bytes} must be at least {block_bytes}, one block, or 0")
    held = (num_blocks - 1) * config.block_size
    on_cpu = config.device == "cpu"
    depth = 0 if on_cpu or config.deterministic else 1
    return replace(
        config,
        num_blocks=num_blocks,
        host_blocks=config.host_blocks or config.host_bytes // block_bytes,
        model_len=config.model_len or min(model_len, held),
        max_num_batched_tokens=step_budget(config),
        async_depth=depth if config.async_depth is None else config.async_depth,
        drafting=on_cpu if config.drafting is None else config.drafting,
        free_rows=config.free_rows or (16 if on_cpu else 256),
    ).checked()


def _fitting(config: EngineConfig, model_len: int, block_bytes: int, room: int) -> int:
    """Blocks for `room` bytes, but no more than `max_num_seqs` of the longest sequences can use."""

    def blocks(length: int) -> int:
        return -(-length // config.block_size)

    most, least = config.model_len or model_len, config.model_len or min(model_len, LEAST_LEN)
    needed = (1 + blocks(least)) * block_bytes
    if room < needed:
        raise TooLittleMemory(
            f"the KV cache needs at least {needed} bytes for one sequence of {least} tokens; {room} may be taken. "
            "Lower model_len or max_num_batched_tokens, use kv_dtype fp8, or free memory"
        )
    return min(room // block_bytes, 1 + config.max_num_seqs * blocks(most))
