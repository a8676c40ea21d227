import pytest
from scheduler_model import EOS, advance, check, limits, request, until

from cloud_engine.engine.blocks import chain_root
from cloud_engine.engine.scheduler import Scheduler
from cloud_engine.engine.sequence import State
from shared.errors import ContextTooLong, Overloaded, RequestConflict
from shared.schemas import Sampling


def test_one_budget_mixes_chunks_and_decodes():
    """A long prompt is cut by the budget and the decodes beside it keep their token per step."""
    scheduler = Scheduler(limits(max_num_batched_tokens=10))
    scheduler.add(request("short", [1, 2], output=20))
    assert advance(scheduler) == {"short": 2}
    scheduler.add(request("long", [3] * 30, output=5))
    assert [advance(scheduler) for _ in range(5)] == [
        {"short": 1, "long": 9},
        {"short": 1, "long": 9},
        {"short": 1, "long": 9},
        {"short": 1, "long": 3},
        {"short": 1, "long": 1},
    ]


def test_first_come_first_served():
    """Requests start in the order they came, also when a later one would fit sooner."""
    scheduler = Scheduler(limits(num_blocks=17, max_num_seqs=8))
    scheduler.add(request("a", [1] * 40, output=8))
    scheduler.add(request("b", [2] * 40, output=1))
    scheduler.add(request("c", [3], output=1))
    order: list[str] = []
    while scheduler.live:
        order += [name for name in advance(scheduler) if name not in order]
    assert order == ["a", "b", "c"]


def test_identical_prompts_of_one_step_share_blocks():
    """Two equal prompts admitted in one step use the same full blocks, never the last, unfinished one."""
    scheduler = Scheduler(limits(max_num_batched_tokens=40))
    for name in "ab":
        scheduler.add(request(name, list(range(10)), output=4))
    assert advance(scheduler) == {"a": 10, "b": 2}
    first, second = (scheduler.live[name].block_table for name in "ab")
    assert first[:2] == second[:2]
    assert first[2] != second[2]


def test_a_fully_cached_prompt_still_computes_a_token():
    """A hit covers at most all tokens but one: without a computed token there are no logits."""
    scheduler = Scheduler(limits())
    scheduler.add(request("a", list(range(8)), output=1))
    advance(scheduler)
    scheduler.add(request("b", list(range(8)), output=1))
    assert advance(scheduler) == {"b": 4}


def test_a_salt_separates_tenants():
    """Under another root nothing is shared, and without the cache nothing is either."""
    for config, root in ((limits(), chain_root("other")), (limits(prefix_caching=False), chain_root(""))):
        scheduler = Scheduler(config)
        scheduler.add(request("a", list(range(8)), output=1))
        advance(scheduler)
        scheduler.add(request("b", list(range(8)), output=1, root=root))
        assert advance(scheduler) == {"b": 8}
        assert scheduler.counters.prefix_hit_tokens == 0


def test_the_tail_of_a_cached_prefix_is_evicted_first():
    """When blocks are needed the end of a freed sequence goes first, so that its head can still be shared."""
    scheduler = Scheduler(limits(num_blocks=17))
    scheduler.add(request("a", [0, 1, 2, 3] * 4, output=1))
    advance(scheduler)
    scheduler.add(request("filler", [9] * 56, output=1))
    until(scheduler, lambda: not scheduler.live)
    scheduler.add(request("b", [0, 1, 2, 3] * 4, output=1))
    advance(scheduler)
    assert scheduler.counters.prefix_hit_tokens == 8


def test_preemption_keeps_output_and_hits_count_once():
    """The last admitted sequence is recomputed with every token it had, and counts as one query of the cache."""
    scheduler = Scheduler(limits(num_blocks=17, max_num_batched_tokens=64, prefix_caching=False))
    for name in "ab":
        scheduler.add(request(name, [1] * 20, output=33))
    victim = scheduler.live["b"]
    until(scheduler, lambda: victim.preemptions, token=5)
    assert victim.state is State.PREEMPTED
    assert victim.num_output > 0
    assert scheduler.waiting.first() is victim
    assert set(victim.output) == {5}
    until(scheduler, lambda: not scheduler.live, token=5)
    assert victim.output == [5] * 33
    assert victim.ending == "length"


def test_what_can_never_fit_is_refused():
    """Over-long prompt or output, a used id, a full queue: a typed error naming the field, nothing else disturbed."""
    scheduler = Scheduler(limits(max_waiting=2))
    scheduler.add(request("a", [1], output=1))
    with pytest.raises(ContextTooLong, match="64 tokens") as long_prompt:
        scheduler.add(request("b", [1] * 64, output=1))
    assert long_prompt.value.param == "messages"
    with pytest.raises(ContextTooLong, match="make 65") as long_output:
        scheduler.add(request("b", [1] * 60, output=5))
    assert long_output.value.param == "max_tokens"
    with pytest.raises(RequestConflict):
        scheduler.add(request("a", [1], output=1))
    scheduler.add(request("b", [1], output=1))
    with pytest.raises(Overloaded):
        scheduler.add(request("c", [1], output=1))
    assert advance(scheduler) == {"a": 1, "b": 1}
    assert not scheduler.live


@pytest.mark.parametrize("when", ["waiting", "mid-chunk", "running", "preempted", "finished", "unknown"])
def test_abort_in_every_state_twice(when):
    """An abort ends a sequence once, in any state; a second one, or one of nothing, does nothing."""
    scheduler = Scheduler(limits(num_blocks=17, max_num_batched_tokens=16, prefix_caching=False))
    scheduler.add(request("other", [1] * 20, output=43))
    target = request("target", [2] * 30, output=30 if when != "finished" else 1)
    if when != "unknown":
        scheduler.add(target)
    reached = {
        "waiting": lambda: True,
        "mid-chunk": lambda: 0 < target.num_computed < target.num_prompt,
        "running": lambda: target.num_output > 0,
        "preempted": lambda: target.state is State.PREEMPTED,
        "finished": lambda: target.state is State.FINISHED,
        "unknown": lambda: True,
    }[when]
    until(scheduler, reached)
    assert scheduler.abort("target") is (when not in ("finished", "unknown"))
    assert scheduler.abort("target") is False
    check(scheduler)
    if when != "unknown":
        assert target.ending == ("length" if when == "finished" else "cancelled")
    until(scheduler, lambda: not scheduler.live)
    assert scheduler.pool.num_used == 0


def test_a_sequence_aborted_after_launch_takes_no_token():
    """An abort between schedule and settle stands: the late token is dropped and the blocks were freed once."""
    scheduler = Scheduler(limits())
    scheduler.add(request("a", [1, 2], output=5))
    work = scheduler.schedule()
    scheduler.abort("a")
    scheduler.settle(work, [[3]])
    assert work[0].sequence.ending == "cancelled"
    assert work[0].sequence.output == []
    check(scheduler)


def test_eos_ends_unless_ignored():
    """A stop token ends a sequence with `stop`; with ignore_eos only max_tokens does."""
    scheduler = Scheduler(limits())
    plain = request("a", [1], output=3)
    ignoring = request("b", [1], output=3)
    ignoring.sampling = Sampling(ignore_eos=True)
    scheduler.add(plain)
    scheduler.add(ignoring)
    until(scheduler, lambda: not scheduler.live, token=EOS)
    assert (plain.output, plain.ending) == ([EOS], "stop")
    assert (ignoring.output, ignoring.ending) == ([EOS] * 3, "length")


def test_unusable_logits_fail_one_sequence_only():
    """A negative token from the sampler ends that sequence with an error and no other."""
    scheduler = Scheduler(limits())
    for name in "ab":
        scheduler.add(request(name, [1], output=3))
    work = scheduler.schedule()
    scheduler.settle(work, [[-1], [2]])
    assert work[0].sequence.ending == "error"
    assert work[1].sequence.output == [2]


@pytest.mark.parametrize(
    "changes",
    [
        {"model_len": 65, "num_blocks": 17},
        {"model_len": 1},
        {"max_num_batched_tokens": 7},
        {"num_blocks": 1},
        {"block_size": 0},
    ],
)
def test_limits_that_cannot_be_kept_are_refused(changes):
    """A pool that one permitted sequence could outgrow, or a budget too small to serve every sequence, never starts."""
    with pytest.raises(ValueError, match="must be"):
        Scheduler(limits(**changes))
