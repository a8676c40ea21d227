import itertools
import random
from collections import Counter

import pytest
import tiny_llama

from cloud_engine.engine.engine import Engine
from cloud_engine.engine.sampler import FAILED
from cloud_engine.engine.sequence import State
from shared.schemas import Sampling

STOPS = frozenset(range(0, 259, 12))
"""So many that a sequence that does not ignore them ends early."""
STOPPING = Sampling(temperature=0, max_tokens=24)
GOING_ON = Sampling(temperature=0, max_tokens=24, ignore_eos=True)
MIXED = (STOPPING, GOING_ON, GOING_ON)


def prompts() -> list[list[int]]:
    """Some with a common beginning, one of a single token, one longer than any chunk."""
    rng = random.Random(8)
    trunk = [rng.randrange(3, 259) for _ in range(12)]
    tails = [[rng.randrange(3, 259) for _ in range(length)] for length in (1, 5, 9, 30)]
    return [*(trunk + tail for tail in tails), tails[0], tails[3] * 2, trunk]


@pytest.fixture(scope="module")
def wanted() -> list[list[int]]:
    """With the settings of `MIXED` in turn."""
    outputs = [tiny_llama.naive_greedy(prompt, 24) for prompt in prompts()]
    return [cut(output) if index % 3 == 0 else output for index, output in enumerate(outputs)]


def cut(output: list[int]) -> list[int]:
    """Up to the first stop token."""
    end = next((index for index, token in enumerate(output) if token in STOPS), len(output))
    return output[: end + 1]


class Watched:
    """An engine, and what happened to steps that were launched and not yet settled."""

    def __init__(self, folder, **changes: object) -> None:
        self.engine = Engine(tiny_llama.engine(folder, **changes).runner, stop_ids=STOPS, entropy=lambda: 0)
        self.seen: Counter[str] = Counter()
        scheduler = self.engine.scheduler
        schedule, settle = scheduler.schedule, scheduler.settle

        def watched_schedule():
            work = schedule()
            self.seen["ahead"] += any(item.previous is not None for item in work)
            return work

        def watched_settle(work, tokens):
            sampling = [item.sequence for item in work if item.samples]
            self.seen["preempted"] += any(seq.state is State.PREEMPTED for seq in sampling)
            self.seen["aborted"] += any(seq.ending == "cancelled" for seq in sampling)
            self.seen["surplus"] += any(seq.ending == "stop" for seq in sampling)
            return settle(work, tokens)

        scheduler.schedule, scheduler.settle = watched_schedule, watched_settle

    def generate(self, *, samplings=MIXED, aborts: bool = False) -> list[list[int]]:
        """Outputs of all prompts; with aborts, each also has a twin that is aborted in the middle, twice."""
        made, rng = [], random.Random(1)
        for index, (prompt, sampling) in enumerate(zip(prompts(), itertools.cycle(samplings))):
            made.append(self.engine.add(str(index), prompt, sampling))
            if aborts:
                self.engine.add(f"twin {index}", prompt[::-1], Sampling(temperature=0, ignore_eos=True))
        twins = [f"twin {index}" for index in range(len(made))] if aborts else []
        for _ in range(3000):
            if not self.engine.has_work:
                self.engine.close()
                return [sequence.output for sequence in made]
            self.engine.step()
            running = [name for name in twins if self.engine.scheduler.live[name].num_output]
            if running and rng.random() < 0.3:
                twins.remove(running[0])
                assert self.engine.abort(running[0])
                assert not self.engine.abort(running[0])
        pytest.fail("the engine never finished")


@pytest.mark.parametrize(
    ("budget", "caching", "blocks", "aborts"), list(itertools.product([9, 64], [False, True], [28, 200], [False, True]))
)
def test_outputs_are_those_of_depth_0(tiny_model, wanted, budget, caching, blocks, aborts):
    """With steps launched ahead no token changes, under chunks, prefix hits, preemption and aborts in flight; surplus
    tokens are dropped, and every block comes back."""
    limits = {"model_len": 100, "max_num_batched_tokens": budget, "prefix_caching": caching, "num_blocks": blocks}
    for depth in (0, 1):
        watched = Watched(tiny_model, async_depth=depth, **limits)
        assert watched.generate(aborts=aborts) == wanted
        happened = {name for name, count in watched.seen.items() if count}
        crowded = blocks == 28 and not aborts
        events = {"ahead", "surplus", *(["aborted"] if aborts else []), *(["preempted"] if crowded else [])}
        assert events <= happened if depth else not happened
        stats = watched.engine.stats()
        assert stats.kv_blocks_used == 0
        assert stats.preemptions > 0 or not crowded
        assert (stats.prefix_hit_tokens > 0) is caching


def test_every_way_of_sampling_is_the_same_at_both_depths(tiny_model):
    """Seeds, penalties and log probabilities, mixed in one batch: those whose next token needs the host wait for it."""
    samplings = [
        Sampling(seed=3, max_tokens=20),
        Sampling(seed=4, max_tokens=20, presence_penalty=1.0, repetition_penalty=1.3, temperature=0.7),
        Sampling(temperature=0, max_tokens=20, frequency_penalty=0.4, logprobs=2),
        Sampling(temperature=0, max_tokens=30, ignore_eos=True),
    ]
    now, late = (Watched(tiny_model, async_depth=depth) for depth in (0, 1))
    assert now.generate(samplings=samplings) == late.generate(samplings=samplings)
    assert late.seen["ahead"] > 0


def test_no_step_computes_beyond_max_tokens(tiny_model):
    """An end that is known beforehand costs no surplus row."""
    watched = Watched(tiny_model, async_depth=1)
    watched.engine.add("a", [5, 6], Sampling(temperature=0, max_tokens=9, ignore_eos=True))
    while watched.engine.has_work:
        watched.engine.step()
    watched.engine.close()
    assert watched.engine.stats().steps == 9
    assert watched.seen["ahead"] == 8


def test_the_step_after_unusable_logits_is_harmless(tiny_model, wanted):
    """A sequence that fails while its next step is in flight ends with an error; the failed token is never embedded."""
    watched = Watched(tiny_model, async_depth=1, prefix_caching=False)
    engine, run = watched.engine, watched.engine.runner.run
    bad = engine.add("bad", [3] * 20, GOING_ON)
    good = engine.add("good", prompts()[1], GOING_ON)
    failing = itertools.count()

    def poisoned(chunks, last=None):
        logits = run(chunks, last).clone()
        if next(failing) == 2:
            logits[0] = float("nan")
        return logits

    engine.runner.run = poisoned
    outputs = []
    while engine.has_work:
        outputs += [output for output in engine.step() if output.sequence is bad]
    engine.close()
    assert (outputs[-1].ending, outputs[-1].sampled.token) == ("error", FAILED)
    assert len(outputs) == 3
    assert good.output == wanted[1]


def test_a_step_that_raises_is_raised_to_the_engine(tiny_model):
    """What goes wrong on the device's thread is not lost there."""
    watched = Watched(tiny_model, async_depth=1)

    def broken(chunks, last=None):
        raise RuntimeError("broken")

    watched.engine.runner.run = broken
    watched.engine.add("a", [5, 6], GOING_ON)
    with pytest.raises(RuntimeError, match="broken"):
        for _ in range(3):
            watched.engine.step()
    watched.engine.close()


def test_a_step_that_checks_a_draft_is_settled_before_the_next(tiny_model):
    """How much of a draft is right decides what comes next: nothing runs ahead of it, and all the same is output."""
    wanted = [tiny_llama.naive_greedy(prompt, 24) for prompt in prompts()[:3]]
    watched = Watched(tiny_model, async_depth=1)
    engine = watched.engine
    made = [engine.add(str(index), prompt, GOING_ON) for index, prompt in enumerate(prompts()[:3])]
    schedule = engine.scheduler.schedule

    def drafting():
        rest = wanted[0][made[0].num_output :]
        if made[0].waits and len(rest) > 3:
            made[0].draft = (rest[0], rest[1], rest[2] + 1)
        return schedule()

    engine.scheduler.schedule = drafting
    while engine.has_work:
        engine.step()
        made[0].waits = 4 < made[0].num_output < 12
    engine.close()
    assert [sequence.output for sequence in made] == wanted
    assert engine.stats().accepted_tokens > 0
    assert watched.seen["ahead"] > 0
