import random
from dataclasses import replace

import pytest
import tiny_llama
import torch

from cloud_engine.engine.blocks import BlockPool, chain_hash, chain_root
from cloud_engine.engine.calibration import calibrate
from cloud_engine.engine.chunk import Swap
from cloud_engine.engine.config import EngineConfig, resolve
from cloud_engine.engine.engine import Engine
from cloud_engine.engine.host_cache import HostCache
from cloud_engine.engine.host_store import HostStore
from cloud_engine.engine.runner import Runner
from cloud_engine.model.weights import load_model
from shared.schemas import Sampling

GREEDY = Sampling(temperature=0, max_tokens=6, ignore_eos=True)


def chain(count: int, root: bytes = chain_root("")) -> list[bytes]:
    keys = [root]
    for at in range(count):
        keys.append(chain_hash(keys[-1], [at]))
    return keys[1:]


def test_the_least_recently_evicted_goes_first():
    """Room is made by dropping what was saved longest ago; saving what is there already copies nothing."""
    host, (a, b, c) = HostCache(2), chain(3)
    host.save(a, block=5)
    host.save(b, block=6)
    host.save(a, block=9)
    host.save(c, block=7)
    assert host.lookup([a, b]) == [a]
    assert host.lookup([c]) == [c]
    first, second = host.slots[a], host.slots[c]
    assert host.drain() == (Swap(5, first, False), Swap(6, second, False), Swap(7, second, False))
    assert host.drain() == ()
    assert host.saved == 3


def test_what_is_about_to_be_read_is_not_overwritten():
    """While a prefix is fetched, the blocks that make way for it find no room rather than the prefix's own."""
    host, (a, b, c, d) = HostCache(2), chain(4)
    host.save(b, block=1)
    host.save(a, block=2)
    host.drain()
    borrowed = host.borrow([a, b])
    host.save(c, block=3)
    host.load(borrowed, [3, 4])
    assert [(swap.block, swap.loads) for swap in host.drain()] == [(3, True), (4, True)]
    assert host.lookup([c]) == []
    host.save(d, block=5)
    assert host.lookup([a, b]) == [a], "the tail goes before the head"


def test_no_memory_no_swaps():
    """Without slots nothing is kept and nothing is copied."""
    host = HostCache(0)
    host.save(chain(1)[0], block=1)
    assert host.lookup(chain(1)) == []
    assert host.drain() == ()


def test_a_prefix_goes_on_in_host_memory():
    """First what is on the device, then what the host has; a block on the device is never read from the host."""
    pool, keys = BlockPool(5, host_blocks=4), chain(4)
    table = pool.take([], 4)
    for block, key in zip(table, keys, strict=True):
        pool.publish(block, key)
    pool.release(table)
    other = pool.take([], 2)
    assert pool.lookup(keys) == (table[:2], keys[2:])
    pool.release(other)
    again = pool.take(table[:2], 2, stored=keys[2:])
    assert again[:2] == table[:2]
    assert pool.lookup(keys) == (again, [])
    saves, loads = pool.host.drain()[:2], pool.host.drain()
    assert [swap.block for swap in saves] == table[:1:-1]
    assert loads == ()
    pool.publish(again[2], keys[0])
    assert pool.lookup(keys)[0] == again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_contents_survive_the_round_trip(dtype):
    """Every layer of a block comes back into another block bit for bit, also where a slot is used twice in one list."""
    noise = torch.Generator().manual_seed(0)
    caches = [torch.randn(2, 6, 4, 2, 3, generator=noise).to(dtype) for _ in range(3)]
    before = [cache.clone().view(torch.uint8) for cache in caches]
    store = HostStore(caches, 2)
    store.apply([Swap(1, 0, False), Swap(2, 1, False), Swap(3, 0, True), Swap(4, 1, True), Swap(5, 0, False)])
    store.apply([Swap(1, 0, True)])
    for was, cache in zip(before, caches, strict=True):
        now = cache.view(torch.uint8)
        assert torch.equal(now[:, [3, 4, 1]], was[:, [1, 2, 5]])
        assert torch.equal(now[:, [0, 2, 5]], was[:, [0, 2, 5]])


def traffic() -> list[list[int]]:
    """Six conversations of one tenant that come back in turn, more than the pool holds."""
    rng = random.Random(4)
    trunks = [[rng.randrange(3, 259) for _ in range(30)] for _ in range(6)]
    return [trunk + [rng.randrange(3, 259) for _ in range(3 + turn)] for turn in range(3) for trunk in trunks]


def serve(engine: Engine, salts: list[str] | None = None) -> list[list[int]]:
    made = []
    for at, prompt in enumerate(traffic()):
        made.append(engine.add(str(at), prompt, GREEDY, salt=salts[at] if salts else ""))
        engine.step()
        engine.step()
    while engine.has_work:
        engine.step()
    return [sequence.output for sequence in made]


@pytest.fixture(scope="module")
def wanted() -> list[list[int]]:
    return [tiny_llama.naive_greedy(prompt, GREEDY.max_tokens) for prompt in traffic()]


def small(folder, **changes) -> Engine:
    values = {"model_len": 64, "num_blocks": 20, "block_size": 4, "max_num_batched_tokens": 16, "max_num_seqs": 3}
    return tiny_llama.engine(folder, **(values | changes))


@pytest.mark.parametrize("host_blocks", [4, 60, 200])
def test_swapping_changes_no_token(tiny_model, wanted, host_blocks):
    """With a pool too small for the traffic, prefixes leave for host memory and come back: every answer is that of the
    naive loop, and nothing leaks."""
    engine = small(tiny_model, host_blocks=host_blocks)
    assert serve(engine) == wanted
    stats = engine.stats()
    assert stats.swapped_out_blocks > 20
    assert stats.host_blocks_used == min(host_blocks, stats.swapped_out_blocks)
    assert stats.kv_blocks_used == 0
    assert stats.prefix_hit_rate == stats.prefix_hit_tokens / stats.prefix_query_tokens
    if host_blocks > 4:
        assert stats.swapped_in_blocks > 20
        assert 0 < stats.prefix_host_hit_tokens <= stats.prefix_hit_tokens


def test_host_memory_saves_computing(tiny_model):
    """The same traffic finds more of its prefixes with host memory than without."""
    hits = []
    for host_blocks in (0, 200):
        engine = small(tiny_model, host_blocks=host_blocks)
        serve(engine)
        hits.append(engine.stats().prefix_hit_tokens)
    assert hits[1] > 2 * hits[0]


def test_preempted_sequences_come_back_from_host_memory(tiny_model):
    """What a preempted sequence had computed is read back instead of computed again, to the same end."""
    prompts, long = [prompt[:10] for prompt in traffic()[:6]], Sampling(temperature=0, max_tokens=40, ignore_eos=True)
    outputs = []
    for changes in ({"num_blocks": 200}, {"num_blocks": 17, "host_blocks": 100}):
        engine = small(tiny_model, **changes)
        made = [engine.add(str(at), prompt, long) for at, prompt in enumerate(prompts)]
        while engine.has_work:
            engine.step()
        outputs.append([sequence.output for sequence in made])
    assert outputs[0] == outputs[1]
    assert engine.stats().preemptions > 0
    assert engine.stats().swapped_in_blocks > 0


def test_an_fp8_cache_swaps_too(tiny_model):
    """The bytes of an FP8 cache go out and come back as they are."""
    model, outputs = load_model(tiny_model), []
    limits = EngineConfig(
        model_len=64, block_size=4, num_blocks=200, max_num_batched_tokens=64, max_num_seqs=3, kv_dtype="fp8"
    )
    limits = calibrate(model, limits, traffic()[0])
    for config in (limits, replace(limits, num_blocks=20, host_blocks=100)):
        engine = Engine(Runner(model, config))
        outputs.append(serve(engine))
    assert outputs[0] == outputs[1]
    assert engine.stats().swapped_in_blocks > 0


def test_no_tenant_reads_anothers_prefix_from_the_host(tiny_model, wanted):
    """Each request under a salt of its own: the host memory fills and nobody hits anything, here or there."""
    engine = small(tiny_model, host_blocks=200)
    assert serve(engine, [f"tenant {at}" for at in range(len(wanted))]) == wanted
    stats = engine.stats()
    assert stats.host_blocks_used > 0
    assert stats.prefix_hit_tokens == stats.swapped_in_blocks == 0


def test_the_size_in_bytes(tiny_model):
    """`host_bytes` holds as many whole blocks as fit; fewer than one, or none to keep, is refused."""
    asked = EngineConfig(host_bytes=10_000, num_blocks=40, block_size=4)
    assert resolve(asked, model_len=64, token_bytes=100).host_blocks == 25
    with pytest.raises(ValueError, match="host_bytes 10000 must be at least 40000"):
        resolve(asked, model_len=64, token_bytes=10_000)
    with pytest.raises(ValueError, match="prefix_caching"):
        small(tiny_model, host_blocks=5, prefix_caching=False)
