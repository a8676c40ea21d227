"""The administrator's page in a real browser."""

from pathlib import Path

import pytest
from administration import TOKEN, administration
from browsers import Scheme, browsing, too_faint
from fleets import KEY, signed, watching
from playwright.async_api import expect

WRONG = "mode: prefer_cloud\nrules:\n  - name: code\n    when: {cod: true}\n    target: edge\n"
RIGHT = WRONG.replace("cod:", "code:")
pytestmark = pytest.mark.system


async def test_a_policy_is_mended_replayed_put_in_force_and_rolled_back(tmp_path: Path) -> None:
    """Edit, the mistake at its line, fix, replay, activate, seen in the live decisions, roll back."""
    async with administration(tmp_path) as edge, browsing(edge.url) as (page, wrong):
        for number in range(4):
            await edge.ask(f"question {number}")
        await page.goto(f"{edge.url}/console/#token={TOKEN}")
        await expect(page.get_by_text("connected", exact=True).first).to_be_visible()
        assert TOKEN not in page.url

        await page.get_by_role("link", name="Policy").click()
        editor = page.get_by_role("textbox", name="Policy in YAML")
        await editor.fill(WRONG)
        mistake = page.get_by_role("button", name="Line 4: rules[0].when.cod: unknown field; did you mean code?")
        await expect(mistake).to_be_visible()
        await expect(page.locator(".editor pre b")).to_have_text("4")
        await expect(page.get_by_role("button", name="Activate")).to_be_disabled()

        await editor.fill(RIGHT)
        await expect(page.get_by_text("Valid: mode prefer_cloud, 1 rule")).to_be_visible()
        await page.get_by_role("button", name="Replay").click()
        moved = "It would move 4 to the cloud (of 4); 0 redacted, 0 private leaks"
        await expect(page.get_by_text(moved)).to_be_visible()

        await page.get_by_role("button", name="Activate").click()
        await page.get_by_label("Why?").fill("the cloud is quick today")
        await page.keyboard.press("Enter")
        await expect(page.get_by_text("In force: version 1, mode prefer_cloud")).to_be_visible()
        assert (await edge.ask("after")).headers["x-causeway-route"] == "cloud"

        await page.get_by_role("link", name="Decisions").click()
        await expect(page.locator("tbody tr").first).to_contain_text("mode prefer_cloud")
        await expect(page.locator("tbody tr")).to_have_count(5)

        await page.get_by_role("link", name="Policy").click()
        await page.get_by_role("button", name="Roll back").click()
        await page.get_by_label("Why?").fill("dear")
        await page.keyboard.press("Enter")
        await expect(page.get_by_text("In force: default, mode prefer_edge")).to_be_visible()
        assert (await edge.ask("again")).headers["x-causeway-route"] == "edge"

        await page.get_by_role("link", name="History").click()
        await expect(page.get_by_text("The record is whole")).to_be_visible()
        await expect(page.locator("tbody").last).to_contain_text("dear")
    assert wrong == []


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
async def test_every_page_fits_and_asks_nobody_else(tmp_path: Path, width: int, scheme: Scheme) -> None:
    """No page is wider than the screen, all can be read, none reports an error, nothing is fetched from elsewhere."""
    async with administration(tmp_path) as edge, browsing(edge.url, width, scheme) as (page, wrong):
        await edge.ask()
        await page.goto(f"{edge.url}/console/#token={TOKEN}")
        for name in ("Now", "Decisions", "Traffic", "Cache", "Policy", "Goal", "History", "Fleet"):
            await page.get_by_role("link", name=name).click()
            await expect(page.locator("main > div > *").first).to_be_visible()
            assert await page.evaluate("document.documentElement.scrollWidth") <= width
            assert await too_faint(page) == []
        await page.evaluate("document.querySelector('main').style.opacity = 0.5")
        assert await too_faint(page)  # it can tell
    assert wrong == []


async def test_a_goal_is_seen_before_it_is_written(tmp_path: Path) -> None:
    """By the keyboard alone: more to the cloud keeps more and is told in numbers; the goal goes into the editor, and
    what is written there stays while other pages are looked at."""
    async with administration(tmp_path) as edge, browsing(edge.url) as (page, wrong):
        await page.goto(f"{edge.url}/console/#token={TOKEN}")
        await page.get_by_role("link", name="Goal").press("Enter")
        slider = page.get_by_role("slider", name="Share to the cloud")
        await expect(page.get_by_text("No goal is in force")).to_be_visible()
        before = await page.locator("main dl").first.inner_text()
        await slider.press("ArrowRight")
        after = await page.locator("main dl").first.inner_text()
        written = await page.locator("main pre").first.inner_text()
        await page.get_by_role("button", name="Put it into the policy").press("Enter")
        editor = page.get_by_role("textbox", name="Policy in YAML")
        await expect(page.get_by_text("Valid: ")).to_be_visible()
        draft = await editor.input_value()
        await page.get_by_role("link", name="Cache").press("Enter")
        await expect(page.get_by_text("the cache is off")).to_be_visible()
        await page.get_by_role("link", name="Policy").press("Enter")
        await expect(editor).to_have_value(draft)
        await page.get_by_role("button", name="Start over").press("Enter")
        await expect(page.get_by_text("No difference.")).to_be_visible()

    assert before != after
    assert draft.endswith(f"\n\n{written.strip()}\n")
    assert wrong == []


async def test_a_goal_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    """Only its own lines of the policy change, wherever they stand and in whatever form."""
    goal, rest = "cloud_share: 0.20", "mode: prefer_edge\nrules: []"
    written = f"{rest}\n\ngoal:\n  {goal}\n"
    sources = [
        rest,
        f"{rest}\ngoal: {{quality: 0.9}}",
        f"{rest}\ngoal:\n  # as agreed\n  quality: 0.9\n\n",
        "mode: prefer_edge\ngoal:\n  quality: 0.9\nrules: []\n",
    ]
    async with administration(tmp_path) as edge, browsing(edge.url) as (page, _):
        await page.goto(f"{edge.url}/console/")
        found = await page.evaluate(
            "async ([sources, goal]) => {"
            " const {withGoal} = await import('/console/draft.js');"
            " return sources.map((source) => withGoal(source, goal)); }",
            [sources, goal],
        )

    assert found == [written] * len(sources)


async def test_a_daemon_that_is_gone_is_said_to_be_gone(tmp_path: Path) -> None:
    """What was seen last stays in sight, but faded, and comes back by itself."""
    async with administration(tmp_path) as edge, browsing(edge.url) as (page, _):
        await page.goto(f"{edge.url}/console/#token={TOKEN}")
        await expect(page.get_by_role("heading", name="This device")).to_be_visible()
        await page.route("**/admin/**", lambda route: route.abort())
        await expect(page.get_by_text("the daemon cannot be reached")).to_be_visible()
        assert await page.locator("body.stale").count() == 1
        await expect(page.get_by_role("heading", name="This device")).to_be_visible()
        await page.get_by_role("link", name="Traffic").click()
        await expect(page.get_by_role("button", name="Try again")).to_be_visible()
        await page.unroute("**/admin/**")
        await page.get_by_role("button", name="Try again").click()
        await expect(page.get_by_text("Nothing yet.")).to_be_visible()
        assert await page.locator("body.stale").count() == 0


async def test_nothing_is_shown_without_a_credential(tmp_path: Path) -> None:
    """A wrong one is asked for again, a right one stays in its tab; the keyboard is enough."""
    async with administration(tmp_path) as edge, browsing(edge.url) as (page, _):
        await page.goto(f"{edge.url}/console/")
        field = page.get_by_label("Token or key")
        await field.fill("wrong")
        await page.keyboard.press("Enter")
        await expect(page.locator("#sign-in .problem")).to_contain_text("needs the token")
        await field.fill(TOKEN)
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("heading", name="This device")).to_be_visible()
        assert await page.evaluate("Object.keys(localStorage).length") == 0


async def test_the_fleet_is_shown(tmp_path: Path) -> None:
    """Which version is in force, which was refused and why; the record in the history is whole."""
    async with administration(tmp_path, fleet=KEY.public_key()) as edge, browsing(edge.url) as (page, wrong):
        follower = edge.daemon.follower
        assert follower is not None
        await page.goto(f"{edge.url}/console/#token={TOKEN}")
        await page.get_by_role("link", name="Fleet").click()
        await expect(page.get_by_text("none of the fleet's")).to_be_visible()
        async with watching(follower) as offer:
            follower.answered()
            await offer(3, signed(3))
            await expect(page.get_by_text("version 3 in force")).to_be_visible()
            await offer(4, signed(4, "mode: prefer_cloud\nprivacy: {personal: free}"))
        await expect(page.get_by_text("version 4 refused")).to_be_visible()
        await expect(page.get_by_text("yes, so refused")).to_be_visible()
        await expect(page.locator("tbody tr")).to_contain_text("fleet version 4: loosens_privacy")
        await page.get_by_role("link", name="History").click()
        await expect(page.get_by_text("The record is whole")).to_be_visible()
    assert wrong == []


async def test_hostile_text_stays_text(tmp_path: Path) -> None:
    """What a client wrote into a model's name is shown, not run."""
    hostile = "<img/src=x/onerror=alert(1)>"
    async with administration(tmp_path) as edge, browsing(edge.url) as (page, wrong):
        await edge.ask(model=hostile)
        await page.goto(f"{edge.url}/console/#token={TOKEN}")
        await page.get_by_role("link", name="Decisions").click()
        await expect(page.locator("tbody tr").first).to_contain_text(hostile)
        assert await page.locator("main img").count() == 0
    assert wrong == []
