"""A conversation as the one text a model was trained on, by the chat template that comes inside its file.

The template is the file's author's code: it runs in Jinja's immutable sandbox, without loaders, and never on the event
loop.
"""

import re
from datetime import datetime

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shared.errors import BadRequest
from shared.schemas import Message, Tool
from shared.tool_formats import format_of
from shared.tool_prompts import prepared

MAX_TEMPLATE_CHARS = 1 << 18


class _RefusedError(TemplateError):
    """The template called `raise_exception`."""


class ChatTemplate:
    """`bos` and `eos` are the texts of the vocabulary's own tokens. Raises BadRequest if the source is no template."""

    def __init__(self, source: str, *, bos: str, eos: str) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise BadRequest(f"the model's chat template is longer than {MAX_TEMPLATE_CHARS} characters", param="model")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        self._tokens = {"bos_token": bos, "eos_token": eos}
        self.tool_format = format_of(source)
        self._native = re.search(r"\btools\b", source) is not None
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise BadRequest(f"the model's chat template is broken: {type(error).__name__}", param="model") from error

    def render(self, messages: tuple[Message, ...], tools: tuple[Tool, ...] = ()) -> str:
        """Up to where the assistant speaks. Raises BadRequest; the template's own words may quote the messages, so they
        are not passed on."""
        values, offered = prepared(messages, tools, self.tool_format, native=self._native)
        try:
            return self._template.render(
                messages=values, tools=offered or None, add_generation_prompt=True, **self._tokens
            )
        except Exception as error:
            raise BadRequest("the model's chat template does not accept these messages", param="messages") from error


def _refuse(message: str) -> None:
    raise _RefusedError(message)


def _now(layout: str) -> str:
    """Some templates state the date; it is the device's."""
    return datetime.now().astimezone().strftime(layout)
