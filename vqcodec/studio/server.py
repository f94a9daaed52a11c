"""The server of `vqcodec studio`: the page, and its requests. It listens to this computer only.

Other pages that are open in the browser could send requests here, or give a name of theirs the address 127.0.0.1 (DNS
rebinding). So every request must name this server as its Host and, if it changes anything, as its Origin.
"""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import PurePath
from typing import Any, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vqcodec.errors import VqcodecError
from vqcodec.studio import page
from vqcodec.studio.session import MAX_BYTES, Studio
from vqcodec.studio.worker import Check, SupersededError, Worker

T = TypeVar("T")

_HOST = "127.0.0.1"
_MAX_QUESTION = 10_000  # bytes of JSON
_TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".png": "image/png",
    ".vqz": "application/octet-stream",
}
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def serve(studio: Studio, port: int, on_start: Callable[[str], None]) -> None:
    """Answer requests until Ctrl-C.

    Args:
        studio: what the page works with.
        port: of 127.0.0.1; 0 for any free one.
        on_start: called with the address of the page once it can be opened.

    Raises:
        OSError: the port cannot be used.
    """
    with socket.create_server((_HOST, port)) as listener:
        port = listener.getsockname()[1]
        config = uvicorn.Config(
            application(studio, port), log_level="warning", ws="none", timeout_graceful_shutdown=1, server_header=False
        )
        on_start(f"http://{_HOST}:{port}")
        uvicorn.Server(config).run(sockets=[listener])


def application(studio: Studio, port: int) -> Starlette:
    """The ASGI application.

    Args:
        studio: what the page works with.
        port: the one that it listens to.
    """
    worker = Worker()

    async def work(job: Callable[[Check], T]) -> T:
        return await asyncio.wrap_future(worker.submit(job))

    async def describe(request: Request) -> Response:
        return JSONResponse(studio.describe())

    async def open_file(request: Request) -> Response:
        data = await _body(request, MAX_BYTES)
        name = PurePath(request.query_params.get("name", "")).name or "picture"
        return JSONResponse(await work(lambda check: studio.open(name, data)))

    async def render(request: Request) -> Response:
        number, asked = await _question(request)
        return JSONResponse(await work(lambda check: studio.render(number, asked, check)))

    async def compare(request: Request) -> Response:
        number, asked = await _question(request)
        return JSONResponse(await work(lambda check: studio.compare(number, asked.get("rival"), check)))

    async def file(request: Request) -> Response:
        name = request.path_params["name"]
        data = studio.file(request.path_params["number"], name)
        if data is None:
            raise HTTPException(404, "there is no such file any more")
        return Response(data, media_type=_TYPES[PurePath(name).suffix])

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        worker.close()

    return Starlette(
        routes=[
            Route("/", _static("studio.html")),
            *(Route(f"/{name}", _static(name)) for name in ("viewer.css", "viewer.js", "studio.css", "studio.js")),
            Route("/state", describe),
            Route("/files/{number:int}/{name}", file),
            Route("/open", open_file, methods=["POST"]),
            Route("/render", render, methods=["POST"]),
            Route("/compare", compare, methods=["POST"]),
        ],
        middleware=[Middleware(_SameOrigin, port=port)],
        exception_handlers={
            HTTPException: _refusal,
            VqcodecError: _refusal,
            MemoryError: _refusal,
            SupersededError: _refusal,
            ClientDisconnect: _refusal,
        },
        lifespan=lifespan,
    )


def _static(name: str) -> Callable[[Request], Response]:
    """Answers with a file of web/."""
    response = Response(page.asset(name), media_type=_TYPES[PurePath(name).suffix])
    return lambda request: response


async def _body(request: Request, limit: int) -> bytes:
    """Read the body of a request.

    Raises:
        HTTPException: it is larger than `limit` bytes.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise HTTPException(413, f"the file is larger than the limit of {limit:,} bytes")
    return bytes(body)


async def _question(request: Request) -> tuple[int, dict[str, Any]]:
    """The number of the picture that a request is about, and all that it asks.

    Raises:
        HTTPException: the body is no JSON object with a number.
    """
    try:
        asked = json.loads(await _body(request, _MAX_QUESTION))
    except ValueError:
        asked = None
    if not isinstance(asked, dict) or not isinstance(number := asked.get("number"), int):
        raise HTTPException(400, "expected a JSON object with the number of a picture")
    return number, asked


def _refusal(request: Request, error: Exception) -> Response:
    """Answers with one line that says what is wrong."""
    line = next(iter(str(error).splitlines()), "")
    status = 422
    if isinstance(error, HTTPException):
        status, line = error.status_code, error.detail
    elif isinstance(error, MemoryError):
        status, line = 507, "not enough memory"
    elif isinstance(error, SupersededError):
        status, line = 409, "a newer request has come"
    elif isinstance(error, ClientDisconnect):
        status = 400  # which nobody reads
    return JSONResponse({"error": line}, status)


class _SameOrigin:
    """Refuses requests of other origins and to other hosts, and adds _HEADERS to all answers."""

    def __init__(self, app: ASGIApp, port: int) -> None:
        self._app = app
        self._hosts = {f"{_HOST}:{port}", f"localhost:{port}"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        host, origin = headers.get("host"), headers.get("origin")
        reads = scope["method"] in ("GET", "HEAD") and origin is None
        if host in self._hosts and (reads or origin == f"http://{host}"):
            return await self._app(scope, receive, send_with_headers)
        refusal = JSONResponse({"error": "requests must come from the page of this server"}, 403)
        return await refusal(scope, receive, send_with_headers)
