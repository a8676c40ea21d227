"""Grammars through the whole engine: threads, batches, preemption, abort, limits."""

import asyncio
import json
import re

import pytest
import tiny_llama
from fakes import text_of
from tiny_serving import collect, idle, request, serving_tiny

from shared import guides
from shared.errors import BadRequest, Overloaded
from shared.schemas import Grammar, Sampling

ITEM = json.dumps(
    {
        "type": "object",
        "properties": {
            "word": {"type": "string", "maxLength": 12},
            "n": {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 3},
        },
        "required": ["word", "n"],
        "additionalProperties": False,
    }
)
JSON = Grammar(syntax="json_schema", text=ITEM)
DATE = Grammar(syntax="regex", text=r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


@pytest.mark.parametrize("depth", [0, 1])
async def test_answers_fit_under_preemption_and_beside_free_ones(tiny_model, depth):
    """A small pool preempts, steps run ahead, batches mix grammars and none: each text fits, and is as alone."""
    sampling = [Sampling(temperature=1.2, seed=seed, max_tokens=140) for seed in range(9)]
    asked = [request(f"prompt {at}", one, grammar=(JSON, DATE, None)[at % 3]) for at, one in enumerate(sampling)]
    async with serving_tiny(
        tiny_model, num_blocks=22, block_size=8, model_len=160, max_num_seqs=9, async_depth=depth
    ) as answer:
        for grammar in (JSON, DATE):  # so that all begin together
            await collect(answer, request(sampling=Sampling(max_tokens=1), grammar=grammar))
        together = await asyncio.gather(*(collect(answer, one) for one in asked))
        assert answer.stats().preemptions
        await idle(answer)
    async with serving_tiny(tiny_model) as answer:
        alone = [await collect(answer, one) for one in asked]
    assert [text_of(deltas) for deltas in together] == [text_of(deltas) for deltas in alone]
    for at, deltas in enumerate(together):
        if at % 3 == 0:
            assert deltas[-1].finish_reason == "stop"
            assert set(json.loads(text_of(deltas))) == {"word", "n"}
        elif at % 3 == 1:
            assert deltas[-1].finish_reason == "stop"
            assert re.fullmatch(DATE.text, text_of(deltas))


async def test_an_answer_that_is_complete_ends_there(tiny_model):
    """When nothing may follow, the answer ends with its last character, `ignore_eos` or not."""
    sampling = Sampling(temperature=0, max_tokens=50, ignore_eos=True)
    async with serving_tiny(tiny_model) as answer:
        deltas = await collect(answer, request(sampling=sampling, grammar=DATE))
    assert len(text_of(deltas)) == deltas[-1].usage.completion_tokens == 10
    assert deltas[-1].finish_reason == "stop"


async def test_a_limit_cuts_and_says_so(tiny_model):
    """`max_tokens` in the middle of a structure is `length`: what came so far is a beginning of it."""
    async with serving_tiny(tiny_model) as answer:
        deltas = await collect(answer, request(sampling=Sampling(temperature=0, max_tokens=4), grammar=JSON))
    assert deltas[-1].finish_reason == "length"
    assert text_of(deltas).startswith("{")


async def test_a_stop_string_still_stops(tiny_model):
    """A stop string inside the structure ends it: the client asked for that."""
    async with serving_tiny(tiny_model) as answer:
        deltas = await collect(answer, request(sampling=Sampling(temperature=0, stop=("-",)), grammar=DATE))
    assert re.fullmatch(r"[0-9]{4}", text_of(deltas))
    assert deltas[-1].finish_reason == "stop"


async def test_a_client_that_leaves_frees_everything(tiny_model):
    """A cancelled answer with a grammar gives its blocks back, and others go on."""
    async with serving_tiny(tiny_model) as answer:
        deltas = answer.answer(request(sampling=Sampling(temperature=1, max_tokens=200), grammar=JSON))
        await anext(deltas)
        await deltas.aclose()
        await idle(answer)
        assert json.loads(text_of(await collect(answer, request(sampling=Sampling(seed=1), grammar=JSON))))


async def test_a_grammar_that_does_not_compile_hurts_nobody(tiny_model):
    """S-41: a refused grammar is its own request's error; the one beside it is answered."""
    bad = request(grammar=Grammar(syntax="lark", text="start: nothing"))
    async with serving_tiny(tiny_model) as answer:
        refused, fine = await asyncio.gather(
            collect(answer, bad), collect(answer, request(sampling=Sampling(temperature=0), grammar=DATE)),
            return_exceptions=True,
        )  # fmt: skip
        assert answer.failure is None
    assert isinstance(refused, BadRequest)
    assert refused.param == "grammar"
    assert len(text_of(fine)) == 10


async def test_the_wait_for_the_compiler_is_bounded(tiny_model, monkeypatch):
    """S-41: more grammars than may wait are refused as overload at once."""
    monkeypatch.setattr(guides, "MAX_COMPILING", 2)
    async with serving_tiny(tiny_model) as answer:
        results = await asyncio.gather(
            *(
                collect(answer, request(grammar=Grammar(syntax="regex", text=f"a{at}"), sampling=Sampling()))
                for at in range(12)
            ),
            return_exceptions=True,
        )
    refused = [result for result in results if isinstance(result, Overloaded)]
    assert refused
    assert {text_of(result) for result in results if isinstance(result, list)} <= {f"a{at}" for at in range(12)}


@pytest.mark.parametrize("name", ["logit_bias", "stop_token_ids"])
async def test_tokens_outside_the_vocabulary_are_refused(tiny_model, name):
    """S-42: an id that no logit has is a BadRequest, not an index beyond a tensor."""
    value = {"logit_bias": {259: 1.0}, "stop_token_ids": (259,)}[name]
    async with serving_tiny(tiny_model) as answer:
        with pytest.raises(BadRequest) as refused:
            await collect(answer, request(sampling=Sampling(**{name: value})))
        assert refused.value.param == name
        assert answer.failure is None


async def test_bias_minimum_and_stop_tokens(tiny_model):
    """A biased token wins, a stop token ends the answer unseen, and no end comes before `min_tokens`."""
    a, b = tiny_llama.tokenizer().encode("ab")
    async with serving_tiny(tiny_model) as answer:
        biased = await collect(answer, request(sampling=Sampling(temperature=0, max_tokens=3, logit_bias={a: 100})))
        stopped = Sampling(temperature=0, max_tokens=9, logit_bias={b: 100}, stop_token_ids=(b,))
        ended = await collect(answer, request(sampling=stopped))
        late = await collect(
            answer, request(sampling=Sampling(temperature=0, max_tokens=9, logit_bias={2: 100}, min_tokens=5))
        )
    assert text_of(biased) == "aaa"
    assert (text_of(ended), ended[-1].finish_reason, ended[-1].usage.completion_tokens) == ("", "stop", 1)
    assert (late[-1].finish_reason, late[-1].usage.completion_tokens) == ("stop", 6)
