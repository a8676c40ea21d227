"""How a model's tokens are spelled: to whoever reads the answer, to the reader of its calls, and to a grammar."""

from collections.abc import Collection, Sequence, Set

from shared.grammar_trial import Tokenize
from shared.guides import Vocabulary
from shared.schemas import ChatRequest
from shared.tool_formats import ToolFormat


class Spelling:
    """Of the tokens whose bytes are `pieces`. Those of `control` say nothing, but that the markers of a tool's call are
    shown to who looks for them."""

    def __init__(
        self,
        pieces: Sequence[bytes],
        control: Collection[int],
        ends: Set[int],
        tokenize: Tokenize,
        format_: ToolFormat,
    ) -> None:
        self.format = format_
        self.vocabulary = Vocabulary(pieces, control, ends, tokenize)
        self._said, self._called = list(pieces), list(pieces)
        markers = {marker.encode() for marker in format_.markers}
        for token in control:
            self._said[token] = b""
            if pieces[token] not in markers:
                self._called[token] = b""

    def of(self, request: ChatRequest) -> list[bytes]:
        """What each token adds to the answer's text."""
        return self._called if request.calling else self._said
