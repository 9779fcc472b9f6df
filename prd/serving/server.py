"""The HTTP interface of the service (FastAPI): jobs, their files and events, the model, health, metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

import prd
from prd.serving.errors import InvalidBody, InvalidField, NotDone, QueueFull, ServiceError
from prd.serving.jobs import Job
from prd.serving.limits import BodyLimit, Counted, HostCheck, RateLimit
from prd.serving.metrics import MEDIA_TYPE
from prd.serving.requests import MEDIA_TYPES
from prd.serving.schema import ErrorBody, HealthOut, JobOut, MeshIn, ModelOut, explained, job_out, model_out
from prd.serving.service import Service
from prd.utils.arguments import shown

MAX_WAIT = 600.0  # seconds that a request may wait for its mesh
SILENCE = 15.0  # seconds between signs of life in a stream of events

Wait = Annotated[float, Query(ge=0, le=MAX_WAIT, description="seconds to wait for the mesh before answering")]


def build_app(service: Service, origins: Sequence[str] = (), hosts: Collection[str] | None = None) -> FastAPI:
    """Return the application of a service.

    origins  of web pages of other sites that may ask it from a browser
    hosts    names by which it may be asked, those of `prd.serving.run.hosts_of`; None: any
    """
    app = FastAPI(
        title="prd",
        version=prd.__version__,
        description="Sentences become meshes.",
        responses=_responses(403, 422, 429, 503),
    )
    _add_jobs(app, service)
    _add_files(app, service)
    _add_state(app, service)
    _add_errors(app, service)
    app.add_middleware(BodyLimit, most=service.config.limits.body)
    if hosts is not None:
        app.add_middleware(HostCheck, hosts=hosts)
    app.add_middleware(Counted, add=service.metrics.add_request)
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["content-type"],
            expose_headers=["location", "retry-after", "content-disposition"],
        )
    return app


def _add_jobs(app: FastAPI, service: Service) -> None:
    rates, jobs = RateLimit(service.config.rate), service.jobs

    @app.post("/v1/meshes", status_code=202, responses=_responses(413))
    async def make_mesh(mesh: MeshIn, request: Request, response: Response, wait: Wait = 0) -> JobOut:
        """Queue a mesh. The answer's `Location` is the job; with `wait` it comes when the job is finished."""
        rates.take(request.client.host if request.client else "")
        job = service.submit(mesh.request())
        response.headers["Location"] = f"/v1/meshes/{job.id}"
        await _wait(service, job, wait)
        return _shown(service, job)

    @app.get("/v1/meshes/{id}", responses=_responses(404))
    async def read_job(id: str, wait: Wait = 0) -> JobOut:
        """A job; with `wait` when it is finished."""
        job = jobs.get(id)
        await _wait(service, job, wait)
        return _shown(service, job)

    @app.delete("/v1/meshes/{id}", responses=_responses(404))
    async def cancel_job(id: str) -> JobOut:
        """Cancel a job, or forget it with its file if it is finished."""
        job = jobs.get(id)
        jobs.cancel(job)
        return job_out(job, jobs)


def _add_files(app: FastAPI, service: Service) -> None:
    jobs = service.jobs

    @app.get("/v1/meshes/{id}/file", response_class=Response, responses=_responses(404, 409))
    def read_file(id: str) -> Response:
        """The file of a finished job."""
        job = jobs.get(id)
        if job.status != "done":
            reason = job.error[1] if job.error else f"it is {job.status}"
            raise NotDone(f"the job has no file: {reason}")
        path = job.files[job.request.formats[0]]
        try:
            data = path.read_bytes()  # whole, so that it may be forgotten meanwhile
        except FileNotFoundError:
            jobs.get(id)  # `UnknownJob`
            raise
        job.received = True
        name = {"Content-Disposition": f'attachment; filename="{path.name}"', "X-Content-Type-Options": "nosniff"}
        return Response(data, media_type=MEDIA_TYPES[path.suffix.removeprefix(".")], headers=name)

    @app.get("/v1/meshes/{id}/events", response_class=StreamingResponse, responses=_responses(404))
    async def read_events(id: str) -> StreamingResponse:
        """Server-sent events `progress`, and at the end `done`, `failed` or `cancelled`, each with the job as data."""
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(_events(service, jobs.get(id)), media_type="text/event-stream", headers=headers)


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/v1/model")
    async def read_model() -> ModelOut:
        """Describe the model and the limits of requests."""
        return model_out(service.pipe, service.config.limits, service.jobs, service.config.rate)

    @app.get("/health")
    async def read_health() -> HealthOut:
        """200 where the service takes jobs; 503 while it loads its model, and while it stops."""
        assert service.pipe is not None
        return HealthOut()

    @app.get("/metrics", response_class=PlainTextResponse)
    async def read_metrics() -> PlainTextResponse:
        """Counts in the text format of Prometheus."""
        return PlainTextResponse(service.metrics.text(), media_type=MEDIA_TYPE)


def _add_errors(app: FastAPI, service: Service) -> None:
    """Answer every error as {"error": {"type", "message", "field"}}."""

    def answer(error: ServiceError) -> JSONResponse:
        seconds = service.retry_after() if isinstance(error, QueueFull) else error.retry_after
        headers = {} if seconds is None else {"Retry-After": str(seconds)}
        return JSONResponse(error.body(), error.status, headers)

    async def on_service_error(request: Request, error: Any) -> Response:
        return answer(error)

    async def on_invalid(request: Request, error: Any) -> Response:
        faults = error.errors()
        if faults[0]["loc"][0] == "body":
            return answer(explained(faults))
        name = str(faults[0]["loc"][-1])
        value = shown(faults[0]["input"])
        return answer(InvalidField(f"{name}={value}: must be a number in 0..{MAX_WAIT:g}", field=name))

    async def on_http(request: Request, error: Any) -> Response:
        if error.status_code == 400:  # JSON that Python does not read, as a number of 5,000 digits
            return answer(InvalidBody())
        kind, message = {
            404: ("not_found", "there is nothing here; /docs lists what there is"),
            405: ("method_not_allowed", f"{request.method} is not answered here; /docs lists what is"),
        }.get(error.status_code, ("bad_request", str(error.detail)))
        return JSONResponse({"error": {"type": kind, "message": message}}, error.status_code, error.headers)

    async def on_bug(request: Request, error: Any) -> Response:
        return JSONResponse(ServiceError("the request failed; the service's log says why").body(), 500)

    app.add_exception_handler(ServiceError, on_service_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_bug)


def _shown(service: Service, job: Job) -> JobOut:
    """Return a job for its client, who then knows why it failed."""
    job.received = job.received or job.status == "failed"
    return job_out(job, service.jobs)


async def _wait(service: Service, job: Job, seconds: float) -> None:
    """Wait until a job is finished, at most so many seconds."""
    if not seconds or job.is_finished:
        return
    changed, deadline = asyncio.Event(), asyncio.get_running_loop().time() + seconds
    with service.jobs.watch(job, _from_any_thread(changed)):
        while not job.is_finished:
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                return
            try:
                await asyncio.wait_for(changed.wait(), left)
            except TimeoutError:
                return
            changed.clear()


async def _events(service: Service, job: Job) -> AsyncIterator[str]:
    """Yield a job's events until it is finished; a client that goes away ends it."""
    changed = asyncio.Event()
    with service.jobs.watch(job, _from_any_thread(changed)):
        while True:
            changed.clear()
            shown = _shown(service, job)
            ended = shown.status in ("done", "failed", "cancelled")
            yield f"event: {shown.status if ended else 'progress'}\ndata: {shown.model_dump_json()}\n\n"
            if ended:
                return
            while True:
                try:
                    await asyncio.wait_for(changed.wait(), SILENCE)
                    break
                except TimeoutError:
                    yield ": waiting\n\n"


def _from_any_thread(event: asyncio.Event) -> Callable[[], None]:
    """Return a function that sets an event of this thread's loop from another thread."""
    loop = asyncio.get_running_loop()

    def notify() -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(event.set)

    return notify


def _responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody} for status in statuses}
