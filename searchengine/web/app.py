"""The app: which routes there are, and what every request passes through."""

from __future__ import annotations

from fastapi import FastAPI

from searchengine import __version__
from searchengine.web.metrics import Measured
from searchengine.web.problems import tell_problems
from searchengine.web.routes import classify, images, login, operations, page, search
from searchengine.web.security import Access, Guard
from searchengine.web.service import Service
from searchengine.web.uploads import BodyLimit


def create_app(service: Service, access: Access) -> FastAPI:
    """An ASGI app that answers from `service`, which the caller opens before and closes after."""
    app = FastAPI(title="searchengine", version=__version__, docs_url=None, redoc_url=None)
    app.state.service = service
    app.state.access = access
    tell_problems(app)
    for room in (search, images, classify, operations, login, page):
        app.include_router(room.router)
    # The last is the outermost.
    app.add_middleware(BodyLimit)
    app.add_middleware(Measured, metrics=service.metrics)
    app.add_middleware(Guard, access=access)
    return app
