import pytest
import tiny_llama
from scheduler_model import advance, drain, limits, request

from cloud_engine.engine.deadlines import MARGIN, Deadlines, Pace
from cloud_engine.engine.scheduler import Scheduler
from cloud_engine.engine.sequence import Sequence, State
from shared.errors import DeadlineExceeded
from shared.schemas import Sampling


def scheduler(seconds_a_token: float = 0.0, **changes) -> Scheduler:
    """One whose full steps were measured to take that long."""
    made = Scheduler(limits(**({"prefix_caching": False} | changes)))
    made.pace.observe(made.config.max_num_batched_tokens, seconds_a_token * made.config.max_num_batched_tokens)
    return made


def test_an_expired_request_is_refused() -> None:
    """What comes too late is not queued; one without a deadline, or with time left, is."""
    engine = scheduler()
    with pytest.raises(DeadlineExceeded):
        engine.add(request("late", deadline=10.0), now=10.0)
    engine.add(request("in time", deadline=10.1), now=10.0)
    engine.add(request("whenever"), now=1e12)
    assert set(engine.live) == {"in time", "whenever"}
    assert engine.counters.expired == 1


def test_what_waits_too_long_is_ended_uncomputed() -> None:
    """A request that still waits at its deadline ends then, not before, and no token of it was computed."""
    engine = scheduler(max_num_seqs=1)
    engine.add(request("first", output=40))
    waiting = request("second", deadline=5.0)
    engine.add(waiting)
    advance(engine)
    assert engine.tick(4.9) == []
    assert engine.tick(5.0) == [waiting]
    assert (waiting.ending, waiting.num_computed, waiting.output) == ("deadline", 0, [])
    assert engine.tick(6.0) == []
    assert drain(engine) == ["first"]
    assert engine.counters.expired == 1


def test_a_running_request_ends_at_its_deadline() -> None:
    """It keeps what it made, gives its blocks back, and a step already launched leaves it alone."""
    engine = scheduler()
    running, other = request("a", output=50, deadline=3.0), request("b", output=8)
    engine.add(running)
    engine.add(other)
    for _ in range(4):
        advance(engine)
    work = engine.schedule()
    assert engine.tick(3.0) == [running]
    engine.settle(work, [[1] for _ in work])
    assert (running.ending, len(running.output), running.block_table) == ("deadline", 4, [])
    drain(engine)
    assert len(other.output) == 8
    assert engine.pool.num_used == 0


def test_a_preempted_request_ends_at_its_deadline() -> None:
    """Waiting for its second time it has output already: only the deadline itself ends it."""
    engine = scheduler(seconds_a_token=1.0, num_blocks=17, max_num_batched_tokens=64)
    for name in ("a", "b"):
        engine.add(request(name, 20, 40, deadline=100.0 if name == "b" else 1e9))
    victim = engine.live["b"]
    while not victim.preemptions:
        advance(engine)
    assert victim.state is State.PREEMPTED
    assert engine.tick(99.9) == []
    assert engine.tick(100.0) == [victim]
    assert victim.num_output > 0
    drain(engine)


def test_what_cannot_start_in_time_is_refused_by_measure() -> None:
    """A prompt that takes longer than its deadline at even twice the measured speed is refused; a shorter one is not,
    nor is any before something was measured."""
    for seconds, refused in ((1.0, True), (0.0, False)):
        engine = scheduler(seconds_a_token=seconds)
        if refused:
            with pytest.raises(DeadlineExceeded):
                engine.add(request("long", 50, deadline=50 / MARGIN), now=0.0)
        else:
            engine.add(request("long", 50, deadline=50 / MARGIN), now=0.0)
        engine.add(request("short", 10, deadline=50 / MARGIN), now=0.0)


def test_the_tenants_own_queue_counts_and_others_do_not() -> None:
    """What a tenant has waiting is surely ahead of its next request; what others have waiting is not."""
    engine = scheduler(seconds_a_token=1.0, max_num_seqs=1)
    engine.add(request("running", output=60))
    advance(engine)
    for number in range(4):
        engine.add(request(f"queued{number}", 10, tenant="a"))
    with pytest.raises(DeadlineExceeded):
        engine.add(request("mine", 10, tenant="a", deadline=25.0), now=0.0)
    engine.add(request("yours", 10, tenant="b", deadline=25.0), now=0.0)
    engine.add(request("batch", 10, tenant="a", priority="batch", deadline=25.0), now=0.0)
    engine.add(request("mine", 10, tenant="a", deadline=25.1), now=0.0)


def test_a_cached_prompt_takes_no_time() -> None:
    """A request whose prompt is cached is not refused for its length, nor ended for it while it waits."""
    engine = scheduler(seconds_a_token=1.0, prefix_caching=True, max_num_seqs=1)
    prompt = list(range(40))
    engine.add(request("first", prompt, 1))
    drain(engine)
    engine.add(request("running", output=60))
    advance(engine)
    again = request("again", prompt, 1, deadline=10.0)
    engine.add(again, now=0.0)
    with pytest.raises(DeadlineExceeded):
        engine.add(request("other", [5] * 40, 1, deadline=10.0), now=0.0)
    assert engine.tick(10.0 - 4 / MARGIN - 0.1) == []
    assert engine.tick(10.0 - 4 / MARGIN) == [again]


def test_waiting_ends_when_the_prompt_cannot_be_computed_any_more() -> None:
    """Not at the deadline, but as long before it as the prompt takes at least by what is measured then."""
    engine = scheduler(seconds_a_token=1.0, max_num_seqs=1)
    engine.add(request("running", output=60))
    advance(engine)
    waiting = request("waiting", 20, deadline=100.0)
    engine.add(waiting, now=0.0)
    assert engine.tick(89.9) == []
    engine.pace = Pace(full=1)
    engine.pace.observe(10, 5.0)
    assert engine.tick(90.0) == [], "the engine is twice as fast by now"
    assert engine.tick(94.9) == []
    assert engine.tick(95.0) == [waiting]


def test_pace_is_that_of_full_steps() -> None:
    """A step of a few decodes says nothing of how fast prompts are; full ones are averaged."""
    pace = Pace(full=100)
    pace.observe(8, 1.0)
    assert pace.least_seconds(1000) == 0
    pace.observe(100, 1.0)
    assert pace.least_seconds(1000) == pytest.approx(10 / MARGIN)
    for _ in range(50):
        pace.observe(200, 1.0)
    assert pace.least_seconds(1000) == pytest.approx(5 / MARGIN, rel=0.01)


def test_watching_costs_no_memory_for_what_ended() -> None:
    """10,000 requests that end long before their deadline leave nothing behind; those still live are kept."""
    deadlines = Deadlines()
    live: list[Sequence] = []
    for number in range(10_000):
        sequence = request("x")
        sequence.arrival = number
        deadlines.watch(sequence, 1e6 - number)
        if number % 1000:
            sequence.finish("stop")
        else:
            live.append(sequence)
    assert len(deadlines) < 200
    assert deadlines.due(1e6) == live[::-1]
    assert len(deadlines) == 0


def test_the_engine_measures_what_its_steps_take(tiny_model, monkeypatch):
    """Also where a step is computed while it is launched: the time that passes then is the step's."""
    engine = tiny_llama.engine(tiny_model, max_num_batched_tokens=16, prefix_caching=False)
    now, run = [100.0], engine.runner.run

    def slowly(*args):
        now[0] += 8.0
        return run(*args)

    monkeypatch.setattr(engine.runner, "run", slowly)
    engine.clock = lambda: now[0]
    engine.add("a", [5] * 32, Sampling(temperature=0, max_tokens=2))
    while engine.has_work:
        engine.step()
    assert engine.scheduler.pace.least_seconds(16) == pytest.approx(8.0 / MARGIN)
