"""Names of models that are none: who answers to them is decided."""

from typing import Final

VIRTUAL_MODELS: Final = ("auto", "edge", "cloud")
