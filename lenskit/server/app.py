"""The HTTP side: routes, bodies that may be large or slow, events, and errors as JSON."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, closing
from importlib.resources import files
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, Header, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException

from lenskit.errors import (
    CheckpointNotFoundError,
    InputError,
    KeyRefusedError,
    LenskitError,
    LimitError,
    NoSuchJobError,
    OutOfRoomError,
    PlanFormatError,
    QuotaError,
    RemoteError,
    ResultGoneError,
)
from lenskit.remote.wire import JSON, SAFETENSORS, error_to_wire, unpack
from lenskit.server import schema
from lenskit.server.config import is_loopback
from lenskit.server.database import Entry
from lenskit.server.jobs import FINAL, MINUTE
from lenskit.server.metrics import Metrics
from lenskit.server.results import CHUNK
from lenskit.server.service import LOOK_SECONDS, Caller, Service
from lenskit.server.transfer import RefusedError, Stream, read_body, span
from lenskit.version import __version__

LONGEST_WAIT = 60.0
KEEP_ALIVE_SECONDS = 15.0

# The status of an error, the first that fits.
STATUS: list[tuple[type[LenskitError], int]] = [
    (KeyRefusedError, 401),
    (NoSuchJobError, 404),
    (CheckpointNotFoundError, 404),
    (ResultGoneError, 410),
    (QuotaError, 429),
    (LimitError, 413),
    (OutOfRoomError, 507),
    (PlanFormatError, 400),
    (LenskitError, 422),
]


def application(service: Service, metrics: Metrics) -> FastAPI:
    """The ASGI application of a service."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await run_in_threadpool(service.stop)

    app = FastAPI(
        title="lenskit",
        version=__version__,
        summary="Interventions on transformers, sent as data.",
        description=schema.DESCRIPTION,
        lifespan=lifespan,
    )
    _add_errors(app)
    _add_jobs(app, service)
    _add_models(app, service)
    _add_watching(app, service, metrics)
    return app


# -- errors


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(LenskitError)
    async def lenskit_error(_: Request, error: LenskitError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> JSONResponse:
        return error_response(error.error, error.status)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        got = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"[:300]
        bad = InputError("the request makes no sense", got=got, expected="what /docs says", fix="correct it")
        return error_response(bad, 400)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        bad = InputError("there is nothing here", got=str(error.detail), expected="a path of /docs", fix="see /docs")
        return error_response(bad, error.status_code, dict(error.headers or {}))

    @app.exception_handler(SQLAlchemyError)
    async def no_database(_: Request, error: SQLAlchemyError) -> JSONResponse:
        full = "disk is full" in str(error) or "database or disk" in str(error)
        bad = OutOfRoomError(
            "the server cannot write down what it is asked",
            got="a full disk" if full else "a database that does not answer",
            expected="room, and a database",
            fix="try again later; whoever runs the server has to see to it",
        )
        return error_response(bad, 507 if full else 503, {"Retry-After": "5"})

    @app.exception_handler(Exception)
    async def defect(_: Request, error: Exception) -> JSONResponse:  # which uvicorn logs, with its traceback
        bad = RemoteError(
            "the server failed at this request",
            got=type(error).__name__,
            expected="an answer",
            fix="tell whoever runs the server: its log says where",
        )
        return error_response(bad, 500)


def error_response(
    error: LenskitError, status: int | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """An error as it goes to the client."""
    if status is None:
        status = next(code for kind, code in STATUS if isinstance(error, kind))
    more = {429: {"Retry-After": str(int(MINUTE))}, 401: {"WWW-Authenticate": "Bearer"}}.get(status, {})
    return JSONResponse({"error": error_to_wire(error)}, status, headers={**more, **(headers or {})})


# -- jobs


async def caller_of(request: Request, authorization: Annotated[str | None, Header()] = None) -> Caller:
    """Who asks; a dependency."""
    scheme, _, key = (authorization or "").partition(" ")
    service: Service = request.app.state.service
    if not service.config.use_keys:  # the database need not be asked
        check_local(request)
        return service.caller(None)
    return await run_in_threadpool(service.caller, key.strip() if scheme.lower() == "bearer" else None)


def check_local(request: Request) -> None:
    """See that what asks a server without keys is a program of this machine, and no page of some site in a browser:
    which tells where the page is from, and asks by the name that the site has.

    Raises:
        RefusedError: 403.
    """
    for name in ("host", "origin"):
        told = request.headers.get(name)
        if told is not None and not is_loopback(_host_of(told)):
            error = KeyRefusedError(
                "a server without keys answers to programs of its own machine only",
                got=f"{name.capitalize()}: {told}"[:200],
                expected="an address of this machine, such as 127.0.0.1",
                fix="ask http://127.0.0.1; for all others the server needs keys (leave --no-keys out)",
            )
            raise RefusedError(403, error)


def _host_of(told: str) -> str:
    """Of a Host or Origin header."""
    try:
        return urlsplit(told if "//" in told else f"//{told}").hostname or ""
    except ValueError:
        return ""


Asking = Annotated[Caller, Depends(caller_of)]
Id = Annotated[str, Path(max_length=100)]


def _add_jobs(app: FastAPI, service: Service) -> None:
    app.state.service = service

    @app.post("/v1/jobs", status_code=202, tags=["jobs"], openapi_extra=schema.JOB_BODY, responses=schema.ERRORS)
    async def send(
        request: Request,
        caller: Asking,
        idempotency_key: Annotated[str | None, Header(max_length=200)] = None,
    ) -> schema.Job:
        """Send a job. Once this answers 202, the job will be finished or reported as failed."""
        body = await read_body(request, service.config.job.body_bytes, service.config.upload_seconds)
        kind = request.headers.get("content-type", JSON).partition(";")[0].strip().lower()
        return schema.Job(**await run_in_threadpool(_accept, service, caller, kind, body, idempotency_key))

    @app.get("/v1/jobs", tags=["jobs"], responses=schema.ERRORS)
    def jobs(caller: Asking, limit: Annotated[int, Query(ge=1, le=1000)] = 50) -> schema.JobList:
        """The key's jobs, the newest first."""
        return schema.JobList(
            jobs=[schema.Job(**service.as_json(row)) for row in service.jobs.listed(caller.key, limit)]
        )

    @app.get("/v1/jobs/{id}", tags=["jobs"], responses=schema.ERRORS)
    def job(caller: Asking, id: Id) -> schema.Job:
        """How a job is."""
        return schema.Job(**service.as_json(service.job(caller, id)))

    @app.delete("/v1/jobs/{id}", tags=["jobs"], responses=schema.ERRORS)
    def cancel(caller: Asking, id: Id) -> schema.Job:
        """Cancel a job (one that runs: between two steps), or delete the result of one that is finished."""
        return schema.Job(**service.as_json(service.cancel(caller, id)))

    @app.get("/v1/jobs/{id}/events", tags=["jobs"], response_class=StreamingResponse, responses=schema.EVENTS)
    async def events(caller: Asking, id: Id) -> StreamingResponse:
        """What happens to a job, as server-sent events, until it is over."""
        await run_in_threadpool(service.job, caller, id)
        told = _events(service, caller, id)
        return Stream(told, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    @app.get("/v1/jobs/{id}/result", tags=["jobs"], response_class=StreamingResponse, responses=schema.RESULT)
    async def result(
        caller: Asking,
        id: Id,
        wait: Annotated[float, Query(ge=0, le=LONGEST_WAIT)] = 0,
        range: Annotated[str | None, Header(max_length=100)] = None,
    ) -> Response:
        """The result, as a safetensors file; 202 and the job while it is not finished."""
        end = asyncio.get_running_loop().time() + wait
        with service.hub.listening(id) as notes:
            while True:
                left = end - asyncio.get_running_loop().time()
                answer = await run_in_threadpool(_result, service, caller, id, range, wait=left > 0)
                if answer is not None:
                    return answer
                await _over_or(notes, min(left, service.look_seconds))


def _accept(service: Service, caller: Caller, kind: str, body: bytes, idempotency: str | None) -> dict[str, Any]:
    if kind == SAFETENSORS:
        data, tensors = unpack(body)
    else:
        tensors = {}
        try:
            data = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise InputError(
                "the body is no JSON",
                got=f"{type(error).__name__}: {error}"[:300],
                expected=f"{JSON}, or {SAFETENSORS}",
                fix="see /docs",
            ) from error
    return service.as_json(service.accept(caller, data, tensors, idempotency))


def _result(service: Service, caller: Caller, id: str, range: str | None, *, wait: bool) -> Response | None:
    """A job's result; None if whoever asks waits for it."""
    row = service.job(caller, id)
    if row.status not in FINAL:
        return None if wait else JSONResponse(service.as_json(row), 202)
    try:
        service.check_result(row)
    except ResultGoneError:
        raise
    except LenskitError as error:
        return error_response(error, 409)
    return _file(service, row, range)


async def _over_or(notes: "asyncio.Queue[dict[str, Any]]", seconds: float) -> None:
    """Until a job is over, or some seconds are."""
    try:
        async with asyncio.timeout(seconds):
            while (await notes.get())["event"] != "over":
                pass
    except TimeoutError:
        pass


async def _events(service: Service, caller: Caller, id: str) -> AsyncIterator[str]:
    before: tuple[Any, ...] | None = None
    quiet = 0.0
    with service.hub.listening(id) as notes:
        name: str | None = None
        while True:
            row = await run_in_threadpool(service.job, caller, id)
            data = await run_in_threadpool(service.as_json, row)
            now = (row.status, data["step"], data["place"], name)
            if now != before:
                event = name if name == "saved" and row.status == "running" else row.status
                yield f"event: {event}\ndata: {json.dumps(data)}\n\n"
                before, quiet = now, 0.0
            if row.status in FINAL:
                return
            name = None
            try:
                note = await asyncio.wait_for(notes.get(), LOOK_SECONDS)
                name = "saved" if note["event"] == "saved" else None
            except TimeoutError:
                quiet += LOOK_SECONDS
                if quiet >= KEEP_ALIVE_SECONDS:
                    yield ": \n\n"
                    quiet = 0.0


def _file(service: Service, row: Entry, asked: str | None) -> Response:
    """The bytes that were asked for."""
    size = int(row.result_bytes)
    start, end = span(asked, size)
    headers = {"Accept-Ranges": "bytes", "ETag": f'"{row.id}-{size}"', "Content-Length": str(end - start)}
    if start >= size:
        return Response(status_code=416, headers={"Content-Range": f"bytes */{size}"})
    try:
        pieces = service.results.read(row.id, start, end)
    except FileNotFoundError:
        raise ResultGoneError(
            f"the result of {row.id} is gone", got="no file", expected="a file", fix="send the job again"
        ) from None
    if asked is not None and (start, end) != (0, size):
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    status = 206 if "Content-Range" in headers else 200
    if end - start > CHUNK:
        return Stream(pieces, status, media_type=SAFETENSORS, headers=headers)
    with closing(pieces):
        return Response(next(pieces, b""), status, media_type=SAFETENSORS, headers=headers)


# -- models


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", tags=["models"], responses=schema.ERRORS)
    def models(caller: Asking) -> schema.ModelList:
        """What is served."""
        found = [{**served.summary(), "status": service.status(name)} for name, served in service.served.items()]
        return schema.ModelList(models=[schema.Model(**model) for model in found])

    @app.get(
        "/v1/models/{name:path}/files/{file:path}", tags=["models"], response_class=Response, responses=schema.ERRORS
    )
    def file(caller: Asking, name: str, file: str) -> Response:
        """A file that describes a model: its config, its tokenizer's; never its weights."""
        path = service.model(name).files.get(file)
        if path is None:
            raise CheckpointNotFoundError(
                "the model has no such file",
                got=repr(file)[:200],
                expected="one of its `files`",
                fix="see /v1/models/NAME",
            )
        return Response(path.read_bytes(), media_type="application/octet-stream")

    @app.get("/v1/models/{name:path}", tags=["models"], responses=schema.ERRORS)
    def model(caller: Asking, name: str) -> schema.ModelDescription:
        """A model's sizes, hook points, and the files that describe it."""
        return schema.ModelDescription(**service.model(name).description(), status=service.status(name))


# -- watching


def _add_watching(app: FastAPI, service: Service, metrics: Metrics) -> None:
    page = files("lenskit.server").joinpath("page")

    @app.get("/", include_in_schema=False)
    def index() -> HTMLResponse:
        return HTMLResponse(page.joinpath("index.html").read_text(encoding="utf-8"), headers=_PAGE_HEADERS)

    @app.get("/page/{name}", include_in_schema=False)
    def part(name: str) -> Response:
        kinds = {"page.js": "text/javascript", "page.css": "text/css"}
        if name not in kinds:
            raise HTTPException(404, "no such part of the page")
        return Response(page.joinpath(name).read_bytes(), media_type=kinds[name], headers=_PAGE_HEADERS)

    @app.get("/v1/health", tags=["watching"])
    def health() -> schema.Health:
        """Whether the server answers; no key needed."""
        return schema.Health(status="ok", version=__version__)

    @app.get("/v1/limits", tags=["watching"], responses=schema.ERRORS)
    def limits(caller: Asking) -> schema.Limits:
        """What a job and the key may have, and what of it the key uses."""
        return schema.Limits(job=service.config.job, key=caller.limits, used=service.jobs.used(caller.key))

    @app.get("/v1/overview", tags=["watching"], responses=schema.ERRORS)
    def overview(caller: Asking) -> schema.Overview:
        """What the page at / shows."""
        return schema.Overview(**service.overview(caller))

    @app.get("/metrics", include_in_schema=False)
    def measured() -> Response:
        return Response(metrics.text(service), media_type=metrics.media_type)


_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
