"""What was redacted of a request, put back into its answer while it comes: into the text, which may have to be JSON,
into each call's arguments, which are JSON, into the stop string that ended it, and into the tokens whose probabilities
were asked for."""

from collections.abc import Iterator

import msgspec

from router.privacy.redact import Redaction, Restorer
from shared.schemas import Delta, TokenLogprob, ToolPiece


class Originals:
    """Of one answer; `in_json` if its text must be JSON. What might be the start of a placeholder is held back for the
    next delta."""

    def __init__(self, redaction: Redaction, *, in_json: bool = False) -> None:
        self._redaction = redaction
        self._text = redaction.restorer(in_json=in_json)
        self._calls: dict[int, Restorer] = {}
        self._tokens = Tokens(redaction.restorer(in_json=in_json))

    def restored(self, delta: Delta) -> Delta:
        text, last = self._text.push(delta.text), delta.finish_reason is not None
        calls = [part for piece in delta.tool_calls for part in self._restored(piece)]
        if last:
            text += self._text.flush()
            calls += self._rest()
        logprobs = self._tokens.push(delta.logprobs, last=last)
        stop = None if delta.stop is None else self._redaction.restorer().whole(delta.stop)
        return msgspec.structs.replace(delta, text=text, tool_calls=tuple(calls), logprobs=logprobs, stop=stop)

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


class Tokens:
    """The tokens of the text: those that spell a placeholder together become one, which is the original, as likely as
    all of them were; it has no rivals, since nobody was asked about it."""

    def __init__(self, restorer: Restorer) -> None:
        self._restorer = restorer
        self._held: list[TokenLogprob] = []

    def push(self, tokens: tuple[TokenLogprob, ...], *, last: bool = False) -> tuple[TokenLogprob, ...]:
        self._held += tokens
        text = "".join(token.token for token in self._held)
        settled = len(text) if last else self._restorer.settled(text)
        inside = {at for start, end in self._restorer.places(text) for at in range(start + 1, end)}
        ready: list[TokenLogprob] = []
        group: list[TokenLogprob] = []
        begun = at = 0
        for token in self._held:
            group.append(token)
            at += len(token.token)
            if at <= settled and at not in inside:
                ready.append(self._joined(group, self._restorer.part(text, begun, at)))
                begun, group = at, []
        self._held = group
        return tuple(ready)

    def _joined(self, group: list[TokenLogprob], original: str) -> TokenLogprob:
        if len(group) == 1 and group[0].token == original:
            return group[0]
        logprob = sum(token.logprob for token in group)
        return TokenLogprob(token=original, logprob=logprob, bytes=tuple(original.encode(errors="replace")))
