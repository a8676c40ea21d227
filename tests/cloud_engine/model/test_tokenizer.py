import json
import random
import shutil

import pytest
import tiny_llama
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cloud_engine.model.tokenizer import Detokenizer, Tokenizer
from shared.errors import BadRequest
from shared.gguf import ModelInvalid
from shared.schemas import Message

USER = Message(role="user", content="secret words")


def joined(tokenizer: Tokenizer, tokens: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer)
    return "".join(map(detokenizer.push, tokens)) + detokenizer.flush()


def test_text_survives_the_round_trip(tiny_model):
    """Encoded and detokenised token by token, any text is itself."""
    tokenizer = Tokenizer(tiny_model)
    text = "Grüße, 日本! 😀\n\ttabs  and   spaces\x00\x7f"
    assert joined(tokenizer, tokenizer.encode(text)) == text


def test_a_raw_prompt_gets_no_template(tiny_model):
    """Text is encoded as it is; a conversation goes through the template and ends where the assistant speaks."""
    tokenizer = Tokenizer(tiny_model)
    assert len(tokenizer.encode("abc")) == 3
    chat = tokenizer.encode_chat([Message(role="user", content="abc")])
    assert chat == tiny_llama.tokenizer().encode("<|im_start|>user\nabc<|im_end|>\n<|im_start|>assistant\n")
    assert chat.count(1) == 2


def with_template(folder, tmp_path, template: str) -> Tokenizer:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "chat_template.jinja").write_text(template)
    return Tokenizer(copy)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no ' + messages[0]['content']) }}",
        "{{ messages.nothing.at.all }}",
        "{{ ().__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ 1 + 'a' }}",
        "{% if %}",
    ],
)
def test_a_template_that_refuses_or_misbehaves_is_a_bad_request(tiny_model, tmp_path, template):
    """Errors, sandbox breaches and endless ranges in a template become BadRequest, without the messages' text."""
    tokenizer = with_template(tiny_model, tmp_path, template)
    with pytest.raises(BadRequest) as refused:
        tokenizer.encode_chat([USER])
    assert refused.value.param == "messages"
    assert "secret" not in str(refused.value)


def test_end_tokens_come_from_all_sources(tiny_model, tmp_path):
    """The tokenizer's own, the known names, and those of generation_config.json."""
    assert Tokenizer(tiny_model).stop_ids == {0, 2}
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 77]}))
    assert Tokenizer(copy).stop_ids == {0, 2, 77}


def test_the_lower_bound_on_tokens_holds(tiny_model):
    """Text never makes fewer tokens than the bound says."""
    tokenizer = Tokenizer(tiny_model)
    for text in ("", "a", "hello " * 50, "<|endoftext|>" * 20):
        assert tokenizer.least_tokens(len(text)) <= len(tokenizer.encode(text))


def test_sentencepiece_vocabularies_spell_bytes_too(tmp_path):
    """Pieces with U+2581 for a space and <0xNN> for a byte detokenise to text, half characters held back."""
    pieces = ["<unk>", "</s>", "\u2581he", "llo", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    inner = Inner(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], unk_token="<unk>"))
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>").save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(token) for token in (2, 3, 4, 5, 6, 7, 1)] == [" he", "llo", "", "", "", "😀", ""]
    assert tokenizer.stop_ids == {1}


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    """A typed error, not a download."""
    with pytest.raises(ModelInvalid, match="tokenizer"):
        Tokenizer(tmp_path)


@pytest.mark.model
def test_the_real_tokenizer_agrees_with_transformers(model_path):
    """On the real vocabulary the bytes of random tokens join to what transformers decodes; chats render the same."""
    tokenizer = Tokenizer(model_path)
    oracle = AutoTokenizer.from_pretrained(str(model_path.parent), gguf_file=model_path.name, local_files_only=True)
    rng = random.Random(0)
    for _ in range(200):
        tokens = [rng.randrange(len(oracle)) for _ in range(rng.randrange(1, 40))]
        whole = oracle.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert joined(tokenizer, tokens) == whole
    plain = [{"role": "user", "content": "Grüße 😀"}]
    expected = oracle.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode_chat([Message(role="user", content="Grüße 😀")]) == expected
    assert tokenizer.stop_ids >= {2, 0}
