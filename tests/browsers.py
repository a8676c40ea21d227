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
