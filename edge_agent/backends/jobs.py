"""A request as a job of the batcher: templated, tokenized, refused if it cannot be done. In the model's process."""

import secrets
from concurrent.futures import Future
from functools import partial

from edge_agent.backends.batch import Job
from edge_agent.backends.native import Native
from edge_agent.backends.sampling import Ids, Sampler
from edge_agent.backends.spelling import Spelling
from edge_agent.backends.template import ChatTemplate
from edge_agent.backends.text import TextStream
from shared.errors import BadRequest, ContextTooLong
from shared.guides import Guide, Guides
from shared.schemas import SEED_BITS, ChatRequest
from shared.tool_formats import HERMES, ToolReader


class Jobs:
    """Of the model called `name`. May be used from any thread. Raises BadRequest if its template is broken."""

    def __init__(self, native: Native, name: str, *, context_shift: bool = False) -> None:
        self._native = native
        self._shifts = context_shift and native.can_shift
        self._name = name
        self._bos = native.special("bos")
        source = native.chat_template
        self._template = None if source is None else ChatTemplate(source, bos=self._bos, eos=native.special("eos"))
        self._spelling = Spelling(
            native.pieces,
            native.control,
            native.ends,
            partial(native.tokenize, add_special=False, parse_special=False),
            HERMES if self._template is None else self._template.tool_format,
        )
        self._guides = Guides(self._spelling.vocabulary, "edge")

    def guide(self, request: ChatRequest) -> "Future[Guide] | None":
        """See `Guides.guide`."""
        return self._guides.guide(request, self._spelling.format)

    def tokens(self, request: ChatRequest) -> Ids:
        """Of the whole templated prompt. Raises BadRequest; a text that cannot fit whatever its tokens are is
        ContextTooLong."""
        native, field = self._native, "messages" if request.messages else "prompt"
        text, special = request.prompt, True
        if text is None:
            if self._template is None:
                raise BadRequest("this model has no chat template: send a prompt", param="messages", source="edge")
            text = self._template.render(request.messages, () if request.tool_choice == "none" else request.tools)
            special = not (self._bos and text.startswith(self._bos))
        least = -(-len(text) // native.longest_piece)
        if least >= native.context_length:
            raise ContextTooLong(
                f"the prompt has at least {least} tokens; {self._name} holds {native.context_length}",
                param=field,
                source="edge",
            )
        tokens = native.tokenize(text, add_special=special)
        if not len(tokens):
            raise BadRequest("the prompt has no tokens", param=field)
        return tokens

    def job(self, number: int, request: ChatRequest, guide: Guide | None) -> Job:
        """Raises BadRequest, ContextTooLong."""
        native, sampling = self._native, request.sampling
        prompt = self.tokens(request)
        room = native.context_length - len(prompt)
        if room < 1:
            raise ContextTooLong(
                f"the prompt has {len(prompt)} tokens; with at least 1 token of output "
                f"{self._name} holds {native.context_length}",
                param="messages" if request.messages else "prompt",
                source="edge",
            )
        asked = sampling.max_tokens or room
        return Job(
            number=number,
            prompt=prompt,
            sampler=Sampler(
                sampling, prompt, native.vocabulary, secrets.randbits(SEED_BITS), ends=native.ends, guide=guide
            ),
            text=TextStream(
                self._spelling.of(request),
                native.ends,
                sampling,
                prompt_tokens=len(prompt),
                max_tokens=asked if self._shifts else min(room, asked),
                tools=self._reader(request),
            ),
            private=request.label != "free",
        )

    def _reader(self, request: ChatRequest) -> ToolReader | None:
        names = [tool.name for tool in request.calling]
        if not names or self._template is None:
            return None
        return ToolReader(self._template.tool_format, names, request.id, parallel=request.parallel_tool_calls)
