"""The report in a real browser: narrow and wide, light and dark, on paper, and with nothing but itself."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
from browsers import Scheme, browsing, too_faint
from reported import journal, records

from router.policy import parse
from router.report.command import Sources, write

pytestmark = pytest.mark.system
POLICY = parse(
    "mode: prefer_edge\ngoal: {cloud_share: 0.3}\n"
    "prices: {cloud: {input_per_million: 1, output_per_million: 2, currency: EUR}}\n"
)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
async def test_the_page_fits_and_asks_nobody(tmp_path: Path, width: int, scheme: Scheme) -> None:
    """No error, no request but its own file, no wider than the screen, text that is dark on light or light on dark."""
    out = tmp_path / "report.html"
    kept = journal(tmp_path / "journal.db", records())
    write(Sources(journal=kept, policy=POLICY, policy_name="policy.yaml"), out, datetime(2026, 5, 1, tzinfo=UTC))
    async with browsing(out.as_uri(), width, scheme) as (page, wrong):
        await page.goto(out.as_uri())
        seen = await page.evaluate("document.documentElement.scrollWidth")
        charts = await page.locator("svg[role=img]").count()
        hidden = await page.evaluate(HIDDEN)
        faint = await too_faint(page)
        nameless = await page.locator("td.number:not([data-label])").count()
        ground = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        paper = await page.pdf()

    assert wrong == []
    assert seen <= width
    assert charts >= 8
    assert hidden == faint == []
    assert nameless == 0  # where a narrow screen shows rows as blocks, each number has its name
    assert (int(ground.split("(")[1].split(",")[0]) > 128) == (scheme == "light")
    assert paper.startswith(b"%PDF")


HIDDEN = """[...document.querySelectorAll("svg text")].filter((text) => {
    const [inner, outer] = [text.getBoundingClientRect(), text.closest("svg").getBoundingClientRect()];
    return inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.bottom > outer.bottom + 1;
}).map((text) => text.textContent)"""
"""What is written in a chart and cut off by its edge."""
