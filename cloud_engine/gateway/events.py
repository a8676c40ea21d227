"""Server-sent events out of the bytes of a reply, however they are cut. No I/O; sizes are bounded."""

from shared.errors import UpstreamFailed

MAX_EVENT = 1 << 20
"""Bytes of one event, and of one line."""


class EventStream:
    """Feed it bytes as they come; it gives back the data of each event that is whole.

    As the WHATWG's HTML standard says (9.2.6): a line ends with LF, CR or CRLF, an event with an empty line. Comments
    and every field but `data` are passed over. An event that is not ended is not an event.
    """

    def __init__(self, max_event: int = MAX_EVENT) -> None:
        self._max = max_event
        self._line = bytearray()
        self._data: list[bytes] = []
        self._size = 0
        self._after_cr = False

    def feed(self, data: bytes) -> list[bytes]:
        """Raises UpstreamFailed if an event is over the limit."""
        if not data:
            return []
        if self._after_cr:
            data = data.removeprefix(b"\n")
        self._after_cr = data.endswith(b"\r")
        *lines, rest = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        events = []
        for line in lines:
            self._extend(line)
            if (event := self._end_line()) is not None:
                events.append(event)
        self._extend(rest)
        return events

    def _extend(self, part: bytes) -> None:
        self._line += part
        if self._size + len(self._line) > self._max:
            raise UpstreamFailed(f"an event of the upstream is over {self._max} bytes", source="cloud")

    def _end_line(self) -> bytes | None:
        line = bytes(self._line).removeprefix(b"\xef\xbb\xbf")
        self._line.clear()
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
                self._size += len(value)
            return None
        event = b"\n".join(self._data) if self._data else None
        self._data, self._size = [], 0
        return event
