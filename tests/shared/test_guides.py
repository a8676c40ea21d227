import json
import re

import pytest
import tiny_llama
import torch

from cloud_engine.engine.draw import Draw
from cloud_engine.engine.sampler import sample
from cloud_engine.engine.sequence import Sequence
from cloud_engine.engine.work import Work
from cloud_engine.model.tokenizer import Tokenizer
from shared import grammar_trial
from shared.errors import BadRequest, Overloaded
from shared.guides import MAX_COMPILED, GrammarCompiler, Vocabulary
from shared.schemas import ChatRequest, Grammar, Message, Sampling, Tool
from shared.tool_formats import HERMES
from shared.tool_grammar import tool_grammar

END = 2
PERSON = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "age": {"type": "integer", "minimum": 0, "maximum": 9},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Vocabulary:
    return Tokenizer(tiny_llama.save(tmp_path_factory.mktemp("tiny"))).vocabulary


@pytest.fixture(scope="module")
def compiler(vocabulary):
    made = GrammarCompiler(vocabulary, "cloud")
    yield made
    made.close()


def ids(text: str) -> list[int]:
    return tiny_llama.tokenizer().encode(text)


def allowed(guide) -> set[int]:
    mask = guide.mask()
    return {token for token in range(len(mask) * 8) if mask[token // 8] >> token % 8 & 1}


def draw(sequence: Sequence) -> Draw:
    [one] = Work(sequence, 0, sequence.num_tokens, samples=True).draws()
    return one


def regex(text: str) -> Grammar:
    return Grammar(syntax="regex", text=text)


def test_a_guide_allows_what_fits_and_nothing_else(compiler):
    """At each state exactly the next bytes of some fitting text, and an end only where a text may end."""
    guide = compiler.guide(regex("ab?c"))
    assert allowed(guide) == set(ids("a"))
    assert not guide.take(*ids("a"))
    assert allowed(guide) == {*ids("b"), *ids("c")}
    guide.take(*ids("b"))
    assert guide.take(*ids("c"))


def test_an_open_end_may_end_or_go_on(compiler):
    """Where a text may end, every end token is allowed beside what may follow."""
    guide = compiler.guide(regex("a+"))
    assert not guide.take(*ids("a"))
    assert allowed(guide) == {*ids("a"), END, 0}
    assert guide.take(END)


CALLING = ChatRequest(
    id="r",
    model="m",
    messages=(Message(role="user", content="?"),),
    tools=(Tool(name="f", parameters=PERSON),),
    tool_choice="required",
)


@pytest.mark.parametrize(
    ("grammar", "head", "tail"),
    [
        (Grammar(syntax="json_schema", text=PERSON), "", ""),
        (tool_grammar(CALLING, HERMES, {}), '<tool_call>{"name": "f", "arguments": ', "}</tool_call>"),
    ],
    ids=["schema", "tool"],
)
def test_blank_lines_are_no_answer(compiler, grammar, head, tail):
    """JSON on one line or indented fits; an empty line, or spaces without end, do not."""
    for indent in (None, 2, 8, "\t"):
        guide = compiler.guide(grammar)
        for token in ids(head + json.dumps({"name": "Bo", "age": 3}, indent=indent) + tail):
            assert token in allowed(guide)
            complete = guide.take(token)
        assert complete or guide.take(END)
    for begun in ("{\n", "{ ", '{\n  "name"\n', "{\n" + " " * 32):
        guide = compiler.guide(grammar)
        for token in ids(head + begun):
            guide.take(token)
        assert allowed(guide)
        assert not allowed(guide) & set(ids(begun[-1]))


def test_guides_of_one_grammar_are_apart(compiler):
    """A remembered grammar starts each answer at its beginning, whatever others took."""
    first, second = compiler.guide(regex("xy")), compiler.guide(regex("xy"))
    first.take(*ids("x"))
    assert allowed(first) == set(ids("y"))
    assert allowed(second) == allowed(compiler.guide(regex("xy"))) == set(ids("x"))


@pytest.mark.parametrize(
    ("grammar", "fits"),
    [
        (Grammar(syntax="json_schema", text=PERSON), lambda text: json.loads(text)["age"] in range(10)),
        (regex(r"[0-9]{3}-[a-f]+x"), lambda text: re.fullmatch(r"[0-9]{3}-[a-f]+x", text)),
        (
            Grammar(syntax="lark", text='start: "<" WORD ("," WORD)* ">"\nWORD: /[a-c]{1,3}/'),
            lambda text: text[-1] == ">",
        ),
    ],
)
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0),
        Sampling(temperature=2.0),
        Sampling(temperature=1.5, top_k=5, top_p=0.9, min_p=0.01),
        Sampling(temperature=1.0, presence_penalty=2, frequency_penalty=2, repetition_penalty=1.5, logprobs=3),
        Sampling(temperature=0, repetition_penalty=3.0, logit_bias={5: -100, 250: 100}, min_tokens=40),
    ],
    ids=["greedy", "hot", "cut", "penalties", "bias"],
)
def test_whatever_is_sampled_fits(compiler, grammar, fits, sampling):
    """S-42: random logits, every mode and penalty: the text fits its grammar, or is cut where it would still fit."""
    torch.manual_seed(0)
    ended = 0
    for seed in range(4):
        made = Sequence(
            id="s", tokens=[1], sampling=sampling, max_tokens=200, seed=seed, stop_ids=frozenset({END, 0}), root=b""
        )
        made.guide = compiler.guide(grammar)
        for _ in range(200):
            [drawn] = sample(torch.randn(1, 300) * 2, [draw(made)])
            assert drawn.token in allowed(made.guide)
            assert drawn.logprob is None or drawn.logprob <= 0
            if made.append(drawn.token) == "stop":
                ended += 1
                break
        text = tiny_llama.tokenizer().decode(made.output, skip_special_tokens=True)
        assert made.num_output == 200 or fits(text)
    assert ended


def test_rows_without_a_grammar_are_left_alone(compiler):
    """In one batch, the mask touches its own row only, and not the logits that were given."""
    logits = torch.zeros(2, 300)
    logits[:, 250] = 5
    kept = logits.clone()
    free = Sequence(
        id="f", tokens=[1], sampling=Sampling(temperature=0), max_tokens=9, seed=0, stop_ids=frozenset(), root=b""
    )
    bound = Sequence(
        id="b", tokens=[1], sampling=Sampling(temperature=0), max_tokens=9, seed=0, stop_ids=frozenset(), root=b""
    )
    bound.guide = compiler.guide(regex("q"))
    assert [item.token for item in sample(logits, [draw(free), draw(bound)])] == [250, *ids("q")]
    assert torch.equal(logits, kept)


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar(syntax="json_schema", text='{"type":"string","unheardOf":1,"contains":{}}'),
        Grammar(syntax="json_schema", text='{"allOf":[{"type":"string"},{"type":"integer"}]}'),
        regex("(?=a)b"),
        regex(r"(a)\1"),
        Grammar(syntax="lark", text="start: nothing"),
        Grammar(syntax="lark", text="not a grammar"),
    ],
    ids=lambda grammar: grammar.text,
)
def test_what_cannot_be_compiled_is_refused(compiler, grammar):
    """S-41: unknown keywords, contradictions, look-around, broken grammars: a BadRequest that names the field."""
    with pytest.raises(BadRequest) as refused:
        compiler.guide(grammar)
    assert refused.value.param == "grammar"


def test_distinct_grammars_are_forgotten(compiler):
    """S-41: however many different grammars come, a bounded number is kept, the latest used."""
    first = regex("keep me")
    for at in range(3 * MAX_COMPILED):
        compiler.guide(regex(f"word {at}"))
        compiler.guide(first)
    assert compiler.remembered == MAX_COMPILED
    trials = compiler.trials
    compiler.guide(first)
    assert compiler.trials == trials


def test_a_trial_that_hangs_is_killed(vocabulary, monkeypatch, tmp_path):
    """S-41: a grammar that takes for ever is refused in bounded time, its process is gone, and the next one is fine."""
    stuck = tmp_path / "trial.py"
    stuck.write_text(
        "import sys, time\n"
        "sys.stdin.readline()\n"
        "for line in sys.stdin:\n"
        "    time.sleep(600 * ('bomb' in line))\n"
        "    print('', flush=True)\n"
    )
    monkeypatch.setattr(grammar_trial, "__file__", str(stuck))
    made = GrammarCompiler(vocabulary, "cloud", trial_s=0.5)
    try:
        made.guide(regex("a"))
        with pytest.raises(BadRequest, match="too much time"):
            made.guide(regex("bomb"))
        assert allowed(made.guide(regex("b"))) == set(ids("b"))
    finally:
        made.close()


def test_a_trial_that_dies_is_a_refusal(vocabulary, monkeypatch, tmp_path):
    """S-41: a grammar that kills its trial is refused; if none can be started at all, that is said instead."""
    dying = tmp_path / "trial.py"
    dying.write_text(
        "import sys\n"
        "sys.stdin.readline()\n"
        "for line in sys.stdin:\n"
        "    'bomb' in line and sys.exit(1)\n"
        "    print('', flush=True)\n"
    )
    monkeypatch.setattr(grammar_trial, "__file__", str(dying))
    made = GrammarCompiler(vocabulary, "cloud")
    with pytest.raises(BadRequest):
        made.guide(regex("bomb"))
    made.guide(regex("a"))
    made.close()
    monkeypatch.setattr(grammar_trial, "__file__", str(tmp_path / "none.py"))
    with pytest.raises(Overloaded):
        made.guide(regex("c"))
