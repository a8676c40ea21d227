"""`make bench`: what is promised about speed, measured side by side in one run. One JSON object a line.

    PYTHONPATH=deploy python -m tests.benchmarks [SUITE ...] [--rounds N] [--model FILE.gguf]

Ratios are taken round by round between runs that alternate, and quoted as median with the range: absolute numbers of a
shared machine drift, their ratios much less. What was measured where is kept in RESULTS.md.
"""

import argparse
import os
from pathlib import Path

from shared.models import default_store, resolve
from tests.benchmarks import (
    deaths,
    decision,
    drafting,
    edge,
    edge_bars,
    edge_drafting,
    interference,
    link,
    predictions,
    prefix,
    rivals,
    semantic,
)
from tests.benchmarks.ratios import show

SUITES = {
    "edge": edge.measure, "link": link.measure, "engine": rivals.measure, "drafting": drafting.measure,
    "prefix": prefix.measure, "interference": interference.measure, "deaths": deaths.measure,
    "edge-drafting": edge_drafting.measure, "semantic": semantic.measure, "predictions": predictions.measure,
    "decision": decision.measure,
    "edge_bars": edge_bars.measure,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", choices=[*SUITES, []], default=[])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="smollm2:135m")
    args = parser.parse_args()
    model = resolve(args.model, store=default_store(os.environ, Path.home()))
    for name in args.suites or SUITES:
        show(SUITES[name](model, args.rounds))


if __name__ == "__main__":
    main()
