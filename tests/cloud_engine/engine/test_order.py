import math
import sys
from collections import Counter

import pytest
from scheduler_model import advance, drain, limits, request

from cloud_engine.engine.order import rank
from cloud_engine.engine.scheduler import Scheduler
from cloud_engine.engine.sequence import State
from shared.errors import Overloaded


def test_interactive_before_batch() -> None:
    """Of what waits, interactive requests start first, each class in the order of arrival."""
    scheduler = Scheduler(limits(max_num_seqs=1, prefix_caching=False))
    for name in ("b1", "i1", "b2", "i2"):
        scheduler.add(request(name, priority="batch" if name[0] == "b" else "interactive"))
    assert drain(scheduler) == ["i1", "i2", "b1", "b2"]


def test_batch_finishes_under_steady_interactive_work() -> None:
    """With more interactive work than the engine can do, for ever, every batch request comes to its end, undisturbed
    once it runs; without ageing none would start."""
    for patience, finishes in ((200, True), (10**9, False)):
        scheduler = Scheduler(limits(max_num_seqs=2, batch_patience=patience, prefix_caching=False, max_waiting=10))
        batch = [request(f"b{number}", 20, 10, priority="batch") for number in range(3)]
        for sequence in batch:
            scheduler.add(sequence)
        for number in range(600):
            if len(scheduler.waiting) - scheduler.waiting.num_batch < 4:
                scheduler.add(request(f"i{number}", 20, 10))
            advance(scheduler)
        assert [sequence.ending for sequence in batch] == ["length" if finishes else None] * 3
        assert [sequence.preemptions for sequence in batch] == [0, 0, 0]
        assert finishes or not any(sequence.num_computed for sequence in batch)


def test_ageing_waits_for_its_patience_and_no_longer() -> None:
    """The tokens computed for interactive requests before each batch request starts are `batch_patience`, give or take
    what one request costs."""
    patience = 300
    scheduler = Scheduler(limits(max_num_seqs=1, batch_patience=patience, prefix_caching=False, max_waiting=20))
    for number in range(4):
        scheduler.add(request(f"b{number}", priority="batch"))
    charged, gaps, begun = 0, [], set()
    for number in range(1000):
        if len(scheduler.waiting) - scheduler.waiting.num_batch < 2:
            scheduler.add(request(f"i{number}", 10, 5))
        for name in advance(scheduler):
            if name in begun:
                continue
            begun.add(name)
            if name[0] == "b":
                gaps.append(charged)
                charged = 0
            else:
                charged += 10 + 2 * 5
        if len(gaps) == 4:
            break
    assert len(gaps) == 4
    assert all(patience <= gap <= patience + 40 for gap in gaps)


def test_batch_gives_up_its_place_once() -> None:
    """An interactive request without a place gets that of a batch one, whose output is kept. When that one is back
    nobody takes its place again."""
    scheduler = Scheduler(limits(max_num_seqs=2, prefix_caching=False, batch_patience=10_000))
    first, second = (request(name, 8, 20, priority="batch") for name in ("b1", "b2"))
    for sequence in (first, second):
        scheduler.add(sequence)
    for _ in range(5):
        advance(scheduler)
    kept = second.output
    assert kept
    scheduler.add(request("i1", 8, 4))
    assert set(advance(scheduler)) == {"b1", "i1"}
    assert (second.state, second.preemptions, second.output) == (State.PREEMPTED, 1, kept)
    while "i1" in scheduler.live:
        advance(scheduler)
    advance(scheduler)
    assert second.state is State.RUNNING
    for number in range(2, 5):
        scheduler.add(request(f"i{number}", 8, 4))
    drain(scheduler)
    assert (first.preemptions, second.preemptions) == (1, 1)
    assert (len(first.output), len(second.output)) == (20, 20)
    assert second.output[: len(kept)] == kept


def test_one_place_a_step() -> None:
    """Ten interactive requests at once make way at the rate of one a step: no burst of work to be redone."""
    scheduler = Scheduler(limits(max_num_seqs=4, prefix_caching=False))
    for number in range(4):
        scheduler.add(request(f"b{number}", 4, 40, priority="batch"))
    advance(scheduler)
    for number in range(10):
        scheduler.add(request(f"i{number}"))
    advance(scheduler)
    assert scheduler.counters.preemptions == 1


def test_nothing_makes_way_for_what_has_room() -> None:
    """Batch work runs on beside interactive work while there are places and blocks."""
    scheduler = Scheduler(limits(max_num_seqs=4))
    scheduler.add(request("b", 4, 20, priority="batch"))
    advance(scheduler)
    scheduler.add(request("i"))
    assert set(advance(scheduler)) == {"b", "i"}
    assert scheduler.counters.preemptions == 0


def test_the_victim_is_of_the_worst_rank_and_not_in_the_step() -> None:
    """When blocks run out, batch work goes first whenever it came, then the last to arrive; its output is kept, and it
    has no part in the step that took its blocks."""
    scheduler = Scheduler(limits(num_blocks=17, max_num_batched_tokens=64, prefix_caching=False))
    batch = request("b", 12, 40, priority="batch")
    scheduler.add(batch)
    advance(scheduler)
    early, late = request("i1", 8, 40), request("i2", 8, 40)
    scheduler.add(early)
    scheduler.add(late)
    victims = []
    while not late.preemptions:
        running = list(scheduler.running)
        assert running == sorted(running, key=rank)
        outputs = {sequence: sequence.output for sequence in running}
        part = advance(scheduler)
        gone = [sequence for sequence in running if sequence.state is State.PREEMPTED]
        victims += gone
        assert gone == running[len(running) - len(gone) :]
        assert not {sequence.id for sequence in gone} & set(part)
        assert all(sequence.output[: len(outputs[sequence])] == outputs[sequence] for sequence in running)
    assert victims == [batch, late]
    drain(scheduler)
    assert [len(sequence.output) for sequence in (batch, early, late)] == [40, 40, 40]


def test_tenants_take_turns() -> None:
    """One tenant's hundred requests, there first, do not delay another's: both get the same tokens while both wait."""
    scheduler = Scheduler(limits(max_num_seqs=2, max_num_batched_tokens=32, prefix_caching=False))
    for number in range(100):
        scheduler.add(request(f"flood{number}", 20, 4, tenant="flood"))
    for number in range(40):
        scheduler.add(request(f"small{number}", 2, 4, tenant="small"))
    service: Counter[str] = Counter()
    while scheduler.waiting.places.of("small"):
        before = {name: sequence.num_output for name, sequence in scheduler.live.items()}
        for name, count in advance(scheduler).items():
            prefill = count if not before[name] else 0
            service[name[:5]] += prefill + 2
    assert abs(service["flood"] - service["small"]) <= 2 * (20 + 2 * 4)
    assert min(service.values()) > 300


def test_a_full_queue_has_a_part_for_every_tenant() -> None:
    """A tenant alone may use the whole queue. Then another still gets its half of it, and the first one nothing until
    it is down to its own."""
    scheduler = Scheduler(limits(max_waiting=8))
    for number in range(8):
        scheduler.add(request(f"a{number}", tenant="a"))
    with pytest.raises(Overloaded, match="8 of yours"):
        scheduler.add(request("a8", tenant="a"))
    for number in range(4):
        scheduler.add(request(f"b{number}", tenant="b"))
    with pytest.raises(Overloaded, match="4 of yours"):
        scheduler.add(request("b4", tenant="b"))
    for tenant in "cdefghijklm":
        for number in range(8):
            try:
                scheduler.add(request(f"{tenant}{number}", tenant=tenant))
            except Overloaded:
                break
    assert len(scheduler.waiting) <= 8 * 4, "it grows with the logarithm of the tenants"
    for number in range(5):
        scheduler.abort(f"a{number}")
    with pytest.raises(Overloaded):
        scheduler.add(request("a9", tenant="a"))
    drain(scheduler)
    assert len(scheduler.waiting) == 0


def test_every_decode_is_in_every_step_beside_a_long_prompt() -> None:
    """Eight decode while 2,048 tokens are prefilled, ranked before or behind them: each step keeps the budget and has
    all eight in it, so their worst gap is one step of at most the budget."""
    for prompt_first in (False, True):
        scheduler = Scheduler(limits(model_len=4096, num_blocks=1100, max_num_seqs=16, max_num_batched_tokens=128))
        long = request("long", 2048, 4)
        kind = "batch" if prompt_first else "interactive"
        decodes = [request(f"d{number}", 4, 500, priority=kind) for number in range(8)]
        for sequence in decodes:
            scheduler.add(sequence)
        advance(scheduler)
        scheduler.add(long)
        steps = 0
        while not long.num_output:
            part = advance(scheduler)
            steps += 1
            assert sum(part.values()) <= 128
            assert set(part) == {"long", *(sequence.id for sequence in decodes)}
        assert steps == -(-2048 // (128 - 8))
        assert (scheduler.running[0] is long) is prompt_first


def test_a_step_costs_nothing_for_those_who_wait() -> None:
    """Calls made in scheduling and settling a step are as many beside 3,000 waiting requests of 300 tenants as beside
    30 of 3: a step costs what runs and what is admitted."""

    def calls(waiting: int, tenants: int) -> int:
        scheduler = Scheduler(limits(max_num_seqs=8, max_waiting=10_000, num_blocks=200))
        for number in range(8 + waiting):
            kind = "batch" if number % 5 == 4 else "interactive"
            deadline = 1e6 if number % 3 else math.inf
            tenant = f"t{number % tenants:03}"
            scheduler.add(request(f"r{number:04}", 4, 50, tenant=tenant, priority=kind, deadline=deadline))
        for _ in range(12):
            advance(scheduler)
        count = 0

        def note(*_: object) -> None:
            nonlocal count
            count += 1

        sys.setprofile(note)
        try:
            scheduler.tick(1.0)
            advance(scheduler)
        finally:
            sys.setprofile(None)
        assert len(scheduler.running) == 8
        assert len(scheduler.waiting) == waiting
        return count

    few, many = calls(30, 3), calls(3000, 300)
    assert many <= 1.2 * few
