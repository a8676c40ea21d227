"""What an embedding model is made of: the files of a sentence-transformers folder."""

from typing import Final

WEIGHTS: Final = "model.safetensors"
SOURCE_FILES: Final = ("config.json", "sentence_bert_config.json", "tokenizer.json")
"""Small ones that must lie beside the weights."""
MAX_JSON_BYTES: Final = 16 << 20
