"""Sharing the work of compiled kernels, which run without Python's lock, between threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Kept between calls; a forked process (another id) has none of its parent's threads and gets its own."""
    return ThreadPoolExecutor(threads)


def share(job: Callable[[int], None], count: int, threads: int) -> None:
    """job(0) ... job(count - 1) on this thread and `threads - 1` others, each taking the next when it is free."""
    numbers = iter(range(count))  # its next() is atomic

    def work() -> None:
        for number in numbers:
            job(number)

    helpers = min(threads, count) - 1
    if helpers < 1:
        work()
        return
    pool = _pool(os.getpid(), threads - 1)
    others = [pool.submit(work) for _ in range(helpers)]
    work()
    for other in others:
        other.result()
