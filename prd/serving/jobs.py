"""Jobs of the service: a bounded queue, what became of each, and the files that are kept for a while.

submit -> queued -> running -> done, failed or cancelled -> forgotten, with its files, after `keep` seconds

Every method may be called from any thread.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import tempfile
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from prd.serving.errors import QueueFull, Stopping, UnknownJob
from prd.serving.requests import MeshRequest

Status = Literal["queued", "running", "done", "failed", "cancelled"]
STATUSES: tuple[Status, ...] = get_args(Status)
MAX_KEPT = 4096  # finished jobs that are remembered, however short they were
TICK = 1.0  # seconds between looks for jobs whose time is over

logger = logging.getLogger(__name__)


@dataclass
class Job:
    """A mesh that was asked for.

    id        32 random hexadecimal digits, the name of its files
    progress  in [0, 1]
    seconds   from when it was begun until it was finished; until now while it runs, None while it waits
    faces     triangles of its mesh
    files     by format
    picture   of its mesh, a PNG, if the request asked for one
    warnings  sentences about its mesh and prompt, as the command line prints them
    error     (type, sentence) of a failed job
    received  whether a file of it was read, or why it failed
    """

    id: str
    request: MeshRequest
    created: datetime
    status: Status = "queued"
    progress: float = 0.0
    started: float | None = None
    finished: float | None = None
    faces: int | None = None
    files: dict[str, Path] = field(default_factory=dict)
    picture: Path | None = None
    warnings: list[str] = field(default_factory=list)
    error: tuple[str, str] | None = None
    received: bool = False
    watchers: dict[int, Callable[[], None]] = field(default_factory=dict)

    @property
    def seconds(self) -> float | None:
        if self.started is None:
            return None
        return round((self.finished or time.monotonic()) - self.started, 3)

    @property
    def is_finished(self) -> bool:
        return self.status in ("done", "failed", "cancelled")


class Jobs:
    """All jobs of a service, and the temporary folder of their files."""

    def __init__(self, limit: int, keep: float, keep_bytes: int) -> None:
        """limit: jobs that may wait; keep: seconds that a finished one is kept; keep_bytes: of all kept files."""
        self.limit, self.keep, self.keep_bytes = limit, keep, keep_bytes
        self.folder = Path(tempfile.mkdtemp(prefix="prd-serve-"))
        self.stopping, self.stopped = False, 0.0  # when
        self.total: Counter[str] = Counter()  # of finished jobs, by status
        self._changed = threading.Condition(threading.RLock())
        self._queue: OrderedDict[str, Job] = OrderedDict()
        self._running: dict[str, Job] = {}
        self._finished: OrderedDict[str, Job] = OrderedDict()  # the oldest first
        self._bytes: dict[str, int] = {}
        self._next_watcher = 0
        self.on_finished: Callable[[Job], None] = lambda job: None

    # -- of clients ---------------------------------------------------------------------------------------------------

    def submit(self, request: MeshRequest) -> Job:
        """Queue a request; raises `QueueFull` and `Stopping`."""
        with self._changed:
            if self.stopping:
                raise Stopping("the service stops and takes no new jobs")
            if len(self._queue) >= self.limit:
                raise QueueFull(f"{self.limit} jobs are waiting, as many as may; try again later")
            job = Job(secrets.token_hex(16), request, datetime.now(UTC))
            self._queue[job.id] = job
            self._changed.notify_all()
            return job

    def get(self, id: str) -> Job:
        """Return a job; raises `UnknownJob` for one that never was or whose time is over."""
        with self._changed:
            self.expire()
            for jobs in (self._queue, self._running, self._finished):
                if id in jobs:
                    return jobs[id]
        raise UnknownJob(
            f"there is no such job; a finished one is kept for {self.keep:g} seconds, or until newer files need room"
        )

    def position(self, job: Job) -> int:
        """Return the place of a job in the queue, 1 for the next; 0 once it has left it."""
        with self._changed:
            return list(self._queue).index(job.id) + 1 if job.id in self._queue else 0

    def cancel(self, job: Job) -> None:
        """Cancel a job, or forget it with its files if it is finished."""
        with self._changed:
            if job.is_finished:
                self._forget(job.id)
            else:
                self._finish(job, "cancelled")

    @contextmanager
    def watch(self, job: Job, changed: Callable[[], None]) -> Iterator[None]:
        """Call `changed`, from another thread, whenever the job changes."""
        with self._changed:
            self._next_watcher += 1
            key = self._next_watcher
            job.watchers[key] = changed
        try:
            yield
        finally:
            with self._changed:
                job.watchers.pop(key, None)

    def wait(self, job: Job, seconds: float | None = None) -> bool:
        """Wait until a job is finished, on this thread; returns whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: job.is_finished, seconds)

    # -- of the worker ------------------------------------------------------------------------------------------------

    def take(self, most: int) -> list[Job]:
        """Wait for jobs and take the next, with others that fit into one call beside it; [] when the service stops."""
        with self._changed:
            while not self._queue:
                if self.stopping:
                    return []
                self._changed.wait(TICK)
                self.expire()
            first = next(iter(self._queue.values()))
            fitting = [job for job in self._queue.values() if job is first or first.request.fits_beside(job.request)]
            for job in fitting[:most]:
                del self._queue[job.id]
                self._running[job.id] = job
                job.status, job.started = "running", time.monotonic()
                self._notify(job)
            for job in self._queue.values():  # whose places changed
                self._notify(job)
            return fitting[:most]

    def advance(self, job: Job, progress: float) -> None:
        """Say how far a running job is."""
        with self._changed:
            if job.status == "running":
                job.progress = progress
                self._notify(job)

    def complete(self, job: Job, files: dict[str, Path], faces: int, picture: Path | None = None) -> None:
        """Finish a job with its files; they are removed if it was cancelled meanwhile."""
        paths = [*files.values(), *([picture] if picture else [])]
        with self._changed:
            if job.is_finished:
                _remove(paths)
                return
            job.files, job.faces, job.picture, job.progress = files, faces, picture, 1.0
            self._bytes[job.id] = sum(path.stat().st_size for path in paths)
            self._finish(job, "done")

    def fail(self, job: Job, type: str, message: str) -> None:
        """Finish a job with an error."""
        with self._changed:
            if not job.is_finished:
                job.error = (type, message)
                self._finish(job, "failed")

    # -- of the service -----------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Take no more jobs and fail those that wait; running ones go on."""
        with self._changed:
            self.stopping, self.stopped = True, time.monotonic()
            for job in list(self._queue.values()):
                self.fail(job, Stopping.type, "the service stopped before the job was begun; send it again")
            self._changed.notify_all()

    def close(self) -> None:
        """Remove the folder with all files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def count(self) -> dict[Status, int]:
        """Return the number of jobs that are kept, by status."""
        with self._changed:
            kept = Counter(job.status for job in self._finished.values())
            kept |= Counter({"queued": len(self._queue), "running": len(self._running)})
            return {status: kept[status] for status in STATUSES}

    @property
    def unreceived(self) -> bool:
        """Whether a client has not yet read what became of a job that was finished after `stop`."""
        with self._changed:
            late = [job for job in self._finished.values() if (job.finished or 0) >= self.stopped]
            return any(job.status in ("done", "failed") and not job.received for job in late)

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def running(self) -> int:
        return len(self._running)

    def expire(self) -> None:
        """Forget jobs whose time is over, and the oldest where there are too many or their files are too large."""
        with self._changed:
            now = time.monotonic()
            while self._finished:
                oldest = next(iter(self._finished.values()))
                assert oldest.finished is not None
                newest_alone = len(self._finished) == 1
                if not (
                    now - oldest.finished > self.keep
                    or len(self._finished) > MAX_KEPT
                    or (sum(self._bytes.values()) > self.keep_bytes and not newest_alone)
                ):
                    return
                self._forget(oldest.id)

    def _finish(self, job: Job, status: Status) -> None:
        self._queue.pop(job.id, None)
        self._running.pop(job.id, None)
        job.status, job.finished = status, time.monotonic()
        self._finished[job.id] = job
        self.total[status] += 1
        self.on_finished(job)
        self._notify(job)
        for other in self._queue.values():
            self._notify(other)
        self.expire()

    def _forget(self, id: str) -> None:
        job = self._finished.pop(id)
        self._bytes.pop(id, None)
        _remove([*job.files.values(), *([job.picture] if job.picture else [])])
        job.files, job.picture = {}, None

    def _notify(self, job: Job) -> None:
        for changed in list(job.watchers.values()):
            changed()
        self._changed.notify_all()


def _remove(paths: list[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:  # a program on Windows may hold it: the folder goes when the service stops
            logger.warning("%s could not be removed: %s", path.name, error)
