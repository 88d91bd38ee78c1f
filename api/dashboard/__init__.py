"""The dashboard: a page shell and plain ES modules on the public API. No build step, no inline script, no CDN."""

from importlib.resources import files
from pathlib import Path

import plotly
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from fastapi.templating import Jinja2Templates

from api.http import PAGE_POLICY

__all__ = ["add_dashboard"]

_HERE = Path(str(files(__package__)))
_PLOTLY = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"


def add_dashboard(app: FastAPI) -> None:
    """Serve the dashboard at ``/`` and its files under ``/static``."""
    router = APIRouter(include_in_schema=False)
    templates = Jinja2Templates(_HERE / "templates")

    @router.get("/")
    def page(request: Request) -> Response:
        return templates.TemplateResponse(
            request,
            "index.html",
            {"version": app.version},
            headers={"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"},
        )

    @router.get("/static/plotly.min.js")
    def plotly_js() -> Response:
        return FileResponse(
            _PLOTLY, media_type="text/javascript", headers={"Cache-Control": "public, max-age=86400, immutable"}
        )

    app.include_router(router)
    app.mount("/static", StaticFiles(directory=_HERE / "static"), name="static")
