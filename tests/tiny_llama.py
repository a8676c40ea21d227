"""Models of a few thousand weights with a byte-level tokenizer: real files, small enough for any test."""

from functools import cache
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from cloud_engine.engine.config import EngineConfig
from cloud_engine.engine.engine import Engine
from cloud_engine.engine.runner import Runner
from cloud_engine.model.weights import load_model

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTEXT = 256


SHAPE: dict[str, object] = {
    "vocab_size": 259,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "bos_token_id": 1,
}


def llama(**changes: object) -> LlamaForCausalLM:
    """Random weights, wide enough apart that argmax is never a near tie."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(SHAPE | changes))).float().eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, after the three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate([*SPECIAL, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", bos_token="<|im_start|>", chat_template=TEMPLATE
    )


def save(folder: Path, **changes: object) -> Path:
    llama(**changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@cache
def oracle() -> LlamaForCausalLM:
    return llama()


@torch.inference_mode()
def naive_greedy(prompt: list[int], count: int, model: PreTrainedModel | None = None) -> list[int]:
    """Greedy decoding without any cache: the whole sequence again for every token."""
    model, tokens = model or oracle(), list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def engine(folder: Path, **changes: object) -> Engine:
    values = {"model_len": 128, "num_blocks": 65, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    return Engine(Runner(load_model(folder).pack(), EngineConfig(**(values | changes))), entropy=lambda: 0)
