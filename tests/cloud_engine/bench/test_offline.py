import itertools
import json
from pathlib import Path

import pytest

from cloud_engine.bench.commands import engine_options
from cloud_engine.bench.figures import Report
from cloud_engine.bench.offline import Plan, engine_for, measure, run
from cloud_engine.bench.workload import jobs
from shared.config import InvalidSettings
from shared.errors import Internal

TOKENS = range(3, 259)


def test_a_round_counts_every_token_once(tiny_model: Path) -> None:
    """With a clock that ticks once a step: the wall time, first tokens and gaps are those of the schedule."""
    engine = engine_for(tiny_model, 3, 12, {})
    ticks = itertools.count()
    got = measure(engine, jobs("fixed", 3, 6, 4, tokens=TOKENS, seed=0), lambda: float(next(ticks)))
    # Started at 0; all prompts in the first step, which ends at 1; the whole ends one tick after the last step.
    assert (got.wall_s, got.tokens, got.rate) == (5.0, 12, 12 / 5)
    assert got.firsts == [1.0] * 3
    assert got.gaps == [1.0] * 9
    assert engine.stats().kv_blocks_used == 0


def test_too_few_tokens_are_no_result(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that ends early would make an engine look fast."""
    engine = engine_for(tiny_model, 1, 12, {})
    step = engine.step

    def ending() -> object:
        outputs = step()
        for output in outputs:
            engine.finish(output.sequence)
        return outputs

    monkeypatch.setattr(engine, "step", ending)
    with pytest.raises(Internal, match="did not generate"):
        measure(engine, jobs("fixed", 1, 6, 4, tokens=TOKENS, seed=0), lambda: 0.0)


def test_rows_have_a_fixed_form(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One a number of requests, in order, for fixed lengths and for a mix, with the range over the repeats."""
    for lengths in ("fixed", "mixed"):
        run(tiny_model, Plan([1, 3], 8, 4, lengths, repeats=2), {"block_size": 4}, Report())  # type: ignore[arg-type]
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
        assert [(row["n"], row["in"], row["out"], row["lengths"], row["repeats"]) for row in rows] == [
            (1, 8, 4, lengths, 2),
            (3, 8, 4, lengths, 2),
        ]
        for row in rows:
            assert 0 < row["wall_s_min"] <= row["wall_s"] <= row["wall_s_max"]
            assert 0 < row["out_tok_s_min"] <= row["out_tok_s"] <= row["out_tok_s_max"]
            assert 0 < row["itl_ms_p50"] <= row["itl_ms_p99"] <= row["itl_ms_max"]


def test_any_field_of_the_config_can_be_set() -> None:
    """By its name, read as its type; later ones win; what does not fit is named."""
    given = engine_options(["dtype=float32", "block_size=8", "prefix_caching=true", "dtype=bfloat16"])
    assert given == {"dtype": "bfloat16", "block_size": 8, "prefix_caching": True}
    for wrong, text in (("blocks=1", "no field"), ("block_size=x", "block_size"), ("dtype=int4", "dtype"), ("", "no")):
        with pytest.raises(InvalidSettings, match=text):
            engine_options([wrong])


def test_a_load_over_the_models_context_is_refused(tiny_model: Path) -> None:
    """Its positions beyond that were never learnt."""
    with pytest.raises(ValueError, match="context length of 256"):
        engine_for(tiny_model, 1, 257, {})
