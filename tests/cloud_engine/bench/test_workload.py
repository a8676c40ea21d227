import statistics

from cloud_engine.bench.workload import LEAST, OUTPUTS, PROMPTS, SHAREGPT, jobs, longest

TOKENS = range(100, 200)


def test_fixed_lengths_are_exact_and_seeded() -> None:
    """The same seed asks the same again, another seed something else, only with tokens that were allowed."""
    made = jobs("fixed", 3, 5, 7, tokens=TOKENS, seed=1)
    assert [(len(job.prompt), job.output) for job in made] == [(5, 7)] * 3
    assert made == jobs("fixed", 3, 5, 7, tokens=TOKENS, seed=1)
    assert made != jobs("fixed", 3, 5, 7, tokens=TOKENS, seed=2)
    assert {token for job in made for token in job.prompt} <= set(TOKENS)


def test_a_mix_has_the_documented_spread() -> None:
    """Medians and means of 4,000 requests are ShareGPT's within a tenth, and nothing is over the limit it says."""
    made = jobs("mixed", 4000, *SHAREGPT, tokens=TOKENS, seed=0)
    sizes = [(len(job.prompt), job.output) for job in made]
    prompts, outputs = zip(*sizes, strict=True)
    assert abs(statistics.median(prompts) / 80 - 1) < 0.1
    assert abs(statistics.median(outputs) / 220 - 1) < 0.1
    assert abs(statistics.mean(prompts) / SHAREGPT[0] - 1) < 0.1
    assert abs(statistics.mean(outputs) / SHAREGPT[1] - 1) < 0.1
    assert min(prompts) >= LEAST
    assert max(prompts) == PROMPTS.longest(SHAREGPT[0]) == 966
    assert max(outputs) == OUTPUTS.longest(SHAREGPT[1]) == 1014
    assert longest("mixed", *SHAREGPT) == 966 + 1014
