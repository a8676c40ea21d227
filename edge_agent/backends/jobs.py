"""A request as a job of the batcher: templated, tokenized, refused if it cannot be done. In the model's process."""

import secrets

from edge_agent.backends.batch import Job
from edge_agent.backends.native import Native
from edge_agent.backends.sampling import Ids, Sampler
from edge_agent.backends.template import ChatTemplate
from edge_agent.backends.text import TextStream
from shared.errors import BadRequest, ContextTooLong, UnsupportedParameter
from shared.schemas import SEED_BITS, ChatRequest
from shared.tool_formats import ToolReader


class Jobs:
    """Of the model called `name`. May be used from any thread. Raises BadRequest if its template is broken."""

    def __init__(self, native: Native, name: str) -> None:
        self._native = native
        self._name = name
        self._bos = native.special("bos")
        source = native.chat_template
        self._template = None if source is None else ChatTemplate(source, bos=self._bos, eos=native.special("eos"))

    def tokens(self, request: ChatRequest) -> Ids:
        """Of the whole templated prompt. Raises BadRequest; a text that cannot fit whatever its tokens are is
        ContextTooLong."""
        _refuse_unsupported(request)
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

    def job(self, number: int, request: ChatRequest) -> Job:
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
        return Job(
            number=number,
            prompt=prompt,
            sampler=Sampler(sampling, prompt, native.vocabulary, seed=secrets.randbits(SEED_BITS)),
            text=TextStream(
                native.pieces,
                native.ends,
                sampling,
                prompt_tokens=len(prompt),
                max_tokens=min(room, sampling.max_tokens or room),
                tools=self._reader(request),
            ),
        )

    def _reader(self, request: ChatRequest) -> ToolReader | None:
        names = [tool.name for tool in request.calling]
        if not names or self._template is None:
            return None
        return ToolReader(self._template.tool_format, names, request.id, parallel=request.parallel_tool_calls)


def _refuse_unsupported(request: ChatRequest) -> None:
    """What would change the answer and is not done on this side is refused by name."""
    sampling = request.sampling
    asked = {
        "grammar": request.grammar is not None,
        "tool_choice": bool(request.calling) and request.tool_choice == "required",
        "strict": any(tool.strict for tool in request.calling),
        "logit_bias": bool(sampling.logit_bias),
        "min_tokens": bool(sampling.min_tokens),
        "stop_token_ids": bool(sampling.stop_token_ids),
    }
    for name in (name for name, given in asked.items() if given):
        raise UnsupportedParameter(f"the model on this device knows no {name}", param=name, source="edge")
