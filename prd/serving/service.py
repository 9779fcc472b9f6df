"""The service without its doors: limits, jobs, worker and counts, shared by `prd serve` and `prd demo`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from prd.meshes.options import MAX_RESOLUTION
from prd.serving.errors import Loading, Stopping
from prd.serving.jobs import Job, Jobs
from prd.serving.metrics import Metrics
from prd.serving.requests import Limits, MeshRequest, check_request
from prd.serving.worker import Worker
from prd.utils.arguments import check_int


@dataclass(frozen=True)
class ServiceConfig:
    """Sizes of a service; ValueError for one out of its range.

    queue           jobs that may wait
    batch_size      prompts in one call of the pipeline
    keep            seconds that a finished job and its files are kept
    keep_megabytes  of all kept files
    rate            requests for meshes per minute and client; 0: no limit
    limits          largest values that a request may have
    """

    queue: int = 64
    batch_size: int = 4
    keep: int = 600
    keep_megabytes: int = 1024
    rate: int = 600
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for name, least in (("queue", 1), ("batch_size", 1), ("keep", 1), ("keep_megabytes", 1), ("rate", 0)):
            check_int(name, getattr(self, name), least)
        check_int("max_resolution", self.limits.resolution, 8, MAX_RESOLUTION)


class Service:
    """Takes requests and answers them with jobs; `start` loads the model on the worker's thread.

    load  returns the pipeline, one of `prd.load_pipeline`
    """

    def __init__(self, load: Callable[[], Any], config: ServiceConfig | None = None) -> None:
        self.config = config or ServiceConfig()
        self.jobs = Jobs(self.config.queue, self.config.keep, self.config.keep_megabytes << 20)
        self.worker = Worker(load, self.jobs, self.config.batch_size)
        self.metrics = Metrics(self.jobs)

    @property
    def pipe(self) -> Any:
        """The pipeline; raises `Loading` before it is there and `Stopping` once the service stops."""
        if self.jobs.stopping:
            raise Stopping("the service stops and takes no new jobs")
        if self.worker.pipe is None:
            raise Loading("the model is being loaded; try again in some seconds", retry_after=5)
        return self.worker.pipe

    @property
    def is_busy(self) -> bool:
        """Whether a mesh is being made."""
        return self.worker.pipe is not None and self.worker.is_alive()

    def start(self) -> None:
        """Start to load the model."""
        self.worker.start()

    def wait_until_loaded(self) -> None:
        """Wait for the model; raises what loading it raised."""
        self.worker.loaded.wait()
        if self.worker.failure is not None:
            raise self.worker.failure

    def submit(self, request: MeshRequest) -> Job:
        """Check and queue a request; raises an error of `prd.serving.errors` for one that is not taken."""
        request = check_request(request, self.config.limits, self.pipe, self.jobs.folder)
        return self.jobs.submit(request)

    def retry_after(self) -> int:
        """Return the seconds after which the queue should have room."""
        seconds = self.metrics.mean_seconds() * self.jobs.waiting / self.config.batch_size
        return min(600, max(1, round(seconds)))

    def stop(self) -> None:
        """Take no more jobs and fail those that wait; the running ones go on."""
        self.jobs.stop()

    def close(self) -> None:
        """Stop, wait for the running jobs, and remove all files."""
        self.stop()
        if self.worker.is_alive():
            self.worker.join()
        self.jobs.close()
