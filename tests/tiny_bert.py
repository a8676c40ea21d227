"""A very small BERT with its tokenizer, as a folder that sentence-transformers would write. Needs torch."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel

WORDS = [
    "the", "a", "sky", "is", "blue", "why", "how", "do", "i", "boil", "an", "egg", "what", "of", "and", "in", "to",
    "berlin", "paris", "not", "no", "yes", "1", "2", "3", "?", ".", ",",
]  # fmt: skip
MAX_TOKENS = 24


def write_tiny_bert(folder: Path, *, seed: int = 0, width: int = 32) -> BertModel:
    """Random weights, large enough for texts to differ. Returns the model that the files hold."""
    torch.manual_seed(seed)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *dict.fromkeys((*WORDS, *letters, *(f"##{one}" for one in letters)))]
    config = BertConfig(
        vocab_size=len(vocab), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordPiece({word: at for at, word in enumerate(vocab)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.enable_truncation(8)  # as the files of the field have it; ours must not keep it
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": MAX_TOKENS}))
    return model
