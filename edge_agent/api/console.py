"""The administrator's web page, as static files. Whoever opens it sees nothing until the API has let them in."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

import router

CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": CONTENT_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class _Console(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(HEADERS)
        return response


def add_console(app: FastAPI) -> None:
    """Serve it under /console/."""
    folder = Path(router.__file__).parent / "console"

    async def there(_: Request) -> Response:
        return RedirectResponse("/console/")

    app.router.routes += [Route("/console", there), Mount("/console", _Console(directory=folder, html=True))]
