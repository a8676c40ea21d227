"""What drafts from the text itself are worth: the same requests with `drafting` on and off, turn by turn.

Three kinds of text: tasks whose answer repeats the prompt (summarise, correct, quote, change code), free text, and
random tokens. Greedy, up to the model's own end of text, so that no circling after it counts as a gain.
"""

import random
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from cloud_engine.engine.build import build
from cloud_engine.engine.config import EngineConfig
from cloud_engine.engine.engine import Engine
from cloud_engine.model.tokenizer import Tokenizer
from shared.schemas import Message, Sampling

TOKENS = 96
TEXT = (
    "The harbour of Aldmere was built in 1874 by a company of engineers from the north. It has two stone piers, a "
    "lighthouse and a small railway that carried fish to the market in town. In 1911 a storm broke the eastern pier, "
    "and the town council borrowed forty thousand pounds to repair it. The lighthouse was automated in 1968, and the "
    "railway was closed in 1972. Today the harbour is used by twelve fishing boats and by visitors who come to see the "
    "seals. A society of volunteers counts them every week and publishes the numbers on a board beside the lighthouse."
)
CODE = """def total_price(items, tax_rate):
    total = 0
    for item in items:
        price = item["price"] * item["quantity"]
        total = total + price
    return total + total * tax_rate
"""
REPEATING = (
    f"Summarize the following text:\n\n{TEXT}",
    f"Repeat the following text word for word:\n\n{TEXT}",
    f"Correct the spelling of this text and write the whole text again:\n\n{TEXT.replace('harbour', 'harbuor')}",
    f"List every sentence of this text that has a year in it:\n\n{TEXT}",
    f"Add a docstring to this function and print the whole function:\n\n{CODE}",
    f"Rename the variable total to amount in this code and print the whole code:\n\n{CODE}",
)
FREE = (
    "Write a poem about the sea at night.",
    "Explain how a bicycle stays upright.",
    "Tell me a short story about a clockmaker and a fox.",
    "Give me ten ideas for a birthday party.",
    "Write a polite letter to a landlord about a broken window.",
    "Why is the sky blue?",
)


def measure(model: Path, rounds: int) -> Iterable[tuple[str, Sequence[float]]]:
    """Ratios of tokens/s with drafts to tokens/s without, for one request at a time and for six at once."""
    tokenizer, rng = Tokenizer(model), random.Random(0)
    kinds = {
        name: [tokenizer.encode_chat([Message(role="user", content=text)]) for text in texts]
        for name, texts in (("repeating", REPEATING), ("free", FREE))
    }
    kinds["random"] = [[rng.randrange(1000, 40000) for _ in range(100)] for _ in FREE]
    engines = {
        drafting: build(
            model,
            EngineConfig(model_len=512, num_blocks=512, drafting=drafting, prefix_caching=False),
            stop_ids=tokenizer.stop_ids,
        )
        for drafting in (True, False)
    }
    for engine in engines.values():
        rate(engine, kinds["free"], 2)
    for name, prompts in kinds.items():
        for at_once in (1, len(prompts)):
            groups = [prompts] if at_once > 1 else [[prompt] for prompt in prompts]
            ratios = []
            for _ in range(rounds):
                on, off = ([rate(engines[drafting], group) for group in groups] for drafting in (True, False))
                if [tokens for tokens, _ in on] != [tokens for tokens, _ in off]:
                    raise ValueError("drafts changed the text")
                ratios.append(sum(seconds for _, seconds in off) / sum(seconds for _, seconds in on))
            yield f"drafts / none, {name} text, {at_once} at once", ratios


def rate(engine: Engine, prompts: list[list[int]], limit: int = TOKENS) -> tuple[list[list[int]], float]:
    """What is generated, and the seconds it takes."""
    start = time.perf_counter()
    sampling = Sampling(temperature=0, max_tokens=limit)
    sequences = [engine.add(str(index), prompt, sampling) for index, prompt in enumerate(prompts)]
    while engine.has_work:
        engine.step()
    return [sequence.output for sequence in sequences], time.perf_counter() - start
