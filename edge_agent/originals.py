"""What was redacted of a request, put back into its answer while it comes: into the text, and into each call's
arguments, which are JSON."""

from collections.abc import Iterator

import msgspec

from router.privacy.redact import Redaction, Restorer
from shared.schemas import Delta, ToolPiece


class Originals:
    """Of one answer. What might be the start of a placeholder is held back for the next delta."""

    def __init__(self, redaction: Redaction) -> None:
        self._redaction = redaction
        self._text = redaction.restorer()
        self._calls: dict[int, Restorer] = {}

    def restored(self, delta: Delta) -> Delta:
        text, last = self._text.push(delta.text), delta.finish_reason is not None
        calls = [part for piece in delta.tool_calls for part in self._restored(piece)]
        if last:
            text += self._text.flush()
            calls += self._rest()
        return msgspec.structs.replace(delta, text=text, tool_calls=tuple(calls))

    def _restored(self, piece: ToolPiece) -> Iterator[ToolPiece]:
        if piece.index not in self._calls:
            yield from self._rest()  # before a call begins, those before it are complete
            self._calls[piece.index] = self._redaction.restorer(in_json=True)
        arguments = self._calls[piece.index].push(piece.arguments)
        if arguments or piece.name is not None:
            yield msgspec.structs.replace(piece, arguments=arguments)

    def _rest(self) -> Iterator[ToolPiece]:
        for index, restorer in self._calls.items():
            if held := restorer.flush():
                yield ToolPiece(index=index, arguments=held)
