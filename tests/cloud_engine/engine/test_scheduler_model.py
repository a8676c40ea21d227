"""The scheduler under random traffic (see `scheduler_model.Traffic`), and whether that would see a broken rule."""

import importlib
import inspect
import textwrap
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_model import Traffic, limits

CONFIGS = st.builds(
    lambda cache, **values: limits(prefix_caching=cache is not None, host_blocks=cache or 0, **values),
    cache=st.sampled_from([None, 0, 3, 30]),
    num_blocks=st.integers(17, 60),
    max_num_batched_tokens=st.integers(8, 40),
    max_num_seqs=st.integers(1, 8),
    max_waiting=st.integers(1, 20),
    batch_patience=st.sampled_from([1, 100, 10_000]),
)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), config=CONFIGS, drafts=st.sampled_from([0, 6]))
def test_random_traffic_keeps_every_rule(seed, config, drafts):
    """Adds, aborts, deadlines and drafts of three tenants in two classes, in pools large and small: every rule holds
    after every move, and every request ends once with the tokens that its own steps sampled."""
    Traffic(seed, config, drafts=drafts).run(150)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), config=CONFIGS, drafts=st.sampled_from([0, 3]))
def test_steps_may_be_settled_one_late(seed, config, drafts):
    """The same while each step is scheduled before the one before it is settled."""
    Traffic(seed, config, late=True, drafts=drafts).run(150)


def test_such_traffic_meets_every_case():
    """The properties above are not vacuous."""
    seen: Counter[str] = Counter()
    for seed in range(8):
        for late in (False, True):
            config = limits(num_blocks=17 + seed, max_num_batched_tokens=12, max_waiting=8, host_blocks=9)
            traffic = Traffic(seed, config, late=late, drafts=0 if seed % 2 else 6)
            traffic.run(200)
            seen.update(traffic.seen)
    assert {name for name, count in seen.items() if count} == {
        "aborted finished",
        "aborted held",
        "aborted in flight",
        "aborted preempted",
        "aborted running",
        "aborted waiting",
        "blocks of one held taken",
        "chunk",
        "context_length_exceeded",
        "deadline_exceeded",
        "decode beside a chunk",
        "draft",
        "expired",
        "filled in flight",
        "held and resumed",
        "hit",
        "loaded from the host",
        "overloaded",
        "preempted",
        "right draft",
        "saved more than fits the host",
        "settled when preempted",
        "surplus",
    }


RULES = {
    "a block is not given back": ("blocks", "BlockPool.release", "reversed(table)", "reversed(table[1:])"),
    "a shared block is not counted": ("blocks", "BlockPool.take", "self.references[block] += 1", "pass"),
    "a shared block stays on the free list": ("blocks", "BlockPool.take", "self.free.pop(block, None)", "pass"),
    "an evicted block is still found": ("blocks", "BlockPool._evict", "del self.published[key]", "pass"),
    "a prompt may be cached to its end": (
        "scheduler",
        "Scheduler._hit",
        "(sequence.num_tokens - 1)",
        "sequence.num_tokens",
    ),
    "the victim is the best": ("scheduler", "Scheduler._extend", "self.running[-1]", "self.running[0]"),
    "prefill takes the decodes' budget": ("scheduler", "Scheduler.schedule", "budget - decodes", "budget"),
    "the budget is not kept": ("scheduler", "Scheduler.schedule", "budget -= work[-1].rows", "budget -= 1"),
    "one sequence too many": (
        "scheduler",
        "Scheduler._has_place",
        ">= self.config.max_num_seqs",
        "> self.config.max_num_seqs",
    ),
    "what ended takes a token": ("scheduler", "Scheduler._settle", "sequence.state is State.FINISHED", "False"),
    "what is pending stays so": ("scheduler", "Scheduler._settle", "sequence.num_pending -= 1", "pass"),
    "it ends twice": (
        "scheduler",
        "Scheduler.finish",
        "not sequence.finish(ending)",
        "sequence.finish(ending) and False",
    ),
    "its blocks stay": ("scheduler", "Scheduler._forget", "self.pool.release(sequence.block_table)", "pass"),
    "what stands still is lost": ("scheduler", "Scheduler.resume", "self.waiting.put_back(sequence)", "pass"),
    "what stands still keeps its place": ("scheduler", "Scheduler._hold", "self.running.remove(sequence)", "pass"),
    "deadlines are not seen": ("scheduler", "Scheduler.tick", "at > now", "True"),
    "a chunk starts a token late": ("work", "Work.chunk", "self.start :", "self.start + 1 :"),
    "output is lost": (
        "sequence",
        "Sequence.reset",
        "self.preemptions += 1",
        "self.preemptions += 1; del self.tokens[self.num_prompt :]",
    ),
    "computed tokens are kept": ("sequence", "Sequence.reset", "self.num_computed = self.num_published = 0", "pass"),
    "a preempted sequence is lost": (
        "order",
        "WaitingQueue.put_back",
        "self._lanes[sequence.priority].put_back(sequence)",
        "pass",
    ),
    "the host does not keep it": ("host_cache", "HostCache.load", "self.swaps +=", "_ ="),
    "last come first served": ("fairness", "FairQueue.first", "next(iter(", "next(reversed("),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_broken_rule_is_seen(rule, monkeypatch):
    """One line changed in the scheduler's code, and the traffic above fails within a few seeds: the checks are real."""
    module_name, name, line, broken = RULES[rule]
    module = importlib.import_module(f"cloud_engine.engine.{module_name}")
    owner, _, method = name.partition(".")
    cls = getattr(module, owner)
    source = textwrap.dedent(inspect.getsource(getattr(cls, method)))
    assert line in source, "the code has changed: say here which line keeps this rule now"
    scope = dict(vars(module))
    exec(source.replace(line, broken), scope)
    monkeypatch.setattr(cls, method, scope[method])
    with pytest.raises(Exception):  # noqa: B017 - an assertion of the model, or a KeyError on the way to it
        for seed in range(30):
            config = limits(
                num_blocks=17 + seed % 8, max_num_batched_tokens=12, max_num_seqs=2 + seed % 3, host_blocks=5
            )
            Traffic(seed, config, late=seed % 2 == 1, drafts=seed % 4).run(150)
