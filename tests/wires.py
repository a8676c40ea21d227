"""Two sessions joined without a socket: byte pipes that can be cut anywhere, and a clock that a test moves."""

import itertools
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from shared.executions import Execution, Rules
from shared.frames import MSGPACK, Codec, Err
from shared.offers import Follower
from shared.registry import Registry
from shared.schemas import ChatRequest, Delta
from shared.session import ClientSession, Reported, ServerSession, Start, Stop
from shared.streams import ClientRules, Stream


@dataclass
class Pipe:
    """One direction of a connection: messages framed by a length, in flight as bytes."""

    binary: bool
    flying: bytearray = field(default_factory=bytearray)
    arrived: bytearray = field(default_factory=bytearray)
    past: deque[bytes | str] = field(default_factory=lambda: deque(maxlen=16))
    """What arrived lately."""

    def put(self, message: bytes | str) -> None:
        data = message if isinstance(message, bytes) else message.encode()
        self.flying += len(data).to_bytes(4) + data

    def move(self, count: int | None = None) -> list[bytes | str]:
        """Let `count` bytes (all, by default) arrive; returns the messages that are now whole."""
        count = len(self.flying) if count is None else count
        self.arrived += self.flying[:count]
        del self.flying[:count]
        whole: list[bytes | str] = []
        while len(self.arrived) >= 4 and len(self.arrived) >= 4 + (size := int.from_bytes(self.arrived[:4])):
            data = bytes(self.arrived[4 : 4 + size])
            del self.arrived[: 4 + size]
            whole.append(data if self.binary else data.decode())
        return whole


class Cable:
    """One connection: the server's session and a pipe each way."""

    def __init__(self, session: ServerSession, binary: bool) -> None:
        self.session = session
        self.up, self.down = Pipe(binary), Pipe(binary)


class World:
    """A client, a server, and at most one cable that the client believes in."""

    def __init__(
        self,
        subprotocol: str = MSGPACK,
        rules: Rules | None = None,
        client_rules: ClientRules | None = None,
        follower: Follower | None = None,
    ) -> None:
        self.now = 0.0
        self.subprotocol = subprotocol
        self.rules = rules or Rules()
        self._numbers = itertools.count(1)
        self.client = ClientSession(client_rules or ClientRules(), "test", lambda: None, follower)
        self.cable: Cable | None = None
        self.cables: list[Cable] = []
        """All that the server believes in."""
        self.started: list[tuple[Execution, ChatRequest]] = []
        self.stopped: list[Execution] = []
        self.reported: list[Reported] = []
        self.seen: Counter[str] = Counter()
        """Which frames arrived at the client, by name and code, and which faults happened."""
        self.restart()

    def token(self) -> str:
        return f"token-{next(self._numbers):016d}"

    def restart(self) -> None:
        """The server dies and comes back knowing nothing."""
        self.registry = Registry(f"epoch-{next(self._numbers)}", self.rules, self.token)
        self.cables = []
        if self.cable is not None:
            self.client.lost(self.now)
            self.cable = None

    def connect(self, tenant: str = "tenant") -> Cable:
        cable = self.plug(tenant)
        self.client.connected(Codec.client(self.subprotocol), self.now)
        self.cable = cable
        return cable

    def plug(self, tenant: str = "tenant") -> Cable:
        """The server's end of a connection, whoever is at the other."""
        codec = Codec.server(self.subprotocol)
        cable = Cable(ServerSession(self.registry, tenant, codec, self.now, lambda: None), codec.binary)
        self.cables.append(cable)
        return cable

    def cut(self, *, server_knows: bool = True) -> None:
        cable, self.cable = self.cable, None
        if cable is not None and (cable.up.arrived or cable.down.arrived):
            self.seen["cut inside a message"] += 1
        self.client.lost(self.now)
        if cable is not None and server_knows:
            self.server_lost(cable)

    def server_lost(self, cable: Cable) -> None:
        if cable in self.cables:
            self.cables.remove(cable)
            cable.session.lost(self.now)

    def deliver_up(self, cable: Cable, messages: list[bytes | str]) -> None:
        for message in messages:
            cable.up.past.append(message)
            for event in cable.session.receive(message, self.now):
                if isinstance(event, Start):
                    self.started.append((event.execution, event.request))
                elif isinstance(event, Stop):
                    self.stopped.append(event.execution)
                else:
                    self.reported.append(event)

    def deliver_down(self, cable: Cable, messages: list[bytes | str]) -> None:
        for message in messages:
            cable.down.past.append(message)
            if cable is self.cable:
                frame = Codec.client(self.subprotocol).decode(message)
                self.seen[frame.code if isinstance(frame, Err) else type(frame).__name__] += 1
                self.client.receive(message, self.now)

    def fill(self) -> None:
        """Both sides put into the cables what they have to send."""
        for cable in self.cables:
            while (message := cable.session.next_message(self.now)) is not None:
                cable.down.put(message)
        if self.cable is not None:
            while (message := self.client.next_message(self.now)) is not None:
                self.cable.up.put(message)

    def settle(self) -> None:
        """Until nothing moves any more, at this moment."""
        moving = True
        while moving:
            self.fill()
            moving = any(cable.up.flying or cable.down.flying for cable in self.cables)
            for cable in list(self.cables):
                self.deliver_up(cable, cable.up.move())
                self.deliver_down(cable, cable.down.move())
            self.hang_up()

    def hang_up(self) -> None:
        """Do what the shells do when a session wants to close."""
        for cable in list(self.cables):
            if cable.session.closing is not None:
                self.fill()
                self.deliver_down(cable, cable.down.move())
                self.server_lost(cable)
                if cable is self.cable:
                    self.cut()
        if self.client.closing is not None:
            self.cut()

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.client.tick(self.now)
        for cable in self.cables:
            cable.session.tick(self.now)
        self.registry.tick(self.now)

    def open(self, request_id: str = "r", notify: Callable[[], None] = lambda: None) -> Stream:
        return self.client.open(ChatRequest(id=request_id, model="m", prompt="p"), self.now, notify)

    def take_all(self, stream: Stream) -> list[Delta]:
        """What can be taken now; an error is left for the next call."""
        taken: list[Delta] = []
        while not taken or stream.pending:
            delta = self.client.take(stream, self.now)
            if delta is None:
                break
            taken.append(delta)
        return taken
