import pytest
import tiny_llama
from fakes import text_of
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_engine.engine.sampler import Sampled
from cloud_engine.engine.stream import TextStream
from cloud_engine.model.tokenizer import Tokenizer
from shared.schemas import Delta, Sampling, Usage


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return Tokenizer(tiny_model)


def play(tokenizer, tokens, *, stop=(), ending="length", **sampling) -> list[Delta]:
    """Deltas of a stream that samples these tokens; it ends at a stop string or with the last token."""
    stream = TextStream(tokenizer, Sampling(stop=stop, **sampling), prompt_tokens=3)
    made = []
    for index, token in enumerate(tokens):
        delta = stream.push(Sampled(token, -0.5), ending if index == len(tokens) - 1 else None, cached_tokens=2)
        if delta is not None:
            made.append(delta)
        if stream.stopped:
            break
    return made


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(alphabet=st.sampled_from("ab é😀日\n"), min_size=1, max_size=20),
    stops=st.lists(st.text(alphabet="ab 😀", min_size=1, max_size=3), max_size=3),
)
def test_deltas_add_up_to_the_text_before_the_first_stop(tokenizer, text, stops):
    """With one token a byte, the deltas join to the text, cut at the stop string that is complete first."""
    deltas = play(tokenizer, tokenizer.encode(text), stop=tuple(stops))
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    seen = text[: min(ends, default=len(text))]
    cuts = [seen.find(stop) for stop in stops if stop in seen]
    assert text_of(deltas) == seen[: min(cuts, default=len(text))]
    assert deltas[-1].finish_reason == ("stop" if cuts else "length")
    assert (deltas[-1].stop in stops) == bool(cuts)
    assert all(delta.finish_reason is None and delta.usage is None for delta in deltas[:-1])


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, 258), min_size=1, max_size=40))
def test_any_tokens_stream_to_what_the_tokenizer_decodes(tokenizer, tokens):
    """Whatever bytes come, broken ones too, the joined deltas equal decoding all tokens at once."""
    deltas = play(tokenizer, tokens, ignore_eos=True)
    whole = tiny_llama.tokenizer().decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert text_of(deltas) == whole
    assert sum(delta.tokens for delta in deltas) == len(tokens)
    assert sum(len(delta.logprobs) for delta in deltas) == len(tokens)


def test_half_a_character_waits(tokenizer):
    """No delta while a character is incomplete; then its tokens are counted together."""
    deltas = play(tokenizer, tokenizer.encode("a😀b"))
    assert [(delta.text, delta.tokens) for delta in deltas] == [("a", 1), ("😀", 4), ("b", 1)]


def test_an_unfinished_character_ends_as_a_replacement(tokenizer):
    """Bytes that never became a character are shown at the end, as the tokenizer would."""
    assert text_of(play(tokenizer, tokenizer.encode("a😀")[:3])) == "a\N{REPLACEMENT CHARACTER}"


def test_text_that_may_begin_a_stop_string_is_held_back(tokenizer):
    """It is released when it turns out not to, and at the end."""
    deltas = play(tokenizer, tokenizer.encode("xENxE"), stop=("END",))
    assert [delta.text for delta in deltas] == ["x", "ENx", "E"]


def test_the_end_token_is_not_text(tokenizer):
    """The end-of-turn token counts as a token and shows no text; the last delta carries the usage."""
    deltas = play(tokenizer, [*tokenizer.encode("hi"), 2], ending="stop")
    assert text_of(deltas) == "hi"
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].usage == Usage(prompt_tokens=3, completion_tokens=3, cached_tokens=2)
    assert sum(len(delta.logprobs) for delta in deltas) == 2


def test_logprobs_spell_tokens_in_bytes(tokenizer):
    """A token that is part of a character has its bytes, and its rivals theirs."""
    token = tokenizer.encode("é")[0]
    stream = TextStream(tokenizer, Sampling(logprobs=1), prompt_tokens=1)
    delta = stream.push(Sampled(token, -1.0, ((tokenizer.encode("a")[0], -0.5),)), "length", 0)
    (entry,) = delta.logprobs
    assert (entry.bytes, entry.logprob, entry.token) == ((0xC3,), -1.0, "\N{REPLACEMENT CHARACTER}")
    assert [(rival.token, rival.logprob, rival.bytes) for rival in entry.top] == [("a", -0.5, (97,))]
