"""Two sessions under everything a network can do: no output is lost, doubled or reordered, and all ends once."""

import itertools
from collections import Counter
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from wires import Cable, World

from shared.errors import CausewayError, RequestConflict, Unreachable, Unrecoverable
from shared.executions import Execution, Rules
from shared.frames import SUBPROTOCOLS, Limits
from shared.schemas import Delta, FinishReason, ToolPiece, Usage
from shared.streams import ClientRules, Stream

WORDS = st.sampled_from(["a", "b ", "é", "\U0001f600", "", "x" * 700, "\n\x00"])
SMALL = Rules(limits=Limits(max_streams=8), run_ahead=4096)
CLIENT = ClientRules(window=4, ack_every=2)
BROKEN = {"skipped", "more", "missing", "damaged"}
"""Words of what a client says of a server that lost its place."""


class Wire(RuleBasedStateMachine):
    """Requests, output, cancels, cuts at any byte, half-open connections, repeats, restarts and time, in any order."""

    seen: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.numbers = itertools.count(1)
        self.texts: dict[Execution, str] = {}
        self.runs: dict[str, list[Execution]] = {}
        self.streams: list[Stream] = []
        self.called: dict[Execution, str] = {}
        self.heard: dict[Stream, str] = {}
        self.taken: dict[Stream, str] = {}
        self.ends: dict[Stream, list[FinishReason | CausewayError]] = {}
        self.cancelled: set[Stream] = set()
        self.accusations: set[str] = set()
        self.starts: Counter[tuple[str, str]] = Counter()

    @initialize(subprotocol=st.sampled_from(SUBPROTOCOLS))
    def begin(self, subprotocol: str) -> None:
        self.world = World(subprotocol, SMALL, CLIENT)
        self.connect()
        self.open()
        self.open()
        self.settle()

    # --- the application and the engine ---

    @precondition(lambda self: len(self.streams) < 8)
    @rule()
    def open(self) -> None:
        stream = self.world.open(f"r{next(self.numbers)}")
        self.streams.append(stream)
        self.taken[stream], self.heard[stream], self.ends[stream] = "", "", []

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), word=WORDS)
    def produce(self, data: st.DataObject, word: str) -> None:
        self.say(data.draw(st.sampled_from(list(self.texts))), word)

    def say(self, execution: Execution, word: str) -> None:
        if not execution.ended and execution.room:
            first = "" if self.texts[execution] else f"[{id(execution)}]"  # each run's output is unlike any other's
            self.texts[execution] += first + word
            execution.produce(Delta(text=first + word, tokens=1), self.world.now)
            if len(word) in (1, 700):
                self.called[execution] += word
                execution.produce(Delta(tool_calls=(ToolPiece(0, word),)), self.world.now)

    @precondition(lambda self: self.world.cable is not None and self.texts)
    @rule(words=st.lists(WORDS, min_size=1, max_size=8), echo=st.booleans())
    def talk(self, words: list[str], echo: bool) -> None:
        """A good stretch: everybody produces, everything arrives (perhaps twice) and is read."""
        for word in words:
            for execution in self.texts:
                self.say(execution, word)
            self.world.wait(0.05)
            self.settle()
            if echo and self.world.cable is not None and self.world.client.up:
                self.world.deliver_down(self.cable, [m for m in self.cable.down.past if "welcome" not in str(m)])
                self.world.deliver_up(self.cable, [m for m in self.cable.up.past if "hello" not in str(m)])
        for stream in self.streams:
            self.take_one(stream)

    @precondition(lambda self: sum(map(len, self.taken.values())) > 60)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(list(self.texts))))

    @precondition(lambda self: sum(map(len, self.taken.values())) > 60)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(list(self.texts))).fail(RequestConflict("scripted"), self.world.now)

    @precondition(lambda self: self.streams)
    @rule(data=st.data(), count=st.integers(1, 5))
    def take(self, data: st.DataObject, count: int) -> None:
        stream = data.draw(st.sampled_from(self.streams))
        for _ in range(count):
            self.take_one(stream)

    @precondition(lambda self: len(self.streams) > 2)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        stream = data.draw(st.sampled_from(self.streams))
        self.world.client.cancel(stream, self.world.now)
        self.cancelled.add(stream)

    # --- the network ---

    @precondition(lambda self: self.world.cable is None)
    @rule()
    def connect(self) -> None:
        self.world.connect()

    @precondition(lambda self: self.world.cable is not None)
    @rule(up=st.integers(0, 3000), down=st.integers(0, 3000))
    def move(self, up: int, down: int) -> None:
        cable = self.cable
        self.world.fill()
        self.world.deliver_up(cable, cable.up.move(up))
        self.world.deliver_down(cable, cable.down.move(down))
        self.world.hang_up()
        self.note_starts()

    @rule()
    def settle(self) -> None:
        self.world.settle()
        self.note_starts()

    @precondition(lambda self: self.world.cable is not None and self.world.client.up)
    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        """Something that arrived lately comes once more (never the handshake: it is TCP, after all)."""
        cable = self.cable
        up = [message for message in cable.up.past if "hello" not in str(message)]
        down = [message for message in cable.down.past if "welcome" not in str(message)]
        if up:
            self.world.deliver_up(cable, [data.draw(st.sampled_from(up))])
        if down:
            self.world.seen["repeated"] += 1
            self.world.deliver_down(cable, [data.draw(st.sampled_from(down))])
        self.world.hang_up()
        self.note_starts()

    @precondition(lambda self: self.world.cable is not None)
    @rule(server_knows=st.booleans())
    def cut(self, server_knows: bool) -> None:
        self.world.cut(server_knows=server_knows)

    @precondition(lambda self: self.world.cable is not None)
    @rule(server_knows=st.booleans(), down=st.integers(1, 400))
    def break_and_return(self, server_knows: bool, down: int) -> None:
        """The connection breaks while everybody speaks, at any byte, and a new one is there at once."""
        for execution in self.texts:
            self.say(execution, "half of this ")
        self.world.wait(0.05)
        self.move(0, down)
        self.world.cut(server_knows=server_knows)
        self.connect()
        self.settle()

    @precondition(lambda self: self.world.cable is not None and any(self.taken.values()))
    @rule(seconds=st.sampled_from([1.0, 35.0, 150.0]))
    def stay_away(self, seconds: float) -> None:
        self.world.cut()
        self.wait(seconds)
        self.connect()
        self.settle()

    @precondition(lambda self: self.world.cable is not None and any(self.taken.values()))
    @rule(after=st.sampled_from([20, 32]))
    def read_nothing(self, after: int) -> None:
        """More is produced than the readers take, while the connection lives on."""
        for second in range(after):
            for execution in self.texts:
                self.say(execution, "x")
            self.wait(1.0)
            if second % 4 == 0:
                self.settle()

    @precondition(lambda self: self.world.cables)
    @rule(data=st.data())
    def server_notices(self, data: st.DataObject) -> None:
        """A half-open connection is found, perhaps long after its client came back on another one."""
        cable = data.draw(st.sampled_from(self.world.cables))
        if cable is not self.world.cable:
            self.world.seen["half-open"] += self.world.cable is not None
            self.world.server_lost(cable)

    @precondition(lambda self: any(self.taken.values()) and not self.world.seen["restarted"])
    @rule()
    def restart(self) -> None:
        self.world.restart()
        self.world.seen["restarted"] += 1
        for execution in self.texts:
            execution.fail(Unreachable("gone with its server"), self.world.now)

    @rule(seconds=st.sampled_from([0.01, 0.05, 0.3, 1.0]))
    def wait(self, seconds: float) -> None:
        self.world.wait(seconds)
        self.world.hang_up()

    @precondition(lambda self: any(self.taken.values()))
    @rule(seconds=st.sampled_from([3.0, 11.0, 31.0, 130.0]))
    def wait_long(self, seconds: float) -> None:
        self.wait(seconds)

    # --- what must hold ---

    @invariant()
    def output_is_a_prefix(self) -> None:
        """Byte for byte what one single run produced, and all of it where the end was seen."""
        for stream in self.streams:
            runs = [self.texts[execution] for execution in self.runs.get(stream.request_id, [])]
            taken = self.taken[stream]
            assert not taken or any(text.startswith(taken) for text in runs)
            calls = [self.called[execution] for execution in self.runs.get(stream.request_id, [])]
            assert not self.heard[stream] or any(text.startswith(self.heard[stream]) for text in calls)
            if self.ends[stream] == ["stop"]:
                assert taken in runs
                assert self.heard[stream] in calls

    @invariant()
    def an_honest_server_is_never_accused(self) -> None:
        assert not self.accusations

    @invariant()
    def everything_ends_at_most_once(self) -> None:
        """And one life of a server runs a request at most once."""
        assert all(len(ends) <= 1 for ends in self.ends.values())
        assert all(count == 1 for count in self.starts.values())

    def teardown(self) -> None:
        """Once the network heals, every request that somebody waits for ends, and nothing is kept."""
        if not hasattr(self, "world"):
            return
        Wire.seen.update(self.world.seen)
        self.heal()
        for execution in list(self.texts):
            self.end(execution)
        self.heal()
        for stream in self.streams:
            if stream not in self.cancelled:
                assert len(self.ends[stream]) == 1, "a request has no end"
        self.output_is_a_prefix()
        for _ in range(3):
            self.world.wait(150.0)
            self.world.hang_up()
        assert len(self.world.registry) == 0
        assert not self.world.client.wants_connection

    # --- helpers ---

    @property
    def cable(self) -> Cable:
        assert self.world.cable is not None
        return self.world.cable

    def end(self, execution: Execution) -> None:
        usage = Usage(prompt_tokens=1, completion_tokens=1)
        execution.produce(Delta(finish_reason="stop", usage=usage), self.world.now)

    def take_one(self, stream: Stream) -> None:
        if self.ends[stream] or stream in self.cancelled:
            return
        try:
            delta = self.world.client.take(stream, self.world.now)
        except (RequestConflict, Unrecoverable, Unreachable) as error:
            self.accusations |= BROKEN & set(error.message.split())
            self.world.seen[f"{error.code} after output" if self.taken[stream] else error.code] += 1
            self.ends[stream].append(error)
            return
        if delta is not None:
            self.taken[stream] += delta.text
            self.heard[stream] += "".join(piece.arguments for piece in delta.tool_calls)
            if delta.finish_reason:
                self.ends[stream].append(delta.finish_reason)

    def note_starts(self) -> None:
        for execution, request in self.world.started:
            self.texts[execution] = self.called[execution] = ""
            self.runs.setdefault(request.id, []).append(execution)
            self.starts[self.world.registry.epoch, request.id] += 1
        self.world.started.clear()

    def heal(self) -> None:
        for _ in range(40):
            if self.world.cable is None:
                self.world.connect()
            self.world.settle()
            self.note_starts()
            for stream in self.streams:
                for _ in range(8):
                    self.take_one(stream)
            self.world.wait(0.3)


@pytest.mark.hypothesis
def test_nothing_is_lost_doubled_or_reordered() -> None:
    """The machine above; and what it is to survive did happen."""
    Wire.seen.clear()

    run_state_machine_as_test(Wire, settings=settings(max_examples=150, stateful_step_count=50))

    happened = {"End", "Resumed", "cut inside a message", "repeated", "restarted", "half-open", "slow_consumer"}
    happened |= {"unreachable", "unrecoverable after output"}
    assert not {name for name in happened if not Wire.seen[name]}
