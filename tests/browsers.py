"""A real browser, headless, that notes whatever goes wrong and whatever is asked of anybody else."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

from playwright.async_api import Page, async_playwright, expect
from programs import program

Scheme = Literal["light", "dark"]


@asynccontextmanager
async def browsing(home: str, width: int = 1280, scheme: Scheme = "light") -> AsyncIterator[tuple[Page, list[str]]]:
    """A page, and its errors, messages and addresses that do not begin with `home`."""
    wrong: list[str] = []
    async with async_playwright() as playwright:
        path = program("chromium", "chromium-browser", "google-chrome", package="chromium")
        browser = await playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = await browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: request.url.startswith(home) or wrong.append(request.url))
        page.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)
        try:
            yield page, wrong
        finally:
            await browser.close()


async def too_faint(page: Page) -> list[str]:
    """Each text whose contrast to its ground is under 4.5 to 1 (WCAG 2.2, 1.4.3), with the ratio."""
    found: list[str] = await page.evaluate(CONTRAST)
    return found


CONTRAST = """() => {
    const channel = (value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
    const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
    const colour = (said) => { const [r, g, b, a = 1] = said.match(/[0-9.]+/g).map(Number); return [r, g, b, a]; };
    const over = (top, under) => [0, 1, 2].map((at) => top[at] * top[3] + under[at] * (1 - top[3]));
    const up = (element) => (element ? [element, ...up(element.parentElement)] : []);
    const ground = (element) => up(element).reverse().reduce(
        (under, one) => over(colour(getComputedStyle(one).backgroundColor), under), [255, 255, 255]);
    const ratio = (element) => {
        const style = getComputedStyle(element);
        const opacity = up(element).reduce((product, one) => product * getComputedStyle(one).opacity, 1);
        const [r, g, b, a] = colour(element instanceof SVGElement ? style.fill : style.color);
        const under = ground(element);
        const [dark, light] = [luminance(over([r, g, b, a * opacity], under)), luminance(under)].sort((x, y) => x - y);
        return (light + 0.05) / (dark + 0.05);
    };
    const written = (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    return [...document.querySelectorAll("body *")]
        .filter((element) => (written(element) || element.matches("input, textarea")) && element.checkVisibility())
        .filter((element) => ratio(element) < 4.5)
        .map((element) => `${element.tagName} ${element.textContent.slice(0, 40)}: ${ratio(element).toFixed(2)}`);
}"""
