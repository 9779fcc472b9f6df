"""Counts of the service in the text format of Prometheus (exposition format 0.0.4)."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator

import psutil  # of accelerate

from prd.serving.jobs import STATUSES, Job, Jobs

BUCKETS = (0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)  # seconds
MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Requests by path and status, jobs by status, length of the queue, seconds per mesh, memory."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs = jobs
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, str, int]] = Counter()
        self._seconds: list[int] = [0] * (len(BUCKETS) + 1)
        self._sum = 0.0
        self._process = psutil.Process()
        jobs.on_finished = self.add_job

    def add_request(self, method: str, path: str, status: int) -> None:
        """Count an answer; path: of the route, without what a client made up."""
        with self._lock:
            self._requests[method, path, status] += 1

    def add_job(self, job: Job) -> None:
        """Count the seconds of a job that is done."""
        if job.status != "done" or job.seconds is None:
            return
        with self._lock:
            self._sum += job.seconds
            place = next((i for i, bound in enumerate(BUCKETS) if job.seconds <= bound), len(BUCKETS))
            self._seconds[place] += 1

    def mean_seconds(self) -> float:
        """Return the mean seconds of a job, 1 before the first."""
        with self._lock:
            count = sum(self._seconds)
            return self._sum / count if count else 1.0

    def text(self) -> str:
        """Return all of them."""
        return "\n".join([*self._lines(), ""])

    def _lines(self) -> Iterator[str]:
        with self._lock:
            requests, seconds, total = dict(self._requests), list(self._seconds), self._sum
        yield from _head("prd_requests_total", "counter", "Answers by method, path and HTTP status.")
        for (method, path, status), count in sorted(requests.items()):
            yield f'prd_requests_total{{method="{method}",path="{path}",status="{status}"}} {count}'
        yield from _head("prd_jobs_total", "counter", "Finished jobs by status.")
        for state in STATUSES[2:]:
            yield f'prd_jobs_total{{status="{state}"}} {self.jobs.total[state]}'
        yield from _head("prd_jobs", "gauge", "Jobs that are kept, by status.")
        for state, count in self.jobs.count().items():
            yield f'prd_jobs{{status="{state}"}} {count}'
        yield from _head("prd_queue_length", "gauge", "Jobs that wait.")
        yield f"prd_queue_length {self.jobs.waiting}"
        yield from _head("prd_queue_limit", "gauge", "Jobs that may wait.")
        yield f"prd_queue_limit {self.jobs.limit}"
        yield from _head("prd_job_seconds", "histogram", "Seconds from the begin of a job until its file was written.")
        so_far = 0
        for bound, count in zip([*BUCKETS, None], seconds, strict=True):
            so_far += count
            yield f'prd_job_seconds_bucket{{le="{"+Inf" if bound is None else bound}"}} {so_far}'
        yield f"prd_job_seconds_sum {total:.3f}"
        yield f"prd_job_seconds_count {so_far}"
        yield from _head("process_resident_memory_bytes", "gauge", "Main memory of the process.")
        yield f"process_resident_memory_bytes {self._process.memory_info().rss}"


def _head(name: str, kind: str, about: str) -> Iterator[str]:
    yield f"# HELP {name} {about}"
    yield f"# TYPE {name} {kind}"
